//! The side that asks: performs the RDMA steps over one pair of devices.
#![forbid(unsafe_code)]

use std::time::Duration;

use super::TrialError;
use super::door;
use super::endpoint::{AREA_BYTES, Endpoint, SENDS};
use super::wire::{Card, MISLED, Order, Reply, STARVED, TRAFFIC, pattern};
use crate::clock;
use crate::doctor::exchange::Line;
use crate::doctor::rails::Rail;
use crate::doctor::steps::{Figure, Outcome, Step};
use crate::transport::verbs::chain::{Flags, RemotePlace};

/// Round trips of which the median is taken.
const ROUND_TRIPS: usize = 200;
/// Bytes of a WRITE in the bandwidth step.
const WRITE_BYTES: usize = 64 << 10;
/// How long bandwidth is measured.
const BANDWIDTH_TIME: Duration = Duration::from_secs(1);
/// Bytes of a piece in the gather step; odd, so that no piece starts where a page does.
const PIECE_BYTES: usize = 4093;

/// A pair of endpoints, ours and the peer's.
pub(in crate::doctor) struct Trial {
    endpoint: Endpoint,
    peer: Card,
}

impl Trial {
    /// Makes queue pairs here and at the peer's device `remote`, and connects them.
    pub(in crate::doctor) fn open(
        line: &mut Line,
        rail: &Rail,
        remote: &str,
    ) -> Result<Self, TrialError> {
        if rail.mode.needs_cm() {
            return Self::dial(line, rail, remote);
        }
        let mut endpoint = Endpoint::open(rail)?;
        let peer = match ask(line, &Order::Open(endpoint.card(remote)))? {
            Reply::Opened(card) => card,
            other => return Err(unexpected(&other)),
        };
        endpoint.connect(&peer)?;
        Ok(Self { endpoint, peer })
    }

    /// The same through rdma_cm: the peer listens, and takes the connections while we make them.
    fn dial(line: &mut Line, rail: &Rail, remote: &str) -> Result<Self, TrialError> {
        let listen = Order::Listen {
            device: remote.to_owned(),
        };
        let endpoint = door::dial(rail, || match ask(line, &listen)? {
            Reply::Listens(door) => {
                line.order(&encode(&Order::Admit))?;
                Ok(door)
            }
            other => Err(unexpected(&other)),
        })?;
        match decode(&line.reply()?)? {
            Reply::Opened(peer) => Ok(Self { endpoint, peer }),
            other => Err(unexpected(&other)),
        }
    }

    /// Performs an RDMA step.
    pub(in crate::doctor) fn perform(
        &mut self,
        line: &mut Line,
        step: Step,
    ) -> Result<Outcome, TrialError> {
        match step {
            Step::WriteAndSend => self.gather(line),
            Step::WriteLatency => self.latency(line, true),
            Step::SendLatency => self.latency(line, false),
            Step::Bandwidth { queue_pairs } => self.bandwidth(line, queue_pairs.into()),
            Step::EmptyReceiveQueue => {
                self.endpoint.notify(STARVED)?;
                self.fault(STARVED)
            }
            Step::BadKey => {
                let piece = self.endpoint.piece(0, 64);
                let to = RemotePlace {
                    address: self.peer.address,
                    rkey: !self.peer.rkey,
                };
                self.endpoint.post_write(MISLED, piece, to)?;
                self.fault(MISLED)
            }
            Step::TcpLatency | Step::TcpBandwidth => {
                Err(TrialError::Refused("a TCP step".to_owned()))
            }
        }
    }

    fn place(&self, offset: usize) -> RemotePlace {
        RemotePlace {
            // The peer's number; whatever it is, it only names a place over there.
            address: self.peer.address.wrapping_add(offset as u64),
            rkey: self.peer.rkey,
        }
    }

    /// The pieces lie here in reverse order with gaps, and must arrive in order without.
    fn gather(&mut self, line: &mut Line) -> Result<Outcome, TrialError> {
        let pieces = self.endpoint.elements();
        let stride = 2 * PIECE_BYTES;
        self.endpoint.fill(pieces * stride, |offset| {
            let (piece, within) = (pieces - 1 - offset / stride, offset % stride);
            if within < PIECE_BYTES {
                pattern(piece * PIECE_BYTES + within)
            } else {
                0
            }
        });
        let elements: Vec<_> = (0..pieces)
            .map(|piece| {
                self.endpoint
                    .piece((pieces - 1 - piece) * stride, PIECE_BYTES)
            })
            .collect();
        let mut chain = self.endpoint.chain();
        let quiet = Flags {
            signalled: false,
            solicited: false,
        };
        chain.write(0, &elements, self.place(0), quiet)?;
        self.endpoint.add_notice(&mut chain, 0)?;
        self.endpoint.post(0, &mut chain)?;
        self.endpoint.await_sent(0)?;
        let bytes = pieces * PIECE_BYTES;
        expect_done(ask(line, &Order::Compare { bytes })?)?;
        #[expect(clippy::cast_precision_loss, reason = "some thousand")]
        let figures = [
            ("gathered", pieces as f64, "pieces"),
            ("equal", bytes as f64, "bytes"),
        ];
        Ok(Outcome::Passed(
            figures
                .map(|(name, value, unit)| Figure::new(name, value, unit))
                .to_vec(),
        ))
    }

