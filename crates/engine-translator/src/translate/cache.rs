//! The translations of one VM: where they are, what they were made from, when they stop being valid.
//!
//! A block is never moved and its memory never used again until the whole cache is emptied, which happens only while
//! no vCPU is inside emitted code. A block whose source was written to is *dead*: its entries are redirected to the run
//! loop, and, once the same place has been translated anew, to the new block.
//!
//! Most code is executed a few times: its blocks are short. What samples find executing is *hot*, and translated anew,
//! at length (see `trace.rs`).
//!
//! Lock order: `Shared::world`, `CodeCache::image`, `CodeCache::inner`. Nothing is waited for with `inner` held, but an image is
//! written.

mod blocks;
mod hot;
mod image;
mod list;
mod listing;
mod pages;

use std::{
    fs::File,
    io,
    ops::Range,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use purlin_engine::CodeChanges;
use rustc_hash::FxHashSet as HashSet;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::{
    asm::Asm,
    branch::Across,
    emit::{ENTRY_BY_RIP, Emitted, FaultPoint},
    jumps::Context,
    memory::{Backing, CodeMemory, PAGE},
    place::is_movable,
    spare,
    stubs::{self, Stubs},
};

use self::{
    blocks::{Blocks, MAX_CACHE},
    hot::Hot,
    image::{Reader, Writer},
    pages::{Living, Pages},
};
pub use self::{
    image::prepare,
    listing::{Content, Ends, GuestPlace, Piece},
};

/// What a block was translated from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct Key {
    /// Guest physical address of its first byte.
    pub physical: u64,
    /// Offset in CS of its first byte, as translations call it (see [`super::place`]).
    pub rip: u64,
    /// Physical address of the second page, plus one, for an instruction that lies on two; else 0.
    pub second: u64,
    /// Mode, and CS where it matters.
    pub context: Context,
}

/// A block as the run loop uses it.
#[derive(Clone, Copy, Debug)]
pub struct Found {
    /// Host address of the entry with the flags in `flag_word`.
    pub saved_entry: u64,
    /// Host address of the entry with the flags in the host's; the same if they do not matter.
    pub entry: u64,
    /// Host address of the entry with the flags in `flag_word` and RIP in R11; of those from other pages the only one.
    pub by_rip: u64,
    /// Its physical page.
    pub page: u64,
    /// Whether links may lead to it: it lies on one page. (Jump tables know of both.)
    pub linkable: bool,
    /// What that page is called where it is at the block's linear address, in the block's context (see `jumps.rs`).
    pub page_id: u32,
}

/// A block as jumps from other pages use it.
#[derive(Clone, Copy, Debug)]
pub struct JumpTarget {
    /// See [`Found::by_rip`].
    pub by_rip: u64,
    /// See [`Found::page_id`]; `None` if it lies on two pages.
    pub page_id: Option<u32>,
}

impl Found {
    /// The block as jumps from other pages use it.
    pub fn target(&self) -> JumpTarget {
        JumpTarget { by_rip: self.by_rip, page_id: self.linkable.then_some(self.page_id) }
    }
}

/// What emitted code was translated from.
#[derive(Clone, Copy, Debug)]
pub struct Origin {
    /// RIP of its block, as translations call it.
    pub rip: u64,
    /// Physical page of its block.
    pub page: u64,
    /// How often the cache had been emptied.
    pub generation: u64,
}

/// The translations of one VM.
pub struct CodeCache {
    memory: CodeMemory,
    /// Bytes of code, beside what it began with.
    capacity: usize,
    /// The fixed pieces.
    pub stubs: Stubs,
    stubs_end: u32,
    inner: Mutex<Inner>,
    /// Everything counts as hot.
    all_hot: AtomicBool,
    /// How often the cache was emptied; changed with `inner` held.
    generation: AtomicU64,
    /// The image that copies of the machine were given last.
    image: Mutex<Option<Image>>,
}

