//! Freezing: the content of a machine's memory becomes layers, and the machine goes on with private pages above them.
//!
//! The first freeze of a machine costs nothing: its memfds become the layers and are mapped again, privately, at the
//! same addresses. After that, what the machine has written is in private pages, and each freeze has two ways:
//!
//! - *a patch*: the private pages are copied into a new memfd, and the layer is what is mapped with these above it. The
//!   machine's mappings stay as they are, so the next freeze copies the pages again. A clone maps the long runs of a
//!   layer and copies the short ones (`restore.rs`).
//! - *a fold*: everything is copied into a new memfd, which is mapped in place of all that was there. The next freeze begins
//!   with no private pages. Most is copied beforehand, while the machine runs.
//!
//! A page costs the same either way (3 µs on the development machine, mostly for its allocation), so it is rent or buy: a
//! freeze folds when the patches so far have come to as many pages as a fold would. Whatever the guest does, that costs not
//! much more than twice what the best choice would. It does not fold where the guest has written more than 64 MiB: that
//! would be copied while it stands still. Patches that large are copied by a child process (`copy.rs`).

use std::{
    fs::File,
    io,
    ops::Range,
    os::unix::fs::{FileExt, MetadataExt},
    sync::Arc,
};

use rangemap::RangeSet;
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, ftruncate, memfd_create};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::{
    GuestRam, MemoryError, PAGE_SIZE,
    copy::{Child, Job, copy},
    layer::{Layer, Place, data_in},
    log::mapping_of,
    mapping::{Backing, HUGE_PAGE_SIZE, Mapping, Private, Remains},
    pagemap::Pagemap,
};

/// The most pages that the guest has written where a fold is made: they are copied while it stands still, in 50 ms. With
/// more it stays with patches, which a child process copies.
const MOST_FOLDED: u64 = 16384;
/// Bytes that are copied at a time.
const CHUNK: u64 = 256 << 10;

/// A freeze that is begun.
pub struct Freeze {
    ram: Arc<GuestRam>,
    pagemap: &'static Pagemap,
    folds: Vec<Option<Fold>>,
}

impl Freeze {
    /// Does what takes long and need not wait for the machine to stand still.
    pub fn begin(ram: &Arc<GuestRam>) -> Result<Self, MemoryError> {
        let pagemap = Pagemap::of_process()?;
        let folds = ram.iter().map(|slot| begin_slot(mapping_of(slot), pagemap));
        let folds = folds.collect::<Result<_, _>>()?;
        Ok(Self { ram: ram.clone(), pagemap, folds })
    }

    /// Freezes memory; the machine stands still. After an error the machine can go on, and be frozen again.
    pub fn finish(self) -> Result<FrozenMemory, MemoryError> {
        let mut frozen = FrozenMemory { layers: Vec::new(), remains: Vec::new(), patches: Vec::new(), child: None };
        let mut jobs = Vec::new();
        for (slot, fold) in self.ram.iter().zip(self.folds) {
            let layer = finish_slot(mapping_of(slot), fold, self.pagemap, &mut frozen, &mut jobs)?;
            frozen.layers.push(layer);
        }
        frozen.child = copy_still(&jobs)?;
        Ok(frozen)
    }
}

/// The memory of a machine at the moment of a freeze.
#[derive(Debug)]
pub struct FrozenMemory {
    layers: Vec<Layer>,
    remains: Vec<Remains>,
    /// Memfds of the layers that are not sealed, since a child may still write to them.
    patches: Vec<Arc<File>>,
    child: Option<Child>,
}

impl FrozenMemory {
    /// A layer for each slot. To be called when the machine goes on: old mappings are taken down here, and what is still
    /// being copied is waited for.
    pub fn into_layers(self) -> Result<Vec<Layer>, MemoryError> {
        drop(self.remains);
        if let Some(child) = self.child {
            child.wait()?;
        }
        self.patches.iter().try_for_each(|file| seal(file))?;
        Ok(self.layers)
    }
}

/// A memfd that a slot's content is being copied into.
struct Fold {
    file: File,
    /// Where in the file the slot begins.
    offset: u64,
    /// The pages that are in it.
    copied: RangeSet<u64>,
    /// [`Private::freezes`] at that time.
    freezes: u64,
}

/// Copies what is mapped into a new memfd, if that is worth it.
fn begin_slot(mapping: &Mapping, pagemap: &Pagemap) -> Result<Option<Fold>, MemoryError> {
    let (mapped, copied, freezes) = match &*mapping.backing() {
        Backing::Private(private) => (private.mapped.clone(), private.copied, private.freezes),
        Backing::Shared { .. } => return Ok(None),
    };
    if copied == 0 || copied < mapped.allocated()? / PAGE_SIZE {
        return Ok(None);
    }
    let dirty = pagemap.private(mapping.address() as u64, mapped.pages())?;
    if pages_in(&dirty) > MOST_FOLDED {
        return Ok(None);
    }
    let dirty: RangeSet<u64> = dirty.into_iter().collect();
    let data = mapped.data()?;
    let mut fold = Fold::new(&mapped, freezes)?;
    for clean in data.iter().flat_map(|range| dirty.gaps(range)) {
        fold.copy(&mapped, clean)?;
    }
    Ok(Some(fold))
}

