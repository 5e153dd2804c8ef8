//! One peer: its lanes, the queue of windows to send to it, and the batches it has not acknowledged.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

use super::{
    ebb::LaneSet,
    lane::{BatchOut, InFlight, Lane, LaneState, Settled, Window},
};
use crate::{
    error::SubmitError,
    ids::{Epoch, InstanceId, LaneId, PeerId, TransferId},
    plan::pairing::{ComponentPairing, Pairing},
    time::Time,
    transfer::{Chunk, NodeConfig, node::PeerSetup, send::SendRoom, timers::TimerKey},
    wire::{hello::LANES_MAX, lane::WINDOW_ITEMS_MAX},
};

/// How many windows from the head of the queue a lane looks at for one that may go now. Only a window that waits for
/// acknowledgements on another lane is passed over, and each room has at most one such window at a time.
const LOOKAHEAD: usize = 64;

/// The sending rooms of an engine.
pub(super) type Sends = HashMap<TransferId, SendRoom>;

pub(super) struct Peer {
    pub(super) id: PeerId,
    pub(super) instance: InstanceId,
    pub(super) address: String,
    /// Us → them, or why nothing can be sent to them.
    pub(super) outgoing: Result<Arc<Pairing>, String>,
    /// Them → us, or why nothing can be received from them.
    pub(super) incoming: Result<Arc<Pairing>, String>,
    pub(super) lanes: [Option<Lane>; LANES_MAX as usize],
    /// Lanes whose queue pair has an end here, though it is not up yet: the peer may be the first to learn that it is.
    pub(super) offered: LaneSet,
    /// Network cards write its pages, or it ours, even if all its queue pairs are lost just now.
    pub(super) is_one_sided: bool,
    pub(super) queue: VecDeque<Window>,
    pub(super) queued_bytes: u64,
    /// `RoomFailed` messages queued for it, and received from it.
    pub(super) failures_told: u64,
    pub(super) failures_heard: u64,
    /// Why its last lane went down, until one is up again.
    pub(super) trouble: Option<String>,
    pub(super) last_heard: Time,
    pub(super) heartbeat: TimerKey,
    pub(super) failures: BTreeMap<&'static str, u64>,
}

impl Peer {
    pub(super) fn new(now: Time, id: PeerId, setup: PeerSetup, heartbeat: TimerKey) -> Self {
        Self {
            id,
            instance: setup.instance,
            address: setup.address,
            outgoing: setup.outgoing,
            incoming: setup.incoming,
            lanes: [const { None }; LANES_MAX as usize],
            offered: LaneSet::default(),
            is_one_sided: false,
            queue: VecDeque::new(),
            queued_bytes: 0,
            failures_told: 0,
            failures_heard: 0,
            trouble: None,
            last_heard: now,
            heartbeat,
            failures: BTreeMap::new(),
        }
    }

    /// Queues a chunk: each component's list cut into windows; `starts` says how many items were queued before.
    ///
    /// The last chunk of a room always ends in a window marked last, an empty one if need be.
    pub(super) fn enqueue_chunk(&mut self, proto: &Window, chunk: &Chunk, starts: &[usize]) {
        let first = self.queue.len();
        for (component, items) in chunk.items.iter().enumerate() {
            for (index, part) in items.chunks(WINDOW_ITEMS_MAX as usize).enumerate() {
                let from = index * WINDOW_ITEMS_MAX as usize;
                let bytes = bytes_of(&proto.pairing, component, part.len());
                if bytes == 0 {
                    continue;
                }
                self.queued_bytes += bytes;
                self.queue.push_back(Window {
                    component: bounded(component),
                    start: bounded(starts[component] + from),
                    items: Arc::clone(items),
                    part: from..from + part.len(),
                    end: bytes,
                    ..proto.clone()
                });
            }
        }
        if chunk.last {
            match self.queue.len() - first {
                0 => self.queue.push_back(Window {
                    last: true,
                    ..proto.clone()
                }),
                _ => self
                    .queue
                    .iter_mut()
                    .next_back()
                    .into_iter()
                    .for_each(|w| w.last = true),
            }
        }
    }