#[derive(Default)]
struct Inner {
    used: u32,
    /// Where blocks begin that do not come from an image, and where they end: offsets.
    room: Range<u32>,
    /// Blocks that have died, in order.
    killed: Vec<u32>,
    blocks: Blocks,
    pages: Pages,
    /// Keys without a second page for which there is no block, because not even one instruction is whole without that.
    crossing: HashSet<Key>,
    /// Stores to watched pages so far, by page number modulo the length: what has to stand still while a block is made.
    stores: Vec<u64>,
    /// What was found executing.
    hot: Hot,
    /// How blocks came to their end otherwise.
    ends: Ends,
}

impl Inner {
    fn find(&self, key: &Key) -> Option<Living> {
        self.pages.find(key, &self.blocks)
    }
}

/// Why a block was not added.
#[derive(Clone, Copy, Debug)]
pub enum NotAdded {
    /// The cache is full: [`CodeCache::clear`] it, then try again.
    Full,
    /// Its source was stored to meanwhile, perhaps: read it again.
    Stale,
}

/// Counters of stores to watched pages.
const STORE_COUNTERS: usize = 256;

/// The address space of a cache, in caches: behind an image there is room for as much as without.
const IMAGED: usize = 3;

/// Length of a call.
const CALL: u32 = 5;

/// Room that a block may need at most.
const BLOCK_ROOM: u32 = 256 << 10;

