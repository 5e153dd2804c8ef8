//! A client's hold on its job.

use std::sync::Arc;

use tokio::sync::mpsc;

use super::refusal::{Refusal, abort_status};
use crate::scheduler::job::{Event, Finish, Outcome};
use crate::scheduler::mailbox::Mailbox;

/// Receives a job's events. Dropping it before the end aborts the job: that is how a disconnect travels.
#[derive(Debug)]
pub(super) struct Ticket {
    pub(super) rid: String,
    events: mpsc::Receiver<Event>,
    mailbox: Arc<Mailbox>,
    done: bool,
}

/// All that a job has produced so far.
#[derive(Clone, Debug, Default)]
pub(super) struct Progress {
    pub(super) text: String,
    pub(super) output_ids: Vec<u32>,
    pub(super) outcome: Option<Outcome>,
}

impl Ticket {
    pub(super) const fn new(
        rid: String,
        events: mpsc::Receiver<Event>,
        mailbox: Arc<Mailbox>,
    ) -> Self {
        Self {
            rid,
            events,
            mailbox,
            done: false,
        }
    }

    /// The next event into `progress`; returns the text that is new. After the outcome it must not be called again.
    ///
    /// # Errors
    /// The scheduler has died, which only a bug can cause.
    pub(super) async fn advance(&mut self, progress: &mut Progress) -> Result<String, Refusal> {
        match self.events.recv().await {
            Some(Event::Token { id, text }) => {
                progress.output_ids.push(id);
                progress.text.push_str(&text);
                Ok(text)
            }
            Some(Event::Tail(text)) => {
                progress.text.push_str(&text);
                Ok(text)
            }
            Some(Event::Done(outcome)) => {
                self.done = true;
                progress.outcome = Some(outcome);
                Ok(String::new())
            }
            None => {
                self.done = true;
                Err(Refusal {
                    status: axum::http::StatusCode::SERVICE_UNAVAILABLE,
                    message: "The worker is shutting down.".to_owned(),
                })
            }
        }
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// The job failed: its status and reason.
    pub(super) async fn wait(&mut self) -> Result<(Progress, Outcome), Refusal> {
        let mut progress = Progress::default();
        loop {
            self.advance(&mut progress).await?;
            if let Some(outcome) = progress.outcome.clone() {
                failure(&outcome)?;
                return Ok((progress, outcome));
            }
        }
    }
}

/// The refusal that an outcome amounts to, if it is a failure and not an end that somebody asked for.
pub(super) fn failure(outcome: &Outcome) -> Result<(), Refusal> {
    match &outcome.finish {
        Finish::Aborted(abort) => match abort_status(abort) {
            Some(status) => Err(Refusal {
                status,
                message: abort.to_string(),
            }),
            None => Ok(()),
        },
        _ => Ok(()),
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if !self.done {
            self.events.close();
            self.mailbox.ring();
        }
    }
}
