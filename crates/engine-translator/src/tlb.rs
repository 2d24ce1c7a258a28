//! The software TLB: linear page → host address, with the permissions of one privilege baked in.
//!
//! Emitted code looks an access up with one unsigned compare: `address - entry.tag < 4096 - (size - 1)`. An invalid
//! tag is therefore one that no address mapping to the entry can come near (see [`invalid_tag`]), canonical or not.

use std::{
    hash::{BuildHasher, RandomState},
    sync::LazyLock,
};

use crate::{
    cpu::Cpu,
    exception::Exception,
    mem::{Access, Target},
};

/// log2 of the number of entries of one set.
pub const SET_BITS: u32 = 12;
/// Entries in one set.
pub const SET_ENTRIES: usize = 1 << SET_BITS;

/// On whose behalf memory is accessed; each has a set of its own in the TLB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Privilege {
    /// CPL 3.
    User = 0,
    /// CPL 0 to 2, user pages out of reach if CR4.SMAP is set; also every implicit access (descriptor tables, TSS).
    Supervisor = 1,
    /// CPL 0 to 2 with RFLAGS.AC set or without SMAP: user pages within reach.
    SupervisorAc = 2,
}

/// Number of sets.
pub const SETS: usize = 3;

/// One entry, for loads or for stores.
#[repr(C, align(16))]
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// Linear address of the page, or invalid. For stores it is that also where they have to be noticed (the page holds
    /// translated code).
    pub tag: u64,
    /// Host address of the page's first byte.
    pub host: u64,
}

/// log2 of the size of an entry.
pub const ENTRY_BITS: u32 = 4;
const _: () = assert!(size_of::<Entry>() == 1 << ENTRY_BITS);

/// The entries of one privilege. Those for loads lie together: most accesses are loads, and fewer cache lines serve them.
#[repr(C)]
pub struct Set {
    /// For loads.
    pub read: [Entry; SET_ENTRIES],
    /// For stores.
    pub write: [Entry; SET_ENTRIES],
}

/// Entries of the second level's sets.
pub const SECOND_ENTRIES: usize = 256;
/// Pages that share an entry of the first level differ from this bit on.
pub const SECOND_SHIFT: u32 = 12 + SET_BITS;

/// What others have taken the place of in a [`Set`]: a page that is used by turns with one of the same index would have to be
/// walked to each time.
#[repr(C)]
pub struct SecondSet {
    /// For loads.
    pub read: [Entry; SECOND_ENTRIES],
    /// For stores.
    pub write: [Entry; SECOND_ENTRIES],
}

/// A copy of one entry for stores: of the page that the stack pointer was on last. Most accesses to a stack are to it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct StackPage {
    /// Linear address of the page, or [`NO_STACK`].
    pub tag: u64,
    /// From there to its host address.
    pub distance: u64,
}

/// A page that no guest finds its stack on: not canonical, and nobody knows which.
static NO_STACK: LazyLock<u64> = LazyLock::new(|| {
    let random = RandomState::new().hash_one(0);
    random & !(3 << 62) & !0xfff | 1 << 62
});

impl StackPage {
    fn none() -> Self {
        Self { tag: *NO_STACK, distance: NO_STACK.wrapping_neg() }
    }
}

/// One entry of the fetch side: where instructions are decoded from.
#[derive(Clone, Copy, Debug)]
pub struct Fetch {
    tag: u64,
    host: u64,
    global: bool,
}

/// An entry of the fetch side that no address matches.
const NO_FETCH: Fetch = Fetch { tag: u64::MAX, host: 0, global: false };

/// Entries of the fetch side: for user and supervisor code each.
const FETCH_ENTRIES: usize = 256;

/// A tag that no address mapping to entry `index` matches: a page whose index differs.
pub const fn invalid_tag(index: usize) -> u64 {
    ((index as u64) ^ 1) << 12
}

