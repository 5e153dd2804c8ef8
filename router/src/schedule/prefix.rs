//! Which prefill workers have seen the beginning of a prompt: a trie over chunks of its bytes.
//!
//! A node stands for a whole beginning and is named by the chain of its chunks' hashes, so no prompt is stored and a
//! look-up costs one map access per chunk. Two prompts of one name would only cause a wrong guess.
#![forbid(unsafe_code)]

use std::collections::HashMap;

use super::dice::mix;
use super::facts::WORKERS_MAX;
use super::recent::Recent;
use super::sample::KvEvent;

/// Bytes per chunk: about 64 tokens of text, one page of many engines.
pub const CHUNK_BYTES: usize = 256;

/// Chunks of a prompt that are looked at: its first MiB. Longer agreement changes no decision.
pub const CHUNKS_MAX: usize = 4096;

/// Nodes that are remembered; about 4 MiB of memory.
pub const NODES_MAX: usize = 1 << 16;

/// Blocks of one rank's own reports that are remembered, to understand what it evicts; about 2 MiB.
pub const REPORTED_MAX: usize = 1 << 15;

const WORDS: usize = WORKERS_MAX / 64;

/// A set of prefill slots.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Slots([u64; WORDS]);

impl Slots {
    const ALL: Self = Self([u64::MAX; WORDS]);

    fn set(&mut self, slot: usize, held: bool) {
        if held {
            self.0[slot / 64] |= 1 << (slot % 64);
        } else {
            self.0[slot / 64] &= !(1 << (slot % 64));
        }
    }

    fn is_empty(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }
}

/// The hashes of a prompt's whole chunks, at most [`CHUNKS_MAX`]. The rest of less than a chunk does not count.
pub fn chunks_of_bytes(prompt: &[u8]) -> Vec<u64> {
    prompt
        .chunks_exact(CHUNK_BYTES)
        .take(CHUNKS_MAX)
        .map(|chunk| {
            let (words, _) = chunk.as_chunks::<8>();
            words
                .iter()
                .fold(0, |hash, word| mix(hash ^ u64::from_le_bytes(*word)))
        })
        .collect()
}

/// The hashes of a tokenised prompt's whole blocks of `block_tokens`, at most [`CHUNKS_MAX`].
pub fn chunks_of_tokens(tokens: &[u32], block_tokens: usize) -> Vec<u64> {
    tokens
        .chunks_exact(block_tokens.max(1))
        .take(CHUNKS_MAX)
        .map(|block| {
            block
                .iter()
                .fold(0, |hash, token| mix(hash ^ u64::from(*token)))
        })
        .collect()
}

const fn child(parent: u64, chunk: u64) -> u64 {
    mix(parent.rotate_left(17) ^ chunk)
}

/// Writes `depth` for every slot whose bit is set.
fn mark(matched: &mut [u32], word: usize, mut bits: u64, depth: u32) {
    if depth == 0 {
        return;
    }
    while bits != 0 {
        matched[word * 64 + bits.trailing_zeros() as usize] = depth;
        bits &= bits - 1;
    }
}

/// The trie.
#[derive(Debug)]
pub(super) struct PrefixTrie {
    nodes: Recent<u64, Slots>,
    /// By prefill slot.
    reported: HashMap<usize, Vec<Report>>,
}

/// What one data-parallel rank told of its cache.
#[derive(Debug)]
struct Report {
    rank: u32,
    /// What is not here is not in its cache either.
    is_whole: bool,
    /// The engine's block hashes and our nodes.
    nodes: Recent<u64, u64>,
}

impl Report {
    fn new(rank: u32, is_whole: bool) -> Self {
        Self {
            rank,
            is_whole,
            nodes: Recent::new(REPORTED_MAX),
        }
    }
}

impl Default for PrefixTrie {
    fn default() -> Self {
        Self {
            nodes: Recent::new(NODES_MAX),
            reported: HashMap::new(),
        }
    }
}

impl PrefixTrie {
    /// Remembers that the prefill in `slot` has these chunks.
    pub(super) fn learn(&mut self, slot: usize, chunks: &[u64]) {
        let mut node = 0;
        for chunk in chunks.iter().take(CHUNKS_MAX) {
            node = child(node, *chunk);
            self.hold(slot, node);
        }
    }

    fn hold(&mut self, slot: usize, node: u64) {
        if let Some(slots) = self.nodes.touch(node) {
            slots.set(slot, true);
        } else {
            let mut slots = Slots::default();
            slots.set(slot, true);
            self.nodes.insert(node, slots);
        }
    }

    /// Puts into `matched`, by slot, how many chunks from the start each prefill has; 0 for all others.
    pub(super) fn matches(&self, chunks: &[u64], matched: &mut Vec<u32>) {
        matched.clear();
        matched.resize(WORKERS_MAX, 0);
        let mut holders = Slots::ALL;
        let mut node = 0;
        let mut depth = 0;
        for chunk in chunks.iter().take(CHUNKS_MAX) {
            node = child(node, *chunk);
            let next = self.nodes.peek(&node).copied().unwrap_or_default();
            let mut kept = Slots::default();
            for word in 0..WORDS {
                kept.0[word] = holders.0[word] & next.0[word];
                mark(matched, word, holders.0[word] & !next.0[word], depth);
            }
            if kept.is_empty() {
                return;
            }
            holders = kept;
            depth += 1;
        }
        for (word, bits) in holders.0.into_iter().enumerate() {
            mark(matched, word, bits, depth);
        }
    }

