//! RIPs in translations.
//!
//! Programs and libraries that can be loaded anywhere (and with address-space randomisation are, in each process anew) lie
//! above 4 GiB: a page of theirs has many linear addresses, and one translation serves them all. Such a translation is
//! *movable*: its RIPs count from an address that no code has, and stand for the same distance from the linear address of
//! the page that is under way, `EmittedState::code_page`. Emitted code sets that wherever it enters such a page.
//!
//! Below 4 GiB, and in the upper half, where kernels are, code stays where it is; there RIPs are what they seem.

use super::mode::Mode;

/// What RIPs of movable code count from: not canonical, so no RIP of other code is near it.
const ORIGIN: u64 = 1 << 62;
/// How far they are from there at most: a page, and a displacement of 32 bits.
const REACH: u64 = 1 << 32;
/// Where movable code begins and ends. All that it reaches is canonical, or would be too low by less than its reach.
const MOVABLE: std::ops::Range<u64> = REACH..(1 << 47) - REACH;

/// What `rip` is called in translations for `mode`.
pub fn placed(mode: Mode, rip: u64) -> u64 {
    let low = mode.low_movable() && rip < MOVABLE.start;
    let movable = mode.bits() == 64 && !mode.step() && (low || MOVABLE.contains(&rip));
    if movable { ORIGIN | rip & 0xfff } else { rip }
}

/// Whether that is in a movable translation.
pub fn is_movable(placed: u64) -> bool {
    distance(placed).is_some()
}

/// How far from the page under way that is, if it is in a movable translation.
pub fn distance(placed: u64) -> Option<i64> {
    let distance = placed.wrapping_sub(ORIGIN) as i64;
    (distance.unsigned_abs() <= REACH).then_some(distance)
}

/// The RIP of something that is called `placed`, while the page under way is the one at `code_page`.
pub fn resolve(placed: u64, code_page: u64) -> u64 {
    distance(placed).map_or(placed, |distance| code_page.wrapping_add_signed(distance))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::segment::is_canonical;

    #[test]
    fn only_what_is_movable_is_taken_for_that() {
        let ends = [0, REACH - 1, MOVABLE.end, (1 << 47) - 1, (1 << 47) + 0xfff, u64::MAX - 0xfff, u64::MAX];
        assert!(ends.iter().all(|&rip| !is_movable(rip) && resolve(rip, 0x5000) == rip));
        for rip in [MOVABLE.start, MOVABLE.end - 1] {
            assert!(is_canonical(rip + REACH) && is_canonical(rip - REACH));
        }
    }

    #[test]
    fn distances_lead_back() {
        for distance in [0, 0xfff, -1, i64::from(i32::MIN), i64::from(i32::MAX) + 0x100f] {
            let placed = ORIGIN.wrapping_add_signed(distance);
            assert_eq!(resolve(placed, 0x7f12_3456_7000), 0x7f12_3456_7000u64.wrapping_add_signed(distance));
        }
    }
}
