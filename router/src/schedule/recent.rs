//! A map that keeps what was used lately and never grows beyond its bound.
#![forbid(unsafe_code)]

use std::hash::Hash;

use super::map::Map;

/// Two generations of entries. What is used moves to the young one; when that is half of the bound, the old one is
/// forgotten and the young one grows old. Every operation is O(1), and an entry used within the last half of the
/// bound's insertions is certainly kept.
#[derive(Clone, Debug)]
pub struct Recent<K, V> {
    young: Map<K, V>,
    old: Map<K, V>,
    half: usize,
}

impl<K: Eq + Hash, V> Recent<K, V> {
    /// A map of at most `bound` entries (at least 2).
    pub fn new(bound: usize) -> Self {
        Self {
            young: Map::default(),
            old: Map::default(),
            half: (bound / 2).max(1),
        }
    }

    /// The entry of `key`, which counts as a use.
    pub fn touch(&mut self, key: K) -> Option<&mut V>
    where
        K: Copy,
    {
        if let Some(value) = self.old.remove(&key) {
            self.insert(key, value);
        }
        self.young.get_mut(&key)
    }

    /// The entry of `key`, without counting as a use.
    pub fn peek(&self, key: &K) -> Option<&V> {
        self.young.get(key).or_else(|| self.old.get(key))
    }

    /// Puts an entry in, which may forget the oldest half.
    pub fn insert(&mut self, key: K, value: V) {
        self.old.remove(&key);
        if self.young.len() >= self.half && !self.young.contains_key(&key) {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(key, value);
    }

    /// Takes an entry out.
    pub fn remove(&mut self, key: &K) -> Option<V> {
        self.young.remove(key).or_else(|| self.old.remove(key))
    }

    /// Keeps the entries for which `keep` says so; it may change them.
    pub fn retain(&mut self, mut keep: impl FnMut(&K, &mut V) -> bool) {
        self.young.retain(&mut keep);
        self.old.retain(&mut keep);
    }

    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.young.len() + self.old.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_holds_and_the_used_stay() {
        let mut recent = Recent::new(100);
        recent.insert(0_u32, "kept");
        for key in 1..10_000 {
            recent.insert(key, "new");
            assert!(recent.touch(0).is_some(), "{key}");
            assert!(recent.len() <= 100);
        }
        assert_eq!(recent.peek(&0), Some(&"kept"));
        assert_eq!(recent.peek(&5000), None);
        assert_eq!(recent.peek(&9_980), Some(&"new"));
        recent.retain(|key, _| *key == 0);
        assert_eq!(recent.len(), 1);
        assert_eq!(recent.remove(&0), Some("kept"));
        assert!(recent.is_empty());
    }
}