    /// Whether this prefill reports its cache itself.
    pub(super) fn reports(&self, slot: usize) -> bool {
        self.reported.contains_key(&slot)
    }

    /// Whether this prefill has reported everything that is in its cache.
    pub(super) fn reports_all(&self, slot: usize) -> bool {
        let reports = self.reported.get(&slot);
        reports.is_some_and(|reports| reports.iter().all(|report| report.is_whole))
    }

    /// How many blocks this prefill reported.
    pub(super) fn reported(&self, slot: usize) -> Option<usize> {
        let reports = self.reported.get(&slot)?;
        Some(reports.iter().map(|report| report.nodes.len()).sum())
    }

    /// Takes in a report of a rank of the prefill in `slot`.
    pub(super) fn report(&mut self, slot: usize, rank: u32, event: &KvEvent) {
        match event {
            KvEvent::Stored { parent, blocks } => {
                let reported = self.report_of(slot, rank);
                let mut node = match parent {
                    None => 0,
                    Some(hash) => match reported.nodes.touch(*hash) {
                        Some(node) => *node,
                        // The beginning was stored before we listened: where this hangs cannot be known.
                        None => return,
                    },
                };
                let mut held = Vec::with_capacity(blocks.len().min(CHUNKS_MAX));
                for (hash, chunk) in blocks.iter().take(CHUNKS_MAX) {
                    node = child(node, *chunk);
                    reported.nodes.insert(*hash, node);
                    held.push(node);
                }
                for node in held {
                    self.hold(slot, node);
                }
            }
            KvEvent::Removed { hashes } => {
                for hash in hashes {
                    if let Some(node) = self.report_of(slot, rank).nodes.remove(hash) {
                        self.let_go(slot, *hash, node);
                    }
                }
            }
            KvEvent::Cleared => {
                self.lose(slot, rank);
                if !self.reports(slot) {
                    // What was guessed of it is gone too.
                    self.clear(slot);
                }
                let reports = self.reported.entry(slot).or_default();
                reports.push(Report::new(rank, true));
            }
            KvEvent::Begins { whole } => {
                self.lose(slot, rank);
                let reports = self.reported.entry(slot).or_default();
                reports.push(Report::new(rank, *whole));
            }
            KvEvent::Lost => self.lose(slot, rank),
        }
    }

    fn report_of(&mut self, slot: usize, rank: u32) -> &mut Report {
        let reports = self.reported.entry(slot).or_default();
        let known = reports.iter().position(|report| report.rank == rank);
        let index = known.unwrap_or_else(|| {
            reports.push(Report::new(rank, false));
            reports.len() - 1
        });
        &mut reports[index]
    }

    /// One rank has this block no more; another one may.
    fn let_go(&mut self, slot: usize, hash: u64, node: u64) {
        let mut reports = self.reported.get(&slot).into_iter().flatten();
        if reports.any(|report| report.nodes.peek(&hash).is_some()) {
            return;
        }
        if let Some(slots) = self.nodes.touch(node) {
            slots.set(slot, false);
        }
    }

    /// Forgets what one rank reported.
    fn lose(&mut self, slot: usize, rank: u32) {
        let Some(reports) = self.reported.get_mut(&slot) else {
            return;
        };
        let Some(index) = reports.iter().position(|report| report.rank == rank) else {
            return;
        };
        let mut lost = reports.swap_remove(index).nodes;
        if reports.is_empty() {
            self.reported.remove(&slot);
        }
        lost.retain(|hash, node| {
            self.let_go(slot, *hash, *node);
            false
        });
    }

    /// Forgets everything of a prefill that left.
    pub(super) fn forget(&mut self, slot: usize) {
        self.reported.remove(&slot);
        self.clear(slot);
    }

