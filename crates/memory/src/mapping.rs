//! Where a slot lies in this process, and what is mapped there.
//!
//! The address is reserved once and stays. What is mapped there changes when the machine is frozen: see `freeze.rs`.

// mmap(2) and its like on the range that this owns.
#![allow(unsafe_code)]

use std::{
    fs::File,
    ops::Range,
    os::fd::AsFd,
    ptr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use rustix::{
    io::Errno,
    mm::{Advice, MapFlags, MremapFlags, ProtFlags, madvise, mmap, mmap_anonymous, mremap_fixed, munmap},
};

use crate::{PAGE_SIZE, layer::Layer};

/// Size of a huge page on x86: 2 MiB.
pub(crate) const HUGE_PAGE_SIZE: u64 = 2 << 20;

/// What a slot's memory is made of.
pub(crate) enum Backing {
    /// A memfd, shared: what the guest writes is in it.
    Shared {
        /// The slot's guest physical address.
        start: u64,
        /// The memfd.
        file: Arc<File>,
        /// Where in it the slot begins, in bytes.
        offset: u64,
    },
    /// Layers that never change, mapped privately: what the guest writes are pages of this process.
    Private(Private),
}

/// See [`Backing::Private`].
pub(crate) struct Private {
    /// What is mapped: what a page reads as that has not been written since. Zeroes where it has nothing.
    pub mapped: Layer,
    /// Pages that freezes have copied into patches since `mapped` was mapped.
    pub copied: u64,
    /// How often it was frozen.
    pub freezes: u64,
}

/// A range of this process's addresses that belongs to a slot.
pub(crate) struct Mapping {
    address: *mut u8,
    length: u64,
    backing: Mutex<Backing>,
}

// SAFETY: the address is only a number here; what it points to is guest memory, which any thread may read and write.
unsafe impl Send for Mapping {}
// SAFETY: as above; the methods that change mappings are ordered by the lock or by the kernel.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Reserves `length` bytes, which read as zeroes, with the place in a huge page that `start` has in the guest: a huge
    /// page needs an address that is a multiple of its size in the guest as in the host.
    pub fn reserve(start: u64, length: u64) -> Result<Self, Errno> {
        let address = reserve(start, length)?;
        let backing = Backing::Private(Private { mapped: Layer::empty(start, length), copied: 0, freezes: 0 });
        Ok(Self { address, length, backing: Mutex::new(backing) })
    }

    /// The first byte.
    pub fn address(&self) -> *mut u8 {
        self.address
    }

    /// Bytes.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// What it is made of. Whoever changes a mapping holds this, and leaves in it what is so.
    pub fn backing(&self) -> MutexGuard<'_, Backing> {
        self.backing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Maps `file` at its byte `offset` over the pages: shared, or privately, with what was there gone.
    pub fn map(&self, pages: Range<u64>, file: &File, offset: u64, shared: bool) -> Result<(), Errno> {
        let (address, length) = self.range(&pages)?;
        let sharing = if shared { MapFlags::SHARED } else { MapFlags::PRIVATE };
        let flags = MapFlags::FIXED | MapFlags::NORESERVE | sharing;
        // SAFETY: the range is this slot's own; who has an address in it reads what is mapped there from now on.
        unsafe { mmap(address.cast(), length, READ_WRITE, flags, file.as_fd(), offset)? };
        ask_for_huge_pages(address, length);
        Ok(())
    }

    /// Moves what is mapped to the whole slot out of the way, which is one mapping, before something else is mapped there:
    /// page tables are moved, instead of a million pages unmapped while the machine stands still. What is there now reads
    /// as before.
    pub fn set_aside(&self) -> Result<Remains, Errno> {
        let (_, length) = self.range(&(0..self.length / PAGE_SIZE))?;
        let remains = Remains { address: reserve(self.address as u64, self.length)?, length };
        let flags = MremapFlags::MAYMOVE | MremapFlags::DONTUNMAP;
        // SAFETY: the slot stays mapped, and nobody knows the new place.
        unsafe { mremap_fixed(self.address.cast(), length, length, flags, remains.address.cast())? };
        Ok(remains)
    }

    /// Maps nothing over the pages: they read as zeroes.
    pub fn map_nothing(&self, pages: Range<u64>) -> Result<(), Errno> {
        let (address, length) = self.range(&pages)?;
        let flags = MapFlags::FIXED | MapFlags::NORESERVE | MapFlags::PRIVATE;
        // SAFETY: as in `map`.
        unsafe { mmap_anonymous(address.cast(), length, READ_WRITE, flags)? };
        Ok(())
    }

    /// Gives up what was written privately to the pages: they read as what is mapped there.
    pub fn revert(&self, pages: Range<u64>) -> Result<(), Errno> {
        let (address, length) = self.range(&pages)?;
        // SAFETY: the range is this slot's own, and guest memory may change at any time.
        unsafe { madvise(address.cast(), length, Advice::LinuxDontNeed) }
    }

    /// Writes zeroes to the pages.
    pub fn zero(&self, pages: Range<u64>) -> Result<(), Errno> {
        let (address, length) = self.range(&pages)?;
        // SAFETY: the range is mapped for writing; guest memory may change at any time, and no reference to it lives.
        unsafe { ptr::write_bytes(address, 0, length) };
        Ok(())
    }

    /// The bytes of pages that nobody writes to meanwhile, for reading.
    ///
    /// # Safety
    /// The machine stands still as long as the slice lives.
    pub unsafe fn still(&self, pages: Range<u64>) -> Result<&[u8], Errno> {
        let (address, length) = self.range(&pages)?;
        // SAFETY: the range is mapped, and nobody writes to it, as the caller promises.
        Ok(unsafe { std::slice::from_raw_parts(address, length) })
    }

    /// The bytes of pages that only the caller knows of, for writing.
    ///
    /// # Safety
    /// The slot is new: nobody else has it yet.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn fresh(&self, pages: Range<u64>) -> Result<&mut [u8], Errno> {
        let (address, length) = self.range(&pages)?;
        // SAFETY: the range is mapped, and nobody else reads or writes it, as the caller promises.
        Ok(unsafe { std::slice::from_raw_parts_mut(address, length) })
    }

    fn range(&self, pages: &Range<u64>) -> Result<(*mut u8, usize), Errno> {
        if pages.start >= pages.end || pages.end > self.length / PAGE_SIZE {
            return Err(Errno::INVAL);
        }
        let offset = usize_of(pages.start * PAGE_SIZE)?;
        Ok((self.address.wrapping_add(offset), usize_of((pages.end - pages.start) * PAGE_SIZE)?))
    }
}

