//! The picture of one moment: plain data, filled by the engine.
#![forbid(unsafe_code)]

use std::cmp::Ordering;

/// Everything an engine tells about itself at one moment.
///
/// [`Snapshot::normalise`] brings it into the form that [`crate::telemetry::delta`] works on: sorted, without
/// duplicates, within the bounds below.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Snapshot {
    /// The engine's instance id.
    pub instance: String,
    /// Instance ids of all engines of which this is the sum, such as the ranks of one worker; empty: `instance` alone. They
    /// stay the same for as long as `instance` and `epoch` do.
    pub engines: Vec<String>,
    /// Which start of the engine this is.
    pub epoch: u64,
    /// The engine's monotonic clock, nanoseconds since an arbitrary start. Other `_ns` times are on it.
    pub monotonic_ns: u64,
    /// The wall clock, nanoseconds since 1970.
    pub wall_ns: u64,
    /// One entry per (peer, rail).
    pub rails: Vec<RailStat>,
    /// One entry per (room, role).
    pub rooms: Vec<RoomStat>,
    /// Failures of the whole engine since its start: (reason, count).
    pub failures: Vec<(String, u64)>,
}

/// One rail to one peer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RailStat {
    /// Instance id of the peer.
    pub peer: String,
    /// Where the peer is, as `host:port`.
    pub peer_addr: String,
    /// Name of the rail, e.g. `"tcp/0"`.
    pub rail: String,
    /// The path in use: `"tcp"`, `"shm-pull"`, `"shm-ring"`, …
    pub path: String,
    /// Why better paths were refused.
    pub path_reason: String,
    /// Bytes waiting.
    pub bytes_queued: u64,
    /// Bytes handed to the rail and not yet confirmed by the receiver.
    pub bytes_in_flight: u64,
    /// Transfers waiting.
    pub transfers_queued: u64,
    /// When the oldest waiting transfer was enqueued; 0: none waits.
    ///
    /// A time, not an age: an age differs at every look, and would make a delta out of nothing. See
    /// [`RailStat::oldest_age_ns`].
    pub oldest_enqueued_ns: u64,
    /// Bytes per busy second (see [`crate::telemetry::rate`]); 0: not measured yet.
    pub rate_bytes_per_s: f64,
    /// Median latency of recent transfers, nanoseconds; 0: none recently.
    pub p50_ns: u64,
    /// 99th percentile, likewise.
    pub p99_ns: u64,
    /// Bytes delivered since the engine's start.
    pub bytes_total: u64,
    /// Batches delivered since the engine's start.
    pub batches_total: u64,
    /// Work requests posted to an RDMA device (pages, notices, answers) since the queue pair was made; 0 on other paths.
    pub wire_operations_total: u64,
    /// Of the batches sent, those that were packed: two work requests each, whatever their pieces.
    pub packed_batches_total: u64,
    /// Failures on this rail: (reason, count).
    pub failures: Vec<(String, u64)>,
}

impl RailStat {
    /// How long the oldest waiting transfer has waited at `monotonic_ns`, in nanoseconds; 0 when none waits.
    #[must_use]
    pub fn oldest_age_ns(&self, monotonic_ns: u64) -> u64 {
        if self.oldest_enqueued_ns == 0 {
            return 0;
        }
        monotonic_ns.saturating_sub(self.oldest_enqueued_ns)
    }
}

/// Which end of a transfer this engine is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RoomRole {
    /// The prefill side.
    #[default]
    Sender,
    /// The decode side.
    Receiver,
}

/// One room as this engine sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RoomStat {
    /// The room number.
    pub room: u64,
    /// This engine's end of it.
    pub role: RoomRole,
    /// State name.
    pub state: String,
    /// Instance id of the peer, empty while unknown.
    pub peer: String,
    /// When the transfer was enqueued.
    pub enqueued_ns: u64,
    /// When its first byte moved; 0: not yet.
    pub first_byte_ns: u64,
    /// When the sender was given the last of its pages; 0: not yet, or this is the receiver.
    pub pushed_ns: u64,
    /// When it ended; 0: not yet.
    pub done_ns: u64,
    /// Bytes moved.
    pub bytes: u64,
    /// Why it failed; empty: it did not.
    pub failure: String,
}

