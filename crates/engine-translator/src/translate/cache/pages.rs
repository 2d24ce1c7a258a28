//! What has been translated of each physical page.

use std::{collections::hash_map::Entry, io};

use rustc_hash::FxHashMap as HashMap;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::{
    Key,
    blocks::{Block, Blocks},
    image::{Reader, Writer},
    list::Mapped,
};
use crate::translate::jumps::Context;

/// A living block, as whoever looks for it needs it: a look into the list of all blocks would cost as much as all else.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct Living {
    /// Index of the block.
    pub index: u32,
    /// See [`super::Found::page_id`].
    pub page_id: u32,
    /// See [`super::blocks::Block::start`].
    pub start: u32,
    /// See [`super::blocks::Block::saved_entry`].
    pub saved_entry: u32,
    crosses: u32,
}

impl Living {
    /// Whether it lies on two pages.
    pub fn crosses(&self) -> bool {
        self.crosses != 0
    }
}

/// A dead block that has no successor yet.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Dead {
    offset: u32,
    index: u32,
}

/// What a page is called in one context, and at one linear address.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Name {
    context: Context,
    linear_page: u64,
    /// See [`super::Found::page_id`].
    id: u32,
    /// 0.
    _reserved: u32,
}

/// The blocks of one page.
#[derive(Default)]
struct Page {
    /// Where the living ones begin, in ascending order.
    offsets: Vec<u16>,
    /// They, in the same order.
    living: Vec<Living>,
    /// Dead ones that begin on it and have no successor yet.
    dead: Vec<Dead>,
    /// Living ones that begin on another page and end on this one.
    ending: Vec<u32>,
    names: Vec<Name>,
}

/// The same, wherever it is.
#[derive(Clone, Copy)]
struct View<'a> {
    offsets: &'a [u16],
    living: &'a [Living],
    dead: &'a [Dead],
    ending: &'a [u32],
    names: &'a [Name],
}

impl Page {
    fn view(&self) -> View<'_> {
        let Self { offsets, living, dead, ending, names } = self;
        View { offsets, living, dead, ending, names }
    }
}

impl View<'_> {
    fn id(&self, key: &Key) -> Option<u32> {
        let linear_page = key.rip >> 12;
        let same = |name: &&Name| name.linear_page == linear_page && name.context == key.context;
        self.names.iter().find(same).map(|name| name.id)
    }

    fn holds_code(&self) -> bool {
        !self.living.is_empty() || !self.ending.is_empty()
    }

    fn to_page(self) -> Page {
        Page {
            offsets: self.offsets.to_vec(),
            living: self.living.to_vec(),
            dead: self.dead.to_vec(),
            ending: self.ending.to_vec(),
            names: self.names.to_vec(),
        }
    }
}

/// A page in an image: where its parts begin in the lists of all pages' parts. They end where those of the next one begin.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Record {
    number: u64,
    living: u32,
    dead: u32,
    ending: u32,
    names: u32,
}

/// The pages of an image, by number; the last record is that of no page.
struct Imaged {
    records: Mapped<Record>,
    offsets: Mapped<u16>,
    living: Mapped<Living>,
    dead: Mapped<Dead>,
    ending: Mapped<u32>,
    names: Mapped<Name>,
}

impl Imaged {
    fn find(&self, number: u64) -> Option<View<'_>> {
        self.records.get().binary_search_by_key(&number, |record| record.number).ok().and_then(|at| self.view(at))
    }

    fn view(&self, at: usize) -> Option<View<'_>> {
        let records = self.records.get();
        let (from, to) = (records.get(at)?, records.get(at + 1)?);
        let living = from.living as usize..to.living as usize;
        Some(View {
            offsets: self.offsets.get().get(living.clone())?,
            living: self.living.get().get(living)?,
            dead: self.dead.get().get(from.dead as usize..to.dead as usize)?,
            ending: self.ending.get().get(from.ending as usize..to.ending as usize)?,
            names: self.names.get().get(from.names as usize..to.names as usize)?,
        })
    }

    fn iter(&self) -> impl Iterator<Item = (u64, View<'_>)> {
        let records = self.records.get();
        records.iter().enumerate().filter_map(|(at, record)| Some((record.number, self.view(at)?)))
    }
}

