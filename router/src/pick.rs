//! The scheduler at work: one [`Board`] behind one lock, joined to the workers by their names.
//!
//! The board is pure; here it gets its time, the gates that only the pool knows (readiness, breakers, limits), and the news of
//! what becomes of its decisions. Nothing here waits while the lock is held.
//!
//! * `blocks`: how large the blocks are that workers tell of.
//! * `gates`: who may serve a request at all.
//! * `booking`: what becomes of a placed request.
//! * `notes`: why, and what came of it.
//! * `prompt`: what a request is to the scheduler.
//! * `feed`: what other replicas have to be told.
//! * `hold`: who waits for a worker with room, and in which order.
//! * `roster`: the pool's workers on the board.
//! * `rooms`: which booking the rooms in telemetry belong to.
#![forbid(unsafe_code)]

pub mod blocks;
pub mod booking;
pub mod feed;
mod gates;
pub mod hold;
pub mod notes;
pub mod prompt;
mod rooms;
mod roster;

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::config::scheduling::{Nominal, Scheduling};
use crate::pool::{Role, Worker, Workers};
use crate::schedule::board::{Event, IngestError, Key, Load, PairState};
use crate::schedule::sample::KvEvent;
use crate::schedule::{Board, Decision, NoPair, Policy, Request, Sample, Settings, WorkerId};
use blocks::Blocks;
use feed::Feed;
use notes::{Note, Ring};
use prompt::Prompt;
use rooms::RoomJoin;

/// What the router is told of a request when it needs a pair. Start from `Wish::default()`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wish<'a> {
    /// Bytes of its body.
    pub prompt_bytes: usize,
    /// Its prompt as the scheduler sees it; none: guessed from the bytes.
    pub prompt: Option<&'a Prompt>,
    /// Prompts in it; 0 counts as one.
    pub items: usize,
    /// Most tokens that each of its answers may have; none: nobody said.
    pub output_tokens: Option<u64>,
    /// The model asked for.
    pub model: Option<&'a str>,
    /// More is more important.
    pub priority: i64,
    /// Requests with the same key prefer the same workers.
    pub sticky: Option<&'a str>,
    /// The prefill rank that a trusted client chose.
    pub rank: Option<u32>,
    /// Workers that have failed this request already.
    pub excluded: &'a [Arc<Worker>],
    /// The worker that did not fail it, to be kept: only the other half is chosen anew.
    pub kept: Option<&'a Arc<Worker>>,
    /// The only workers that may serve it, by `host:port` of their URLs; none: all may.
    pub subset: Option<&'a [String]>,
}

impl Wish<'_> {
    /// Whether fewer workers may serve it than most requests: then others may find a place where it does not.
    pub const fn is_narrow(&self) -> bool {
        self.kept.is_some() || !self.excluded.is_empty() || self.subset.is_some()
    }
}

/// Why a request got no pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoPlace {
    /// No worker of this role is ready.
    NoWorker(Role),
    /// Every worker of a role holds as much as it may, or nobody knows yet whether one is ready. Ask again when
    /// [`Hold`](hold::Hold) rings, or after this time.
    Busy {
        /// When the first place is expected.
        retry_after: Duration,
    },
}

/// Most tokens that one answer is booked with: SGLang's `SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION`.
pub const OUTPUT_TOKENS_MAX: u64 = 4096;

/// A place that nobody can foresee is asked for this often, besides when something ends.
const BUSY_RETRY: Duration = Duration::from_millis(500);

/// A worker on the board.
#[derive(Debug)]
struct Seat {
    worker: Arc<Worker>,
    id: WorkerId,
    ready: bool,
    /// Which description of the worker the board has.
    version: u32,
}

#[derive(Debug)]
struct Inner {
    board: Board,
    prefills: Vec<Seat>,
    decodes: Vec<Seat>,
    rooms: RoomJoin,
    notes: Ring,
    feed: Feed,
}

/// The scheduler of a router.
#[derive(Debug)]
pub struct Picker {
    inner: Mutex<Inner>,
    zero: Instant,
    nominal: Nominal,
    requests: AtomicU64,
    blocks: Arc<Blocks>,
}

/// What telemetry tells of a room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoomNews {
    /// The room.
    pub room: u64,
    /// When its KV cache was computed, on the board's clock; none: nothing new.
    pub ready: Option<Duration>,
    /// When its last byte was confirmed; none: nothing new.
    pub sent: Option<Duration>,
}

/// A pair for a request, booked.
#[derive(Debug)]
pub struct Picked {
    /// Computes the prompt.
    pub prefill: Arc<Worker>,
    /// Generates.
    pub decode: Arc<Worker>,
    /// Data-parallel rank on the prefill worker.
    pub rank: u32,
    /// Data-parallel ranks the prefill worker has.
    pub dp_size: u32,
    /// Names the booking; none if there was no room for it in the books.
    pub key: Option<Key>,
    /// The reasons.
    pub note: Arc<Note>,
}

