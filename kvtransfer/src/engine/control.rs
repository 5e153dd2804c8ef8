//! The control thread: listeners, control streams, deadlines.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    io,
    net::TcpListener,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        linux::net::SocketAddrExt,
        unix::net::UnixListener,
    },
    sync::{Arc, Mutex, PoisonError, atomic::Ordering},
    thread::JoinHandle,
    time::Duration,
};

use mio::{Events, Interest, Poll, Token, unix::SourceFd};

use super::{
    accept::{Stranger, greet},
    greeting::socket_name,
    hub::Hub,
    write,
};
use crate::{
    clock,
    config::SameHost,
    ids::PeerId,
    time::Time,
    wire::control::{Control, ControlDecoder},
};

/// The waker's token; peers are numbered from 1 and shifted past the fixed tokens.
pub(super) const WAKE: Token = Token(0);
const LISTEN: Token = Token(1);
const LOCAL: Token = Token(2);
const PEERS_FROM: u64 = 3;

/// Bytes read from one control stream before the others have their turn.
const TURN_BYTES: usize = 1 << 20;
/// Messages dealt with in one turn. Small ones take a few microseconds each, so a peer that sends nothing else keeps the
/// deadlines of the others waiting for a millisecond or two.
const TURN_MESSAGES: usize = 512;

/// A control stream whose handshake is through.
pub(super) struct Adopted {
    pub(super) socket: OwnedFd,
    pub(super) decoder: ControlDecoder,
    pub(super) peer: PeerId,
}

/// Connections that are being greeted: bounded, the oldest gives way.
pub(super) struct Strangers {
    bound: usize,
    inner: Mutex<(u64, VecDeque<(u64, OwnedFd)>)>,
}

impl Strangers {
    fn new(bound: usize) -> Self {
        Self {
            bound,
            inner: Mutex::new((0, VecDeque::new())),
        }
    }

    /// Takes a stranger in; its ticket is given back by [`Strangers::done`].
    pub(super) fn admit(&self, socket: &OwnedFd) -> Option<u64> {
        let copy = socket.try_clone().ok()?;
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if inner.1.len() >= self.bound
            && let Some((_, oldest)) = inner.1.pop_front()
        {
            // Its greeting thread sees the end of the stream.
            let _ = rustix::net::shutdown(&oldest, rustix::net::Shutdown::Both);
        }
        inner.0 += 1;
        let ticket = inner.0;
        inner.1.push_back((ticket, copy));
        Some(ticket)
    }

    pub(super) fn done(&self, ticket: u64) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.1.retain(|(known, _)| *known != ticket);
    }

    fn close_all(&self) {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        for (_, socket) in &inner.1 {
            let _ = rustix::net::shutdown(socket, rustix::net::Shutdown::Both);
        }
    }
}

struct Stream {
    socket: OwnedFd,
    decoder: ControlDecoder,
}

/// How a turn of reading one stream ended.
enum Turn {
    Drained,
    More,
    Over(String),
}

struct ControlThread {
    hub: Arc<Hub>,
    poll: Poll,
    listener: Option<TcpListener>,
    local: Option<UnixListener>,
    strangers: Arc<Strangers>,
    streams: HashMap<PeerId, Stream>,
    /// Streams with bytes left after their turn.
    unread: HashSet<PeerId>,
}

/// Starts the thread.
pub(super) fn start(
    hub: Arc<Hub>,
    listener: Option<TcpListener>,
    poll: Poll,
) -> io::Result<JoinHandle<()>> {
    let registry = poll.registry();
    if let Some(listener) = &listener {
        listener.set_nonblocking(true)?;
        registry.register(
            &mut SourceFd(&listener.as_raw_fd()),
            LISTEN,
            Interest::READABLE,
        )?;
    }
    let local = if listener.is_some() && hub.config.same_host != SameHost::Off {
        let name = std::os::unix::net::SocketAddr::from_abstract_name(socket_name(&hub))?;
        let local = UnixListener::bind_addr(&name)?;
        local.set_nonblocking(true)?;
        registry.register(&mut SourceFd(&local.as_raw_fd()), LOCAL, Interest::READABLE)?;
        Some(local)
    } else {
        None
    };
    let strangers = Arc::new(Strangers::new(hub.config.strangers_max));
    let thread = ControlThread {
        hub,
        poll,
        listener,
        local,
        strangers,
        streams: HashMap::new(),
        unread: HashSet::new(),
    };
    std::thread::Builder::new()
        .name("kvt-control".into())
        .stack_size(512 << 10)
        .spawn(move || thread.run())
}