/// The TLB of one vCPU.
#[repr(C, align(64))]
pub struct Tlb {
    /// The page of the stack, by [`Privilege`].
    pub stack: [StackPage; SETS],
    /// The sets, by [`Privilege`].
    pub sets: [Set; SETS],
    /// Those of the second level.
    pub second: [SecondSet; SETS],
    /// Entries of the second level in use, since it was last emptied: set and index.
    second_used: Vec<(u8, u16)>,
    fetch: [[Fetch; FETCH_ENTRIES]; 2],
    /// Entries filled since the last flush, so that a flush touches only those: set and index.
    used: Vec<(u8, u16)>,
    /// Of those, the ones of global pages: they survive a flush of the others.
    global: Vec<(u8, u16)>,
    /// Regions of 1 GiB, by their number modulo the number of bits, in which a part of a large page was entered since
    /// the last full flush: INVLPG must forget all of that page, so everything.
    large: [u64; 64],
}

/// What a page walk found: one 4 KiB page (a part of a large one, maybe).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Walked {
    /// Guest physical address of the 4 KiB page.
    pub physical: u64,
    /// Whether loads are allowed for the privilege asked.
    pub readable: bool,
    /// Whether stores are allowed without a further walk (permitted, and the dirty flag set).
    pub writable: bool,
    /// Whether instruction fetches are allowed.
    pub executable: bool,
    /// A global page (CR4.PGE, all of G).
    pub global: bool,
    /// A part of a page larger than 4 KiB.
    pub large: bool,
}

/// Where in [`Tlb::large`] the 1 GiB of a linear address is.
fn region(linear: u64) -> (usize, u64) {
    let number = linear >> 30;
    (number as usize / 64 % 64, 1 << (number % 64))
}

impl Tlb {
    /// Makes the zeroed memory at `tlb` an empty TLB.
    ///
    /// # Safety
    /// `tlb` is valid for writes, zeroed, and nobody else's.
    #[allow(unsafe_code)]
    pub unsafe fn init(tlb: *mut Self) {
        // SAFETY: zeroes are valid for every field but the lists, which are written without being dropped.
        let tlb = unsafe {
            // With room for all that `fill` puts there: it must not allocate (see `quick_access`).
            (&raw mut (*tlb).used).write(Vec::with_capacity(4 * SET_ENTRIES + 1));
            (&raw mut (*tlb).global).write(Vec::with_capacity(4 * SET_ENTRIES + 1));
            (&raw mut (*tlb).second_used).write(Vec::with_capacity(SECOND_USED));
            &mut *tlb
        };
        for set in &mut tlb.sets {
            for index in 0..SET_ENTRIES {
                set.invalidate(index);
            }
        }
        for set in &mut tlb.second {
            (0..SECOND_ENTRIES).for_each(|index| set.invalidate(index));
        }
        tlb.forget_stack(|_| true);
        tlb.forget_fetches();
    }
}

/// How many uses of the second level's entries are counted before it is emptied.
const SECOND_USED: usize = 4 * SECOND_ENTRIES;

/// A vCPU's handle on its TLB, which lies in its [`crate::cpu::Block`], where emitted code can reach it.
pub struct TlbHandle(std::ptr::NonNull<Tlb>);

#[allow(unsafe_code)]
impl TlbHandle {
    /// A TLB of its own, never freed: for processors without a block (tests of single instructions).
    pub fn standalone() -> Self {
        // SAFETY: `Tlb` is not zero-sized; the allocation is zeroed and ours.
        unsafe {
            let tlb = std::alloc::alloc_zeroed(std::alloc::Layout::new::<Tlb>()).cast::<Tlb>();
            let handle = Self(std::ptr::NonNull::new(tlb).expect("out of memory"));
            Tlb::init(tlb);
            handle
        }
    }

