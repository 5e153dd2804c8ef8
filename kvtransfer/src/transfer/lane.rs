//! One data connection of a peer: what it can do, whether it may be given work, and the batches it has not been answered.

use std::{collections::VecDeque, ops::Range, sync::Arc};

use super::{ebb::LaneSet, peer::Peer};
use crate::{
    ids::{Epoch, LaneId, TransferId},
    plan::pairing::Pairing,
    telemetry::{
        latency::{LatencyWindow, WINDOW_DEFAULT},
        rate::{HALF_LIFE_DEFAULT, RateEstimator},
    },
    time::Time,
    wire::{
        hello::LANES_MAX,
        lane::{BatchFields, PayloadMode},
    },
};

/// What a lane can do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaneSetup {
    /// How payload reaches the peer.
    pub mode: PayloadMode,
    /// Name of the path in telemetry: `tcp`, `shm-pull`, `shm-ring`, `verbs`, `sim`.
    pub path: &'static str,
    /// Why it is not a better one; empty if it is the best.
    pub path_reason: String,
    /// Most bytes of one batch.
    pub batch_bytes: u64,
    /// Most unacknowledged batches.
    pub window: usize,
}

/// Work for one peer: a window of items of one component, or a batch that was lost with its lane.
#[derive(Clone, Debug)]
pub(super) struct Window {
    pub(super) transfer: TransferId,
    pub(super) room: u64,
    pub(super) epoch: Epoch,
    pub(super) component: u8,
    /// Which bytes go where.
    pub(super) pairing: Arc<Pairing>,
    /// Where the window starts in the granted list.
    pub(super) start: u32,
    pub(super) items: Arc<[i32]>,
    /// The window's part of `items`.
    pub(super) part: Range<usize>,
    /// Bytes of the stream still to send.
    pub(super) offset: u64,
    pub(super) end: u64,
    /// Whether the room's last batch ends this window.
    pub(super) last: bool,
    /// Number that the batch had on a lane that died; `None` for new work.
    pub(super) resend: Option<u32>,
    pub(super) queued_at: Time,
}

impl Window {
    /// What a lane needs to know of a window that is one batch.
    pub(super) fn to_batch(&self, seq: u32, mode: PayloadMode, targets: Arc<[i32]>) -> BatchOut {
        BatchOut {
            transfer: self.transfer,
            fields: BatchFields {
                mode,
                last: self.last,
                component: self.component,
                room: self.room,
                epoch: self.epoch,
                seq,
                window_start: self.start,
                window_len: u32::try_from(self.part.len())
                    .expect("invariant: windows are cut at WINDOW_ITEMS_MAX"),
                offset: self.offset,
                len: self.end - self.offset,
                place: 0,
            },
            pairing: Arc::clone(&self.pairing),
            items: Arc::clone(&self.items),
            part: self.part.clone(),
            targets,
        }
    }

    /// A window of nothing, to be filled in by [`Peer::enqueue_chunk`].
    pub(super) fn new(
        transfer: TransferId,
        (room, epoch): (u64, Epoch),
        pairing: Arc<Pairing>,
        queued_at: Time,
    ) -> Self {
        Self {
            transfer,
            room,
            epoch,
            pairing,
            component: 0,
            start: 0,
            items: Arc::from([]),
            part: 0..0,
            offset: 0,
            end: 0,
            last: false,
            resend: None,
            queued_at,
        }
    }
}

/// A batch handed to a lane.
#[derive(Clone, Debug)]
pub struct BatchOut {
    /// The transfer, for its gate.
    pub transfer: TransferId,
    /// Header fields; `place` is the lane's to fill in.
    pub fields: BatchFields,
    /// Which bytes go where.
    pub pairing: Arc<Pairing>,
    /// Local items; the window is `part` of them.
    pub items: Arc<[i32]>,
    /// See `items`.
    pub part: Range<usize>,
    /// Items that the receiver granted for this component; the batch's are `fields.window_start` and the following.
    pub targets: Arc<[i32]>,
}

#[derive(Debug)]
pub(super) struct InFlight {
    pub(super) window: Window,
    pub(super) seq: u32,
    pub(super) sent_at: Time,
}

/// Whether batches may be given to a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LaneState {
    /// Not before so many failures of rooms have been heard of the peer, see
    /// [`QpTerms::failures_told`](crate::wire::rdma::QpTerms::failures_told).
    Waiting(u64),
    /// Yes.
    Up,
    /// Our end of its queue pair is destroyed. Its batches wait for the peer to say the same.
    Fenced,
}

impl InFlight {
    pub(super) fn bytes(&self) -> u64 {
        self.window.end - self.window.offset
    }
}

/// One data connection.
#[derive(Debug)]
pub(super) struct Lane {
    pub(super) setup: LaneSetup,
    pub(super) state: LaneState,
    pub(super) in_flight: VecDeque<InFlight>,
    /// Batches given to it so far.
    pub(super) given: u64,
    /// Of these, how many its card is done with. Counted by paths that do not hold the gate while bytes move.
    reaped: u64,
    pub(super) in_flight_bytes: u64,
    pub(super) bytes_total: u64,
    pub(super) batches_total: u64,
    pub(super) rate: RateEstimator,
    pub(super) latency: LatencyWindow,
}