    fn clear(&mut self, slot: usize) {
        self.nodes.retain(|_, slots| {
            slots.set(slot, false);
            !slots.is_empty()
        });
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.nodes.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matched(trie: &PrefixTrie, chunks: &[u64], slot: usize) -> u32 {
        let mut all = Vec::new();
        trie.matches(chunks, &mut all);
        all[slot]
    }

    #[test]
    fn the_longest_beginning_of_each_worker_is_found() {
        let mut trie = PrefixTrie::default();
        trie.learn(3, &[1, 2, 3, 4]);
        trie.learn(200, &[1, 2]);
        assert_eq!(matched(&trie, &[1, 2, 3, 9], 3), 3);
        assert_eq!(matched(&trie, &[1, 2, 3, 9], 200), 2);
        assert_eq!(matched(&trie, &[1, 2, 3, 9], 4), 0);
        assert_eq!(matched(&trie, &[2, 3], 3), 0, "a middle is no beginning");
        trie.forget(3);
        assert_eq!(matched(&trie, &[1, 2, 3, 4], 3), 0);
        assert_eq!(matched(&trie, &[1, 2, 3, 4], 200), 2);
    }

    #[test]
    fn memory_is_bounded_and_popular_beginnings_survive() {
        let mut trie = PrefixTrie::default();
        let system: Vec<u64> = (0..8).collect();
        for request in 0..40_000_u64 {
            let mut prompt = system.clone();
            prompt.extend([mix(request), mix(request + 1), mix(request + 2)]);
            trie.learn(0, &prompt);
            assert!(trie.len() <= NODES_MAX);
        }
        assert_eq!(matched(&trie, &system, 0), 8);
        let first = [system.as_slice(), &[mix(0), mix(1), mix(2)]].concat();
        assert_eq!(
            matched(&trie, &first, 0),
            8,
            "what was used once is forgotten"
        );
    }

    #[test]
    fn bytes_agree_up_to_the_chunk_that_differs() {
        let mut text = vec![b'a'; 10 * CHUNK_BYTES + 17];
        let chunks = chunks_of_bytes(&text);
        assert_eq!(chunks.len(), 10);
        text[5 * CHUNK_BYTES + 3] = b'b';
        let other = chunks_of_bytes(&text);
        let same = chunks
            .iter()
            .zip(&other)
            .take_while(|(a, b)| a == b)
            .count();
        assert_eq!(same, 5);
        assert_eq!(chunks_of_bytes(&vec![0; 3 << 20]).len(), CHUNKS_MAX);
        assert_eq!(chunks_of_tokens(&[1, 2, 3, 4, 5], 2).len(), 2);
        assert_eq!(chunks_of_tokens(&[1, 2], 0).len(), 2);
    }

    #[test]
    fn reported_blocks_follow_the_engine() {
        let mut trie = PrefixTrie::default();
        let blocks = |hashes: &[u64]| hashes.iter().map(|hash| (*hash, hash * 10)).collect();
        assert!(!trie.reports(1));
        trie.report(
            1,
            0,
            &KvEvent::Stored {
                parent: None,
                blocks: blocks(&[5, 6]),
            },
        );
        trie.report(
            1,
            0,
            &KvEvent::Stored {
                parent: Some(6),
                blocks: blocks(&[7]),
            },
        );
        trie.report(
            1,
            0,
            &KvEvent::Stored {
                parent: Some(999),
                blocks: blocks(&[8]),
            },
        );
        assert!(trie.reports(1));
        assert_eq!(matched(&trie, &[50, 60, 70, 80], 1), 3);
        trie.report(
            1,
            0,
            &KvEvent::Removed {
                hashes: vec![7, 1234],
            },
        );
        assert_eq!(matched(&trie, &[50, 60, 70], 1), 2);
        trie.report(1, 0, &KvEvent::Cleared);
        assert_eq!(matched(&trie, &[50, 60, 70], 1), 0);
    }

    #[test]
    fn each_rank_reports_for_itself_and_may_be_lost() {
        let mut trie = PrefixTrie::default();
        let stored = |hashes: &[u64]| KvEvent::Stored {
            parent: None,
            blocks: hashes.iter().map(|hash| (*hash, hash * 10)).collect(),
        };
        trie.learn(2, &[7, 8]);
        for rank in 0..2 {
            trie.report(2, rank, &KvEvent::Begins { whole: rank == 0 });
            trie.report(2, rank, &stored(&[5, 6]));
        }
        assert!(trie.reports(2) && !trie.reports_all(2));
        assert_eq!(trie.reported(2), Some(4));
        let removed = KvEvent::Removed { hashes: vec![6] };
        trie.report(2, 0, &removed);
        assert_eq!(matched(&trie, &[50, 60], 2), 2, "the other rank has it");
        trie.report(2, 1, &removed);
        assert_eq!(matched(&trie, &[50, 60], 2), 1);
        // A rank that is lost, or begins anew, takes along what only it told; what was guessed stays.
        trie.report(2, 0, &KvEvent::Lost);
        assert_eq!(matched(&trie, &[50, 60], 2), 1);
        trie.report(2, 1, &KvEvent::Begins { whole: true });
        assert_eq!(matched(&trie, &[50, 60], 2), 0);
        assert!(trie.reports_all(2));
        trie.report(2, 1, &KvEvent::Lost);
        assert!(!trie.reports(2));
        assert_eq!(matched(&trie, &[7, 8], 2), 2);
    }

    #[test]
    fn reports_are_bounded() {
        let mut trie = PrefixTrie::default();
        trie.report(0, 0, &KvEvent::Begins { whole: true });
        for hash in 0..3 * REPORTED_MAX as u64 {
            let blocks = vec![(hash, mix(hash))];
            let parent = None;
            trie.report(0, 0, &KvEvent::Stored { parent, blocks });
        }
        assert!(trie.reported(0).unwrap() <= REPORTED_MAX);
        assert!(trie.len() <= NODES_MAX);
    }
}