impl ControlThread {
    fn run(mut self) {
        let mut events = Events::with_capacity(256);
        while !self.hub.is_stopped() {
            self.adopt_new();
            let due = self.hub.arm();
            let timeout = if self.unread.is_empty() {
                until(due)
            } else {
                Some(Duration::ZERO)
            };
            if let Err(error) = self.poll.poll(&mut events, timeout)
                && error.kind() != io::ErrorKind::Interrupted
            {
                tracing::error!(%error, "the control thread cannot wait for events");
                return;
            }
            for event in &events {
                match event.token() {
                    WAKE => {}
                    LISTEN => self.accept_tcp(),
                    LOCAL => self.accept_local(),
                    token => {
                        let peer = PeerId((token.0 as u64).wrapping_sub(PEERS_FROM));
                        if event.is_writable()
                            && let Some(link) = self.hub.link(peer)
                            && let Err(error) = link.flush()
                        {
                            self.end(peer, &error.to_string());
                        }
                        self.unread.insert(peer);
                    }
                }
            }
            for peer in std::mem::take(&mut self.unread) {
                self.take_turn(peer);
            }
            self.hub.on_timeout();
        }
        self.strangers.close_all();
    }

    fn adopt_new(&mut self) {
        for Adopted {
            socket,
            decoder,
            peer,
        } in self.hub.adopted()
        {
            let token = usize::try_from(peer.0 + PEERS_FROM).unwrap_or(usize::MAX);
            let interest = Interest::READABLE | Interest::WRITABLE;
            let raw = socket.as_raw_fd();
            let registered =
                self.poll
                    .registry()
                    .register(&mut SourceFd(&raw), Token(token), interest);
            if let Err(error) = registered {
                self.hub.drop_peer(peer, &error.to_string());
                continue;
            }
            self.streams.insert(peer, Stream { socket, decoder });
            self.unread.insert(peer);
        }
        // Streams whose link was dropped by another thread.
        let hub = &self.hub;
        self.streams.retain(|peer, _| hub.link(*peer).is_some());
    }

    fn take_turn(&mut self, peer: PeerId) {
        let Some(stream) = self.streams.get_mut(&peer) else {
            return;
        };
        match read_turn(&self.hub, peer, stream) {
            Turn::Drained => {}
            Turn::More => {
                self.unread.insert(peer);
            }
            Turn::Over(reason) => self.end(peer, &reason),
        }
    }

    fn end(&mut self, peer: PeerId, reason: &str) {
        self.hub.drop_peer(peer, reason);
        self.streams.remove(&peer);
    }

    fn accept_tcp(&self) {
        while let Some(listener) = &self.listener {
            match listener.accept() {
                Ok((stream, address)) => {
                    let _ = stream.set_nodelay(true);
                    let stranger = Stranger {
                        socket: stream.into(),
                        address: address.to_string(),
                        is_local: false,
                    };
                    greet(&self.hub, &self.strangers, stranger);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return note_accept_error(&error),
            }
        }
    }

    fn accept_local(&self) {
        while let Some(listener) = &self.local {
            match listener.accept() {
                Ok((stream, _)) => {
                    let stranger = Stranger {
                        socket: stream.into(),
                        address: "same host".into(),
                        is_local: true,
                    };
                    greet(&self.hub, &self.strangers, stranger);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return note_accept_error(&error),
            }
        }
    }
}

fn note_accept_error(error: &io::Error) {
    if error.kind() != io::ErrorKind::WouldBlock {
        tracing::warn!(%error, "cannot accept a connection (raise the limit of open files?)");
    }
}

fn until(due: Time) -> Option<Duration> {
    (due != Time::NEVER).then(|| {
        // mio rounds down to milliseconds; a deadline must not be checked too early and then spun on.
        due.since(clock::now())
            .saturating_add(Duration::from_micros(999))
    })
}

fn on_message(hub: &Arc<Hub>, peer: PeerId, message: Control) {
    match message {
        Control::WriteOpen(open) => write::accept(hub, peer, &open),
        Control::WriteClose { room } => write::close(hub, peer, room),
        Control::WriteClosed { room } => write::closed(hub, peer, room),
        Control::Pong { nonce } => {
            hub.probes.answered(peer, nonce);
            hub.with(|node, now| node.on_control(now, peer, Control::Pong { nonce }));
        }
        message => hub.with(|node, now| node.on_control(now, peer, message)),
    }
}

fn read_turn(hub: &Arc<Hub>, peer: PeerId, stream: &mut Stream) -> Turn {
    let mut bytes = [0; 64 << 10];
    let (mut taken, mut messages) = (0, 0);
    loop {
        loop {
            match stream.decoder.next() {
                Ok(Some(message)) => on_message(hub, peer, message),
                Ok(None) => break,
                Err(error) => {
                    hub.malformed.fetch_add(1, Ordering::Relaxed);
                    return Turn::Over(format!("its control stream: {error}"));
                }
            }
            messages += 1;
            if messages == TURN_MESSAGES {
                return Turn::More;
            }
        }
        if taken >= TURN_BYTES {
            return Turn::More;
        }
        let flags = rustix::net::RecvFlags::DONTWAIT;
        match rustix::net::recv(stream.socket.as_fd(), &mut bytes[..], flags) {
            Ok((0, _)) => return Turn::Over("it closed its control stream".into()),
            Ok((got, _)) => {
                taken += got;
                stream.decoder.push(&bytes[..got]);
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) => return Turn::Drained,
            Err(error) => return Turn::Over(format!("its control stream: {error}")),
        }
    }
}
