//! The workers and the wires between them.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::time::Duration;

use super::super::scenario::Scenario;
use super::super::trace::BLOCK_TOKENS;
use super::{Happening, News, World};
use crate::schedule::board::Event;
use crate::schedule::recent::Recent;

/// A prefill worker.
#[derive(Debug)]
pub(super) struct Prefill {
    pub(super) queue: VecDeque<usize>,
    /// The request that is computed, since when and how long.
    pub(super) computing: Option<(usize, Duration, f64)>,
    /// Requests that may be sent, in the order in which they could.
    pub(super) sendable: VecDeque<usize>,
    /// The request that is on the wire.
    pub(super) sending: Option<usize>,
    /// Requests computed since the last picture.
    pub(super) computed: Vec<usize>,
    /// Decodes that it has sent to: for these it has measured a rate.
    pub(super) measured: Vec<bool>,
    cache: Option<Recent<u64, ()>>,
}

/// A decode worker.
#[derive(Clone, Debug, Default)]
pub(super) struct Decode {
    /// Requests that wait for pages.
    waiting: VecDeque<usize>,
    /// Requests that may be sent to it, in the order in which they could.
    sendable: VecDeque<usize>,
    receiving: bool,
    pub(super) kv_tokens: u64,
    pub(super) requests: u64,
}

impl Prefill {
    pub(super) fn new(scenario: &Scenario) -> Self {
        let blocks = scenario.prefix_cache_tokens / BLOCK_TOKENS;
        Self {
            queue: VecDeque::new(),
            computing: None,
            sendable: VecDeque::new(),
            sending: None,
            computed: Vec::new(),
            measured: vec![false; scenario.decodes],
            cache: (blocks > 0).then(|| Recent::new(usize::try_from(blocks).unwrap_or(usize::MAX))),
        }
    }

    /// Tokens of this prompt that are cached; all of it is cached from now on.
    fn cached(&mut self, chunks: &[u64]) -> u64 {
        let Some(cache) = &mut self.cache else {
            return 0;
        };
        let mut hits = 0;
        let mut hitting = true;
        for chunk in chunks {
            hitting = hitting && cache.touch(*chunk).is_some();
            hits += u64::from(hitting);
            if !hitting {
                cache.insert(*chunk, ());
            }
        }
        hits * BLOCK_TOKENS
    }
}

