//! What is known of the fleet: workers, their samples, bookings, and what was learned; and the choice made from it.
//!
//! A board is a value without threads and clocks. Callers put it behind one lock and tell it what happens; every call
//! takes the time as a duration since a zero of the caller's choice, the same for all calls.
//!
//! * `roster`: workers that come and go.
//! * `ledger`: bookings and the events that release them; `gossip`: those of sibling replicas.
//! * `intake`: samples; `rates`: bandwidths learned from them.
//! * `load`: what metrics and pages show of it.
//! * `view`: what a request would meet at each worker (rules 1 to 5).
//! * `pick`: gates (rules 5 and 7) and the choice.
//! * `baselines`: the policies that `fused` is compared with.
#![forbid(unsafe_code)]

mod baselines;
mod gossip;
mod intake;
mod ledger;
mod load;
mod pick;
mod rates;
mod roster;
mod view;

use std::collections::HashMap;

use super::dice::mix;
use super::facts::{Facts, RANKS_MAX, Role, WORKERS_MAX, WorkerId};
use super::map::Map;
use super::model::{Failures, Mean, PrefillModel};
use super::policy::Settings;
use super::prefix::PrefixTrie;
use super::recent::Recent;
use super::sample::{KvEvent, KvPool};

pub use gossip::Record;
pub use intake::IngestError;
pub use ledger::{BOOKINGS_MAX, BookError, Event, Key, Leg};
pub use load::{Load, PairState};

/// Sticky keys that are remembered; about 2 MiB.
pub const STICKY_MAX: usize = 1 << 15;

/// What decode takes from the last byte to the first token before that was measured.
const ADMISSION_S: f64 = 0.02;

/// Half of what was measured of a decode's admission is forgotten after this time.
const ADMISSION_HALF_LIFE_S: f64 = 10.0;

/// Why a worker was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BoardError {
    /// There are [`WORKERS_MAX`] of its role already.
    #[error("a board holds at most {WORKERS_MAX} workers of one role")]
    TooManyWorkers,
    /// There is one of this name.
    #[error("there is already a worker named {name}")]
    NameTaken {
        /// The name.
        name: String,
    },
    /// A number is zero, negative or not a number.
    #[error(
        "the facts of {name} cannot be used: ranks, bandwidth and prefill speed must be positive"
    )]
    Facts {
        /// The worker's name.
        name: String,
    },
}

/// See the module.
#[derive(Debug)]
pub struct Board {
    settings: Settings,
    prefills: Vec<Prefill>,
    decodes: Vec<Decode>,
    ids: Map<WorkerId, (Role, usize)>,
    names: HashMap<String, WorkerId>,
    next_id: u32,
    fleet: Fleet,
    ledger: ledger::Ledger,
    sticky: Recent<u64, StickyPair>,
    trie: PrefixTrie,
    turn: u64,
    /// Seconds after which a sample says nothing any more (rule 3).
    stale_after: f64,
    scratch: view::Scratch,
}

/// What was learned over all workers.
#[derive(Debug, Default)]
struct Fleet {
    /// Bandwidth as a factor of nominal.
    factor: Mean,
    prefill: PrefillModel,
    /// Seconds that even a small transfer takes.
    latency: Mean,
}

#[derive(Clone, Copy, Debug)]
struct StickyPair {
    prefill: WorkerId,
    decode: WorkerId,
    used_at: f64,
}

/// One stream of samples.
#[derive(Debug)]
struct Source {
    number: u32,
    epoch: u64,
    sequence: u64,
    at: f64,
    /// By decode slot: bytes queued, in flight, per second.
    links: Option<Vec<(usize, u64, u64, f64)>>,
    tells_rooms: bool,
    pool: Option<KvPool>,
}

