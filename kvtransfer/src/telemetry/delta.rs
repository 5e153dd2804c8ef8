//! What changed between two pictures, and how to change one into the other.
#![forbid(unsafe_code)]

use super::snapshot::{Keyed, RailKey, RailStat, RoomKey, RoomStat, Snapshot};

/// The way from one picture to the next. Changed entries are whole; all lists are sorted by name, without duplicates.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Delta {
    /// The new clock readings; they alone are not a change.
    pub monotonic_ns: u64,
    /// See [`Delta::monotonic_ns`].
    pub wall_ns: u64,
    /// The new (instance, epoch), when either differs.
    pub identity: Option<(String, u64)>,
    /// New or changed rails.
    pub rails: Vec<RailStat>,
    /// Rails that are gone.
    pub removed_rails: Vec<RailKey>,
    /// New or changed rooms.
    pub rooms: Vec<RoomStat>,
    /// Rooms that are gone.
    pub removed_rooms: Vec<RoomKey>,
    /// The engine's failures, whole, when they differ.
    pub failures: Option<Vec<(String, u64)>>,
}

impl Delta {
    /// Whether nothing but the clocks moved.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        self.identity.is_none()
            && self.rails.is_empty()
            && self.removed_rails.is_empty()
            && self.rooms.is_empty()
            && self.removed_rooms.is_empty()
            && self.failures.is_none()
    }
}

/// What leads from `prev` to `next`. Both must be normalised ([`Snapshot::normalise`]).
#[must_use]
pub fn diff(prev: &Snapshot, next: &Snapshot) -> Delta {
    let (rails, removed_rails) = changes(&prev.rails, &next.rails);
    let (rooms, removed_rooms) = changes(&prev.rooms, &next.rooms);
    let moved = prev.epoch != next.epoch || prev.instance != next.instance;
    Delta {
        monotonic_ns: next.monotonic_ns,
        wall_ns: next.wall_ns,
        identity: moved.then(|| (next.instance.clone(), next.epoch)),
        rails,
        removed_rails,
        rooms,
        removed_rooms,
        failures: (prev.failures != next.failures).then(|| next.failures.clone()),
    }
}

/// Takes `picture` along `delta`. `apply(prev, diff(prev, next))` makes `next` of `prev`. Names that are to be removed
/// but unknown are ignored.
pub fn apply(picture: &mut Snapshot, delta: &Delta) {
    picture.monotonic_ns = delta.monotonic_ns;
    picture.wall_ns = delta.wall_ns;
    if let Some((instance, epoch)) = &delta.identity {
        picture.instance.clone_from(instance);
        picture.epoch = *epoch;
    }
    merge(&mut picture.rails, &delta.rails, &delta.removed_rails);
    merge(&mut picture.rooms, &delta.rooms, &delta.removed_rooms);
    if let Some(failures) = &delta.failures {
        picture.failures.clone_from(failures);
    }
}

/// How many entries `list` would hold after `changed` and `removed` were applied to it.
#[must_use]
pub fn merged_len<T: Keyed>(list: &[T], changed: &[T], removed: &[T::Key]) -> usize {
    let new = changed
        .iter()
        .filter(|entry| list.binary_search_by(|known| known.order(entry)).is_err())
        .count();
    let gone = removed
        .iter()
        .filter(|key| {
            list.binary_search_by(|known| known.order_to(key)).is_ok()
                && changed
                    .binary_search_by(|known| known.order_to(key))
                    .is_err()
        })
        .count();
    list.len() + new - gone
}

/// One walk over two sorted lists.
fn changes<T: Keyed + Clone + PartialEq>(prev: &[T], next: &[T]) -> (Vec<T>, Vec<T::Key>) {
    let (mut changed, mut removed) = (Vec::new(), Vec::new());
    let mut old = prev.iter().peekable();
    for entry in next {
        while let Some(gone) = old.next_if(|known| known.order(entry).is_lt()) {
            removed.push(gone.key());
        }
        match old.next_if(|known| known.order(entry).is_eq()) {
            Some(known) if known == entry => {}
            _ => changed.push(entry.clone()),
        }
    }
    removed.extend(old.map(T::key));
    (changed, removed)
}

/// One walk that builds the new list; entries that stay are moved. A change wins over a removal of the same name.
fn merge<T: Keyed + Clone>(list: &mut Vec<T>, changed: &[T], removed: &[T::Key]) {
    if changed.is_empty() && removed.is_empty() {
        return;
    }
    let mut merged = Vec::with_capacity(list.len() + changed.len());
    let mut changed = changed.iter().peekable();
    let mut removed = removed.iter().peekable();
    for entry in list.drain(..) {
        while let Some(new) = changed.next_if(|new| new.order(&entry).is_lt()) {
            merged.push(new.clone());
        }
        while removed.next_if(|key| entry.order_to(key).is_gt()).is_some() {}
        let gone = removed.next_if(|key| entry.order_to(key).is_eq()).is_some();
        if let Some(new) = changed.next_if(|new| new.order(&entry).is_eq()) {
            merged.push(new.clone());
        } else if !gone {
            merged.push(entry);
        }
    }
    merged.extend(changed.cloned());
    *list = merged;
}

