//! The one descriptor that a queue's thread sleeps on: its io_uring, wake-ups by other threads, and a timer.

use std::{
    cell::Cell,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, ThreadId},
    time::Duration,
};

use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, epoll, eventfd, poll},
    time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime},
};

use crate::ring::Ring;

/// An epoll instance over what can wake a queue's thread.
pub(crate) struct Event {
    epoll: OwnedFd,
    wake: Arc<Wake>,
    timer: OwnedFd,
    timer_set: Cell<bool>,
}

struct Wake {
    eventfd: OwnedFd,
    /// Whether somebody has written to it.
    written: AtomicBool,
}

/// Wakes a queue's thread.
pub(crate) struct EventWaker {
    wake: Arc<Wake>,
    owner: ThreadId,
}

impl Event {
    pub fn new(ring: Option<&Ring>) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;
        let add = |fd: BorrowedFd| epoll::add(&epoll, fd, epoll::EventData::new_u64(0), epoll::EventFlags::IN);
        add(wake.as_fd())?;
        add(timer.as_fd())?;
        if let Some(ring) = ring {
            ring.with_fd(add)?;
        }
        let wake = Arc::new(Wake { eventfd: wake, written: AtomicBool::new(false) });
        Ok(Self { epoll, wake, timer, timer_set: Cell::new(false) })
    }

    /// For other threads to wake this one.
    pub fn waker(&self) -> EventWaker {
        EventWaker { wake: self.wake.clone(), owner: thread::current().id() }
    }

    /// Sleeps until there is something to do.
    pub fn wait(&self) {
        // An interruption by a signal is a wake-up for nothing.
        let _ = poll(&mut [PollFd::new(&self.epoll, PollFlags::IN)], None);
    }

    /// Forgets wake-ups; to be called before looking for what they were for.
    pub fn clear(&self) {
        // No system call where there was none. A wake-up that is written and not yet announced is read next time.
        let mut count = [0; 8];
        if self.wake.written.swap(false, Ordering::AcqRel) {
            let _ = rustix::io::read(&self.wake.eventfd, &mut count);
        }
        if self.timer_set.get() && rustix::io::read(&self.timer, &mut count).is_ok() {
            self.timer_set.set(false);
        }
    }

    /// Wakes the thread after this time.
    pub fn set_timer(&self, after: Duration) {
        self.timer_set.set(true);
        // Zero would mean never.
        let after = after.max(Duration::from_nanos(1));
        let value = Timespec { tv_sec: after.as_secs() as i64, tv_nsec: after.subsec_nanos().into() };
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
        if let Err(error) = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once) {
            tracing::error!("cannot set a timer: {error}");
        }
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

impl EventWaker {
    /// Wakes the thread, if it is not the one that calls this.
    pub fn wake(&self) {
        if thread::current().id() != self.owner {
            // Full (2^64 - 2 wake-ups) means that it will wake up.
            let _ = rustix::io::write(&self.wake.eventfd, &1_u64.to_ne_bytes());
            self.wake.written.store(true, Ordering::Release);
        }
    }
}