impl CodeCache {
    /// A cache of `capacity` bytes, beside what it may begin with ([`Self::restore`]), with this backing.
    pub fn new(capacity: usize, backing: Backing) -> io::Result<Self> {
        let capacity = capacity.min(MAX_CACHE / IMAGED);
        let memory = CodeMemory::new(IMAGED * capacity, backing)?;
        let mut asm = Asm::new(memory.base());
        let stubs = stubs::assemble(&mut asm);
        asm.finish();
        let bytes = asm.all();
        memory.write(0, bytes);
        let stubs_end = (bytes.len() as u32).next_multiple_of(64);
        super::signals::register(memory.base(), memory.len() as u64, stubs.signal);
        let room = stubs_end..capacity as u32;
        let inner = Inner { used: stubs_end, room, stores: vec![0; STORE_COUNTERS], ..Inner::default() };
        Ok(Self {
            memory,
            capacity,
            stubs,
            stubs_end,
            inner: Mutex::new(inner),
            all_hot: AtomicBool::new(false),
            generation: AtomicU64::new(0),
            image: Mutex::new(None),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The block for `key`.
    pub fn find(&self, key: &Key) -> Option<Found> {
        self.lock().find(key).map(|living| self.found(key, &living))
    }

    fn found(&self, key: &Key, living: &Living) -> Found {
        let by_rip = living.saved_entry - if is_movable(key.rip) { ENTRY_BY_RIP } else { 0 };
        Found {
            by_rip: self.memory.base() + u64::from(by_rip),
            saved_entry: self.memory.base() + u64::from(living.saved_entry),
            entry: self.memory.base() + u64::from(living.start),
            page: key.physical >> 12,
            linkable: !living.crosses(),
            page_id: living.page_id,
        }
    }

    /// Whether the last block made for `key` had to have a second page.
    pub fn crosses(&self, key: &Key) -> bool {
        self.lock().crossing.contains(key)
    }

    /// How many stores to the page of `physical` there were while it was watched: to be asked before it is watched, and its
    /// bytes are read. If there are no more later, it has been watched all the time, for that ends with a store.
    pub fn stores(&self, physical: u64) -> u64 {
        self.lock().stores[counter(physical >> 12)]
    }

    /// Adds the block that `emit` makes for the address it is given, unless another vCPU was faster; the function that it
    /// is given, too, knows the blocks of the plain context for RIPs on the same page. `span` are the bytes of its first page
    /// that it depends on (see [`super::trace::Trace::span`]); `stores` what [`CodeCache::stores`] said of each page of it,
    /// `watched` whether all of them still are.
    pub fn add(
        &self,
        key: Key,
        span: (u32, u32),
        stores: &[(u64, u64)],
        watched: impl FnOnce() -> bool,
        emit: impl FnOnce(u64, &dyn Fn(u64) -> Option<Found>) -> Emitted,
    ) -> Result<Found, NotAdded> {
        let mut inner = self.lock();
        let unchanged = stores.iter().all(|&(physical, n)| inner.stores[counter(physical >> 12)] == n);
        if !unchanged || !watched() {
            return Err(NotAdded::Stale);
        }
        if let Some(living) = inner.find(&key) {
            return Ok(self.found(&key, &living));
        }
        if inner.used + BLOCK_ROOM > inner.room.end {
            return Err(NotAdded::Full);
        }
        let start = inner.used;
        let known = |rip: u64| {
            let linear = key.context.cs_base.wrapping_add(rip);
            let physical = key.physical & !0xfff | linear & 0xfff;
            let key = Key { physical, rip, second: 0, context: key.context.grouped() };
            inner.find(&key).map(|living| self.found(&key, &living))
        };
        let emitted = emit(self.memory.base() + u64::from(start), &known);
        let bytes = emitted.asm.all();
        assert!(bytes.len() as u32 <= BLOCK_ROOM, "a block is too large");
        self.memory.write(start, bytes);
        let used = (start + bytes.len() as u32).next_multiple_of(8);
        let found = self.push(&mut inner, key, start..used, span, &emitted);
        spare::return_asm(emitted.asm);
        Ok(found)
    }

    fn push(&self, inner: &mut Inner, key: Key, place: Range<u32>, span: (u32, u32), emitted: &Emitted) -> Found {
        inner.used = place.end;
        let page_id = inner.pages.id(&key);
        let index = inner.blocks.push(key, place.start, place.end, page_id, span, emitted);
        let (living, predecessor) = inner.pages.add(&key, index, &inner.blocks);
        if let Some(old) = predecessor.map(|old| inner.blocks.get(old)) {
            self.memory.redirect(old.start, living.start);
            self.memory.redirect(old.saved_entry, living.saved_entry);
        }
        let found = self.found(&key, &living);
        if key.second != 0 {
            inner.crossing.insert(Key { second: 0, ..key });
        } else if !inner.crossing.is_empty() {
            inner.crossing.remove(&key);
        }
        found
    }

    /// `len` bytes at guest physical `address`, on one page, were stored to: blocks made from them die.
    /// `unwatch` is called if the page holds no more code.
    pub fn written(&self, address: u64, len: u64, unwatch: impl FnOnce()) {
        let mut inner = self.lock();
        let page = address >> 12;
        inner.stores[counter(page)] += 1;
        let blocks = inner.pages.blocks_on(page);
        let hit: Vec<u32> = blocks
            .filter(|&i| {
                let b = inner.blocks.get(i);
                let overlaps = |from: u64, n: u64| address < from + n && from < address + len;
                // What lies on a second page is at most the rest of one instruction, at its start. Both may be the same.
                let [from, to] = b.span;
                b.key.physical >> 12 == page && overlaps((page << 12) + u64::from(from), u64::from(to - from))
                    || b.key.second != 0 && (b.key.second - 1) >> 12 == page && overlaps(page << 12, 15)
            })
            .collect();
        inner.ends.stored += hit.len() as u64;
        for i in hit {
            self.kill(&mut inner, i);
        }
        if !inner.pages.holds_code(page) {
            unwatch();
        }
    }

    fn kill(&self, inner: &mut Inner, index: u32) {
        let block = inner.blocks.get(index);
        let key = block.key;
        self.memory.redirect_call(block.start, self.offset(self.stubs.dead));
        self.memory.redirect_call(block.saved_entry, self.offset(self.stubs.dead_saved));
        let sites = if is_movable(key.rip) { &self.stubs.dead_sites } else { &self.stubs.by_table };
        for &site in inner.blocks.return_sites(index) {
            self.memory.redirect(site, self.offset(sites[key.context.mode.table()]));
        }
        if key.second != 0 {
            inner.crossing.remove(&Key { second: 0, ..key });
        }
        inner.pages.kill(&key, index);
        inner.killed.push(index);
    }

    /// A sample found emitted code executing at `address`: its block is hot. Returns what that was translated from.
    pub fn sampled(&self, address: u64) -> Option<GuestPlace> {
        let mut inner = self.lock();
        let offset = address.checked_sub(self.memory.base()).and_then(|o| u32::try_from(o).ok());
        let offset = offset.filter(|&o| o >= self.stubs_end && o < inner.used)?;
        let key = inner.blocks.at(offset)?.key;
        self.heat(&mut inner, key);
        Some((&key).into())
    }

    /// What is at `key` is hot.
    pub fn make_hot(&self, key: Key) {
        self.heat(&mut self.lock(), key);
    }

    /// The block for `key` gives way to one that is made for speed.
    fn heat(&self, inner: &mut Inner, key: Key) {
        if !key.context.mode.grouped() || key.second != 0 || self.all_hot.load(Ordering::Relaxed) {
            return;
        }
        if inner.hot.insert(key)
            && let Some(living) = inner.find(&key)
        {
            inner.ends.heated += 1;
            self.kill(inner, living.index);
        }
    }

    /// Whether what is at `key` is to be translated for speed.
    pub fn is_hot(&self, key: &Key) -> bool {
        self.all_hot.load(Ordering::Relaxed) || self.lock().hot.contains(key)
    }

    /// From here on everything counts as hot, or only what is.
    pub fn set_all_hot(&self, all: bool) {
        self.all_hot.store(all, Ordering::Relaxed);
    }

    fn offset(&self, address: u64) -> u32 {
        (address - self.memory.base()) as u32
    }

    /// What the code before host address `address` belongs to: RIP and physical page of its block, living or dead, and
    /// the generation of the cache.
    pub fn origin(&self, address: u64) -> Origin {
        let inner = self.lock();
        let block = inner.blocks.at(self.offset(address) - 1);
        let (rip, page) = block.map_or((0, u64::MAX), |b| (b.key.rip, b.key.physical >> 12));
        Origin { rip, page, generation: self.generation() }
    }

    /// How often the cache was emptied.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::SeqCst)
    }

    /// Makes the direct jump at host address `from`, in code from `origin`, lead to host address `entry` of `to`, unless
    /// the cache has been emptied since.
    ///
    /// Both must lie on the same physical page: the page's mapping may have changed since the jump's own block was
    /// entered, and other address spaces that have the old page there would follow the link. The same then goes for the
    /// conditional jump to `from` that ends at `conditional`.
    pub fn link(&self, from: u64, conditional: Option<u64>, origin: &Origin, entry: u64, to: &Found) {
        let _inner = self.lock();
        if self.generation() == origin.generation && origin.page == to.page {
            let (from, entry) = (self.offset(from), self.offset(entry));
            self.memory.redirect(from, entry);
            if let Some(behind) = conditional {
                self.memory.retarget(self.offset(behind), from, entry);
            }
        }
    }

    /// The same for a jump to another page, in movable code or not, whose check is at host address `check`, and whose descriptor is at `desc`.
    ///
    /// It is done once and for all: who has seen that the page is the right one may be about to follow the jump.
    pub fn link_across(&self, desc: u64, check: u64, movable: bool, generation: u64, to: &Found) {
        let _inner = self.lock();
        if self.generation() != generation {
            return;
        }
        let (check, desc) = (self.offset(check), self.offset(desc));
        let layout = if movable { Across::MOVABLE } else { Across::FIXED };
        // (At the lower end of movable code there may be a jump that leads out of it.)
        let alike = movable == (to.by_rip != to.saved_entry);
        if to.linkable && alike && self.memory.read(check + layout.id) == Across::NEVER {
            self.memory.redirect(check + layout.jump, self.offset(to.saved_entry));
            self.memory.store(check + layout.id, to.page_id);
        }
        // Where that does not hold, the jump table says.
        self.memory.redirect(desc - CALL, desc + Across::TABLE);
    }

    /// Whether `address` is one of the fixed pieces'.
    pub fn is_stub(&self, address: u64) -> bool {
        (self.memory.base()..self.memory.base() + u64::from(self.stubs_end)).contains(&address)
    }

    /// The fault point of the host instruction at `address`.
    pub fn fault_at(&self, address: u64) -> Option<FaultPoint> {
        let offset = address.checked_sub(self.memory.base()).and_then(|o| u32::try_from(o).ok())?;
        self.lock().blocks.fault_at(offset)
    }

    /// Forgets all translations. No vCPU is inside emitted code, and all will empty their jump tables before they
    /// enter it. Returns the physical pages that held code.
    pub fn clear(&self) -> Vec<u64> {
        // (In this order: `save` has both, too.)
        let mut image = self.image.lock().unwrap_or_else(PoisonError::into_inner);
        let mut inner = self.lock();
        *image = None;
        let pages = inner.pages.with_code().map(|page| page << 12).collect();
        self.memory.clear(self.stubs_end as usize);
        *inner = Inner {
            used: inner.room.start,
            room: inner.room.clone(),
            // Pages are not watched any more: what was read of them may change unnoticed.
            stores: inner.stores.iter().map(|n| n + 1).collect(),
            hot: std::mem::take(&mut inner.hot),
            ends: inner.ends,
            ..Inner::default()
        };
        self.generation.fetch_add(1, Ordering::SeqCst);
        pages
    }
}

/// A moment in the life of the cache.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    generation: u64,
    /// Blocks so far, and those of them that had died.
    blocks: usize,
    killed: usize,
}

/// All translations, as they were at a moment.
#[derive(Clone)]
struct Image {
    file: Arc<File>,
    moment: Moment,
}

/// Of the blocks that there are an image may lack this part, where it is needed at once: to make anew what it needs of them takes
/// a copy less time than to wait for another image.
const MAY_LACK: usize = 4;
/// An image that lacks more blocks than this is followed by another one when there is time.
const FEW: usize = 1000;
/// An image is no longer than this many caches, or a copy of a copy of a copy would have all that any of them ever needed.
const LONGEST: usize = 2;

/// Copies of a machine begin with its translations.
impl CodeCache {
    /// Now; for a copy, while no vCPU runs.
    pub fn moment(&self) -> Moment {
        self.moment_of(&self.lock())
    }

