//! How the router is told to stop, and how the rest of it learns that it is stopping.
#![forbid(unsafe_code)]

use std::future::Future;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

/// Resolves on SIGTERM or SIGINT.
///
/// # Errors
/// When the process may not install signal handlers.
pub fn stop_signals() -> std::io::Result<impl Future<Output = ()> + Send> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => tracing::info!("SIGTERM: finishing live requests"),
            _ = interrupt.recv() => tracing::info!("SIGINT: finishing live requests"),
        }
    })
}

/// SIGHUP, which asks for the settings to be read again instead of ending the process.
///
/// # Errors
/// When the process may not install signal handlers.
pub fn hangups() -> std::io::Result<Signal> {
    signal(SignalKind::hangup())
}

/// A switch that is thrown once, when the drain begins.
#[derive(Clone, Debug)]
pub struct DrainSwitch {
    sender: watch::Sender<bool>,
}

impl Default for DrainSwitch {
    fn default() -> Self {
        Self {
            sender: watch::Sender::new(false),
        }
    }
}

impl DrainSwitch {
    /// Begins the drain.
    pub fn throw(&self) {
        self.sender.send_replace(true);
    }

    /// Whether the drain has begun.
    pub fn is_thrown(&self) -> bool {
        *self.sender.borrow()
    }

    /// Waits for the drain to begin.
    pub async fn thrown(&self) {
        // The sender lives in `self`, so waiting cannot fail.
        let _ = self.sender.subscribe().wait_for(|thrown| *thrown).await;
    }
}
