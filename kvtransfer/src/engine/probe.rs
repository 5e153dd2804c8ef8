//! Asking a peer whether it answers, now: a ping on its control stream, and whoever waits for the answer.

use std::{
    collections::HashMap,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use crossbeam_channel::{RecvTimeoutError, Sender, bounded};
use thiserror::Error;

use super::hub::Hub;
use crate::{clock, ids::PeerId, wire::control::Control};

/// Heartbeats count nanoseconds since the start, which never set this bit.
const PROBE: u64 = 1 << 63;

/// Why a peer cannot be said to answer.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ProbeError {
    /// It is not connected (any more).
    #[error("the peer is not connected")]
    UnknownPeer,
    /// It may be frozen, or the network between may be down.
    #[error("the peer has not answered within {waited:?}")]
    Silent {
        /// How long was waited.
        waited: Duration,
    },
}

/// Probes on their way: at most one for each thread that waits.
#[derive(Debug, Default)]
pub(super) struct Probes {
    sent: AtomicU64,
    waiting: Mutex<HashMap<u64, (PeerId, Sender<()>)>>,
}

impl Probes {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, (PeerId, Sender<()>)>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A peer answered a ping. Its word counts for probes of itself only.
    pub(super) fn answered(&self, peer: PeerId, nonce: u64) {
        let mut waiting = self.lock();
        if waiting.get(&nonce).is_some_and(|(asked, _)| *asked == peer)
            && let Some((_, tell)) = waiting.remove(&nonce)
        {
            // Whoever waited may have given up at this moment.
            let _ = tell.try_send(());
        }
    }

    /// A peer is gone: whoever waits for it learns so at once.
    pub(super) fn forget(&self, peer: PeerId) {
        self.lock().retain(|_, (asked, _)| *asked != peer);
    }
}

impl Hub {
    /// Sends a ping and waits for its answer; how long that took.
    pub(super) fn probe(&self, peer: PeerId, timeout: Duration) -> Result<Duration, ProbeError> {
        let nonce = PROBE | self.probes.sent.fetch_add(1, Ordering::Relaxed);
        let (tell, told) = bounded(1);
        self.probes.lock().insert(nonce, (peer, tell));
        // Looked up after the probe is known, so that a peer that goes meanwhile takes the probe with it.
        let started = clock::now();
        let answer = match self.link(peer) {
            None => Err(ProbeError::UnknownPeer),
            Some(link) => {
                // A full outbox or a broken stream answers nothing, and is the control thread's to end.
                let _ = link.queue(&Control::Ping { nonce });
                let _ = link.flush();
                told.recv_timeout(timeout).map_err(|why| match why {
                    RecvTimeoutError::Timeout => ProbeError::Silent { waited: timeout },
                    RecvTimeoutError::Disconnected => ProbeError::UnknownPeer,
                })
            }
        };
        self.probes.lock().remove(&nonce);
        answer.map(|()| clock::now().since(started))
    }
}

#[cfg(test)]
mod tests {
    use super::{PROBE, Probes};
    use crate::ids::PeerId;
    use crossbeam_channel::{TryRecvError, bounded};

    #[test]
    fn an_answer_counts_for_its_own_peer_and_once() {
        let probes = Probes::default();
        let (tell, told) = bounded(1);
        probes.lock().insert(PROBE, (PeerId(1), tell));
        probes.answered(PeerId(2), PROBE);
        assert_eq!(
            told.try_recv(),
            Err(TryRecvError::Empty),
            "another peer's word"
        );
        probes.answered(PeerId(1), PROBE | 7);
        assert_eq!(told.try_recv(), Err(TryRecvError::Empty), "another ping's");
        probes.answered(PeerId(1), PROBE);
        assert_eq!(told.try_recv(), Ok(()));
        probes.answered(PeerId(1), PROBE);
        assert_eq!(told.try_recv(), Err(TryRecvError::Disconnected));
    }

    #[test]
    fn a_peer_that_goes_takes_its_probes_with_it() {
        let probes = Probes::default();
        let (tell, told) = bounded(1);
        let (other, others) = bounded(1);
        probes.lock().insert(PROBE, (PeerId(1), tell));
        probes.lock().insert(PROBE | 1, (PeerId(2), other));
        probes.forget(PeerId(1));
        assert_eq!(told.try_recv(), Err(TryRecvError::Disconnected));
        assert_eq!(others.try_recv(), Err(TryRecvError::Empty));
    }
}
