//! Boards to ask, and what they are told.

use std::time::Duration;

use kvrouter::schedule::board::Key;
use kvrouter::schedule::facts::{Facts, Role};
use kvrouter::schedule::sample::{KvPool, Link, RankQueue};
use kvrouter::schedule::{Board, Decision, Request, Sample, Settings, WorkerId};

/// Tokens per second, bytes per token and bytes per second of every worker: 1000 tokens compute in 1 s and move in 1 s.
pub const TOKENS_PER_S: f64 = 1000.0;
pub const BYTES_PER_TOKEN: u64 = 1_000_000;
pub const BYTES_PER_S: f64 = 1e9;

pub fn seconds(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds)
}

pub fn tokens(count: u64) -> Request<'static> {
    Request {
        prompt_tokens: count,
        ..Request::default()
    }
}

pub fn facts(name: String, role: Role) -> Facts {
    Facts {
        kv_bytes_per_token: BYTES_PER_TOKEN,
        bytes_per_s: BYTES_PER_S,
        prefill_tokens_per_s: TOKENS_PER_S,
        ..Facts::new(name, role)
    }
}

pub struct Fleet {
    pub board: Board,
    pub prefills: Vec<WorkerId>,
    pub decodes: Vec<WorkerId>,
    sequence: u64,
}

impl Fleet {
    /// Ready workers named p0…, d0….
    pub fn new(settings: Settings, prefills: usize, decodes: usize) -> Self {
        let mut board = Board::new(settings);
        let mut join = |role, letter, count| -> Vec<WorkerId> {
            (0..count)
                .map(|index| {
                    let id = board.join(facts(format!("{letter}{index}"), role)).unwrap();
                    board.set_ready(id, true);
                    id
                })
                .collect()
        };
        let prefills = join(Role::Prefill, 'p', prefills);
        let decodes = join(Role::Decode, 'd', decodes);
        Self {
            board,
            prefills,
            decodes,
            sequence: 0,
        }
    }

    pub fn pick(&mut self, now: f64, request: &Request<'_>) -> Decision {
        self.board.pick(seconds(now), request).unwrap()
    }

    /// Books a pair of the test's own choice.
    pub fn book(&mut self, now: f64, pair: (usize, usize), request: &Request<'_>) -> Key {
        let only = ([self.prefills[pair.0]], [self.decodes[pair.1]]);
        let request = Request {
            prefill_subset: Some(&only.0),
            decode_subset: Some(&only.1),
            ..*request
        };
        let decision = self.pick(now, &request);
        self.board.book(seconds(now), &decision, &request).unwrap()
    }

    /// Which prefill is picked.
    pub fn prefill(&mut self, now: f64, request: &Request<'_>) -> usize {
        let id = self.pick(now, request).prefill;
        self.prefills.iter().position(|known| *known == id).unwrap()
    }

    /// Which decode is picked.
    pub fn decode(&mut self, now: f64, request: &Request<'_>) -> usize {
        let id = self.pick(now, request).decode;
        self.decodes.iter().position(|known| *known == id).unwrap()
    }

    pub fn sample(&mut self, worker: WorkerId, at: f64) -> Sample<'static> {
        self.sequence += 1;
        Sample {
            worker,
            source: 0,
            epoch: 1,
            sequence: self.sequence,
            at: seconds(at),
            tells_rooms: true,
            links: None,
            queues: None,
            pool: None,
        }
    }

    /// A prefill's picture: tokens in its queue; decode, bytes queued and rate of each link.
    pub fn prefill_says(
        &mut self,
        at: f64,
        prefill: usize,
        queued: u64,
        links: &[(usize, u64, f64)],
    ) {
        let links: Vec<Link> = links
            .iter()
            .map(|(decode, bytes, rate)| Link {
                peer: self.decodes[*decode],
                bytes_queued: *bytes,
                bytes_in_flight: 0,
                bytes_per_s: *rate,
            })
            .collect();
        let queue = RankQueue {
            rank: 0,
            tokens: queued,
            requests: u64::from(queued > 0),
        };
        let sample = self.sample(self.prefills[prefill], at);
        self.board
            .ingest(&Sample {
                links: Some(&links),
                queues: Some(&[queue]),
                ..sample
            })
            .unwrap();
    }

    /// A decode's picture: used tokens of a pool of `total`.
    pub fn decode_says(&mut self, at: f64, decode: usize, used: u64, total: u64) {
        let sample = self.sample(self.decodes[decode], at);
        let pool = KvPool {
            free_pages: total - used,
            pages: total,
            requests: 1,
        };
        self.board
            .ingest(&Sample {
                pool: Some(pool),
                ..sample
            })
            .unwrap();
    }
}
