//! Memory for emitted code: one memfd mapped twice, to write and to execute.

use std::{io, ptr::NonNull};

use rustix::{
    fs::{MemfdFlags, ftruncate, memfd_create},
    mm::{MapFlags, ProtFlags, mmap, munmap},
};

/// Two views of the same memory.
pub struct CodeMemory {
    write: NonNull<u8>,
    execute: NonNull<u8>,
    len: usize,
}

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
        let fd = memfd_create(c"purlin-code", MemfdFlags::CLOEXEC)?;
        ftruncate(&fd, len as u64)?;
        let map = |prot| {
            // SAFETY: a new mapping, at an address of the kernel's choice.
            let pointer = unsafe { mmap(std::ptr::null_mut(), len, prot, MapFlags::SHARED, &fd, 0)? };
            NonNull::new(pointer.cast()).ok_or(io::Error::from(io::ErrorKind::OutOfMemory))
        };
        let write = map(ProtFlags::READ | ProtFlags::WRITE)?;
        let execute = map(ProtFlags::READ | ProtFlags::EXEC)?;
        Ok(Self { write, execute, len })
    }

    /// Address at which the code executes.
    pub fn base(&self) -> u64 {
        self.execute.as_ptr() as u64
    }

    /// Size in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Writes code that nobody executes yet.
    pub fn write(&self, offset: u32, bytes: &[u8]) {
        assert!(offset as usize + bytes.len() <= self.len, "code cache overrun");
        // SAFETY: in bounds, as just checked; nobody reads what was not published yet.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.write.as_ptr().add(offset as usize), bytes.len()) }
    }

    /// Replaces the aligned 4 bytes at `offset`, which others may be executing.
    pub fn patch32(&self, offset: u32, value: u32) {
        assert!(offset.is_multiple_of(4) && (offset as usize) < self.len);
        let at = self.write.as_ptr().wrapping_add(offset as usize).cast::<std::sync::atomic::AtomicU32>();
        // SAFETY: in bounds and aligned, as just checked.
        unsafe { (*at).store(value, std::sync::atomic::Ordering::Release) }
    }

    /// Replaces the first five of the aligned 8 bytes at `offset` by a jump to `target`, while others may execute them:
    /// the five bytes are within one instruction.
    pub fn redirect(&self, offset: u32, target: u32) {
        assert!(offset.is_multiple_of(8) && (offset as usize) < self.len);
        let at = self.write.as_ptr().wrapping_add(offset as usize).cast::<std::sync::atomic::AtomicU64>();
        // SAFETY: in bounds and aligned, as just checked.
        let word = unsafe { &*at };
        let old = word.load(std::sync::atomic::Ordering::Relaxed);
        let rel = target.wrapping_sub(offset + 5);
        let new = old & !0xff_ffff_ffff | 0xe9 | u64::from(rel) << 8;
        word.store(new, std::sync::atomic::Ordering::Release);
    }
}

impl Drop for CodeMemory {
    fn drop(&mut self) {
        for view in [self.write, self.execute] {
            // SAFETY: both were mapped by `new` with this length, and nobody uses them any more.
            #[allow(unsafe_code)]
            let _ = unsafe { munmap(view.as_ptr().cast(), self.len) };
        }
    }
}
