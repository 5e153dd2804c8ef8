//! The rank table of one prefill instance, and the rules by which a restarted instance replaces it.
//!
//! # Generations
//! Stock SGLang keeps one table per process: the first row freezes the topology and every registration counts, so a
//! restarted instance is mixed with its dead predecessor. Here the rows of one topology form a *generation*. One
//! generation is *live* (it answers queries); rows that disagree with it are *parked* with others of their own topology.
//!
//! A row of stock SGLang is written once and never renewed, so age says nothing about its owner; a row of our own ranks
//! carries a lease (`X-KVTransfer-Lease-Seconds`) and is renewed. A row ends when
//! * E1 a row of the same rank and an agreeing topology replaces it (last writer wins, and it still counts once),
//! * E2 its lease runs out, or its owner withdraws it (a lease of `0` from the same address),
//! * E3 a parked row registers the very address and port it names: that socket has a new owner, or
//! * E4 a probe finds that nobody listens there (the edge asks [`Registry::probe`] and reports
//!   [`Registry::mark_dead`]); evidence counts for [`DEATH_EVIDENCE_TTL`].
//!
//! E1 and E2 remove the row; E3 and E4 only make it *dead* for the following rules:
//! * G1 A live generation without rows ends; the newest parked one, complete ones first, takes its place.
//! * G2 A complete parked generation replaces the live one when every live row is dead (E3, E4).
//! * G3 A complete parked generation replaces a live one that never was complete and has fewer rows. So one stray row
//!   cannot hold a place for ever, nor push away an instance that is still starting.
//! * G4 Nothing else displaces a live generation: a stray row, or a whole stray instance, stays parked while one leased
//!   or listening rank of the live one exists, and is forgotten after [`RegistryLimits::parked_ttl`].
//!
//! Rows that agree on the topology but not on the allocation policy or the DSpark layout are refused with SGLang's own
//! 400 texts. The refusal makes the registry *contested* for [`CONTEST_TTL`]; if all live rows are found dead meanwhile,
//! the generation ends and the sender's next attempt (SGLang tries for about 15 s) starts a new one.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::time::Duration;

use super::generation::Generation;
use super::rooms::Rooms;
use super::row::Row;

/// Generations parked at a time; the least recently written one gives way. Each costs at most a rank table.
pub const PARKED_MAX: usize = 4;
/// Longest lease a rank may ask for; a row nobody renews should not outlive a coffee break.
pub const LEASE_SECONDS_MAX: u64 = 3600;
/// How long a probe's finding counts. Two probe rounds at the slowest pace fit in.
pub const DEATH_EVIDENCE_TTL: Duration = Duration::from_secs(60);
/// How long a refused row keeps probes going: twice the time SGLang keeps trying.
pub const CONTEST_TTL: Duration = Duration::from_secs(30);
/// Bytes of an instance identity.
pub const INSTANCE_BYTES_MAX: usize = 128;

/// Bounds of a [`Registry`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct RegistryLimits {
    /// How long `room → dp rank` is kept. Default 120 s, SGLang's
    /// `SGLANG_DISAGGREGATION_BOOTSTRAP_ENTRY_CLEANUP_INTERVAL`.
    pub room_ttl: Duration,
    /// Rooms held at a time. Default 1 048 576: 8 700 requests a second at the default time to live, about 80 MB when full.
    pub rooms_max: usize,
    /// How long parked rows are kept after their generation's last write. Default 600 s: a rolling restart that keeps
    /// the old pods this long after the new ones registered is not a restart.
    pub parked_ttl: Duration,
}

impl Default for RegistryLimits {
    fn default() -> Self {
        Self {
            room_ttl: Duration::from_secs(120),
            rooms_max: 1 << 20,
            parked_ttl: Duration::from_secs(600),
        }
    }
}

/// How long a row is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lease {
    /// Until something shows that its owner died: a rank of stock SGLang.
    Permanent,
    /// This long, unless written again.
    For(Duration),
    /// Not at all: the owner leaves.
    Withdraw,
}

impl Lease {
    /// Reads the lease header: seconds, `0` to withdraw, absent for [`Lease::Permanent`].
    ///
    /// # Errors
    /// [`LeaseError`] when it is no number of seconds up to [`LEASE_SECONDS_MAX`].
    pub fn parse(header: Option<&str>) -> Result<Self, LeaseError> {
        match header.map(|text| text.trim().parse::<u64>()) {
            None => Ok(Self::Permanent),
            Some(Ok(0)) => Ok(Self::Withdraw),
            Some(Ok(seconds)) if seconds <= LEASE_SECONDS_MAX => {
                Ok(Self::For(Duration::from_secs(seconds)))
            }
            Some(_) => Err(LeaseError),
        }
    }
}

