//! What has been translated of each physical page.

use rustc_hash::FxHashMap as HashMap;

use super::{
    Key,
    blocks::{Block, Blocks},
};
use crate::translate::jumps::Context;

/// A living block, as whoever looks for it needs it: a look into the list of all blocks would cost as much as all else.
#[derive(Clone, Copy)]
pub struct Living {
    /// Index of the block.
    pub index: u32,
    /// See [`super::Found::page_id`].
    pub page_id: u32,
    /// See [`super::blocks::Block::start`].
    pub start: u32,
    /// See [`super::blocks::Block::saved_entry`].
    pub saved_entry: u32,
    /// It lies on two pages.
    pub crosses: bool,
}

/// The blocks of one page.
#[derive(Default)]
struct Page {
    /// Where the living ones begin, in ascending order.
    offsets: Vec<u16>,
    /// They, in the same order.
    living: Vec<Living>,
    /// Dead ones that begin on it and have no successor yet: their offsets and indices.
    dead: Vec<(u16, u32)>,
    /// Living ones that begin on another page and end on this one.
    ending: Vec<u32>,
    /// See [`super::Found::page_id`]: for each context and linear page number.
    ids: Vec<(Context, u64, u32)>,
}

impl Page {
    fn id(&self, key: &Key) -> Option<u32> {
        let linear = key.rip >> 12;
        let same = |(context, page, _): &&(Context, u64, u32)| *page == linear && *context == key.context;
        self.ids.iter().find(same).map(|(.., id)| *id)
    }

    fn holds_code(&self) -> bool {
        !self.living.is_empty() || !self.ending.is_empty()
    }
}

/// All pages with code.
#[derive(Default)]
pub struct Pages {
    pages: HashMap<u64, Page>,
    ids: u32,
}

fn offset_of(key: &Key) -> u16 {
    (key.physical & 0xfff) as u16
}

/// Number of the second page of a block that has one beside its first.
fn second_page(key: &Key) -> Option<u64> {
    key.second.checked_sub(1).map(|second| second >> 12).filter(|second| *second != key.physical >> 12)
}

impl Pages {
    /// The living block for `key`.
    pub fn find(&self, key: &Key, blocks: &Blocks) -> Option<Living> {
        let page = self.pages.get(&(key.physical >> 12))?;
        let (id, offset) = (page.id(key)?, offset_of(key));
        let first = page.offsets.partition_point(|at| *at < offset);
        let same = page.offsets[first..].iter().zip(&page.living[first..]).take_while(|(at, _)| **at == offset);
        let whole = |living: &&Living| match living.crosses {
            true => blocks.get(living.index).key.second == key.second,
            false => key.second == 0,
        };
        same.map(|(_, living)| living).find(|living| living.page_id == id && whole(living)).copied()
    }

    /// What the page of `key` is called where it is at the linear address of `key`, in its context. None is called 0 or
    /// `NEVER`.
    pub fn id(&mut self, key: &Key) -> u32 {
        let page = self.pages.entry(key.physical >> 12).or_default();
        page.id(key).unwrap_or_else(|| {
            self.ids += 1;
            page.ids.push((key.context, key.rip >> 12, self.ids));
            self.ids
        })
    }

    /// Takes note of a new block. Returns the dead one that it succeeds, too.
    pub fn add(&mut self, key: &Key, index: u32, blocks: &Blocks) -> (Living, Option<u32>) {
        if let Some(second) = second_page(key) {
            self.pages.entry(second).or_default().ending.push(index);
        }
        let page = self.pages.entry(key.physical >> 12).or_default();
        let offset = offset_of(key);
        let place = page.offsets.partition_point(|at| *at <= offset);
        page.offsets.insert(place, offset);
        let Block { page_id, start, saved_entry, .. } = *blocks.get(index);
        let living = Living { index, page_id, start, saved_entry, crosses: key.second != 0 };
        page.living.insert(place, living);
        let dead = page.dead.iter().position(|(at, i)| *at == offset && blocks.get(*i).key == *key);
        (living, dead.map(|dead| page.dead.swap_remove(dead).1))
    }

    /// Takes note of a block's death.
    pub fn kill(&mut self, key: &Key, index: u32) {
        if let Some(page) = second_page(key).and_then(|second| self.pages.get_mut(&second)) {
            page.ending.retain(|i| *i != index);
        }
        if let Some(page) = self.pages.get_mut(&(key.physical >> 12)) {
            if let Some(place) = page.living.iter().position(|living| living.index == index) {
                page.offsets.remove(place);
                page.living.remove(place);
            }
            page.dead.push((offset_of(key), index));
        }
    }

    /// Living blocks with bytes on a page.
    pub fn blocks_on(&self, number: u64) -> impl Iterator<Item = u32> {
        let page = self.pages.get(&number);
        page.into_iter()
            .flat_map(|page| page.living.iter().map(|living| living.index).chain(page.ending.iter().copied()))
    }

    /// Whether there are any.
    pub fn holds_code(&self, number: u64) -> bool {
        self.pages.get(&number).is_some_and(Page::holds_code)
    }

    /// The numbers of all pages where there are.
    pub fn with_code(&self) -> impl Iterator<Item = u64> {
        self.pages.iter().filter(|(_, page)| page.holds_code()).map(|(number, _)| *number)
    }
}
