//! Two engines in this process, joined by queue pairs.

use std::{
    process::{Command, ExitStatus},
    sync::Arc,
    time::Duration,
};

use kvtransfer::{
    clock,
    config::EngineConfig,
    engine::{Engine, Transfer},
    error::TransferError,
    ids::PeerId,
    layout::Layout,
    transfer::{Chunk, SendRequest},
};

use super::{
    child::Path,
    rig::{self, WATCHDOG},
};

/// Two engines; each can send to the other.
pub(crate) struct Pair {
    /// It was dialled.
    pub(crate) first: Engine,
    /// It dialled.
    pub(crate) second: Engine,
    /// The second, as the first knows it.
    pub(crate) to_second: PeerId,
    /// The first, as the second knows it.
    pub(crate) to_first: PeerId,
}

impl Pair {
    /// Engines with the usual memory, whose rails are `devices`.
    pub(crate) fn new(config: &EngineConfig, devices: [&str; 2]) -> Self {
        Self::of(config, devices, rig::memory, &rig::layout())
    }

    pub(crate) fn of(
        config: &EngineConfig,
        devices: [&str; 2],
        memory: impl Fn() -> kvtransfer::engine::Memory,
        layout: &Layout,
    ) -> Self {
        let start = |mut config: EngineConfig, devices: &str| {
            config.rdma.devices = devices.to_owned();
            Engine::start(config, memory(), layout.clone()).expect("an engine")
        };
        let first = start(rig::listening(config.clone()), devices[0]);
        let second = start(config.clone(), devices[1]);
        let address = first.local_addr().expect("it listens");
        let to_first = second.connect(address, WATCHDOG).expect("a connection");
        assert_eq!(to_first.path, "verbs", "{}", to_first.path_reason);
        Self {
            to_second: first.peers()[0].peer,
            to_first: to_first.peer,
            first,
            second,
        }
    }

    /// Moves pages from the first engine to the second.
    pub(crate) fn open(&self, number: u64, from: &[i32], to: &[i32], timeout: Duration) -> Room {
        let ends = [&self.first, &self.second];
        Room::open(ends, self.to_first, number, [from, to], timeout)
    }

    /// Moves pages from the first engine to the second and waits for success.
    pub(crate) fn deliver(&self, number: u64, from: &[i32], to: &[i32]) -> Duration {
        let opened = clock::now();
        let room = self.open(number, from, to, WATCHDOG);
        assert_eq!(room.results(), [Ok(()), Ok(())]);
        clock::now().since(opened)
    }
}

/// Both ends of a transfer whose pages are all pushed.
pub(crate) struct Room {
    pub(crate) send: Transfer,
    pub(crate) receive: Transfer,
}

impl Room {
    /// From the first of `ends` to the second, which knows the first as `sender`.
    pub(crate) fn open(
        ends: [&Engine; 2],
        sender: PeerId,
        number: u64,
        [from, to]: [&[i32]; 2],
        timeout: Duration,
    ) -> Self {
        let request = rig::receive(number, sender, to, None, timeout);
        let receive = ends[1].receive(&request).expect("a free room");
        let room = rig::room(number);
        let send = ends[0].send(&SendRequest { room, timeout });
        let send = send.expect("a free room");
        send.wait_ready(WATCHDOG).expect("a grant");
        let items = vec![Arc::from(from)];
        let last = true;
        send.push(&Chunk { items, last }).expect("room for it");
        Self { send, receive }
    }

    /// How both ends ended.
    pub(crate) fn results(&self) -> [Result<(), TransferError>; 2] {
        [&self.send, &self.receive].map(|end| end.wait(WATCHDOG).expect("it ends").map(drop))
    }
}

/// The lanes that take work, by number: of an engine with one peer.
pub(crate) fn lanes(engine: &Engine) -> Vec<String> {
    let rails = engine.snapshot().rails;
    rails.into_iter().map(|rail| rail.rail).collect()
}

/// Waits until `holds`; how long that took.
pub(crate) fn until(what: &str, mut holds: impl FnMut() -> bool) -> Duration {
    let start = clock::now();
    while !holds() {
        let waited = clock::now().since(start);
        assert!(waited < WATCHDOG, "not in {waited:?}: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
    clock::now().since(start)
}

/// Bytes of a room that have arrived at the receiver.
pub(crate) fn arrived(engine: &Engine, number: u64) -> u64 {
    let rooms = engine.snapshot().rooms;
    let room = rooms.iter().find(|stat| stat.room == number);
    room.map_or(0, |stat| stat.bytes)
}

/// Runs a program of the guest, which must succeed; what it said.
pub(crate) fn run(line: &str) -> String {
    let mut words = line.split(' ');
    let program = words.next().expect("a program");
    let output = Command::new(program).args(words).output();
    let output = output.unwrap_or_else(|error| panic!("{line}: {error}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{line}: {said}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs a program of the guest in whatever state the test is: a panic here would hide why it failed.
pub(crate) fn restore(program: &str, words: &[&str]) {
    let done = Command::new(program).args(words).status();
    if !done.as_ref().is_ok_and(ExitStatus::success) {
        println!("{program} {words:?}: {done:?}");
    }
}

/// Whether a device's port carries traffic.
pub(crate) fn is_active(device: &str) -> bool {
    let state = format!("/sys/class/infiniband/{device}/ports/1/state");
    std::fs::read_to_string(state).is_ok_and(|text| text.contains("ACTIVE"))
}

/// Connected queue pairs on a device.
pub(crate) fn queue_pairs(device: &str) -> usize {
    let table = run(&format!("rdma resource show qp link {device}"));
    // The kernel's own are of another type.
    table
        .lines()
        .filter(|line| line.contains(" type RC "))
        .count()
}

/// The configuration of a path, with so many queue pairs a rail.
pub(crate) fn config(path: Path, queue_pairs: u8) -> EngineConfig {
    let mut config = path.config();
    config.rdma.queue_pairs = queue_pairs;
    config
}

/// `first..end` as page numbers.
pub(crate) fn pages(range: std::ops::Range<i32>) -> Vec<i32> {
    range.collect()
}
