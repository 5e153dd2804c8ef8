//! What must not happen, and random numbers that can be repeated.

use std::sync::{
    Once,
    atomic::{AtomicU64, Ordering},
};

use kvtransfer::engine::Engine;

use super::rig;

static PANICS: AtomicU64 = AtomicU64::new(0);
static HOOK: Once = Once::new();

/// Resident memory may grow by so much under attack: allocator slack, thread stacks and the kept tables.
const GROWTH_MAX_KIB: u64 = 192 << 10;

/// Looks out for panics of any thread of this process, and for growth.
pub(crate) struct Watch {
    resident_kib: u64,
}

impl Watch {
    pub(crate) fn start() -> Self {
        HOOK.call_once(|| {
            let before = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |info| {
                PANICS.fetch_add(1, Ordering::SeqCst);
                before(info);
            }));
        });
        Self {
            resident_kib: resident_kib(),
        }
    }

    /// Checks that nothing died and that a good peer can still move a page.
    pub(crate) fn check(&self, engine: &Engine) {
        self.check_process(&["kvt-control"]);
        assert!(moves_a_page(engine), "a good peer is served");
    }

    /// Checks for panics, growth, and that threads of those names live.
    pub(crate) fn check_process(&self, threads: &[&str]) {
        assert_eq!(PANICS.load(Ordering::SeqCst), 0, "panics");
        let grown = resident_kib().saturating_sub(self.resident_kib);
        assert!(grown < GROWTH_MAX_KIB, "memory has grown by {grown} KiB");
        let alive = thread_names();
        for wanted in threads {
            assert!(
                alive.iter().any(|name| name == wanted),
                "{wanted} is gone: {alive:?}"
            );
        }
    }
}

fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("our own");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let words = line.expect("a resident size").split_whitespace().next();
    words.expect("a number").parse().expect("a number")
}

fn thread_names() -> Vec<String> {
    let tasks = std::fs::read_dir("/proc/self/task").expect("our own");
    tasks
        .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok())
        .map(|name| name.trim().to_owned())
        .collect()
}

/// Whether a page can be moved from `engine` to a new, good peer.
fn moves_a_page(engine: &Engine) -> bool {
    use kvtransfer::{
        config::EngineConfig,
        transfer::{Chunk, SendRequest},
    };
    let peer = rig::start(EngineConfig::default());
    let address = engine.local_addr().expect("it listens");
    let info = peer.connect(address, rig::WATCHDOG).expect("it is let in");
    rig::fill(engine, 3, &[5]);
    let number = u64::MAX - 7;
    let request = rig::receive(number, info.peer, &[3], None, rig::WATCHDOG);
    let there = peer.receive(&request).expect("a free room");
    let request = SendRequest {
        room: rig::room(number),
        timeout: rig::WATCHDOG,
    };
    let here = engine.send(&request).expect("a free room");
    here.wait_ready(rig::WATCHDOG).expect("a grant");
    let items = vec![std::sync::Arc::from([5])];
    here.push(&Chunk { items, last: true })
        .expect("room for it");
    let end = there.wait(rig::WATCHDOG).expect("in time");
    end.is_ok() && rig::wrong(&peer, 3, &[5], &[3]) == 0
}

/// Xorshift: good enough to disturb, and the same every time.
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub(crate) fn roll(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.roll() % bound
    }

    /// Small, edge or any.
    pub(crate) fn odd_number(&mut self) -> u64 {
        match self.below(6) {
            0 => self.below(4),
            1 => u64::MAX - self.below(3),
            2 => 1 << self.below(64),
            3 => (1 << self.below(64)) - 1,
            4 => self.below(1 << 16),
            _ => self.roll(),
        }
    }

    #[expect(clippy::cast_possible_truncation, reason = "any bits will do")]
    pub(crate) fn odd_u32(&mut self) -> u32 {
        self.odd_number() as u32
    }

    pub(crate) fn bytes(&mut self, len: u64) -> Vec<u8> {
        (0..len).map(|_| self.roll().to_le_bytes()[0]).collect()
    }

    /// Changes a few bytes, or the length.
    pub(crate) fn mutate(&mut self, bytes: &mut Vec<u8>, from: usize) {
        for _ in 0..=self.below(3) {
            let len = bytes.len() as u64;
            if len <= from as u64 {
                return;
            }
            let at = usize::try_from(from as u64 + self.below(len - from as u64));
            let at = at.expect("it fits");
            bytes[at] = match self.below(4) {
                0 => 0xFF,
                1 => bytes[at].wrapping_add(1),
                2 => bytes[at] ^ (1 << self.below(8)),
                _ => self.roll().to_le_bytes()[0],
            };
        }
    }
}
