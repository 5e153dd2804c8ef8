//! The end of a queue pair: stop posting, error state, drain, destroy, tell the peer, and make room for a new one.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use rustix::net::{SendFlags, Shutdown, send, shutdown};

use super::lane::{LaneIo, Phase};
use crate::{time::Time, wire::control::Control};

/// Spans of silence after which a queue pair is dead: its peer says something in each of them.
const SILENT_SPANS: u32 = 3;

impl LaneIo {
    /// Stops posting and moves the queue pair to the error state: the card gives back what it was given.
    pub(super) fn drain(&mut self, now: Time, limit: Duration, reason: String) {
        if matches!(self.phase, Phase::Draining { .. } | Phase::Fenced { .. }) {
            return;
        }
        tracing::info!(peer = %self.peer, lane = self.handle.id.0, rail = self.handle.rail.name, reason, "queue pair ends");
        if let Some(wires) = &mut self.wires {
            // On RoCE the peer's rdma_cm learns of the end only if both sides say so.
            let said = wires
                .connection
                .as_mut()
                .map(|connection| connection.id.disconnect());
            let entered = wires.qp.enter_error();
            if let Err(error) = said.unwrap_or(Ok(())).and(entered) {
                // It is destroyed all the same, which is what counts.
                tracing::debug!(%error, "ending a queue pair");
            }
        }
        let until = now + limit;
        self.phase = Phase::Draining { until, reason };
    }

    /// Destroys a drained queue pair, or one that will not drain. Returns whether it did.
    pub(super) fn destroy_if_drained(&mut self, now: Time) -> bool {
        let Phase::Draining { until, reason } = &mut self.phase else {
            return false;
        };
        if self.sends.outstanding() > 0 && now < *until {
            return false;
        }
        let reason = std::mem::take(reason);
        // What had arrived has arrived: it is counted before the queue goes.
        let _ = self.poll(now);
        // From here on nothing lands through it, and nothing is read (promise P1).
        self.wires = None;
        let mut lost = 0;
        self.sends.fail_all(|_| lost += 1);
        if lost > 0 {
            tracing::debug!(lost, "work requests without a completion");
        }
        self.writing = None;
        self.acks.clear();
        self.hub.lane_fenced(self.peer, self.handle.id, &reason);
        if let Some(opened) = self.opened.take() {
            let _ = opened.try_send(Err(reason.clone()));
        }
        self.say_down(&reason);
        self.phase = Phase::Fenced { reason };
        true
    }

    fn say_down(&mut self, reason: &str) {
        let mut bytes = Vec::new();
        let message = Control::QpDown {
            reason: reason.to_owned(),
            answered: self.answered,
            answers: self.answers.drain(..).collect(),
        };
        message.encode(&mut bytes);
        // The connection has carried a few hundred bytes in all, so its buffer takes these 8 KiB at most; if it is broken,
        // the peer sees that.
        let _ = send(
            &self.side.socket,
            &bytes,
            SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
        );
        if self.is_closing {
            let _ = shutdown(&self.side.socket, Shutdown::Write);
        }
    }

    /// Whether both ends are destroyed, or this one was the last that mattered.
    pub(super) fn is_settled(&self) -> bool {
        matches!(self.phase, Phase::Fenced { .. }) && (self.side.peer_is_down || self.is_closing)
    }

    /// Hands back what the queue pair had. Its batches may travel again: no copy of them is on the way any more.
    pub(super) fn settle(self: Box<Self>, now: Time) {
        let Phase::Fenced { reason } = &self.phase else {
            return;
        };
        let (peer, lane) = (self.peer, self.handle.id);
        self.handle.over.store(true, Ordering::SeqCst);
        if let Some(broken) = self.hear_last_answers(now) {
            self.hub.drop_peer(peer, &broken);
        }
        self.hub.lane_down(peer, lane, reason);
        if let Some(link) = self.link.upgrade().filter(|_| !self.is_closing) {
            crate::engine::redial::lane_lost(&self.hub, &link, lane);
        }
    }

    /// Settles what the peer had counted when its end went: an answer that was lost with the queue pair must not make us
    /// write a batch again whose room may have succeeded. Returns what the peer did wrong, if so.
    fn hear_last_answers(&self, now: Time) -> Option<String> {
        let (answered, answers) = self.peer_answers.as_ref()?;
        let Some(lost) = answered.checked_sub(self.acked) else {
            return Some("it took answers back".into());
        };
        let lost = usize::try_from(lost).unwrap_or(usize::MAX);
        let Some(known) = answers.len().checked_sub(lost) else {
            return Some("it lost answers".into());
        };
        for answer in &answers[known..] {
            if let Err(broken) = self.hub.on_ack(now, self.peer, self.handle.id, answer) {
                // Of a peer that is gone nothing is waited for.
                return self
                    .link
                    .upgrade()
                    .filter(|link| !link.is_closed())
                    .map(|_| broken);
            }
        }
        None
    }

    /// Looks at the clock.
    pub(super) fn on_time(&mut self, now: Time, heartbeat: Duration, drain: Duration) {
        self.last_timed = now;
        match &self.phase {
            Phase::Greeting { until, .. } if now >= *until => {
                let name = &self.handle.rail.name;
                let reason = format!("{name}: no hello came through the queue pair");
                self.drain(now, drain, reason);
            }
            Phase::Up => {
                let silence = now.since(self.last_heard);
                if silence > heartbeat * SILENT_SPANS {
                    let name = &self.handle.rail.name;
                    let reason = format!("{name}: the queue pair has been silent for {silence:?}");
                    self.drain(now, drain, reason);
                }
            }
            Phase::Greeting { .. } | Phase::Draining { .. } | Phase::Fenced { .. } => {}
        }
    }

    /// The connection beside the queue pair has something, or has ended.
    pub(super) fn on_side(&mut self, now: Time, drain: Duration) {
        let was_down = self.side.peer_is_down;
        match self.listen() {
            Ok(()) if self.side.peer_is_down && !was_down => {
                let theirs = &self.side.peer_reason;
                let reason = format!("the peer destroyed its end of the queue pair: {theirs}");
                self.drain(now, drain, reason);
            }
            Ok(()) => {}
            Err(reason) => {
                // The peer's process ended, or does not keep to the protocol: its rooms cannot be saved.
                self.is_closing = true;
                self.drain(now, drain, reason.clone());
                let hub = Arc::clone(&self.hub);
                hub.drop_peer(self.peer, &reason);
            }
        }
    }
}
