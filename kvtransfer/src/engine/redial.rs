//! New queue pairs in place of lost ones. The side that dialled the peer makes them, with growing pauses: a rail that
//! failed is rested, and tried again until it works or the peer is gone.

use std::{
    sync::{Arc, PoisonError},
    time::Duration,
};

use super::{hub::Hub, lanes::Stage, link::Link, queue_pairs};
use crate::{clock, ids::LaneId, time::Time};

/// First pause; it doubles up to [`PAUSE_MAX`]. The peer has just destroyed its end, so there is little to wait for.
const PAUSE_FIRST: Duration = Duration::from_millis(5);

/// Longest pause of a rail that does not come back.
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// How long one attempt may take.
const ATTEMPT_MAX: Duration = Duration::from_secs(2);

/// A lane that is to be made anew.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lost {
    lane: LaneId,
    due: Time,
    pause: Duration,
}

/// Lost lanes of one link, and whether a thread is at it.
#[derive(Debug, Default)]
pub(crate) struct Redial {
    lost: Vec<Lost>,
    is_running: bool,
}

impl Redial {
    /// Remembers a lost lane, once. What failed may be told twice, by whoever opened it and by its end, and a lane that is
    /// opened twice is refused by the peer, again and again.
    fn note(&mut self, now: Time, lane: LaneId, pause: Duration) {
        let due = now + pause;
        let known = self.lost.iter_mut().find(|lost| lost.lane == lane);
        match known {
            Some(lost) if lost.pause >= pause => {}
            Some(lost) => (lost.due, lost.pause) = (due, pause),
            None => self.lost.push(Lost { lane, due, pause }),
        }
    }
}

/// Both ends of a queue pair are gone.
pub(crate) fn lane_lost(hub: &Arc<Hub>, link: &Arc<Link>, lane: LaneId) {
    if link.dialled.is_none() || link.is_closed() || hub.is_stopped() {
        return;
    }
    let mut redial = link.redial.lock().unwrap_or_else(PoisonError::into_inner);
    redial.note(clock::now(), lane, PAUSE_FIRST);
    if redial.is_running {
        return;
    }
    redial.is_running = true;
    drop(redial);
    let (hub, link) = (Arc::clone(hub), Arc::clone(link));
    let name = format!("kvt-redial-{}", link.peer.0);
    let spawned = std::thread::Builder::new()
        .name(name)
        .spawn(move || run(&hub, &link));
    if let Err(error) = spawned {
        tracing::warn!(%error, "no thread to make a queue pair anew");
    }
}

fn run(hub: &Arc<Hub>, link: &Arc<Link>) {
    let _alive = hub.lane_alive();
    while let Some(lost) = next(link, clock::now()) {
        if link.is_closed() || hub.is_stopped() {
            return;
        }
        let Some(lost) = lost else {
            // Short, so that an engine that shuts down is not waited for, and a lane that is lost meanwhile does not wait for
            // one that is rested.
            std::thread::sleep(PAUSE_FIRST);
            continue;
        };
        if let Err(reason) = again(hub, link, lost.lane) {
            tracing::info!(peer = %link.peer, lane = lost.lane.0, reason, "a queue pair cannot be made yet");
            let pause = (lost.pause * 2).min(PAUSE_MAX);
            let mut redial = link.redial.lock().unwrap_or_else(PoisonError::into_inner);
            redial.note(clock::now(), lost.lane, pause);
        }
    }
}

/// The next one, if it is due: of those that have failed least, so that a rail which is down does not hold up one that
/// works. `None`, and the thread's end, when nothing is lost.
fn next(link: &Link, now: Time) -> Option<Option<Lost>> {
    let mut redial = link.redial.lock().unwrap_or_else(PoisonError::into_inner);
    let all = redial.lost.iter().enumerate();
    let first = all.min_by_key(|(_, lost)| (lost.pause, lost.due));
    match first.map(|(index, lost)| (index, lost.due <= now)) {
        Some((index, true)) => Some(Some(redial.lost.swap_remove(index))),
        Some((_, false)) => Some(None),
        None => {
            redial.is_running = false;
            None
        }
    }
}

fn again(hub: &Arc<Hub>, link: &Arc<Link>, lane: LaneId) -> Result<(), String> {
    let address = link.dialled.ok_or("the peer dialled us")?;
    match link.lanes.stage(lane) {
        None => {}
        Some(Stage::Up) => return Ok(()),
        Some(Stage::Opening | Stage::Ending) => {
            return Err("its last queue pair is not gone".into());
        }
    }
    let tracks = queue_pairs::tracks(hub, link)?;
    let track = tracks.iter().find(|track| track.lane == lane);
    let track = *track.ok_or("a lane that is no longer wanted")?;
    let reason = link
        .path
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .1
        .clone();
    let deadline = clock::now() + ATTEMPT_MAX;
    queue_pairs::open(hub, link, address, track, deadline, &reason)
}

#[cfg(test)]
mod tests {
    use super::{PAUSE_FIRST, PAUSE_MAX, Redial};
    use crate::{ids::LaneId, time::Time};

    #[test]
    fn a_lane_is_lost_once_and_keeps_its_longer_pause() {
        let mut redial = Redial::default();
        let now = Time::default();
        for pause in [PAUSE_FIRST, PAUSE_MAX, PAUSE_FIRST] {
            redial.note(now, LaneId(3), pause);
        }
        redial.note(now, LaneId(4), PAUSE_FIRST);
        let kept: Vec<_> = redial
            .lost
            .iter()
            .map(|lost| (lost.lane, lost.pause))
            .collect();
        assert_eq!(kept, [(LaneId(3), PAUSE_MAX), (LaneId(4), PAUSE_FIRST)]);
    }
}