/// All pages with code.
#[derive(Default)]
pub struct Pages {
    pages: HashMap<u64, Page>,
    /// Those of the image that this began with, as far as they are not in `pages`: there they are as soon as they change.
    imaged: Option<Imaged>,
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
    fn view(&self, number: u64) -> Option<View<'_>> {
        let imaged = || self.imaged.as_ref()?.find(number);
        self.pages.get(&number).map(Page::view).or_else(imaged)
    }

    /// All of them.
    fn views(&self) -> impl Iterator<Item = (u64, View<'_>)> {
        let imaged = self.imaged.iter().flat_map(Imaged::iter).filter(|(number, _)| !self.pages.contains_key(number));
        self.pages.iter().map(|(number, page)| (*number, page.view())).chain(imaged)
    }

    /// A page that is about to change.
    fn page(&mut self, number: u64) -> &mut Page {
        match self.pages.entry(number) {
            Entry::Occupied(there) => there.into_mut(),
            Entry::Vacant(new) => {
                let imaged = self.imaged.as_ref().and_then(|imaged| imaged.find(number));
                new.insert(imaged.map(View::to_page).unwrap_or_default())
            }
        }
    }

    /// The living block for `key`.
    pub fn find(&self, key: &Key, blocks: &Blocks) -> Option<Living> {
        let page = self.view(key.physical >> 12)?;
        let (id, offset) = (page.id(key)?, offset_of(key));
        let first = page.offsets.partition_point(|at| *at < offset);
        let same = page.offsets[first..].iter().zip(&page.living[first..]).take_while(|(at, _)| **at == offset);
        let whole = |living: &&Living| match living.crosses() {
            true => blocks.get(living.index).key.second == key.second,
            false => key.second == 0,
        };
        same.map(|(_, living)| living).find(|living| living.page_id == id && whole(living)).copied()
    }

    /// What the page of `key` is called where it is at the linear address of `key`, in its context. None is called 0 or
    /// `NEVER`.
    pub fn id(&mut self, key: &Key) -> u32 {
        let number = key.physical >> 12;
        if let Some(id) = self.view(number).and_then(|page| page.id(key)) {
            return id;
        }
        self.ids += 1;
        let name = Name { context: key.context, linear_page: key.rip >> 12, id: self.ids, _reserved: 0 };
        self.page(number).names.push(name);
        name.id
    }

    /// Takes note of a new block. Returns the dead one that it succeeds, too.
    pub fn add(&mut self, key: &Key, index: u32, blocks: &Blocks) -> (Living, Option<u32>) {
        if let Some(second) = second_page(key) {
            self.page(second).ending.push(index);
        }
        let page = self.page(key.physical >> 12);
        let offset = offset_of(key);
        let place = page.offsets.partition_point(|at| *at <= offset);
        page.offsets.insert(place, offset);
        let Block { page_id, start, saved_entry, .. } = *blocks.get(index);
        let living = Living { index, page_id, start, saved_entry, crosses: u32::from(key.second != 0) };
        page.living.insert(place, living);
        let same = |dead: &Dead| dead.offset == u32::from(offset) && blocks.get(dead.index).key == *key;
        let dead = page.dead.iter().position(same);
        (living, dead.map(|dead| page.dead.swap_remove(dead).index))
    }

    /// Takes note of a block's death.
    pub fn kill(&mut self, key: &Key, index: u32) {
        if let Some(second) = second_page(key) {
            self.page(second).ending.retain(|i| *i != index);
        }
        let page = self.page(key.physical >> 12);
        if let Some(place) = page.living.iter().position(|living| living.index == index) {
            page.offsets.remove(place);
            page.living.remove(place);
        }
        page.dead.push(Dead { offset: u32::from(offset_of(key)), index });
    }

    /// Whether a block lives, if there is one.
    pub fn is_living(&self, index: u32, blocks: &Blocks) -> bool {
        let page = blocks.find(index).and_then(|block| self.view(block.key.physical >> 12));
        page.is_some_and(|page| page.living.iter().any(|living| living.index == index))
    }

    /// Living blocks with bytes on a page.
    pub fn blocks_on(&self, number: u64) -> impl Iterator<Item = u32> {
        let page = self.view(number);
        page.into_iter()
            .flat_map(|page| page.living.iter().map(|living| living.index).chain(page.ending.iter().copied()))
    }

    /// Whether there are any.
    pub fn holds_code(&self, number: u64) -> bool {
        self.view(number).is_some_and(|page| page.holds_code())
    }

    /// The numbers of all pages where there are.
    pub fn with_code(&self) -> impl Iterator<Item = u64> {
        self.views().filter(|(_, page)| page.holds_code()).map(|(number, _)| number)
    }

    /// Writes all of them.
    pub fn save(&self, image: &mut Writer) -> io::Result<()> {
        let mut pages: Vec<(u64, View<'_>)> = self.views().collect();
        pages.sort_unstable_by_key(|(number, _)| *number);
        let mut at = Record { number: u64::MAX, living: 0, dead: 0, ending: 0, names: 0 };
        let mut records = Vec::with_capacity(pages.len() + 1);
        for (number, page) in &pages {
            records.push(Record { number: *number, ..at });
            at.living += page.living.len() as u32;
            at.dead += page.dead.len() as u32;
            at.ending += page.ending.len() as u32;
            at.names += page.names.len() as u32;
        }
        records.push(at);
        let views = || pages.iter().map(|(_, page)| page);
        image.section([&records[..]])?;
        image.section(views().map(|page| page.offsets))?;
        image.section(views().map(|page| page.living))?;
        image.section(views().map(|page| page.dead))?;
        image.section(views().map(|page| page.ending))?;
        image.section(views().map(|page| page.names))?;
        image.section([&[self.ids][..]])
    }

    /// Those that [`Self::save`] wrote.
    pub fn restore(image: &mut Reader) -> io::Result<Self> {
        let imaged = Imaged {
            records: image.section()?,
            offsets: image.section()?,
            living: image.section()?,
            dead: image.section()?,
            ending: image.section()?,
            names: image.section()?,
        };
        let ids: Mapped<u32> = image.section()?;
        let ids = ids.get().first().copied().unwrap_or_default();
        Ok(Self { pages: HashMap::default(), imaged: Some(imaged), ids })
    }
}
