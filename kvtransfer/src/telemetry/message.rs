//! Pictures and deltas on the wire, and back, within bounds.
#![forbid(unsafe_code)]

use super::delta::Delta;
use super::snapshot::{
    ENGINES_MAX, Keyed, RAILS_MAX, REASONS_MAX, ROOMS_MAX, RailKey, RailStat, RoomKey, RoomRole,
    RoomStat, Snapshot, TEXT_BYTES_MAX,
};
use super::v1;
use super::v1::watch_response::Picture;

/// What every message carries beside its picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// Place in its stream, from 0, without gaps.
    pub sequence: u64,
    /// Which start of the engine.
    pub epoch: u64,
    /// The engine's monotonic clock, nanoseconds.
    pub monotonic_ns: u64,
    /// The engine's wall clock, nanoseconds since 1970.
    pub wall_ns: u64,
}

/// A peer's message that does not hold what it must.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Neither a snapshot nor a delta.
    #[error("a message without a picture")]
    Empty,
    /// A list is longer than a picture may be.
    #[error("{count} {list} in one message, at most {max} are allowed")]
    TooMany {
        /// Which list.
        list: &'static str,
        /// Its length.
        count: usize,
        /// The bound.
        max: usize,
    },
    /// A text is longer than [`TEXT_BYTES_MAX`].
    #[error("a text of {bytes} bytes, at most {TEXT_BYTES_MAX} are allowed")]
    LongText {
        /// Its length.
        bytes: usize,
    },
    /// A rate that is negative or not a number.
    #[error("a rate that is no rate")]
    Rate,
    /// A room role this version does not know.
    #[error("room role {0} is unknown")]
    Role(i32),
    /// One name twice in one list.
    #[error("one name twice among the {list}")]
    Duplicate {
        /// Which list.
        list: &'static str,
    },
}

/// A message with the whole picture.
#[must_use]
pub fn snapshot_message(stamp: Stamp, picture: &Snapshot) -> v1::WatchResponse {
    let snapshot = v1::Snapshot {
        instance: picture.instance.clone(),
        engines: picture
            .engines
            .iter()
            .map(|instance| v1::Engine {
                instance: instance.clone(),
            })
            .collect(),
        rails: picture.rails.iter().map(rail_message).collect(),
        rooms: picture.rooms.iter().map(room_message).collect(),
        failures: failures_message(&picture.failures),
    };
    stamped(stamp, Picture::Snapshot(snapshot))
}

/// A message with what changed. A change of identity cannot be told this way: send a snapshot.
#[must_use]
pub fn delta_message(stamp: Stamp, delta: &Delta) -> v1::WatchResponse {
    debug_assert!(delta.identity.is_none(), "a new identity needs a snapshot");
    let removed_rails = delta.removed_rails.iter();
    let removed_rooms = delta.removed_rooms.iter();
    let delta = v1::Delta {
        rails: delta.rails.iter().map(rail_message).collect(),
        removed_rails: removed_rails
            .map(|key| v1::RailKey {
                peer: key.peer.clone(),
                rail: key.rail.clone(),
            })
            .collect(),
        rooms: delta.rooms.iter().map(room_message).collect(),
        removed_rooms: removed_rooms
            .map(|key| v1::RoomKey {
                room: key.room,
                role: role_number(key.role),
            })
            .collect(),
        failures: delta.failures.as_ref().map(|failures| v1::FailureCounts {
            counts: failures_message(failures),
        }),
    };
    stamped(stamp, Picture::Delta(delta))
}

/// The stamp of a message.
#[must_use]
pub fn stamp(message: &v1::WatchResponse) -> Stamp {
    Stamp {
        sequence: message.sequence,
        epoch: message.epoch,
        monotonic_ns: message.monotonic_ns,
        wall_ns: message.wall_ns,
    }
}

/// Reads a whole picture.
///
/// # Errors
/// [`Malformed`] says which bound or rule the peer broke.
pub fn read_snapshot(stamp: Stamp, message: v1::Snapshot) -> Result<Snapshot, Malformed> {
    Ok(Snapshot {
        instance: text(message.instance)?,
        engines: within("engines", message.engines, ENGINES_MAX)?
            .into_iter()
            .map(|engine| text(engine.instance))
            .collect::<Result<_, _>>()?,
        epoch: stamp.epoch,
        monotonic_ns: stamp.monotonic_ns,
        wall_ns: stamp.wall_ns,
        rails: entries("rails", message.rails, RAILS_MAX, read_rail)?,
        rooms: entries("rooms", message.rooms, ROOMS_MAX, read_room)?,
        failures: read_failures(message.failures)?,
    })
}

