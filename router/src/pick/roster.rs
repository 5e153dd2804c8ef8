//! The pool's workers on the board.
#![forbid(unsafe_code)]

use std::sync::Arc;

use super::{Inner, Seat};
use crate::config::scheduling::Nominal;
use crate::pool::{Role, Worker, Workers};
use crate::schedule::facts::{self, Facts, RANKS_MAX};

impl Inner {
    pub(super) fn sync(&mut self, role: Role, workers: &Workers, nominal: &Nominal) {
        let (seats, board_role) = match role {
            Role::Prefill => (&mut self.prefills, facts::Role::Prefill),
            Role::Decode => (&mut self.decodes, facts::Role::Decode),
            Role::Other => return,
        };
        let here = workers.of_role(role);
        seats.retain(|seat| {
            let stays = here.iter().any(|worker| Arc::ptr_eq(worker, &seat.worker));
            if !stays {
                self.board.leave(seat.id);
            }
            stays
        });
        for worker in here {
            if seats.iter().any(|seat| Arc::ptr_eq(worker, &seat.worker)) {
                continue;
            }
            let version = worker.version();
            match self.board.join(facts_of(worker, board_role, nominal)) {
                Ok(id) => seats.push(Seat {
                    worker: Arc::clone(worker),
                    id,
                    ready: false,
                    version,
                }),
                Err(error) => {
                    tracing::error!(name = worker.name(), %error, "this worker gets no requests");
                }
            }
        }
    }

    /// Tells the board what the pool knows by now.
    pub(super) fn refresh(&mut self, nominal: &Nominal) {
        for (seats, role) in [
            (&mut self.prefills, facts::Role::Prefill),
            (&mut self.decodes, facts::Role::Decode),
        ] {
            for seat in seats {
                let version = seat.worker.version();
                if seat.version != version {
                    seat.version = version;
                    let facts = facts_of(&seat.worker, role, nominal);
                    if let Err(error) = self.board.revise(seat.id, facts) {
                        tracing::warn!(name = seat.worker.name(), %error, "its description is not believed");
                    }
                }
                let ready = seat.worker.is_ready() && !seat.worker.is_draining();
                if seat.ready != ready {
                    seat.ready = ready;
                    self.board.set_ready(seat.id, ready);
                }
            }
        }
    }
}

/// What the board is told of a worker: what it said of itself, else the nominal values.
fn facts_of(worker: &Worker, role: facts::Role, nominal: &Nominal) -> Facts {
    Facts {
        dp_size: worker.dp_size().min(RANKS_MAX),
        kv_bytes_per_token: nominal.kv_bytes_per_token,
        page_tokens: worker.page_tokens().unwrap_or(nominal.page_tokens),
        bytes_per_s: nominal.link_bytes_per_s,
        prefill_tokens_per_s: nominal.prefill_tokens_per_s,
        kv_tokens_max: worker.kv_tokens().or(nominal.kv_tokens),
        zone: worker.zone(),
        ..Facts::new(worker.name(), role)
    }
}
