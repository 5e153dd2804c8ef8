//! Samples: what workers tell of their queues.
#![forbid(unsafe_code)]

use super::super::facts::{RANKS_MAX, Role};
use super::super::sample::{KvPool, LINKS_MAX, Link, RankQueue, SOURCES_MAX, Sample};
use super::{Board, Pool, Prefill, Queue, Source};

/// Why a sample was not taken in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IngestError {
    /// The worker is not on the board.
    #[error("the sample's worker is not on the board")]
    UnknownWorker,
    /// It is not newer than what is known.
    #[error("the sample is not newer than the last one of its source")]
    Old,
    /// More sources or links than a worker can have.
    #[error("more than {SOURCES_MAX} sources or {LINKS_MAX} links of one worker")]
    TooMany,
}

impl Board {
    /// Takes in a sample. What it says of unknown peers and ranks is left out.
    ///
    /// # Errors
    /// [`IngestError`]; the board is as before.
    pub fn ingest(&mut self, sample: &Sample<'_>) -> Result<(), IngestError> {
        let (role, slot) = *self
            .ids
            .get(&sample.worker)
            .ok_or(IngestError::UnknownWorker)?;
        if sample.links.is_some_and(|links| links.len() > LINKS_MAX) {
            return Err(IngestError::TooMany);
        }
        let at = sample.at.as_secs_f64();
        let sources = match role {
            Role::Prefill => &mut self.prefills[slot].sources,
            Role::Decode => &mut self.decodes[slot].sources,
        };
        let source = accept(sources, sample, at)?;
        match role {
            Role::Prefill => {
                if let Some(queues) = sample.queues {
                    self.take_queues(slot, queues, at);
                }
                if let Some(links) = sample.links {
                    self.take_links(slot, source, links, sample.tells_rooms, at);
                    // Here and not at the decision, which shall not wait for sums over samples.
                    self.refresh_row(slot, at);
                }
            }
            Role::Decode => {
                if let Some(pool) = sample.pool {
                    self.take_pool(slot, source, pool);
                }
            }
        }
        Ok(())
    }

    /// Forgets a source for good, such as a rank that is no more. A stream that merely broke need not be told: its
    /// samples grow stale by themselves.
    pub fn forget_source(&mut self, worker: super::WorkerId, source: u32) {
        match self.ids.get(&worker) {
            Some((Role::Prefill, slot)) => {
                let prefill = &mut self.prefills[*slot];
                prefill.sources.retain(|known| known.number != source);
                sum_links(prefill);
                prefill.row_at = None;
            }
            Some((Role::Decode, slot)) => {
                let slot = *slot;
                self.decodes[slot]
                    .sources
                    .retain(|known| known.number != source);
                self.sum_pools(slot);
            }
            None => {}
        }
    }

    fn take_queues(&mut self, slot: usize, queues: &[RankQueue], at: f64) {
        let prefill = &mut self.prefills[slot];
        for queue in queues {
            let rank = queue.rank as usize;
            if queue.rank >= prefill.facts.dp_size.min(RANKS_MAX) {
                continue;
            }
            if prefill.queues.len() <= rank {
                let unknown = Queue {
                    tokens: 0,
                    requests: 0,
                    at: f64::NEG_INFINITY,
                };
                prefill.queues.resize(rank + 1, unknown);
            }
            prefill.queues[rank] = Queue {
                tokens: queue.tokens,
                requests: queue.requests.max(u64::from(queue.tokens > 0)),
                at,
            };
        }
    }

    fn take_links(
        &mut self,
        slot: usize,
        source: usize,
        links: &[Link],
        tells_rooms: bool,
        at: f64,
    ) {
        let mut taken = self.prefills[slot].sources[source]
            .links
            .take()
            .unwrap_or_default();
        taken.clear();
        taken.extend(
            links
                .iter()
                .filter_map(|link| match self.ids.get(&link.peer) {
                    Some((Role::Decode, peer)) => Some((
                        *peer,
                        link.bytes_queued,
                        link.bytes_in_flight,
                        link.bytes_per_s,
                    )),
                    _ => None,
                }),
        );
        let prefill = &mut self.prefills[slot];
        prefill.sources[source].links = Some(taken);
        prefill.sources[source].tells_rooms = tells_rooms;
        sum_links(prefill);
        self.learn_reported(slot, at);
    }

