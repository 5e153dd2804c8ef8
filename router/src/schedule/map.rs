//! Maps for the short keys of this crate's own making (rooms, numbers of bookings and workers), which need no hash that
//! withstands attackers: the standard one takes several times as long.
#![forbid(unsafe_code)]

use std::collections::{HashMap, HashSet};

use foldhash::fast::RandomState;

/// A map.
pub type Map<K, V> = HashMap<K, V, RandomState>;

/// A set.
pub type Set<K> = HashSet<K, RandomState>;
