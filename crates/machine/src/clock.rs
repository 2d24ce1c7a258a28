//! The machine's clock: nanoseconds since power-up. It stops while the machine is paused and is saved with it.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

use rustix::time::{ClockId, clock_gettime};

/// In [`Clock::origin`]: the clock stands still.
const STOPPED: i64 = i64::MIN;

/// The machine's clock. Reading it takes no lock: every device access does.
#[derive(Debug)]
pub struct Clock {
    /// The host's time at which this clock was 0, or [`STOPPED`].
    origin: AtomicI64,
    /// What it reads while it stands still.
    stopped_at: AtomicU64,
}

impl Default for Clock {
    fn default() -> Self {
        Self { origin: AtomicI64::new(STOPPED), stopped_at: AtomicU64::new(0) }
    }
}

impl Clock {
    /// Nanoseconds since power-up.
    pub fn now(&self) -> u64 {
        match self.origin.load(Ordering::Acquire) {
            STOPPED => self.stopped_at.load(Ordering::Acquire),
            origin => (host_now() - origin) as u64,
        }
    }

    /// Lets it run on from where it stands. Called by one thread at a time, as [`Clock::stop`] and [`Clock::set`] are.
    pub fn start(&self) {
        if self.origin.load(Ordering::Acquire) == STOPPED {
            let origin = host_now() - self.stopped_at.load(Ordering::Acquire) as i64;
            self.origin.store(origin, Ordering::Release);
        }
    }

    /// Stops it.
    pub fn stop(&self) {
        // The time first: whoever sees the clock stopped must see when.
        self.stopped_at.store(self.now(), Ordering::Release);
        self.origin.store(STOPPED, Ordering::Release);
    }

    /// Sets it while it stands still. A saved time of more than a century is cut to one.
    pub fn set(&self, now: u64) {
        const CENTURY: u64 = 100 * 366 * 86_400 * 1_000_000_000;
        self.stopped_at.store(now.min(CENTURY), Ordering::Release);
    }
}

fn host_now() -> i64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec * 1_000_000_000 + now.tv_nsec
}

#[cfg(test)]
mod tests {
    use std::{thread::sleep, time::Duration};

    use super::*;

    #[test]
    fn it_stands_still_while_stopped_and_goes_on_without_a_step() {
        let clock = Clock::default();
        assert_eq!(clock.now(), 0);
        clock.set(5_000_000_000);
        clock.start();
        sleep(Duration::from_millis(5));
        clock.stop();
        let stopped = clock.now();
        assert!((5_005_000_000..6_000_000_000).contains(&stopped), "{stopped}");
        sleep(Duration::from_millis(5));
        assert_eq!(clock.now(), stopped);
        clock.start();
        let resumed = clock.now();
        assert!((stopped..stopped + 4_000_000).contains(&resumed), "{stopped} {resumed}");
    }

    #[test]
    fn starting_twice_changes_nothing() {
        let clock = Clock::default();
        clock.start();
        sleep(Duration::from_millis(2));
        clock.start();
        assert!(clock.now() >= 2_000_000);
    }
}