#[cfg(test)]
pub(crate) mod tests {
    use super::super::snapshot::RoomRole;
    use super::*;
    use proptest::prelude::*;

    /// Few names and few values, so that two pictures share and differ in every way.
    pub(crate) fn pictures() -> impl Strategy<Value = Snapshot> {
        let failures = || prop::collection::vec(("[a-c]", 0..3_u64), 0..3);
        let rail = ("[a-d]", "[0-2]", 0..3_u64, 0..3_u64, 0..2_u8, failures()).prop_map(
            |(peer, rail, bytes_queued, oldest_enqueued_ns, rate, failures)| RailStat {
                peer,
                rail,
                bytes_queued,
                oldest_enqueued_ns,
                rate_bytes_per_s: f64::from(rate),
                failures,
                ..RailStat::default()
            },
        );
        let room = (0..6_u64, any::<bool>(), "[xy]", 0..2_u64).prop_map(
            |(room, sender, state, done_ns)| RoomStat {
                room,
                role: if sender {
                    RoomRole::Sender
                } else {
                    RoomRole::Receiver
                },
                state,
                done_ns,
                ..RoomStat::default()
            },
        );
        let identity = ("[ij]", 0..2_u64, any::<u64>(), any::<u64>());
        let rails = prop::collection::vec(rail, 0..10);
        let rooms = prop::collection::vec(room, 0..10);
        (identity, rails, rooms, failures()).prop_map(|(identity, rails, rooms, failures)| {
            let (instance, epoch, monotonic_ns, wall_ns) = identity;
            let mut picture = Snapshot {
                instance,
                engines: Vec::new(),
                epoch,
                monotonic_ns,
                wall_ns,
                rails,
                rooms,
                failures,
            };
            picture.normalise();
            picture
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        #[test]
        fn apply_undoes_diff(prev in pictures(), next in pictures()) {
            let delta = diff(&prev, &next);
            let rails = merged_len(&prev.rails, &delta.rails, &delta.removed_rails);
            let rooms = merged_len(&prev.rooms, &delta.rooms, &delta.removed_rooms);
            prop_assert_eq!((rails, rooms), (next.rails.len(), next.rooms.len()));
            let mut seen = prev;
            apply(&mut seen, &delta);
            prop_assert_eq!(seen, next);
        }

        #[test]
        fn a_delta_is_quiet_if_and_only_if_just_clocks_moved(prev in pictures(), next in pictures()) {
            prop_assert!(diff(&prev, &prev).is_quiet());
            let later = Snapshot { monotonic_ns: 7, wall_ns: 8, ..prev.clone() };
            prop_assert!(diff(&prev, &later).is_quiet());
            let same = Snapshot { monotonic_ns: prev.monotonic_ns, wall_ns: prev.wall_ns, ..next.clone() };
            prop_assert_eq!(diff(&prev, &next).is_quiet(), same == prev);
        }

        #[test]
        fn any_sorted_delta_keeps_a_picture_sorted(picture in pictures(), other in pictures(), gone in pictures()) {
            let delta = Delta {
                rails: other.rails.clone(),
                removed_rails: gone.rails.iter().map(Keyed::key).collect(),
                rooms: other.rooms.clone(),
                removed_rooms: gone.rooms.iter().map(Keyed::key).collect(),
                ..Delta::default()
            };
            let rails = merged_len(&picture.rails, &delta.rails, &delta.removed_rails);
            let mut seen = picture;
            apply(&mut seen, &delta);
            prop_assert_eq!(seen.rails.len(), rails);
            prop_assert!(seen.rails.is_sorted_by(|a, b| a.order(b).is_lt()));
            prop_assert!(seen.rooms.is_sorted_by(|a, b| a.order(b).is_lt()));
            for rail in &other.rails {
                prop_assert!(seen.rails.contains(rail));
            }
        }
    }

    #[test]
    fn only_what_changed_is_told() {
        let rail = |peer: &str, bytes_queued| RailStat {
            peer: peer.into(),
            rail: "tcp/0".into(),
            bytes_queued,
            ..RailStat::default()
        };
        let prev = Snapshot {
            rails: vec![rail("a", 1), rail("b", 1), rail("c", 1)],
            ..Snapshot::default()
        };
        let next = Snapshot {
            rails: vec![rail("a", 1), rail("c", 2), rail("d", 1)],
            ..Snapshot::default()
        };
        let delta = diff(&prev, &next);
        assert_eq!(delta.rails, [rail("c", 2), rail("d", 1)]);
        assert_eq!(delta.removed_rails, [rail("b", 1).key()]);
        assert_eq!(delta.failures, None);
    }
}
