//! What SGLang publishes of a prefix cache (`srt/disaggregation/kv_events.py`): batches of events in MessagePack.
//!
//! A batch is an array of its time, its events and a rank. An event is a map that names its kind under `type` (0.5.23); older
//! servers send arrays, the kind first and the fields in the order of their declaration. What an event says of other memory than
//! the GPU's, of adapters or of salted prompts is left out: nothing here could match it.
#![forbid(unsafe_code)]

use super::msgpack::{Head, Malformed, Reader};
use crate::schedule::prefix::{CHUNKS_MAX, chunks_of_tokens};
use crate::schedule::sample::KvEvent;

/// The names of an event's fields, in the order in which arrays have them.
const STORED: [&[u8]; 6] = [
    b"block_hashes",
    b"parent_block_hash",
    b"token_ids",
    b"block_size",
    b"lora_id",
    b"medium",
];
const REMOVED: [&[u8]; 2] = [b"block_hashes", b"medium"];

/// The events of a batch, for prompts cut into blocks of `block_tokens`.
///
/// # Errors
/// [`Malformed`]; nothing of the batch is to be believed then.
pub(super) fn events(payload: &[u8], block_tokens: u32) -> Result<Vec<KvEvent>, Malformed> {
    let mut reader = Reader::new(payload);
    let Head::Array(2..) = reader.head()? else {
        return Err(Malformed);
    };
    reader.skip()?;
    let Head::Array(count) = reader.head()? else {
        return Err(Malformed);
    };
    let mut events = Vec::new();
    for _ in 0..count {
        let fields = Fields::read(&mut reader)?;
        events.extend(fields.event(block_tokens)?);
    }
    Ok(events)
}

/// An event's fields, as far as they matter.
#[derive(Debug, Default)]
struct Fields<'a> {
    kind: &'a [u8],
    hashes: Vec<u64>,
    parent: Option<u64>,
    tokens: Vec<u32>,
    block_tokens: u64,
    medium: Option<&'a [u8]>,
    /// The blocks serve only prompts that look alike and are not.
    is_special: bool,
}

impl<'a> Fields<'a> {
    fn read(reader: &mut Reader<'a>) -> Result<Self, Malformed> {
        let mut fields = Self::default();
        match reader.head()? {
            Head::Map(count) => {
                for _ in 0..count {
                    let Head::Bytes(name) = reader.head()? else {
                        return Err(Malformed);
                    };
                    fields.take(name, reader)?;
                }
            }
            Head::Array(count @ 1..) => {
                fields.take(b"type", reader)?;
                let names: &[&[u8]] = match fields.kind {
                    b"BlockStored" => &STORED,
                    _ => &REMOVED,
                };
                for index in 0..count - 1 {
                    match names.get(index) {
                        Some(name) => fields.take(name, reader)?,
                        None => reader.skip()?,
                    }
                }
            }
            _ => return Err(Malformed),
        }
        Ok(fields)
    }

    fn take(&mut self, name: &[u8], reader: &mut Reader<'a>) -> Result<(), Malformed> {
        match name {
            b"type" => self.kind = text(reader)?.ok_or(Malformed)?,
            b"block_hashes" => self.hashes = list(reader, |head, _| whole(head))?,
            b"parent_block_hash" => {
                self.parent = match reader.head()? {
                    Head::Nil => None,
                    head => Some(whole(head)?),
                }
            }
            b"token_ids" => self.tokens = list(reader, token)?,
            b"block_size" => self.block_tokens = whole(reader.head()?)?,
            b"medium" => self.medium = text(reader)?,
            b"lora_id" | b"lora_name" | b"cache_salt" => {
                let before = *reader;
                reader.skip()?;
                let mut value = before;
                self.is_special |= value.head()? != Head::Nil;
            }
            _ => reader.skip()?,
        }
        Ok(())
    }

