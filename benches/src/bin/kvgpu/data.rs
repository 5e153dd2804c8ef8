//! Random bytes, and orders of pages.

use std::time::Instant;

use kvtransfer::gpu::Pair;

/// What targets hold before a copy.
pub(crate) const POISON: u8 = 0xa5;

/// Marsaglia's xorshift: enough to tell any two pages apart.
pub(crate) struct Random(u64);

impl Random {
    /// From a seed that is printed.
    pub(crate) fn seeded(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % end.max(1) as u64).unwrap_or(0)
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        let words = (0..len.div_ceil(8)).flat_map(|_| self.next().to_le_bytes());
        words.take(len).collect()
    }

    /// Numbers below `count` in random order.
    pub(crate) fn order(&mut self, count: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..count).collect();
        for place in (1..count).rev() {
            order.swap(place, self.below(place + 1));
        }
        order
    }
}

/// Pages in random order on both sides.
pub(crate) fn scattered(
    random: &mut Random,
    source: u64,
    target: u64,
    count: usize,
    page: usize,
) -> Vec<Pair> {
    let at = |base: u64, place: usize| base + (place * page) as u64;
    let (from, to) = (random.order(count), random.order(count));
    let pair = |(from, to): (&usize, &usize)| Pair {
        source: at(source, *from),
        target: at(target, *to),
    };
    from.iter().zip(&to).map(pair).collect()
}

/// Seconds that `work` takes on the host.
#[expect(clippy::disallowed_methods, reason = "a benchmark reads the clock")]
pub(crate) fn host_seconds<T>(work: impl FnOnce() -> T) -> (f64, T) {
    let start = Instant::now();
    let result = work();
    (start.elapsed().as_secs_f64(), result)
}