/// Reads what changed.
///
/// # Errors
/// [`Malformed`] says which bound or rule the peer broke.
pub fn read_delta(stamp: Stamp, message: v1::Delta) -> Result<Delta, Malformed> {
    let mut removed_rails = within("removed rails", message.removed_rails, RAILS_MAX)?
        .into_iter()
        .map(|key| {
            Ok(RailKey {
                peer: text(key.peer)?,
                rail: text(key.rail)?,
            })
        })
        .collect::<Result<Vec<_>, Malformed>>()?;
    removed_rails.sort();
    let mut removed_rooms = within("removed rooms", message.removed_rooms, ROOMS_MAX)?
        .into_iter()
        .map(|key| {
            Ok(RoomKey {
                room: key.room,
                role: read_role(key.role)?,
            })
        })
        .collect::<Result<Vec<_>, Malformed>>()?;
    removed_rooms.sort();
    removed_rails.dedup();
    removed_rooms.dedup();
    Ok(Delta {
        monotonic_ns: stamp.monotonic_ns,
        wall_ns: stamp.wall_ns,
        identity: None,
        rails: entries("rails", message.rails, RAILS_MAX, read_rail)?,
        removed_rails,
        rooms: entries("rooms", message.rooms, ROOMS_MAX, read_room)?,
        removed_rooms,
        failures: message
            .failures
            .map(|list| read_failures(list.counts))
            .transpose()?,
    })
}

fn stamped(stamp: Stamp, picture: Picture) -> v1::WatchResponse {
    v1::WatchResponse {
        sequence: stamp.sequence,
        epoch: stamp.epoch,
        monotonic_ns: stamp.monotonic_ns,
        wall_ns: stamp.wall_ns,
        picture: Some(picture),
    }
}

fn rail_message(rail: &RailStat) -> v1::RailStat {
    v1::RailStat {
        peer: rail.peer.clone(),
        peer_addr: rail.peer_addr.clone(),
        rail: rail.rail.clone(),
        path: rail.path.clone(),
        path_reason: rail.path_reason.clone(),
        bytes_queued: rail.bytes_queued,
        bytes_in_flight: rail.bytes_in_flight,
        transfers_queued: rail.transfers_queued,
        oldest_enqueued_ns: rail.oldest_enqueued_ns,
        rate_bytes_per_s: rail.rate_bytes_per_s,
        p50_ns: rail.p50_ns,
        p99_ns: rail.p99_ns,
        bytes_total: rail.bytes_total,
        batches_total: rail.batches_total,
        wire_operations_total: rail.wire_operations_total,
        packed_batches_total: rail.packed_batches_total,
        failures: failures_message(&rail.failures),
    }
}

fn read_rail(rail: v1::RailStat) -> Result<RailStat, Malformed> {
    if !rail.rate_bytes_per_s.is_finite() || rail.rate_bytes_per_s < 0.0 {
        return Err(Malformed::Rate);
    }
    Ok(RailStat {
        peer: text(rail.peer)?,
        peer_addr: text(rail.peer_addr)?,
        rail: text(rail.rail)?,
        path: text(rail.path)?,
        path_reason: text(rail.path_reason)?,
        bytes_queued: rail.bytes_queued,
        bytes_in_flight: rail.bytes_in_flight,
        transfers_queued: rail.transfers_queued,
        oldest_enqueued_ns: rail.oldest_enqueued_ns,
        rate_bytes_per_s: rail.rate_bytes_per_s,
        p50_ns: rail.p50_ns,
        p99_ns: rail.p99_ns,
        bytes_total: rail.bytes_total,
        batches_total: rail.batches_total,
        wire_operations_total: rail.wire_operations_total,
        packed_batches_total: rail.packed_batches_total,
        failures: read_failures(rail.failures)?,
    })
}

fn room_message(room: &RoomStat) -> v1::RoomStat {
    v1::RoomStat {
        room: room.room,
        role: role_number(room.role),
        state: room.state.clone(),
        peer: room.peer.clone(),
        enqueued_ns: room.enqueued_ns,
        first_byte_ns: room.first_byte_ns,
        pushed_ns: room.pushed_ns,
        done_ns: room.done_ns,
        bytes: room.bytes,
        failure: room.failure.clone(),
    }
}

fn read_room(room: v1::RoomStat) -> Result<RoomStat, Malformed> {
    Ok(RoomStat {
        room: room.room,
        role: read_role(room.role)?,
        state: text(room.state)?,
        peer: text(room.peer)?,
        enqueued_ns: room.enqueued_ns,
        first_byte_ns: room.first_byte_ns,
        pushed_ns: room.pushed_ns,
        done_ns: room.done_ns,
        bytes: room.bytes,
        failure: text(room.failure)?,
    })
}

