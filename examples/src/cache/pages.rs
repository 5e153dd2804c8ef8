//! Who owns which page: the free list, the prefix cache and the leases of live requests.
//!
//! The prefix cache is a trie with one page per node: a node's path spells the tokens from the start of the sequence,
//! so a page can be shared by every request whose prompt begins with exactly those tokens. A request takes a
//! [`Lease`] for its whole life (prompt and output), so a running request can never run out of memory; admission is
//! the only place that waits. Pages of the trie that no lease holds are evicted, the least recently used leaf first.
#![forbid(unsafe_code)]

use std::collections::{BTreeSet, HashMap};

use super::PageIndex;

/// The pages of one request. Give it back with [`PageCache::release`]; dropping it leaks its pages.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a dropped lease leaks its pages"]
pub struct Lease {
    /// All pages in order: first the shared ones, then the request's own.
    pages: Vec<PageIndex>,
    /// The trie nodes of the shared pages, in order.
    shared: Vec<NodeId>,
}

impl Lease {
    /// All pages of the request in order, shared ones first.
    #[must_use]
    pub fn pages(&self) -> &[PageIndex] {
        &self.pages
    }

    /// How many of the first pages came from the prefix cache. They are read-only.
    #[must_use]
    pub fn shared_pages(&self) -> usize {
        self.shared.len()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct NodeId(u32);

/// One cached page.
#[derive(Debug)]
struct Node {
    page: PageIndex,
    key: Key,
    children: u32,
    leases: u32,
    /// The value of the cache's clock when a lease last let go of it.
    used: u64,
}

/// A page's identity: the page before it and its own tokens, compared in full, so no hash can confuse two prompts.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    parent: Option<NodeId>,
    tokens: Box<[u32]>,
}

/// The allocator of one worker.
#[derive(Debug)]
pub struct PageCache {
    page_size: usize,
    total: usize,
    free: Vec<PageIndex>,
    nodes: HashMap<NodeId, Node>,
    by_key: HashMap<Key, NodeId>,
    /// Leaves that no lease holds, oldest first.
    evictable: BTreeSet<(u64, NodeId)>,
    clock: u64,
    next_node: u32,
}

impl PageCache {
    /// A cache of `pages` pages of `page_size` tokens, all free.
    ///
    /// # Panics
    /// When either is zero.
    #[must_use]
    pub fn new(pages: u32, page_size: usize) -> Self {
        assert!(
            pages > 0 && page_size > 0,
            "a cache needs pages of at least one token"
        );
        Self {
            page_size,
            total: pages as usize,
            // Popped from the back: low numbers first, which keeps neighbours together for the transfer.
            free: (0..pages).rev().map(PageIndex).collect(),
            nodes: HashMap::new(),
            by_key: HashMap::new(),
            evictable: BTreeSet::new(),
            clock: 0,
            next_node: 0,
        }
    }

