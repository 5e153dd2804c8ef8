//! The names by which engines know each other and their work.
#![forbid(unsafe_code)]

use std::{
    collections::HashMap,
    fmt,
    hash::{BuildHasherDefault, Hasher},
    num::NonZeroU64,
};

/// A rendezvous number drawn by the router for one request (SGLang's `bootstrap_room`). Never zero: SGLang's decode
/// side takes a zero in the aux row for "not arrived yet" (`srt/disaggregation/utils.py:245-260`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Room(NonZeroU64);

impl Room {
    /// `None` for zero, which no transfer may use.
    pub fn new(number: u64) -> Option<Self> {
        NonZeroU64::new(number).map(Self)
    }

    /// The number.
    pub fn number(self) -> u64 {
        self.0.get()
    }
}

impl fmt::Display for Room {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Tells one use of a room from the next: drawn by the receiver for each grant, compared for equality only, so it may wrap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(pub u32);

/// Identity of one engine for the life of its process: 16 random bytes, new after a restart.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InstanceId(pub [u8; 16]);

impl fmt::Display for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// One connection to one peer, as this engine numbers them. Never reused within a process, so a reconnected peer has a new one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerId(pub u64);

impl fmt::Display for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "peer {}", self.0)
    }
}

/// One data connection of a peer, `0..LANES_MAX`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LaneId(pub u8);

/// One side's part in one room, as this engine numbers them; never reused within a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TransferId(pub u64);

/// A map whose keys are numbers that this engine counts itself: nobody outside chooses them, so they need no protection
/// against chosen collisions, which costs ten times as much as all the rest of a look-up.
pub(crate) type CountedMap<K, V> = HashMap<K, V, BuildHasherDefault<CountedHasher>>;

/// Spreads numbers that follow each other over all bits.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct CountedHasher(u64);

/// 2^64 divided by the golden ratio, made odd: multiples of it lie apart.
const SPREAD: u64 = 0x9E37_79B9_7F4A_7C15;

impl Hasher for CountedHasher {
    fn finish(&self) -> u64 {
        // The table takes its place from the low bits and its tag from the high ones.
        self.0 ^ (self.0 >> 32)
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64((*byte).into());
        }
    }

    fn write_u64(&mut self, number: u64) {
        self.0 = (self.0 ^ number).wrapping_mul(SPREAD);
    }
}

#[cfg(test)]
mod tests {
    use super::{CountedHasher, CountedMap, PeerId};
    use std::{collections::HashSet, hash::Hasher};

    #[test]
    fn counted_numbers_spread_over_low_and_high_bits() {
        let hash = |number: u64| {
            let mut hasher = CountedHasher::default();
            hasher.write_u64(number);
            hasher.finish()
        };
        let low: HashSet<u64> = (1..=1024).map(|number| hash(number) % 1024).collect();
        let high: HashSet<u64> = (1..=1024).map(|number| hash(number) >> 57).collect();
        assert!(low.len() > 512, "{} places of 1024", low.len());
        assert_eq!(high.len(), 128, "every tag");
        let mut map = CountedMap::default();
        map.extend((0..1000).map(|number| (PeerId(number), number)));
        assert_eq!(map.get(&PeerId(77)), Some(&77));
    }
}
