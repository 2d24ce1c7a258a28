//! A look at a qcow2 image's tables before imago works with them (QEMU's docs/interop/qcow2.txt).
//!
//! It finds images that were cut off, and refuses to write to one whose tables overlap or are not counted as used: new
//! clusters would be put on top of them. `qemu-img check` is the thorough one; this one reads tables only, and no more
//! than some MiB of them.

use std::{collections::HashSet, fs::File};

use crate::qcow2_header::{Header, read_at_up_to, u64_at};

/// The most L2 tables whose entries are looked at: those of 128 GiB with clusters of 64 KiB.
const L2_TABLES_CHECKED: usize = 256;

/// Bits 9 to 55 of an L1 or standard L2 entry: where its table or cluster is.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Bit 62 of an L2 entry: its cluster is compressed, and its offset in other bits.
const COMPRESSED: u64 = 1 << 62;

const CUT_OFF: &str = "it is cut off: copy it again, or see 'qemu-img check'";
const CORRUPT: &str = "its tables are corrupt: repair it with 'qemu-img check -r all'";

/// Checks the tables of an image file of `length` bytes. Errors say what is wrong in a few words.
pub(crate) fn check(header: &Header, file: &File, length: u64, writable: bool) -> Result<(), String> {
    let tables = Tables { header, file, length };
    let l2_tables = tables.entries(header.l1_table)?.map(|entry| entry & OFFSET_MASK);
    let l2_tables: Vec<u64> = l2_tables.filter(|offset| *offset != 0).collect();
    tables.check_inside(&l2_tables)?;
    let metadata = if writable { Some(tables.check_metadata(&l2_tables)?) } else { None };
    for table in l2_tables.into_iter().take(L2_TABLES_CHECKED) {
        let clusters = tables.entries((table, header.cluster_size / 8))?;
        let clusters = clusters.filter(|entry| entry & COMPRESSED == 0).map(|entry| entry & OFFSET_MASK);
        let clusters: Vec<u64> = clusters.filter(|offset| *offset != 0).collect();
        tables.check_inside(&clusters)?;
        if let Some(metadata) = &metadata
            && clusters.iter().any(|cluster| metadata.contains(&(cluster / header.cluster_size)))
        {
            return Err(CORRUPT.into());
        }
    }
    Ok(())
}

struct Tables<'a> {
    header: &'a Header,
    file: &'a File,
    length: u64,
}

impl Tables<'_> {
    /// The entries of a table at (offset, count); what is beyond the file's end is 0.
    fn entries(&self, (offset, count): (u64, u64)) -> Result<impl Iterator<Item = u64>, String> {
        let mut table = vec![0; count as usize * 8];
        read_at_up_to(self.file, &mut table, offset)?;
        Ok((0..count as usize).map(move |index| u64_at(&table, index * 8)))
    }

    fn check_inside(&self, offsets: &[u64]) -> Result<(), String> {
        let inside = offsets.iter().all(|offset| *offset < self.length);
        if inside { Ok(()) } else { Err(CUT_OFF.into()) }
    }

    /// Checks that the tables lie apart from each other and are counted as used, and returns their clusters' numbers.
    fn check_metadata(&self, l2_tables: &[u64]) -> Result<HashSet<u64>, String> {
        let cluster_size = self.header.cluster_size;
        let refblocks: Vec<u64> = self.entries(self.header.refcount_table)?.collect();
        let given = refblocks.iter().copied().filter(|offset| *offset != 0);
        self.check_inside(&given.clone().collect::<Vec<_>>())?;

        let whole_tables = [(0, 1), self.header.l1_table, self.header.refcount_table];
        let clusters = whole_tables.into_iter().flat_map(|(offset, entries)| {
            let first = offset / cluster_size;
            first..first + (entries * 8).div_ceil(cluster_size)
        });
        let single = given.chain(l2_tables.iter().copied());
        if single.clone().any(|offset| !offset.is_multiple_of(cluster_size)) {
            return Err(CORRUPT.into());
        }
        let mut metadata = HashSet::new();
        for cluster in clusters.chain(single.map(|offset| offset / cluster_size)) {
            if !metadata.insert(cluster) || !self.is_counted(&refblocks, cluster)? {
                return Err(CORRUPT.into());
            }
        }
        Ok(metadata)
    }

    /// Whether the refcount of a cluster is not 0.
    fn is_counted(&self, refblocks: &[u64], cluster: u64) -> Result<bool, String> {
        let per_block = (self.header.cluster_size * 8) >> self.header.refcount_order;
        let block = refblocks.get((cluster / per_block) as usize).copied().unwrap_or(0);
        if block == 0 {
            return Ok(false);
        }
        let bit = (cluster % per_block) << self.header.refcount_order;
        let width = 1_u32 << self.header.refcount_order;
        let mut bytes = [0; 8];
        let count = width.div_ceil(8) as usize;
        read_at_up_to(self.file, &mut bytes[..count], block + bit / 8)?;
        // Narrower ones are counted from a byte's least significant bit.
        let mask = if width < 8 { ((1_u16 << width) - 1) << (bit % 8) } else { 0xff };
        Ok(bytes.iter().any(|byte| u16::from(*byte) & mask != 0))
    }
}
