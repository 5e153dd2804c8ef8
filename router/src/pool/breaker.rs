//! Leaves a worker out for a while after it has failed again and again.
//!
//! Pure: time comes in as the span since an arbitrary zero. A worker is judged by its own failures alone, so the healthy
//! partner of a failing worker stays in.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// How long a worker is left out after a failed trial, at most: a repaired worker should be found soon.
pub const OPEN_MAX: Duration = Duration::from_secs(60);

/// When a breaker opens, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BreakerLimits {
    /// Failures in a row that open it; 0 never does.
    pub failures: u32,
    /// How long it stays open the first time; each failed trial doubles it, up to [`OPEN_MAX`].
    pub open: Duration,
}

impl Default for BreakerLimits {
    /// Five failures, five seconds: a crash is noticed within five requests, a restart soon after it.
    fn default() -> Self {
        Self {
            failures: 5,
            open: Duration::from_secs(5),
        }
    }
}

/// What a breaker lets through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BreakerState {
    /// Everything.
    Closed,
    /// Nothing.
    Open,
    /// One request, whose end decides.
    Trial,
}

#[derive(Debug, Default)]
struct Record {
    in_a_row: u32,
    opened: u32,
    trial_out: bool,
}

/// The breaker of one worker.
#[derive(Debug)]
pub struct Breaker {
    limits: BreakerLimits,
    /// Until when nobody may pass, in nanoseconds since zero; 0 when closed. Read on every request, so no lock.
    closed_to: AtomicU64,
    record: Mutex<Record>,
}

impl Breaker {
    /// A closed breaker.
    pub fn new(limits: BreakerLimits) -> Self {
        Self {
            limits,
            closed_to: AtomicU64::new(0),
            record: Mutex::default(),
        }
    }

    /// Whether it is closed, at whatever time.
    pub fn is_closed(&self) -> bool {
        self.closed_to.load(Ordering::Relaxed) == 0
    }

    /// Its state at `now`.
    pub fn state(&self, now: Duration) -> BreakerState {
        match self.closed_to.load(Ordering::Relaxed) {
            0 => BreakerState::Closed,
            until if nanos(now) < until => BreakerState::Open,
            _ => BreakerState::Trial,
        }
    }

    /// Notes that a request was sent at `now`: if it is the trial, others stay out until it ends, or for as long as the
    /// breaker was open should it never end.
    pub fn sent(&self, now: Duration) {
        if self.state(now) == BreakerState::Trial {
            let mut record = self.record.lock().unwrap_or_else(PoisonError::into_inner);
            record.trial_out = true;
            let until = now.saturating_add(self.span(record.opened));
            self.closed_to.store(nanos(until), Ordering::Relaxed);
        }
    }

    /// Notes a failure of this worker's own. True when that opened the breaker.
    pub fn failed(&self, now: Duration) -> bool {
        if self.limits.failures == 0 {
            return false;
        }
        let mut record = self.record.lock().unwrap_or_else(PoisonError::into_inner);
        let is_open = self.closed_to.load(Ordering::Relaxed) != 0;
        record.in_a_row = record.in_a_row.saturating_add(1);
        // While it is open only the trial counts: requests sent before it opened fail too, and prove nothing new.
        let decides = if is_open {
            std::mem::take(&mut record.trial_out)
        } else {
            record.in_a_row >= self.limits.failures
        };
        if !decides {
            return false;
        }
        record.opened = record.opened.saturating_add(1);
        let until = now.saturating_add(self.span(record.opened));
        self.closed_to.store(nanos(until), Ordering::Relaxed);
        !is_open
    }

    /// Notes a success, which closes it. True when that was news.
    pub fn succeeded(&self) -> bool {
        let mut record = self.record.lock().unwrap_or_else(PoisonError::into_inner);
        *record = Record::default();
        self.closed_to.swap(0, Ordering::Relaxed) != 0
    }

    fn span(&self, opened: u32) -> Duration {
        let doublings = opened.saturating_sub(1).min(16);
        self.limits
            .open
            .saturating_mul(1 << doublings)
            .min(OPEN_MAX.max(self.limits.open))
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn at(secs: u64) -> Duration {
        Duration::from_secs(secs)
    }

    fn breaker() -> Breaker {
        Breaker::new(BreakerLimits {
            failures: 3,
            open: at(10),
        })
    }

    #[test]
    fn only_failures_in_a_row_open_it() {
        let breaker = breaker();
        for _ in 0..10 {
            assert!(!breaker.failed(at(1)) && !breaker.failed(at(1)));
            assert!(!breaker.succeeded());
        }
        assert_eq!(breaker.state(at(1)), BreakerState::Closed);
        assert_eq!(
            [
                breaker.failed(at(1)),
                breaker.failed(at(1)),
                breaker.failed(at(1))
            ],
            [false, false, true]
        );
        assert_eq!(breaker.state(at(10)), BreakerState::Open);
        assert_eq!(breaker.state(at(11)), BreakerState::Trial);
    }

    #[test]
    fn one_trial_decides() {
        let breaker = breaker();
        for _ in 0..3 {
            breaker.failed(at(0));
        }
        breaker.sent(at(10));
        assert_eq!(
            breaker.state(at(11)),
            BreakerState::Open,
            "the trial is out"
        );
        assert!(!breaker.failed(at(12)));
        assert_eq!(
            breaker.state(at(31)),
            BreakerState::Open,
            "twice as long now"
        );
        assert_eq!(breaker.state(at(32)), BreakerState::Trial);
        breaker.sent(at(32));
        assert!(breaker.succeeded());
        assert_eq!(breaker.state(at(32)), BreakerState::Closed);
    }

    #[test]
    fn a_lost_trial_does_not_close_it_for_ever() {
        let breaker = breaker();
        for _ in 0..3 {
            breaker.failed(at(0));
        }
        breaker.sent(at(10));
        assert_eq!(breaker.state(at(20)), BreakerState::Trial);
        for trial in 0..20u64 {
            let now = at(20 + 60 * trial);
            assert_eq!(breaker.state(now), BreakerState::Trial);
            breaker.sent(now);
            breaker.failed(now);
        }
    }

    #[test]
    fn it_can_be_switched_off() {
        let breaker = Breaker::new(BreakerLimits {
            failures: 0,
            open: at(10),
        });
        assert!((0..100).all(|_| !breaker.failed(at(0))));
        assert_eq!(breaker.state(at(0)), BreakerState::Closed);
    }
}