    fn latency(&mut self, line: &mut Line, with_write: bool) -> Result<Outcome, TrialError> {
        let count = ROUND_TRIPS;
        line.order(&encode(&Order::Answer { count }))?;
        let mut times = Vec::with_capacity(count);
        for _ in 0..count {
            let start = clock::now();
            let mut chain = self.endpoint.chain();
            if with_write {
                let piece = self.endpoint.piece(0, 64);
                chain.write(0, &[piece], self.place(0), Flags::default())?;
            }
            self.endpoint.add_notice(&mut chain, 0)?;
            self.endpoint.post(0, &mut chain)?;
            self.endpoint.await_notice(0)?;
            times.push(clock::now().since(start));
            self.endpoint.await_sent(0)?;
        }
        expect_done(decode(&line.reply()?)?)?;
        Ok(Outcome::Passed(Figure::quantiles(times)))
    }

    fn bandwidth(&mut self, line: &mut Line, queue_pairs: usize) -> Result<Outcome, TrialError> {
        let queue_pairs = queue_pairs.clamp(1, TRAFFIC);
        let places = AREA_BYTES / WRITE_BYTES;
        let start = clock::now();
        // One request stays free for the notice at the end.
        let depth = SENDS as usize - 1;
        let mut outstanding = [0; TRAFFIC];
        let mut written = 0_u64;
        while clock::now().since(start) < BANDWIDTH_TIME {
            for (qp, outstanding) in outstanding[..queue_pairs].iter_mut().enumerate() {
                if *outstanding == depth {
                    self.endpoint.await_sent(qp)?;
                    *outstanding -= 1;
                }
                let offset = (qp * depth + *outstanding) % places * WRITE_BYTES;
                let piece = self.endpoint.piece(offset, WRITE_BYTES);
                let to = self.place(offset);
                self.endpoint.post_write(qp, piece, to)?;
                *outstanding += 1;
                written += WRITE_BYTES as u64;
            }
        }
        for (qp, outstanding) in outstanding[..queue_pairs].iter().enumerate() {
            self.endpoint.notify(qp)?;
            for _ in 0..=*outstanding {
                self.endpoint.await_sent(qp)?;
            }
        }
        // Behind each queue pair's WRITEs came its notice: once the peer has them all, it has the bytes.
        expect_done(ask(line, &Order::Await { queue_pairs })?)?;
        let seconds = clock::now().since(start);
        Ok(Outcome::Passed(vec![Figure::rate(written, seconds)]))
    }

    fn fault(&mut self, qp: usize) -> Result<Outcome, TrialError> {
        let (what, after) = self.endpoint.watch(qp)?;
        let figure = |after: Duration| Figure::new("after", after.as_secs_f64() * 1e3, "ms");
        Ok(Outcome::Seen {
            what,
            figures: after.map(figure).into_iter().collect(),
        })
    }
}

fn encode(order: &Order) -> Vec<u8> {
    serde_json::to_vec(order).expect("invariant: an order is plain data")
}

fn decode(reply: &[u8]) -> Result<Reply, TrialError> {
    serde_json::from_slice(reply).map_err(|error| TrialError::Peer(error.to_string()))
}

fn ask(line: &mut Line, order: &Order) -> Result<Reply, TrialError> {
    line.order(&encode(order))?;
    decode(&line.reply()?)
}

fn expect_done(reply: Reply) -> Result<(), TrialError> {
    match reply {
        Reply::Done => Ok(()),
        Reply::Differs(offset) => Err(TrialError::Differs(offset)),
        other => Err(unexpected(&other)),
    }
}

fn unexpected(reply: &Reply) -> TrialError {
    match reply {
        Reply::Failed(why) => TrialError::Peer(why.clone()),
        other => TrialError::Peer(format!("{other:?}")),
    }
}
