//! Memory for emitted code: one memfd mapped twice, to write and to execute.

use std::{
    io,
    ptr::NonNull,
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
};

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

    fn word(&self, offset: u32) -> &AtomicU32 {
        assert!(offset.is_multiple_of(4) && (offset as usize) < self.len);
        // SAFETY: in bounds and aligned, as just checked.
        unsafe { &*self.write.as_ptr().add(offset as usize).cast::<AtomicU32>() }
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

    fn replace(&self, offset: u32, opcode: u64, target: u32) {
        let (start, shift) = (offset & !7, offset % 8 * 8);
        assert!(offset % 8 <= 3 && (offset as usize) < self.len);
        let at = self.write.as_ptr().wrapping_add(start as usize).cast::<AtomicU64>();
        // SAFETY: in bounds and aligned, as just checked.
        let word = unsafe { &*at };
        let old = word.load(Ordering::Relaxed);
        let rel = target.wrapping_sub(offset + 5);
        let new = old & !(0xff_ffff_ffff << shift) | (opcode | u64::from(rel) << 8) << shift;
        word.store(new, Ordering::Release);
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
