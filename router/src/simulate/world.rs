//! The simulated fleet: prefills that compute one prompt after the other, wires that carry one transfer at a time, and
//! decodes that hold what their KV pool takes. The routers in it are [boards](crate::schedule::Board), fed with the events and samples that a
//! real router would get, as late as it would get them.
#![forbid(unsafe_code)]

mod fleet;
mod routers;

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use super::outcome::{Outcome, Tally};
use super::scenario::Scenario;
use super::trace::Arrival;
use crate::schedule::Policy;
use crate::schedule::board::Key;
use crate::schedule::dice::Dice;

use fleet::{Decode, Prefill};

/// What happens at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Happening {
    /// A request reaches its router.
    Arrival(usize),
    /// A prefill has computed a request.
    Computed(usize),
    /// A request's last byte arrived.
    Arrived(usize),
    /// A decode gives a request's first token.
    FirstToken(usize),
    /// A decode gives a request's last token.
    Finished(usize),
    /// All workers picture themselves.
    Picture,
    /// The routers get the oldest picture on its way.
    Delivery,
    /// A router hears of a sibling's booking.
    Heard(usize, News),
    /// A router tries its held requests again.
    Retry(usize),
}

/// What replicas tell each other of a booking.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum News {
    Booked,
    Transferred,
    Finished,
}

/// A request on its way.
#[derive(Clone, Debug, Default)]
struct Flight {
    arrived: Duration,
    input: u64,
    output: u64,
    chunks: Vec<u64>,
    router: usize,
    key: Option<Key>,
    prefill: usize,
    decode: usize,
    dispatched: Duration,
    computed: Option<Duration>,
    /// When it could be sent, with its pages taken at the decode: the order of the wire.
    sendable: Option<Duration>,
    has_pages: bool,
    sending: Duration,
    predicted_s: f64,
    record: Option<crate::schedule::board::Record>,
}

impl Flight {
    fn kv_tokens(&self) -> u64 {
        self.input + self.output
    }
}

struct World<'a> {
    scenario: &'a Scenario,
    now: Duration,
    events: BinaryHeap<Reverse<(Duration, u64, Happening)>>,
    counted: u64,
    flights: Vec<Flight>,
    prefills: Vec<Prefill>,
    decodes: Vec<Decode>,
    routers: Vec<routers::Router>,
    pictures: std::collections::VecDeque<routers::Picture>,
    last_picture: Option<Duration>,
    dice: Dice,
    tally: Tally,
}

/// Replays `arrivals` (in the order of their time) and returns what came out. `progress` is told after each first token
/// how many there were.
pub fn run(
    scenario: &Scenario,
    arrivals: &[Arrival],
    policy: Policy,
    seed: u64,
    progress: &mut dyn FnMut(usize),
) -> Outcome {
    let mut world = World::new(scenario, arrivals, policy, seed);
    while let Some(Reverse((at, _, happening))) = world.events.pop() {
        world.now = at;
        world.happen(happening);
        if matches!(happening, Happening::FirstToken(_)) {
            progress(world.tally.ttft_s.len());
        }
    }
    world.tally.outcome()
}

impl<'a> World<'a> {
    fn new(scenario: &'a Scenario, arrivals: &[Arrival], policy: Policy, seed: u64) -> Self {
        let router = |number| routers::Router::new(scenario, policy, seed, number);
        let mut world = Self {
            scenario,
            now: Duration::ZERO,
            events: BinaryHeap::new(),
            counted: 0,
            flights: Vec::with_capacity(arrivals.len()),
            prefills: (0..scenario.prefills)
                .map(|_| Prefill::new(scenario))
                .collect(),
            decodes: vec![Decode::default(); scenario.decodes],
            routers: (0..scenario.replicas).map(router).collect(),
            pictures: std::collections::VecDeque::new(),
            last_picture: None,
            dice: Dice::new(seed, 3),
            tally: Tally::default(),
        };
        for (index, arrival) in arrivals.iter().enumerate() {
            let arrived = arrival.at.div_f64(scenario.load);
            let chunks = if scenario.prefix_cache_tokens > 0 {
                arrival.blocks.clone()
            } else {
                Vec::new()
            };
            let router = world.dice.below(scenario.replicas);
            world.flights.push(Flight {
                arrived,
                input: arrival.input,
                output: arrival.output,
                chunks,
                router,
                ..Flight::default()
            });
            world.at(arrived, Happening::Arrival(index));
        }
        world.plan_pictures();
        world
    }

    fn at(&mut self, time: Duration, happening: Happening) {
        self.counted += 1;
        self.events.push(Reverse((time, self.counted, happening)));
    }

    fn after(&mut self, seconds: f64, happening: Happening) {
        // What never ends within the age of the earth need not end at all.
        let time = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::from_secs(1 << 57));
        self.at(self.now.saturating_add(time), happening);
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Arrival(request) => self.arrive(request),
            Happening::Computed(request) => self.computed(request),
            Happening::Arrived(request) => self.transferred(request),
            Happening::FirstToken(request) => self.first_token(request),
            Happening::Finished(request) => self.finished(request),
            Happening::Picture => self.picture(),
            Happening::Delivery => self.deliver(),
            Happening::Heard(request, news) => self.hear(request, news),
            Happening::Retry(router) => {
                self.routers[router].retry_planned = false;
                self.retry(router);
            }
        }
    }
}
