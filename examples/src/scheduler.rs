//! The one thread that owns the model and the cache.
//!
//! Each step takes what is in the [`mailbox`], asks the transfer link about its rooms, gives memory to those who wait
//! (oldest first, nobody overtakes), computes one chunk of one prompt in turn and one token of every running
//! sequence. A request reserves memory for its whole life, so nothing is ever preempted. Every wait of a request is
//! bounded: by the room's timeout, or by the client, whose leaving is seen at every step.
#![forbid(unsafe_code)]

pub mod job;
pub mod load;
pub mod mailbox;
mod output;
mod request;
mod rooms;
mod sample;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::cache::aux::AuxSlot;
use crate::cache::pages::PageCache;
use crate::cache::{PagedKv, RankMemory};
use crate::model::{Model, compute_alone};
use crate::pd::{Plane, Role};
use job::{Abort, Finish, Job};
use load::Load;
use mailbox::{Mailbox, Target};
use request::{Request, Stage};

/// The scheduler's bounds.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Tokens of a prompt computed in one step, at least 1. Larger chunks make other requests wait longer.
    pub chunk_tokens: usize,
    /// Requests that hold memory at once, at least 1.
    pub running_max: usize,
    /// How long a room may take from bootstrap to confirmation.
    pub transfer_timeout: Duration,
}

/// A running scheduler. Dropping it stops the thread and waits for it.
#[derive(Debug)]
pub struct Scheduler {
    mailbox: Arc<Mailbox>,
    load: Arc<Mutex<Load>>,
    thread: Option<JoinHandle<()>>,
}

impl Scheduler {
    /// Starts the thread. The plane's ranks must have the model's sizes and at least `running_max` aux slots if the
    /// role is a PD one.
    ///
    /// # Errors
    /// When the system refuses a thread.
    pub fn start(
        model: Model,
        plane: Plane,
        limits: Limits,
        mailbox: Arc<Mailbox>,
    ) -> std::io::Result<Self> {
        let load = Arc::<Mutex<Load>>::default();
        let engine = Engine::new(model, plane, limits, mailbox.clone(), load.clone());
        let thread = std::thread::Builder::new()
            .name("scheduler".to_owned())
            .spawn(move || engine.run())?;
        Ok(Self {
            mailbox,
            load,
            thread: Some(thread),
        })
    }

    /// The door for requests.
    #[must_use]
    pub const fn mailbox(&self) -> &Arc<Mailbox> {
        &self.mailbox
    }

