//! Division by a number known before the launch: one multiplication, as the kernels do it.
#![forbid(unsafe_code)]

/// Numbers that the kernels divide are below this.
pub(super) const DIVIDEND_END: u64 = 1 << 31;

/// A divisor with its factor and shift (Granlund and Montgomery, 1994): for `n < 2^31`,
/// `n / value == (high(n × factor) + n) >> shift`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Divisor {
    pub(super) value: u32,
    pub(super) factor: u32,
    pub(super) shift: u32,
}

impl Divisor {
    /// A divisor of at least one.
    pub(super) fn new(value: u32) -> Self {
        assert!(
            value > 0,
            "invariant: rows, units and items are counted from one"
        );
        let shift = 32 - (value - 1).leading_zeros();
        let rest = (1_u64 << shift) - u64::from(value);
        let factor = (rest << 32) / u64::from(value) + 1;
        let factor = u32::try_from(factor).expect("invariant: the rest is less than the divisor");
        Self {
            value,
            factor,
            shift,
        }
    }

    /// What the kernels compute.
    pub(super) fn divide(self, n: u32) -> u32 {
        let high = (u64::from(n) * u64::from(self.factor)) >> 32;
        let sum = high + u64::from(n);
        u32::try_from(sum >> self.shift)
            .expect("invariant: a quotient is not more than its dividend")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4096))]
        #[test]
        fn it_divides(n in 0..1_u32 << 31, value in 1..1_u32 << 31, small in 1..5000_u32) {
            prop_assert_eq!(Divisor::new(value).divide(n), n / value);
            prop_assert_eq!(Divisor::new(small).divide(n), n / small);
            let multiple = n / small * small;
            prop_assert_eq!(Divisor::new(small).divide(multiple), n / small);
            prop_assert_eq!(Divisor::new(small).divide(multiple.saturating_sub(1)), multiple.saturating_sub(1) / small);
        }
    }

    #[test]
    fn it_divides_at_the_edges() {
        let last = (1_u32 << 31) - 1;
        for value in [1, 2, 3, 5, 7, 1 << 20, (1 << 20) + 1, last - 1, last] {
            for n in [0, 1, value - 1, value, last - 1, last] {
                assert_eq!(Divisor::new(value).divide(n), n / value, "{n} / {value}");
            }
        }
    }
}
