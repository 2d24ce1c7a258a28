//! The content of a slot at one moment, which never changes: which page is where in which file.

use std::{
    fs::File,
    io,
    ops::Range,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::{FileExt, MetadataExt},
    },
    sync::Arc,
};

use prost::Message;
use rangemap::{RangeMap, RangeSet};
use rustix::{
    fs::{MemfdFlags, SealFlags, SeekFrom, fcntl_get_seals, fstat, memfd_create, seek},
    io::Errno,
};

use crate::{MemoryError, PAGE_SIZE};

/// A slot's content at one moment. Each page is in a file (a sealed memfd, or a snapshot), or reads as zeroes. Pages are
/// counted from the slot's start.
///
/// Clones share a layer's files, and nobody writes to them.
#[derive(Clone)]
pub struct Layer {
    start: u64,
    length: u64,
    places: RangeMap<u64, Place>,
}

/// Where a run of pages is: page *p* is at the file's byte *p* · 4096 + `delta`. So a run that is continued in the file is
/// one run here.
#[derive(Clone)]
pub(crate) struct Place {
    pub file: Arc<File>,
    pub delta: i64,
}

impl Place {
    pub fn offset(&self, page: u64) -> u64 {
        (page * PAGE_SIZE).wrapping_add_signed(self.delta)
    }
}

impl PartialEq for Place {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.file, &other.file) && self.delta == other.delta
    }
}

impl Eq for Place {}

impl std::fmt::Debug for Layer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let runs = self.places.iter().count();
        f.debug_struct("Layer").field("start", &self.start).field("length", &self.length).field("runs", &runs).finish()
    }
}

impl Layer {
    /// The slot of `length` bytes at guest physical `start`, all of zeroes.
    pub fn empty(start: u64, length: u64) -> Self {
        Self { start, length, places: RangeMap::new() }
    }

    /// The slot that is all in `file`, from its byte `offset` on.
    pub(crate) fn whole(start: u64, length: u64, file: Arc<File>, offset: u64) -> Self {
        let mut layer = Self::empty(start, length);
        layer.places.insert(0..length / PAGE_SIZE, Place { file, delta: offset as i64 });
        layer
    }

    /// Where the slot is in guest physical memory.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// The slot's bytes.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// The slot's pages.
    pub fn pages(&self) -> u64 {
        self.length / PAGE_SIZE
    }

    /// Says that `pages` are in `file` from its byte `offset` on, a multiple of 4096. The file must be long enough, or who
    /// reads the machine's memory dies of it.
    pub fn put(&mut self, pages: Range<u64>, file: Arc<File>, offset: u64) -> Result<(), MemoryError> {
        let length = length_of(&file)?;
        self.put_within(pages, file, length, offset)
    }

    /// [`Layer::put`] of a file that is so long.
    fn put_within(&mut self, pages: Range<u64>, file: Arc<File>, length: u64, offset: u64) -> Result<(), MemoryError> {
        let end = (pages.end.saturating_sub(pages.start)).checked_mul(PAGE_SIZE).and_then(|n| n.checked_add(offset));
        if pages.start >= pages.end || pages.end > self.pages() || !offset.is_multiple_of(PAGE_SIZE) {
            return Err(MemoryError::Layer(format!("there are no pages {pages:?} at {offset:#x}")));
        }
        if end.is_none_or(|end| end > length) {
            return Err(MemoryError::Layer(format!("a file of {length} bytes is to have more than that")));
        }
        self.insert(pages, file, offset);
        Ok(())
    }

    /// [`Layer::put`], without a check.
    pub(crate) fn insert(&mut self, pages: Range<u64>, file: Arc<File>, offset: u64) {
        let delta = (offset as i64).wrapping_sub((pages.start * PAGE_SIZE) as i64);
        self.places.insert(pages, Place { file, delta });
    }

    /// Says that `pages` are zeroes.
    pub fn clear(&mut self, pages: Range<u64>) {
        if !pages.is_empty() {
            self.places.remove(pages);
        }
    }

    pub(crate) fn places(&self) -> &RangeMap<u64, Place> {
        &self.places
    }

    /// How many runs it has.
    pub(crate) fn runs(&self) -> usize {
        self.places.iter().count()
    }

    /// Bytes that its files take of the host, at most so many are data.
    pub(crate) fn allocated(&self) -> io::Result<u64> {
        let mut files: Vec<&Arc<File>> = Vec::new();
        for (_, place) in self.places.iter() {
            if !files.iter().any(|file| Arc::ptr_eq(file, &place.file)) {
                files.push(&place.file);
            }
        }
        files.iter().map(|file| Ok(512 * file.metadata()?.blocks())).sum()
    }

    /// Fills `buffer`, whole pages, from page `first` on.
    pub fn read(&self, first: u64, buffer: &mut [u8]) -> io::Result<()> {
        let pages = first..first + buffer.len() as u64 / PAGE_SIZE;
        buffer.fill(0);
        if pages.is_empty() {
            return Ok(());
        }
        for (range, place) in self.places.overlapping(&pages) {
            let (from, to) = (range.start.max(pages.start), range.end.min(pages.end));
            let part = &mut buffer[((from - first) * PAGE_SIZE) as usize..((to - first) * PAGE_SIZE) as usize];
            place.file.read_exact_at(part, place.offset(from))?;
        }
        Ok(())
    }

    /// The pages that may be something else than zeroes.
    pub fn data(&self) -> io::Result<RangeSet<u64>> {
        let mut data = RangeSet::new();
        for (range, place) in self.places.iter() {
            for part in data_in(place, range.clone())? {
                data.insert(part);
            }
        }
        Ok(data)
    }

