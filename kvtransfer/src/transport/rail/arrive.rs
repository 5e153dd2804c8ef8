//! The receiving half of a queue pair: completions, the frames they bring, and what the connection beside it says.

use std::sync::Arc;

use super::lane::{LaneIo, Phase, Watch};
use crate::{
    engine::lanes::Stage,
    error::TransferError,
    time::Time,
    transfer::Placement,
    transport::verbs::cq::{Completion, Completions, POLL_MAX},
    wire::{
        control::Control,
        lane::{Ack, AckStatus, BatchHeader, PayloadMode, VOID_PLACE},
        rdma::{ANSWERS_MAX, Frame, Immediate},
    },
};

/// Marks the id of a receive: ids of sends have a place in the send queue there, far below it.
const RECEIVE: u64 = 1 << 31;

/// Acknowledgements that wait for credits, at most: the peer may have so many batches unanswered before it broke the
/// protocol, whatever its window is.
const ACKS_MAX: usize = 1024;

/// The id of the receive in buffer `index` of a queue pair.
pub(super) fn receive_id(life: u32, index: u16) -> u64 {
    u64::from(life) << 32 | RECEIVE | u64::from(index)
}

impl LaneIo {
    /// Takes what has completed. Returns whether anything had.
    ///
    /// # Errors
    /// Why the queue pair cannot be used any more, in words.
    pub(super) fn poll(&mut self, now: Time) -> Result<bool, String> {
        let mut completions = Completions::new();
        let mut has_any = false;
        while let Some(wires) = &self.wires {
            let taken = wires.cq.take(&mut completions);
            taken.map_err(|error| format!("{}: {error}", self.handle.rail.name))?;
            let found = completions.len();
            if found == 0 {
                break;
            }
            has_any = true;
            let is_receive = |completion: &Completion| completion.wr_id & RECEIVE != 0;
            let received = completions.iter().filter(is_receive).count();
            let counters = &self.handle.rail.counters;
            counters.polled((found - received) as u64, received as u64);
            let mut fault = None;
            for completion in completions.iter() {
                // The rest is looked at even so: batches that arrived before the fault have arrived.
                if let Err(reason) = self.complete(&completion, now) {
                    fault.get_or_insert(reason);
                }
            }
            if let Some(reason) = fault {
                return Err(reason);
            }
            if found < POLL_MAX {
                break;
            }
        }
        if has_any {
            self.is_stirred = true;
            if self.watch == Watch::All {
                // It has made its event.
                self.watch = Watch::Nothing;
            }
        }
        Ok(has_any)
    }

    fn complete(&mut self, completion: &Completion, now: Time) -> Result<(), String> {
        let is_receive = completion.wr_id & RECEIVE != 0;
        if !completion.status().is_success() {
            self.watch = Watch::Nothing;
            if !is_receive {
                let _ = self.sends.complete(completion.wr_id);
            }
            // Flushes only say that the queue pair failed before.
            let (status, vendor) = (completion.status(), completion.vendor_err);
            return match &self.phase {
                Phase::Draining { .. } | Phase::Fenced { .. } => Ok(()),
                Phase::Greeting { .. } | Phase::Up => Err(format!(
                    "{}: {status} (vendor code {vendor:#x})",
                    self.handle.rail.name
                )),
            };
        }
        if is_receive {
            return self.receive(completion, now);
        }
        match self.sends.complete(completion.wr_id) {
            Ok(done) => {
                self.reaped = self.reaped.max(done);
                Ok(())
            }
            Err(error) => Err(format!("{}: {error}", self.handle.rail.name)),
        }
    }

    fn receive(&mut self, completion: &Completion, now: Time) -> Result<(), String> {
        let low = completion.wr_id & (RECEIVE - 1);
        let index = u16::try_from(low).map_err(|_| "a receive that was never posted")?;
        let Some(wires) = &mut self.wires else {
            return Ok(());
        };
        let (frame, credits) = match completion.imm {
            Some(bits) => {
                let immediate = Immediate::from_bits(bits);
                let mut bytes = [0; BatchHeader::LEN];
                if !wires.buffers.header(immediate.slot, &mut bytes) {
                    return Err(format!("a notice in slot {}", immediate.slot));
                }
                let header = BatchHeader::parse(&bytes).map_err(|e| e.to_string())?;
                (Frame::Batch(header), immediate.credits)
            }
            None => {
                let mut bytes = [0; Frame::LEN_MAX];
                let len = wires.buffers.take(index, completion.byte_len, &mut bytes);
                Frame::parse(&bytes[..len]).map_err(|e| e.to_string())?
            }
        };
        let (address, bytes, lkey) = wires.buffers.receive(index);
        let is_alive = !matches!(self.phase, Phase::Draining { .. });
        if is_alive {
            let posted = wires.qp.post_recv(completion.wr_id, address, bytes, lkey);
            posted.map_err(|error| error.to_string())?;
        }
        self.credits.received(credits).map_err(|e| e.to_string())?;
        self.last_heard = now;
        self.last_active = now;
        if frame.is_marked() {
            self.watch = Watch::Nothing;
        }
        self.hear(frame, now)
    }

