//! The three optional time limits of a request, behind one timer.
#![forbid(unsafe_code)]

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep_until};

use crate::config::Config;

/// Which limit was exceeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Stage {
    /// `--request-timeout`
    #[error("the request took longer than the request timeout")]
    Request,
    /// `--first-byte-timeout`
    #[error("no byte of an answer came within the first-byte timeout")]
    FirstByte,
    /// `--stall-timeout`
    #[error("the answer stalled for longer than the stall timeout")]
    Stall,
}

/// Counts down for one request. Without limits it costs nothing.
#[derive(Debug)]
pub struct Deadline {
    request_at: Option<Instant>,
    stall: Option<Duration>,
    /// First-byte limit before the first byte, stall limit after it.
    progress_at: Option<Instant>,
    started: bool,
    sleep: Option<Pin<Box<Sleep>>>,
}

impl Deadline {
    /// The limits of `config`, counted from `now`.
    pub fn new(config: &Config, now: Instant) -> Self {
        let mut deadline = Self {
            request_at: config
                .request_timeout
                .and_then(|limit| now.checked_add(limit)),
            stall: config.stall_timeout,
            progress_at: config
                .first_byte_timeout
                .and_then(|limit| now.checked_add(limit)),
            started: false,
            sleep: None,
        };
        deadline.arm();
        deadline
    }

    /// Notes that a byte of the answer came.
    pub fn byte_arrived(&mut self) {
        if self.started && self.stall.is_none() {
            return;
        }
        self.started = true;
        self.progress_at = self
            .stall
            .and_then(|limit| Instant::now().checked_add(limit));
        self.arm();
    }

    /// Resolves when a limit is exceeded, never without limits.
    pub async fn expired(&mut self) -> Stage {
        std::future::poll_fn(|cx| self.poll_expired(cx)).await
    }

    /// See [`Deadline::expired`].
    pub fn poll_expired(&mut self, cx: &mut Context<'_>) -> Poll<Stage> {
        let Some(sleep) = &mut self.sleep else {
            return Poll::Pending;
        };
        std::task::ready!(sleep.as_mut().poll(cx));
        let request_first = match (self.request_at, self.progress_at) {
            (Some(request_at), Some(progress_at)) => request_at <= progress_at,
            (request_at, _) => request_at.is_some(),
        };
        Poll::Ready(match (request_first, self.started) {
            (true, _) => Stage::Request,
            (false, false) => Stage::FirstByte,
            (false, true) => Stage::Stall,
        })
    }

    fn arm(&mut self) {
        let at = self.request_at.into_iter().chain(self.progress_at).min();
        match (&mut self.sleep, at) {
            (Some(sleep), Some(at)) => sleep.as_mut().reset(at),
            (sleep, at) => *sleep = at.map(|at| Box::pin(sleep_until(at))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(request: u64, first: u64, stall: u64) -> Config {
        let time = |secs| (secs > 0).then(|| Duration::from_secs(secs));
        Config {
            request_timeout: time(request),
            first_byte_timeout: time(first),
            stall_timeout: time(stall),
            ..Config::new(Vec::new(), Vec::new())
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_nearest_limit_speaks() {
        for (limits, started, stage, secs) in [
            ((9, 3, 1), false, Stage::FirstByte, 3),
            ((9, 3, 1), true, Stage::Stall, 1),
            ((2, 3, 4), false, Stage::Request, 2),
            ((2, 3, 4), true, Stage::Request, 2),
            ((9, 3, 0), true, Stage::Request, 9),
            ((0, 0, 7), true, Stage::Stall, 7),
        ] {
            let begin = Instant::now();
            let mut deadline = Deadline::new(&config(limits.0, limits.1, limits.2), begin);
            if started {
                deadline.byte_arrived();
            }
            assert_eq!(deadline.expired().await, stage, "{limits:?} {started}");
            assert_eq!(begin.elapsed().as_secs(), secs, "{limits:?} {started}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn each_byte_restarts_the_stall_limit() {
        let begin = Instant::now();
        let mut deadline = Deadline::new(&config(0, 1, 5), begin);
        for _ in 0..10 {
            deadline.byte_arrived();
            let waited = tokio::time::timeout(Duration::from_secs(4), deadline.expired()).await;
            assert!(waited.is_err());
        }
        assert_eq!(deadline.expired().await, Stage::Stall);
        assert_eq!(begin.elapsed().as_secs(), 41);
    }

    #[tokio::test(start_paused = true)]
    async fn no_limit_never_expires() {
        let mut deadline = Deadline::new(&config(0, 0, 0), Instant::now());
        let day = Duration::from_secs(86_400);
        assert!(tokio::time::timeout(day, deadline.expired()).await.is_err());
    }
}
