//! Memory that goes back to the host.

use std::{io, ops::Range};

use rustix::fs::{FallocateFlags, fallocate};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, bitmap::Bitmap};

use crate::{
    GuestRam, PAGE_SIZE,
    layer::data_in,
    log::mapping_of,
    mapping::{Backing, Mapping, Private},
};

/// A shorter run of pages that clones share is overwritten, a longer one mapped away.
const LEAST_UNMAPPED: u64 = 8;
/// The most runs that a slot's mapping is cut into: each costs two of the 65,530 mappings that a process can have.
const MOST_RUNS: usize = 8192;

/// Gives guest memory back to the host: it reads as zeroes, and takes none of the host's until it is written again. That
/// goes for whole pages in the range of `length` bytes from guest physical `address`; what there is no memory for is left
/// out.
///
/// It is a write like any other: who watches a page hears of it. Of a machine that was frozen nothing changes for clones.
pub fn discard(ram: &GuestRam, address: u64, length: u64) -> io::Result<()> {
    let end = address.saturating_add(length);
    for slot in ram.iter() {
        let start = slot.start_addr().0;
        let from = address.saturating_sub(start).min(slot.len()).next_multiple_of(PAGE_SIZE);
        let to = end.saturating_sub(start).min(slot.len()) / PAGE_SIZE * PAGE_SIZE;
        if from >= to {
            continue;
        }
        let mapping = mapping_of(slot);
        match &mut *mapping.backing() {
            Backing::Shared { file, offset, .. } => {
                let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                fallocate(&**file, how, *offset + from, to - from)?;
            }
            Backing::Private(private) => discard_private(mapping, private, from / PAGE_SIZE..to / PAGE_SIZE)?,
        }
        slot.bitmap().mark_dirty(from as usize, (to - from) as usize);
    }
    Ok(())
}

/// Pages of this process are given up. Where something would show from below, that is hidden.
fn discard_private(mapping: &Mapping, private: &mut Private, pages: Range<u64>) -> io::Result<()> {
    mapping.revert(pages.clone())?;
    let mut shows = Vec::new();
    for (range, place) in private.mapped.places().overlapping(&pages) {
        shows.extend(data_in(place, range.start.max(pages.start)..range.end.min(pages.end))?);
    }
    for range in shows {
        let hide = range.end - range.start >= LEAST_UNMAPPED && private.mapped.runs() < MOST_RUNS;
        if hide && mapping.map_nothing(range.clone()).is_ok() {
            private.mapped.clear(range);
        } else {
            mapping.zero(range)?;
        }
    }
    Ok(())
}
