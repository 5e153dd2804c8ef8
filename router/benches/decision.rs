//! How long a decision takes, and how many samples a core takes in.
#![allow(
    missing_docs,
    reason = "criterion's macros write undocumented functions"
)]

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use kvrouter::config::scheduling::Scheduling;
use kvrouter::discover::{Fleet as Members, Member};
use kvrouter::pick::booking::Booking;
use kvrouter::pick::hold::Hold;
use kvrouter::pick::{Picker, Wish};
use kvrouter::pool::worker::WorkerSettings;
use kvrouter::pool::{self, Pool};
use kvrouter::schedule::board::Event;
use kvrouter::schedule::dice::Dice;
use kvrouter::schedule::facts::{Facts, Role};
use kvrouter::schedule::sample::{Link, RankQueue};
use kvrouter::schedule::{Board, Policy, Request, Sample, Settings, WorkerId};

const WORKERS: usize = 64;
/// Bookings before or on the wire, per prefill: a loaded fleet.
const JOBS: usize = 8;

struct Fleet {
    board: Board,
    prefills: Vec<WorkerId>,
    decodes: Vec<WorkerId>,
    dice: Dice,
    sequence: u64,
}

impl Fleet {
    fn loaded(policy: Policy, jobs: usize) -> Self {
        let mut board = Board::new(Settings {
            policy,
            ..Settings::default()
        });
        let mut join = |role, letter: char| -> Vec<WorkerId> {
            (0..WORKERS)
                .map(|index| {
                    let facts = Facts::new(format!("{letter}{index}"), role);
                    let id = board.join(facts).expect("the fleet fits");
                    board.set_ready(id, true);
                    id
                })
                .collect()
        };
        let (prefills, decodes) = (join(Role::Prefill, 'p'), join(Role::Decode, 'd'));
        let dice = Dice::new(1, 1);
        let mut fleet = Self {
            board,
            prefills,
            decodes,
            dice,
            sequence: 0,
        };
        for prefill in 0..WORKERS {
            fleet.sample(prefill, 0.0, 8);
        }
        for _ in 0..jobs * WORKERS {
            let request = fleet.request();
            let decision = fleet
                .board
                .pick(Duration::ZERO, &request)
                .expect("all are ready");
            let now = Duration::from_millis(1);
            let key = fleet
                .board
                .book(now, &decision, &request)
                .expect("there is room");
            if fleet.dice.below(2) == 0 {
                fleet
                    .board
                    .advance(key, Event::PrefillDone, Duration::from_millis(30));
            }
        }
        fleet
    }

    fn request(&mut self) -> Request<'static> {
        Request {
            prompt_tokens: 100 + self.dice.below(20_000) as u64,
            stream: self.dice.bits(),
            ..Request::default()
        }
    }

    /// A picture of one prefill in which `busy` of its links have bytes.
    fn sample(&mut self, prefill: usize, at: f64, busy: usize) {
        self.sequence += 1;
        let links: Vec<Link> = (0..WORKERS)
            .map(|decode| Link {
                peer: self.decodes[decode],
                bytes_queued: if (decode + prefill) % WORKERS < busy {
                    1 << 28
                } else {
                    0
                },
                bytes_in_flight: 0,
                bytes_per_s: 20e9 + (self.dice.bits() % 1000) as f64 * 1e6,
            })
            .collect();
        let queue = RankQueue {
            rank: 0,
            tokens: self.dice.below(30_000) as u64,
            requests: 3,
        };
        let sample = Sample {
            worker: self.prefills[prefill],
            source: 0,
            epoch: 1,
            sequence: self.sequence,
            at: Duration::from_secs_f64(at),
            tells_rooms: true,
            links: Some(&links),
            queues: Some(&[queue]),
            pool: None,
        };
        self.board.ingest(&sample).expect("it is new");
    }
}

fn decisions(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("decision at 64P x 64D");
    for (policy, name) in Policy::ALL {
        let mut fleet = Fleet::loaded(policy, JOBS);
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                let request = fleet.request();
                black_box(fleet.board.pick(Duration::from_millis(40), &request))
            });
        });
    }
    let mut idle = Fleet::loaded(Policy::Fused, 0);
    group.bench_function("fused, idle", |bencher| {
        bencher.iter(|| {
            let request = idle.request();
            black_box(idle.board.pick(Duration::from_millis(40), &request))
        });
    });
    group.finish();
}

fn samples(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("samples");
    group.throughput(Throughput::Elements(1));
    let mut fleet = Fleet::loaded(Policy::Fused, JOBS);
    group.bench_function("64 links, every rate changed", |bencher| {
        bencher.iter(|| {
            let prefill = fleet.dice.below(WORKERS);
            fleet.sample(prefill, 0.04, 8);
        });
    });
    group.finish();
}

/// The same choice with all that the front does around it: gates, the lock, the booking and its events.
fn placements(criterion: &mut Criterion) {
    let member = |role, letter: char, index: usize| Member {
        name: format!("{letter}{index}"),
        role,
        url: format!("http://10.0.0.{index}:3000")
            .parse()
            .expect("a URL"),
        bootstrap_port: None,
        telemetry_port: None,
        zone: None,
        draining: false,
    };
    let of_role = |role, letter| (0..WORKERS).map(move |index| member(role, letter, index));
    let pool = Pool::new(WorkerSettings::default());
    pool.sync(&Members {
        members: of_role(pool::Role::Prefill, 'p')
            .chain(of_role(pool::Role::Decode, 'd'))
            .collect(),
        models: Vec::new(),
    });
    for worker in pool.now().workers() {
        worker.mark_ready(true);
    }
    let picker = Arc::new(Picker::new(&Scheduling::default()));
    picker.sync(&pool.now());
    let hold = Arc::new(Hold::new(1000));
    let wish = Wish {
        prompt_bytes: 32 << 10,
        ..Wish::default()
    };
    let place = || {
        let picked = picker.pick(&wish).expect("all are ready");
        Booking::new(&picker, &hold, &picked, wish.prompt_bytes)
    };
    let _live: Vec<Booking> = (0..JOBS * WORKERS).map(|_| place()).collect();
    criterion.bench_function("placement at 64P x 64D, with its events", |bencher| {
        bencher.iter(|| {
            let booking = place();
            booking.prefill_done();
            booking.first_byte();
            booking.ended();
        });
    });
}

criterion_group!(benches, decisions, samples, placements);
criterion_main!(benches);