    fn event(self, block_tokens: u32) -> Result<Option<KvEvent>, Malformed> {
        let elsewhere = self.medium.is_some_and(|medium| medium != b"GPU");
        Ok(match self.kind {
            b"AllBlocksCleared" => Some(KvEvent::Cleared),
            _ if elsewhere || self.is_special => None,
            b"BlockRemoved" => Some(KvEvent::Removed {
                hashes: self.hashes,
            }),
            b"BlockStored" if self.block_tokens == u64::from(block_tokens) => {
                let size = block_tokens as usize;
                if self.tokens.len() != self.hashes.len().saturating_mul(size) {
                    return Err(Malformed);
                }
                let chunks = chunks_of_tokens(&self.tokens, size);
                Some(KvEvent::Stored {
                    parent: self.parent,
                    blocks: self
                        .hashes
                        .into_iter()
                        .zip(chunks)
                        .take(CHUNKS_MAX)
                        .collect(),
                })
            }
            // The part of a block at a prompt's end, or a kind that is not known yet.
            _ => None,
        })
    }
}

fn whole(head: Head<'_>) -> Result<u64, Malformed> {
    match head {
        Head::Int(number) => Ok(number),
        _ => Err(Malformed),
    }
}

fn text<'a>(reader: &mut Reader<'a>) -> Result<Option<&'a [u8]>, Malformed> {
    match reader.head()? {
        Head::Bytes(bytes) => Ok(Some(bytes)),
        Head::Nil => Ok(None),
        _ => Err(Malformed),
    }
}

/// A token's number. Speculative decoding makes pairs of neighbours; the first one is the prompt's.
fn token(head: Head<'_>, reader: &mut Reader<'_>) -> Result<u32, Malformed> {
    let number = match head {
        Head::Array(count @ 1..) => {
            let first = whole(reader.head()?)?;
            for _ in 1..count {
                reader.skip()?;
            }
            first
        }
        head => whole(head)?,
    };
    u32::try_from(number).map_err(|_| Malformed)
}

fn list<'a, T>(
    reader: &mut Reader<'a>,
    element: impl Fn(Head<'a>, &mut Reader<'a>) -> Result<T, Malformed>,
) -> Result<Vec<T>, Malformed> {
    let Head::Array(count) = reader.head()? else {
        return Err(Malformed);
    };
    let mut all = Vec::with_capacity(count);
    for _ in 0..count {
        let head = reader.head()?;
        all.push(element(head, reader)?);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `msgspec.msgpack.encode` of SGLang 0.5.23's `KVEventBatch` with all three kinds, `attn_dp_rank` 0, made by its own classes.
    const BATCH_0_5_23: &str = include_str!("batch_0_5_23.hex");
    /// The same by those of 0.5.17.
    const BATCH_0_5_17: &str = include_str!("batch_0_5_17.hex");

    fn bytes(hex: &str) -> Vec<u8> {
        let digits: Vec<u8> = hex.bytes().filter(u8::is_ascii_hexdigit).collect();
        let pairs = digits.as_chunks::<2>().0.iter();
        pairs
            .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
            .collect()
    }

    #[test]
    fn batches_of_real_servers_are_understood() {
        let chunks = chunks_of_tokens(&[1, 2, 3, 4, 70_000, 6, 7, 8], 4);
        let hash = (-7_i64).cast_unsigned();
        let expected = [
            KvEvent::Stored {
                parent: None,
                blocks: vec![(hash, chunks[0]), (11, chunks[1])],
            },
            KvEvent::Stored {
                parent: Some(11),
                blocks: vec![(12, chunks[0])],
            },
            KvEvent::Removed {
                hashes: vec![12, hash],
            },
            KvEvent::Cleared,
        ];
        for hex in [BATCH_0_5_23, BATCH_0_5_17] {
            assert_eq!(events(&bytes(hex), 4).unwrap(), expected);
            // Cut at any place it is refused, and nothing else happens.
            let whole = bytes(hex);
            for end in 0..whole.len() - 1 {
                assert_eq!(events(&whole[..end], 4), Err(Malformed), "{end}");
            }
        }
        let other_size = events(&bytes(BATCH_0_5_23), 16).unwrap();
        assert_eq!(other_size.len(), 2, "blocks of another size say nothing");
    }

    #[test]
    fn any_byte_may_be_wrong() {
        for hex in [BATCH_0_5_23, BATCH_0_5_17] {
            let whole = bytes(hex);
            for at in 0..whole.len() {
                for value in 0..=u8::MAX {
                    let mut broken = whole.clone();
                    broken[at] = value;
                    // Most are refused; a changed number is a number.
                    if let Ok(events) = events(&broken, 4) {
                        assert!(events.len() <= 8);
                    }
                }
            }
        }
    }
}
