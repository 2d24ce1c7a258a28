//! Memory for emitted code, mapped twice, to write and to execute.
//!
//! It is in a file ([`Backing::File`]), so that others can be given what is in it without a copy: from then on the file does not
//! change any more, and whoever has it mapped goes on behind it, in memory of its own. A page of the file is copied there before
//! it is written to.

use std::{
    ffi::c_void,
    fs::File,
    io,
    mem::ManuallyDrop,
    ops::Range,
    ptr::{self, NonNull},
    slice,
    sync::{
        Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering},
    },
};

use rustix::{
    fs::{MemfdFlags, memfd_create},
    mm::{
        Advice, MapFlags, MprotectFlags, MremapFlags, ProtFlags, madvise, mmap, mmap_anonymous, mprotect, mremap,
        mremap_fixed, munmap,
    },
};

/// Bytes of a page.
pub const PAGE: usize = 4096;

/// Two views of the same memory, and what it goes on with once its beginning does not change any more.
pub struct CodeMemory {
    execute: View,
    /// The view to write, as long as all of it can change; then it is that of `own`.
    first: AtomicPtr<u8>,
    /// What both views are of at first, if that is a file; as long as all of it can change.
    file: Mutex<Option<File>>,
    own: Own,
    len: usize,
    /// Which of the first pages of the view to execute, which were a file's that does not change, are `own`'s by now.
    moved: OnceLock<Box<[AtomicBool]>>,
}

/// Memory that nobody else has.
struct Own {
    write: View,
    /// Of the view to execute what is not in use yet: that is moved to where the code executes.
    execute: ManuallyDrop<View>,
}

