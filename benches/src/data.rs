//! Random source data, poison, and the checksums that tell one from the other.
#![forbid(unsafe_code)]

use anyhow::Context as _;
use kvtransfer::memory::Region;

use crate::case::{Block, Case};

/// What targets hold before a transfer: no random block looks like it.
const POISON: u8 = 0xa5;
/// Bytes copied out of a region at a time.
const PIECE: usize = 1 << 20;

/// A small generator (SplitMix64, Steele et al. 2014): speed and a seed are all that is asked of it.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    /// A number under `bound`; its bias of at most 2^-40 does not matter to a shuffle.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound as u64).expect("invariant: less than a usize")
    }
}

/// Which of a block's two places is meant.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Side {
    Source,
    Target,
}

impl Side {
    fn place(self, block: Block) -> u64 {
        match self {
            Self::Source => block.source,
            Self::Target => block.target,
        }
    }
}

/// Writes fresh random data into every source block.
pub(crate) fn fill(region: &Region, case: &Case, seed: u64) -> anyhow::Result<()> {
    let mut random = Random::new(seed);
    let mut piece = vec![0; PIECE.min(case.block_bytes)];
    for block in case.all_blocks() {
        for offset in (0..case.block_bytes).step_by(piece.len()) {
            for word in piece.as_chunks_mut::<8>().0 {
                *word = random.next().to_le_bytes();
            }
            let place = Side::Source.place(block) + offset as u64;
            region.write_at(place, &piece).context("filling")?;
        }
    }
    Ok(())
}

/// Overwrites every target block, so that a transfer that does nothing cannot pass the check.
pub(crate) fn poison(region: &Region, case: &Case) -> anyhow::Result<()> {
    for block in case.all_blocks() {
        region.fill(Side::Target.place(block), case.block_bytes, POISON)?;
    }
    Ok(())
}

/// A checksum of every block, in order.
pub(crate) fn checksums(region: &Region, case: &Case, side: Side) -> anyhow::Result<Vec<u64>> {
    let mut piece = vec![0; PIECE.min(case.block_bytes)];
    let mut sums = Vec::new();
    for block in case.all_blocks() {
        let mut sum = 0;
        for offset in (0..case.block_bytes).step_by(piece.len()) {
            region.read_at(side.place(block) + offset as u64, &mut piece)?;
            sum = checksum(sum, &piece);
        }
        sums.push(sum);
    }
    Ok(sums)
}

/// Four multiply-and-rotate lanes over the words, which see every bit and its place. Not for adversaries. The bytes must
/// be a multiple of 32, as every block is.
fn checksum(start: u64, bytes: &[u8]) -> u64 {
    const ODD: u64 = 0x9fb2_1c65_1e98_df25;
    let mut lanes = [start ^ 1, start ^ 2, start ^ 3, start ^ 4];
    let (groups, rest) = bytes.as_chunks::<32>();
    debug_assert!(rest.is_empty(), "blocks are multiples of 32 bytes");
    for group in groups {
        let (words, _) = group.as_chunks::<8>();
        for (lane, word) in lanes.iter_mut().zip(words) {
            let word = u64::from_le_bytes(*word);
            *lane = (*lane ^ word).wrapping_mul(ODD).rotate_left(29);
        }
    }
    lanes.into_iter().fold(bytes.len() as u64, |sum, lane| {
        (sum ^ lane).wrapping_mul(ODD).rotate_left(31)
    })
}

#[cfg(test)]
mod tests {
    use kvtransfer::memory::Region;

    use super::{Side, checksum, checksums, fill, poison};
    use crate::case::{Case, CaseName, Extent};

    #[test]
    fn a_flipped_bit_and_swapped_words_change_the_checksum() {
        let bytes: Vec<u8> = (0..4096_u32).map(|at| (at * 7 % 251) as u8).collect();
        let whole = checksum(0, &bytes);
        for at in [0, 9, 31, 32, 2048, 4095] {
            let mut flipped = bytes.clone();
            flipped[at] ^= 0x10;
            assert_ne!(whole, checksum(0, &flipped), "byte {at}");
        }
        let mut swapped = bytes.clone();
        swapped[0..64].rotate_left(32);
        assert_ne!(whole, checksum(0, &swapped));
        assert_ne!(whole, checksum(0, &bytes[..4064]));
    }

    #[test]
    fn poison_and_every_round_have_other_checksums() {
        let extent = Extent {
            rounds: 1,
            seed: 3,
            tiny: true,
            mib: 1,
            samples: 1,
        };
        let case = Case::new(CaseName::Pages4k, extent);
        let region = Region::mmap(case.region_bytes()).unwrap();
        fill(&region, &case, 1).unwrap();
        let first = checksums(&region, &case, Side::Source).unwrap();
        fill(&region, &case, 2).unwrap();
        let second = checksums(&region, &case, Side::Source).unwrap();
        poison(&region, &case).unwrap();
        let poisoned = checksums(&region, &case, Side::Target).unwrap();
        assert_eq!(first.len(), 64 * 16);
        for (at, sum) in first.iter().enumerate() {
            assert_ne!(*sum, second[at]);
            assert_ne!(*sum, poisoned[at]);
        }
    }
}
