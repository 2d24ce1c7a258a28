//! The rate of one direction.

use std::{io, os::fd::OwnedFd, time::Instant};

use purlin_storage::limit::{Bucket, Rate};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

/// Says when the next packet may go.
pub struct Pace {
    bucket: Bucket,
    /// Fires when a packet may go that could not.
    timer: OwnedFd,
}

impl Pace {
    /// A direction of this rate, in bytes each second.
    pub fn new(rate: Rate) -> io::Result<Self> {
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;
        Ok(Self { bucket: Bucket::new(rate, Instant::now()), timer })
    }

    /// What is ready when the next packet may go.
    pub fn timer(&self) -> &OwnedFd {
        &self.timer
    }

    /// Whether the next packet may go now. If not, the timer is set.
    pub fn may_go(&self) -> bool {
        let now = Instant::now();
        let wait = self.bucket.ready_at(now).saturating_duration_since(now);
        if wait.is_zero() {
            return true;
        }
        let it_value = Timespec { tv_sec: wait.as_secs().cast_signed(), tv_nsec: wait.subsec_nanos().into() };
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value };
        // It fails for values out of range only: then nothing is limited, and nothing stands still.
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once).is_err()
    }

    /// A packet of this many bytes has gone.
    pub fn charge(&mut self, bytes: usize) {
        self.bucket.charge(bytes as u64, Instant::now());
    }
}
