//! From a machine's state and layers to a file.

use std::{
    fs::{self, File},
    io::{self, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use prost::Message;
use purlin_memory::{Layer, PAGE_SIZE};
use purlin_state::SavedState;
use tempfile::NamedTempFile;

use crate::{
    CHUNK, MAX_DEPTH, VERSION,
    error::SnapshotError,
    header::{self, Header, Section, fingerprint},
    messages::{DiskImage, Index, Manifest, ParentName, SlotIndex, SnapshotId},
};

/// Pages that are looked at together.
const AT_ONCE: u64 = 64;

/// What a snapshot is to have.
#[derive(Clone, Copy, Debug)]
pub struct Contents<'a> {
    /// The name of the machine.
    pub machine: &'a str,
    /// Everything but memory and disks.
    pub state: &'a SavedState,
    /// Memory, a layer for each slot.
    pub memory: &'a [Layer],
    /// The images of the disks, by number.
    pub disks: &'a [DiskImage],
    /// The snapshot that it is to stand on: only what has changed since is written.
    pub parent: Option<&'a Parent>,
}

/// A snapshot that others can stand on.
#[derive(Clone, Debug)]
pub struct Parent {
    pub(crate) path: PathBuf,
    pub(crate) id: SnapshotId,
    pub(crate) fingerprint: u32,
    pub(crate) memory: Vec<Layer>,
    /// So many snapshots it is, with those that it stands on.
    pub(crate) depth: usize,
}

impl Parent {
    /// Its file.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// A snapshot that was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// Which one it is.
    pub id: SnapshotId,
    /// Pages in it.
    pub pages: u64,
    /// Pages that have become zeroes since the parent.
    pub zero_pages: u64,
    /// The file's bytes.
    pub bytes: u64,
    fingerprint: u32,
    depth: usize,
    path: PathBuf,
}

impl Written {
    /// As what the next one can stand on; `memory` is what it was written of.
    pub fn into_parent(self, memory: Vec<Layer>) -> Parent {
        let Self { id, fingerprint, depth, path, .. } = self;
        Parent { path, id, fingerprint, memory, depth }
    }
}

/// Writes a snapshot to `path`, where nothing must be yet. When this returns it is on the host's disk, as a whole; after
/// an error nothing is there.
pub fn write(path: &Path, contents: &Contents<'_>) -> Result<Written, SnapshotError> {
    let failed = |source| SnapshotError::Host { what: "write", path: path.to_owned(), source };
    check(path, contents.parent)?;
    let slots = |layers: &[Layer]| layers.iter().map(|layer| (layer.start(), layer.length())).collect::<Vec<_>>();
    if contents.parent.is_some_and(|parent| slots(contents.memory) != slots(&parent.memory)) {
        return Err(SnapshotError::OtherMachine { path: path.to_owned() });
    }
    let directory = directory_of(path);
    let temporary = tempfile::Builder::new().prefix(".purlin-snapshot-").tempfile_in(directory).map_err(failed)?;
    let mut written = fill(temporary.as_file(), contents).map_err(failed)?;
    written.path = path.to_owned();
    put_in_place(temporary, path, directory).map_err(failed)?;
    Ok(written)
}

/// Whether a snapshot can be written to `path` and stand on `parent`, as far as can be said before a machine is frozen for
/// it.
pub fn check(path: &Path, parent: Option<&Parent>) -> Result<(), SnapshotError> {
    let failed = |source| SnapshotError::Host { what: "write", path: path.to_owned(), source };
    let directory = fs::canonicalize(directory_of(path)).map_err(failed)?;
    if path.try_exists().map_err(failed)? {
        return Err(failed(io::ErrorKind::AlreadyExists.into()));
    }
    let Some(Parent { path: parent, depth, .. }) = parent else { return Ok(()) };
    if *depth >= MAX_DEPTH {
        return Err(SnapshotError::TooDeep { path: path.to_owned(), max: MAX_DEPTH });
    }
    let found = fs::canonicalize(parent).map_err(|source| SnapshotError::ParentMissing {
        path: path.to_owned(),
        parent: parent.clone(),
        source,
    })?;
    if found.parent() != Some(&*directory) {
        return Err(SnapshotError::Elsewhere { path: path.to_owned(), parent: parent.clone() });
    }
    Ok(())
}

fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(directory) if !directory.as_os_str().is_empty() => directory,
        _ => Path::new("."),
    }
}

/// On the host's disk by its name, or not at all.
fn put_in_place(temporary: NamedTempFile, path: &Path, directory: &Path) -> io::Result<()> {
    temporary.as_file().sync_all()?;
    temporary.persist_noclobber(path)?;
    File::open(directory)?.sync_all().inspect_err(|_| {
        let _ = fs::remove_file(path);
    })
}