/// What emitted code is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// A file, which others can be given.
    File,
    /// No file: perf looks names up in a perf map only for addresses that no file is mapped at.
    Anonymous,
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
    /// Where the code begins in a file.
    pub const OFFSET: u64 = PAGE as u64;

    /// `len` bytes, a multiple of the page size. Pages are allocated as they are written.
    pub fn new(len: usize, backing: Backing) -> io::Result<Self> {
        let (file, first, execute) = match backing {
            Backing::File => {
                let file = File::from(memfd_create("purlin-code", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?);
                file.set_len(Self::OFFSET + len as u64)?;
                let first = View::of_file(&file, len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED)?;
                first.keep_from_children();
                // It sees what is written there, but is none that could write, even if it were made writable.
                let execute = View::of_file(&file, len, ProtFlags::READ, MapFlags::PRIVATE)?;
                execute.make_executable()?;
                (Some(file), first, execute)
            }
            Backing::Anonymous => {
                let first = View::anonymous(len)?;
                let execute = first.again()?;
                (None, first, execute)
            }
        };
        let write = View::anonymous(len)?;
        // Once there is a sandbox around it, it can be moved, but not be made.
        let own = Own { execute: ManuallyDrop::new(write.again()?), write };
        let first = AtomicPtr::new(ManuallyDrop::new(first).0.as_ptr());
        Ok(Self { execute, first, file: Mutex::new(file), own, len, moved: OnceLock::new() })
    }

    /// Begins with `len` bytes of `file`, from [`Self::OFFSET`] on: a multiple of the page size, of a sealed file. To be done
    /// before anything of that is executed. After an error there may be something else, until [`Self::clear`].
    pub fn begin_with(&self, file: &File, len: usize) -> io::Result<()> {
        self.go_on_behind(len)?;
        drop(self.file.lock().unwrap_or_else(PoisonError::into_inner).take());
        let (start, there) = (self.execute.0.as_ptr().cast(), MapFlags::PRIVATE | MapFlags::FIXED);
        // SAFETY: in the place of pages of its own, which nobody executes.
        unsafe { mmap(start, len, ProtFlags::READ, there, file, Self::OFFSET)? };
        // SAFETY: as above. (In two steps, as sandboxes allow it.)
        unsafe { mprotect(start, len, MprotectFlags::READ | MprotectFlags::EXEC)? };
        Ok(())
    }

    /// The file that has the first `len` bytes, a multiple of the page size, and nothing behind them; from here on it is not
    /// written to. `None` if there is none any more. Nobody writes meanwhile; what is there can go on executing.
    pub fn give_away(&self, len: usize) -> io::Result<Option<File>> {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        if file.is_none() {
            return Ok(None);
        }
        self.go_on_behind(len)?;
        let file = file.take();
        file.iter().try_for_each(|file| file.set_len(Self::OFFSET + len as u64))?;
        Ok(file)
    }

    /// The first `len` bytes do not change any more; what is behind them is its own.
    fn go_on_behind(&self, len: usize) -> io::Result<()> {
        assert!(len <= self.len && len.is_multiple_of(PAGE), "no pages of the cache");
        let at = |view: &View| view.0.as_ptr().wrapping_add(len).cast();
        if len < self.len {
            let (from, to, rest) = (at(&self.own.execute), at(&self.execute), self.len - len);
            // SAFETY: nothing is there yet, nor does anybody look where it was.
            unsafe { mremap_fixed(from, rest, rest, MremapFlags::MAYMOVE, to)? };
        }
        let moved = (0..len / PAGE).map(|_| AtomicBool::new(false)).collect();
        assert!(self.moved.set(moved).is_ok(), "it has a beginning already");
        self.drop_first();
        Ok(())
    }

    fn drop_first(&self) {
        let first = NonNull::new(self.first.swap(ptr::null_mut(), Ordering::Relaxed));
        // Who writes holds the code cache's lock, and so does whoever calls this: nobody has an address in it.
        drop(first.map(|first| View(first, self.len)));
    }

    /// Gives up all but the first `kept` bytes of the file that it has begun with, and so the file. Nobody executes anything.
    pub fn clear(&self, kept: usize) {
        let Some(moved) = self.moved.get() else { return };
        let kept = kept.div_ceil(PAGE);
        (0..kept).for_each(|page| self.own(page * PAGE));
        let mut page = kept;
        for run in moved[kept..].chunk_by(|a, b| a.load(Ordering::Relaxed) == b.load(Ordering::Relaxed)) {
            if !run[0].load(Ordering::Relaxed) {
                self.move_pages(page..page + run.len());
                run.iter().for_each(|moved| moved.store(true, Ordering::Relaxed));
            }
            page += run.len();
        }
        let (start, len) = (self.own.write.0.as_ptr().wrapping_add(kept * PAGE), (page - kept) * PAGE);
        // SAFETY: nobody looks at what is there any more, through either view.
        let _ = unsafe { madvise(start.cast(), len, Advice::LinuxRemove) };
    }

    /// What is about to be written at `offset` is to be this process's own. Others may be executing it: what they do goes on
    /// once the other page is there.
    fn own(&self, offset: usize) {
        let Some(moved) = self.moved.get() else { return };
        let page = offset / PAGE;
        let Some(moved) = moved.get(page) else { return };
        if moved.swap(true, Ordering::Relaxed) {
            return;
        }
        let at = |view: &View| view.0.as_ptr().wrapping_add(page * PAGE);
        // SAFETY: whole pages of views of the same length. Nobody else writes, and what is read is the file's, which does not
        // change.
        unsafe { ptr::copy_nonoverlapping(at(&self.execute), at(&self.own.write), PAGE) };
        self.move_pages(page..page + 1);
    }

    /// Has its own memory execute where the file's did.
    fn move_pages(&self, pages: Range<usize>) {
        let at = |view: &View| view.0.as_ptr().wrapping_add(pages.start * PAGE).cast();
        let (from, to, len) = (at(&self.own.execute), at(&self.execute), pages.len() * PAGE);
        // SAFETY: a mapping of these pages, with the content that they are to have, takes the place of the file's; where it was
        // nobody looks.
        let mapped = unsafe { mremap_fixed(from, len, len, MremapFlags::MAYMOVE, to) };
        // If every other page has been moved, these are mappings for each page of an image: 22,000 of the 65,530 that a process may
        // have by Linux's default, beside those of guest memory.
        mapped.expect("a page of emitted code is mapped");
    }

    /// Where it is written.
    fn writable(&self) -> *mut u8 {
        let first = self.first.load(Ordering::Relaxed);
        if first.is_null() { self.own.write.0.as_ptr() } else { first }
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
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.writable().add(offset as usize), bytes.len()) }
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
        let at = self.writable().wrapping_add((offset & !7) as usize).cast::<AtomicU64>();
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
    /// Memory of no file, to be written.
    fn anonymous(len: usize) -> io::Result<Self> {
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: a new mapping, at an address of the kernel's choice.
        view(unsafe { mmap_anonymous(ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, flags)? }, len)
    }

    /// The code in a file.
    fn of_file(file: &File, len: usize, how: ProtFlags, flags: MapFlags) -> io::Result<Self> {
        // SAFETY: as above.
        view(unsafe { mmap(ptr::null_mut(), len, how, flags | MapFlags::NORESERVE, file, CodeMemory::OFFSET)? }, len)
    }

    /// One more view of the same shared memory, to be executed, at an address of the kernel's choice.
    fn again(&self) -> io::Result<Self> {
        // SAFETY: with an old size of zero this is one more mapping of it (mremap(2)).
        let again = view(unsafe { mremap(self.0.as_ptr().cast(), 0, self.1, MremapFlags::MAYMOVE)? }, self.1)?;
        again.make_executable()?;
        Ok(again)
    }

    /// A process that is forked off does not have it: a file that anybody can write to cannot be sealed.
    fn keep_from_children(&self) {
        // SAFETY: it changes nothing in this process. Where it fails, an image may have to be copied.
        let _ = unsafe { madvise(self.0.as_ptr().cast(), self.1, Advice::LinuxDontFork) };
    }

    /// Nobody uses it yet.
    fn make_executable(&self) -> io::Result<()> {
        // SAFETY: as the caller promises; it cannot be written any more.
        unsafe { mprotect(self.0.as_ptr().cast(), self.1, MprotectFlags::READ | MprotectFlags::EXEC)? };
        Ok(())
    }
}

impl Drop for CodeMemory {
    fn drop(&mut self) {
        self.drop_first();
        let (View(start, len), moved) = (&*self.own.execute, &self.moved);
        // What has been moved may be somebody else's by now.
        match moved.get() {
            None => drop(View(*start, *len)),
            Some(moved) => {
                let there = moved.iter().enumerate().filter(|(_, moved)| !moved.load(Ordering::Relaxed));
                let at = |page| NonNull::new(start.as_ptr().wrapping_add(page * PAGE));
                there.filter_map(|(page, _)| at(page)).for_each(|start| drop(View(start, PAGE)));
            }
        }
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // SAFETY: it was mapped with this length, and nobody uses it any more.
        #[allow(unsafe_code)]
        let _ = unsafe { munmap(self.0.as_ptr().cast(), self.1) };
    }
}