#[derive(Debug)]
struct Prefill {
    id: Option<WorkerId>,
    facts: Facts,
    zone: u64,
    ready: bool,
    /// Bookings whose transfer has not ended, in the order of their dispatch.
    jobs: Vec<Job>,
    /// By decode slot.
    links: Vec<LinkState>,
    /// Decode slots with bytes queued or in flight, and the seconds that these need.
    busy: Vec<(usize, f64)>,
    sources: Vec<Source>,
    /// When all its links were last pictured, and whether rooms are told.
    pictured: Option<(f64, bool)>,
    /// By data-parallel rank.
    queues: Vec<Queue>,
    model: PrefillModel,
    factor: Mean,
    /// By decode slot, from the learned bandwidths.
    seconds_per_byte: Vec<f64>,
    fastest: f64,
    row_at: Option<f64>,
}

#[derive(Clone, Copy, Debug)]
struct Queue {
    tokens: u64,
    requests: u64,
    at: f64,
}

#[derive(Clone, Copy, Debug, Default)]
struct LinkState {
    bytes_queued: u64,
    bytes_in_flight: u64,
    /// The mean of the sources' latest rates, times the senders of one request.
    reported: f64,
    rate: Mean,
    failures: Failures,
}

/// A booking, as its prefill sees it until the transfer ends.
#[derive(Clone, Copy, Debug)]
struct Job {
    key: Key,
    rank: usize,
    tokens: u64,
    compute_s: f64,
    bytes: u64,
    decode: usize,
    booked_at: f64,
    ready: f64,
    /// Whether `ready` was measured.
    known: bool,
}

/// A booking, as its decode sees it until the transfer ends.
#[derive(Clone, Copy, Debug)]
struct Inbound {
    key: Key,
    prefill: usize,
    bytes: u64,
    ready: f64,
    known: bool,
}

#[derive(Debug)]
struct Decode {
    id: Option<WorkerId>,
    facts: Facts,
    zone: u64,
    ready: bool,
    /// In the order in which they become ready to send.
    inbound: Vec<Inbound>,
    /// KV tokens of all bookings.
    booked_tokens: u64,
    booked_requests: u64,
    /// Bookings that the last picture of the pool cannot contain: key, when it takes its pages, tokens.
    unpictured: Vec<(Key, f64, u64)>,
    sources: Vec<Source>,
    pool: Option<Pool>,
    /// From the transfer's end to the first token.
    admission: Mean,
}

#[derive(Clone, Copy, Debug)]
struct Pool {
    tokens_used: u64,
    tokens: u64,
    requests: u64,
    at: f64,
}

impl Board {
    /// An empty board.
    pub fn new(settings: Settings) -> Self {
        let replica = settings.replica;
        let stale_after = stale_after(&settings);
        Self {
            settings,
            stale_after,
            prefills: Vec::new(),
            decodes: Vec::new(),
            ids: Map::default(),
            names: HashMap::new(),
            next_id: 0,
            fleet: Fleet::default(),
            ledger: ledger::Ledger::new(replica),
            sticky: Recent::new(STICKY_MAX),
            trie: PrefixTrie::default(),
            turn: 0,
            scratch: view::Scratch::default(),
        }
    }

    /// The settings.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Other settings from now on, as after a reload; bookings and models stay. The replica's number cannot change.
    pub fn reset(&mut self, settings: Settings) {
        let replica = self.settings.replica;
        self.settings = Settings {
            replica,
            ..settings
        };
        self.stale_after = stale_after(&self.settings);
        self.forget_rows();
    }

    /// Takes in news of the prefix cache of a prefill's data-parallel rank. A prompt counts as cached on a worker where any
    /// rank has it.
    pub fn cache_event(&mut self, id: WorkerId, rank: u32, event: &KvEvent) {
        if let Some((Role::Prefill, slot)) = self.ids.get(&id)
            && rank < RANKS_MAX
        {
            self.trie.report(*slot, rank, event);
        }
    }

    fn is_fresh(&self, at: f64, now: f64) -> bool {
        now - at <= self.stale_after
    }
}

fn stale_after(settings: &Settings) -> f64 {
    settings.sample_period.as_secs_f64() * settings.stale_periods
}

/// A number for a zone, 0 for none: pairs compare zones by the thousand.
fn zone_number(facts: &Facts) -> u64 {
    let bytes = facts.zone.iter().flat_map(|zone| zone.bytes());
    bytes.fold(0, |number, byte| mix(number ^ u64::from(byte)))
}
