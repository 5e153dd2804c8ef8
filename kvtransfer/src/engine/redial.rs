//! New queue pairs in place of lost ones. The side that dialled the peer makes them, with growing pauses: a rail that
//! failed is rested, and tried again until it works or the peer is gone.

use std::{
    sync::{Arc, PoisonError},
    time::Duration,
};

use super::{hub::Hub, link::Link, queue_pairs};
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

/// Both ends of a queue pair are gone.
pub(crate) fn lane_lost(hub: &Arc<Hub>, link: &Arc<Link>, lane: LaneId) {
    if link.dialled.is_none() || link.is_closed() || hub.is_stopped() {
        return;
    }
    let mut redial = link.redial.lock().unwrap_or_else(PoisonError::into_inner);
    redial.lost.push(Lost {
        lane,
        due: clock::now() + PAUSE_FIRST,
        pause: PAUSE_FIRST,
    });
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
    while let Some(lost) = next(link) {
        // The pause is slept in slices, so that an engine that shuts down is not waited for.
        while clock::now() < lost.due && !link.is_closed() && !hub.is_stopped() {
            let slice = lost.due.since(clock::now()).min(PAUSE_FIRST);
            std::thread::sleep(slice);
        }
        if link.is_closed() || hub.is_stopped() {
            return;
        }
        if let Err(reason) = again(hub, link, lost.lane) {
            tracing::info!(peer = %link.peer, lane = lost.lane.0, reason, "a queue pair cannot be made yet");
            let pause = (lost.pause * 2).min(PAUSE_MAX);
            let due = clock::now() + pause;
            let mut redial = link.redial.lock().unwrap_or_else(PoisonError::into_inner);
            redial.lost.push(Lost {
                lane: lost.lane,
                due,
                pause,
            });
        }
    }
}

/// The next one due; `None`, and the thread's end, when there is none.
fn next(link: &Link) -> Option<Lost> {
    let mut redial = link.redial.lock().unwrap_or_else(PoisonError::into_inner);
    let first = redial
        .lost
        .iter()
        .enumerate()
        .min_by_key(|(_, lost)| lost.due);
    match first.map(|(index, _)| index) {
        Some(index) => Some(redial.lost.swap_remove(index)),
        None => {
            redial.is_running = false;
            None
        }
    }
}

fn again(hub: &Arc<Hub>, link: &Arc<Link>, lane: LaneId) -> Result<(), String> {
    let address = link.dialled.ok_or("the peer dialled us")?;
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
