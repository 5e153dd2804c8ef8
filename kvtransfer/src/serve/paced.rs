//! A connection that knows how long it has been idle, sending a request head, or taking a reply.
//!
//! hyper's own head timeout starts when a connection turns idle, so it cannot tell a patient poller (welcome for minutes)
//! from a client that trickles a head (gone in seconds). The wrapper sees the bytes and keeps the difference.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

/// What a connection is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Between requests.
    Idle,
    /// Some bytes of a request head have come.
    Head,
    /// The handler runs; it bounds itself.
    Serving,
    /// The reply is being written.
    Replying,
}

/// How long each phase may last.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) idle: Duration,
    pub(super) head: Duration,
    pub(super) reply: Duration,
}

/// The phase of one connection, shared by its socket, its handler and its watchdog.
#[derive(Debug)]
pub(super) struct Pace {
    origin: Instant,
    // Milliseconds since `origin` in the upper bits, the phase in the lowest two: one word, so no lock.
    state: AtomicU64,
}

impl Pace {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            origin: Instant::now(),
            state: AtomicU64::new(0),
        })
    }

    pub(super) fn enter(&self, phase: Phase) {
        let millis = u64::try_from(self.origin.elapsed().as_millis()).unwrap_or(u64::MAX >> 2);
        // Relaxed: the word carries all there is to know.
        self.state
            .store(millis << 2 | phase as u64, Ordering::Relaxed);
    }

    fn load(&self) -> (Phase, Duration) {
        let state = self.state.load(Ordering::Relaxed);
        let phase = match state & 3 {
            0 => Phase::Idle,
            1 => Phase::Head,
            2 => Phase::Serving,
            _ => Phase::Replying,
        };
        (phase, Duration::from_millis(state >> 2))
    }

    /// Returns once a phase has lasted longer than it may.
    pub(super) async fn overdue(&self, limits: Limits) -> Phase {
        loop {
            let (phase, since) = self.load();
            let limit = match phase {
                Phase::Idle => limits.idle,
                Phase::Head => limits.head,
                Phase::Serving => Duration::MAX,
                Phase::Replying => limits.reply,
            };
            let spent = self.origin.elapsed().saturating_sub(since);
            if spent >= limit {
                return phase;
            }
            // A shorter phase may begin while this one waits.
            let pause = (limit - spent).min(limits.head).min(limits.reply);
            tokio::time::sleep(pause.max(Duration::from_millis(1))).await;
        }
    }
}

/// A socket that reports its bytes to a [`Pace`].
#[derive(Debug)]
pub(super) struct Paced<S> {
    pub(super) socket: S,
    pub(super) pace: Arc<Pace>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Paced<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = into.filled().len();
        let polled = Pin::new(&mut self.socket).poll_read(context, into);
        if into.filled().len() > before && self.pace.load().0 == Phase::Idle {
            self.pace.enter(Phase::Head);
        }
        polled
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Paced<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.socket).poll_flush(context);
        if polled.is_ready() && self.pace.load().0 == Phase::Replying {
            self.pace.enter(Phase::Idle);
        }
        polled
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(context)
    }
}