    /// Checks that the queue takes so much more.
    ///
    /// # Errors
    /// Back-pressure, or more lists than components.
    pub(super) fn check_room(
        &self,
        config: &NodeConfig,
        pairing: &Pairing,
        windows: usize,
        counts: &[usize],
    ) -> Result<(), SubmitError> {
        if counts.len() > pairing.components.len() {
            let (got, known) = (counts.len(), pairing.components.len());
            return Err(SubmitError::Items(format!(
                "{got} item lists for {known} components"
            )));
        }
        let bytes: u64 = counts
            .iter()
            .enumerate()
            .map(|(c, n)| bytes_of(pairing, c, *n))
            .sum();
        let bounds = [
            (
                "the queue of windows to the peer",
                self.queue.len() as u64,
                windows as u64,
                config.queue_windows_max as u64,
                "queue_windows_max",
            ),
            (
                "the queue of bytes to the peer",
                self.queued_bytes,
                bytes,
                config.queue_bytes_max,
                "queue_bytes_max",
            ),
        ];
        for (what, used, asked, limit, setting) in bounds {
            if used.saturating_add(asked) > limit {
                return Err(SubmitError::Full {
                    what,
                    used,
                    asked,
                    limit,
                    setting,
                });
            }
        }
        Ok(())
    }

    /// At most how many batches a chunk makes.
    pub(super) fn batches_of(&self, pairing: &Pairing, counts: &[usize]) -> u64 {
        let smallest = self
            .lanes
            .iter()
            .flatten()
            .map(|lane| lane.setup.batch_bytes)
            .min();
        // Cutting at item boundaries makes batches of at least half the size.
        let smallest = smallest.unwrap_or(1 << 20).max(2) / 2;
        let each = counts.iter().enumerate();
        each.map(|(c, n)| bytes_of(pairing, c, *n) / smallest + Self::windows_of(*n) as u64)
            .sum()
    }

    /// Windows that `items` items make.
    pub(super) fn windows_of(items: usize) -> usize {
        items.div_ceil(WINDOW_ITEMS_MAX as usize).max(1)
    }

    /// The next batch for a lane, if its window is open and there is work that may go now.
    pub(super) fn next_batch(
        &mut self,
        now: Time,
        lane_id: LaneId,
        sends: &mut Sends,
    ) -> Option<BatchOut> {
        let at = usize::from(lane_id.0);
        let lane = self.lanes.get_mut(at)?.as_mut()?;
        if lane.state != LaneState::Up || lane.in_flight.len() >= lane.setup.window {
            return None;
        }
        let found = self.queue.iter().take(LOOKAHEAD).position(|window| {
            // States and aux come after everything before them has arrived (promise P6): on one lane the order of the
            // stream sees to that, across lanes only the acknowledgements do.
            let is_whole =
                window.resend.is_some() || window.end - window.offset <= lane.setup.batch_bytes;
            let is_final = window.last && is_whole;
            let ordered = window.component > 0 || is_final;
            let room = sends.get(&window.transfer);
            let leg = room.and_then(|room| room.legs.iter().find(|leg| leg.peer == self.id));
            !ordered || leg.is_none_or(|leg| leg.is_only_on(lane_id))
        })?;
        let window = &mut self.queue[found];
        let whole = window.end - window.offset;
        let len = if window.resend.is_some() {
            whole
        } else {
            let component = &window.pairing.components[usize::from(window.component)];
            batch_len(component, window.offset, whole, lane.setup.batch_bytes)
        };
        let mut sent = window.clone();
        sent.end = window.offset + len;
        window.offset = sent.end;
        let finished = window.offset == window.end;
        sent.last = window.last && finished;
        if finished {
            self.queue.remove(found);
        }
        self.queued_bytes = self.queued_bytes.saturating_sub(len);
        let room = sends.get_mut(&sent.transfer)?;
        room.first_byte.get_or_insert(now);
        let leg = room.leg_mut(self.id)?;
        let seq = sent.resend.unwrap_or_else(|| leg.take_seq());
        leg.sent_on(lane_id);
        lane.in_flight_bytes += len;
        lane.given += 1;
        let targets = leg.granted.get(usize::from(sent.component)).cloned();
        let targets = targets.unwrap_or_else(|| Arc::from([]));
        let batch = sent.to_batch(seq, lane.setup.mode, targets);
        lane.in_flight.push_back(InFlight {
            window: sent,
            seq,
            sent_at: now,
        });
        Some(batch)
    }

