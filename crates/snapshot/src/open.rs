//! From a file to a checked snapshot.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use prost::Message;
use purlin_memory::PAGE_SIZE;
use purlin_state::SavedState;

use crate::{
    CHUNK, VERSION,
    error::SnapshotError,
    header::{self, Header, HeaderError, Section},
    messages::{Index, Manifest, SlotIndex},
};

/// An open snapshot. All but its pages is checked.
#[derive(Debug)]
pub struct Snapshot {
    pub(crate) path: PathBuf,
    pub(crate) file: Arc<File>,
    pub(crate) header: Header,
    pub(crate) fingerprint: u32,
    pub(crate) index: Index,
    manifest: Manifest,
    state: SavedState,
}

impl Snapshot {
    /// Opens a snapshot and checks everything but its pages, which [`Snapshot::verify`] does; parents are left alone.
    pub fn open(path: &Path) -> Result<Self, SnapshotError> {
        let file = File::open(path).map_err(|source| host("open", path, source))?;
        Self::of_file(file, path)
    }

    pub(crate) fn of_file(file: File, path: &Path) -> Result<Self, SnapshotError> {
        let length = file.metadata().map_err(|source| host("read", path, source))?.len();
        let page = first_page(&file, path, length)?;
        let header = decode_header(&page, path)?;
        let expected = header.end().unwrap_or(u64::MAX);
        if length != expected {
            return Err(SnapshotError::CutOff { path: path.to_owned(), expected, found: length });
        }
        let manifest: Manifest = section(&file, path, "manifest", header.manifest)?;
        if manifest.id.len() != 16 || manifest.parent.as_ref().is_some_and(|parent| parent.id.len() != 16) {
            return Err(corrupt(path, "manifest", "an ID has not 16 bytes"));
        }
        let index: Index = section(&file, path, "index", header.index)?;
        check_index(&index, &header.memory).map_err(|reason| corrupt(path, "index", reason))?;
        let state = section(&file, path, "state", header.state)?;
        let (path, file, fingerprint) = (path.to_owned(), Arc::new(file), header::fingerprint(&page));
        Ok(Self { path, file, header, fingerprint, index, manifest, state })
    }

    /// What it is of.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The machine's state, without memory.
    pub fn state(&self) -> &SavedState {
        &self.state
    }

    /// Pages that are in the file.
    pub fn pages(&self) -> u64 {
        self.header.memory.length / PAGE_SIZE
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads all of its pages and compares their checksums.
    pub fn verify(&self) -> Result<(), SnapshotError> {
        let Section { offset, length, .. } = self.header.memory;
        let mut buffer = vec![0; CHUNK];
        for (number, checksum) in (0..).zip(&self.index.chunks) {
            let at = number * CHUNK as u64;
            let chunk = &mut buffer[..(length - at).min(CHUNK as u64) as usize];
            self.file.read_exact_at(chunk, offset + at).map_err(|source| host("read", &self.path, source))?;
            if crc32c::crc32c(chunk) != *checksum {
                return Err(corrupt(&self.path, "memory", format!("the checksum of its MiB {number} is wrong")));
            }
        }
        Ok(())
    }
}

fn first_page(file: &File, path: &Path, length: u64) -> Result<[u8; header::LENGTH], SnapshotError> {
    let mut page = [0; header::LENGTH];
    let there = &mut page[..length.min(header::LENGTH as u64) as usize];
    file.read_exact_at(there, 0).map_err(|source| host("read", path, source))?;
    if !header::is_magic(there) {
        return Err(SnapshotError::NotASnapshot { path: path.to_owned() });
    }
    if there.len() < header::LENGTH {
        let expected = header::LENGTH as u64;
        return Err(SnapshotError::CutOff { path: path.to_owned(), expected, found: length });
    }
    Ok(page)
}

fn decode_header(page: &[u8; header::LENGTH], path: &Path) -> Result<Header, SnapshotError> {
    let header = Header::decode(page, VERSION).map_err(|error| match error {
        HeaderError::Magic => SnapshotError::NotASnapshot { path: path.to_owned() },
        HeaderError::Version(found) => SnapshotError::Newer { path: path.to_owned(), found, known: VERSION },
        HeaderError::Checksum => corrupt(path, "header", "its checksum is wrong"),
        HeaderError::Sections => corrupt(path, "header", "its sections do not follow each other"),
    })?;
    match header.features {
        0 => Ok(header),
        bits => Err(SnapshotError::Feature { path: path.to_owned(), bits }),
    }
}

fn section<M: Message + Default>(
    file: &File,
    path: &Path,
    name: &'static str,
    section: Section,
) -> Result<M, SnapshotError> {
    let length = usize::try_from(section.length).map_err(|_| corrupt(path, name, "it is too large"))?;
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(length).map_err(|_| corrupt(path, name, "it is too large for this host"))?;
    bytes.resize(length, 0);
    file.read_exact_at(&mut bytes, section.offset).map_err(|source| host("read", path, source))?;
    if crc32c::crc32c(&bytes) != section.checksum {
        return Err(corrupt(path, name, "its checksum is wrong"));
    }
    M::decode(bytes.as_slice()).map_err(|error| corrupt(path, name, error.to_string()))
}

/// Whoever uses the index need not ask whether it makes sense.
fn check_index(index: &Index, memory: &Section) -> Result<(), &'static str> {
    if !memory.length.is_multiple_of(PAGE_SIZE) || memory.checksum != 0 {
        return Err("memory is not whole pages");
    }
    if index.chunks.len() as u64 != memory.length.div_ceil(CHUNK as u64) {
        return Err("there is not one checksum for each MiB");
    }
    index.slots.iter().try_for_each(|slot| check_slot(slot, memory.length / PAGE_SIZE))
}

fn check_slot(slot: &SlotIndex, pages: u64) -> Result<(), &'static str> {
    let in_slot = slot.length / PAGE_SIZE;
    if !slot.length.is_multiple_of(PAGE_SIZE) || !slot.start.is_multiple_of(PAGE_SIZE) || slot.length == 0 {
        return Err("a slot is not whole pages");
    }
    if slot.start.checked_add(slot.length).is_none() || !slot.runs.len().is_multiple_of(3) {
        return Err("a slot makes no sense");
    }
    let ends = slot.runs().try_fold(0, |behind, run| {
        let end = run.first.checked_add(run.count).filter(|end| *end <= in_slot)?;
        let inside = run.place.is_none_or(|place| place.checked_add(run.count).is_some_and(|end| end <= pages));
        (run.first >= behind && run.count > 0 && inside).then_some(end)
    });
    ends.map(|_| ()).ok_or("its runs make no sense")
}

pub(crate) fn host(what: &'static str, path: &Path, source: io::Error) -> SnapshotError {
    SnapshotError::Host { what, path: path.to_owned(), source }
}

fn corrupt(path: &Path, section: &'static str, reason: impl Into<String>) -> SnapshotError {
    SnapshotError::Corrupt { path: path.to_owned(), section, reason: reason.into() }
}
