//! A second process with an engine of its own, that can be frozen, thawed and killed.
//!
//! It is this test binary again, running the one test [`child_entry`], told what to do line by line on its standard
//! input and answering on its standard output.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::SocketAddr,
    process::{Child, ChildStdin, Command, Stdio},
    sync::{Arc, mpsc},
    time::Duration,
};

use kvtransfer::{
    config::{EngineConfig, RdmaUse, SameHost},
    engine::{Engine, Transfer},
    ids::PeerId,
    transfer::{Chunk, SendRequest},
    wire::rdma::Connector,
};
use rustix::process::{Pid, Signal, kill_process};

use super::rig;

const ROLE: &str = "KVT_CHILD";
/// Marks our lines among the test harness's.
const MARK: &str = "kvt> ";

/// A path between two processes of this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Path {
    Tcp,
    Pull,
    Ring,
    /// RDMA from one device of the lab to another, connected by rdma_cm or out of band.
    Siw,
    RxeCompat,
    RxeStandard,
}

impl Path {
    const ALL: [Self; 6] = [
        Self::Tcp,
        Self::Pull,
        Self::Ring,
        Self::Siw,
        Self::RxeCompat,
        Self::RxeStandard,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Pull => "shm-pull",
            Self::Ring => "shm-ring",
            Self::Siw => "siw",
            Self::RxeCompat => "rxe-compat",
            Self::RxeStandard => "rxe-standard",
        }
    }

    /// What an engine calls it.
    pub(crate) fn shown(self) -> &'static str {
        match self {
            Self::Siw | Self::RxeCompat | Self::RxeStandard => "verbs",
            Self::Tcp | Self::Pull | Self::Ring => self.name(),
        }
    }

    /// Small batches, so that a transfer of megabytes is many of them and can be stopped between any two.
    pub(crate) fn config(self) -> EngineConfig {
        let mut config = EngineConfig::default();
        config.same_host = match self {
            Self::Pull => SameHost::PullOnly,
            Self::Ring => SameHost::RingOnly,
            Self::Tcp | Self::Siw | Self::RxeCompat | Self::RxeStandard => SameHost::Off,
        };
        config.batch_bytes = 256 << 10;
        config.pull_batch_bytes = 256 << 10;
        config.ring_bytes = 2 << 20;
        let (devices, connector) = match self {
            Self::Tcp | Self::Pull | Self::Ring => return config,
            Self::Siw => (["siw0", "siw1"], Connector::Standard),
            Self::RxeCompat => (["rxe0", "rxe1"], Connector::Compat),
            Self::RxeStandard => (["rxe0", "rxe1"], Connector::Standard),
        };
        let is_child = std::env::var_os(ROLE).is_some();
        config.rdma.usage = RdmaUse::Required;
        config.rdma.devices = devices[usize::from(is_child)].to_owned();
        config.rdma.connector = Some(connector);
        config.rdma.queue_pairs = 2;
        config.rdma.batch_bytes = 64 << 10;
        config
    }
}

/// The other process. Killed when dropped, frozen or not.
pub(crate) struct Other {
    child: Child,
    commands: ChildStdin,
    lines: mpsc::Receiver<String>,
}

