//! Guest memory as the translator sees it: host addresses of pages, and which pages hold translated code.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering, fence},
};

use purlin_engine::memory::{GuestRam, PAGE_SIZE, PageLog};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

/// The slots of guest memory.
pub struct Ram {
    slots: Vec<Slot>,
    /// Keeps the mappings alive.
    _memory: Arc<GuestRam>,
}

struct Slot {
    start: u64,
    len: u64,
    host: usize,
    log: PageLog,
    /// For each page the vCPUs (bit `index % 64`) whose TLB may hold an entry to store to it.
    writers: Box<[AtomicU64]>,
}

/// So many zeroes, of memory that is not touched: a clone of a large machine is made in no time.
#[allow(unsafe_code)]
fn zeroes(count: usize) -> Box<[AtomicU64]> {
    // SAFETY: zero is a valid `AtomicU64`.
    unsafe { Box::<[AtomicU64]>::new_zeroed_slice(count).assume_init() }
}

/// A page of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page {
    /// Host address of its first byte.
    pub host: *mut u8,
    slot: u32,
    number: u64,
}

impl Ram {
    /// The slots of `memory`.
    pub fn new(memory: Arc<GuestRam>) -> Self {
        let slots = memory
            .iter()
            .map(|region| Slot {
                start: vm_memory::Address::raw_value(&region.start_addr()),
                len: region.len(),
                host: region.as_ptr() as usize,
                log: region.bitmap().log().clone(),
                writers: zeroes((region.len() / PAGE_SIZE) as usize),
            })
            .collect();
        Self { slots, _memory: memory }
    }

    /// The page at a guest physical address, if it is memory.
    pub fn page(&self, physical: u64) -> Option<Page> {
        let (i, slot) = self.slots.iter().enumerate().find(|(_, s)| physical.wrapping_sub(s.start) < s.len)?;
        let number = (physical - slot.start) / PAGE_SIZE;
        Some(Page { host: (slot.host + (number * PAGE_SIZE) as usize) as *mut u8, slot: i as u32, number })
    }

    /// The page that a host address lies on, and its guest physical address.
    pub fn page_of_host(&self, host: *const u8) -> Option<(Page, u64)> {
        let (i, slot) =
            self.slots.iter().enumerate().find(|(_, s)| (host as usize).wrapping_sub(s.host) < s.len as usize)?;
        let number = (host as usize - slot.host) as u64 / PAGE_SIZE;
        let page = Page { host: (slot.host + (number * PAGE_SIZE) as usize) as *mut u8, slot: i as u32, number };
        Some((page, slot.start + number * PAGE_SIZE))
    }

    /// Takes note that vCPU `index` is about to have a TLB entry to store to `page`. False where it must not have one,
    /// because the page holds translated code.
    ///
    /// Ordering: the note is made before the flag is read; who sets the flag reads the notes afterwards. One of the
    /// two sees the other.
    pub fn note_writer(&self, page: Page, index: u32) -> bool {
        let slot = &self.slots[page.slot as usize];
        slot.writers[page.number as usize].fetch_or(1 << (index % 64), Ordering::SeqCst);
        !slot.log.is_watched(page.number)
    }

    /// Marks `page` as one that holds translated code. Returns the vCPUs (bit `index % 64`) that may still store to it
    /// without being noticed, or `None` if it was marked already.
    pub fn watch(&self, page: Page) -> Option<u64> {
        let slot = &self.slots[page.slot as usize];
        if slot.log.is_watched(page.number) {
            return None;
        }
        slot.log.watch(page.number, true);
        Some(slot.writers[page.number as usize].swap(0, Ordering::SeqCst))
    }

    /// Unmarks `page`: it holds no translated code any more.
    pub fn unwatch(&self, page: Page) {
        self.slots[page.slot as usize].log.watch(page.number, false);
    }

    /// Whether `page` is marked.
    pub fn is_watched(&self, page: Page) -> bool {
        self.slots[page.slot as usize].log.is_watched(page.number)
    }

    /// The logs of the slots.
    pub fn logs(&self) -> impl Iterator<Item = &PageLog> {
        self.slots.iter().map(|s| &s.log)
    }

    /// Tells `code` of a store to `len` bytes at `host`, on one page, if that page holds translated code; returns
    /// whether it does.
    pub fn written(&self, code: &crate::translate::CodeCache, host: *mut u8, len: usize) -> bool {
        // The store comes before the flag is read; who translates sets the flag before it reads the bytes. One of the
        // two sees the other.
        fence(Ordering::SeqCst);
        let Some((page, physical)) = self.page_of_host(host) else { return false };
        if !self.is_watched(page) {
            return false;
        }
        self.written_at(code, page, physical | (host as u64 & 0xfff), len as u64);
        true
    }

    /// The same by guest physical address, for stores that others made; they may lie on several pages.
    pub fn written_by_others(&self, code: &crate::translate::CodeCache, address: u64, len: u64) {
        let mut at = address;
        while at < address + len {
            let n = (PAGE_SIZE - at % PAGE_SIZE).min(address + len - at);
            if let Some(page) = self.page(at)
                && self.is_watched(page)
            {
                self.written_at(code, page, at, n);
            }
            at += n;
        }
    }

    fn written_at(&self, code: &crate::translate::CodeCache, page: Page, address: u64, len: u64) {
        code.written(address, len, || self.unwatch(page));
    }
}
