//! Counts what a message holds before any of it is decoded.
//!
//! An empty list entry is two bytes on the wire and some hundred in memory, so the bound on a message's bytes alone
//! would let a hostile engine fill a router's memory. The generated client and server use [`BoundedCodec`] instead of
//! the plain one.
#![forbid(unsafe_code)]

use std::marker::PhantomData;

use bytes::Buf;
use tonic::Status;
use tonic::codec::{Codec, DecodeBuf, Decoder};
use tonic_prost::{ProstCodec, ProstEncoder};

use super::snapshot::{ENGINES_MAX, RAILS_MAX, REASONS_MAX, ROOMS_MAX};

/// Protocol buffers, with [`check`] before decoding.
#[derive(Debug)]
pub struct BoundedCodec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for BoundedCodec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> Codec for BoundedCodec<T, U>
where
    T: prost::Message + Send + 'static,
    U: prost::Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = BoundedDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstCodec::<T, U>::default().encoder()
    }

    fn decoder(&mut self) -> Self::Decoder {
        BoundedDecoder(PhantomData)
    }
}

/// The decoder of [`BoundedCodec`].
#[derive(Debug)]
pub struct BoundedDecoder<U>(PhantomData<U>);

impl<U: prost::Message + Default> Decoder for BoundedDecoder<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, source: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        let bytes = source.copy_to_bytes(source.remaining());
        check(&bytes).map_err(|error| Status::invalid_argument(error.to_string()))?;
        U::decode(bytes)
            .map(Some)
            .map_err(|error| Status::invalid_argument(error.to_string()))
    }
}

/// A message that is not decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unreadable {
    /// Not the wire format.
    #[error("not a message")]
    Garbled,
    /// More than [`ENTRIES_MAX`] list entries.
    #[error("more than {ENTRIES_MAX} entries in a message")]
    Entries,
    /// An entry with more than [`FIELDS_MAX`] texts and inner entries.
    #[error("more than {FIELDS_MAX} fields in an entry")]
    Fields,
}

/// Checks the lists of an encoded `WatchResponse` (or of a message without fields 5 and 6, which holds none).
///
/// # Errors
/// [`Unreadable`]; the message must not be decoded then.
pub fn check(message: &[u8]) -> Result<(), Unreadable> {
    let mut entries = 0;
    for field in Fields(message) {
        let (number, picture) = field?;
        if number != SNAPSHOT && number != DELTA {
            continue;
        }
        for entry in Fields(picture) {
            let (entry_number, entry) = entry?;
            entries += 1;
            if entries > ENTRIES_MAX {
                return Err(Unreadable::Entries);
            }
            if number == SNAPSHOT && entry_number == INSTANCE {
                continue;
            }
            for (count, field) in Fields(entry).enumerate() {
                field?;
                if count >= FIELDS_MAX {
                    return Err(Unreadable::Fields);
                }
            }
        }
    }
    Ok(())
}

/// The length-delimited fields (texts, inner messages) of a message; others are skipped.
struct Fields<'a>(&'a [u8]);

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u64, &'a [u8]), Unreadable>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.0.is_empty() {
            match self.field() {
                Ok(None) => {}
                Ok(Some(field)) => return Some(Ok(field)),
                Err(error) => {
                    self.0 = &[];
                    return Some(Err(error));
                }
            }
        }
        None
    }
}

impl<'a> Fields<'a> {
    fn field(&mut self) -> Result<Option<(u64, &'a [u8])>, Unreadable> {
        let key = self.varint()?;
        match key & 7 {
            0 => self.varint().map(|_| None),
            1 => self.take(8).map(|_| None),
            2 => {
                let length = self.varint()?;
                Ok(Some((key >> 3, self.take(length)?)))
            }
            5 => self.take(4).map(|_| None),
            // Groups are not used since version 3.
            _ => Err(Unreadable::Garbled),
        }
    }

