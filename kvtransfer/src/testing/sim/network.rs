//! Connections as the simulator sees them: ordered byte pipes with a delay, a rate and a bounded amount in flight.

use std::time::Duration;

use super::{card::Qp, dice::Dice, lane::Inbound, outbound::Outbound};
use crate::{
    ids::PeerId,
    time::Time,
    transfer::LaneSetup,
    wire::{control::ControlDecoder, lane::PayloadMode},
};

/// How one stream of a connection behaves.
#[derive(Clone, Copy, Debug)]
pub struct NetSpec {
    /// Least time on the way.
    pub latency: Duration,
    /// Up to so much is added to each piece; a stream stays in order, streams overtake each other.
    pub jitter: Duration,
    /// Bytes per second, at least 1.
    pub rate: u64,
    /// Most bytes written by one call and delivered by one arrival, at least 1.
    pub piece_bytes: usize,
    /// Bytes on the way at which a writer must wait (socket buffers), at least 1.
    pub capacity: usize,
}

impl Default for NetSpec {
    /// A quiet local network: 20 µs, 1 GB/s.
    fn default() -> Self {
        Self {
            latency: Duration::from_micros(20),
            jitter: Duration::ZERO,
            rate: 1_000_000_000,
            piece_bytes: 64 << 10,
            capacity: 256 << 10,
        }
    }
}

/// One lane of a connection.
#[derive(Clone, Copy, Debug)]
pub struct LaneSpec {
    /// How payload travels on it.
    pub mode: PayloadMode,
    /// Most bytes of one batch (and of one ring slot).
    pub batch_bytes: u64,
    /// Most unacknowledged batches (and ring slots).
    pub window: usize,
    /// Its stream.
    pub net: NetSpec,
}

impl From<&LaneSpec> for LaneSetup {
    fn from(spec: &LaneSpec) -> Self {
        Self {
            mode: spec.mode,
            path: "sim",
            path_reason: String::new(),
            batch_bytes: spec.batch_bytes,
            window: spec.window,
        }
    }
}

/// A connection between two ranks.
#[derive(Clone, Debug)]
pub struct LinkSpec {
    /// The control stream.
    pub control: NetSpec,
    /// The lanes, at most 16.
    pub lanes: Vec<LaneSpec>,
}

/// The way from one side of a connection to the other.
#[derive(Debug)]
pub(super) struct Pipe {
    pub(super) net: NetSpec,
    free_at: Time,
    arrived_at: Time,
    pub(super) in_flight: usize,
}

impl Pipe {
    pub(super) fn new(net: NetSpec) -> Self {
        let start = Time::default();
        Self {
            net,
            free_at: start,
            arrived_at: start,
            in_flight: 0,
        }
    }

    /// When `len` bytes written now arrive.
    pub(super) fn send(&mut self, now: Time, len: usize, dice: &mut Dice) -> Time {
        self.in_flight += len;
        let busy = u128::from(len as u64) * 1_000_000_000 / u128::from(self.net.rate.max(1));
        let busy = Duration::from_nanos(u64::try_from(busy).unwrap_or(u64::MAX));
        self.free_at = self.free_at.max(now) + busy;
        let jitter = u64::try_from(self.net.jitter.as_nanos()).unwrap_or(u64::MAX);
        let late = Duration::from_nanos(dice.within(0, jitter));
        self.arrived_at = self.arrived_at.max(self.free_at + self.net.latency + late);
        self.arrived_at
    }

    pub(super) fn space(&self) -> usize {
        self.net.capacity.saturating_sub(self.in_flight)
    }
}

/// Shared memory of one direction of a lane.
#[derive(Debug)]
pub(super) struct SimRing {
    pub(super) bytes: Vec<u8>,
    pub(super) slot: usize,
}

/// One side of a lane.
#[derive(Debug)]
pub(super) struct LaneEnd {
    pub(super) is_up: bool,
    pub(super) spec: LaneSpec,
    pub(super) out: Pipe,
    pub(super) ring: SimRing,
    pub(super) inbound: Inbound,
    pub(super) outbound: Outbound,
    /// Of mode `Write` only.
    pub(super) qp: Qp,
    /// A pump event is on its way.
    pub(super) pumping: bool,
}

impl LaneEnd {
    fn new(spec: LaneSpec) -> Self {
        let slot = usize::try_from(spec.batch_bytes).unwrap_or(0);
        let slots = if spec.mode == PayloadMode::Ring {
            spec.window
        } else {
            0
        };
        Self {
            is_up: true,
            spec,
            out: Pipe::new(spec.net),
            ring: SimRing {
                bytes: vec![0; slot * slots],
                slot,
            },
            inbound: Inbound::default(),
            outbound: Outbound::default(),
            qp: match spec.mode {
                PayloadMode::Write => Qp::new(1, Time::default()),
                _ => Qp::default(),
            },
            pumping: false,
        }
    }
}

/// One side of a connection.
#[derive(Debug)]
pub(super) struct Side {
    pub(super) rank: usize,
    pub(super) life: u32,
    pub(super) peer: PeerId,
    pub(super) is_up: bool,
    pub(super) control_out: Pipe,
    pub(super) control_in: ControlDecoder,
    pub(super) lanes: Vec<LaneEnd>,
}

impl Side {
    pub(super) fn new(rank: usize, life: u32, peer: PeerId, spec: &LinkSpec) -> Self {
        let mut control_in = ControlDecoder::for_stranger();
        control_in.trust();
        Self {
            rank,
            life,
            peer,
            is_up: true,
            control_out: Pipe::new(spec.control),
            control_in,
            lanes: spec.lanes.iter().copied().map(LaneEnd::new).collect(),
        }
    }
}

/// A connection: two sides.
#[derive(Debug)]
pub(super) struct Conn {
    pub(super) sides: [Side; 2],
    /// What is on the way when it breaks is lost, else it still arrives.
    pub(super) loses: bool,
    /// Its cards may read pages again until they have landed; else they copy them first.
    pub(super) reads_again: bool,
}

/// One stream of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stream {
    Control,
    Lane(usize),
}

/// One end of one lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LaneAt {
    pub(super) conn: usize,
    pub(super) side: usize,
    pub(super) lane: usize,
}

impl LaneAt {
    pub(super) fn other(self) -> Self {
        Self {
            side: 1 - self.side,
            ..self
        }
    }
}