/// Names a rail: (peer, rail).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RailKey {
    /// Instance id of the peer.
    pub peer: String,
    /// Name of the rail.
    pub rail: String,
}

/// Names a room: (room, role).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RoomKey {
    /// The room number.
    pub room: u64,
    /// The end of it.
    pub role: RoomRole,
}

/// An entry that has a name within its list.
pub trait Keyed {
    /// The name.
    type Key: Ord + Clone;

    /// A copy of the name.
    fn key(&self) -> Self::Key;

    /// Orders by name, without copying it.
    fn order(&self, other: &Self) -> Ordering;

    /// Orders against a name, without copying.
    fn order_to(&self, key: &Self::Key) -> Ordering;
}

impl Keyed for RailStat {
    type Key = RailKey;

    fn key(&self) -> RailKey {
        RailKey {
            peer: self.peer.clone(),
            rail: self.rail.clone(),
        }
    }

    fn order(&self, other: &Self) -> Ordering {
        (&self.peer, &self.rail).cmp(&(&other.peer, &other.rail))
    }

    fn order_to(&self, key: &RailKey) -> Ordering {
        (&self.peer, &self.rail).cmp(&(&key.peer, &key.rail))
    }
}

impl Keyed for RoomStat {
    type Key = RoomKey;

    fn key(&self) -> RoomKey {
        RoomKey {
            room: self.room,
            role: self.role,
        }
    }

    fn order(&self, other: &Self) -> Ordering {
        self.key().cmp(&other.key())
    }

    fn order_to(&self, key: &RoomKey) -> Ordering {
        self.key().cmp(key)
    }
}

/// What [`Snapshot::normalise`] had to leave out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Clipped {
    /// Rails that were duplicates or beyond [`RAILS_MAX`].
    pub rails: usize,
    /// Rooms that were duplicates or beyond [`ROOMS_MAX`].
    pub rooms: usize,
}

impl Snapshot {
    /// Sorts the lists by name, drops duplicates (the first wins) and what exceeds the bounds, folds surplus failure
    /// reasons into [`REASON_OTHER`], shortens texts to [`TEXT_BYTES_MAX`], and turns a rate that is no rate
    /// into 0 (consumers refuse it, and one that is not a number would differ from itself at every look).
    pub fn normalise(&mut self) -> Clipped {
        clip(&mut self.instance);
        self.engines.iter_mut().for_each(clip);
        self.engines.truncate(ENGINES_MAX);
        for rail in &mut self.rails {
            rail.normalise();
        }
        for room in &mut self.rooms {
            clip(&mut room.state);
            clip(&mut room.peer);
            clip(&mut room.failure);
        }
        fold(&mut self.failures);
        Clipped {
            rails: order_within(&mut self.rails, RAILS_MAX),
            rooms: order_within(&mut self.rooms, ROOMS_MAX),
        }
    }
}

impl RailStat {
    fn normalise(&mut self) {
        for text in [
            &mut self.peer,
            &mut self.peer_addr,
            &mut self.rail,
            &mut self.path,
            &mut self.path_reason,
        ] {
            clip(text);
        }
        if !self.rate_bytes_per_s.is_finite() || self.rate_bytes_per_s < 0.0 {
            self.rate_bytes_per_s = 0.0;
        }
        fold(&mut self.failures);
    }
}

/// Sorts and bounds a list; returns how many entries it dropped.
fn order_within<T: Keyed>(list: &mut Vec<T>, max: usize) -> usize {
    let before = list.len();
    list.sort_by(T::order);
    list.dedup_by(|later, kept| later.order(kept).is_eq());
    list.truncate(max);
    before - list.len()
}

/// Sorts reasons, adds up duplicates, and folds those beyond the bound into one.
fn fold(failures: &mut Vec<(String, u64)>) {
    for (reason, _) in failures.iter_mut() {
        clip(reason);
    }
    failures.sort();
    failures.dedup_by(|later, kept| {
        let same = later.0 == kept.0;
        if same {
            kept.1 = kept.1.saturating_add(later.1);
        }
        same
    });
    if failures.len() <= REASONS_MAX {
        return;
    }
    let mut other = 0_u64;
    for (_, count) in failures.drain(REASONS_MAX - 1..) {
        other = other.saturating_add(count);
    }
    match failures
        .iter_mut()
        .find(|(reason, _)| reason == REASON_OTHER)
    {
        Some((_, count)) => *count = count.saturating_add(other),
        None => failures.push((REASON_OTHER.to_owned(), other)),
    }
    failures.sort();
}

