//! A file to be booted, kept open.

use std::{
    fs::File,
    io::{self, Read},
    os::unix::fs::{FileExt, FileTypeExt},
    path::{Path, PathBuf},
};

use purlin_engine::memory::GuestRam;
use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::{Bytes, GuestAddress};

use crate::error::MachineError;

/// The most that is taken out of a pipe.
const MOST_PIPED: u64 = 1 << 30;

/// A kernel or initrd file, open. Its bytes can be read any number of times, whatever the path names by then.
#[derive(Debug)]
pub struct Image {
    path: PathBuf,
    what: &'static str,
    file: File,
    length: u64,
}

impl Image {
    /// Opens the file at `path`; `what` (`kernel`, `initrd`) is for messages. What can be read only once (a pipe) is
    /// copied to memory.
    pub fn open(path: &Path, what: &'static str) -> Result<Self, MachineError> {
        Self::open_file(path, what).map_err(|source| MachineError::Read { what, path: path.to_owned(), source })
    }

    fn open_file(path: &Path, what: &'static str) -> io::Result<Self> {
        let file = File::open(path)?;
        let metadata = file.metadata()?;
        let kind = metadata.file_type();
        if kind.is_file() {
            return Ok(Self { path: path.to_owned(), what, length: metadata.len(), file });
        }
        if !kind.is_fifo() {
            return Err(io::Error::other("it is neither a regular file nor a pipe"));
        }
        let mut copy = File::from(memfd_create(c"purlin-image", MemfdFlags::CLOEXEC)?);
        let length = io::copy(&mut file.take(MOST_PIPED + 1), &mut copy)?;
        if length > MOST_PIPED {
            return Err(io::Error::other("more than 1 GiB came out of the pipe: give it as a file"));
        }
        Ok(Self { path: path.to_owned(), what, length, file: copy })
    }

    /// An image of `bytes`, as if they came from a file of this name.
    pub fn from_bytes(name: &str, what: &'static str, bytes: &[u8]) -> Result<Self, MachineError> {
        let file = memfd_create(c"purlin-image", MemfdFlags::CLOEXEC).map(File::from).map_err(io::Error::from);
        let file = file.and_then(|f| f.write_all_at(bytes, 0).map(|()| f));
        let path = PathBuf::from(name);
        let file = file.map_err(|source| MachineError::Read { what, path: path.clone(), source })?;
        Ok(Self { path, what, file, length: bytes.len() as u64 })
    }

    /// The path that it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Length in bytes when it was opened.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// All of it.
    pub fn read(&self) -> Result<Vec<u8>, MachineError> {
        let mut bytes = Vec::new();
        let length = usize::try_from(self.length).unwrap_or(usize::MAX);
        bytes.try_reserve_exact(length).map_err(|_| self.read_error(io::ErrorKind::OutOfMemory.into()))?;
        bytes.resize(length, 0);
        self.file.read_exact_at(&mut bytes, 0).map_err(|e| self.read_error(e))?;
        Ok(bytes)
    }

    /// Copies all of it to guest physical `address`, where there must be room.
    pub fn load(&self, ram: &GuestRam, address: u64) -> Result<(), MachineError> {
        const CHUNK: usize = 1 << 20;
        let mut buffer = vec![0; CHUNK];
        let mut done = 0;
        while done < self.length {
            let part = &mut buffer[..(self.length - done).min(CHUNK as u64) as usize];
            self.file.read_exact_at(part, done).map_err(|e| self.read_error(e))?;
            ram.write_slice(part, GuestAddress(address + done))?;
            done += part.len() as u64;
        }
        Ok(())
    }

    /// That it is no kernel.
    pub(super) fn not_a_kernel(&self, reason: impl Into<String>) -> MachineError {
        MachineError::NotAKernel { path: self.path.clone(), reason: reason.into() }
    }

    /// That it is a kernel which does not fit.
    pub(super) fn too_large(&self, reason: impl Into<String>) -> MachineError {
        MachineError::KernelTooLarge { path: self.path.clone(), reason: reason.into() }
    }

    fn read_error(&self, source: io::Error) -> MachineError {
        MachineError::Read { what: self.what, path: self.path.clone(), source }
    }
}