fn role_number(role: RoomRole) -> i32 {
    match role {
        RoomRole::Sender => v1::RoomRole::Sender.into(),
        RoomRole::Receiver => v1::RoomRole::Receiver.into(),
    }
}

fn read_role(number: i32) -> Result<RoomRole, Malformed> {
    match v1::RoomRole::try_from(number) {
        Ok(v1::RoomRole::Sender) => Ok(RoomRole::Sender),
        Ok(v1::RoomRole::Receiver) => Ok(RoomRole::Receiver),
        Ok(v1::RoomRole::Unspecified) | Err(_) => Err(Malformed::Role(number)),
    }
}

fn failures_message(failures: &[(String, u64)]) -> Vec<v1::FailureCount> {
    let count = |(reason, count): &(String, u64)| v1::FailureCount {
        reason: reason.clone(),
        count: *count,
    };
    failures.iter().map(count).collect()
}

fn read_failures(failures: Vec<v1::FailureCount>) -> Result<Vec<(String, u64)>, Malformed> {
    within("failure reasons", failures, REASONS_MAX)?
        .into_iter()
        .map(|failure| Ok((text(failure.reason)?, failure.count)))
        .collect()
}

/// Reads, sorts and checks one list of named entries.
fn entries<M, T: Keyed>(
    list: &'static str,
    messages: Vec<M>,
    max: usize,
    read: impl Fn(M) -> Result<T, Malformed>,
) -> Result<Vec<T>, Malformed> {
    let messages = within(list, messages, max)?;
    let mut read = messages
        .into_iter()
        .map(read)
        .collect::<Result<Vec<T>, Malformed>>()?;
    read.sort_by(T::order);
    if read.is_sorted_by(|one, next| one.order(next).is_lt()) {
        Ok(read)
    } else {
        Err(Malformed::Duplicate { list })
    }
}

fn within<M>(list: &'static str, messages: Vec<M>, max: usize) -> Result<Vec<M>, Malformed> {
    if messages.len() > max {
        return Err(Malformed::TooMany {
            list,
            count: messages.len(),
            max,
        });
    }
    Ok(messages)
}

fn text(text: String) -> Result<String, Malformed> {
    if text.len() > TEXT_BYTES_MAX {
        return Err(Malformed::LongText { bytes: text.len() });
    }
    Ok(text)
}

/// Longest encoded message, either way. No picture within the bounds of [`super::snapshot`] is longer, so a longer
/// message is a fault of the peer.
pub const MESSAGE_BYTES_MAX: usize = 24 << 20;

/// Bytes that tag and length of a field, or a number, take at most (numbers: tag 1, varint 10).
const FIELD_BYTES_MAX: usize = 11;
const FAILURES_BYTES_MAX: usize = REASONS_MAX * (TEXT_BYTES_MAX + 3 * FIELD_BYTES_MAX);
const RAIL_BYTES_MAX: usize = 5 * TEXT_BYTES_MAX + 16 * FIELD_BYTES_MAX + FAILURES_BYTES_MAX;
const ROOM_BYTES_MAX: usize = 3 * TEXT_BYTES_MAX + 10 * FIELD_BYTES_MAX;
/// A delta may besides name as many removed rails and rooms.
const REMOVED_BYTES_MAX: usize =
    RAILS_MAX * (2 * TEXT_BYTES_MAX + 3 * FIELD_BYTES_MAX) + ROOMS_MAX * (3 * FIELD_BYTES_MAX);
const _: () = assert!(
    RAILS_MAX * RAIL_BYTES_MAX
        + ROOMS_MAX * ROOM_BYTES_MAX
        + REMOVED_BYTES_MAX
        + FAILURES_BYTES_MAX
        + TEXT_BYTES_MAX
        + 16 * FIELD_BYTES_MAX
        <= MESSAGE_BYTES_MAX
);

#[cfg(test)]
mod tests {
    use super::super::delta::{diff, tests::pictures};
    use super::*;
    use proptest::prelude::*;
    use prost::Message;

