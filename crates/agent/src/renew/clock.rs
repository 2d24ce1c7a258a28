//! The clock of a copy: it stood still while the copy was made, for milliseconds, or since a snapshot was taken.
#![allow(unsafe_code)]

use std::{io, ptr, time::Duration};

use nix::libc::{adjtime, suseconds_t, timeval};
use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};

/// An error that is smaller is put right little by little. Where the clock is set everything is woken that waits for a time
/// (timerfd_create(2)), which takes a copy longer than all else that is done to it at first.
const SMALL: i128 = 500_000_000;

/// Sets it to a time since 1970, in nanoseconds.
pub fn set(time_ns: u64) -> io::Result<()> {
    let error = i128::from(time_ns) - nanoseconds(clock_gettime(ClockId::Realtime));
    if error.abs() < SMALL {
        return slew((error / 1000) as suseconds_t);
    }
    let time = Duration::from_nanos(time_ns).try_into().map_err(|_| io::ErrorKind::InvalidInput)?;
    Ok(clock_settime(ClockId::Realtime, time)?)
}

fn nanoseconds(time: Timespec) -> i128 {
    i128::from(time.tv_sec) * 1_000_000_000 + i128::from(time.tv_nsec)
}

/// Has it run faster or slower until it has made up for so many microseconds.
fn slew(microseconds: suseconds_t) -> io::Result<()> {
    let delta = timeval { tv_sec: microseconds.div_euclid(1_000_000), tv_usec: microseconds.rem_euclid(1_000_000) };
    // SAFETY: it reads the time, and writes to no old one.
    match unsafe { adjtime(&raw const delta, ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_error_does_not_move_the_clock() {
        let before = clock_gettime(ClockId::Realtime);
        let now = nanoseconds(before);
        match set((now + 300_000_000) as u64) {
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::PermissionDenied),
            Ok(()) => {
                let since = nanoseconds(clock_gettime(ClockId::Realtime)) - now;
                slew(0).unwrap();
                assert!((0..250_000_000).contains(&since), "it is {since} ns later");
            }
        }
    }
}
