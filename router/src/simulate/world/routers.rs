//! The routers: their boards, what they hold, and what reaches them of the fleet.
#![forbid(unsafe_code)]

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use super::super::scenario::Scenario;
use super::{Happening, News, World};
use crate::schedule::board::Event;
use crate::schedule::facts::{Facts, Role};
use crate::schedule::sample::{KvPool, Link, RankQueue, Sample};
use crate::schedule::{Board, Policy, Request, Settings, WorkerId};

/// One replica.
pub(super) struct Router {
    board: Board,
    prefills: Vec<WorkerId>,
    decodes: Vec<WorkerId>,
    /// Where each worker stands in the scenario.
    places: HashMap<WorkerId, usize>,
    held: VecDeque<usize>,
    pub(super) retry_planned: bool,
}

/// What all workers said of themselves at one time.
pub(super) struct Picture {
    at: Duration,
    number: u64,
    prefills: Vec<PrefillPicture>,
    decodes: Vec<KvPool>,
}

struct PrefillPicture {
    queue: RankQueue,
    /// By decode: bytes queued, in flight, per second.
    links: Vec<(u64, u64, f64)>,
    /// Requests that were computed since the last picture.
    computed: Vec<usize>,
}

impl Router {
    /// A replica whose board knows the fleet by its table.
    pub(super) fn new(scenario: &Scenario, policy: Policy, seed: u64, number: usize) -> Self {
        let defaults = Settings::default();
        // A picture that is old on arrival is no sign of a dead stream.
        let period = scenario.sample_period_s.max(scenario.sample_delay_s);
        let mut board = Board::new(Settings {
            policy,
            seed: seed.wrapping_add(number as u64),
            replica: number as u64,
            sample_period: Duration::try_from_secs_f64(period).unwrap_or(defaults.sample_period),
            cross_zone_bytes_per_s: scenario.cross_zone_bytes_per_s,
            egress_bytes_max: scenario
                .egress_bytes_max
                .unwrap_or(defaults.egress_bytes_max),
            ..defaults
        });
        let mut places = HashMap::new();
        let mut join = |role: Role, index: usize| {
            let letter = if role == Role::Prefill { 'p' } else { 'd' };
            let id = board
                .join(Facts {
                    kv_bytes_per_token: scenario.kv_bytes_per_token,
                    bytes_per_s: scenario.told_bytes_per_s.unwrap_or(scenario.bytes_per_s),
                    prefill_tokens_per_s: scenario.prefill_tokens_per_s,
                    kv_tokens_max: Some(scenario.decode_kv_tokens),
                    zone: Some(format!("zone{}", index % scenario.zones)),
                    ..Facts::new(format!("{letter}{index}"), role)
                })
                .expect("invariant: a scenario's workers fit a board");
            board.set_ready(id, true);
            places.insert(id, index);
            id
        };
        let prefills = (0..scenario.prefills)
            .map(|index| join(Role::Prefill, index))
            .collect();
        let decodes = (0..scenario.decodes)
            .map(|index| join(Role::Decode, index))
            .collect();
        Self {
            board,
            prefills,
            decodes,
            places,
            held: VecDeque::new(),
            retry_planned: false,
        }
    }

    fn take_in(&mut self, picture: &Picture) {
        let sample = |worker: WorkerId| Sample {
            worker,
            source: 0,
            epoch: 1,
            sequence: picture.number,
            at: picture.at,
            tells_rooms: true,
            links: None,
            queues: None,
            pool: None,
        };
        for (id, prefill) in self.prefills.iter().zip(&picture.prefills) {
            let links = self.decodes.iter().zip(&prefill.links);
            let links: Vec<Link> = links
                .map(|(peer, (queued, in_flight, rate))| Link {
                    peer: *peer,
                    bytes_queued: *queued,
                    bytes_in_flight: *in_flight,
                    bytes_per_s: *rate,
                })
                .collect();
            let taken = self.board.ingest(&Sample {
                links: Some(&links),
                queues: Some(&[prefill.queue]),
                ..sample(*id)
            });
            debug_assert_eq!(taken, Ok(()), "pictures come in their order");
        }
        for (id, pool) in self.decodes.iter().zip(&picture.decodes) {
            let taken = self.board.ingest(&Sample {
                pool: Some(*pool),
                ..sample(*id)
            });
            debug_assert_eq!(taken, Ok(()), "pictures come in their order");
        }
    }
}