/// What was mapped to a slot. Its drop takes some time (50 ms for a GiB in small pages), better after the machine goes on.
#[must_use = "dropped at once it takes time while the machine stands still"]
#[derive(Debug)]
pub(crate) struct Remains {
    address: *mut u8,
    length: usize,
}

// SAFETY: nobody uses the address.
unsafe impl Send for Remains {}

impl Drop for Remains {
    fn drop(&mut self) {
        // SAFETY: the range is this one's own.
        let _ = unsafe { munmap(self.address.cast(), self.length) };
    }
}

/// Reserves `length` bytes that read as zeroes, at an address that has the place in a huge page that `start` has.
fn reserve(start: u64, length: u64) -> Result<*mut u8, Errno> {
    let room = length.checked_add(HUGE_PAGE_SIZE).ok_or(Errno::NOMEM)?;
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: a new mapping, wherever the kernel likes.
    let all = unsafe { mmap_anonymous(ptr::null_mut(), usize_of(room)?, READ_WRITE, flags)? }.cast::<u8>();
    let before = (start % HUGE_PAGE_SIZE + HUGE_PAGE_SIZE - all as u64 % HUGE_PAGE_SIZE) % HUGE_PAGE_SIZE;
    let address = all.wrapping_add(usize_of(before)?);
    for (from, length) in [(all, before), (address.wrapping_add(usize_of(length)?), room - before - length)] {
        if length > 0 {
            // SAFETY: the range is a part of what was just mapped, which nobody knows of.
            unsafe { munmap(from.cast(), usize_of(length)?)? };
        }
    }
    Ok(address)
}

/// Asks for huge pages, in which a guest under KVM is faster: it faults once for 512 small ones, and the processor finds
/// more of it in its TLB. Where the host gives none to shared memory (`transparent_hugepage/shmem_enabled`), it stays as
/// it is. (Not for memory without a file: a clone that touches a page would take 512.)
fn ask_for_huge_pages(address: *mut u8, length: usize) {
    // SAFETY: MADV_HUGEPAGE changes neither what is mapped there nor its contents, and the range is a slot's own.
    let _ = unsafe { madvise(address.cast(), length, Advice::LinuxHugepage) };
}

const READ_WRITE: ProtFlags = ProtFlags::READ.union(ProtFlags::WRITE);

fn usize_of(length: u64) -> Result<usize, Errno> {
    usize::try_from(length).map_err(|_| Errno::NOMEM)
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the slot's regions and logs are gone, and with them everybody who knew an address in it.
        let _ = unsafe { munmap(self.address.cast(), self.length as usize) };
    }
}
