//! A consumer's copy of an engine's picture, kept by the messages of one stream.
#![forbid(unsafe_code)]

use std::sync::Arc;

use super::delta::{apply, merged_len};
use super::message::{Malformed, read_delta, read_snapshot, stamp};
use super::snapshot::{RAILS_MAX, ROOMS_MAX, Snapshot};
use super::v1;
use super::v1::watch_response::Picture;

/// The picture as far as one stream told it. A new stream needs a new replica.
#[derive(Clone, Debug, Default)]
pub struct Replica {
    picture: Option<Arc<Snapshot>>,
    /// The sequence number that must come next.
    expected: u64,
}

/// A message that does not continue its stream. The stream is of no use after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BrokenStream {
    /// A message is missing, repeated or out of order.
    #[error("message {expected} was due, message {got} came")]
    Gap {
        /// The number that was due.
        expected: u64,
        /// The number that came.
        got: u64,
    },
    /// The stream began with a delta.
    #[error("the first message is not a snapshot")]
    NoSnapshot,
    /// A delta of another start of the engine.
    #[error("a delta of epoch {got} on a picture of epoch {epoch}")]
    EpochChanged {
        /// The picture's epoch.
        epoch: u64,
        /// The delta's.
        got: u64,
    },
    /// The message breaks the protocol.
    #[error(transparent)]
    Malformed(#[from] Malformed),
}

impl Replica {
    /// The picture so far; `None` before the first message.
    #[must_use]
    pub fn picture(&self) -> Option<Arc<Snapshot>> {
        self.picture.clone()
    }

    /// Takes the next message of the stream; returns the new picture.
    ///
    /// # Errors
    /// [`BrokenStream`]; the picture then stays as it was, and the caller must connect anew.
    pub fn accept(&mut self, message: v1::WatchResponse) -> Result<Arc<Snapshot>, BrokenStream> {
        let stamp = stamp(&message);
        if stamp.sequence != self.expected {
            return Err(BrokenStream::Gap {
                expected: self.expected,
                got: stamp.sequence,
            });
        }
        let picture = match message.picture.ok_or(Malformed::Empty)? {
            Picture::Snapshot(snapshot) => self
                .picture
                .insert(Arc::new(read_snapshot(stamp, snapshot)?)),
            Picture::Delta(delta) => {
                let picture = self.picture.as_mut().ok_or(BrokenStream::NoSnapshot)?;
                if picture.epoch != stamp.epoch {
                    return Err(BrokenStream::EpochChanged {
                        epoch: picture.epoch,
                        got: stamp.epoch,
                    });
                }
                let delta = read_delta(stamp, delta)?;
                let rails = merged_len(&picture.rails, &delta.rails, &delta.removed_rails);
                bounded("rails", rails, RAILS_MAX)?;
                let rooms = merged_len(&picture.rooms, &delta.rooms, &delta.removed_rooms);
                bounded("rooms", rooms, ROOMS_MAX)?;
                // Copies only while a reader still holds the last picture.
                apply(Arc::make_mut(picture), &delta);
                picture
            }
        };
        self.expected = self.expected.wrapping_add(1);
        Ok(Arc::clone(picture))
    }
}

fn bounded(list: &'static str, count: usize, max: usize) -> Result<(), Malformed> {
    if count > max {
        Err(Malformed::TooMany { list, count, max })
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::delta::{Delta, diff, tests::pictures};
    use super::super::message::{Stamp, delta_message, snapshot_message};
    use super::super::snapshot::RailStat;
    use super::*;
    use proptest::prelude::*;

    fn at(sequence: u64, picture: &Snapshot) -> Stamp {
        let Snapshot {
            epoch,
            monotonic_ns,
            wall_ns,
            ..
        } = *picture;
        Stamp {
            sequence,
            epoch,
            monotonic_ns,
            wall_ns,
        }
    }

    #[test]
    fn a_stream_must_begin_whole_and_go_on_without_gaps() {
        let picture = Snapshot {
            epoch: 4,
            ..Snapshot::default()
        };
        let quiet = Delta::default();
        let mut replica = Replica::default();
        assert_eq!(
            replica.accept(delta_message(at(0, &picture), &quiet)),
            Err(BrokenStream::NoSnapshot)
        );
        let empty = v1::WatchResponse::default();
        assert_eq!(
            replica.accept(empty),
            Err(BrokenStream::Malformed(Malformed::Empty))
        );
        replica
            .accept(snapshot_message(at(0, &picture), &picture))
            .unwrap();
        for got in [0, 2, u64::MAX] {
            let gap = replica.accept(delta_message(at(got, &picture), &quiet));
            assert_eq!(gap, Err(BrokenStream::Gap { expected: 1, got }));
        }
        let restarted = Snapshot {
            epoch: 5,
            ..Snapshot::default()
        };
        assert_eq!(
            replica.accept(delta_message(at(1, &restarted), &quiet)),
            Err(BrokenStream::EpochChanged { epoch: 4, got: 5 })
        );
        let seen = replica
            .accept(snapshot_message(at(1, &restarted), &restarted))
            .unwrap();
        assert_eq!(seen.epoch, 5);
    }

    #[test]
    fn deltas_cannot_grow_a_picture_beyond_its_bound() {
        let rails = |from: usize, to: usize| -> Vec<_> {
            let rail = |n| RailStat {
                peer: format!("{n:06}"),
                ..RailStat::default()
            };
            (from..to).map(rail).collect()
        };
        let full = Snapshot {
            rails: rails(0, RAILS_MAX),
            ..Snapshot::default()
        };
        let mut replica = Replica::default();
        let before = replica
            .accept(snapshot_message(at(0, &full), &full))
            .unwrap();
        let more = Delta {
            rails: rails(RAILS_MAX, RAILS_MAX + 1),
            ..Delta::default()
        };
        assert!(matches!(
            replica.accept(delta_message(at(1, &full), &more)),
            Err(BrokenStream::Malformed(Malformed::TooMany { .. }))
        ));
        // A picture that a reader holds does not change under it.
        let same = Delta {
            rails: rails(7, 8),
            monotonic_ns: 9,
            ..Delta::default()
        };
        let after = replica
            .accept(delta_message(
                Stamp {
                    monotonic_ns: 9,
                    ..at(1, &full)
                },
                &same,
            ))
            .unwrap();
        assert_eq!((before.monotonic_ns, after.monotonic_ns), (0, 9));
    }

    proptest! {
        #[test]
        fn a_replica_follows_any_history(history in prop::collection::vec(pictures(), 1..12)) {
            let mut replica = Replica::default();
            let mut last: Option<&Snapshot> = None;
            for (sequence, next) in history.iter().enumerate() {
                let stamp = at(sequence as u64, next);
                let message = match last.map(|last| diff(last, next)) {
                    Some(delta) if delta.identity.is_none() => delta_message(stamp, &delta),
                    _ => snapshot_message(stamp, next),
                };
                let seen = replica.accept(message).unwrap();
                prop_assert_eq!(&*seen, next);
                last = Some(next);
            }
        }
    }
}