impl Other {
    /// Starts it; it listens at `listen`, if given.
    pub(crate) fn start(path: Path, listen: Option<SocketAddr>) -> Self {
        let role = format!(
            "{} {}",
            path.name(),
            listen.map_or_else(|| "-".to_owned(), |at| at.to_string())
        );
        let mut child = Command::new(std::env::current_exe().expect("this binary"))
            .args(["--exact", "child::child_entry", "--nocapture"])
            .env(ROLE, role)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("this binary runs");
        let commands = child.stdin.take().expect("piped");
        let output = BufReader::new(child.stdout.take().expect("piped"));
        let (heard, lines) = mpsc::sync_channel(1024);
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                // The harness writes its own words in front of our first line.
                let ours = line.split_once(MARK).map(|(_, ours)| ours.to_owned());
                if ours.is_some_and(|ours| heard.send(ours).is_err()) {
                    return;
                }
            }
        });
        Self {
            child,
            commands,
            lines,
        }
    }

    pub(crate) fn tell(&mut self, command: &str) {
        writeln!(self.commands, "{command}").expect("the child listens");
    }

    /// The rest of the next line, which must start with `word`.
    pub(crate) fn hear(&self, word: &str) -> String {
        let line = self.lines.recv_timeout(rig::WATCHDOG);
        let line = line.unwrap_or_else(|_| panic!("no line while waiting for {word:?}"));
        let rest = line.strip_prefix(word);
        rest.unwrap_or_else(|| panic!("{line:?} instead of {word:?}"))
            .trim()
            .to_owned()
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.hear("listening").parse().expect("an address")
    }

    /// Makes it connect; the number it has for us.
    pub(crate) fn connect(&mut self, to: SocketAddr) -> u64 {
        self.tell(&format!("connect {to}"));
        self.hear("connected").parse().expect("a number")
    }

    /// The path that it sends to us over, as soon as it has one: it may learn of it a moment later than we do.
    pub(crate) fn path(&mut self) -> String {
        loop {
            self.tell("path");
            let path = self.hear("path");
            if path != "none" {
                return path;
            }
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn freeze(&self) {
        self.signal(Signal::STOP);
        // The signal is delivered when the state says so.
        let stat = format!("/proc/{}/stat", self.child.id());
        for _ in 0..100_000 {
            let text = std::fs::read_to_string(&stat).unwrap_or_default();
            if text.rsplit(')').next().is_some_and(|t| t.starts_with(" T")) {
                return;
            }
            std::thread::yield_now();
        }
        panic!("the child does not stop");
    }

    pub(crate) fn thaw(&self) {
        self.signal(Signal::CONT);
    }

    pub(crate) fn kill(&self) {
        self.signal(Signal::KILL);
    }

    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        kill_process(pid.expect("a process"), signal).expect("our own child");
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        // By its own number, in whatever state it is.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn say(line: &str) {
    println!("{MARK}{line}");
}

/// What the other process runs. Nothing, when the whole suite runs.
#[test]
fn child_entry() {
    let Ok(role) = std::env::var(ROLE) else {
        return;
    };
    let (path, listen) = role.split_once(' ').expect("two words");
    let path = Path::ALL.into_iter().find(|known| known.name() == path);
    let mut config = path.expect("a path").config();
    config.listen = listen.parse().ok();
    let engine = Arc::new(rig::start(config));
    if let Some(address) = engine.local_addr() {
        say(&format!("listening {address}"));
    }
    for line in std::io::stdin().lines().map_while(Result::ok) {
        let words: Vec<&str> = line.split(' ').collect();
        obey(&engine, &words);
    }
    // Our parent is gone or done with us.
    std::process::exit(0);
}

fn obey(engine: &Arc<Engine>, words: &[&str]) {
    let number = |at: usize| words[at].parse::<u64>().expect("a number");
    let millis = |at: usize| Duration::from_millis(number(at));
    match words[0] {
        "connect" => {
            let to = words[1].parse().expect("an address");
            let info = engine.connect(to, rig::WATCHDOG).expect("a connection");
            say(&format!("connected {}", info.peer.0));
        }
        "path" => say(&format!("path {}", engine.peers()[0].path)),
        "fill" => {
            rig::fill(engine, number(1), &pages(words[2]));
            say("filled");
        }
        // send ROOM TIMEOUT_MS PAGES CHUNK PAUSE_MS
        "send" => {
            let request = SendRequest {
                room: rig::room(number(1)),
                timeout: millis(2),
            };
            let transfer = engine.send(&request).expect("a free room");
            let (pages, chunk, pause) = (pages(words[3]), number(4), millis(5));
            std::thread::spawn(move || push_slowly(&transfer, &pages, chunk, pause));
        }
        // receive ROOM TIMEOUT_MS PEER PAGES SEED
        "receive" => {
            let (target, seed) = (pages(words[4]), number(5));
            let peer = PeerId(number(3));
            let request = rig::receive(number(1), peer, &target, Some(0), millis(2));
            let transfer = engine.receive(&request).expect("a free room");
            let engine = Arc::clone(engine);
            std::thread::spawn(move || {
                let result = transfer.wait(rig::WATCHDOG).expect("in time");
                // The sender's pages have the same numbers.
                let wrong = rig::wrong(&engine, seed, &target, &target);
                say(&format!("ended {} {wrong}", name_of(&result)));
            });
        }
        // serve FIRST_ROOM ROOMS PEER
        "serve" => {
            let (first, rooms, peer) = (number(1), number(2), PeerId(number(3)));
            let engine = Arc::clone(engine);
            std::thread::spawn(move || serve(&engine, first, rooms, peer));
        }
        other => panic!("no such command: {other}"),
    }
}

/// Receives one page per room, room after room, granting the next before waiting for the last.
fn serve(engine: &Engine, first: u64, rooms: u64, peer: PeerId) {
    let mut waiting = None;
    for number in first..first + rooms {
        let page = i32::try_from(number % rig::PAGES).expect("a page");
        let request = rig::receive(number, peer, &[page], None, rig::WATCHDOG);
        let next = engine.receive(&request).expect("a free room");
        let last: Option<Transfer> = waiting.replace(next);
        if let Some(last) = last {
            last.wait(rig::WATCHDOG).expect("in time").expect("success");
        }
    }
    let last = waiting.expect("at least one room");
    last.wait(rig::WATCHDOG).expect("in time").expect("success");
    say("served");
}

fn push_slowly(transfer: &Transfer, pages: &[i32], chunk: u64, pause: Duration) {
    let pushed = transfer
        .wait_ready(rig::WATCHDOG)
        .map_err(|error| error.name());
    let chunks: Vec<&[i32]> = pages
        .chunks(usize::try_from(chunk).expect("it fits"))
        .collect();
    let last = chunks.len() - 1;
    for (index, part) in chunks.into_iter().enumerate() {
        if pushed.is_err() {
            break;
        }
        let is_last = index == last;
        let items = if is_last {
            vec![Arc::from(part), Arc::from([0])]
        } else {
            vec![Arc::from(part)]
        };
        // Refused where the transfer has ended; how it ended is what is reported.
        if transfer
            .push(&Chunk {
                items,
                last: is_last,
            })
            .is_err()
        {
            break;
        }
        std::thread::sleep(pause);
    }
    let result = transfer.wait(rig::WATCHDOG).expect("in time");
    say(&format!("ended {}", name_of(&result)));
}

pub(crate) fn name_of<T>(result: &Result<T, kvtransfer::error::TransferError>) -> &'static str {
    result.as_ref().map_or_else(|error| error.name(), |_| "ok")
}

/// `"3..7"` as page numbers.
fn pages(text: &str) -> Vec<i32> {
    let (from, to) = text.split_once("..").expect("a range");
    (from.parse().expect("a number")..to.parse().expect("a number")).collect()
}
