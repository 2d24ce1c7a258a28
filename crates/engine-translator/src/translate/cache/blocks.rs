//! The blocks of the cache in the order of their addresses, living and dead. There are hundreds of thousands of them, so
//! they are small.

use std::io;

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::{
    Key,
    image::{Reader, Writer},
    list::List,
};
use crate::translate::emit::{Emitted, FaultPoint};

/// One block. What is said of its code in lists of all blocks begins at `faults` and `return_sites`, and ends where that of
/// the next block begins.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct Block {
    /// What it was translated from.
    pub key: Key,
    /// Offset of its first byte in the cache, which is its entry with the flags in the host's.
    pub start: u32,
    /// Length of its code, without descriptors.
    code_len: u32,
    /// Offset of its entry with the flags in `flag_word`.
    pub saved_entry: u32,
    /// See [`super::Found::page_id`].
    pub page_id: u32,
    /// The bytes of its first page that it depends on: offsets of the first, and behind the last.
    pub span: [u16; 2],
    faults: u32,
    return_sites: u32,
    /// 0.
    _reserved: u32,
}

/// A [`FaultPoint`], by offset in the cache and distance from its block's RIP.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Fault {
    offset: u32,
    delta: i32,
}

impl Fault {
    /// In the highest bits of the offset: flags that are in `flag_word`, and an RIP that is in R11.
    const SAVED: u32 = 1 << 31;
    const IN_R11: u32 = 1 << 30;
    const OFFSET: u32 = Self::IN_R11 - 1;

    fn new(point: &FaultPoint, start: u32, rip: u64) -> Self {
        let saved = if point.flags_saved { Self::SAVED } else { 0 };
        let (delta, in_r11) = match point.rip {
            Some(at) => (at.wrapping_sub(rip) as i32, 0),
            None => (0, Self::IN_R11),
        };
        debug_assert!(point.rip.is_none_or(|at| rip.wrapping_add(delta as u64) == at));
        Self { offset: (start + point.offset) | saved | in_r11, delta }
    }

    fn point(self, start: u32, rip: u64) -> FaultPoint {
        FaultPoint {
            offset: (self.offset & Self::OFFSET) - start,
            rip: (self.offset & Self::IN_R11 == 0).then(|| rip.wrapping_add(self.delta as u64)),
            flags_saved: self.offset & Self::SAVED != 0,
        }
    }
}

/// Bytes of a granule: some blocks.
const GRANULE: usize = 512;

/// Offsets in the cache are less than this.
pub const MAX_CACHE: usize = Fault::OFFSET as usize;

/// All blocks.
#[derive(Default)]
pub struct Blocks {
    blocks: List<Block>,
    faults: List<Fault>,
    return_sites: List<u32>,
    /// For each granule of the cache the block that its first byte belongs to.
    granules: List<u32>,
}

impl Blocks {
    /// Adds one at the end; `used` is the offset behind it. Returns its index.
    pub fn push(&mut self, key: Key, start: u32, used: u32, page_id: u32, span: (u32, u32), emitted: &Emitted) -> u32 {
        let index = self.blocks.len() as u32;
        self.blocks.push(Block {
            key,
            start,
            code_len: emitted.code_len,
            saved_entry: start + emitted.saved_entry,
            page_id,
            span: [span.0 as u16, span.1 as u16],
            faults: self.faults.len() as u32,
            return_sites: self.return_sites.len() as u32,
            _reserved: 0,
        });
        self.faults.extend(emitted.faults.iter().map(|point| Fault::new(point, start, key.rip)));
        self.return_sites.extend(emitted.return_sites.iter().map(|offset| start + offset));
        let granules = (used as usize).div_ceil(GRANULE).saturating_sub(self.granules.len());
        self.granules.extend((0..granules).map(|_| index));
        index
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// The block of an index, if there is one.
    pub fn find(&self, index: u32) -> Option<&Block> {
        self.blocks.get(index as usize)
    }

    /// The block of an index.
    pub fn get(&self, index: u32) -> &Block {
        self.find(index).expect("indices are of blocks that there are")
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Block> {
        self.blocks.iter()
    }

    fn index_at(&self, offset: u32) -> Option<usize> {
        let first = *self.granules.get(offset as usize / GRANULE)? as usize;
        let before = (first..).map_while(|index| self.blocks.get(index)).take_while(|b| b.start <= offset).count();
        (first + before).checked_sub(1)
    }

    /// The block that the byte at `offset` of the cache belongs to.
    pub fn at(&self, offset: u32) -> Option<&Block> {
        self.blocks.get(self.index_at(offset)?)
    }

    /// Offsets in the cache of the return sites of a block.
    pub fn return_sites(&self, index: u32) -> &[u32] {
        let end =
            self.blocks.get(index as usize + 1).map_or(self.return_sites.len(), |next| next.return_sites as usize);
        self.return_sites.slice(self.get(index).return_sites as usize..end)
    }

    /// The fault point of the host instruction at `offset` of the cache.
    pub fn fault_at(&self, offset: u32) -> Option<FaultPoint> {
        let index = self.index_at(offset)?;
        let block = self.blocks.get(index)?;
        if offset >= block.start + block.code_len {
            return None;
        }
        let end = self.blocks.get(index + 1).map_or(self.faults.len(), |next| next.faults as usize);
        let faults = self.faults.slice(block.faults as usize..end);
        let i = faults.binary_search_by_key(&offset, |fault| fault.offset & Fault::OFFSET).ok()?;
        Some(faults[i].point(block.start, block.key.rip))
    }

    /// Writes all of them.
    pub fn save(&self, image: &mut Writer) -> io::Result<()> {
        image.section(self.blocks.parts())?;
        image.section(self.faults.parts())?;
        image.section(self.return_sites.parts())?;
        image.section(self.granules.parts())
    }

    /// Those that [`Self::save`] wrote.
    pub fn restore(image: &mut Reader) -> io::Result<Self> {
        Ok(Self {
            blocks: image.section()?.into(),
            faults: image.section()?.into(),
            return_sites: image.section()?.into(),
            granules: image.section()?.into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_of_faults_are_what_they_were() {
        for rip in [None, Some(0x1000), Some(0xfff), Some(0x7000_0000), Some(0u64.wrapping_sub(0x7000_0000))] {
            for flags_saved in [false, true] {
                let point = FaultPoint { offset: 5, rip, flags_saved };
                let back = Fault::new(&point, 0x1234, 0x1000).point(0x1234, 0x1000);
                assert_eq!((back.offset, back.rip, back.flags_saved), (5, rip, flags_saved));
            }
        }
    }
}
