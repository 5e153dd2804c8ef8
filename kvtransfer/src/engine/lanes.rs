//! The data connections of one link: which may be given work, which are coming and which are going.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::{ids::LaneId, transport::DataLane};

/// Where a data connection is in its life. A stream is born up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// A queue pair that has not proven itself.
    Opening,
    /// It takes work.
    Up,
    /// This end is destroyed, the peer's is not known to be: its number is not free yet.
    Ending,
}

/// The data connections of one link.
#[derive(Default)]
pub(crate) struct Lanes {
    lanes: Mutex<Vec<(DataLane, Stage)>>,
}

impl Lanes {
    fn lock(&self) -> MutexGuard<'_, Vec<(DataLane, Stage)>> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn add(&self, lane: DataLane, stage: Stage) {
        self.lock().push((lane, stage));
    }

    /// Moves a lane on. Lanes do not go back, so a late word of its opening does nothing to one that ends.
    pub(crate) fn advance(&self, id: LaneId, to: Stage) {
        let mut lanes = self.lock();
        let mut known = lanes.iter_mut().filter(|(lane, _)| lane.id() == id);
        if let Some((_, stage)) =
            known.find(|(_, stage)| to == Stage::Ending || *stage == Stage::Opening)
        {
            *stage = to;
        }
    }

    /// Forgets a lane: its number is free.
    pub(crate) fn remove(&self, id: LaneId) {
        self.lock().retain(|(lane, _)| lane.id() != id);
    }

    /// Whether that number is in use, in whatever stage.
    pub(crate) fn has(&self, id: LaneId) -> bool {
        self.lock().iter().any(|(lane, _)| lane.id() == id)
    }

    /// Where the lane of that number is, if there is one.
    pub(crate) fn stage(&self, id: LaneId) -> Option<Stage> {
        let lanes = self.lock();
        let found = lanes.iter().find(|(lane, _)| lane.id() == id);
        found.map(|(_, stage)| *stage)
    }

    /// Those in any stage.
    pub(crate) fn all(&self) -> Vec<DataLane> {
        self.lock().iter().map(|(lane, _)| lane.clone()).collect()
    }

    /// Whether there is one that takes work.
    pub(crate) fn has_up(&self) -> bool {
        self.lock().iter().any(|(_, stage)| *stage == Stage::Up)
    }

    /// The first one that takes work: small transfers go there.
    pub(crate) fn first_up(&self) -> Option<DataLane> {
        let lanes = self.lock();
        let mut up = lanes.iter().filter(|(_, stage)| *stage == Stage::Up);
        up.next().map(|(lane, _)| lane.clone())
    }

    /// Wakes as many as there is work for.
    pub(crate) fn kick(&self, wanted: usize) {
        let lanes = self.lock();
        let up = lanes.iter().filter(|(_, stage)| *stage == Stage::Up);
        for (lane, _) in up.take(wanted.max(1)) {
            lane.kick();
        }
    }
}