    fn moment_of(&self, inner: &Inner) -> Moment {
        Moment { generation: self.generation(), blocks: inner.blocks.len(), killed: inner.killed.len() }
    }

    /// An image of the translations, and what is to be taken away of it to have those that were valid at a moment. The
    /// machine may have gone on; copies share the image with those of other moments, so the image may lack what was new.
    /// `None` if nothing of it is there any more.
    pub fn save(&self, at: Moment) -> io::Result<Option<(Arc<File>, CodeChanges)>> {
        let mut last = self.image.lock().unwrap_or_else(PoisonError::into_inner);
        let mut inner = self.lock();
        if self.generation() != at.generation || !self.can_be_imaged(&inner) {
            return Ok(None);
        }
        let is_good = |image: &&Image| at.blocks.saturating_sub(image.moment.blocks) <= at.blocks / MAY_LACK;
        let image = match last.as_ref().filter(is_good) {
            Some(image) => image.clone(),
            None => Image { file: Arc::new(self.write(&mut inner)?), moment: self.moment_of(&inner) },
        };
        let died = inner.killed.get(image.moment.killed..at.killed).unwrap_or_default();
        let changes = CodeChanges { blocks: at.blocks as u32, died: died.to_vec() };
        let file = last.insert(image).file.clone();
        Ok(Some((file, changes)))
    }

