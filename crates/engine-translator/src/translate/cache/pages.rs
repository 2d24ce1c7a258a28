//! What has been translated of each physical page.

use rustc_hash::FxHashMap as HashMap;

use super::{Key, blocks::Blocks};
use crate::translate::jumps::Context;

/// The blocks of one page.
#[derive(Default)]
struct Page {
    /// Living ones that begin on it, by where: their offsets and indices.
    living: Vec<(u16, u32)>,
    /// Dead ones that begin on it and have no successor yet.
    dead: Vec<(u16, u32)>,
    /// Living ones that begin on another page and end on this one.
    ending: Vec<u32>,
    /// See [`super::Found::page_id`]: for each context and linear page number.
    ids: Vec<(Context, u64, u32)>,
}

impl Page {
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
    /// Index of the living block for `key`.
    pub fn find(&self, key: &Key, blocks: &Blocks) -> Option<u32> {
        let living = &self.pages.get(&(key.physical >> 12))?.living;
        let offset = offset_of(key);
        let first = living.partition_point(|(at, _)| *at < offset);
        let same = living[first..].iter().take_while(|(at, _)| *at == offset);
        same.map(|(_, index)| *index).find(|index| blocks.get(*index).key == *key)
    }

    /// What the page of `key` is called where it is at the linear address of `key`, in its context. None is called 0 or
    /// `NEVER`.
    pub fn id(&mut self, key: &Key) -> u32 {
        let ids = &mut self.pages.entry(key.physical >> 12).or_default().ids;
        let linear = key.rip >> 12;
        if let Some((.., id)) = ids.iter().find(|(context, page, _)| *page == linear && *context == key.context) {
            return *id;
        }
        self.ids += 1;
        ids.push((key.context, linear, self.ids));
        self.ids
    }

    /// Takes note of a new block. Returns the dead one that it succeeds.
    pub fn add(&mut self, key: &Key, index: u32, blocks: &Blocks) -> Option<u32> {
        if let Some(second) = second_page(key) {
            self.pages.entry(second).or_default().ending.push(index);
        }
        let page = self.pages.entry(key.physical >> 12).or_default();
        let offset = offset_of(key);
        let place = page.living.partition_point(|(at, _)| *at <= offset);
        page.living.insert(place, (offset, index));
        let dead = page.dead.iter().position(|(at, i)| *at == offset && blocks.get(*i).key == *key)?;
        Some(page.dead.swap_remove(dead).1)
    }

    /// Takes note of a block's death.
    pub fn kill(&mut self, key: &Key, index: u32) {
        if let Some(page) = second_page(key).and_then(|second| self.pages.get_mut(&second)) {
            page.ending.retain(|i| *i != index);
        }
        if let Some(page) = self.pages.get_mut(&(key.physical >> 12)) {
            page.living.retain(|(_, i)| *i != index);
            page.dead.push((offset_of(key), index));
        }
    }

    /// Living blocks with bytes on a page.
    pub fn blocks_on(&self, number: u64) -> impl Iterator<Item = u32> {
        let page = self.pages.get(&number);
        page.into_iter().flat_map(|page| page.living.iter().map(|(_, i)| *i).chain(page.ending.iter().copied()))
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
