//! Guest physical memory: memfd slots at host addresses that stay put, and who has written to them.
//!
//! [`GuestRam`] is what vm-memory calls a guest memory; its bitmap type [`PageLog`] is called for every write that
//! devices and boot methods make, so that an engine that has translated code from a page hears of it. (A write by the
//! engine's own guest code is the engine's affair.)

mod advice;

use std::{
    fs::File,
    io,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering, fence},
    },
};

use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, ftruncate, memfd_create};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
    bitmap::{Bitmap, WithBitmapSlice},
};

/// Guest physical memory.
pub type GuestRam = GuestMemoryMmap<PageLog>;

/// Size of the page that the log counts in: 4 KiB.
pub const PAGE_SIZE: u64 = 4096;

/// Size of a huge page on x86: 2 MiB.
const HUGE_PAGE_SIZE: u64 = 2 << 20;

/// Makes guest memory of the given slots: guest physical address and length in bytes, both multiples of 4 KiB.
pub fn create(slots: &[(u64, u64)]) -> Result<GuestRam, MemoryError> {
    let mut regions = Vec::new();
    for &(start, length) in slots {
        let fd = memfd_create(c"purlin-ram", MemfdFlags::CLOEXEC).map_err(MemoryError::Host)?;
        // A huge page needs an address that is a multiple of its size in the guest as in the file. (The host's kernel does
        // the same for where it maps the file.)
        let offset = start % HUGE_PAGE_SIZE;
        ftruncate(&fd, offset + length).map_err(MemoryError::Host)?;
        let length = usize::try_from(length).map_err(|_| MemoryError::Layout("slot too large".into()))?;
        let log = PageLog::new(start, length as u64);
        let mapping = vm_memory::mmap::MmapRegionBuilder::new_with_bitmap(length, log)
            .with_file_offset(FileOffset::new(File::from(fd), offset))
            .with_mmap_prot(libc_prot::READ_WRITE)
            .with_mmap_flags(libc_prot::SHARED_NORESERVE)
            .build()
            .map_err(|e| MemoryError::Layout(e.to_string()))?;
        let region = GuestRegionMmap::new(mapping, GuestAddress(start))
            .ok_or_else(|| MemoryError::Layout("slot wraps round the address space".into()))?;
        advice::ask_for_huge_pages(&region);
        regions.push(region);
    }
    GuestMemoryMmap::from_regions(regions).map_err(|e| MemoryError::Layout(e.to_string()))
}

/// Gives guest memory back to the host: it reads as zeroes, and takes none of the host's until it is written again. That
/// goes for whole pages in the range of `length` bytes from guest physical `address`; what there is no memory for is left
/// out.
///
/// It is a write like any other: who watches a page hears of it.
pub fn discard(ram: &GuestRam, address: u64, length: u64) -> io::Result<()> {
    let end = address.saturating_add(length);
    for slot in ram.iter() {
        let start = slot.start_addr().0;
        let from = address.saturating_sub(start).min(slot.len()).next_multiple_of(PAGE_SIZE);
        let to = end.saturating_sub(start).min(slot.len()) / PAGE_SIZE * PAGE_SIZE;
        // Every slot is a file of its own.
        let Some(file) = slot.file_offset().filter(|_| from < to) else { continue };
        let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(file.file(), how, file.start() + from, to - from)?;
        slot.bitmap().mark_dirty(from as usize, (to - from) as usize);
    }
    Ok(())
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

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::MetadataExt, sync::Mutex};

    use vm_memory::Bytes;

    use super::*;

    #[derive(Default)]
    struct Heard(Mutex<Vec<(u64, u64)>>);

    impl WriteObserver for Heard {
        fn written(&self, address: u64, length: u64) {
            self.0.lock().unwrap().push((address, length));
        }
    }

    const SLOT: u64 = 16 * PAGE_SIZE;

    /// Bytes that the host has given for it.
    fn taken(ram: &GuestRam) -> u64 {
        ram.iter().map(|slot| 512 * slot.file_offset().unwrap().file().metadata().unwrap().blocks()).sum()
    }

    #[test]
    fn a_slot_lies_in_its_file_as_in_the_guest() {
        let starts = [0, 0xc_0000, HUGE_PAGE_SIZE + PAGE_SIZE];
        let ram = create(&starts.map(|start| (start, SLOT))).unwrap();
        for (slot, start) in ram.iter().zip(starts) {
            assert_eq!(slot.file_offset().unwrap().start() % HUGE_PAGE_SIZE, start % HUGE_PAGE_SIZE);
        }
        ram.write_obj(7u8, GuestAddress(0xc_0000 + SLOT - 1)).unwrap();
        assert_eq!(taken(&ram), PAGE_SIZE);
    }

    #[test]
    fn what_is_discarded_is_the_hosts_again_and_zero() {
        // Two slots with a hole between them.
        let ram = create(&[(0, SLOT), (2 * SLOT, SLOT)]).unwrap();
        let fill = || {
            for start in [0, 2 * SLOT] {
                ram.write_slice(&vec![0xaa; SLOT as usize], GuestAddress(start)).unwrap();
            }
        };
        let read = |address| ram.read_obj::<u8>(GuestAddress(address)).unwrap();
        fill();
        assert_eq!(taken(&ram), 2 * SLOT);
        // From the midst of a page to the midst of another: the whole ones between them.
        discard(&ram, PAGE_SIZE - 1, 2 * PAGE_SIZE + 2).unwrap();
        assert_eq!(taken(&ram), 2 * SLOT - 2 * PAGE_SIZE);
        let at = [0, PAGE_SIZE - 1, PAGE_SIZE, 3 * PAGE_SIZE - 1, 3 * PAGE_SIZE].map(read);
        assert_eq!(at, [0xaa, 0xaa, 0, 0, 0xaa]);
        // It can be used again.
        ram.write_obj(7u8, GuestAddress(PAGE_SIZE)).unwrap();
        assert_eq!((read(PAGE_SIZE), read(PAGE_SIZE + 1)), (7, 0));
        // Nothing, nowhere, everywhere.
        fill();
        for (address, length) in [(5, 0), (SLOT, SLOT), (3 * SLOT, u64::MAX), (u64::MAX, 1), (100, 200)] {
            discard(&ram, address, length).unwrap();
            assert_eq!(taken(&ram), 2 * SLOT, "{address:#x} {length:#x}");
        }
        discard(&ram, SLOT - PAGE_SIZE, SLOT + 2 * PAGE_SIZE).unwrap();
        assert_eq!(taken(&ram), 2 * SLOT - 2 * PAGE_SIZE);
        discard(&ram, 0, u64::MAX).unwrap();
        assert_eq!(taken(&ram), 0);
    }

    #[test]
    fn who_watches_a_page_hears_that_it_is_discarded() {
        let ram = create(&[(0, SLOT), (SLOT, SLOT)]).unwrap();
        let heard = Arc::new(Heard::default());
        for slot in ram.iter() {
            (**slot).bitmap().set_observer(heard.clone());
        }
        let second = ram.iter().nth(1).unwrap();
        (**second).bitmap().watch(3, true);
        discard(&ram, SLOT, 3 * PAGE_SIZE).unwrap();
        assert_eq!(*heard.0.lock().unwrap(), []);
        discard(&ram, 0, SLOT + 4 * PAGE_SIZE).unwrap();
        assert_eq!(*heard.0.lock().unwrap(), [(SLOT, 4 * PAGE_SIZE)]);
    }
}
