//! The rate of one direction, which all pairs of queues share.

use std::{
    io,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use purlin_storage::limit::{Bucket, Rate};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

/// Both directions of a device.
#[derive(Clone)]
pub struct Limits {
    /// What the driver receives.
    pub receive: SharedBucket,
    /// What it sends.
    pub transmit: SharedBucket,
}

impl Limits {
    /// The same rate both ways, in bytes each second.
    pub fn new(rate: Rate) -> Self {
        let bucket = || SharedBucket(Arc::new(Mutex::new(Bucket::new(rate, Instant::now()))));
        Self { receive: bucket(), transmit: bucket() }
    }
}

/// A direction's bucket.
#[derive(Clone)]
pub struct SharedBucket(Arc<Mutex<Bucket>>);

impl SharedBucket {
    fn lock(&self) -> MutexGuard<'_, Bucket> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Says when a thread's next packet may go.
pub struct Pace {
    bucket: SharedBucket,
    /// Fires when a packet may go that could not.
    timer: OwnedFd,
}

impl Pace {
    /// A thread's part in a direction.
    pub fn new(bucket: SharedBucket) -> io::Result<Self> {
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;
        Ok(Self { bucket, timer })
    }

    /// What is ready when the next packet may go.
    pub fn timer(&self) -> &OwnedFd {
        &self.timer
    }

    /// Whether the next packet may go now. If not, the timer is set.
    pub fn may_go(&self) -> bool {
        let now = Instant::now();
        let wait = self.bucket.lock().ready_at(now).saturating_duration_since(now);
        if wait.is_zero() {
            return true;
        }
        let it_value = Timespec { tv_sec: wait.as_secs().cast_signed(), tv_nsec: wait.subsec_nanos().into() };
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value };
        // It fails for values out of range only: then nothing is limited, and nothing stands still.
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once).is_err()
    }

    /// A packet of this many bytes has gone.
    pub fn charge(&self, bytes: usize) {
        self.bucket.lock().charge(bytes as u64, Instant::now());
    }
}
