//! One worker: where it is, whether it is ready, what it is to blame for.
#![forbid(unsafe_code)]

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use hyper::Uri;
use hyper::http::uri::{Authority, PathAndQuery, Scheme};

use crate::config::{PrefillTarget, WorkerUrl};

/// What a worker does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Computes the prompt's KV cache.
    Prefill,
    /// Generates from it.
    Decode,
}

impl Role {
    /// The role's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a worker did wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blame {
    /// No connection could be made.
    Connect,
    /// It answered with a 4xx status: most often the client's fault, but counted to see the difference.
    ClientError,
    /// It answered with another status that is not a success.
    ServerError,
    /// It closed the connection before its answer was complete.
    Reset,
    /// It was silent for longer than a timeout allows.
    Timeout,
}

impl Blame {
    /// Every kind of blame with its metric label.
    pub const ALL: [(Self, &'static str); 5] = [
        (Self::Connect, "connect"),
        (Self::ClientError, "client_error"),
        (Self::ServerError, "server_error"),
        (Self::Reset, "reset"),
        (Self::Timeout, "timeout"),
    ];
}

/// A worker of the pool.
#[derive(Debug)]
pub struct Worker {
    role: Role,
    url: WorkerUrl,
    bootstrap_port: Option<u16>,
    ready: AtomicBool,
    failures: [AtomicU64; Blame::ALL.len()],
}

impl Worker {
    /// A prefill worker.
    pub fn prefill(target: &PrefillTarget) -> Self {
        Self::new(Role::Prefill, target.url.clone(), target.bootstrap_port)
    }

    /// A decode worker.
    pub fn decode(url: &WorkerUrl) -> Self {
        Self::new(Role::Decode, url.clone(), None)
    }

    fn new(role: Role, url: WorkerUrl, bootstrap_port: Option<u16>) -> Self {
        let failures = [const { AtomicU64::new(0) }; Blame::ALL.len()];
        Self {
            role,
            url,
            bootstrap_port,
            ready: AtomicBool::new(false),
            failures,
        }
    }

    /// What it does.
    pub fn role(&self) -> Role {
        self.role
    }

    /// Where it listens.
    pub fn url(&self) -> &WorkerUrl {
        &self.url
    }

    /// The port of a prefill worker's bootstrap server, if it was given.
    pub fn bootstrap_port(&self) -> Option<u16> {
        self.bootstrap_port
    }

    /// Whether the worker answered its last probes. False until the first one.
    pub fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Relaxed)
    }

    /// Records what the probes found; true if that is news.
    pub fn mark_ready(&self, ready: bool) -> bool {
        self.ready.swap(ready, Ordering::Relaxed) != ready
    }

    /// Counts a failure this worker is to blame for.
    pub fn blame(&self, blame: Blame) {
        crate::metrics::bump(&self.failures[blame as usize]);
    }

    /// How often it failed that way.
    pub fn failures(&self, blame: Blame) -> u64 {
        self.failures[blame as usize].load(Ordering::Relaxed)
    }

    /// The address of `path` on this worker.
    pub fn uri(&self, path: PathAndQuery) -> Uri {
        let authority: Authority = self.url.authority().clone();
        let builder = Uri::builder().scheme(Scheme::HTTP).authority(authority);
        builder
            .path_and_query(path)
            .build()
            .expect("invariant: all three parts are present and parsed")
    }
}