/// Shortens a text to the bound, at a character's edge.
fn clip(text: &mut String) {
    if text.len() > TEXT_BYTES_MAX {
        // `floor_char_boundary` came after our oldest supported toolchain.
        let edge = (0..=TEXT_BYTES_MAX)
            .rev()
            .find(|&edge| text.is_char_boundary(edge));
        text.truncate(edge.unwrap_or(0));
    }
}

/// Rails in a picture: 256 peers with 4 rails each is the largest deployment we plan for.
pub const RAILS_MAX: usize = 1_024;

/// Engines in a picture: the ranks of one worker.
pub const ENGINES_MAX: usize = 256;

/// Rooms in a picture: a rank runs some hundred requests at a time; finished rooms linger a while.
pub const ROOMS_MAX: usize = 8_192;

/// Failure reasons per list: our error enums have fewer variants.
pub const REASONS_MAX: usize = 32;

/// Bytes of any text: a host name is at most 253.
pub const TEXT_BYTES_MAX: usize = 256;

/// Where surplus failure reasons are counted.
pub const REASON_OTHER: &str = "other";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_sorted_unique_and_bounded() {
        let rail = |n: usize| RailStat {
            peer: format!("p{n:05}"),
            ..RailStat::default()
        };
        let mut picture = Snapshot {
            rails: (0..RAILS_MAX + 5)
                .rev()
                .map(rail)
                .chain([rail(3)])
                .collect(),
            rooms: (0..=ROOMS_MAX as u64)
                .rev()
                .map(|room| RoomStat {
                    room,
                    ..RoomStat::default()
                })
                .collect(),
            failures: (0..100).map(|n| (format!("r{n:02}"), 1)).collect(),
            ..Snapshot::default()
        };
        assert_eq!(picture.normalise(), Clipped { rails: 6, rooms: 1 });
        assert!(picture.rails.is_sorted_by(|a, b| a.order(b).is_lt()));
        assert!(picture.rooms.is_sorted_by(|a, b| a.order(b).is_lt()));
        assert_eq!(
            (picture.rails.len(), picture.rooms.len()),
            (RAILS_MAX, ROOMS_MAX)
        );
        assert_eq!(picture.failures.len(), REASONS_MAX);
        assert_eq!(
            picture.failures.iter().map(|(_, count)| count).sum::<u64>(),
            100
        );
        assert_eq!(picture.failures[0], (REASON_OTHER.to_owned(), 69));
        let once = picture.clone();
        assert_eq!(picture.normalise(), Clipped::default());
        assert_eq!(picture, once);
    }

    #[test]
    fn texts_are_cut_at_a_character_and_rates_are_numbers() {
        let mut picture = Snapshot {
            instance: "é".repeat(200),
            rails: vec![RailStat {
                rate_bytes_per_s: f64::NAN,
                ..RailStat::default()
            }],
            failures: vec![("a".into(), u64::MAX), ("a".into(), 5)],
            ..Snapshot::default()
        };
        picture.instance.insert(0, 'x');
        picture.normalise();
        assert_eq!(picture.instance.len(), TEXT_BYTES_MAX - 1);
        assert!(picture.rails[0].rate_bytes_per_s.abs() < f64::EPSILON);
        assert_eq!(picture.failures, [("a".to_owned(), u64::MAX)]);
    }

    #[test]
    fn an_age_is_a_time_seen_from_now() {
        let rail = RailStat {
            oldest_enqueued_ns: 100,
            ..RailStat::default()
        };
        assert_eq!(rail.oldest_age_ns(150), 50);
        assert_eq!(rail.oldest_age_ns(50), 0);
        assert_eq!(RailStat::default().oldest_age_ns(u64::MAX), 0);
    }
}