impl Layer {
    /// The same content in a memfd of its own.
    pub fn copied(&self) -> Result<Self, MemoryError> {
        let mut fold = Fold::new(self, 0)?;
        self.data()?.iter().try_for_each(|pages| fold.copy(self, pages.clone()))?;
        seal(&fold.file)?;
        Ok(Self::whole(self.start(), self.length(), Arc::new(fold.file), fold.offset))
    }
}

impl Fold {
    fn new(layer: &Layer, freezes: u64) -> Result<Self, MemoryError> {
        let offset = layer.start() % HUGE_PAGE_SIZE;
        Ok(Self { file: new_memfd(offset + layer.length())?, offset, copied: RangeSet::new(), freezes })
    }

    fn copy(&mut self, mapped: &Layer, pages: Range<u64>) -> Result<(), MemoryError> {
        let mut buffer = vec![0; CHUNK as usize];
        for first in pages.clone().step_by((CHUNK / PAGE_SIZE) as usize) {
            let buffer = &mut buffer[..CHUNK.min((pages.end - first) * PAGE_SIZE) as usize];
            mapped.read(first, buffer)?;
            for (run, bytes) in nonzero(first, buffer) {
                self.file.write_all_at(bytes, self.offset + run.start * PAGE_SIZE)?;
                self.copied.insert(run);
            }
        }
        Ok(())
    }

    /// Makes it the content of the slot that stands still, given what the slot has written itself.
    fn finish(&mut self, mapping: &Mapping, mapped: &Layer, dirty: &[Range<u64>]) -> Result<Layer, MemoryError> {
        let present: RangeSet<u64> = mapped.places().iter().map(|(range, _)| range.clone()).collect();
        let copied = std::mem::take(&mut self.copied);
        // Given back since, or written to.
        let gone = copied.iter().flat_map(|range| present.gaps(range)).chain(dirty.iter().cloned());
        for range in gone.filter(|range| copied.overlaps(range)) {
            let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            let (from, length) = (self.offset + range.start * PAGE_SIZE, (range.end - range.start) * PAGE_SIZE);
            fallocate(&self.file, how, from, length).map_err(MemoryError::Host)?;
        }
        for range in dirty {
            for (run, bytes) in nonzero(range.start, still(mapping, range.clone())?) {
                self.file.write_all_at(bytes, self.offset + run.start * PAGE_SIZE)?;
            }
        }
        seal(&self.file)?;
        let file = Arc::new(self.file.try_clone()?);
        mapping.map(0..mapped.pages(), &file, self.offset, false).map_err(MemoryError::Host)?;
        Ok(Layer::whole(mapped.start(), mapped.length(), file, self.offset))
    }
}

/// The pages of a slot that stands still.
#[allow(unsafe_code, reason = "a slice of guest memory")]
fn still(mapping: &Mapping, pages: Range<u64>) -> Result<&[u8], MemoryError> {
    // SAFETY: whoever calls `Freeze::finish` has the machine stand still.
    unsafe { mapping.still(pages) }.map_err(MemoryError::Host)
}

fn finish_slot(
    mapping: &Mapping,
    fold: Option<Fold>,
    pagemap: &Pagemap,
    frozen: &mut FrozenMemory,
    jobs: &mut Vec<Job>,
) -> Result<Layer, MemoryError> {
    let mut backing = mapping.backing();
    let private = match &mut *backing {
        Backing::Shared { start, file, offset } => {
            let layer = Layer::whole(*start, mapping.length(), file.clone(), *offset);
            // Where the host cannot do that it takes longer.
            frozen.remains.extend(mapping.set_aside());
            mapping.map(0..layer.pages(), file, *offset, false).map_err(MemoryError::Host)?;
            // Whatever comes of this: the slot is private from here on.
            let sealed = seal(file);
            *backing = Backing::Private(Private { mapped: layer.clone(), copied: 0, freezes: 1 });
            return sealed.map(|()| layer);
        }
        Backing::Private(private) => private,
    };
    let dirty = pagemap.private(mapping.address() as u64, private.mapped.pages())?;
    let pages = pages_in(&dirty);
    let fold = fold.filter(|fold| fold.freezes == private.freezes && pages <= MOST_FOLDED);
    private.freezes += 1;
    if let Some(mut fold) = fold {
        let layer = fold.finish(mapping, &private.mapped, &dirty)?;
        (private.mapped, private.copied) = (layer.clone(), 0);
        return Ok(layer);
    }
    private.copied += pages;
    if dirty.is_empty() {
        return Ok(private.mapped.clone());
    }
    let file = Arc::new(new_memfd(pages * PAGE_SIZE)?);
    frozen.patches.push(file.clone());
    patched(mapping, &private.mapped, &dirty, &file, jobs)
}

