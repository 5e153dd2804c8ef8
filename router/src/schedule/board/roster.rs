//! Workers that come and go, and what is known of them beforehand.
#![forbid(unsafe_code)]

use super::super::facts::{Facts, Role, WORKERS_MAX, WorkerId};
use super::super::model::{Mean, PrefillModel};
use super::{Board, BoardError, Decode, LinkState, Prefill, zone_number};

impl Board {
    /// Takes a worker in. It is not ready yet.
    ///
    /// # Errors
    /// [`BoardError`]; the board is as before.
    pub fn join(&mut self, facts: Facts) -> Result<WorkerId, BoardError> {
        let name = facts.name.clone();
        if self.names.contains_key(&name) {
            return Err(BoardError::NameTaken { name });
        }
        if !facts.is_sane() {
            return Err(BoardError::Facts { name });
        }
        let id = WorkerId(self.next_id);
        let role = facts.role;
        let slot = match role {
            Role::Prefill => self.place_prefill(id, facts),
            Role::Decode => self.place_decode(id, facts),
        }
        .ok_or(BoardError::TooManyWorkers)?;
        self.next_id += 1;
        self.ids.insert(id, (role, slot));
        self.names.insert(name, id);
        self.forget_rows();
        Ok(id)
    }

    fn place_prefill(&mut self, id: WorkerId, facts: Facts) -> Option<usize> {
        let vacant = self
            .prefills
            .iter()
            .position(|prefill| prefill.id.is_none());
        let slot = vacant.unwrap_or(self.prefills.len());
        if slot == WORKERS_MAX {
            return None;
        }
        let prefill = Prefill {
            id: Some(id),
            zone: zone_number(&facts),
            facts,
            ready: false,
            jobs: Vec::new(),
            links: vec![LinkState::default(); self.decodes.len()],
            busy: Vec::new(),
            sources: Vec::new(),
            pictured: None,
            queues: Vec::new(),
            model: PrefillModel::default(),
            factor: Mean::default(),
            seconds_per_byte: Vec::new(),
            fastest: 0.0,
            row_at: None,
        };
        put(&mut self.prefills, slot, prefill);
        Some(slot)
    }

    fn place_decode(&mut self, id: WorkerId, facts: Facts) -> Option<usize> {
        let vacant = self.decodes.iter().position(|decode| decode.id.is_none());
        let slot = vacant.unwrap_or(self.decodes.len());
        if slot == WORKERS_MAX {
            return None;
        }
        let decode = Decode {
            id: Some(id),
            zone: zone_number(&facts),
            facts,
            ready: false,
            inbound: Vec::new(),
            booked_tokens: 0,
            booked_requests: 0,
            unpictured: Vec::new(),
            sources: Vec::new(),
            pool: None,
            admission: Mean::default(),
        };
        put(&mut self.decodes, slot, decode);
        for prefill in &mut self.prefills {
            prefill
                .links
                .resize(self.decodes.len(), LinkState::default());
        }
        Some(slot)
    }

    /// Other facts of a worker that stays: its name and role do not change.
    ///
    /// # Errors
    /// [`BoardError`]; the board is as before.
    pub fn revise(&mut self, id: WorkerId, facts: Facts) -> Result<(), BoardError> {
        if !facts.is_sane() {
            return Err(BoardError::Facts { name: facts.name });
        }
        let zone = zone_number(&facts);
        let replace = |known: &mut Facts| {
            let (name, role) = (std::mem::take(&mut known.name), known.role);
            *known = Facts {
                name,
                role,
                ..facts
            };
        };
        match self.ids.get(&id) {
            Some((Role::Prefill, slot)) => {
                let prefill = &mut self.prefills[*slot];
                replace(&mut prefill.facts);
                prefill.zone = zone;
                prefill.queues.truncate(prefill.facts.dp_size as usize);
            }
            Some((Role::Decode, slot)) => {
                replace(&mut self.decodes[*slot].facts);
                self.decodes[*slot].zone = zone;
            }
            None => {}
        }
        self.forget_rows();
        Ok(())
    }

    /// Forgets a worker with its bookings and everything learned of it.
    pub fn leave(&mut self, id: WorkerId) {
        let Some((role, slot)) = self.ids.remove(&id) else {
            return;
        };
        self.release_worker(role, slot);
        match role {
            Role::Prefill => {
                self.trie.forget(slot);
                let prefill = &mut self.prefills[slot];
                prefill.id = None;
                prefill.ready = false;
                prefill.busy.clear();
                self.names.remove(&prefill.facts.name);
            }
            Role::Decode => {
                let decode = &mut self.decodes[slot];
                decode.id = None;
                decode.ready = false;
                self.names.remove(&decode.facts.name);
                for prefill in &mut self.prefills {
                    prefill.links[slot] = LinkState::default();
                    prefill.busy.retain(|(busy, _)| *busy != slot);
                    for source in &mut prefill.sources {
                        if let Some(links) = &mut source.links {
                            links.retain(|link| link.0 != slot);
                        }
                    }
                }
            }
        }
    }

    /// Says whether a worker may get requests. Unknown ids are ignored.
    pub fn set_ready(&mut self, id: WorkerId, ready: bool) {
        match self.ids.get(&id) {
            Some((Role::Prefill, slot)) => self.prefills[*slot].ready = ready,
            Some((Role::Decode, slot)) => self.decodes[*slot].ready = ready,
            None => {}
        }
    }

    /// The worker of this name.
    pub fn named(&self, name: &str) -> Option<WorkerId> {
        self.names.get(name).copied()
    }

    /// The facts of a worker.
    pub fn facts(&self, id: WorkerId) -> Option<&Facts> {
        let (role, slot) = self.ids.get(&id)?;
        Some(match role {
            Role::Prefill => &self.prefills[*slot].facts,
            Role::Decode => &self.decodes[*slot].facts,
        })
    }
}

/// Puts a worker into its slot, which is vacant or the next one.
fn put<T>(slots: &mut Vec<T>, slot: usize, worker: T) {
    if slot == slots.len() {
        slots.push(worker);
    } else {
        slots[slot] = worker;
    }
}