    fn hear(&mut self, frame: Frame, now: Time) -> Result<(), String> {
        if matches!(self.phase, Phase::Greeting { .. }) {
            return self.greet(frame, now);
        }
        match frame {
            Frame::Hello { .. } => Err("it said hello twice".into()),
            Frame::Credit | Frame::Heartbeat => Ok(()),
            Frame::Ack(ack) => {
                // One that does not fit, because one before it was lost, leaves both to the peer's last word.
                self.is_hungry |= self.hub.on_ack(now, self.peer, self.handle.id, &ack)?;
                self.acked += 1;
                self.packing.answered(self.acked);
                Ok(())
            }
            Frame::Batch(header) => self.batch(&header, now),
        }
    }

    /// The first frame: the path works. The passive side answers now, and not before (iWARP).
    fn greet(&mut self, frame: Frame, now: Time) -> Result<(), String> {
        let Frame::Hello { failures_told } = frame else {
            return Err(format!("it began with {frame:?}"));
        };
        self.phase = Phase::Up;
        if !self.terms.is_active {
            self.answer_hello = Some(self.hub.lane_offered(self.peer, self.handle.id));
        }
        self.last_sent = now;
        let setup = self.terms.setup.clone();
        if let Some(link) = self.link.upgrade() {
            link.note_path(&setup);
            link.lanes.advance(self.handle.id, Stage::Up);
        }
        let (peer, lane) = (self.peer, self.handle.id);
        self.hub.lane_up(peer, lane, setup, failures_told);
        if let Some(opened) = self.opened.take() {
            // Whoever opened it may have given up waiting.
            let _ = opened.try_send(Ok(()));
        }
        Ok(())
    }

    /// A batch lies in our pages, or is moved there now: count it and answer.
    fn batch(&mut self, header: &BatchHeader, now: Time) -> Result<(), String> {
        if self.acks.len() >= ACKS_MAX {
            return Err("more unanswered batches than any window has".into());
        }
        let status = match header.mode() {
            PayloadMode::Write => {
                let placement = if header.place == VOID_PLACE {
                    Placement::Void
                } else if header.is_last() {
                    self.made_visible()
                } else {
                    Placement::Placed
                };
                self.hub.arrived(now, self.peer, header, placement)
            }
            PayloadMode::Packed => self.unpack(header)?,
            _ => return Err("a batch that was not written by RDMA".into()),
        };
        // A receiver that has failed the room says so even if the pages came: they are no longer the room's.
        debug_assert!(status == AckStatus::Placed || status == AckStatus::Discarded);
        let ack = Ack::new(header, status);
        self.acks.push_back(ack);
        self.answered += 1;
        if self.answers.len() == ANSWERS_MAX {
            self.answers.pop_front();
        }
        self.answers.push_back(ack);
        Ok(())
    }

    /// The last batch of a room from this sender has come, and so have all before it: what cards wrote to a GPU becomes visible
    /// to its kernels, if it is not.
    pub(super) fn made_visible(&self) -> Placement {
        let flushed = self.handle.rail.flushed.get();
        match flushed.map_or(Ok(()), |device| device.flush_writes()) {
            Ok(()) => Placement::Placed,
            Err(error) => {
                let reason = error.to_string();
                Placement::Failed(TransferError::Device { reason })
            }
        }
    }

    /// Tells the node how far the card has come, if a failed room may wait for it.
    pub(super) fn report(&mut self, is_asked: bool) {
        if self.reaped > self.reported && (is_asked || self.hub.is_ebbing()) {
            self.reported = self.reaped;
            let hub = Arc::clone(&self.hub);
            hub.reaped(self.peer, self.handle.id, self.reaped);
        }
    }

    /// Reads the connection beside the queue pair.
    ///
    /// # Errors
    /// It ended or carries something that does not belong there: the peer's process is gone or broken.
    pub(super) fn listen(&mut self) -> Result<(), String> {
        let mut bytes = [0; 1024];
        loop {
            let flags = rustix::net::RecvFlags::DONTWAIT;
            match rustix::net::recv(&self.side.socket, &mut bytes[..], flags) {
                Ok((0, _)) if self.side.peer_is_down => return Ok(()),
                Ok((0, _)) => return Err("it closed the connection beside a queue pair".into()),
                Ok((got, _)) => {
                    self.side.decoder.push(&bytes[..got]);
                    while let Some(message) = self.side.decoder.next().map_err(|e| e.to_string())? {
                        match message {
                            Control::QpDown {
                                reason,
                                answered,
                                answers,
                            } => {
                                tracing::info!(peer = %self.peer, lane = self.handle.id.0, reason, "the peer destroyed a queue pair");
                                self.side.peer_is_down = true;
                                self.side.peer_reason = reason;
                                self.peer_answers = Some((answered, answers));
                            }
                            other => return Err(format!("it said {other:?} beside a queue pair")),
                        }
                    }
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return Ok(()),
                Err(error) => return Err(format!("the connection beside a queue pair: {error}")),
            }
        }
    }

    /// What rdma_cm says of the connection.
    pub(super) fn on_connection(&mut self, now: Time, drain: std::time::Duration) {
        let mut ended = None;
        while let Some(connection) = self.wires.as_ref().and_then(|w| w.connection.as_ref()) {
            match connection.channel.next_event() {
                Ok(Some(event)) if event.id == connection.id.key() => {
                    ended = Some(format!("rdma_cm: {}", event.words()));
                }
                Ok(Some(_)) => {}
                Ok(None) => break,
                Err(error) => {
                    ended = Some(error.to_string());
                    break;
                }
            }
        }
        if let Some(reason) = ended {
            let name = self.handle.rail.name.clone();
            self.drain(now, drain, format!("{name}: {reason}"));
        }
    }
}