/// What is mapped, with the pages in `dirty` above it, which are to be copied to `file`.
fn patched(
    mapping: &Mapping,
    mapped: &Layer,
    dirty: &[Range<u64>],
    file: &Arc<File>,
    jobs: &mut Vec<Job>,
) -> Result<Layer, MemoryError> {
    let (mut layer, mut at) = (mapped.clone(), 0);
    for range in dirty {
        layer.insert(range.clone(), file.clone(), at);
        let bytes = still(mapping, range.clone())?;
        jobs.push(Job::new(bytes.as_ptr(), bytes.len(), file.clone(), at));
        at += bytes.len() as u64;
    }
    Ok(layer)
}

#[allow(unsafe_code, reason = "reads of guest memory")]
fn copy_still(jobs: &[Job]) -> io::Result<Option<Child>> {
    // SAFETY: jobs are made of pages of slots, by `Freeze::finish`, whose caller has the machine stand still.
    unsafe { copy(jobs) }
}

/// The runs of pages in `bytes` that are not all zeroes, where `first` is the number of the first page.
fn nonzero(first: u64, bytes: &[u8]) -> impl Iterator<Item = (Range<u64>, &[u8])> {
    static ZERO: [u8; PAGE_SIZE as usize] = [0; PAGE_SIZE as usize];
    let is_zero = |page: &[u8]| page == &ZERO[..page.len()];
    let mut rest = (first, bytes);
    std::iter::from_fn(move || {
        let (first, bytes) = rest;
        let mut pages = bytes.chunks(PAGE_SIZE as usize);
        let skipped = pages.clone().take_while(|page| is_zero(page)).count();
        let count = pages.by_ref().skip(skipped).take_while(|page| !is_zero(page)).count();
        let (start, end) = (skipped * PAGE_SIZE as usize, (skipped + count) * PAGE_SIZE as usize);
        let run = first + skipped as u64..first + (skipped + count) as u64;
        rest = (run.end, &bytes[end.min(bytes.len())..]);
        (count > 0).then(|| (run, &bytes[start..end.min(bytes.len())]))
    })
}

fn pages_in<'r>(ranges: impl IntoIterator<Item = &'r Range<u64>>) -> u64 {
    ranges.into_iter().map(|range| range.end - range.start).sum()
}

/// A memfd that can be sealed.
pub(crate) fn new_memfd(length: u64) -> Result<File, MemoryError> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd = memfd_create(c"purlin-ram", flags).map_err(MemoryError::Host)?;
    ftruncate(&fd, length).map_err(MemoryError::Host)?;
    Ok(File::from(fd))
}

/// Nobody can change the memfd any more. There is no writable mapping of it by now, and F_SEAL_FUTURE_WRITE keeps new ones
/// out; F_SEAL_WRITE says no more than that, and would look at every page first.
fn seal(file: &File) -> Result<(), MemoryError> {
    fcntl_add_seals(file, SealFlags::FUTURE_WRITE | SealFlags::SHRINK | SealFlags::GROW).map_err(MemoryError::Host)
}

/// The guest physical ranges of bytes that may be something else than zeroes, without looking at them.
pub fn data(ram: &GuestRam) -> io::Result<Vec<Range<u64>>> {
    let pagemap = Pagemap::of_process()?;
    let mut all = RangeSet::new();
    for slot in ram.iter() {
        let (mapping, start) = (mapping_of(slot), slot.start_addr().0);
        let pages = match &*mapping.backing() {
            Backing::Shared { file, offset, .. } => {
                let place = Place { file: file.clone(), delta: *offset as i64 };
                data_in(&place, 0..slot.len() / PAGE_SIZE)?
            }
            Backing::Private(private) => {
                let own = pagemap.private(mapping.address() as u64, private.mapped.pages())?;
                private.mapped.data()?.into_iter().chain(own).collect()
            }
        };
        all.extend(pages.into_iter().map(|pages| start + pages.start * PAGE_SIZE..start + pages.end * PAGE_SIZE));
    }
    Ok(all.into_iter().collect())
}

/// Bytes of the host's that are this machine's alone; what it shares with clones, while it is private, is not counted.
pub fn usage(ram: &GuestRam) -> io::Result<u64> {
    let pagemap = Pagemap::of_process()?;
    let slots = ram.iter().map(|slot| {
        let mapping = mapping_of(slot);
        match &*mapping.backing() {
            Backing::Shared { file, .. } => Ok(512 * file.metadata()?.blocks()),
            Backing::Private(_) => {
                Ok(PAGE_SIZE * pages_in(&pagemap.private(mapping.address() as u64, slot.len() / PAGE_SIZE)?))
            }
        }
    });
    slots.sum()
}