fn fill(mut file: &File, contents: &Contents<'_>) -> io::Result<Written> {
    file.seek(SeekFrom::Start(header::LENGTH as u64))?;
    let mut pages = Pages { file, chunk: Vec::with_capacity(CHUNK), index: Index::default(), pages: 0, zero_pages: 0 };
    for (number, layer) in contents.memory.iter().enumerate() {
        pages.slot(layer, contents.parent.map(|parent| &parent.memory[number]))?;
    }
    pages.end_chunk()?;
    let id = SnapshotId::random()?;
    let manifest = manifest(id, contents);
    let mut header = Header::default();
    header.memory = Section { offset: header::LENGTH as u64, length: pages.pages * PAGE_SIZE, checksum: 0 };
    let mut end = header.memory.offset + header.memory.length;
    let messages = [pages.index.encode_to_vec(), manifest.encode_to_vec(), contents.state.encode_to_vec()];
    for (section, bytes) in [&mut header.index, &mut header.manifest, &mut header.state].into_iter().zip(messages) {
        *section = Section { offset: end, length: bytes.len() as u64, checksum: crc32c::crc32c(&bytes) };
        file.write_all(&bytes)?;
        end += section.length;
    }
    let page = header.encode(VERSION);
    file.rewind()?;
    file.write_all(&page)?;
    let (pages, zero_pages) = (pages.pages, pages.zero_pages);
    let (fingerprint, depth) = (fingerprint(&page), 1 + contents.parent.map_or(0, |parent| parent.depth));
    Ok(Written { id, pages, zero_pages, bytes: end, fingerprint, depth, path: PathBuf::new() })
}

fn manifest(id: SnapshotId, contents: &Contents<'_>) -> Manifest {
    let parent = contents.parent.map(|parent| ParentName {
        id: parent.id.0.into(),
        fingerprint: parent.fingerprint,
        file: parent.path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
    });
    Manifest {
        id: id.0.into(),
        parent,
        created_ms: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis() as u64),
        machine: contents.machine.to_owned(),
        program: format!("purlin {}", env!("CARGO_PKG_VERSION")),
        disks: contents.disks.to_vec(),
    }
}

/// The memory section as it is being written.
struct Pages<'f> {
    file: &'f File,
    /// What is not written yet: up to a chunk.
    chunk: Vec<u8>,
    index: Index,
    pages: u64,
    zero_pages: u64,
}

impl Pages<'_> {
    /// Adds the pages of a slot that differ from `parent`'s, or without one from zero.
    fn slot(&mut self, layer: &Layer, parent: Option<&Layer>) -> io::Result<()> {
        let mut slot = SlotIndex { start: layer.start(), length: layer.length(), runs: Vec::new() };
        let candidates = match parent {
            Some(parent) => layer.candidates(parent)?,
            None => layer.data()?,
        };
        let room = || vec![0; (AT_ONCE * PAGE_SIZE) as usize];
        let (mut now, mut before) = (room(), room());
        for range in candidates.iter() {
            for first in range.clone().step_by(AT_ONCE as usize) {
                let length = (AT_ONCE.min(range.end - first) * PAGE_SIZE) as usize;
                layer.read(first, &mut now[..length])?;
                if let Some(parent) = parent {
                    parent.read(first, &mut before[..length])?;
                }
                self.differences(&mut slot, first, &now[..length], &before[..length], parent.is_some())?;
            }
        }
        self.index.slots.push(slot);
        Ok(())
    }

    fn differences(
        &mut self,
        slot: &mut SlotIndex,
        first: u64,
        now: &[u8],
        before: &[u8],
        has_parent: bool,
    ) -> io::Result<()> {
        const ZERO: [u8; PAGE_SIZE as usize] = [0; PAGE_SIZE as usize];
        let pages = now.chunks(PAGE_SIZE as usize).zip(before.chunks(PAGE_SIZE as usize));
        for (page, (now, before)) in (first..).zip(pages) {
            // Without a parent, `before` is zeroes.
            if now == before {
                continue;
            }
            if has_parent && now == &ZERO[..] {
                slot.push(page, None);
                self.zero_pages += 1;
            } else {
                slot.push(page, Some(self.pages));
                self.add(now)?;
            }
        }
        Ok(())
    }

    fn add(&mut self, page: &[u8]) -> io::Result<()> {
        self.chunk.extend_from_slice(page);
        self.pages += 1;
        if self.chunk.len() == CHUNK { self.end_chunk() } else { Ok(()) }
    }

    fn end_chunk(&mut self) -> io::Result<()> {
        if !self.chunk.is_empty() {
            self.file.write_all(&self.chunk)?;
            self.index.chunks.push(crc32c::crc32c(&self.chunk));
            self.chunk.clear();
        }
        Ok(())
    }
}
