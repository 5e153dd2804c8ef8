//! CRC32C as the kernel computes it, and as everybody else does.
#![forbid(unsafe_code)]

use bytemuck::{Pod, Zeroable};

/// The Castagnoli polynomial, reflected.
const POLYNOMIAL: u32 = 0x82f6_3b78;

/// Lanes of a warp.
const LANES: usize = 32;

/// `CrcTables` of copy.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct Tables {
    /// The state times x^4096, by byte of the state.
    step: [[u32; 256]; 4],
    /// The checksum of a vector of zeroes but for one byte, by its place and value.
    vector: [[u32; 256]; 16],
    /// x^(128 (31 - lane)).
    lane: [u32; LANES],
}

/// Shifts a state by one bit: times x.
fn times_x(state: u32) -> u32 {
    (state >> 1) ^ (if state & 1 == 1 { POLYNOMIAL } else { 0 })
}

/// The product of two reflected polynomials.
fn times(mut a: u32, mut b: u32) -> u32 {
    let mut product = 0;
    for _ in 0..32 {
        if a & 0x8000_0000 != 0 {
            product ^= b;
        }
        a <<= 1;
        b = times_x(b);
    }
    product
}

/// x to a power.
fn power(bits: u32) -> u32 {
    (0..bits).fold(0x8000_0000, |state, _| times_x(state))
}

/// CRC32C without start and end values.
fn raw(bytes: &[u8], start: u32) -> u32 {
    bytes.iter().fold(start, |state, byte| {
        (0..8).fold(state ^ u32::from(*byte), |state, _| times_x(state))
    })
}

/// CRC32C, bit by bit: the definition.
#[must_use]
pub fn crc32c(bytes: &[u8]) -> u32 {
    !raw(bytes, u32::MAX)
}

impl Tables {
    pub(super) fn new() -> Self {
        let mut tables = Self::zeroed();
        let step = power(4096);
        for value in 0..=255_u8 {
            let at = usize::from(value);
            for (place, table) in tables.step.iter_mut().enumerate() {
                table[at] = times(step, u32::from(value) << (8 * place));
            }
            for (place, table) in tables.vector.iter_mut().enumerate() {
                let mut vector = [0; 16];
                vector[place] = value;
                table[at] = raw(&vector, 0);
            }
        }
        for (place, lane) in tables.lane.iter_mut().enumerate() {
            *lane = (place + 1..LANES).fold(power(0), |state, _| times(state, power(128)));
        }
        tables
    }

    fn vector(&self, bytes: &[u8]) -> u32 {
        let entry = |(table, byte): (&[u32; 256], &u8)| table[usize::from(*byte)];
        self.vector
            .iter()
            .zip(bytes)
            .map(entry)
            .fold(0, |sum, part| sum ^ part)
    }

    fn step(&self, state: u32) -> u32 {
        let bytes = state.to_le_bytes();
        let entry = |(table, byte): (&[u32; 256], &u8)| table[usize::from(*byte)];
        self.step
            .iter()
            .zip(&bytes)
            .map(entry)
            .fold(0, |sum, part| sum ^ part)
    }

    /// The checksum of whole vectors, lane by lane as the kernel does it.
    pub(super) fn by_lanes(&self, bytes: &[u8]) -> u32 {
        let vectors: Vec<&[u8]> = bytes.chunks_exact(16).collect();
        let rounds = vectors.len().div_ceil(LANES);
        let missing = rounds * LANES - vectors.len();
        let mut total = 0;
        for lane in 0..LANES {
            let mut sum = 0;
            for round in 0..rounds {
                sum = self.step(sum);
                let Some(place) = (round * LANES + lane).checked_sub(missing) else {
                    continue;
                };
                sum ^= if place == 0 {
                    let mut first: Vec<u8> = vectors[0].to_vec();
                    first[..4].iter_mut().for_each(|byte| *byte = !*byte);
                    self.vector(&first)
                } else {
                    self.vector(vectors[place])
                };
            }
            total ^= times(self.lane[lane], sum);
        }
        !total
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn it_is_castagnolis() {
        // RFC 3720, appendix B.4.
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn lanes_add_up_to_the_definition(
            vectors in prop_oneof![1..5_usize, 30..35_usize, 60..140_usize], seed in any::<u8>(),
        ) {
            let bytes: Vec<u8> = (0..vectors * 16)
                .map(|place| (place.wrapping_mul(31) >> 2).to_le_bytes()[0] ^ seed)
                .collect();
            prop_assert_eq!(Tables::new().by_lanes(&bytes), crc32c(&bytes));
        }
    }
}
