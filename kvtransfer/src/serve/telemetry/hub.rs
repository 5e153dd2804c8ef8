//! One picture for all: the sampler, and the streams made of it.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Instant, sleep_until, timeout_at};

use super::TelemetryConfig;
use crate::telemetry::delta::{Delta, diff};
use crate::telemetry::message::{Stamp, delta_message, snapshot_message};
use crate::telemetry::snapshot::{Clipped, Snapshot};
use crate::telemetry::v1;

/// Samples the engine and hands the latest picture to every subscriber.
pub(super) struct Hub {
    source: Arc<dyn Fn() -> Snapshot + Send + Sync>,
    interval: Duration,
    keep_alive: Duration,
    latest: watch::Sender<Published>,
    /// When `source` was last asked.
    sampled: Mutex<Option<Instant>>,
    /// Wakes the sampler when the first subscriber arrives.
    arrived: Notify,
    places: Arc<Semaphore>,
}

/// The latest picture, and the way to it from the one before.
struct Published {
    /// One more with each picture that differs from the last.
    version: u64,
    picture: Arc<Snapshot>,
    /// Leads here from `version - 1`. Subscribers that keep up share it instead of computing it each.
    step: Arc<Delta>,
    /// Clocks of the latest sample, which may be later than the picture.
    monotonic_ns: u64,
    wall_ns: u64,
}

impl Hub {
    pub(super) fn new(
        source: Arc<dyn Fn() -> Snapshot + Send + Sync>,
        config: &TelemetryConfig,
    ) -> Self {
        let nothing = Published {
            version: 0,
            picture: Arc::default(),
            step: Arc::default(),
            monotonic_ns: 0,
            wall_ns: 0,
        };
        Self {
            source,
            interval: config.interval,
            keep_alive: config.keep_alive,
            latest: watch::Sender::new(nothing),
            sampled: Mutex::new(None),
            arrived: Notify::new(),
            places: Arc::new(Semaphore::new(config.subscribers_max)),
        }
    }

    /// Samples once per interval while there are subscribers, and sleeps while there are none. Never returns, but for
    /// a panic of `source`.
    pub(super) async fn sample_while_watched(self: Arc<Self>) {
        loop {
            if self.latest.receiver_count() == 0 {
                self.arrived.notified().await;
                continue;
            }
            let next = self.refresh(Instant::now());
            sleep_until(next).await;
        }
    }

    /// The picture now, at most one interval old.
    pub(super) fn picture(&self, now: Instant) -> Snapshot {
        self.refresh(now);
        let latest = self.latest.borrow();
        let Published {
            monotonic_ns,
            wall_ns,
            ..
        } = *latest;
        Snapshot {
            monotonic_ns,
            wall_ns,
            ..Snapshot::clone(&latest.picture)
        }
    }

    /// A new stream, or `None` when there are as many as allowed.
    pub(super) fn subscribe(&self, now: Instant) -> Option<Subscription> {
        let place = Arc::clone(&self.places).try_acquire_owned().ok()?;
        self.refresh(now);
        let latest = self.latest.subscribe();
        self.arrived.notify_one();
        Some(Subscription {
            latest,
            told: None,
            sequence: 0,
            keep_alive: self.keep_alive,
            due: now,
            _place: place,
        })
    }

    /// Asks `source`, unless it was asked less than an interval ago. Returns when it may be asked again.
    fn refresh(&self, now: Instant) -> Instant {
        {
            let mut sampled = self.sampled.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(next) = sampled.map(|at| at + self.interval)
                && now < next
            {
                return next;
            }
            *sampled = Some(now);
        }
        let mut picture = (self.source)();
        let clipped = picture.normalise();
        if clipped != Clipped::default() {
            tracing::debug!(
                clipped.rails,
                clipped.rooms,
                "the telemetry picture is clipped"
            );
        }
        let step = diff(&self.latest.borrow().picture, &picture);
        self.latest.send_if_modified(|latest| {
            latest.monotonic_ns = picture.monotonic_ns;
            latest.wall_ns = picture.wall_ns;
            let changed = !step.is_quiet();
            if changed {
                latest.version += 1;
                latest.picture = Arc::new(picture);
                latest.step = Arc::new(step);
            }
            changed
        });
        now + self.interval
    }
}

/// One subscriber's stream. It holds its place among the subscribers, and the picture it was last sent.
pub(super) struct Subscription {
    latest: watch::Receiver<Published>,
    /// The picture the subscriber has, and its version.
    told: Option<(u64, Arc<Snapshot>)>,
    sequence: u64,
    keep_alive: Duration,
    /// When a keep-alive is due.
    due: Instant,
    _place: OwnedSemaphorePermit,
}

impl Subscription {
    /// The next message; `None` when the hub is gone.
    pub(super) async fn next(&mut self) -> Option<v1::WatchResponse> {
        loop {
            let message = match self.told.clone() {
                None => Some(self.whole()),
                Some((version, picture)) => match timeout_at(self.due, self.latest.changed()).await
                {
                    Err(_elapsed) => Some(self.still()),
                    Ok(Err(_closed)) => return None,
                    Ok(Ok(())) => self.changed(version, &picture),
                },
            };
            if let Some(message) = message {
                self.sequence += 1;
                self.due = Instant::now() + self.keep_alive;
                return Some(message);
            }
        }
    }

    fn whole(&mut self) -> v1::WatchResponse {
        let latest = self.latest.borrow_and_update();
        self.told = Some((latest.version, Arc::clone(&latest.picture)));
        snapshot_message(stamp(&latest, self.sequence), &latest.picture)
    }

    fn still(&self) -> v1::WatchResponse {
        delta_message(
            stamp(&self.latest.borrow(), self.sequence),
            &Delta::default(),
        )
    }

    /// What leads from the picture the subscriber has to the latest one; `None`: it is back where it was.
    fn changed(&mut self, version: u64, picture: &Snapshot) -> Option<v1::WatchResponse> {
        let latest = self.latest.borrow_and_update();
        self.told = Some((latest.version, Arc::clone(&latest.picture)));
        let stamp = stamp(&latest, self.sequence);
        let skipped;
        let step = if latest.version == version + 1 {
            &*latest.step
        } else {
            skipped = diff(picture, &latest.picture);
            &skipped
        };
        if step.is_quiet() {
            return None;
        }
        if step.identity.is_some() {
            return Some(snapshot_message(stamp, &latest.picture));
        }
        Some(delta_message(stamp, step))
    }
}

fn stamp(latest: &Published, sequence: u64) -> Stamp {
    let Published {
        monotonic_ns,
        wall_ns,
        ..
    } = *latest;
    Stamp {
        sequence,
        epoch: latest.picture.epoch,
        monotonic_ns,
        wall_ns,
    }
}

#[cfg(test)]
mod tests;
