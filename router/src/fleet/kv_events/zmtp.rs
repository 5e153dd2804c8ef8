//! The listening end of ZeroMQ's publish/subscribe: one connection in ZMTP 3.0 (RFC 23) without security, as SGLang publishes.
#![forbid(unsafe_code)]

use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep_until, timeout};

/// Largest message, all parts together: the events of prompts with a million tokens.
pub(super) const MESSAGE_BYTES_MAX: usize = 8 << 20;

/// Most parts of a message; a batch has three: topic, number, events.
pub(super) const PARTS_MAX: usize = 8;

/// Connecting and shaking hands take at most this long.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A publisher that is silent this long is asked whether it is there.
const PING_INTERVAL: Duration = Duration::from_secs(10);

/// A publisher that does not answer for this long is lost.
const SILENCE_MAX: Duration = Duration::from_secs(30);

/// Room for each read.
const READ_BYTES: usize = 16 << 10;

/// First bytes of a connection: signature, version 3.0, mechanism, and that we are no server.
const GREETING_BYTES: usize = 64;

const MORE: u8 = 1;
const LONG: u8 = 2;
const COMMAND: u8 = 4;

/// The context of a PING, which its PONG repeats, has at most so many bytes.
const CONTEXT_BYTES_MAX: usize = 16;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum Lost {
    /// The system said so.
    #[error(transparent)]
    System(#[from] std::io::Error),
    /// It took longer than [`CONNECT_TIMEOUT`], or nothing came for [`SILENCE_MAX`].
    #[error("the publisher is silent")]
    Silent,
    /// The other end closed it.
    #[error("the publisher closed the connection")]
    Closed,
    /// What came is not the protocol.
    #[error("this is no ZeroMQ publisher: {0}")]
    Protocol(&'static str),
    /// A message of more than [`MESSAGE_BYTES_MAX`] or [`PARTS_MAX`].
    #[error("a message is too large")]
    TooLarge,
}

/// A frame on the wire.
#[derive(Debug, PartialEq, Eq)]
struct Frame {
    flags: u8,
    body: Bytes,
}

/// A subscription.
#[derive(Debug)]
pub(super) struct Subscriber {
    stream: TcpStream,
    buffer: BytesMut,
    parts: Vec<Bytes>,
    heard: Instant,
    asked: Instant,
}

impl Subscriber {
    /// Connects and asks for all messages whose first part begins with `topic`.
    ///
    /// # Errors
    /// [`Lost`]
    pub(super) async fn connect(host: &str, port: u16, topic: &[u8]) -> Result<Self, Lost> {
        let connecting = Self::shake_hands(host, port, topic);
        timeout(CONNECT_TIMEOUT, connecting)
            .await
            .map_err(|_| Lost::Silent)?
    }

    async fn shake_hands(host: &str, port: u16, topic: &[u8]) -> Result<Self, Lost> {
        let stream = TcpStream::connect((host, port)).await?;
        stream.set_nodelay(true)?;
        let now = Instant::now();
        let mut this = Self {
            stream,
            buffer: BytesMut::new(),
            parts: Vec::new(),
            heard: now,
            asked: now,
        };
        this.stream.write_all(&greeting()).await?;
        while this.buffer.len() < GREETING_BYTES {
            this.fill().await?;
        }
        let theirs = this.buffer.split_to(GREETING_BYTES);
        check_greeting(&theirs)?;
        this.send(COMMAND, b"\x05READY\x0bSocket-Type\0\0\0\x03SUB")
            .await?;
        loop {
            let frame = this.frame().await?;
            if frame.flags & COMMAND == 0 {
                return Err(Lost::Protocol("a message before READY"));
            }
            if let Some(metadata) = frame.body.strip_prefix(b"\x05READY") {
                check_socket_type(metadata)?;
                break;
            }
            this.obey(&frame.body).await?;
        }
        this.send(0, &[b"\x01", topic].concat()).await?;
        Ok(this)
    }

    async fn send(&mut self, flags: u8, body: &[u8]) -> Result<(), Lost> {
        let mut frame = Vec::with_capacity(body.len() + 9);
        match u8::try_from(body.len()) {
            Ok(length) => frame.extend([flags, length]),
            Err(_) => {
                frame.push(flags | LONG);
                frame.extend((body.len() as u64).to_be_bytes());
            }
        }
        frame.extend_from_slice(body);
        Ok(self.stream.write_all(&frame).await?)
    }

    /// Reads some more bytes. Safe to cancel.
    async fn fill(&mut self) -> Result<(), Lost> {
        self.buffer.reserve(READ_BYTES);
        match self.stream.read_buf(&mut self.buffer).await? {
            0 => Err(Lost::Closed),
            _ => {
                self.heard = Instant::now();
                Ok(())
            }
        }
    }

    /// The next frame.
    async fn frame(&mut self) -> Result<Frame, Lost> {
        loop {
            if let Some(frame) = parse(&mut self.buffer)? {
                return Ok(frame);
            }
            self.fill().await?;
        }
    }

    /// The parts of the next message.
    ///
    /// # Errors
    /// [`Lost`]; the subscription is over.
    pub(super) async fn receive(&mut self) -> Result<Vec<Bytes>, Lost> {
        loop {
            let ask_at = self.heard.max(self.asked) + PING_INTERVAL;
            let frame = tokio::select! {
                biased;
                frame = self.frame() => Some(frame?),
                () = sleep_until(ask_at) => None,
            };
            let Some(frame) = frame else {
                if self.heard.elapsed() >= SILENCE_MAX {
                    return Err(Lost::Silent);
                }
                self.asked = Instant::now();
                self.send(COMMAND, b"\x04PING\0\0").await?;
                continue;
            };
            if frame.flags & COMMAND != 0 {
                self.obey(&frame.body).await?;
                continue;
            }
            let held: usize = self.parts.iter().map(Bytes::len).sum();
            if self.parts.len() == PARTS_MAX || held + frame.body.len() > MESSAGE_BYTES_MAX {
                return Err(Lost::TooLarge);
            }
            self.parts.push(frame.body);
            if frame.flags & MORE == 0 {
                return Ok(std::mem::take(&mut self.parts));
            }
        }
    }

    async fn obey(&mut self, command: &[u8]) -> Result<(), Lost> {
        if command.starts_with(b"\x05ERROR") {
            return Err(Lost::Protocol("the publisher refused us"));
        }
        // Two bytes say how long the other end will wait.
        if let Some(ping) = command.strip_prefix(b"\x04PING") {
            let context = ping.get(2..).unwrap_or_default();
            let context = &context[..context.len().min(CONTEXT_BYTES_MAX)];
            self.send(COMMAND, &[b"\x04PONG", context].concat()).await?;
        }
        Ok(())
    }
}

fn greeting() -> [u8; GREETING_BYTES] {
    let mut bytes = [0; GREETING_BYTES];
    bytes[0] = 0xff;
    bytes[9] = 0x7f;
    bytes[10] = 3;
    bytes[12..16].copy_from_slice(b"NULL");
    bytes
}

fn check_greeting(bytes: &[u8]) -> Result<(), Lost> {
    if bytes.first() != Some(&0xff) || bytes.get(9).is_none_or(|byte| byte & 1 == 0) {
        return Err(Lost::Protocol("its greeting has no signature"));
    }
    if bytes.get(10).is_none_or(|version| *version < 3) {
        return Err(Lost::Protocol("it speaks an older version than 3.0"));
    }
    let ours = greeting();
    if bytes.get(12..32) != Some(&ours[12..32]) {
        return Err(Lost::Protocol("it wants another mechanism than NULL"));
    }
    Ok(())
}

/// `READY` names properties: a byte of length and the name, four bytes of length and the value.
fn check_socket_type(mut metadata: &[u8]) -> Result<(), Lost> {
    let broken = || Lost::Protocol("its READY is cut");
    while !metadata.is_empty() {
        let length = usize::from(metadata.get_u8());
        let (name, rest) = metadata.split_at_checked(length).ok_or_else(broken)?;
        metadata = rest;
        let length = metadata.try_get_u32().map_err(|_| broken())?;
        let (value, rest) = metadata
            .split_at_checked(length as usize)
            .ok_or_else(broken)?;
        metadata = rest;
        if name.eq_ignore_ascii_case(b"Socket-Type") {
            return match value {
                b"PUB" | b"XPUB" => Ok(()),
                _ => Err(Lost::Protocol("its socket does not publish")),
            };
        }
    }
    Err(Lost::Protocol("it does not say what its socket is"))
}

/// The first frame in `buffer`, if it is whole.
fn parse(buffer: &mut BytesMut) -> Result<Option<Frame>, Lost> {
    let Some(&flags) = buffer.first() else {
        return Ok(None);
    };
    if flags & !(MORE | LONG | COMMAND) != 0 {
        return Err(Lost::Protocol("a frame has unknown flags"));
    }
    let (head, length) = if flags & LONG == 0 {
        (2, buffer.get(1).map(|length| u64::from(*length)))
    } else {
        let bytes = buffer.get(1..9).and_then(|bytes| bytes.try_into().ok());
        (9, bytes.map(u64::from_be_bytes))
    };
    let Some(length) = length else {
        return Ok(None);
    };
    let length = usize::try_from(length).map_err(|_| Lost::TooLarge)?;
    if length > MESSAGE_BYTES_MAX {
        return Err(Lost::TooLarge);
    }
    if buffer.len() < head + length {
        return Ok(None);
    }
    buffer.advance(head);
    Ok(Some(Frame {
        flags,
        body: buffer.split_to(length).freeze(),
    }))
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    const READY: &[u8] = b"\x04\x1a\x05READY\x0bSocket-Type\0\0\0\x04XPUB";

    /// A publisher that reads and writes what a test says.
    struct Scripted {
        stream: TcpStream,
    }

    impl Scripted {
        async fn expect(&mut self, bytes: &[u8]) {
            let mut read = vec![0; bytes.len()];
            self.stream.read_exact(&mut read).await.unwrap();
            assert_eq!(read, bytes);
        }

        async fn say(&mut self, bytes: &[u8]) {
            self.stream.write_all(bytes).await.unwrap();
        }
    }

    /// Both ends, after a handshake in which the publisher said `ready`.
    async fn connected(ready: &'static [u8]) -> (Result<Subscriber, Lost>, Scripted) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let publisher = async {
            let (stream, _) = listener.accept().await.unwrap();
            let mut scripted = Scripted { stream };
            scripted.expect(&greeting()).await;
            scripted.say(&greeting()).await;
            scripted
                .expect(b"\x04\x19\x05READY\x0bSocket-Type\0\0\0\x03SUB")
                .await;
            scripted.say(ready).await;
            scripted
        };
        tokio::join!(Subscriber::connect("127.0.0.1", port, b"kv"), publisher)
    }

    #[tokio::test]
    async fn messages_arrive_in_their_parts() {
        let (subscriber, mut publisher) = connected(READY).await;
        let mut subscriber = subscriber.unwrap();
        publisher.expect(b"\0\x03\x01kv").await;
        publisher.say(b"\x01\x02kv\x01").await;
        // Pieces of any size, and commands in between.
        let receiving = subscriber.receive();
        let sending = async {
            for piece in [
                &b"\x01a\x04\x08\x04PI"[..],
                b"NG\0\x0ax",
                b"\x02\0\0\0\0\0\0",
                b"\0\x02hi",
            ] {
                tokio::task::yield_now().await;
                publisher.say(piece).await;
            }
            publisher.expect(b"\x04\x06\x04PONGx").await;
        };
        let (message, ()) = tokio::join!(receiving, sending);
        assert_eq!(message.unwrap(), [&b"kv"[..], b"a", b"hi"]);
        drop(publisher);
        assert!(matches!(subscriber.receive().await, Err(Lost::Closed)));
    }

    #[tokio::test]
    async fn who_is_no_publisher_is_refused() {
        for ready in [
            &b"\x04\x1a\x05READY\x0bSocket-Type\0\0\0\x04PULL"[..],
            b"\x04\x06\x05READY",
            b"\x04\x07\x05READY\x0b",
            b"\x04\x08\x05ERROR\x01x",
            b"\0\x01x",
            b"\x40\x01x",
        ] {
            let (subscriber, _publisher) = connected(ready).await;
            assert!(matches!(subscriber, Err(Lost::Protocol(_))), "{ready:?}");
        }
        let mut old = greeting();
        old[10] = 1;
        let mut other = greeting();
        other[12..16].copy_from_slice(b"PLAI");
        for bytes in [
            &b"HTTP/1.1 400 Bad Request\r\n\r\n".repeat(3)[..64],
            &old,
            &other,
        ] {
            assert!(check_greeting(bytes).is_err());
        }
    }

    #[tokio::test]
    async fn messages_have_a_bound() {
        let over = MESSAGE_BYTES_MAX as u64 + 1;
        let long = [&[LONG][..], &over.to_be_bytes()].concat();
        let parts = [MORE, 0].repeat(PARTS_MAX + 1);
        for bytes in [long, parts] {
            let (subscriber, mut publisher) = connected(READY).await;
            publisher.say(&bytes).await;
            let received = subscriber.unwrap().receive().await;
            assert!(matches!(received, Err(Lost::TooLarge)));
        }
        let half = MESSAGE_BYTES_MAX / 2 + 1;
        let (subscriber, mut publisher) = connected(READY).await;
        let mut subscriber = subscriber.unwrap();
        let sending = async {
            let head = [&[LONG | MORE][..], &(half as u64).to_be_bytes()].concat();
            for _ in 0..2 {
                // The other end may have left before it read all.
                let _ = publisher.stream.write_all(&head).await;
                let _ = publisher.stream.write_all(&vec![0; half]).await;
            }
        };
        let receiving = async {
            let received = subscriber.receive().await;
            drop(subscriber);
            received
        };
        let (received, ()) = tokio::join!(receiving, sending);
        assert!(matches!(received, Err(Lost::TooLarge)));
    }

    #[tokio::test]
    async fn a_silent_publisher_is_asked_and_given_up() {
        let (subscriber, mut publisher) = connected(READY).await;
        let mut subscriber = subscriber.unwrap();
        publisher.expect(b"\0\x03\x01kv").await;
        tokio::time::pause();
        let began = Instant::now();
        let listening = async {
            publisher.expect(b"\x04\x07\x04PING\0\0").await;
            publisher.say(b"\x04\x05\x04PONG").await;
        };
        let (received, ()) = tokio::join!(subscriber.receive(), listening);
        assert!(matches!(received, Err(Lost::Silent)));
        let took = began.elapsed();
        assert!(
            took >= SILENCE_MAX + PING_INTERVAL,
            "the answer counted: {took:?}"
        );
    }
}
