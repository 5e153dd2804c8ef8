//! A live request, as the scheduler keeps it.

use tokio::time::Instant;

use super::job::{Event, Finish, Job, Outcome};
use super::output::Output;
use crate::cache::aux::AuxSlot;
use crate::cache::pages::Lease;
use crate::pd::Room;
use crate::text::EOS;

/// Where a request is on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// Prefill: waits for the decode to lend pages.
    Bootstrapping,
    /// Waits for memory.
    Waiting,
    /// Its prompt is being computed, a chunk per turn.
    Prefilling,
    /// Prefill: all pushed, waits for the confirmation.
    Inflight,
    /// Decode: waits for the KV; `lent` when the prefill may write.
    Receiving { lent: bool },
    /// Generates, a token per turn.
    Decoding,
    /// Answered; waits until the link has fenced its room, because its pages may still be read or written.
    Draining,
    /// Holds nothing any more.
    Over,
}

/// One sequence and all it holds.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) job: Job,
    pub(super) stage: Stage,
    output: Output,
    /// Tokens generated so far; the last one's KV is not computed yet.
    pub(super) generated: Vec<u32>,
    pub(super) lease: Option<Lease>,
    pub(super) aux: Option<AuxSlot>,
    /// The link knows the room.
    pub(super) room_open: bool,
    /// Tokens from the start of the sequence whose KV is valid in the leased pages.
    pub(super) computed: usize,
    /// See [`Outcome::cached_tokens`].
    pub(super) cached_tokens: usize,
    /// Tokens that are not transferred because the decode has them.
    pub(super) decode_prefix_tokens: usize,
    /// Pages pushed so far.
    pub(super) pushed_pages: usize,
    pub(super) first_push: Option<Instant>,
}

impl Request {
    pub(super) fn new(job: Job, stage: Stage) -> Self {
        Self {
            output: Output::new(job.sampling.stop.clone()),
            job,
            stage,
            generated: vec![],
            lease: None,
            aux: None,
            room_open: false,
            computed: 0,
            cached_tokens: 0,
            decode_prefix_tokens: 0,
            pushed_pages: 0,
            first_push: None,
        }
    }

    /// The request's room, if the worker has a PD role.
    pub(super) fn room(&self) -> Option<Room> {
        self.job.bootstrap.as_ref().map(|b| b.room)
    }

    /// The tokens whose KV is valid, in order.
    pub(super) fn computed_tokens(&self) -> Vec<u32> {
        self.job
            .prompt
            .iter()
            .chain(&self.generated)
            .take(self.computed)
            .copied()
            .collect()
    }

    /// Tokens of prompt and output.
    pub(super) fn total_tokens(&self) -> usize {
        self.job.prompt.len() + self.generated.len()
    }

    /// Adds a token to the output and sends what became certain. Returns why the sequence ends with it, if it does.
    pub(super) fn emit(&mut self, token: u32) -> Option<Finish> {
        self.generated.push(token);
        let sampling = &self.job.sampling;
        let (text, finish) = if token == EOS && !sampling.ignore_eos {
            (String::new(), Some(Finish::EndOfSequence(token)))
        } else {
            let (text, stopped) = self.output.push(token);
            let full = self.generated.len() >= sampling.max_new_tokens;
            (
                text,
                stopped
                    .map(Finish::StopText)
                    .or(full.then_some(Finish::Length)),
            )
        };
        self.send(Event::Token { id: token, text });
        finish
    }

    /// Sends the outcome; nothing may be sent after it.
    pub(super) fn answer(&mut self, mut finish: Finish) {
        if !matches!(finish, Finish::StopText(_)) {
            let (tail, stopped) = self.output.finish();
            if !tail.is_empty() {
                self.send(Event::Tail(tail));
            }
            if let (Some(stop), false) = (stopped, matches!(finish, Finish::Aborted(_))) {
                finish = Finish::StopText(stop);
            }
        }
        self.send(Event::Done(Outcome {
            finish,
            prompt_tokens: self.job.prompt.len(),
            completion_tokens: self.generated.len(),
            cached_tokens: self.cached_tokens,
            decode_prefix_tokens: self.decode_prefix_tokens,
        }));
    }

    fn send(&self, event: Event) {
        // The channel has room for every event of a job, so this fails only when nobody reads any more; the scheduler
        // sees that on its next look.
        let _closed = self.job.events.try_send(event);
    }
}