    /// The TLB of a block.
    ///
    /// # Safety
    /// `tlb` was initialised by [`Tlb::init`], outlives the handle, and is used by nobody else.
    pub unsafe fn at(tlb: std::ptr::NonNull<Tlb>) -> Self {
        Self(tlb)
    }
}

impl std::ops::Deref for TlbHandle {
    type Target = Tlb;
    #[allow(unsafe_code)]
    fn deref(&self) -> &Tlb {
        // SAFETY: see `TlbHandle::at`.
        unsafe { self.0.as_ref() }
    }
}

impl std::ops::DerefMut for TlbHandle {
    #[allow(unsafe_code)]
    fn deref_mut(&mut self) -> &mut Tlb {
        // SAFETY: see `TlbHandle::at`.
        unsafe { self.0.as_mut() }
    }
}

impl Set {
    fn invalidate(&mut self, index: usize) {
        self.read[index].tag = invalid_tag(index);
        self.write[index].tag = invalid_tag(index);
    }
}

impl SecondSet {
    fn invalidate(&mut self, index: usize) {
        self.read[index].tag = invalid_tag(index);
        self.write[index].tag = invalid_tag(index);
    }
}

/// Index of the second level's entry for a linear address.
fn second_index(linear: u64) -> usize {
    (linear >> 12).wrapping_add(linear >> SECOND_SHIFT) as usize & (SECOND_ENTRIES - 1)
}

/// Index of the entry for a linear address.
pub fn index(linear: u64) -> usize {
    (linear >> 12) as usize & (SET_ENTRIES - 1)
}

impl Tlb {
    /// Forgets everything.
    pub fn flush_all(&mut self) {
        self.flush_non_global();
        for i in 0..self.global.len() {
            let (set, index) = self.global[i];
            self.sets[set as usize].invalidate(index as usize);
        }
        self.global.clear();
        self.forget_fetches();
        self.large = [0; 64];
    }

    fn forget_stack(&mut self, which: impl Fn(&StackPage) -> bool) {
        self.stack.iter_mut().filter(|page| which(page)).for_each(|page| *page = StackPage::none());
    }

    fn forget_fetches(&mut self) {
        self.fetch = [[NO_FETCH; FETCH_ENTRIES]; 2];
    }

    fn forget_local_fetches(&mut self) {
        for entry in self.fetch.as_flattened_mut() {
            if !entry.global {
                entry.tag = u64::MAX;
            }
        }
    }

    /// Whether the page of `linear`, from which an instruction was fetched just now, is a global one.
    pub fn is_global_code(&self, privilege: Privilege, linear: u64) -> bool {
        let entry = &self.fetch[usize::from(privilege != Privilege::User)][index(linear) % FETCH_ENTRIES];
        entry.tag == linear & !0xfff && entry.global
    }

    /// Forgets everything but global pages.
    pub fn flush_non_global(&mut self) {
        for i in 0..self.used.len() {
            let (set, index) = self.used[i];
            self.sets[set as usize].invalidate(index as usize);
        }
        self.used.clear();
        self.flush_second();
        self.forget_stack(|_| true);
        self.forget_local_fetches();
    }

    /// Empties the second level, global pages included: which are is not known there.
    fn flush_second(&mut self) {
        for &(set, index) in &self.second_used {
            self.second[set as usize].invalidate(index as usize);
        }
        self.second_used.clear();
    }

    /// Forgets the page of `linear` (INVLPG). Returns whether everything had to go.
    pub fn flush_page(&mut self, linear: u64) -> bool {
        let (word, bit) = region(linear);
        if self.large[word] & bit != 0 {
            self.flush_all();
            return true;
        }
        let index = index(linear);
        for set in &mut self.sets {
            set.invalidate(index);
        }
        for set in &mut self.second {
            set.invalidate(second_index(linear));
        }
        self.forget_stack(|page| page.tag == linear & !0xfff);
        for side in &mut self.fetch {
            side[index % FETCH_ENTRIES].tag = u64::MAX;
        }
        false
    }

