//! A whole run drawn from a seed: a deployment, rooms, faults; every promise checked after every event.

mod draw;
mod rooms;
mod stage;

use std::collections::BTreeMap;

/// What may happen in a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Weather {
    /// Only delays: every transfer must succeed.
    Calm,
    /// Lanes are reset, but one per connection stays: every transfer must succeed all the same.
    Lanes,
    /// Everything: cancellations, lost connections, frozen, killed and restarted ranks, tiny bounds, short deadlines.
    Storm,
    /// Queue pairs only: frozen ranks, lost queue pairs, slow control streams, and rooms that fail meanwhile.
    Cards,
}

impl Weather {
    /// Whether transfers may fail.
    fn is_rough(self) -> bool {
        matches!(self, Self::Storm | Self::Cards)
    }
}

/// What happened in a run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Rooms begun.
    pub rooms: u64,
    /// Transfers that succeeded, both roles.
    pub successes: u64,
    /// Transfers that failed, by [`TransferError::name`](crate::error::TransferError::name).
    pub failures: BTreeMap<&'static str, u64>,
    /// Pushes that met a full queue.
    pub full: u64,
    /// Lanes reset.
    pub lanes_reset: u64,
    /// Queue pairs destroyed because a failed room ebbed too slowly.
    pub fences: u64,
    /// Times that a rank was frozen.
    pub freezes: u64,
    /// Times that a rank was killed and started again.
    pub restarts: u64,
    /// Payload bytes of successful receivers.
    pub bytes: u64,
    /// Events.
    pub steps: u64,
}

impl Report {
    /// Adds another run's numbers.
    pub fn add(&mut self, other: &Self) {
        self.rooms += other.rooms;
        self.successes += other.successes;
        for (name, count) in &other.failures {
            *self.failures.entry(name).or_default() += count;
        }
        self.full += other.full;
        self.lanes_reset += other.lanes_reset;
        self.fences += other.fences;
        self.freezes += other.freezes;
        self.restarts += other.restarts;
        self.bytes += other.bytes;
        self.steps += other.steps;
    }
}

/// Runs one scenario.
///
/// # Panics
/// If a promise is broken; the message says which.
pub fn run(weather: Weather, seed: u64) -> Report {
    stage::Stage::new(weather, seed).play()
}