    /// The load after the last step.
    #[must_use]
    pub fn load(&self) -> Load {
        *self.load.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Scheduler {
    fn drop(&mut self) {
        self.mailbox.stop();
        if let Some(thread) = self.thread.take() {
            // A panic of the scheduler was reported by its thread and is visible as a closed mailbox.
            let _panicked = thread.join();
        }
    }
}

/// The state behind the thread.
struct Engine {
    model: Model,
    ranks: Vec<RankMemory>,
    role: Role,
    limits: Limits,
    pages: PageCache,
    free_aux: Vec<AuxSlot>,
    /// By order of arrival.
    requests: BTreeMap<u64, Request>,
    arrivals: u64,
    /// The request whose prompt was computed last.
    turn: u64,
    mailbox: Arc<Mailbox>,
    load: Arc<Mutex<Load>>,
    totals: Totals,
}

/// Counters since the start.
#[derive(Clone, Copy, Debug, Default)]
struct Totals {
    prompt_tokens: u64,
    cached_tokens: u64,
    generated_tokens: u64,
    transfer_speed_gb_s: f64,
    transfer_latency_ms: f64,
}

/// How often rooms are asked about when nobody rings, so that a link that forgets to ring costs latency only.
const ROOM_PATIENCE: Duration = Duration::from_millis(20);

/// How long an idle scheduler sleeps when nobody rings.
const IDLE_PATIENCE: Duration = Duration::from_secs(1);

impl Engine {
    fn new(
        model: Model,
        plane: Plane,
        limits: Limits,
        mailbox: Arc<Mailbox>,
        load: Arc<Mutex<Load>>,
    ) -> Self {
        let shape = plane.ranks[0].shape;
        let heads: usize = plane.ranks.iter().map(|r| r.shape.kv_heads).sum();
        assert_eq!(
            heads,
            model.shape().kv_heads,
            "the ranks hold all KV heads of the model"
        );
        assert!(
            limits.chunk_tokens > 0 && limits.running_max > 0,
            "steps make progress"
        );
        let count = |n: usize| u32::try_from(n).expect("invariant: sizes come from u32 flags");
        Self {
            pages: PageCache::new(count(shape.pages), shape.page_size),
            free_aux: (0..count(shape.aux_slots)).rev().map(AuxSlot).collect(),
            model,
            ranks: plane.ranks,
            role: plane.role,
            limits,
            requests: BTreeMap::new(),
            arrivals: 0,
            turn: 0,
            mailbox,
            load,
            totals: Totals::default(),
        }
    }

    fn run(mut self) {
        let _closing = CloseOnDrop(self.mailbox.clone());
        compute_alone();
        loop {
            let inbox = self.mailbox.take(self.patience());
            for job in inbox.jobs {
                self.arrive(job);
            }
            for target in &inbox.aborts {
                self.abort(target, &Abort::Requested);
            }
            if inbox.stop {
                self.abort(&Target::All, &Abort::ShuttingDown);
                return;
            }
            self.for_each(|_| true, Self::advance);
            self.give_memory();
            self.compute();
            self.publish();
        }
    }

    /// How long to sleep when nobody rings.
    fn patience(&self) -> Duration {
        let mut patience = IDLE_PATIENCE;
        for request in self.requests.values() {
            match request.stage {
                Stage::Prefilling | Stage::Decoding => return Duration::ZERO,
                _ => patience = ROOM_PATIENCE,
            }
        }
        patience
    }

    fn arrive(&mut self, job: Job) {
        self.totals.prompt_tokens += job.prompt.len() as u64;
        let mut request = Request::new(job, Stage::Waiting);
        self.arrivals += 1;
        if matches!(self.role, Role::Prefill(_)) {
            // The prefill's answer is its first token (SGLang forces the same, `disaggregation/prefill.py:396`).
            request.job.sampling.max_new_tokens = 1;
            self.open_room(&mut request);
        }
        self.keep(self.arrivals, request);
    }

    fn abort(&mut self, target: &Target, why: &Abort) {
        let chosen = |r: &Request| r.stage != Stage::Draining && target.matches(&r.job.rid);
        self.for_each(chosen, |engine, request| {
            engine.end(request, Finish::Aborted(why.clone()));
        });
    }

    /// Looks at one request without computing: has its client left, has its room moved on?
    fn advance(&mut self, request: &mut Request) {
        if request.stage == Stage::Draining {
            return self.drain(request);
        }
        if request.job.events.is_closed() {
            return self.end(request, Finish::Aborted(Abort::ClientGone));
        }
        if request.room_open {
            self.follow_room(request);
        }
    }

    /// Gives memory to waiting requests in order of arrival. The first that does not fit makes all others wait: were
    /// they to overtake, a long prompt might never run.
    fn give_memory(&mut self) {
        let mut holding = self.requests.values().filter(|r| r.lease.is_some()).count();
        for arrival in self.arrivals_where(|r| r.stage == Stage::Waiting) {
            if holding >= self.limits.running_max {
                return;
            }
            let Some(mut request) = self.requests.remove(&arrival) else {
                continue;
            };
            let fits = self.reserve(&mut request);
            self.keep(arrival, request);
            if !fits {
                return;
            }
            holding += 1;
        }
    }

    /// Takes pages (and an aux slot) for a request and starts it. False if memory is short.
    fn reserve(&mut self, request: &mut Request) -> bool {
        let prompt = request.job.prompt.len();
        // The last generated token's KV is never computed.
        let whole_life = prompt + request.job.sampling.max_new_tokens - 1;
        let cached_max = match self.role {
            Role::Decode(_) => prompt,
            // One prompt token at least must be computed, or there are no logits.
            Role::Null | Role::Prefill(_) => prompt - 1,
        };
        if request.room().is_some() && request.aux.is_none() {
            let Some(slot) = self.free_aux.pop() else {
                return false;
            };
            request.aux = Some(slot);
        }
        let Some(lease) = self
            .pages
            .reserve(&request.job.prompt, whole_life, cached_max)
        else {
            return false;
        };
        let shared = lease.shared_pages() * self.page_size();
        request.lease = Some(lease);
        if matches!(self.role, Role::Decode(_)) {
            request.decode_prefix_tokens = shared;
            self.lend(request);
        } else {
            request.computed = shared;
            request.cached_tokens = shared;
            self.totals.cached_tokens += shared as u64;
            request.stage = Stage::Prefilling;
            self.push_ready(request, None);
        }
        true
    }

    /// One step of the model: a token for every running sequence, a chunk for one prompt.
    fn compute(&mut self) {
        self.for_each(|r| r.stage == Stage::Decoding, Self::decode_one);
        let waiting = self.arrivals_where(|r| r.stage == Stage::Prefilling);
        let next = waiting.iter().find(|a| **a > self.turn).or(waiting.first());
        if let Some(arrival) = next.copied() {
            self.turn = arrival;
            if let Some(mut request) = self.requests.remove(&arrival) {
                self.prefill_chunk(&mut request);
                self.keep(arrival, request);
            }
        }
    }

    fn prefill_chunk(&mut self, request: &mut Request) {
        let prompt = request.job.prompt.len();
        let end = prompt.min(request.computed + self.limits.chunk_tokens);
        let tokens = request.job.prompt[request.computed..end].to_vec();
        let Some(logits) = self.forward(request, &tokens) else {
            return;
        };
        if end < prompt {
            return self.push_ready(request, None);
        }
        let token = sample::choose(&logits, &request.job.sampling, prompt);
        match self.role {
            Role::Prefill(_) => self.push_ready(request, Some(token)),
            Role::Null | Role::Decode(_) => {
                request.stage = Stage::Decoding;
                self.emit(request, token);
            }
        }
    }

    fn decode_one(&mut self, request: &mut Request) {
        let last = *request
            .generated
            .last()
            .expect("invariant: decoding starts with a token");
        let Some(logits) = self.forward(request, &[last]) else {
            return;
        };
        let token = sample::choose(&logits, &request.job.sampling, request.total_tokens());
        self.emit(request, token);
    }

    /// Runs the model on the next tokens of a request; ends the request if that fails.
    fn forward(&mut self, request: &mut Request, tokens: &[u32]) -> Option<Vec<f32>> {
        let lease = request
            .lease
            .as_ref()
            .expect("invariant: running requests hold memory");
        let kv = PagedKv {
            ranks: &self.ranks,
            pages: lease.pages(),
        };
        match self.model.forward(tokens, request.computed, &kv) {
            Ok(logits) => {
                request.computed += tokens.len();
                Some(logits)
            }
            Err(error) => {
                tracing::error!(rid = request.job.rid, %error, "the model failed");
                self.end(request, Finish::Aborted(Abort::Model(error.to_string())));
                None
            }
        }
    }

    fn emit(&mut self, request: &mut Request, token: u32) {
        self.totals.generated_tokens += 1;
        if let Some(finish) = request.emit(token) {
            self.end(request, finish);
        }
    }

    /// Answers a request and lets go of all it holds, now or when its room is fenced.
    fn end(&mut self, request: &mut Request, finish: Finish) {
        if let Finish::Aborted(why) = &finish {
            tracing::info!(rid = request.job.rid, %why, stage = ?request.stage, "request aborted");
        }
        self.cancel_room(request);
        request.stage = Stage::Draining;
        self.drain(request);
        // The answer comes last: whoever reads it may count on what it implies.
        self.mailbox.free_id(&request.job.rid);
        request.answer(finish);
    }

    /// Gives back the memory of an answered request, unless its room may still touch it.
    fn drain(&mut self, request: &mut Request) {
        if !self.room_is_quiet(request) {
            return;
        }
        if let Some(lease) = request.lease.take() {
            self.pages.release(lease, &request.computed_tokens());
        }
        self.free_aux.extend(request.aux.take());
        request.stage = Stage::Over;
        self.mailbox.retire(request.room());
    }

    fn page_size(&self) -> usize {
        self.ranks[0].shape.page_size
    }

    /// Runs `act` on every chosen request, in order of arrival; those that are over afterwards are dropped.
    fn for_each(
        &mut self,
        chosen: impl Fn(&Request) -> bool,
        act: impl Fn(&mut Self, &mut Request),
    ) {
        for arrival in self.arrivals_where(chosen) {
            if let Some(mut request) = self.requests.remove(&arrival) {
                act(self, &mut request);
                self.keep(arrival, request);
            }
        }
    }

    fn arrivals_where(&self, chosen: impl Fn(&Request) -> bool) -> Vec<u64> {
        self.requests
            .iter()
            .filter(|(_, r)| chosen(r))
            .map(|(arrival, _)| *arrival)
            .collect()
    }

    /// Puts a request back unless its life has ended.
    fn keep(&mut self, arrival: u64, request: Request) {
        if request.stage != Stage::Over {
            self.requests.insert(arrival, request);
        }
    }

    #[expect(clippy::cast_precision_loss, reason = "a ratio for people")]
    fn publish(&self) {
        let count = |chosen: fn(&Stage) -> bool| {
            self.requests.values().filter(|r| chosen(&r.stage)).count()
        };
        let decode = matches!(self.role, Role::Decode(_));
        let waiting = count(|s| *s == Stage::Waiting);
        let bootstrap = count(|s| *s == Stage::Bootstrapping);
        let shaking = count(|s| *s == Stage::Receiving { lent: false });
        let transfer = count(|s| *s == Stage::Receiving { lent: true });
        let live = self
            .requests
            .values()
            .filter(|r| r.stage != Stage::Draining);
        *self.load.lock().unwrap_or_else(PoisonError::into_inner) = Load {
            num_running_reqs: count(|s| matches!(s, Stage::Prefilling | Stage::Decoding)),
            num_waiting_reqs: waiting + bootstrap + shaking + transfer,
            num_used_tokens: self.pages.leased_pages() * self.page_size(),
            num_total_tokens: live.map(Request::total_tokens).sum(),
            max_total_num_tokens: self.pages.total_pages() * self.page_size(),
            max_running_requests: self.limits.running_max,
            queue_waiting: if decode { 0 } else { waiting },
            prefill_bootstrap_queue_reqs: bootstrap,
            prefill_inflight_queue_reqs: count(|s| *s == Stage::Inflight),
            decode_prealloc_queue_reqs: if decode { waiting + shaking } else { 0 },
            decode_transfer_queue_reqs: transfer,
            kv_transfer_speed_gb_s: self.totals.transfer_speed_gb_s,
            kv_transfer_latency_ms: self.totals.transfer_latency_ms,
            cache_hit_rate: self.totals.cached_tokens as f64
                / self.totals.prompt_tokens.max(1) as f64,
            generated_tokens: self.totals.generated_tokens,
        };
    }
}

/// Closes the mailbox even if the scheduler panics, so that health checks and clients notice.
struct CloseOnDrop(Arc<Mailbox>);

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        self.0.close();
    }
}

#[cfg(test)]
mod tests;
