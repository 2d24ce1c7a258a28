//! Memory made of layers.

use std::sync::Arc;

use rustix::io::Errno;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap, mmap::MmapRegionBuilder};

use crate::{
    GuestRam, MemoryError, PageLog,
    freeze::new_memfd,
    layer::{Layer, Place},
    mapping::{Backing, HUGE_PAGE_SIZE, Mapping, Private},
};

/// A run of at least so many pages is mapped, a shorter one copied. On the development machine a run in the midst of
/// another one took 9 µs to map, which makes two mappings more, and a page 4 µs to copy.
const LEAST_MAPPED: u64 = 4;
/// The most mappings that a slot begins with: a process can have 65,530. Where a layer has more runs, longer ones are copied
/// too.
const MOST_MAPPED: usize = 4096;

/// Makes guest memory of the given slots: guest physical address and length in bytes, both multiples of 4 KiB.
pub fn create(slots: &[(u64, u64)]) -> Result<GuestRam, MemoryError> {
    let slot = |&(start, length): &(u64, u64)| {
        let mapping = Mapping::reserve(start, length).map_err(MemoryError::Host)?;
        let offset = start % HUGE_PAGE_SIZE;
        let file = new_memfd(offset + length)?;
        mapping.map(0..length / crate::PAGE_SIZE, &file, offset, true).map_err(MemoryError::Host)?;
        *mapping.backing() = Backing::Shared { start, file: Arc::new(file), offset };
        Ok((start, mapping))
    };
    assemble(slots.iter().map(slot).collect::<Result<_, MemoryError>>()?)
}

/// Makes guest memory that begins with the content of these layers, one for each slot, and shares it with others.
pub fn from_layers(layers: &[Layer]) -> Result<GuestRam, MemoryError> {
    let slot = |layer: &Layer| {
        let mapping = Mapping::reserve(layer.start(), layer.length()).map_err(MemoryError::Host)?;
        let mapped = lay(&mapping, layer)?;
        *mapping.backing() = Backing::Private(Private { mapped, copied: 0, freezes: 0 });
        Ok((layer.start(), mapping))
    };
    assemble(layers.iter().map(slot).collect::<Result<_, MemoryError>>()?)
}

#[allow(unsafe_code, reason = "vm-memory is told of memory that it has not mapped")]
fn assemble(slots: Vec<(u64, Mapping)>) -> Result<GuestRam, MemoryError> {
    let layout = |reason: &str| MemoryError::Layout(reason.to_owned());
    let mut regions = Vec::new();
    for (start, mapping) in slots {
        let (address, length) = (mapping.address(), mapping.length() as usize);
        let builder = MmapRegionBuilder::new_with_bitmap(length, PageLog::new(start, mapping));
        // SAFETY: `length` bytes are mapped there as long as the region has its log, which has the mapping.
        let builder = unsafe { builder.with_raw_mmap_pointer(address) };
        let region = builder.with_mmap_prot(READ_WRITE).with_mmap_flags(NORESERVE).build();
        let region = region.map_err(|e| MemoryError::Layout(e.to_string()))?;
        let region = GuestRegionMmap::new(region, GuestAddress(start));
        regions.push(region.ok_or_else(|| layout("slot wraps round the address space"))?);
    }
    GuestMemoryMmap::from_regions(regions).map_err(|e| layout(&e.to_string()))
}

/// PROT_READ | PROT_WRITE
const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;
const NORESERVE: i32 = libc::MAP_NORESERVE;

/// Maps and copies the layer's content into a new slot; returns what is mapped.
fn lay(mapping: &Mapping, layer: &Layer) -> Result<Layer, MemoryError> {
    let mut least = LEAST_MAPPED;
    let mapped = loop {
        let planned = plan(layer, least);
        if planned.len() <= MOST_MAPPED {
            match map_all(mapping, layer, &planned) {
                // This process has too many mappings already.
                Err(MemoryError::Host(Errno::NOMEM)) if planned.len() > 1 => {}
                other => break other?,
            }
        }
        least *= 2;
    };
    for (range, place) in layer.places().iter() {
        if mapped.places().get(&range.start) != Some(place) {
            layer.read(range.start, fresh(mapping, range.clone())?)?;
        }
    }
    for (range, _) in mapped.places().iter() {
        layer.places().gaps(range).try_for_each(|gap| mapping.zero(gap)).map_err(MemoryError::Host)?;
    }
    Ok(mapped)
}

/// Maps what is planned, and nothing elsewhere; returns what is mapped.
fn map_all(mapping: &Mapping, layer: &Layer, planned: &Planned) -> Result<Layer, MemoryError> {
    mapping.map_nothing(0..layer.pages()).map_err(MemoryError::Host)?;
    let mut mapped = Layer::empty(layer.start(), layer.length());
    for (range, place) in planned {
        mapping.map(range.clone(), &place.file, place.offset(range.start), false).map_err(MemoryError::Host)?;
        mapped.insert(range.clone(), place.file.clone(), place.offset(range.start));
    }
    Ok(mapped)
}

#[allow(unsafe_code, reason = "a slice of guest memory")]
#[allow(clippy::mut_from_ref)]
fn fresh(mapping: &Mapping, pages: std::ops::Range<u64>) -> Result<&mut [u8], MemoryError> {
    // SAFETY: the slot is being made, and there is one such slice at a time.
    unsafe { mapping.fresh(pages) }.map_err(MemoryError::Host)
}

type Planned = Vec<(std::ops::Range<u64>, Place)>;

/// What of a layer is to be mapped: the runs of at least `least` pages. One that goes on behind shorter runs and gaps is one run: they are written over.
fn plan(layer: &Layer, least: u64) -> Planned {
    let mut planned = Planned::new();
    // Where the last run ends, and whether all behind the last one planned is short.
    let (mut end, mut near) = (0, false);
    for (range, place) in layer.places().iter() {
        near &= range.start - end < least;
        end = range.end;
        if range.end - range.start < least {
            continue;
        }
        match planned.last_mut() {
            Some((last, of)) if near && of == place => last.end = range.end,
            _ => planned.push((range.clone(), place.clone())),
        }
        near = true;
    }
    planned
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn short_runs_do_not_split_long_ones() {
        let [a, b] = [100, 200].map(|pages| {
            let file = tempfile::tempfile().unwrap();
            file.set_len(pages * crate::PAGE_SIZE).unwrap();
            Arc::new(file)
        });
        let mut layer = Layer::empty(0, 1000 * crate::PAGE_SIZE);
        let mut put = |pages: std::ops::Range<u64>, file: &Arc<File>| {
            layer.put(pages.clone(), file.clone(), pages.start * crate::PAGE_SIZE).unwrap();
        };
        put(0..100, &a);
        // Seven pages of b, a gap of seven.
        put(10..17, &b);
        put(40..48, &b);
        put(95..98, &b);
        put(150..190, &b);
        layer.clear(20..27);
        layer.clear(60..68);
        let planned = |least| -> Vec<_> { plan(&layer, least).into_iter().map(|(range, _)| range).collect() };
        assert_eq!(planned(8), [0..40, 40..48, 48..60, 68..95, 150..190]);
        assert_eq!(planned(9), [0..95, 150..190]);
        assert_eq!(planned(1), [0..10, 10..17, 17..20, 27..40, 40..48, 48..60, 68..95, 95..98, 98..100, 150..190]);
    }
}
