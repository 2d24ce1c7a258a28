//! What the device shares with whoever steers it.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
};

use rustix::event::{EventfdFlags, eventfd};

use super::{PAGE, Statistics};

/// Steers a balloon, from any thread, whatever the guest does. Nothing here waits.
#[derive(Clone, Debug)]
pub struct BalloonHandle(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// Pages that the guest is asked to give back in all.
    target: AtomicU32,
    /// Pages that the driver says it has given back.
    actual: AtomicU32,
    statistics: Mutex<Statistics>,
    /// The driver has not been told of the target.
    news: AtomicBool,
    /// The driver is to be asked for statistics.
    asks: AtomicBool,
    /// Wakes the device's thread for both.
    event: OwnedFd,
}

impl BalloonHandle {
    /// A balloon that is to have this size, in bytes.
    pub(super) fn new(target: u64) -> io::Result<Self> {
        Ok(Self(Arc::new(Shared {
            target: AtomicU32::new(pages(target)),
            actual: AtomicU32::new(0),
            statistics: Mutex::default(),
            news: AtomicBool::new(false),
            asks: AtomicBool::new(false),
            event: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })))
    }

    /// Asks the guest to have given back this many bytes of memory in all, rounded down to pages of 4 KiB; at most
    /// 16 TiB. A guest does it as fast as it can, or not at all.
    pub fn set_target(&self, bytes: u64) {
        self.0.target.store(pages(bytes), Ordering::SeqCst);
        self.announce();
    }

    /// The last target: bytes.
    pub fn target(&self) -> u64 {
        u64::from(self.target_pages()) * PAGE
    }

    /// Bytes that the guest says it has given back: never believe it more than that.
    pub fn actual(&self) -> u64 {
        u64::from(self.actual_pages()) * PAGE
    }

    /// What the guest has last told of its memory.
    pub fn statistics(&self) -> Statistics {
        *self.lock()
    }

    /// Asks the guest for news; [`Statistics::updates`] tells when they are there.
    pub fn ask_for_statistics(&self) {
        self.0.asks.store(true, Ordering::SeqCst);
        self.wake();
    }

    /// Makes the device tell the driver of the target.
    pub(super) fn announce(&self) {
        self.0.news.store(true, Ordering::SeqCst);
        self.wake();
    }

    fn wake(&self) {
        // It fails only where the count overflows: then the event is signalled.
        let _ = rustix::io::write(&self.0.event, &1u64.to_ne_bytes());
    }

    /// What the device's thread waits for.
    pub(super) fn event(&self) -> BorrowedFd<'_> {
        self.0.event.as_fd()
    }

    /// What to do since the last call: tell the driver of the target, and ask for statistics.
    pub(super) fn take_wishes(&self) -> (bool, bool) {
        let _ = rustix::io::read(&self.0.event, &mut [0u8; 8]);
        (self.0.news.swap(false, Ordering::SeqCst), self.0.asks.swap(false, Ordering::SeqCst))
    }

    pub(super) fn target_pages(&self) -> u32 {
        self.0.target.load(Ordering::SeqCst)
    }

    pub(super) fn set_target_pages(&self, pages: u32) {
        self.0.target.store(pages, Ordering::SeqCst);
    }

    pub(super) fn actual_pages(&self) -> u32 {
        self.0.actual.load(Ordering::SeqCst)
    }

    pub(super) fn set_actual_pages(&self, pages: u32) {
        self.0.actual.store(pages, Ordering::SeqCst);
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Statistics> {
        self.0.statistics.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// As many as there can be.
fn pages(bytes: u64) -> u32 {
    u32::try_from(bytes / PAGE).unwrap_or(u32::MAX)
}