impl World<'_> {
    /// Plans the pictures that a decision at an arrival would be made from. The others would be replaced before anybody
    /// looks at them.
    pub(super) fn plan_pictures(&mut self) {
        if !self.scenario.telemetry {
            return;
        }
        let mut last = None;
        for request in 0..self.flights.len() {
            let arrived = self.flights[request].arrived.as_secs_f64();
            let Some(tick) = self.tick(arrived - self.scenario.sample_delay_s) else {
                continue;
            };
            if last != Some(tick) {
                last = Some(tick);
                self.at(tick, Happening::Picture);
            }
        }
    }

    /// The last time at or before `seconds` at which workers picture themselves.
    fn tick(&self, seconds: f64) -> Option<Duration> {
        let period = self.scenario.sample_period_s;
        Duration::try_from_secs_f64((seconds / period).floor() * period).ok()
    }

    pub(super) fn picture(&mut self) {
        if self.last_picture == Some(self.now) {
            return;
        }
        self.last_picture = Some(self.now);
        let prefills = (0..self.prefills.len())
            .map(|index| self.picture_prefill(index))
            .collect();
        // Pages of one token each: the pool's size in tokens is what counts.
        let pages = self.scenario.decode_kv_tokens;
        let decodes = self.decodes.iter().map(|decode| KvPool {
            free_pages: pages.saturating_sub(decode.kv_tokens),
            pages,
            requests: decode.requests,
        });
        let picture = Picture {
            at: self.now,
            number: self.counted,
            prefills,
            decodes: decodes.collect(),
        };
        self.pictures.push_back(picture);
        self.after(self.scenario.sample_delay_s, Happening::Delivery);
    }

    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a share of a request's tokens"
    )]
    fn picture_prefill(&mut self, index: usize) -> PrefillPicture {
        let computed = std::mem::take(&mut self.prefills[index].computed);
        let prefill = &self.prefills[index];
        let waiting = prefill
            .queue
            .iter()
            .map(|request| self.flights[*request].input);
        let mut queue = RankQueue {
            rank: 0,
            tokens: waiting.sum(),
            requests: prefill.queue.len() as u64,
        };
        if let Some((request, since, seconds)) = prefill.computing {
            let left = 1.0 - (self.now - since).as_secs_f64() / seconds;
            let input = self.flights[request].input as f64;
            queue.tokens += (input * left.clamp(0.0, 1.0)) as u64;
            queue.requests += 1;
        }
        let seconds = self.now.as_secs_f64();
        let rate = |decode: usize| self.scenario.rate(index, decode, seconds);
        let mut links: Vec<(u64, u64, f64)> = (0..self.decodes.len())
            .map(|decode| {
                (
                    0,
                    0,
                    if prefill.measured[decode] {
                        rate(decode)
                    } else {
                        0.0
                    },
                )
            })
            .collect();
        for request in &prefill.sendable {
            let flight = &self.flights[*request];
            links[flight.decode].0 += flight.input * self.scenario.kv_bytes_per_token;
        }
        if let Some(request) = prefill.sending {
            links[self.flights[request].decode].1 += self.bytes_left(request);
        }
        PrefillPicture {
            queue,
            links,
            computed,
        }
    }

    pub(super) fn deliver(&mut self) {
        let Some(picture) = self.pictures.pop_front() else {
            return;
        };
        for request in picture
            .prefills
            .iter()
            .flat_map(|prefill| &prefill.computed)
        {
            let flight = &self.flights[*request];
            let (Some(key), Some(computed)) = (flight.key, flight.computed) else {
                continue;
            };
            for router in &mut self.routers {
                router.board.advance(key, Event::PrefillDone, computed);
            }
        }
        for router in &mut self.routers {
            router.take_in(&picture);
        }
        // Pictures were planned for arrivals; what is held is decided at other times.
        if self.routers.iter().any(|router| !router.held.is_empty()) {
            let next = picture.at.as_secs_f64() + self.scenario.sample_period_s * 1.5;
            if let Some(tick) = self.tick(next) {
                self.at(tick.max(self.now), Happening::Picture);
            }
        }
        for router in 0..self.routers.len() {
            self.retry(router);
        }
    }

    pub(super) fn arrive(&mut self, request: usize) {
        let router = self.flights[request].router;
        self.routers[router].held.push_back(request);
        self.retry(router);
        if self.routers[router].held.back() == Some(&request) {
            self.tally.held += 1;
        }
    }

    /// Dispatches what the router holds, in order, as long as there are pairs for it.
    pub(super) fn retry(&mut self, router: usize) {
        while let Some(&request) = self.routers[router].held.front() {
            let state = &mut self.routers[router];
            let flight = &mut self.flights[request];
            let asked = Request {
                prompt_tokens: flight.input,
                output_tokens: flight.output,
                chunks: &flight.chunks,
                stream: request as u64,
                ..Request::default()
            };
            let decision = match state.board.pick(self.now, &asked) {
                Ok(decision) => decision,
                Err(no_pair) => {
                    let wait = no_pair.hold().unwrap_or(Duration::from_secs(1));
                    if !std::mem::replace(&mut state.retry_planned, true) {
                        self.after(wait.as_secs_f64(), Happening::Retry(router));
                    }
                    return;
                }
            };
            state.held.pop_front();
            let key = state
                .board
                .book(self.now, &decision, &asked)
                .expect("invariant: the pair was just chosen and bookings end");
            if self.scenario.gossip {
                flight.record = state.board.record(self.now, key);
            }
            flight.key = Some(key);
            flight.prefill = state.places[&decision.prefill];
            flight.decode = state.places[&decision.decode];
            flight.dispatched = self.now;
            flight.predicted_s = decision.prediction.ttft_s();
            self.tally.decisions += 1;
            if let Some(age) = decision.sample_age {
                self.tally.ages += 1;
                self.tally.age_s += age.as_secs_f64();
            }
            self.gossip(request, News::Booked);
            self.dispatch(request);
        }
    }

    /// Tells the request's own router.
    pub(super) fn tell(&mut self, request: usize, event: Event) {
        let flight = &self.flights[request];
        if let Some(key) = flight.key {
            self.routers[flight.router]
                .board
                .advance(key, event, self.now);
        }
    }

    pub(super) fn gossip(&mut self, request: usize, news: News) {
        if self.scenario.gossip && self.routers.len() > 1 {
            self.after(
                self.scenario.gossip_delay_s,
                Happening::Heard(request, news),
            );
        }
    }

    pub(super) fn hear(&mut self, request: usize, news: News) {
        let flight = &self.flights[request];
        let (Some(key), Some(record)) = (flight.key, &flight.record) else {
            return;
        };
        let others = self.routers.iter_mut().enumerate();
        for (_, router) in others.filter(|(index, _)| *index != flight.router) {
            let board = &mut router.board;
            match news {
                News::Booked => {
                    // A sibling's booking that finds no place only makes the picture less complete.
                    board.adopt(self.now, record).ok();
                }
                News::Transferred => {
                    board.advance(key, Event::TransferDone { seconds: None }, self.now);
                }
                News::Finished => {
                    board.advance(key, Event::Finished, self.now);
                }
            }
        }
    }
}