impl Picker {
    /// A scheduler without workers.
    pub fn new(scheduling: &Scheduling) -> Self {
        Self {
            inner: Mutex::new(Inner {
                board: Board::new(scheduling.settings.clone()),
                prefills: Vec::new(),
                decodes: Vec::new(),
                rooms: RoomJoin::default(),
                notes: Ring::default(),
                feed: Feed::default(),
            }),
            zero: Instant::now(),
            nominal: scheduling.nominal.clone(),
            requests: AtomicU64::new(0),
            blocks: Arc::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The board's time of `at`.
    pub fn time_of(&self, at: Instant) -> Duration {
        at.saturating_duration_since(self.zero)
    }

    /// The board's time now.
    pub fn now(&self) -> Duration {
        self.time_of(Instant::now())
    }

    /// Makes the board's workers those of the pool. What is removed takes its bookings along; requests that it holds may end.
    pub fn sync(&self, workers: &Workers) {
        let mut inner = self.lock();
        inner.sync(Role::Prefill, workers, &self.nominal);
        inner.sync(Role::Decode, workers, &self.nominal);
    }

    /// Other settings from now on; bookings and what was learned stay.
    pub fn reset(&self, settings: Settings) {
        self.lock().board.reset(settings);
    }

    /// How pairs are chosen now.
    pub fn policy(&self) -> Policy {
        self.lock().board.settings().policy
    }

    /// Chooses a pair and books it.
    ///
    /// # Errors
    /// [`NoPlace`]
    pub fn pick(&self, wish: &Wish<'_>) -> Result<Picked, NoPlace> {
        let stream = self.requests.fetch_add(1, Ordering::Relaxed);
        let now = self.now();
        let mut inner = self.lock();
        inner.refresh(&self.nominal);
        let prefill_subset = inner.gate(Role::Prefill, wish)?;
        let decode_subset = inner.gate(Role::Decode, wish)?;
        let request = Request {
            prompt_tokens: wish.prompt.map_or_else(
                || Request::tokens_of_bytes(wish.prompt_bytes as u64),
                |prompt| prompt.tokens,
            ),
            output_tokens: self.output_tokens(wish),
            chunks: wish.prompt.map_or(&[], |prompt| prompt.chunks.as_slice()),
            blocks: wish.prompt.map_or(&[], |prompt| prompt.blocks.as_slice()),
            block_tokens: wish.prompt.map_or(0, |prompt| prompt.block_tokens.into()),
            sticky: wish.sticky.map(sticky_hash),
            priority: clamped(wish.priority),
            prefill_subset: prefill_subset.as_deref(),
            decode_subset: decode_subset.as_deref(),
            stream,
            ..Request::default()
        };
        let mut decision = inner.board.pick(now, &request).map_err(no_place)?;
        let (prefill, decode) = (
            inner.worker(Role::Prefill, decision.prefill),
            inner.worker(Role::Decode, decision.decode),
        );
        let (rank, dp_size) = rank_of(wish, &prefill, &decision);
        decision.dp_rank = rank.min(decision.dp_size - 1);
        let key = match inner.board.book(now, &decision, &request) {
            Ok(key) => {
                inner.feed.touch(key.number);
                Some(key)
            }
            Err(error) => {
                tracing::warn!(%error, "a request goes unbooked");
                None
            }
        };
        // Under the lock, so that the next decision sees it.
        prefill.sent(wish.prompt_bytes);
        decode.sent(wish.prompt_bytes);
        let alternatives = std::mem::take(&mut decision.alternatives);
        let others = alternatives.iter().map(|other| {
            let (prefill, decode) = (
                inner.worker(Role::Prefill, other.prefill),
                inner.worker(Role::Decode, other.decode),
            );
            (prefill, decode, other.ttft_s, other.cost_s)
        });
        let pair = (Arc::clone(&prefill), Arc::clone(&decode));
        let mut note = Note::new(stream, now, pair, decision);
        note.others = others.collect();
        note.prompt_tokens = request.prompt_tokens;
        note.excluded = wish.excluded.len();
        let note = Arc::new(note);
        inner.notes.push(Arc::clone(&note));
        Ok(Picked {
            prefill,
            decode,
            rank,
            dp_size,
            key,
            note,
        })
    }

    /// What the answers are booked with in a decode's KV pool. A bound is seldom reached, and SGLang itself counts with no
    /// more than this.
    fn output_tokens(&self, wish: &Wish<'_>) -> u64 {
        let each = wish.output_tokens.unwrap_or(self.nominal.output_tokens);
        each.min(OUTPUT_TOKENS_MAX)
            .saturating_mul(wish.items.max(1) as u64)
    }

    /// Tells what happened to a booking just now.
    fn advance(&self, key: Key, event: Event) {
        let at = self.now();
        let mut inner = self.lock();
        inner.advance(key, event, at);
    }

    /// Says under which rooms a booking's prompts travel, so that telemetry can be joined to it.
    fn enter_rooms(&self, key: Key, rooms: &[u64], note: &Arc<Note>) {
        self.lock().rooms.enter(key, rooms, note);
    }

    /// The last `count` decisions, the latest first.
    pub fn notes(&self, count: usize) -> Vec<Arc<Note>> {
        self.lock().notes.last(count)
    }

    /// Takes in what became of rooms. Those of other routers are ignored.
    pub fn tell_rooms(&self, news: &[RoomNews]) {
        if news.is_empty() {
            return;
        }
        let mut inner = self.lock();
        for one in news {
            if let Some(at) = one.ready
                && let Some((key, note)) = inner.rooms.ready(one.room)
            {
                note.write(at, |actual| &mut actual.ready);
                inner.advance(key, Event::PrefillDone, at);
            }
            if let Some(at) = one.sent
                && let Some((key, note)) = inner.rooms.sent(one.room)
            {
                note.write(at, |actual| &mut actual.sent);
                // How fast the bytes moved, the rails' own rates say better.
                let event = Event::TransferDone { seconds: None };
                inner.advance(key, event, at);
            }
        }
    }

    /// Takes in a sample.
    ///
    /// # Errors
    /// [`IngestError`]
    pub fn ingest(&self, sample: &Sample<'_>) -> Result<(), IngestError> {
        self.lock().board.ingest(sample)
    }

    /// How large the blocks are in which workers tell of their prefix caches.
    pub fn blocks(&self) -> &Arc<Blocks> {
        &self.blocks
    }

    /// Takes in what a worker's rank told of its prefix cache. Of a worker that is gone it says nothing.
    pub fn cache_events(&self, worker: &Arc<Worker>, rank: u32, events: &[KvEvent]) {
        for event in events {
            // Decisions come in between: a batch may hold thousands of blocks.
            let mut inner = self.lock();
            if let Some(id) = inner.id_of(worker) {
                inner.board.cache_event(id, rank, event);
            }
        }
    }

    /// The board's number of a worker, if it is there.
    pub fn id_of(&self, worker: &Arc<Worker>) -> Option<WorkerId> {
        self.lock().id_of(worker)
    }

    /// How many bookings there are: of this router, of its siblings.
    pub fn bookings(&self) -> (usize, usize) {
        self.lock().board.bookings()
    }

    /// What a worker has to do, as the next decision would see it.
    pub fn load(&self, worker: &Arc<Worker>) -> Option<Load> {
        let inner = self.lock();
        let id = inner.id_of(worker)?;
        inner.board.load(self.now(), id)
    }

    /// What is known of a pair.
    pub fn pair(&self, prefill: &Arc<Worker>, decode: &Arc<Worker>) -> Option<PairState> {
        let mut inner = self.lock();
        let (prefill, decode) = (inner.id_of(prefill)?, inner.id_of(decode)?);
        let now = self.now();
        inner.board.pair(now, prefill, decode)
    }
}

impl Inner {
    fn seats(&self, role: Role) -> &[Seat] {
        match role {
            Role::Prefill => &self.prefills,
            Role::Decode => &self.decodes,
            Role::Other => &[],
        }
    }

    fn worker(&self, role: Role, id: WorkerId) -> Arc<Worker> {
        let seat = self.seats(role).iter().find(|seat| seat.id == id);
        let seat = seat.expect("invariant: the board's workers have seats");
        Arc::clone(&seat.worker)
    }

    fn id_of(&self, worker: &Arc<Worker>) -> Option<WorkerId> {
        let mut seats = self.seats(worker.role()).iter();
        let seat = seats.find(|seat| Arc::ptr_eq(&seat.worker, worker))?;
        Some(seat.id)
    }

    fn advance(&mut self, key: Key, event: Event, at: Duration) {
        self.board.advance(key, event, at);
        self.feed.touch(key.number);
        if matches!(event, Event::Finished | Event::Cancelled | Event::Failed(_)) {
            self.rooms.leave(key);
        }
    }
}

/// The prefill's rank for a request, and how many ranks there are.
fn rank_of(wish: &Wish<'_>, prefill: &Worker, decision: &Decision) -> (u32, u32) {
    let dp_size = prefill.dp_size();
    let rank = match wish.rank {
        Some(rank) if rank < dp_size => rank,
        // The worker will say that there is no such rank.
        Some(_) => 0,
        // More ranks than the board tells apart.
        None if dp_size > decision.dp_size => prefill.next_rank(),
        None => decision.dp_rank.min(dp_size - 1),
    };
    (rank, dp_size)
}

fn no_place(no_pair: NoPair) -> NoPlace {
    match no_pair {
        NoPair::Prefill { ready: 0 } => NoPlace::NoWorker(Role::Prefill),
        NoPair::Decode { ready: 0 } => NoPlace::NoWorker(Role::Decode),
        NoPair::Prefill { .. } | NoPair::Decode { .. } => NoPlace::Busy {
            retry_after: BUSY_RETRY,
        },
        NoPair::EgressFull { retry_after } | NoPair::KvFull { retry_after } => {
            NoPlace::Busy { retry_after }
        }
    }
}

/// The same on every replica of one version.
fn sticky_hash(key: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    key.hash(&mut hasher);
    hasher.finish()
}

fn clamped(priority: i64) -> i32 {
    let (least, most) = (i64::from(i32::MIN), i64::from(i32::MAX));
    i32::try_from(priority.clamp(least, most)).expect("invariant: it was clamped")
}
