//! What a transfer's handle holds, and how it is told to C.
#![forbid(unsafe_code)]

use std::{sync::Arc, time::Duration};

use kvt::engine::{Poll, Transfer};

use super::{
    KVT_STATE_BOOTSTRAPPING, KVT_STATE_FAILED, KVT_STATE_SUCCESS, KVT_STATE_TRANSFERRING,
    KVT_STATE_WAITING_FOR_INPUT, kvt_outcome_t,
};
use crate::{
    records::Records,
    status::{Failure, KVT_OK, KVT_WOULD_WAIT},
};

/// What the handle holds.
pub(crate) struct Moving {
    pub(super) transfer: Transfer,
    pub(super) records: Arc<Records>,
    pub(super) tails: Arc<[bool]>,
}

impl Drop for Moving {
    fn drop(&mut self) {
        // Nobody wants to hear of it any more. The transfer's own drop then cancels it, if it is still live.
        self.records.take(self.transfer.id());
    }
}

impl Moving {
    /// How it stands, and why it failed.
    pub(super) fn outcome(&self) -> (kvt_outcome_t, Option<String>) {
        let transfer = &self.transfer;
        // The state first: it may go on meanwhile, and an end must not be shown beside an older state.
        let ready = transfer.ready();
        let mut outcome = kvt_outcome_t {
            status: KVT_WOULD_WAIT,
            state: state(transfer.poll()).into(),
            prefix_tokens: ready.unwrap_or(0),
            is_ready: ready.is_some().into(),
            room: transfer.room().number(),
            id: transfer.id().0,
            bytes: 0,
            batches: 0,
            waited_ns: 0,
            moving_ns: 0,
        };
        let nanos = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        match transfer.result() {
            None => (outcome, None),
            Some(Ok(summary)) => {
                outcome.status = KVT_OK;
                outcome.state = KVT_STATE_SUCCESS.into();
                outcome.bytes = summary.bytes;
                outcome.batches = summary.batches;
                outcome.waited_ns = nanos(summary.waited);
                outcome.moving_ns = nanos(summary.moving);
                (outcome, None)
            }
            Some(Err(error)) => {
                let failure = Failure::from(error);
                outcome.status = failure.status;
                outcome.state = KVT_STATE_FAILED.into();
                (outcome, Some(failure.text))
            }
        }
    }
}

pub(super) fn state(poll: Poll) -> u8 {
    match poll {
        Poll::Failed => KVT_STATE_FAILED,
        Poll::Bootstrapping => KVT_STATE_BOOTSTRAPPING,
        Poll::WaitingForInput => KVT_STATE_WAITING_FOR_INPUT,
        Poll::Transferring => KVT_STATE_TRANSFERRING,
        Poll::Success => KVT_STATE_SUCCESS,
    }
}