    /// Pages that a sequence of `tokens` tokens needs.
    #[must_use]
    pub const fn pages_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.page_size)
    }

    /// Pages in all.
    #[must_use]
    pub const fn total_pages(&self) -> usize {
        self.total
    }

    /// Pages that hold no prefix and belong to nobody.
    #[must_use]
    pub fn free_pages(&self) -> usize {
        self.free.len()
    }

    /// Pages held by leases, shared ones counted once.
    #[must_use]
    pub fn leased_pages(&self) -> usize {
        let idle = self.nodes.values().filter(|n| n.leases == 0).count();
        self.total - self.free.len() - idle
    }

    /// Takes pages for a sequence that starts with `prompt` and may grow to `tokens_max` tokens. At most
    /// `cached_max` tokens, in whole pages, are taken from the prefix cache. `None` if memory is short: nothing is
    /// changed then, and the caller waits for a release.
    pub fn reserve(
        &mut self,
        prompt: &[u32],
        tokens_max: usize,
        cached_max: usize,
    ) -> Option<Lease> {
        let shared = self.lookup(&prompt[..cached_max.min(prompt.len())]);
        self.pin(&shared);
        let own = self.pages_for(tokens_max.max(prompt.len())) - shared.len();
        while self.free.len() < own {
            if !self.evict_one() {
                self.unpin(&shared);
                return None;
            }
        }
        let mut pages: Vec<PageIndex> = shared.iter().map(|n| self.nodes[n].page).collect();
        pages.extend(self.free.drain(self.free.len() - own..).rev());
        Some(Lease { pages, shared })
    }

    /// Takes a lease back. The pages that `computed` fills (the tokens whose keys and values are valid, from the
    /// start of the sequence) stay cached for later prompts; pass an empty slice when the contents are unsure.
    pub fn release(&mut self, lease: Lease, computed: &[u32]) {
        let Lease { pages, shared } = lease;
        let mut parent = shared.last().copied();
        let mut adopting = true;
        for (i, page) in pages.iter().enumerate().skip(shared.len()) {
            let whole = computed.get(i * self.page_size..(i + 1) * self.page_size);
            adopting &= whole.is_some();
            match whole {
                Some(tokens) if adopting => {
                    let key = Key {
                        parent,
                        tokens: tokens.into(),
                    };
                    if let Some(existing) = self.by_key.get(&key) {
                        // Someone else computed the same page first: keep theirs.
                        parent = Some(*existing);
                        self.free.push(*page);
                    } else {
                        parent = Some(self.adopt(key, *page));
                    }
                }
                _ => self.free.push(*page),
            }
        }
        self.unpin(&shared);
    }

    /// Forgets every cached prefix that no lease holds.
    pub fn clear(&mut self) {
        while self.evict_one() {}
    }

    /// The nodes of the longest cached prefix of `tokens`.
    fn lookup(&self, tokens: &[u32]) -> Vec<NodeId> {
        let mut found: Vec<NodeId> = vec![];
        for page in tokens.chunks_exact(self.page_size) {
            let key = Key {
                parent: found.last().copied(),
                tokens: page.into(),
            };
            let Some(node) = self.by_key.get(&key) else {
                break;
            };
            found.push(*node);
        }
        found
    }

    /// Puts a page that nobody leases into the trie.
    fn adopt(&mut self, key: Key, page: PageIndex) -> NodeId {
        let id = self.fresh_id();
        if let Some(parent) = key.parent {
            let used = {
                let parent = self.node(parent);
                parent.children += 1;
                parent.used
            };
            self.evictable.remove(&(used, parent));
        }
        self.clock += 1;
        self.by_key.insert(key.clone(), id);
        self.nodes.insert(
            id,
            Node {
                page,
                key,
                children: 0,
                leases: 0,
                used: self.clock,
            },
        );
        self.evictable.insert((self.clock, id));
        id
    }

    /// Ids may wrap in a worker that lives for months; a live one is never handed out twice.
    fn fresh_id(&mut self) -> NodeId {
        while self.nodes.contains_key(&NodeId(self.next_node)) {
            self.next_node = self.next_node.wrapping_add(1);
        }
        let id = NodeId(self.next_node);
        self.next_node = self.next_node.wrapping_add(1);
        id
    }

    fn pin(&mut self, nodes: &[NodeId]) {
        for id in nodes {
            let node = self.node(*id);
            node.leases += 1;
            let used = node.used;
            self.evictable.remove(&(used, *id));
        }
    }

    fn unpin(&mut self, nodes: &[NodeId]) {
        self.clock += 1;
        let clock = self.clock;
        for id in nodes {
            let node = self.node(*id);
            node.leases -= 1;
            // Still evictable under its old time if another lease had let go already; that entry was removed by pin.
            node.used = clock;
            if node.leases == 0 && node.children == 0 {
                self.evictable.insert((clock, *id));
            }
        }
    }

    /// Frees the least recently used leaf. False if every cached page is in use.
    fn evict_one(&mut self) -> bool {
        let Some((_, id)) = self.evictable.pop_first() else {
            return false;
        };
        let node = self
            .nodes
            .remove(&id)
            .expect("invariant: evictable nodes exist");
        self.by_key.remove(&node.key);
        self.free.push(node.page);
        if let Some(parent_id) = node.key.parent {
            let parent = self.node(parent_id);
            parent.children -= 1;
            if parent.children == 0 && parent.leases == 0 {
                let used = parent.used;
                self.evictable.insert((used, parent_id));
            }
        }
        true
    }

    fn node(&mut self, id: NodeId) -> &mut Node {
        self.nodes
            .get_mut(&id)
            .expect("invariant: ids in use exist")
    }
}

#[cfg(test)]
mod tests;