    /// Learns the rates that changed with this sample.
    fn learn_reported(&mut self, slot: usize, at: f64) {
        let mut sums = std::mem::take(&mut self.scratch.rates);
        sums.clear();
        sums.resize(self.decodes.len(), (0.0, 0.0));
        let prefill = &self.prefills[slot];
        for source in &prefill.sources {
            let Some(links) = &source.links else { continue };
            // A peer's rails within one source add up; so do sources, but only as many as one request uses.
            let mut last = usize::MAX;
            for (peer, _, _, rate) in links {
                if rate.is_finite() && *rate > 0.0 {
                    sums[*peer].0 += rate;
                    sums[*peer].1 += f64::from(u8::from(last != *peer));
                    last = *peer;
                }
            }
        }
        let senders = f64::from(prefill.facts.senders.max(1));
        for (peer, (sum, count)) in sums.iter().enumerate() {
            if *count == 0.0 {
                continue;
            }
            let rate = sum / count * senders;
            if rate != self.prefills[slot].links[peer].reported {
                self.prefills[slot].links[peer].reported = rate;
                self.learn_rate(slot, peer, rate, at);
            }
        }
        self.scratch.rates = sums;
    }

    fn take_pool(&mut self, slot: usize, source: usize, pool: KvPool) {
        self.decodes[slot].sources[source].pool = Some(pool);
        self.sum_pools(slot);
    }

    fn sum_pools(&mut self, slot: usize) {
        let decode = &mut self.decodes[slot];
        let page = decode.facts.page_tokens.max(1);
        decode.pool = None;
        for source in &decode.sources {
            let Some(pool) = source.pool else { continue };
            let used = pool
                .pages
                .saturating_sub(pool.free_pages)
                .saturating_mul(page);
            let total = decode.pool.get_or_insert(Pool {
                tokens_used: 0,
                tokens: 0,
                requests: 0,
                at: f64::INFINITY,
            });
            total.tokens_used = total.tokens_used.saturating_add(used);
            total.tokens = total.tokens.saturating_add(pool.pages.saturating_mul(page));
            total.requests = total.requests.saturating_add(pool.requests);
            total.at = total.at.min(source.at);
        }
        if let Some(pool) = decode.pool {
            decode.unpictured.retain(|(_, start, _)| *start > pool.at);
        }
    }
}

/// The source's index, after its sample proved to be new.
fn accept(sources: &mut Vec<Source>, sample: &Sample<'_>, at: f64) -> Result<usize, IngestError> {
    let known = sources
        .iter()
        .position(|source| source.number == sample.source);
    let Some(index) = known else {
        if sources.len() >= SOURCES_MAX {
            return Err(IngestError::TooMany);
        }
        sources.push(Source {
            number: sample.source,
            epoch: sample.epoch,
            sequence: sample.sequence,
            at,
            links: None,
            tells_rooms: false,
            pool: None,
        });
        return Ok(sources.len() - 1);
    };
    let source = &mut sources[index];
    let old = if sample.epoch == source.epoch {
        sample.sequence <= source.sequence
    } else {
        // Epochs have no order of their own; a late sample of the engine's former life is told by its time.
        at <= source.at
    };
    if old {
        return Err(IngestError::Old);
    }
    source.epoch = sample.epoch;
    source.sequence = sample.sequence;
    source.at = at;
    Ok(index)
}

/// Adds a prefill's sources up.
fn sum_links(prefill: &mut Prefill) {
    for (slot, _) in prefill.busy.drain(..) {
        prefill.links[slot].bytes_queued = 0;
        prefill.links[slot].bytes_in_flight = 0;
    }
    prefill.pictured = None;
    for source in &prefill.sources {
        let Some(links) = &source.links else { continue };
        let (at, rooms) = prefill.pictured.unwrap_or((f64::INFINITY, true));
        prefill.pictured = Some((at.min(source.at), rooms && source.tells_rooms));
        for (peer, queued, in_flight, _) in links {
            if *queued == 0 && *in_flight == 0 {
                continue;
            }
            let link = &mut prefill.links[*peer];
            if link.bytes_queued == 0 && link.bytes_in_flight == 0 {
                prefill.busy.push((*peer, 0.0));
            }
            link.bytes_queued = link.bytes_queued.saturating_add(*queued);
            link.bytes_in_flight = link.bytes_in_flight.saturating_add(*in_flight);
        }
    }
}
