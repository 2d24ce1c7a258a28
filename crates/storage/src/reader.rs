//! A disk as a file, for those who read a guest's file system on the host.

use std::{
    io::{self, Read, Seek, SeekFrom},
    sync::Arc,
};

use crate::disk::Disk;

/// Reads an opened disk from a position, as a file. Wrap it in a [`std::io::BufReader`] for small reads.
#[derive(Debug)]
pub struct DiskReader {
    disk: Arc<Disk>,
    position: u64,
}

impl DiskReader {
    /// At the disk's start.
    pub fn new(disk: Arc<Disk>) -> Self {
        Self { disk, position: 0 }
    }
}

impl Read for DiskReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.disk.size().saturating_sub(self.position);
        let length = left.min(buffer.len() as u64) as usize;
        if length == 0 {
            return Ok(0); // at the end, or beyond it
        }
        self.disk.read_at(&mut buffer[..length], self.position).map_err(|e| io::Error::from(e.errno()))?;
        self.position += length as u64;
        Ok(length)
    }
}

impl Seek for DiskReader {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(offset) => Some(offset),
            SeekFrom::Current(delta) => self.position.checked_add_signed(delta),
            SeekFrom::End(delta) => self.disk.size().checked_add_signed(delta),
        };
        self.position = position.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        Ok(self.position)
    }
}