    /// Forgets that the page at host address `host` may be stored to.
    pub fn forbid_stores(&mut self, host: u64) {
        for &(set, index) in self.used.iter().chain(&self.global) {
            let entry = &mut self.sets[set as usize].write[index as usize];
            if entry.host == host {
                entry.tag = invalid_tag(index as usize);
            }
        }
        for &(set, index) in &self.second_used {
            let entry = &mut self.second[set as usize].write[index as usize];
            if entry.host == host {
                entry.tag = invalid_tag(index as usize);
            }
        }
        self.forget_stack(|page| page.tag.wrapping_add(page.distance) == host);
    }

    /// Whether an entry can be filled without tidying up, which takes libc's copies (see `quick_access`).
    pub fn has_room(&self) -> bool {
        self.used.len().max(self.global.len()) < 4 * SET_ENTRIES
    }

    /// Where `linear` may be loaded from, as far as is known here.
    pub fn readable(&self, privilege: Privilege, linear: u64) -> Option<*const u8> {
        let (first, second) = (&self.sets[privilege as usize], &self.second[privilege as usize]);
        let host = known([&first.read[index(linear)], &second.read[second_index(linear)]], linear)?;
        Some(host.cast_const())
    }

    /// Where `linear` may be stored to, unnoticed, as far as is known here.
    pub fn storable(&self, privilege: Privilege, linear: u64) -> Option<*mut u8> {
        let (first, second) = (&self.sets[privilege as usize], &self.second[privilege as usize]);
        known([&first.write[index(linear)], &second.write[second_index(linear)]], linear)
    }

    /// Whether the page of `linear` may be stored to, as far as is known here.
    pub fn may_store(&self, privilege: Privilege, linear: u64) -> bool {
        self.storable(privilege, linear).is_some()
    }

    /// Makes room for the page of `linear`: the one that is at its index goes to the second level.
    fn make_room(&mut self, set: usize, linear: u64) {
        let first = &self.sets[set];
        let (read, write) = (first.read[index(linear)], first.write[index(linear)]);
        if read.tag == invalid_tag(index(linear)) || read.tag == linear & !0xfff {
            return;
        }
        if self.second_used.len() == SECOND_USED {
            self.flush_second();
        }
        let to = second_index(read.tag);
        let stored = if write.tag == read.tag { write.tag } else { invalid_tag(to) };
        self.second[set].read[to] = read;
        self.second[set].write[to] = Entry { tag: stored, host: read.host };
        self.second_used.push((set as u8, to as u16));
    }

    fn fill(&mut self, privilege: Privilege, linear: u64, walked: &Walked, host: u64, stores: bool) {
        let (set, index) = (privilege as usize, index(linear));
        let (tag, invalid) = (linear & !0xfff, invalid_tag(index));
        let entry = |allowed: bool| Entry { tag: if allowed { tag } else { invalid }, host };
        self.enter(set, linear, [entry(walked.readable), entry(walked.writable && stores)], walked.global);
        self.note_size(linear, walked);
    }

    /// The entries of the page of `linear` for loads and for stores are these.
    fn enter(&mut self, set: usize, linear: u64, [read, write]: [Entry; 2], global: bool) {
        let index = index(linear);
        self.make_room(set, linear);
        (self.sets[set].read[index], self.sets[set].write[index]) = (read, write);
        let list = if global { &mut self.global } else { &mut self.used };
        list.push((set as u8, index as u16));
        // A list that only ever grows between flushes would not stay short.
        if list.len() > 4 * SET_ENTRIES {
            list.sort_unstable();
            list.dedup();
        }
    }

    /// The page of `linear` goes from the second level to the first.
    fn promote(&mut self, privilege: Privilege, linear: u64) {
        let (set, from) = (privilege as usize, second_index(linear));
        let second = &mut self.second[set];
        let (read, mut write) = (second.read[from], second.write[from]);
        if read.tag != linear & !0xfff {
            return;
        }
        second.invalidate(from);
        if write.tag != read.tag {
            write.tag = invalid_tag(index(linear));
        }
        self.enter(set, linear, [read, write], false);
    }