    fn varint(&mut self) -> Result<u64, Unreadable> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = self.0.split_first().ok_or(Unreadable::Garbled)?;
            self.0 = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(Unreadable::Garbled)
    }

    fn take(&mut self, length: u64) -> Result<&'a [u8], Unreadable> {
        let length = usize::try_from(length).map_err(|_| Unreadable::Garbled)?;
        let (taken, rest) = self.0.split_at_checked(length).ok_or(Unreadable::Garbled)?;
        self.0 = rest;
        Ok(taken)
    }
}

/// Entries of a message's lists together: a delta may change and remove as many as a picture holds.
pub const ENTRIES_MAX: usize = 2 * (RAILS_MAX + ROOMS_MAX) + REASONS_MAX + ENGINES_MAX;

/// Texts and failure counts of one entry; twice what today's have, for those of later versions.
pub const FIELDS_MAX: usize = 2 * (REASONS_MAX + 5);

/// Field numbers of `WatchResponse` and `Snapshot`, see the protocol file.
const SNAPSHOT: u64 = 5;
const DELTA: u64 = 6;
const INSTANCE: u64 = 1;

#[cfg(test)]
mod tests {
    use super::super::delta::{diff, tests::pictures};
    use super::super::message::{Stamp, delta_message, snapshot_message};
    use super::super::v1;
    use super::super::v1::watch_response::Picture;
    use super::*;
    use proptest::prelude::*;
    use prost::Message;

    fn message(picture: Picture) -> Vec<u8> {
        v1::WatchResponse {
            picture: Some(picture),
            ..Default::default()
        }
        .encode_to_vec()
    }

    #[test]
    fn both_sides_of_each_bound() {
        let rails = |count| v1::Snapshot {
            rails: vec![v1::RailStat::default(); count],
            ..Default::default()
        };
        assert_eq!(
            check(&message(Picture::Snapshot(rails(ENTRIES_MAX)))),
            Ok(())
        );
        assert_eq!(
            check(&message(Picture::Snapshot(rails(ENTRIES_MAX + 1)))),
            Err(Unreadable::Entries)
        );
        // Several pictures in one message are merged when decoded, so they count together.
        let twice = message(Picture::Snapshot(rails(ENTRIES_MAX / 2 + 1))).repeat(2);
        assert_eq!(check(&twice), Err(Unreadable::Entries));
        let failures = |count| {
            let counts = vec![v1::FailureCount::default(); count];
            v1::Delta {
                failures: Some(v1::FailureCounts { counts }),
                ..Default::default()
            }
        };
        assert_eq!(
            check(&message(Picture::Delta(failures(FIELDS_MAX)))),
            Ok(())
        );
        assert_eq!(
            check(&message(Picture::Delta(failures(FIELDS_MAX + 1)))),
            Err(Unreadable::Fields)
        );
        for garbled in [
            &[0x80][..],
            &[0x2a],
            &[0x2a, 5, 0],
            &[0x0b],
            &[0xff; 11],
            &[0x09, 1],
        ] {
            assert_eq!(check(garbled), Err(Unreadable::Garbled), "{garbled:?}");
        }
        // An instance id is a text, whatever its bytes look like.
        let instance = "\u{b}\u{b}".to_owned();
        assert_eq!(
            check(&message(Picture::Snapshot(v1::Snapshot {
                instance,
                ..Default::default()
            }))),
            Ok(())
        );
    }

    proptest! {
        #[test]
        fn any_bytes_are_judged(bytes in prop::collection::vec(any::<u8>(), 0..512)) {
            // What the decoder takes must at least not trip the check's own arithmetic.
            let _ = check(&bytes);
        }

        #[test]
        fn honest_messages_pass(prev in pictures(), next in pictures()) {
            let stamp = Stamp { sequence: u64::MAX, epoch: 1, monotonic_ns: u64::MAX, wall_ns: 0 };
            prop_assert_eq!(check(&snapshot_message(stamp, &next).encode_to_vec()), Ok(()));
            let delta = super::super::delta::Delta { identity: None, ..diff(&prev, &next) };
            prop_assert_eq!(check(&delta_message(stamp, &delta).encode_to_vec()), Ok(()));
        }
    }
}
