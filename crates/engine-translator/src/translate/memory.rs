//! Memory for emitted code: shared memory mapped twice, to write and to execute.
//!
//! It has no file of its own: perf looks names up in a perf map only for addresses that no file is mapped at.

use std::{
    ffi::c_void,
    io,
    ptr::{self, NonNull},
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
};

use rustix::mm::{MapFlags, MprotectFlags, MremapFlags, ProtFlags, mmap_anonymous, mprotect, mremap, munmap};

/// Two views of the same memory.
pub struct CodeMemory {
    write: View,
    execute: View,
    len: usize,
}

/// A mapping, and its length.
struct View(NonNull<u8>, usize);

#[allow(unsafe_code)]
// SAFETY: the pointers are to shared mappings of its own; who writes holds the code cache's lock, but for `patch`,
// which is atomic.
unsafe impl Send for CodeMemory {}
#[allow(unsafe_code)]
// SAFETY: as above.
unsafe impl Sync for CodeMemory {}

#[allow(unsafe_code)]
impl CodeMemory {
    /// `len` bytes, a multiple of the page size. Pages are allocated as they are written.
    pub fn new(len: usize) -> io::Result<Self> {
        let view = |pointer: *mut c_void| {
            NonNull::new(pointer.cast()).map(|p| View(p, len)).ok_or(io::Error::from(io::ErrorKind::OutOfMemory))
        };
        let writable = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let write = view(unsafe { mmap_anonymous(ptr::null_mut(), len, writable, flags)? })?;
        // SAFETY: with an old size of zero this is one more mapping of the same shared memory (mremap(2)), at an address
        // of the kernel's choice.
        let execute = view(unsafe { mremap(write.0.as_ptr().cast(), 0, len, MremapFlags::MAYMOVE)? })?;
        // SAFETY: nobody uses it yet.
        unsafe { mprotect(execute.0.as_ptr().cast(), len, MprotectFlags::READ | MprotectFlags::EXEC)? };
        Ok(Self { write, execute, len })
    }

    /// Address at which the code executes.
    pub fn base(&self) -> u64 {
        self.execute.0.as_ptr() as u64
    }

    /// Size in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Writes code that nobody executes yet.
    pub fn write(&self, offset: u32, bytes: &[u8]) {
        assert!(offset as usize + bytes.len() <= self.len, "code cache overrun");
        // SAFETY: in bounds, as just checked; nobody reads what was not published yet.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.write.0.as_ptr().add(offset as usize), bytes.len())
        }
    }

    fn word(&self, offset: u32) -> &AtomicU32 {
        assert!(offset.is_multiple_of(4) && (offset as usize) < self.len);
        // SAFETY: in bounds and aligned, as just checked.
        unsafe { &*self.write.0.as_ptr().add(offset as usize).cast::<AtomicU32>() }
    }

    /// The four bytes at `offset`, which is a multiple of four.
    pub fn read(&self, offset: u32) -> u32 {
        self.word(offset).load(Ordering::Relaxed)
    }

    /// Replaces them, while others may execute what they are a constant of.
    pub fn store(&self, offset: u32, value: u32) {
        self.word(offset).store(value, Ordering::Release);
    }

    /// Replaces the five bytes at `offset` by a jump to `target`, while others may execute them: they are within one
    /// instruction, and within eight aligned bytes.
    pub fn redirect(&self, offset: u32, target: u32) {
        self.replace(offset, 0xe9, target);
    }

    /// The same with a call.
    pub fn redirect_call(&self, offset: u32, target: u32) {
        self.replace(offset, 0xe8, target);
    }

    /// Has a jump that ends at `behind` lead to `target` rather than to `old`, while others may execute it, if that can be
    /// done by one store: what says where it leads is within eight aligned bytes.
    pub fn retarget(&self, behind: u32, old: u32, target: u32) {
        let rel = behind - 4;
        let (word, shift) = (self.eight(rel), rel % 8 * 8);
        let now = word.load(Ordering::Relaxed);
        let mask = 0xffff_ffff << shift;
        if rel % 8 <= 4 && now & mask == u64::from(old.wrapping_sub(behind)) << shift {
            word.store(now & !mask | u64::from(target.wrapping_sub(behind)) << shift, Ordering::Release);
        }
    }

    fn replace(&self, offset: u32, opcode: u64, target: u32) {
        let (word, shift) = (self.eight(offset), offset % 8 * 8);
        assert!(offset % 8 <= 3);
        let old = word.load(Ordering::Relaxed);
        let rel = target.wrapping_sub(offset + 5);
        let new = old & !(0xff_ffff_ffff << shift) | (opcode | u64::from(rel) << 8) << shift;
        word.store(new, Ordering::Release);
    }

    /// The eight aligned bytes that have the one at `offset`.
    fn eight(&self, offset: u32) -> &AtomicU64 {
        assert!((offset as usize) < self.len);
        let at = self.write.0.as_ptr().wrapping_add((offset & !7) as usize).cast::<AtomicU64>();
        // SAFETY: in bounds, as just checked, and aligned: the length is a multiple of eight.
        unsafe { &*at }
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // SAFETY: it was mapped with this length, and nobody uses it any more.
        #[allow(unsafe_code)]
        let _ = unsafe { munmap(self.0.as_ptr().cast(), self.1) };
    }
}
