//! Who may serve a request at all: what the pool knows and the board does not.
#![forbid(unsafe_code)]

use std::sync::Arc;

use super::{BUSY_RETRY, Inner, NoPlace, Seat, Wish};
use crate::pool::Role;
use crate::pool::breaker::BreakerState;
use crate::schedule::WorkerId;

/// How well a ready worker suits a request, the best first.
const TIERS: [fn(&Seat, &Wish<'_>) -> bool; 3] = [
    |seat, wish| !is_excluded(seat, wish) && seat.worker.breaker_state() != BreakerState::Open,
    // When all are left out, all are tried: a refused request is no better than a failed one.
    |seat, wish| !is_excluded(seat, wish),
    |_, _| true,
];

fn is_excluded(seat: &Seat, wish: &Wish<'_>) -> bool {
    wish.excluded
        .iter()
        .any(|worker| Arc::ptr_eq(worker, &seat.worker))
}

fn is_in_subset(seat: &Seat, wish: &Wish<'_>) -> bool {
    wish.subset.is_none_or(|subset| {
        let authority = seat.worker.url().authority().as_str();
        subset.iter().any(|allowed| allowed == authority)
    })
}

impl Inner {
    /// The workers of `role` that may serve the request; `None` when all that are ready may. Only ready ones may: those whose
    /// breakers are not open and that have not failed it, if there are any, and of those the ones with room.
    pub(super) fn gate(
        &self,
        role: Role,
        wish: &Wish<'_>,
    ) -> Result<Option<Vec<WorkerId>>, NoPlace> {
        let seats = self.seats(role);
        if let Some(kept) = wish.kept
            && let Some(seat) = seats
                .iter()
                .find(|seat| seat.ready && Arc::ptr_eq(&seat.worker, kept))
        {
            return Ok(Some(vec![seat.id]));
        }
        // A subset speaks of what a client's gateway sees: decode workers, or both roles.
        let in_subset = |seat: &&Seat| role == Role::Prefill || is_in_subset(seat, wish);
        let ready = || seats.iter().filter(|seat| seat.ready).filter(in_subset);
        let count = ready().count();
        let Some(tier) = TIERS
            .iter()
            .find(|fits| ready().any(|seat| fits(seat, wish)))
        else {
            let unknown = seats
                .iter()
                .any(|seat| !seat.worker.is_probed() && !seat.worker.is_draining());
            return Err(if unknown {
                NoPlace::Busy {
                    retry_after: BUSY_RETRY,
                }
            } else {
                NoPlace::NoWorker(role)
            });
        };
        let may = |seat: &&Seat| tier(seat, wish) && seat.worker.has_room(wish.prompt_bytes);
        let ids: Vec<WorkerId> = ready().filter(may).map(|seat| seat.id).collect();
        if ids.is_empty() {
            return Err(NoPlace::Busy {
                retry_after: BUSY_RETRY,
            });
        }
        let all = ids.len() == count && wish.subset.is_none();
        Ok((!all).then_some(ids))
    }
}
