//! Memory for emitted code: shared memory mapped twice, to write and to execute.
//!
//! It has no file of its own: perf looks names up in a perf map only for addresses that no file is mapped at. But it may
//! begin with what is in a file, which others execute, too. A page of that is copied before it is written to.

use std::{
    ffi::c_void,
    fs::File,
    io,
    ptr::{self, NonNull},
    slice,
    sync::{
        OnceLock,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
};

use rustix::mm::{
    MapFlags, MprotectFlags, MremapFlags, ProtFlags, mmap, mmap_anonymous, mprotect, mremap, mremap_fixed, munmap,
};

/// Bytes of a page.
pub const PAGE: usize = 4096;

/// Two views of the same memory.
pub struct CodeMemory {
    write: View,
    execute: View,
    len: usize,
    /// What it begins with, if that is in a file.
    file: OnceLock<FilePages>,
}

/// The first pages of the view to execute, which are a file's as long as they are not written to.
struct FilePages {
    /// One more view to execute. What becomes this process's own is moved from here to where the file's page is.
    own: View,
    /// Which have been.
    moved: Box<[AtomicBool]>,
}

/// A file in memory, to be read.
pub struct Mapping(View);

#[allow(unsafe_code)]
// SAFETY: it is never written to.
unsafe impl Send for Mapping {}
#[allow(unsafe_code)]
// SAFETY: as above.
unsafe impl Sync for Mapping {}

#[allow(unsafe_code)]
impl Mapping {
    /// The first `len` bytes of a file that is as long as that and sealed: it does not change.
    pub fn new(file: &File, len: usize) -> io::Result<Self> {
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let start = unsafe { mmap(ptr::null_mut(), len, ProtFlags::READ, MapFlags::PRIVATE, file, 0)? };
        view(start, len).map(Self)
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: mapped with this length, and it does not change.
        unsafe { slice::from_raw_parts(self.0.0.as_ptr(), self.0.1) }
    }
}

fn view(start: *mut c_void, len: usize) -> io::Result<View> {
    NonNull::new(start.cast()).map(|start| View(start, len)).ok_or(io::ErrorKind::OutOfMemory.into())
}

/// A mapping, and its length.
struct View(NonNull<u8>, usize);

#[allow(unsafe_code)]
// SAFETY: the pointers are to shared mappings of its own; who writes holds the code cache's lock.
unsafe impl Send for CodeMemory {}
#[allow(unsafe_code)]
// SAFETY: as above.
unsafe impl Sync for CodeMemory {}

#[allow(unsafe_code)]
impl CodeMemory {
    /// `len` bytes, a multiple of the page size. Pages are allocated as they are written.
    pub fn new(len: usize) -> io::Result<Self> {
        let writable = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let write = view(unsafe { mmap_anonymous(ptr::null_mut(), len, writable, flags)? }, len)?;
        let execute = write.again()?;
        Ok(Self { write, execute, len, file: OnceLock::new() })
    }

    /// Begins with `len` bytes of `file`, from its byte `offset` on: multiples of the page size, of a sealed file. To be done
    /// once, before anything of that is executed.
    pub fn begin_with(&self, file: &File, offset: u64, len: usize) -> io::Result<()> {
        assert!(len <= self.len && len.is_multiple_of(PAGE), "no pages of the cache");
        let own = self.write.again()?;
        let (start, there) = (self.execute.0.as_ptr().cast(), MapFlags::PRIVATE | MapFlags::FIXED);
        // SAFETY: in the place of pages of its own, which nobody executes.
        unsafe { mmap(start, len, ProtFlags::READ, there, file, offset)? };
        // SAFETY: as above. (In two steps, as sandboxes allow it.)
        unsafe { mprotect(start, len, MprotectFlags::READ | MprotectFlags::EXEC)? };
        let moved = (0..len / PAGE).map(|_| AtomicBool::new(false)).collect();
        let _ = self.file.set(FilePages { own, moved });
        Ok(())
    }

    /// What is about to be written at `offset` is to be this process's own. Others may be executing it: what they do goes on
    /// once the other page is there.
    fn own(&self, offset: usize) {
        let Some(file) = self.file.get() else { return };
        let page = offset / PAGE;
        let Some(moved) = file.moved.get(page) else { return };
        if moved.swap(true, Ordering::Relaxed) {
            return;
        }
        let at = |view: &View| view.0.as_ptr().wrapping_add(page * PAGE);
        let to = at(&self.execute);
        // SAFETY: whole pages of views of the same length. Nobody else writes, and what is read is the file's, which does not
        // change.
        unsafe { ptr::copy_nonoverlapping(to, at(&self.write), PAGE) };
        // SAFETY: a mapping of this page, which has just got the same content, takes the place of the file's; where it was
        // nobody looks.
        let mapped = unsafe { mremap_fixed(at(&file.own).cast(), PAGE, PAGE, MremapFlags::MAYMOVE, to.cast()) };
        // There are as many pages at most as the cache has, far fewer than a process may have mappings.
        mapped.expect("a page of emitted code is mapped");
    }

    /// The first `len` bytes. Nobody writes meanwhile.
    pub fn bytes(&self, len: usize) -> &[u8] {
        assert!(len <= self.len);
        // SAFETY: in bounds, as just checked.
        unsafe { slice::from_raw_parts(self.execute.0.as_ptr(), len) }
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
        let end = offset as usize + bytes.len();
        assert!(end <= self.len, "code cache overrun");
        (offset as usize / PAGE..end.div_ceil(PAGE)).for_each(|page| self.own(page * PAGE));
        // SAFETY: in bounds, as just checked; nobody reads what was not published yet.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.write.0.as_ptr().add(offset as usize), bytes.len())
        }
    }

    /// The four bytes at `offset`, which is a multiple of four.
    pub fn read(&self, offset: u32) -> u32 {
        assert!(offset.is_multiple_of(4) && (offset as usize) < self.len);
        let at = self.execute.0.as_ptr().wrapping_add(offset as usize).cast::<AtomicU32>();
        // SAFETY: in bounds and aligned, as just checked.
        unsafe { (*at).load(Ordering::Relaxed) }
    }

    /// Replaces them, while others may execute what they are a constant of.
    pub fn store(&self, offset: u32, value: u32) {
        assert!(offset.is_multiple_of(4));
        let (word, shift) = (self.eight(offset), offset % 8 * 8);
        let others = word.load(Ordering::Relaxed) & !(0xffff_ffff << shift);
        word.store(others | u64::from(value) << shift, Ordering::Release);
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
        let (now, shift) = (self.read_eight(rel), rel % 8 * 8);
        let mask = 0xffff_ffff << shift;
        if rel % 8 <= 4 && now & mask == u64::from(old.wrapping_sub(behind)) << shift {
            self.eight(rel).store(now & !mask | u64::from(target.wrapping_sub(behind)) << shift, Ordering::Release);
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

    /// The eight aligned bytes that have the one at `offset`, to be written.
    fn eight(&self, offset: u32) -> &AtomicU64 {
        assert!((offset as usize) < self.len);
        self.own(offset as usize);
        let at = self.write.0.as_ptr().wrapping_add((offset & !7) as usize).cast::<AtomicU64>();
        // SAFETY: in bounds, as just checked, and aligned: the length is a multiple of eight.
        unsafe { &*at }
    }

    /// The same, as they are.
    fn read_eight(&self, offset: u32) -> u64 {
        assert!((offset as usize) < self.len);
        let at = self.execute.0.as_ptr().wrapping_add((offset & !7) as usize).cast::<AtomicU64>();
        // SAFETY: in bounds, as just checked, and aligned: the length is a multiple of eight.
        unsafe { (*at).load(Ordering::Relaxed) }
    }
}

#[allow(unsafe_code)]
impl View {
    /// One more view of the same shared memory, to be executed, at an address of the kernel's choice.
    fn again(&self) -> io::Result<Self> {
        // SAFETY: with an old size of zero this is one more mapping of it (mremap(2)).
        let again = view(unsafe { mremap(self.0.as_ptr().cast(), 0, self.1, MremapFlags::MAYMOVE)? }, self.1)?;
        // SAFETY: nobody uses it yet.
        unsafe { mprotect(again.0.as_ptr().cast(), again.1, MprotectFlags::READ | MprotectFlags::EXEC)? };
        Ok(again)
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // SAFETY: it was mapped with this length, and nobody uses it any more.
        #[allow(unsafe_code)]
        let _ = unsafe { munmap(self.0.as_ptr().cast(), self.1) };
    }
}