impl Lane {
    pub(super) fn is_one_sided(&self) -> bool {
        self.setup.mode == PayloadMode::Write
    }

    /// Transfers of the batches that were given to the lane and that its card may still read.
    fn unreaped(&self) -> impl Iterator<Item = TransferId> {
        let oldest = self.given - self.in_flight.len() as u64;
        let done = usize::try_from(self.reaped.saturating_sub(oldest)).unwrap_or(usize::MAX);
        let rest = self.in_flight.iter().skip(done);
        rest.map(|batch| batch.window.transfer)
    }
}

#[cfg(feature = "testing")]
impl Lane {
    pub(super) fn in_flight_count(&self) -> usize {
        self.in_flight.len()
    }
}

/// What an acknowledgement settled.
pub(super) struct Settled {
    pub(super) transfer: TransferId,
    pub(super) epoch: Epoch,
    pub(super) bytes: u64,
    pub(super) last: bool,
}

impl Peer {
    /// Our end of a lane's queue pair is there, and the peer is being told how to reach it.
    pub(super) fn lane_offered(&mut self, id: LaneId) {
        self.is_one_sided = true;
        if usize::from(id.0) < self.lanes.len() {
            self.offered.insert(id);
        }
    }

    /// Our end of a lane is gone: nothing is given to it any more, and its batches wait until the peer's end is gone too.
    pub(super) fn lane_fenced(&mut self, id: LaneId) {
        self.offered.remove(id);
        if let Some(Some(lane)) = self.lanes.get_mut(usize::from(id.0)) {
            lane.state = LaneState::Fenced;
        }
    }

    /// Opens the lanes that waited for a failure which has been heard now. Whether there were any.
    pub(super) fn open_waiting_lanes(&mut self) -> bool {
        let heard = self.failures_heard;
        let lanes = self.lanes.iter_mut().flatten();
        let waiting = lanes.filter(|lane| match lane.state {
            LaneState::Waiting(wanted) => wanted <= heard,
            LaneState::Up | LaneState::Fenced => false,
        });
        let opened = waiting.map(|lane| lane.state = LaneState::Up).count();
        if opened > 0 {
            self.trouble = None;
        }
        opened > 0
    }

    /// A lane's card is done with so many of the batches that it was given.
    pub(super) fn reaped(&mut self, id: LaneId, count: u64) {
        if let Some(Some(lane)) = self.lanes.get_mut(usize::from(id.0)) {
            lane.reaped = lane.reaped.max(count.min(lane.given));
        }
    }

    /// Whether network cards write this peer's pages, and it ours.
    pub(super) fn is_one_sided(&self) -> bool {
        self.is_one_sided
    }

    /// Whether batches can go to the peer now.
    pub(super) fn has_lane_up(&self) -> bool {
        let mut lanes = self.lanes.iter().flatten();
        lanes.any(|lane| lane.state == LaneState::Up)
    }

    /// Lanes through which the peer's card may write to our pages.
    pub(super) fn lanes_writing(&self) -> LaneSet {
        let up = self.lanes_where(|lane| lane.is_one_sided() && lane.state != LaneState::Fenced);
        up.union(self.offered)
    }

    /// Lanes through which our card may still read pages of a transfer.
    pub(super) fn lanes_reading(&self, transfer: TransferId) -> LaneSet {
        self.lanes_where(|lane| {
            let is_alive = lane.is_one_sided() && lane.state != LaneState::Fenced;
            is_alive && lane.unreaped().any(|id| id == transfer)
        })
    }

    fn lanes_where(&self, holds: impl Fn(&Lane) -> bool) -> LaneSet {
        let mut set = LaneSet::default();
        for (number, lane) in (0..LANES_MAX).zip(&self.lanes) {
            if lane.as_ref().is_some_and(&holds) {
                set.insert(LaneId(number));
            }
        }
        set
    }

    /// Transfers with batches on a lane that its card may still read.
    pub(super) fn busy_on(&self, id: LaneId) -> Vec<TransferId> {
        let lane = self.lanes.get(usize::from(id.0)).and_then(Option::as_ref);
        lane.map_or_else(Vec::new, |lane| lane.unreaped().collect())
    }

    /// `failures_wanted`: how many failures must have been heard of the peer before batches may be given to the lane.
    pub(super) fn lane_up(&mut self, id: LaneId, setup: LaneSetup, failures_wanted: u64) {
        let Some(slot) = self.lanes.get_mut(usize::from(id.0)) else {
            return;
        };
        self.is_one_sided |= setup.mode == PayloadMode::Write;
        self.offered.remove(id);
        *slot = Some(Lane {
            setup,
            state: LaneState::Waiting(failures_wanted),
            given: 0,
            reaped: 0,
            in_flight: VecDeque::new(),
            in_flight_bytes: 0,
            bytes_total: 0,
            batches_total: 0,
            rate: RateEstimator::new(HALF_LIFE_DEFAULT),
            latency: LatencyWindow::new(WINDOW_DEFAULT),
        });
    }
}
