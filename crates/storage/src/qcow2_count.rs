//! A new table of a qcow2 image is counted as used, in the file, before the file refers to it.
//!
//! imago keeps refcounts in memory until the next flush, and orders them before entries of L2 tables, but writes an entry
//! of the L1 or the refcount table at once. Were the process killed in between, the image would refer to a cluster that
//! counts as free, and the next writer could put data on top of it. So whoever writes such an entry sets the refcount
//! first; imago writes the same value with its next flush. (A host that loses power is another matter: it may lose any of
//! the writes since the last flush.)

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    sync::{PoisonError, RwLock},
};

use imago::io_buffers::IoVector;

use crate::qcow2_header::{Header, u32_at, u64_at};

/// Where a table's address is in an entry of the L1 or the refcount table (bit 63 of the former is a flag).
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// The header's fields that say where the tables are end here, in bytes.
const HEADER: usize = 72;

/// Sees the writes to an image file before they are made.
pub(crate) struct CountFirst {
    cluster_size: u64,
    refcount_order: u32,
    tables: RwLock<Tables>,
}

/// Offset and length in bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Tables {
    l1: (u64, u64),
    refcounts: (u64, u64),
}

impl CountFirst {
    /// For a writable image; `None` where refcounts are so narrow that several share a byte, which could not be set
    /// without touching the others.
    pub fn new(header: &Header) -> Option<Self> {
        let in_bytes = |(offset, entries): (u64, u64)| (offset, entries * 8);
        let tables = Tables { l1: in_bytes(header.l1_table), refcounts: in_bytes(header.refcount_table) };
        (header.refcount_order >= 3).then(|| Self {
            cluster_size: header.cluster_size,
            refcount_order: header.refcount_order,
            tables: RwLock::new(tables),
        })
    }

    /// To be called before `data` is written at `offset`.
    pub fn before_write(&self, file: &File, data: &IoVector<'_>, offset: u64) -> io::Result<()> {
        let tables = *self.tables.read().unwrap_or_else(PoisonError::into_inner);
        let inside = |(start, length): (u64, u64)| (start..start + length).contains(&offset);
        if offset == 0 && data.len() >= HEADER as u64 {
            self.header_moves(file, &copy(data), tables)
        } else if inside(tables.l1) || inside(tables.refcounts) {
            let entries = copy(data);
            let targets = entries.chunks_exact(8).map(|entry| u64_at(entry, 0) & OFFSET_MASK);
            targets.filter(|target| *target != 0).try_for_each(|target| self.count(file, tables, target))
        } else {
            Ok(())
        }
    }

    /// A new header may say that the tables are elsewhere. (The refcount table counts itself before.)
    fn header_moves(&self, file: &File, header: &[u8], before: Tables) -> io::Result<()> {
        let now = Tables {
            l1: (u64_at(header, 40), u64::from(u32_at(header, 36)) * 8),
            refcounts: (u64_at(header, 48), u64::from(u32_at(header, 56)) * self.cluster_size),
        };
        if now.l1 != before.l1 {
            let clusters = now.l1.1.div_ceil(self.cluster_size);
            (0..clusters).try_for_each(|index| self.count(file, before, now.l1.0 + index * self.cluster_size))?;
        }
        *self.tables.write().unwrap_or_else(PoisonError::into_inner) = now;
        Ok(())
    }

    /// Sets the refcount of the cluster at `target` to 1 if it is 0 in the file.
    fn count(&self, file: &File, tables: Tables, target: u64) -> io::Result<()> {
        let width = 1_usize << (self.refcount_order - 3);
        let per_block = self.cluster_size / width as u64;
        let cluster = target / self.cluster_size;
        let entry = cluster / per_block * 8;
        if entry >= tables.refcounts.1 {
            return Ok(());
        }
        let mut block = [0; 8];
        file.read_exact_at(&mut block, tables.refcounts.0 + entry)?;
        let block = u64::from_be_bytes(block) & OFFSET_MASK;
        if block == 0 {
            return Ok(()); // a block that will count itself, and is being entered
        }
        let position = block + cluster % per_block * width as u64;
        let mut refcount = [0; 8];
        let refcount = &mut refcount[..width];
        file.read_exact_at(refcount, position)?;
        if refcount.iter().all(|byte| *byte == 0) {
            refcount[width - 1] = 1;
            file.write_all_at(refcount, position)?;
        }
        Ok(())
    }
}

/// The data as it is now; tables are never guest memory.
fn copy(data: &IoVector<'_>) -> Vec<u8> {
    let mut bytes = vec![0; data.len() as usize];
    data.copy_into_slice(&mut bytes);
    bytes
}
