//! A peer that speaks the wire format by hand, so that it can say anything at any time.

use std::{
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
};

use kvtransfer::{
    ids::InstanceId,
    wire::{
        control::{Control, ControlDecoder},
        hello::{Hello, HostIdentity, Place, RegionAddress},
    },
};

use super::rig;

/// A control stream or, after [`Control::LaneReady`], a lane.
pub(crate) struct Raw {
    pub(crate) stream: TcpStream,
    decoder: ControlDecoder,
}

impl Raw {
    pub(crate) fn dial(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).expect("it listens");
        stream.set_nodelay(true).expect("a socket");
        stream
            .set_read_timeout(Some(rig::WATCHDOG))
            .expect("a socket");
        let mut decoder = ControlDecoder::for_stranger();
        decoder.trust();
        Self { stream, decoder }
    }

    /// Dials and is welcomed as `instance`.
    pub(crate) fn welcomed(address: SocketAddr, instance: u8, lanes: u8) -> Self {
        let mut raw = Self::dial(address);
        raw.say(&Control::Hello(Box::new(hello(instance, lanes))));
        let answer = raw.hear().expect("an answer");
        assert!(matches!(answer, Control::Welcome(_)), "{answer:?}");
        raw
    }

    pub(crate) fn say(&mut self, message: &Control) {
        self.send(&encoded(message)).expect("it reads");
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// The next message; `None` when the stream has ended.
    pub(crate) fn hear(&mut self) -> Option<Control> {
        loop {
            if let Some(message) = self.decoder.next().expect("the engine speaks well") {
                return Some(message);
            }
            let mut bytes = [0; 16 << 10];
            match self.stream.read(&mut bytes) {
                Ok(got) if got > 0 => self.decoder.push(&bytes[..got]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    panic!("the engine neither answers nor hangs up")
                }
                _ => return None,
            }
        }
    }

    /// The next message that is neither ping nor pong.
    pub(crate) fn hear_news(&mut self) -> Option<Control> {
        loop {
            match self.hear()? {
                Control::Ping { .. } | Control::Pong { .. } => {}
                news => return Some(news),
            }
        }
    }
}

pub(crate) fn encoded(message: &Control) -> Vec<u8> {
    let mut bytes = Vec::new();
    message.encode(&mut bytes);
    bytes
}

/// A good introduction: the layout of every engine of these suites.
pub(crate) fn hello(instance: u8, lanes: u8) -> Hello {
    let len = |bytes| RegionAddress {
        base: 1 << 40,
        len: bytes,
        place: Place::Host,
    };
    Hello {
        instance: InstanceId([instance; 16]),
        generation: 1,
        link: u64::from(instance),
        lanes,
        token: Vec::new(),
        host: HostIdentity {
            boot_id: [0; 16],
            user_id: 0,
            socket_name: String::new(),
            probe_address: 0,
            probe_cookie: [0; 16],
        },
        regions: vec![
            len(rig::BUFFERS * rig::PAGE * rig::PAGES),
            len(rig::ROWS * rig::AUX),
        ],
        shares: Vec::new(),
        by_address: false,
        null_wire: false,
        layout: rig::layout(),
        rails: Vec::new(),
    }
}

/// Opens data connection `lane` of the raw peer `instance`; the engine's answer.
pub(crate) fn open_lane(
    address: SocketAddr,
    instance: u8,
    lane: u8,
    token: &[u8],
) -> (Raw, Control) {
    let mut raw = Raw::dial(address);
    raw.say(&Control::LaneOpen {
        instance: InstanceId([instance; 16]),
        link: u64::from(instance),
        lane,
        token: token.to_vec(),
        can_pull: false,
    });
    let answer = raw.hear().expect("an answer");
    (raw, answer)
}
