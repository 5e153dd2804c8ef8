//! The aux rows: what a prefill tells the decode besides the KV pages.
//!
//! A subset of SGLang's `MetadataBuffers` (`srt/disaggregation/utils.py:399-674`): the first token, the cached
//! counts, and the room, in rows of 64 bytes. The room is the last entry, the last bytes to become visible: a decode
//! that reads its own room number knows that everything else has arrived, and a wrong number means corruption.

use super::RankMemory;

/// Entries of the aux component, in wire order: output ids, cached tokens, room.
pub const AUX_ENTRIES: usize = 3;

/// Bytes of every row; SGLang pads its rows to 64 on purpose, a cache line.
pub const ROW_BYTES: usize = 64;

/// Number of an aux row, the same on every rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AuxSlot(pub u32);

/// The contents of one row across the aux entries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AuxRow {
    /// The token that prefill drew.
    pub first_token: u32,
    /// Prompt tokens that prefill found in its prefix cache.
    pub cached_tokens: u32,
    /// The room the row was written for; 0 in a row that nobody filled.
    pub room: u64,
}

impl AuxRow {
    /// Writes the row on every rank, the room last.
    pub fn write(&self, ranks: &[RankMemory], slot: AuxSlot) {
        let words = [
            u64::from(self.first_token).to_le_bytes(),
            u64::from(self.cached_tokens).to_le_bytes(),
            self.room.to_le_bytes(),
        ];
        for rank in ranks {
            for (entry, word) in words.iter().enumerate() {
                let mut row = [0; ROW_BYTES];
                row[..8].copy_from_slice(word);
                rank.store
                    .write(rank.shape.first_aux_entry() + entry, offset(slot), &row);
            }
        }
    }

    /// Reads the row of one rank.
    #[must_use]
    pub fn read(rank: &RankMemory, slot: AuxSlot) -> Self {
        let word = |entry: usize| {
            let mut bytes = [0; 8];
            rank.store.read(
                rank.shape.first_aux_entry() + entry,
                offset(slot),
                &mut bytes,
            );
            u64::from_le_bytes(bytes)
        };
        let narrow = |word: u64| u32::try_from(word & u64::from(u32::MAX)).unwrap_or_default();
        Self {
            first_token: narrow(word(0)),
            cached_tokens: narrow(word(1)),
            room: word(2),
        }
    }
}

fn offset(slot: AuxSlot) -> u64 {
    u64::from(slot.0) * ROW_BYTES as u64
}

#[cfg(test)]
mod tests {
    use super::super::RankShape;
    use super::super::heap::heap_ranks;
    use super::*;

    #[test]
    fn rows_are_read_back_on_every_rank_and_keep_to_themselves() {
        let shape = RankShape {
            layers: 1,
            kv_heads: 2,
            head_dim: 2,
            page_size: 1,
            pages: 1,
            aux_slots: 3,
        };
        let ranks = heap_ranks(shape, 2);
        let row = AuxRow {
            first_token: 259,
            cached_tokens: 48,
            room: u64::MAX - 1,
        };
        row.write(&ranks, AuxSlot(1));
        for rank in &ranks {
            assert_eq!(AuxRow::read(rank, AuxSlot(1)), row);
            assert_eq!(AuxRow::read(rank, AuxSlot(0)), AuxRow::default());
            assert_eq!(AuxRow::read(rank, AuxSlot(2)), AuxRow::default());
        }
        AuxRow::default().write(&ranks, AuxSlot(1));
        assert_eq!(AuxRow::read(&ranks[1], AuxSlot(1)).room, 0);
    }
}