    /// Makes another image, if [`Self::save`] has made one that lacks more than a few of the blocks that there are now.
    pub fn refresh(&self) -> io::Result<()> {
        let mut last = self.image.lock().unwrap_or_else(PoisonError::into_inner);
        let mut inner = self.lock();
        let lacks_much = |image: &Image| image.moment.blocks + FEW < inner.blocks.len();
        if last.as_ref().is_some_and(lacks_much) && self.can_be_imaged(&inner) {
            *last = Some(Image { file: Arc::new(self.write(&mut inner)?), moment: self.moment_of(&inner) });
        }
        Ok(())
    }

    fn can_be_imaged(&self, inner: &Inner) -> bool {
        inner.used as usize <= LONGEST * self.capacity
    }

    /// The first image is where the code is, without a copy; others are copies.
    fn write(&self, inner: &mut Inner) -> io::Result<File> {
        let end = inner.used.next_multiple_of(PAGE as u32);
        let mut image = match self.memory.give_away(end as usize)? {
            Some(file) => {
                let used = inner.used;
                (inner.used, inner.room) = (end, end..end + self.capacity as u32);
                Writer::with_code(file, used.into())?
            }
            None => Writer::with_copy(self.memory.bytes(inner.used as usize))?,
        };
        inner.blocks.save(&mut image)?;
        inner.pages.save(&mut image)?;
        inner.hot.save(&mut image)?;
        let crossing: Vec<Key> = inner.crossing.iter().copied().collect();
        image.section([&crossing[..]])?;
        image.finish()
    }