/// The lease header is no usable number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("X-KVTransfer-Lease-Seconds must be a whole number from 0 to {LEASE_SECONDS_MAX}")]
pub struct LeaseError;

/// Why a well-formed row is not written. The texts are SGLang's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// `dsv41_spec_layout` differs from that of the rows already there.
    #[error("DeepSeek-V4.1 DSpark PD layout differs across prefill ranks")]
    SpecLayout,
    /// `decode_allocation_policy` differs from that of the rows already there.
    #[error("Inconsistent prefill allocation policies")]
    AllocationPolicy,
}

/// Where a row went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Registered {
    /// Into the generation that answers queries.
    Live,
    /// Beside it, because its topology disagrees.
    Parked,
    /// It was a withdrawal.
    Withdrawn,
}

/// What the edge should find out before the registry can decide.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// Rows to try to connect to: their serial and their address.
    pub rows: Vec<(u64, SocketAddr)>,
    /// A rank of the successor. An address that does not answer counts as dead only if this one does; a refused
    /// connection always counts.
    pub control: Option<SocketAddr>,
}

/// The rank table, its generations, and the room table.
#[derive(Debug)]
pub struct Registry {
    limits: RegistryLimits,
    live: Option<Generation>,
    parked: Vec<Generation>,
    /// Number of the live generation; counts from 1.
    number: u64,
    serial: u64,
    /// Earliest moment at which a lease or a parked generation may end.
    next_end: Option<Duration>,
    contested_until: Option<Duration>,
    rooms: Rooms,
}

impl Registry {
    /// An empty registry.
    #[must_use]
    pub fn new(limits: RegistryLimits) -> Self {
        Self {
            rooms: Rooms::new(limits.rooms_max, limits.room_ttl),
            limits,
            live: None,
            parked: Vec::new(),
            number: 0,
            serial: 0,
            next_end: None,
            contested_until: None,
        }
    }

    /// Writes, parks or withdraws a row.
    ///
    /// # Errors
    /// [`Refusal`] when the row agrees on the topology but not on policy or DSpark layout; nothing changes then.
    pub fn register(
        &mut self,
        row: Row,
        lease: Lease,
        instance: Option<String>,
        now: Duration,
    ) -> Result<Registered, Refusal> {
        self.end_overdue(now);
        if lease == Lease::Withdraw {
            for generation in self.live.iter_mut().chain(&mut self.parked) {
                generation.withdraw(&row);
            }
            self.settle(now);
            return Ok(Registered::Withdrawn);
        }
        self.serial += 1;
        let live = self.live.get_or_insert_with(|| {
            self.number += 1;
            Generation::new(&row, now)
        });
        let (generation, place) = if live.topology.agrees_with(&row.topology) {
            (live, Registered::Live)
        } else {
            (
                parking_place(&mut self.parked, &row, now),
                Registered::Parked,
            )
        };
        let written = generation.admit(row, lease.ends(now), instance, self.serial, now);
        if written.is_err() {
            self.contested_until = Some(now.saturating_add(CONTEST_TTL));
        }
        self.settle(now);
        written.map(|()| place)
    }

    /// The generation that answers queries, and its number.
    pub fn live(&mut self, now: Duration) -> Option<(u64, &mut Generation)> {
        self.end_overdue(now);
        let number = self.number;
        self.live.as_mut().map(|generation| (number, generation))
    }

    /// The room table.
    pub fn rooms(&mut self) -> &mut Rooms {
        &mut self.rooms
    }

    /// Generations waiting for the live one to die.
    #[must_use]
    pub fn parked_count(&self) -> usize {
        self.parked.len()
    }

