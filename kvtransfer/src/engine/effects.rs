//! What the node wants done, and doing it: collected under the core's lock, performed without it.

use std::sync::{Arc, atomic::Ordering};

use super::{
    handle::{CompletionQueue, Shared},
    hub::{Core, Hub},
    link::Link,
};
use crate::{
    error::TransferError,
    ids::{LaneId, PeerId},
    transfer::{Output, Summary},
};

/// What is left to do when the core's lock has been released.
#[derive(Default)]
pub(super) struct Effects {
    flush: Vec<Arc<Link>>,
    /// Links with work, how many lanes it keeps busy, and its bytes.
    pub(super) work: Vec<(Arc<Link>, usize, u64)>,
    ready: Vec<(Arc<Shared>, u32)>,
    stopping: Vec<Arc<Shared>>,
    fences: Vec<(Arc<Link>, LaneId, String)>,
    ended: Vec<(Arc<Shared>, Result<Summary, TransferError>)>,
    disconnect: Vec<(PeerId, String)>,
    completions: Option<Arc<CompletionQueue>>,
    wake: bool,
}

impl Hub {
    /// Takes the node's outputs; messages are put into their outboxes here, under the lock, so that their order is kept.
    pub(super) fn collect(&self, core: &mut Core) -> Option<Effects> {
        let wake = core.node.next_timeout().nanos() < self.armed.load(Ordering::SeqCst);
        let mut output = core.node.poll_output();
        if output.is_none() && !wake {
            return None;
        }
        let mut effects = Effects {
            wake,
            completions: core.completions.clone(),
            ..Effects::default()
        };
        let mut closes_gates = false;
        while let Some(next) = output {
            match next {
                Output::Control(peer, message) => {
                    if let Some(link) = core.links.get(&peer) {
                        if link.queue(&message).is_err() {
                            let reason = "it does not read its control stream".to_owned();
                            effects.disconnect.push((peer, reason));
                        } else if !effects.flush.iter().any(|known| known.peer == peer) {
                            effects.flush.push(Arc::clone(link));
                        }
                    }
                }
                Output::Work(peer) => {
                    let wanted = core.node.lanes_wanted(peer);
                    let bytes = core.node.queued_bytes(peer);
                    let known = effects.work.iter().any(|(link, ..)| link.peer == peer);
                    if let Some(link) = core.links.get(&peer).filter(|_| !known) {
                        effects.work.push((Arc::clone(link), wanted, bytes));
                    }
                }
                Output::Ready {
                    transfer,
                    prefix_tokens,
                } => {
                    if let Some(shared) = core.transfers.get(&transfer) {
                        effects.ready.push((Arc::clone(shared), prefix_tokens));
                    }
                }
                Output::Stopping { transfer } => {
                    if let Some(shared) = core.transfers.get(&transfer) {
                        effects.stopping.push(Arc::clone(shared));
                        closes_gates = true;
                    }
                }
                Output::Fence { peer, lane, reason } => {
                    if let Some(link) = core.links.get(&peer) {
                        effects.fences.push((Arc::clone(link), lane, reason));
                    }
                }
                Output::Ended { transfer, result } => {
                    if let Some(shared) = core.transfers.remove(&transfer) {
                        effects.ended.push((shared, result));
                        closes_gates = true;
                    }
                }
                Output::Disconnect { peer, reason } => effects.disconnect.push((peer, reason)),
            }
            output = core.node.poll_output();
        }
        if closes_gates {
            self.closing_gates.fetch_add(1, Ordering::SeqCst);
        }
        Some(effects)
    }

    pub(super) fn perform(&self, effects: Effects) {
        // First the gates: when anybody learns of an end, no byte of it can move any more (promise P1).
        let stopping = effects.stopping.iter();
        for shared in stopping.chain(effects.ended.iter().map(|(shared, _)| shared)) {
            shared.gate.close();
        }
        if !effects.stopping.is_empty() || !effects.ended.is_empty() {
            self.gates_closed();
        }
        for (link, lane, reason) in effects.fences {
            link.fence(lane, &reason);
        }
        let completions = effects.completions.as_deref();
        let ended = effects.ended.into_iter();
        let callbacks: Vec<_> = ended
            .filter_map(|(shared, result)| shared.finish(result, completions))
            .collect();
        let ready = effects.ready.into_iter();
        let granted: Vec<_> = ready
            .filter_map(|(shared, prefix_tokens)| shared.set_ready(prefix_tokens))
            .collect();
        for link in effects.flush {
            if let Err(error) = link.flush() {
                self.drop_peer(link.peer, &error.to_string());
            }
        }
        for (link, wanted, _) in effects.work {
            link.lanes.kick(wanted);
        }
        for (peer, reason) in effects.disconnect {
            self.drop_peer(peer, &reason);
        }
        if effects.wake {
            self.wake_control();
        }
        granted.into_iter().for_each(|callback| callback());
        callbacks.into_iter().for_each(|callback| callback());
    }
}
