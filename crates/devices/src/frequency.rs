//! A clock's ticks and the machine's nanoseconds, converted exactly in both directions, so that nothing drifts.

const NS: u128 = 1_000_000_000;

/// A frequency in Hz, less than 1 GHz. Its clock has ticked 0 times when the machine's clock reads 0.
#[derive(Clone, Copy, Debug)]
pub struct Frequency(pub u64);

impl Frequency {
    /// How many ticks there have been at `ns`.
    pub fn ticks(self, ns: u64) -> u64 {
        // Below 1 GHz there are fewer ticks than nanoseconds.
        (u128::from(ns) * u128::from(self.0) / NS) as u64
    }

    /// The first nanosecond at which there have been `ticks`.
    pub fn ns(self, ticks: u64) -> u64 {
        (u128::from(ticks) * NS).div_ceil(u128::from(self.0)).try_into().unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PIT: Frequency = Frequency(1_193_182);

    #[test]
    fn a_century_has_all_its_ticks() {
        let century = 36_525 * 86_400;
        assert_eq!(PIT.ticks(century * 1_000_000_000), century * PIT.0);
        assert_eq!(PIT.ns(century * PIT.0), century * 1_000_000_000);
        assert_eq!(PIT.ticks(u64::MAX), 22_010_322_987_356_910);
        assert_eq!(PIT.ns(u64::MAX), u64::MAX);
    }

    proptest! {
        #[test]
        fn a_tick_begins_at_its_nanosecond(tick in 1..22_010_322_987_356_910u64) {
            let start = PIT.ns(tick);
            prop_assert_eq!(PIT.ticks(start), tick);
            prop_assert_eq!(PIT.ticks(start - 1), tick - 1);
        }
    }
}
