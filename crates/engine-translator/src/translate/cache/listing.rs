//! What is in the cache and what became of it, for a profile.

use std::ops::Range;

use super::{CodeCache, Key};
use crate::{tlb::Privilege, translate::place::is_movable};

/// Where guest code is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestPlace {
    /// Its linear address; `None` if it may have several, with one translation for all of them.
    pub linear: Option<u64>,
    /// Its guest physical address, which tells programs apart that have the same linear ones.
    pub physical: u64,
    /// Whether it runs in user mode.
    pub user: bool,
}

impl From<&Key> for GuestPlace {
    fn from(key: &Key) -> Self {
        let mode = key.context.mode;
        let linear = key.context.cs_base.wrapping_add(key.rip);
        let linear = if mode.bits() == 64 { linear } else { linear & 0xffff_ffff };
        Self {
            linear: (!is_movable(key.rip)).then_some(linear),
            physical: key.physical,
            user: mode.privilege() == Privilege::User,
        }
    }
}

/// What a range of the code cache is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// A stub.
    Stub(&'static str),
    /// The translation of what is there.
    Block(GuestPlace),
}

/// A piece of code in the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Host addresses.
    pub addresses: Range<u64>,
    /// What it is.
    pub content: Content,
}

/// How blocks came to their end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ends {
    /// Their source was stored to.
    pub stored: u64,
    /// They were hot, and made way for a translation for speed.
    pub heated: u64,
    /// How often the whole cache was emptied.
    pub cleared: u64,
}

impl CodeCache {
    /// Host addresses of all of it.
    pub fn range(&self) -> Range<u64> {
        self.memory.base()..self.memory.base() + self.memory.len() as u64
    }

    /// Where blocks begin.
    pub fn first_block(&self) -> u64 {
        self.memory.base() + u64::from(self.stubs_end)
    }

    /// The stubs that call Rust and come back.
    pub fn helper_stubs(&self) -> Range<u64> {
        self.stubs.access..self.first_block()
    }

    /// The stubs and all blocks that are in it now, living or dead, by address.
    pub fn pieces(&self) -> Vec<Piece> {
        let inner = self.lock();
        let base = self.memory.base();
        let stubs = self.stubs.names().into_iter().map(|(start, name)| (start, Content::Stub(name)));
        let blocks = inner.blocks.iter().map(|b| (base + u64::from(b.start), Content::Block((&b.key).into())));
        let starts: Vec<_> = stubs.chain(blocks).collect();
        let ends = starts.iter().skip(1).map(|(start, _)| *start).chain([base + u64::from(inner.used)]);
        starts.iter().zip(ends).map(|(&(start, content), end)| Piece { addresses: start..end, content }).collect()
    }

    /// How blocks came to their end so far.
    pub fn ends(&self) -> Ends {
        let inner = self.lock();
        Ends { cleared: self.generation(), ..inner.ends }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_counted_outlives_the_blocks() {
        let code = CodeCache::default();
        code.lock().ends = Ends { stored: 2, heated: 3, cleared: 0 };
        code.clear();
        assert_eq!(code.ends(), Ends { stored: 2, heated: 3, cleared: 1 });
    }

    #[test]
    fn stubs_follow_each_other_and_those_for_helpers_come_last() {
        let code = CodeCache::default();
        let pieces = code.pieces();
        assert_eq!(pieces[0].addresses.start, code.range().start);
        assert_eq!(pieces[0].content, Content::Stub("enter"));
        for pair in pieces.windows(2) {
            assert!(!pair[0].addresses.is_empty());
            assert_eq!(pair[0].addresses.end, pair[1].addresses.start);
        }
        assert_eq!(pieces.last().unwrap().addresses.end, code.first_block());
        let is_helper = |piece: &Piece| match piece.content {
            Content::Stub(name) => ["access", "refill", "commit"].contains(&name),
            Content::Block(_) => false,
        };
        for piece in &pieces {
            assert_eq!(is_helper(piece), code.helper_stubs().contains(&piece.addresses.start), "{piece:x?}");
        }
    }
}
