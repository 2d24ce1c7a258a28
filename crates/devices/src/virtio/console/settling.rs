//! How long a driver takes to finish setting itself up, which it does not show.
//!
//! Linux gives the device buffers for input first and makes its port known to itself afterwards
//! (drivers/char/virtio_console.c, `add_port`): an interrupt in between has it throw away what the buffers hold, and
//! the terminal's size. So for a while it gets no interrupt but for what it sends. Input may be put into its buffers all
//! the same: it looks there by itself when somebody opens its terminal.

use std::{io, os::fd::OwnedFd, time::Duration};

use rustix::{
    event::{PollFd, PollFlags},
    time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime},
};

/// Some hundred times what Linux takes.
const WHILE: Duration = Duration::from_millis(500);

/// The while that a driver gets, of the time in which the machine runs.
pub(super) struct Settling {
    timer: OwnedFd,
    is_set: bool,
}

impl Settling {
    /// A while that has not begun.
    pub fn new() -> io::Result<Self> {
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;
        Ok(Self { timer, is_set: false })
    }

    /// Whether it is over. It begins with the first call.
    pub fn is_over(&mut self) -> bool {
        if !self.is_set {
            self.begin();
        }
        // It can be read once it has expired.
        rustix::io::read(&self.timer, &mut [0u8; 8]).is_ok()
    }

    /// The machine stands still: it begins anew with the next call.
    pub fn interrupt(&mut self) {
        self.is_set = false;
    }

    /// What is ready when it is over.
    pub fn wanted(&self) -> PollFd<'_> {
        PollFd::new(&self.timer, PollFlags::IN)
    }

    fn begin(&mut self) {
        let it_value = Timespec { tv_sec: 0, tv_nsec: WHILE.subsec_nanos().into() };
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value };
        // It fails for values out of range only.
        self.is_set = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once).is_ok();
    }
}
