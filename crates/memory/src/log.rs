//! Who has written to a slot.

use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicU64, Ordering, fence},
};

use vm_memory::{
    GuestRegionMmap,
    bitmap::{Bitmap, WithBitmapSlice},
};

use crate::{PAGE_SIZE, mapping::Mapping};

/// Hears of writes to pages that it watches. See [`PageLog::watch`].
pub trait WriteObserver: Send + Sync {
    /// `length` bytes at guest physical `address` were written; at least one page of them is watched.
    fn written(&self, address: u64, length: u64);
}

/// One slot's log: which pages are watched, and who wants to know.
#[derive(Clone)]
pub struct PageLog(Arc<Inner>);

struct Inner {
    start: u64,
    watched: Vec<AtomicU64>,
    observer: OnceLock<Arc<dyn WriteObserver>>,
    /// The slot's memory, which is there as long as anybody has the log.
    mapping: Mapping,
}

impl std::fmt::Debug for PageLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PageLog").field("start", &self.0.start).finish_non_exhaustive()
    }
}

impl PageLog {
    /// The log of the slot at guest physical `start` that `mapping` is.
    pub(crate) fn new(start: u64, mapping: Mapping) -> Self {
        let length = mapping.length();
        let words = (length / PAGE_SIZE).div_ceil(64);
        let watched = (0..words).map(|_| AtomicU64::new(0)).collect();
        Self(Arc::new(Inner { start, watched, observer: OnceLock::new(), mapping }))
    }

    /// Names who is told of writes to watched pages. The first call counts.
    pub fn set_observer(&self, observer: Arc<dyn WriteObserver>) {
        let _ = self.0.observer.set(observer);
    }

    /// Starts or stops watching the page `page` (counted from the start of the slot).
    pub fn watch(&self, page: u64, on: bool) {
        let Some(word) = self.0.watched.get((page / 64) as usize) else { return };
        let bit = 1 << (page % 64);
        if on {
            word.fetch_or(bit, Ordering::SeqCst);
        } else {
            word.fetch_and(!bit, Ordering::SeqCst);
        }
    }

    /// Whether the page `page` (counted from the start of the slot) is watched.
    pub fn is_watched(&self, page: u64) -> bool {
        self.0.watched.get((page / 64) as usize).is_some_and(|w| w.load(Ordering::SeqCst) & (1 << (page % 64)) != 0)
    }

    /// Where the slot's memory is, and what of.
    pub(crate) fn mapping(&self) -> &Mapping {
        &self.0.mapping
    }

    fn wrote(&self, offset: u64, length: u64) {
        if length == 0 {
            return;
        }
        // The write comes before the flags are read; who starts to watch a page reads it afterwards. One of the two
        // sees the other.
        fence(Ordering::SeqCst);
        let (first, last) = (offset / PAGE_SIZE, (offset + length - 1) / PAGE_SIZE);
        if (first..=last).any(|page| self.is_watched(page))
            && let Some(observer) = self.0.observer.get()
        {
            observer.written(self.0.start + offset, length);
        }
    }
}

/// What a slot is made of.
pub(crate) fn mapping_of(slot: &GuestRegionMmap<PageLog>) -> &Mapping {
    (**slot).bitmap().mapping()
}

impl<'a> WithBitmapSlice<'a> for PageLog {
    type S = LogSlice;
}

impl Bitmap for PageLog {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.wrote(offset as u64, len as u64);
    }

    fn dirty_at(&self, _offset: usize) -> bool {
        false
    }

    fn slice_at(&self, offset: usize) -> LogSlice {
        LogSlice { log: self.clone(), offset }
    }
}

/// A [`PageLog`] seen from an offset.
#[derive(Clone, Debug)]
pub struct LogSlice {
    log: PageLog,
    offset: usize,
}

impl LogSlice {
    /// The slot's log.
    pub fn log(&self) -> &PageLog {
        &self.log
    }

    /// The guest physical address from which it is seen.
    pub fn address(&self) -> u64 {
        self.log.0.start + self.offset as u64
    }
}

impl<'a> WithBitmapSlice<'a> for LogSlice {
    type S = LogSlice;
}

impl vm_memory::bitmap::BitmapSlice for LogSlice {}

impl Bitmap for LogSlice {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.log.mark_dirty(self.offset + offset, len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.log.dirty_at(self.offset + offset)
    }

    fn slice_at(&self, offset: usize) -> LogSlice {
        LogSlice { log: self.log.clone(), offset: self.offset + offset }
    }
}