    fn at(picture: &Snapshot) -> Stamp {
        let Snapshot {
            epoch,
            monotonic_ns,
            wall_ns,
            ..
        } = *picture;
        Stamp {
            sequence: 3,
            epoch,
            monotonic_ns,
            wall_ns,
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(prev in pictures(), next in pictures()) {
            let message = snapshot_message(at(&next), &next);
            let bytes = message.encode_to_vec();
            let back = v1::WatchResponse::decode(bytes.as_slice()).unwrap();
            prop_assert_eq!(stamp(&back), at(&next));
            let Some(Picture::Snapshot(snapshot)) = back.picture else { panic!("not a snapshot") };
            prop_assert_eq!(&read_snapshot(at(&next), snapshot).unwrap(), &next);

            let delta = Delta { identity: None, ..diff(&prev, &next) };
            let bytes = delta_message(at(&next), &delta).encode_to_vec();
            let back = v1::WatchResponse::decode(bytes.as_slice()).unwrap();
            let Some(Picture::Delta(message)) = back.picture else { panic!("not a delta") };
            prop_assert_eq!(read_delta(at(&next), message).unwrap(), delta);
        }
    }

    #[test]
    fn the_largest_picture_fits_a_message() {
        let long = "x".repeat(TEXT_BYTES_MAX);
        let name = |n: usize| format!("{n:0>TEXT_BYTES_MAX$}");
        let failures: Vec<_> = (0..REASONS_MAX).map(|n| (name(n), u64::MAX)).collect();
        let rail = |n| RailStat {
            peer: name(n),
            peer_addr: long.clone(),
            rail: long.clone(),
            path: long.clone(),
            path_reason: long.clone(),
            bytes_queued: u64::MAX,
            bytes_total: u64::MAX,
            rate_bytes_per_s: f64::MAX,
            failures: failures.clone(),
            ..RailStat::default()
        };
        let room = |n| RoomStat {
            room: u64::MAX - n as u64,
            role: RoomRole::Receiver,
            state: long.clone(),
            peer: long.clone(),
            enqueued_ns: u64::MAX,
            failure: long.clone(),
            ..RoomStat::default()
        };
        let mut picture = Snapshot {
            instance: long.clone(),
            rails: (0..RAILS_MAX).map(rail).collect(),
            rooms: (0..ROOMS_MAX).map(room).collect(),
            failures: failures.clone(),
            ..Snapshot::default()
        };
        picture.normalise();
        let message = snapshot_message(at(&picture), &picture);
        assert!(
            message.encoded_len() <= MESSAGE_BYTES_MAX,
            "{}",
            message.encoded_len()
        );
        let Some(Picture::Snapshot(snapshot)) = message.picture else {
            panic!("not a snapshot")
        };
        assert_eq!(read_snapshot(at(&picture), snapshot), Ok(picture));
    }

    #[test]
    fn every_bound_is_kept() {
        let stamp = Stamp {
            sequence: 0,
            epoch: 0,
            monotonic_ns: 0,
            wall_ns: 0,
        };
        let rail = |n: usize| v1::RailStat {
            peer: n.to_string(),
            ..v1::RailStat::default()
        };
        let rails = |count| (0..count).map(rail).collect::<Vec<_>>();
        let read = |snapshot| read_snapshot(stamp, snapshot).unwrap_err();
        let none = v1::Snapshot::default;
        assert_eq!(
            read(v1::Snapshot {
                rails: rails(RAILS_MAX + 1),
                ..none()
            }),
            Malformed::TooMany {
                list: "rails",
                count: RAILS_MAX + 1,
                max: RAILS_MAX
            }
        );
        assert_eq!(
            read(v1::Snapshot {
                rails: vec![rail(1), rail(2), rail(1)],
                ..none()
            }),
            Malformed::Duplicate { list: "rails" }
        );
        let long = "x".repeat(TEXT_BYTES_MAX + 1);
        assert_eq!(
            read(v1::Snapshot {
                instance: long,
                ..none()
            }),
            Malformed::LongText { bytes: 257 }
        );
        let room = v1::RoomStat {
            role: 9,
            ..v1::RoomStat::default()
        };
        assert_eq!(
            read(v1::Snapshot {
                rooms: vec![room],
                ..none()
            }),
            Malformed::Role(9)
        );
        let failures = vec![v1::FailureCount::default(); REASONS_MAX + 1];
        assert!(matches!(
            read(v1::Snapshot { failures, ..none() }),
            Malformed::TooMany { .. }
        ));
        let removed_rooms = vec![v1::RoomKey { room: 1, role: 1 }; ROOMS_MAX + 1];
        let delta = v1::Delta {
            removed_rooms,
            ..v1::Delta::default()
        };
        assert!(matches!(
            read_delta(stamp, delta).unwrap_err(),
            Malformed::TooMany { .. }
        ));
    }

    #[test]
    fn a_rate_is_a_number() {
        let stamp = Stamp {
            sequence: 0,
            epoch: 0,
            monotonic_ns: 0,
            wall_ns: 0,
        };
        for rate_bytes_per_s in [f64::NAN, f64::INFINITY, -1.0] {
            let rails = vec![v1::RailStat {
                rate_bytes_per_s,
                ..v1::RailStat::default()
            }];
            let snapshot = v1::Snapshot {
                rails,
                ..v1::Snapshot::default()
            };
            assert_eq!(read_snapshot(stamp, snapshot), Err(Malformed::Rate));
        }
    }
}
