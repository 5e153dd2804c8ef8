//! Threads of the application in the place of a rail's own, for the microseconds of a small transfer: one posts its pages
//! itself, then looks for the answer itself, which saves two thread switches.

use std::{
    cell::Cell,
    sync::{TryLockError, atomic::Ordering},
};

use super::{
    lane::{Phase, QueuePairLane, Watch},
    requests::Request,
    thread::Core,
};
use crate::{clock, time::Time};

/// How often queues are looked at again while they are armed, before the rail's thread is asked to go on: what is found is
/// the end of our own work requests.
const ARM_ATTEMPTS: usize = 4;

/// A driver looks for so many times the rail's own span: the way to the peer and back, with its work.
const DRIVE_SPANS: u32 = 4;

thread_local! {
    /// Whether this thread waited for the last small transfer that it pushed: then it will for the next.
    static WAITS: Cell<bool> = const { Cell::new(false) };
}

impl QueuePairLane {
    /// Posts in the calling thread if nobody else has the rail. Returns whether it did.
    pub(crate) fn try_pump(&self) -> bool {
        let is_awaited = WAITS.replace(false);
        let mut core = match self.rail.core.try_lock() {
            Ok(core) => core,
            Err(TryLockError::Poisoned(core)) => core.into_inner(),
            Err(TryLockError::WouldBlock) => return false,
        };
        let (now, drain) = (clock::now(), self.rail.settings.drain);
        let Some(lane) = core.find(self.key) else {
            return false;
        };
        lane.is_awaited = is_awaited && (lane.is_awaited || !lane.is_awaiting());
        lane.is_hungry = true;
        let posted = lane.pump(&self.rail, now).and_then(|posted| {
            if posted && !is_awaited && lane.watch == Watch::Marked {
                // Nobody looks for the answer, so it must make an event.
                lane.arm(now, false)?;
            }
            Ok(posted)
        });
        let is_up = matches!(lane.phase, Phase::Up);
        match posted {
            // Where nothing was posted the lane is full: another may have place.
            Ok(posted) => {
                // A rail's thread that our own work request wakes must not take the answer from who comes for it.
                core.drives += u64::from(posted && is_awaited);
                posted && is_up
            }
            Err(reason) => {
                lane.drain(now, drain, reason);
                false
            }
        }
    }

    /// Takes the place of the rail's thread while the lane's batches are unanswered, for some microseconds. Returns false if
    /// no answer came: then the rail's thread goes on and wakes the caller.
    pub(crate) fn drive(&self) -> bool {
        let rail = &self.rail;
        if rail.settings.spin.is_zero() {
            return false;
        }
        WAITS.set(true);
        let (before, after) = (Ordering::SeqCst, Ordering::Relaxed);
        let place = self.key.place.saturating_add(1);
        if rail
            .driver
            .compare_exchange(0, place, before, after)
            .is_err()
        {
            return false;
        }
        let mut now = clock::now();
        let until = now + rail.settings.spin * DRIVE_SPANS;
        let mut has_looked = false;
        // Whether an answer came, and whether the rail's thread must look because nothing else would wake it.
        let (has_answer, is_left, mut core) = loop {
            let mut core = rail.lock();
            let counts = core.find(self.key).map(|lane| (lane.acked, lane.given));
            let Some((acked, given)) = counts.filter(|(acked, given)| acked < given) else {
                // Answered meanwhile, not posted yet, or the queue pair is gone. Who had it looks after it, unless it was
                // this thread.
                break (false, has_looked, core);
            };
            core.turn(rail, now, Some(self.key));
            has_looked = true;
            // A queue pair that ended meanwhile counts as answered: its failure has woken the caller.
            let after = core.find(self.key).map_or(given, |lane| lane.acked);
            if after > acked {
                core.drives += 1;
                break (true, self.leave(&mut core, now), core);
            }
            if now >= until {
                if let Some(lane) = core.find(self.key) {
                    lane.is_awaited = false;
                }
                break (false, true, core);
            }
            drop(core);
            std::hint::spin_loop();
            now = clock::now();
        };
        // Under the lock: an event that comes now must find the rail's thread in charge again.
        rail.driver.store(0, Ordering::SeqCst);
        // Who announced work before that relied on this thread.
        let is_kicked = core.lanes().any(|lane| lane.handle.has_kick());
        drop(core);
        if is_left || is_kicked {
            rail.request(Request::Kick(self.key));
        }
        has_answer
    }

    /// Arms what was looked at here, so that the rail's thread may go on sleeping: waking it costs more than the whole
    /// transfer. Returns whether it must be woken even so.
    fn leave(&self, core: &mut Core, now: Time) -> bool {
        // It looks soon by itself: then answers need not wake it.
        let is_near = self.rail.is_near.load(Ordering::SeqCst);
        for _ in 0..ARM_ATTEMPTS {
            if !core.arm(now, self.rail.settings.drain, is_near) {
                break;
            }
        }
        !core.lanes().all(|lane| {
            lane.watch != Watch::Nothing && matches!(lane.phase, Phase::Up) && !lane.has_work()
        })
    }
}
