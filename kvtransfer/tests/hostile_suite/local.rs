//! The same-host listener: wrong descriptors, lies about what can be read, rings that are none.

use std::{
    io::{IoSlice, Read as _, Write as _},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, OwnedFd},
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixStream},
    },
};

use kvtransfer::{
    config::{EngineConfig, SameHost},
    engine::Engine,
    ids::InstanceId,
    wire::{
        control::{Control, ControlDecoder},
        lane::{BatchFields, BatchHeader, PayloadMode},
    },
};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::{
    raw::{Raw, encoded, hello},
    rig::{self, WATCHDOG},
    watch::{Dice, Watch},
};

const STRANGERS: u64 = 2_000;
const BATCHES: u64 = 60_000;

struct Target {
    engine: Engine,
    name: SocketAddr,
}

fn target() -> Target {
    let mut config = rig::listening(EngineConfig::default());
    config.same_host = SameHost::RingOnly;
    config.ring_bytes = 1 << 20;
    let engine = rig::start(config);
    let name = format!("kvtransfer-{}", engine.instance());
    let name = SocketAddr::from_abstract_name(name).expect("a name");
    Target { engine, name }
}

impl Target {
    fn dial(&self) -> UnixStream {
        let stream = UnixStream::connect_addr(&self.name).expect("it listens");
        stream.set_read_timeout(Some(WATCHDOG)).expect("a socket");
        stream
    }

    /// A control stream that claims to be on this host, and to have memory to show.
    fn control(&self) -> Raw {
        let address = self.engine.local_addr().expect("it listens");
        let mut raw = Raw::dial(address);
        let mut lying = hello(1, 16);
        lying.host.probe_address = 0xDEAD_0000_BEEF;
        lying.host.socket_name = "nobody-listens-here".into();
        raw.say(&Control::Hello(Box::new(lying)));
        let answer = raw.hear();
        assert!(matches!(answer, Some(Control::Welcome(_))), "{answer:?}");
        raw
    }
}

fn open(lane: u8) -> Vec<u8> {
    encoded(&Control::LaneOpen {
        instance: InstanceId([1; 16]),
        link: 1,
        lane,
        token: Vec::new(),
        can_pull: true,
    })
}

/// Sends the opening with a descriptor; what the engine does until it hangs up, or until it says ready.
fn open_with(stream: &mut UnixStream, lane: u8, fd: &OwnedFd) -> Vec<Control> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [fd.as_fd()];
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    let bytes = open(lane);
    let sent = sendmsg(
        &*stream,
        &[IoSlice::new(&bytes)],
        &mut control,
        SendFlags::NOSIGNAL,
    );
    assert_eq!(sent, Ok(bytes.len()));
    let mut decoder = ControlDecoder::for_stranger();
    let mut heard = Vec::new();
    let mut bytes = [0; 4096];
    while let Ok(got) = stream.read(&mut bytes) {
        decoder.push(&bytes[..got]);
        while let Ok(Some(message)) = decoder.next() {
            heard.push(message);
        }
        if got == 0 || !heard.is_empty() {
            break;
        }
    }
    heard
}

fn memfd(len: u64, seals: SealFlags) -> OwnedFd {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd = memfd_create("hostile", flags).expect("a memfd");
    ftruncate(&fd, len).expect("a length");
    fcntl_add_seals(&fd, seals).expect("seals");
    fd
}

/// Whether the engine has hung up; waits for it.
fn is_over(stream: &mut UnixStream) -> bool {
    let mut sink = [0; 64];
    loop {
        match stream.read(&mut sink) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) => return error.kind() != std::io::ErrorKind::WouldBlock,
        }
    }
}

#[test]
fn descriptors_that_are_no_ring_are_refused() {
    let watch = Watch::start();
    let target = target();
    let _control = target.control();
    let (pipe, _other) = std::io::pipe().expect("a pipe");
    let wrong: Vec<(&str, OwnedFd)> = vec![
        ("unsealed", memfd(1 << 20, SealFlags::empty())),
        (
            "sealed against growing only",
            memfd(1 << 20, SealFlags::GROW),
        ),
        ("empty", memfd(0, SealFlags::SHRINK)),
        (
            "read-only",
            memfd(1 << 20, SealFlags::SHRINK | SealFlags::WRITE),
        ),
        ("a pipe", pipe.into()),
        (
            "a device",
            std::fs::File::open("/dev/zero").expect("it exists").into(),
        ),
    ];
    for (lane, (what, fd)) in (0..).zip(&wrong) {
        let mut stream = target.dial();
        open_with(&mut stream, lane, fd);
        assert!(is_over(&mut stream), "{what}");
    }
    watch.check(&target.engine);
}

#[test]
fn ring_batches_outside_a_short_ring_end_their_lane_only() {
    let watch = Watch::start();
    let target = target();
    let mut dice = Dice::new(6);
    let short = memfd(4096, SealFlags::SHRINK);
    let (mut sent, mut number) = (0, 1);
    while sent < BATCHES {
        let mut control = target.control();
        let mut stream = target.dial();
        let heard = open_with(&mut stream, 0, &short);
        assert!(
            matches!(heard[..], [Control::LaneReady { can_pull: false }]),
            "the lie about the probe is found out: {heard:?}"
        );
        let peer = target.engine.peers()[0].peer;
        let pages: Vec<i32> = (0..32).collect();
        let request = rig::receive(number, peer, &pages, None, WATCHDOG);
        let transfer = target.engine.receive(&request).expect("a free room");
        let Some(Control::Grant(grant)) = control.hear_news() else {
            panic!("no grant");
        };
        let mut bytes = Vec::new();
        for seq in 0..2_000 {
            let is_fatal = seq == 1_999;
            let fields = BatchFields {
                mode: PayloadMode::Ring,
                last: false,
                component: 0,
                room: number,
                epoch: grant.epoch,
                seq,
                window_start: 0,
                window_len: 1,
                offset: 0,
                len: dice.below(64),
                place: dice.below(4032),
            };
            let fields = if is_fatal {
                BatchFields {
                    len: 4096,
                    place: dice.odd_number().clamp(1, u64::MAX - 1),
                    ..fields
                }
            } else {
                fields
            };
            bytes.extend(BatchHeader::new(fields).to_bytes());
            sent += 1;
        }
        let mut reader = stream.try_clone().expect("a descriptor");
        let drained = std::thread::spawn(move || is_over(&mut reader));
        let _ = stream.write_all(&bytes);
        assert!(drained.join().expect("no panic"), "the lane ended");
        let end = transfer.wait(WATCHDOG).expect("it ends");
        assert!(end.is_err(), "{end:?}");
        number += 1;
    }
    println!("same-host lane, ring batches: {sent} frames");
    watch.check(&target.engine);
}

#[test]
fn strangers_on_the_same_host_socket() {
    let watch = Watch::start();
    let target = target();
    let _control = target.control();
    let mut dice = Dice::new(5);
    for round in 0..STRANGERS {
        let bytes = match round % 3 {
            0 => {
                let len = dice.below(100);
                dice.bytes(len)
            }
            1 => {
                let mut bytes = open(dice.roll().to_le_bytes()[0] % 16);
                dice.mutate(&mut bytes, 0);
                bytes
            }
            // A hello does not belong here.
            _ => encoded(&Control::Hello(Box::new(hello(9, 1)))),
        };
        let mut stream = target.dial();
        if stream.write_all(&bytes).is_ok() {
            let _ = stream.shutdown(std::net::Shutdown::Write);
        }
        assert!(is_over(&mut stream), "round {round}");
    }
    println!("same-host listener: {STRANGERS} frames");
    watch.check(&target.engine);
}
