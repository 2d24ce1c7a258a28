//! Blocks that one vCPU has found lately. Its jump tables are emptied whenever linear addresses change their meaning; what a
//! block was translated from does not change with that, so it is found here again without the lock of the code cache.
//!
//! A block that has died meanwhile leads to its successor, or to the run loop, like one in a jump table.

use super::{
    cache::{JumpTarget, Key},
    mode::Mode,
};

/// How many there are: by address modulo this.
const ENTRIES: usize = 1 << 12;

#[derive(Clone, Copy)]
struct Entry {
    physical: u64,
    rip: u64,
    mode: Mode,
    target: JumpTarget,
}

/// Nothing is at that physical address.
const NONE: Entry =
    Entry { physical: u64::MAX, rip: 0, mode: Mode::NONE, target: JumpTarget { by_rip: 0, page_id: None } };

/// The blocks. Only those of 64-bit code that lie on one page.
pub struct RecentBlocks {
    entries: Box<[Entry]>,
    generation: u64,
}

impl Default for RecentBlocks {
    fn default() -> Self {
        Self { entries: vec![NONE; ENTRIES].into(), generation: 0 }
    }
}

impl RecentBlocks {
    /// The block for `key`, if it is here, where the code cache has been emptied `generation` times.
    pub fn get(&mut self, key: &Key, generation: u64) -> Option<JumpTarget> {
        if self.generation != generation {
            self.entries.fill(NONE);
            self.generation = generation;
        }
        let entry = &self.entries[place(key)];
        let same = (entry.physical, entry.rip, entry.mode) == (key.physical, key.rip, key.context.mode);
        (same && key.second == 0).then_some(entry.target)
    }

    /// Takes note of a block, unless it lies on two pages.
    pub fn set(&mut self, key: &Key, target: JumpTarget, generation: u64) {
        if self.generation == generation && target.page_id.is_some() && key.context.mode.bits() == 64 {
            let (physical, rip, mode) = (key.physical, key.rip, key.context.mode);
            self.entries[place(key)] = Entry { physical, rip, mode, target };
        }
    }
}

fn place(key: &Key) -> usize {
    (key.physical ^ key.physical >> 12) as usize % ENTRIES
}