impl World<'_> {
    /// A router sent both legs.
    pub(super) fn dispatch(&mut self, request: usize) {
        let (prefill, decode) = (self.flights[request].prefill, self.flights[request].decode);
        self.decodes[decode].waiting.push_back(request);
        self.prefills[prefill].queue.push_back(request);
        self.take_pages(decode);
        self.compute(prefill);
    }

    fn compute(&mut self, prefill: usize) {
        let worker = &mut self.prefills[prefill];
        if worker.computing.is_some() {
            return;
        }
        let Some(request) = worker.queue.pop_front() else {
            return;
        };
        let flight = &self.flights[request];
        let cached = worker.cached(&flight.chunks).min(flight.input - 1);
        let seconds = self.scenario.compute_s(flight.input - cached);
        worker.computing = Some((request, self.now, seconds));
        self.tally.wait_s += (self.now - flight.arrived).as_secs_f64();
        self.after(seconds, Happening::Computed(request));
    }

    pub(super) fn computed(&mut self, request: usize) {
        let prefill = self.flights[request].prefill;
        self.flights[request].computed = Some(self.now);
        let worker = &mut self.prefills[prefill];
        worker.computing = None;
        worker.computed.push(request);
        self.make_sendable(request);
        self.compute(prefill);
    }

    /// Gives pages to those that wait for them, in the order of their dispatch.
    fn take_pages(&mut self, decode: usize) {
        while let Some(&request) = self.decodes[decode].waiting.front() {
            let worker = &mut self.decodes[decode];
            let tokens = worker.kv_tokens + self.flights[request].kv_tokens();
            // A request that is larger than the whole pool must still be served once.
            if tokens > self.scenario.decode_kv_tokens && worker.kv_tokens > 0 {
                return;
            }
            worker.waiting.pop_front();
            worker.kv_tokens = tokens;
            worker.requests += 1;
            self.flights[request].has_pages = true;
            self.make_sendable(request);
        }
    }

    /// A request can be sent once it is computed and has its pages.
    fn make_sendable(&mut self, request: usize) {
        let now = self.now;
        let flight = &mut self.flights[request];
        if !flight.has_pages || flight.computed.is_none() {
            return;
        }
        flight.sendable = Some(now);
        let (prefill, decode) = (flight.prefill, flight.decode);
        self.prefills[prefill].sendable.push_back(request);
        self.decodes[decode].sendable.push_back(request);
        self.send(prefill, decode);
    }

    /// Starts what can start on this egress and this ingress, the longest waiting first.
    fn send(&mut self, prefill: usize, decode: usize) {
        loop {
            let ours = [
                self.prefills[prefill].sendable.iter(),
                self.decodes[decode].sendable.iter(),
            ];
            let next = ours
                .into_iter()
                .filter_map(|mut waiting| waiting.find(|request| self.wire_is_free(**request)))
                .min_by_key(|request| (self.flights[**request].sendable, **request));
            let Some(&request) = next else { return };
            self.start(request);
        }
    }

    fn wire_is_free(&self, request: usize) -> bool {
        let flight = &self.flights[request];
        self.prefills[flight.prefill].sending.is_none() && !self.decodes[flight.decode].receiving
    }

    fn start(&mut self, request: usize) {
        let now = self.now;
        let flight = &mut self.flights[request];
        flight.sending = now;
        let (prefill, decode) = (flight.prefill, flight.decode);
        let computed = flight.computed.unwrap_or(now);
        self.tally.wire_wait_s += (now - computed).as_secs_f64();
        let bytes = flight.input * self.scenario.kv_bytes_per_token;
        self.prefills[prefill].sending = Some(request);
        self.prefills[prefill]
            .sendable
            .retain(|other| *other != request);
        self.decodes[decode].receiving = true;
        self.decodes[decode]
            .sendable
            .retain(|other| *other != request);
        let seconds = bytes as f64 / self.scenario.rate(prefill, decode, now.as_secs_f64());
        self.tally.transfer_s += seconds;
        self.after(seconds, Happening::Arrived(request));
    }

    pub(super) fn transferred(&mut self, request: usize) {
        let (prefill, decode) = (self.flights[request].prefill, self.flights[request].decode);
        self.prefills[prefill].sending = None;
        self.prefills[prefill].measured[decode] = true;
        self.decodes[decode].receiving = false;
        self.send(prefill, decode);
        let seconds = (self.now - self.flights[request].sending).as_secs_f64();
        let seconds = self.scenario.telemetry.then_some(seconds);
        self.tell(request, Event::TransferDone { seconds });
        self.gossip(request, News::Transferred);
        self.after(self.scenario.decode_step_s, Happening::FirstToken(request));
        self.retry(self.flights[request].router);
    }

    pub(super) fn first_token(&mut self, request: usize) {
        self.tell(request, Event::FirstToken);
        let flight = &self.flights[request];
        let ttft = (self.now - flight.arrived).as_secs_f64();
        let since_dispatch = (self.now - flight.dispatched).as_secs_f64();
        self.tally.ttft_s.push(ttft);
        self.tally.prediction_error_s += (since_dispatch - flight.predicted_s).abs();
        let rest = (flight.output - 1) as f64 * self.scenario.decode_step_s;
        self.after(rest, Happening::Finished(request));
    }

    pub(super) fn finished(&mut self, request: usize) {
        let flight = &self.flights[request];
        let (decode, router) = (flight.decode, flight.router);
        let worker = &mut self.decodes[decode];
        worker.kv_tokens -= flight.kv_tokens();
        worker.requests -= 1;
        self.take_pages(decode);
        self.tell(request, Event::Finished);
        self.gossip(request, News::Finished);
        self.retry(router);
    }

    /// Bytes of a transfer on the wire that have not arrived yet.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a share of a number that fits"
    )]
    pub(super) fn bytes_left(&self, request: usize) -> u64 {
        let flight = &self.flights[request];
        let bytes = (flight.input * self.scenario.kv_bytes_per_token) as f64;
        let start = flight.sending.as_secs_f64();
        let rate = self.scenario.rate(flight.prefill, flight.decode, start);
        (bytes - (self.now.as_secs_f64() - start) * rate).max(0.0) as u64
    }
}