    fn note_size(&mut self, linear: u64, walked: &Walked) {
        if walked.large {
            let (word, bit) = region(linear);
            self.large[word] |= bit;
        }
    }
}

/// The host address of `linear`, if one of these entries has its page.
fn known(entries: [&Entry; 2], linear: u64) -> Option<*mut u8> {
    let entry = entries.into_iter().find(|entry| entry.tag == linear & !0xfff)?;
    Some((entry.host + (linear & 0xfff)) as *mut u8)
}

impl Cpu {
    /// The privilege of explicit accesses at the current CPL.
    pub fn privilege(&self) -> Privilege {
        match self.cpl {
            3 => Privilege::User,
            _ if self.smap_active() => Privilege::Supervisor,
            _ => Privilege::SupervisorAc,
        }
    }

    /// Where an access to linear `address` goes, or the fault that it raises. The address is canonical, and the
    /// access stays on its page.
    pub fn resolve(&mut self, address: u64, access: Access, privilege: Privilege) -> Result<Target, Exception> {
        let set = &self.tlb.sets[privilege as usize];
        let fetch = &self.tlb.fetch[usize::from(privilege != Privilege::User)][index(address) % FETCH_ENTRIES];
        let (tag, host) = match access {
            Access::Read => (set.read[index(address)].tag, set.read[index(address)].host),
            Access::Write => (set.write[index(address)].tag, set.write[index(address)].host),
            Access::Fetch => (fetch.tag, fetch.host),
        };
        if tag == address & !0xfff {
            return Ok(Target::Ram((host + (address & 0xfff)) as *mut u8));
        }
        self.resolve_slowly(address, access, privilege)
    }

    #[cold]
    fn resolve_slowly(&mut self, address: u64, access: Access, privilege: Privilege) -> Result<Target, Exception> {
        let second = match access {
            Access::Read => self.tlb.readable(privilege, address).map(<*const u8>::cast_mut),
            Access::Write => self.tlb.storable(privilege, address),
            Access::Fetch => None,
        };
        if let Some(host) = second {
            self.tlb.promote(privilege, address);
            return Ok(Target::Ram(host));
        }
        let walked = self.walk(address, access, privilege)?;
        let shared = self.shared.clone();
        let Some(page) = shared.ram.page(walked.physical) else {
            return Ok(Target::Mmio(walked.physical | address & 0xfff));
        };
        if access == Access::Fetch {
            self.tlb.note_size(address, &walked);
            let side = &mut self.tlb.fetch[usize::from(privilege != Privilege::User)];
            side[index(address) % FETCH_ENTRIES] =
                Fetch { tag: address & !0xfff, host: page.host as u64, global: walked.global };
            return Ok(Target::Ram(page.host.wrapping_add((address & 0xfff) as usize)));
        }
        let stores = walked.writable && shared.ram.note_writer(page, self.index);
        self.tlb.fill(privilege, address, &walked, page.host as u64, stores);
        Ok(Target::Ram(page.host.wrapping_add((address & 0xfff) as usize)))
    }

    /// Forgets all translations of linear addresses (MOV to CR0, CR4; EFER).
    pub fn flush_tlb_all(&mut self) {
        self.tlb.flush_all();
        self.emitted.forget_jumps();
    }

    /// Forgets all but global ones (MOV to CR3).
    pub fn flush_tlb_non_global(&mut self) {
        self.tlb.flush_non_global();
        self.emitted.forget_local_jumps();
    }

    /// Forgets one page (INVLPG).
    pub fn flush_tlb_page(&mut self, linear: u64) {
        let all = self.tlb.flush_page(linear);
        self.emitted.forget_jumps_to(linear, all);
    }
}