    /// The pages that may differ from those of `other`, a layer of the same slot: those that are not at the same place.
    pub fn candidates(&self, other: &Self) -> io::Result<RangeSet<u64>> {
        let mut moved: RangeSet<u64> = self.places.iter().chain(other.places.iter()).map(|(r, _)| r.clone()).collect();
        for (range, place) in self.places.iter() {
            for (there, _) in other.places.overlapping(range).filter(|(_, p)| *p == place) {
                moved.remove(range.start.max(there.start)..range.end.min(there.end));
            }
        }
        let either: RangeSet<u64> = self.data()?.iter().chain(other.data()?.iter()).cloned().collect();
        Ok(either.intersection(&moved).collect())
    }
}

/// The parts of `range` that are no holes of the place's file.
pub(crate) fn data_in(place: &Place, range: Range<u64>) -> io::Result<Vec<Range<u64>>> {
    let (mut at, end) = (place.offset(range.start), place.offset(range.end));
    let mut parts = Vec::new();
    while at < end {
        let start = match seek(&place.file, SeekFrom::Data(at)) {
            Ok(start) if start < end => start,
            Ok(_) | Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let stop = seek(&place.file, SeekFrom::Hole(start))?.min(end);
        let page = |offset: u64| (offset.wrapping_add_signed(place.delta.wrapping_neg())) / PAGE_SIZE;
        parts.push(page(start)..page(stop.next_multiple_of(PAGE_SIZE)).min(range.end));
        at = stop;
    }
    Ok(parts)
}

/// Layers as a message beside descriptors: what another process makes the same layers of.
#[derive(Clone, PartialEq, Message)]
pub struct LayersMessage {
    /// One for each slot.
    #[prost(message, repeated, tag = "1")]
    slots: Vec<SlotMessage>,
}

#[derive(Clone, PartialEq, Message)]
struct SlotMessage {
    #[prost(uint64, tag = "1")]
    start: u64,
    #[prost(uint64, tag = "2")]
    length: u64,
    /// Runs: first page, number of pages, descriptor's number, page of its file; four numbers each.
    #[prost(uint64, repeated, tag = "3")]
    runs: Vec<u64>,
}

/// The layers as a message and the files that it numbers, to be sent together. [`receive`] has the other end.
pub fn send(layers: &[Layer]) -> (LayersMessage, Vec<BorrowedFd<'_>>) {
    let mut files: Vec<&Arc<File>> = Vec::new();
    let mut slots = Vec::new();
    for layer in layers {
        let mut runs = Vec::new();
        for (range, place) in layer.places.iter() {
            let number = files.iter().position(|f| Arc::ptr_eq(f, &place.file)).unwrap_or_else(|| {
                files.push(&place.file);
                files.len() - 1
            });
            let offset = place.offset(range.start);
            runs.extend([range.start, range.end - range.start, number as u64, offset / PAGE_SIZE]);
        }
        slots.push(SlotMessage { start: layer.start, length: layer.length, runs });
    }
    (LayersMessage { slots }, files.into_iter().map(|file| file.as_fd()).collect())
}

/// The layers that [`send`] made a message of. Whoever sent a memfd that could still change is refused.
pub fn receive(message: &LayersMessage, files: Vec<OwnedFd>) -> Result<Vec<Layer>, MemoryError> {
    let memfds = device_of_memfds().map_err(MemoryError::Host)?;
    let file = |fd| {
        let file = File::from(fd);
        check_sealed(&file, memfds)?;
        // Asked once: there can be thousands of runs.
        Ok((length_of(&file)?, Arc::new(file)))
    };
    let files: Vec<(u64, Arc<File>)> = files.into_iter().map(file).collect::<Result<_, MemoryError>>()?;
    let layer = |slot: &SlotMessage| {
        let mut layer = Layer::empty(slot.start, slot.length);
        for run in slot.runs.chunks(4) {
            let &[page, count, number, at] = run else { return Err(MemoryError::Layer("a run is cut off".into())) };
            let file = usize::try_from(number).ok().and_then(|number| files.get(number));
            let (length, file) = file.ok_or_else(|| MemoryError::Layer(format!("there is no file {number}")))?;
            let offset =
                at.checked_mul(PAGE_SIZE).ok_or_else(|| MemoryError::Layer("an offset is too large".into()))?;
            layer.put_within(page..page.saturating_add(count), file.clone(), *length, offset)?;
        }
        Ok(layer)
    };
    message.slots.iter().map(layer).collect()
}

fn length_of(file: &File) -> Result<u64, MemoryError> {
    Ok(file.metadata().map_err(|e| MemoryError::Layer(e.to_string()))?.len())
}

/// Memfds are files of a tmpfs that the kernel has for them alone.
fn device_of_memfds() -> Result<u64, Errno> {
    Ok(fstat(memfd_create(c"memfds", MemfdFlags::CLOEXEC)?)?.st_dev)
}

/// A memfd must be sealed. Other files, snapshots, cannot be, though those on a tmpfs have seals: their owner is to leave them
/// alone.
fn check_sealed(file: &File, memfds: u64) -> Result<(), MemoryError> {
    if fstat(file).map_err(MemoryError::Host)?.st_dev != memfds {
        return Ok(());
    }
    let seals = fcntl_get_seals(file).map_err(MemoryError::Host)?;
    if seals.contains(SealFlags::SHRINK) && seals.intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE) {
        return Ok(());
    }
    Err(MemoryError::Layer("a memfd is not sealed: it could change".into()))
}
