//! Guest physical memory: memfd slots at host addresses that stay put, and who has written to them.
//!
//! [`GuestRam`] is what vm-memory calls a guest memory; its bitmap type [`PageLog`] is called for every write that
//! devices and boot methods make, so that an engine that has translated code from a page hears of it. (A write by the
//! engine's own guest code is the engine's affair.)
#![forbid(unsafe_code)]

use std::{
    fs::File,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering, fence},
    },
};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion,
    bitmap::{Bitmap, WithBitmapSlice},
};

/// Guest physical memory.
pub type GuestRam = GuestMemoryMmap<PageLog>;

/// Size of the page that the log counts in: 4 KiB.
pub const PAGE_SIZE: u64 = 4096;

/// Makes guest memory of the given slots: guest physical address and length in bytes, both multiples of 4 KiB.
pub fn create(slots: &[(u64, u64)]) -> Result<GuestRam, MemoryError> {
    let mut regions = Vec::new();
    for &(start, length) in slots {
        let fd = memfd_create(c"purlin-ram", MemfdFlags::CLOEXEC).map_err(MemoryError::Host)?;
        ftruncate(&fd, length).map_err(MemoryError::Host)?;
        let length = usize::try_from(length).map_err(|_| MemoryError::Layout("slot too large".into()))?;
        let log = PageLog::new(start, length as u64);
        let mapping = vm_memory::mmap::MmapRegionBuilder::new_with_bitmap(length, log)
            .with_file_offset(FileOffset::new(File::from(fd), 0))
            .with_mmap_prot(libc_prot::READ_WRITE)
            .with_mmap_flags(libc_prot::SHARED_NORESERVE)
            .build()
            .map_err(|e| MemoryError::Layout(e.to_string()))?;
        let region = GuestRegionMmap::new(mapping, GuestAddress(start))
            .ok_or_else(|| MemoryError::Layout("slot wraps round the address space".into()))?;
        regions.push(region);
    }
    GuestMemoryMmap::from_regions(regions).map_err(|e| MemoryError::Layout(e.to_string()))
}

/// The mapping type of a slot.
pub type Slot = MmapRegion<PageLog>;

mod libc_prot {
    /// PROT_READ | PROT_WRITE
    pub const READ_WRITE: i32 = 3;
    /// MAP_SHARED | MAP_NORESERVE
    pub const SHARED_NORESERVE: i32 = 0x4001;
}

/// Why guest memory could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host refused it.
    #[error("cannot allocate guest memory: {0}")]
    Host(rustix::io::Errno),
    /// The slots make no sense, or do not fit the host's address space.
    #[error("cannot map guest memory: {0}")]
    Layout(String),
}

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
}

impl std::fmt::Debug for PageLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PageLog").field("start", &self.0.start).finish_non_exhaustive()
    }
}

impl PageLog {
    fn new(start: u64, length: u64) -> Self {
        let words = (length / PAGE_SIZE).div_ceil(64);
        let watched = (0..words).map(|_| AtomicU64::new(0)).collect();
        Self(Arc::new(Inner { start, watched, observer: OnceLock::new() }))
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
