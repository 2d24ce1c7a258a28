//! Something that one thread waits for in poll(2), and others make happen.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::event::{EventfdFlags, eventfd};

/// An event: it has happened from [`Event::signal`] until [`Event::clear`]. Its descriptor is readable meanwhile.
#[derive(Debug)]
pub(crate) struct Event(OwnedFd);

impl Event {
    /// An event that has not happened.
    pub fn new() -> io::Result<Self> {
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// It happens. Does not block.
    pub fn signal(&self) {
        // It fails only where the count would overflow: then it has happened.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// It has not happened since.
    pub fn clear(&self) {
        let _ = rustix::io::read(&self.0, &mut [0u8; 8]);
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