    /// Which live ranks stand in the way of a complete successor (or of a row just refused) without a lease to vouch
    /// for them; `None` when nothing is to be found out.
    pub fn probe(&mut self, now: Duration) -> Option<Probe> {
        self.end_overdue(now);
        let live = self.live.as_ref()?;
        let successor = self.parked.iter().find(|generation| generation.is_ready());
        let is_contested = self.contested_until.is_some_and(|until| now < until);
        let vouched = live.rows.values().any(|entry| entry.expires.is_some());
        if vouched || (successor.is_none() && !is_contested) {
            return None;
        }
        let rows: Vec<_> = live
            .rows
            .values()
            .filter(|entry| !entry.is_found_dead(now))
            .filter_map(|entry| Some((entry.serial, entry.socket()?)))
            .collect();
        let control = successor.and_then(|generation| {
            generation
                .rows
                .values()
                .find_map(super::generation::Entry::socket)
        });
        (!rows.is_empty()).then_some(Probe { rows, control })
    }

    /// Records that nobody listens at the addresses of these rows (E4).
    pub fn mark_dead(&mut self, serials: &HashSet<u64>, now: Duration) {
        for entry in self.live.iter_mut().flat_map(|live| live.rows.values_mut()) {
            if serials.contains(&entry.serial) {
                entry.found_dead = Some(now);
            }
        }
        self.settle(now);
    }

    /// Ends what is overdue; costs one comparison when nothing is.
    fn end_overdue(&mut self, now: Duration) {
        if self.next_end.is_some_and(|at| at <= now) {
            self.settle(now);
        }
    }

    /// Applies E2 and G1 to G3 after a change, and finds the next moment something ends by itself.
    fn settle(&mut self, now: Duration) {
        let parked_ttl = self.limits.parked_ttl;
        if let Some(live) = &mut self.live {
            live.expire(now);
        }
        self.parked.retain_mut(|generation| {
            generation.expire(now);
            !generation.rows.is_empty() && now.saturating_sub(generation.last_write) < parked_ttl
        });
        self.end_contested(now);
        if self.live.as_ref().is_none_or(|live| live.rows.is_empty()) {
            let heir = (0..self.parked.len())
                .max_by_key(|&at| (self.parked[at].is_ready(), self.parked[at].last_write));
            self.live = None;
            if let Some(at) = heir {
                self.promote(at);
            }
        } else {
            self.displace(now);
        }
        let lease_end = self
            .live
            .iter()
            .chain(&self.parked)
            .flat_map(|generation| generation.rows.values())
            .filter_map(|entry| entry.expires)
            .min();
        let parked_end = self
            .parked
            .iter()
            .map(|generation| generation.last_write.saturating_add(parked_ttl))
            .min();
        self.next_end = lease_end.into_iter().chain(parked_end).min();
    }

    /// A contested generation whose ranks are all gone ends, so that the refused sender's retry can start a new one.
    fn end_contested(&mut self, now: Duration) {
        let is_contested = self.contested_until.is_some_and(|until| now < until);
        if is_contested
            && self
                .live
                .as_ref()
                .is_some_and(|live| live.is_dead_beside(None, now))
        {
            self.live = None;
            self.contested_until = None;
        }
    }

    /// G2 and G3.
    fn displace(&mut self, now: Duration) {
        let Some(live) = &self.live else { return };
        let heir = (0..self.parked.len())
            .filter(|&at| {
                let successor = &self.parked[at];
                successor.is_ready()
                    && (live.is_dead_beside(Some(successor), now)
                        || (!live.was_ready && live.row_count() < successor.row_count()))
            })
            .max_by_key(|&at| self.parked[at].last_write);
        if let Some(at) = heir {
            let is_dead = live.is_dead_beside(self.parked.get(at), now);
            let old = self.live.take();
            self.promote(at);
            // A generation that was still starting may yet prove the better one; a dead one may not.
            self.parked.extend(old.filter(|_| !is_dead));
        }
    }

    fn promote(&mut self, at: usize) {
        self.live = Some(self.parked.swap_remove(at));
        self.number += 1;
        self.contested_until = None;
    }
}

/// The parked generation that agrees with the row, making room for a new one if none does.
fn parking_place<'a>(
    parked: &'a mut Vec<Generation>,
    row: &Row,
    now: Duration,
) -> &'a mut Generation {
    let at = parked
        .iter()
        .position(|generation| generation.topology.agrees_with(&row.topology))
        .unwrap_or_else(|| {
            if parked.len() >= PARKED_MAX
                && let Some(oldest) = (0..parked.len()).min_by_key(|&at| parked[at].last_write)
            {
                parked.swap_remove(oldest);
            }
            parked.push(Generation::new(row, now));
            parked.len() - 1
        });
    &mut parked[at]
}

#[cfg(test)]
mod tests;