    /// Settles the oldest batch of a lane.
    ///
    /// # Errors
    /// The acknowledgement is for another batch: the peer broke the protocol.
    pub(super) fn acknowledge(
        &mut self,
        now: Time,
        lane: LaneId,
        room: u64,
        epoch: Epoch,
        seq: u32,
    ) -> Result<Settled, String> {
        let lane = self
            .lanes
            .get_mut(usize::from(lane.0))
            .and_then(Option::as_mut);
        let lane = lane.ok_or("an acknowledgement on a lane that is down")?;
        let expected = lane
            .in_flight
            .front()
            .map(|f| (f.window.room, f.window.epoch, f.seq));
        if expected != Some((room, epoch, seq)) {
            return Err(format!(
                "acknowledged batch {seq} of room {room}, expected {expected:?}"
            ));
        }
        let done = lane
            .in_flight
            .pop_front()
            .expect("invariant: the front was just compared");
        let bytes = done.bytes();
        lane.in_flight_bytes -= bytes;
        lane.bytes_total = lane.bytes_total.wrapping_add(bytes);
        lane.batches_total = lane.batches_total.wrapping_add(1);
        lane.latency.record(now.since(done.sent_at), now.nanos());
        lane.rate.complete(bytes, done.sent_at.nanos(), now.nanos());
        let Window {
            transfer,
            epoch,
            last,
            ..
        } = done.window;
        Ok(Settled {
            transfer,
            epoch,
            bytes,
            last,
        })
    }

    /// Takes a lane away and queues its unacknowledged batches again, first ones first. Returns whether the peer can still
    /// be sent to, or will be: lanes are left, or a lost queue pair is made anew.
    pub(super) fn lane_down(&mut self, id: LaneId, sends: &mut Sends) -> bool {
        self.offered.remove(id);
        let taken = self.lanes.get_mut(usize::from(id.0)).and_then(Option::take);
        for lost in taken.into_iter().flat_map(|lane| lane.in_flight).rev() {
            let room = sends.get_mut(&lost.window.transfer);
            if let Some(leg) = room.and_then(|room| room.leg_mut(self.id)) {
                leg.lost_on(id);
                self.queued_bytes += lost.bytes();
                self.queue.push_front(Window {
                    resend: Some(lost.seq),
                    ..lost.window
                });
            }
        }
        self.is_one_sided || self.lanes.iter().any(Option::is_some)
    }

    /// Forgets the queued work of a transfer that is over.
    pub(super) fn purge(&mut self, transfer: TransferId) {
        let mut dropped = 0;
        self.queue.retain(|window| {
            let keep = window.transfer != transfer;
            if !keep {
                dropped += window.end - window.offset;
            }
            keep
        });
        self.queued_bytes = self.queued_bytes.saturating_sub(dropped);
    }
}

/// Stream bytes of `items` items of a component; zero where nothing of it goes there.
fn bytes_of(pairing: &Pairing, component: usize, items: usize) -> u64 {
    let paired = pairing.components.get(component);
    paired.map_or(0, |paired| paired.item_bytes() * items as u64)
}

/// Bytes of the next batch: at most `most`, ending between items where an item is not larger than a batch, so that both
/// sides place whole pages.
fn batch_len(component: &ComponentPairing, offset: u64, whole: u64, most: u64) -> u64 {
    if whole <= most {
        return whole;
    }
    let piece = component
        .pieces()
        .first()
        .map_or(1, |piece| piece.item_bytes().max(1));
    let end = offset + most;
    let cut = end - end % piece;
    if cut > offset { cut - offset } else { most }
}

/// A number that the bounds on grants and components keep small.
fn bounded<T: TryFrom<usize>>(number: usize) -> T {
    T::try_from(number)
        .ok()
        .expect("invariant: components and granted items are bounded")
}