    /// Begins with what [`Self::save`] returned, before a vCPU runs: memory is what it was at that moment. Returns the
    /// physical pages that hold code and are to be watched; `None` if another program has written it, or the cache is not empty any
    /// more.
    pub fn restore(&self, file: &File, changes: &CodeChanges) -> io::Result<Option<Vec<u64>>> {
        let mut inner = self.lock();
        let Some(mut image) = Reader::new(file)? else { return Ok(None) };
        let (code, stubs) = (image.code()?, self.stubs_end as usize);
        let end = code.len().next_multiple_of(PAGE);
        let fits = end <= LONGEST * self.capacity && code.get(..stubs) == Some(self.memory.bytes(stubs));
        if !fits || inner.used != self.stubs_end {
            return Ok(None);
        }
        let blocks = Blocks::restore(&mut image)?;
        let pages = Pages::restore(&mut image)?;
        let hot = Hot::restore(&mut image)?;
        let crossing = image.section::<Key>()?.get().iter().copied().collect();
        if let Err(error) = self.memory.begin_with(file, end) {
            self.memory.clear(stubs);
            return Err(error);
        }
        *inner = Inner {
            used: end as u32,
            room: end as u32..(end + self.capacity) as u32,
            blocks,
            pages,
            crossing,
            hot,
            stores: std::mem::take(&mut inner.stores),
            killed: Vec::new(),
            ends: inner.ends,
        };
        let later = changes.blocks..inner.blocks.len() as u32;
        for index in changes.died.iter().copied().chain(later) {
            if inner.pages.is_living(index, &inner.blocks) {
                self.kill(&mut inner, index);
            }
        }
        Ok(Some(inner.pages.with_code().map(|page| page << 12).collect()))
    }
}

fn counter(page: u64) -> usize {
    page as usize % STORE_COUNTERS
}

impl Default for CodeCache {
    fn default() -> Self {
        Self::new(4 << 20, Backing::File).expect("memory for emitted code")
    }
}

impl Drop for CodeCache {
    fn drop(&mut self) {
        super::signals::unregister(self.memory.base());
    }
}
