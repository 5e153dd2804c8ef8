use super::*;
use proptest::prelude::*;

const PAGE: usize = 4;

fn tokens(n: u32) -> Vec<u32> {
    (0..n).collect()
}

#[test]
fn a_released_prefix_is_found_in_whole_pages() {
    let mut cache = PageCache::new(8, PAGE);
    let lease = cache.reserve(&tokens(10), 14, 10).expect("room");
    assert_eq!((lease.pages().len(), lease.shared_pages()), (4, 0));
    let first = lease.pages().to_vec();
    cache.release(lease, &tokens(10));
    let again = cache.reserve(&tokens(10), 10, 9).expect("room");
    assert_eq!(again.shared_pages(), 2);
    assert_eq!(again.pages()[..2], first[..2]);
    // Another first page: nothing in common.
    let other = cache.reserve(&[9; 8], 8, 8).expect("room");
    assert_eq!(other.shared_pages(), 0);
    cache.release(again, &[]);
    cache.release(other, &[]);
    assert_eq!(cache.leased_pages(), 0);
}

#[test]
fn at_most_the_allowed_tokens_are_shared() {
    let mut cache = PageCache::new(8, PAGE);
    let lease = cache.reserve(&tokens(8), 8, 0).expect("room");
    cache.release(lease, &tokens(8));
    for (cached_max, shared) in [(8, 2), (7, 1), (4, 1), (3, 0), (0, 0)] {
        let lease = cache.reserve(&tokens(8), 8, cached_max).expect("room");
        assert_eq!(lease.shared_pages(), shared, "cached_max {cached_max}");
        cache.release(lease, &[]);
    }
}

#[test]
fn memory_that_is_short_changes_nothing_and_eviction_takes_the_oldest_leaf() {
    let mut cache = PageCache::new(4, PAGE);
    for start in [0, 100, 200] {
        let prompt: Vec<u32> = (start..start + 4).collect();
        let lease = cache.reserve(&prompt, 4, 4).expect("room");
        cache.release(lease, &prompt);
    }
    // Touch the oldest, so that 100.. becomes the victim.
    let touched = cache.reserve(&[0, 1, 2, 3], 4, 4).expect("room");
    cache.release(touched, &[]);
    let held = cache
        .reserve(&[7; 8], 8, 8)
        .expect("one free page and one evicted");
    assert_eq!(cache.lookup(&[100, 101, 102, 103]).len(), 0);
    assert_eq!(cache.lookup(&[0, 1, 2, 3]).len(), 1);
    assert_eq!(cache.reserve(&[8; 12], 12, 12), None);
    assert_eq!(cache.leased_pages(), 2);
    cache.release(held, &[]);
}

#[test]
fn a_pinned_prefix_is_never_evicted() {
    let mut cache = PageCache::new(3, PAGE);
    let lease = cache.reserve(&tokens(8), 8, 8).expect("room");
    cache.release(lease, &tokens(8));
    let pinned = cache.reserve(&tokens(8), 12, 8).expect("room");
    assert_eq!(cache.reserve(&[9], 1, 0), None);
    assert_eq!(cache.lookup(&tokens(8)).len(), 2);
    cache.release(pinned, &[]);
    cache.clear();
    assert_eq!(cache.free_pages(), 3);
}

#[derive(Clone, Debug)]
enum Step {
    Reserve {
        prompt: Vec<u32>,
        grow: usize,
        cached_max: usize,
    },
    Release {
        which: usize,
        computed: usize,
    },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    // Two symbols and short prompts, so that prefixes collide often.
    let reserve = (
        prop::collection::vec(0..2_u32, 1..20),
        0..8_usize,
        0..24_usize,
    )
        .prop_map(|(prompt, grow, cached_max)| Step::Reserve {
            prompt,
            grow,
            cached_max,
        });
    let release = (any::<usize>(), 0..30_usize)
        .prop_map(|(which, computed)| Step::Release { which, computed });
    prop::collection::vec(prop_oneof![reserve, release], 0..120)
}

/// What the test itself knows about a page: the tokens from the start of the sequence up to its end.
type Contents = HashMap<PageIndex, Vec<u32>>;

fn check(cache: &PageCache, leases: &[(Lease, Vec<u32>)]) {
    let mut owners: HashMap<PageIndex, usize> = HashMap::new();
    for page in cache
        .free
        .iter()
        .chain(cache.nodes.values().map(|n| &n.page))
    {
        *owners.entry(*page).or_default() += 1;
    }
    for (lease, _) in leases {
        for page in &lease.pages[lease.shared.len()..] {
            *owners.entry(*page).or_default() += 1;
        }
    }
    assert!(owners.values().all(|n| *n == 1), "a page has two owners");
    assert_eq!(owners.len(), cache.total, "a page was lost");
    for (id, node) in &cache.nodes {
        let pins = leases.iter().filter(|(l, _)| l.shared.contains(id)).count();
        assert_eq!(node.leases as usize, pins);
        let children = cache
            .nodes
            .values()
            .filter(|n| n.key.parent == Some(*id))
            .count();
        assert_eq!(node.children as usize, children);
        let evictable = cache.evictable.contains(&(node.used, *id));
        assert_eq!(evictable, pins == 0 && children == 0);
    }
    assert_eq!(cache.by_key.len(), cache.nodes.len());
}

proptest! {
    #[test]
    fn pages_have_one_owner_and_shared_pages_hold_the_right_tokens(steps in steps()) {
        let mut cache = PageCache::new(12, PAGE);
        let mut leases: Vec<(Lease, Vec<u32>)> = vec![];
        let mut contents: Contents = HashMap::new();
        for step in steps {
            match step {
                Step::Reserve { prompt, grow, cached_max } => {
                    let before = cache.leased_pages();
                    let Some(lease) = cache.reserve(&prompt, prompt.len() + grow, cached_max) else {
                        prop_assert_eq!(cache.leased_pages(), before);
                        // Refused only if evicting everything idle would not have been enough.
                        let need = cache.pages_for(prompt.len() + grow);
                        prop_assert!(cache.total - before < need);
                        continue;
                    };
                    prop_assert!(lease.shared_pages() * PAGE <= cached_max);
                    for (i, page) in lease.pages()[..lease.shared_pages()].iter().enumerate() {
                        prop_assert_eq!(&contents[page], &prompt[..(i + 1) * PAGE]);
                    }
                    leases.push((lease, prompt));
                }
                Step::Release { which, computed } if !leases.is_empty() => {
                    let (lease, prompt) = leases.swap_remove(which % leases.len());
                    let computed = &prompt[..computed.min(prompt.len())];
                    for (i, page) in lease.pages().iter().enumerate().skip(lease.shared_pages()) {
                        if let Some(prefix) = computed.get(..(i + 1) * PAGE) {
                            contents.insert(*page, prefix.to_vec());
                        }
                    }
                    cache.release(lease, computed);
                }
                Step::Release { .. } => {}
            }
            check(&cache, &leases);
        }
    }
}
