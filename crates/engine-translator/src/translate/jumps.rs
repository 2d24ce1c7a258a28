//! Where indirect jumps lead, and which pages direct jumps may lead to.
//!
//! *Indirect* jumps go by tables, indexed by the low 16 bits of RIP. An entry leads to code that was translated for the mode
//! at hand, and from the page that the linear address means now.
//!
//! *Direct* jumps to other pages are linked, behind a check that the page they lead to is what it was: each combination of
//! mode, linear page and physical page has a number (`Found::page_id`), and a table by linear page has the numbers of
//! those that hold now. (That of a page of movable code is the same wherever it is: then the table says where, too.)
//!
//! All of this is kept apart by mode, and emptied when linear addresses change their meaning.

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::{mode::Mode, returns::ReturnStacks};

/// Entries of a table.
const TABLE_ENTRIES: usize = 1 << 16;
/// Number of tables.
pub const TABLES: usize = 8;
/// Entries of a table of pages.
pub const PAGE_ENTRIES: usize = 1 << 12;
/// What no page is called.
const NO_PAGE: u32 = 0;

/// Which entry of a table of pages is that of a linear address.
pub fn page_index(linear: u64) -> usize {
    (linear >> 12) as usize % PAGE_ENTRIES
}

/// Where a jump leads.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct JumpEntry {
    /// The RIP that this is for. That of an entry that leads nowhere is one that does not belong here: 0, but for the first.
    pub rip: u64,
    /// Host address of the block's entry with the flags in `flag_word` and RIP in R11.
    pub host: u64,
}

impl JumpEntry {
    /// Entry `index`, leading nowhere. All but the first are zeroes, so a table takes memory only as it is used.
    fn none(index: usize) -> Self {
        Self { rip: u64::from(index == 0), host: 0 }
    }
}

/// What a linear page is.
#[repr(C, align(16))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageEntry {
    /// Its linear address. (Jumps whose number tells that do not look here.)
    pub linear: u64,
    /// Its number (see above), or [`NO_PAGE`].
    pub id: u32,
}

/// log2 of the size of a [`PageEntry`].
pub const PAGE_ENTRY_BITS: u32 = 4;
const _: () = assert!(size_of::<PageEntry>() == 1 << PAGE_ENTRY_BITS);

/// The tables of one vCPU.
#[repr(C, align(64))]
pub struct JumpTables {
    /// Read by emitted code.
    pub entries: [[JumpEntry; TABLE_ENTRIES]; TABLES],
    /// The same, by [`page_index`].
    pub page_entries: [[PageEntry; PAGE_ENTRIES]; TABLES],
    /// The third way: where returns lead.
    pub returns: ReturnStacks,
    state: [TableState; TABLES],
    /// Linear pages that entries lead to, by their number modulo the number of bits, since all entries were forgotten.
    pages: [u64; PAGE_WORDS],
}

/// 64 pages each.
const PAGE_WORDS: usize = 256;

/// Where in [`JumpTables::pages`] the page of a linear address is.
fn page_bit(linear: u64) -> (usize, u64) {
    let number = linear >> 12;
    (number as usize / 64 % PAGE_WORDS, 1 << (number % 64))
}

struct TableState {
    /// What its entries were translated for; `None`: never used, the first leads to 0 still.
    context: Option<Context>,
    /// Entries that lead somewhere, of pages that are not global.
    local: Vec<u16>,
    /// The same of global pages.
    global: Vec<u16>,
    /// Entries of the table of pages that are set, for pages that are not global.
    local_pages: Vec<u16>,
    /// The same for global ones.
    global_pages: Vec<u16>,
}

impl Default for TableState {
    /// With room for all: `find_quickly` must not allocate.
    fn default() -> Self {
        let entries = || Vec::with_capacity(TABLE_ENTRIES + 1);
        let pages = || Vec::with_capacity(PAGE_ENTRIES + 1);
        Self { context: None, local: entries(), global: entries(), local_pages: pages(), global_pages: pages() }
    }
}

/// What translations depend on beside the bytes: two blocks of one context may jump to each other by RIP alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct Context {
    /// Base and limit of CS, where they matter.
    pub cs_base: u64,
    /// See `cs_base`.
    pub cs_limit: u32,
    /// The mode.
    pub mode: Mode,
}

impl Context {
    /// That of plain code, in which accesses are checked together.
    pub fn grouped(self) -> Self {
        Self { mode: self.mode.plain(), ..self }
    }

    /// That of code in which each access is checked by itself.
    pub fn ungrouped(self) -> Self {
        Self { mode: self.mode.ungrouped(), ..self }
    }
}

impl JumpTables {
    /// Bytes of a table.
    pub const SIZE: usize = size_of::<[JumpEntry; TABLE_ENTRIES]>();

    /// Makes zeroed memory an empty set of tables.
    ///
    /// # Safety
    /// `tables` is valid for writes, zeroed, and nobody else's.
    #[allow(unsafe_code)]
    pub unsafe fn init(tables: *mut Self, returns: ReturnStacks) {
        // SAFETY: in bounds; written without dropping what was not there.
        unsafe {
            (&raw mut (*tables).returns).write(returns);
            for i in 0..TABLES {
                (&raw mut (*tables).state[i]).write(TableState::default());
            }
        }
    }

    /// Makes the table of `context.mode` one for `context`.
    pub fn enter(&mut self, context: &Context) {
        let table = context.mode.table();
        match self.state[table].context {
            Some(current) if current == *context => return,
            Some(_) => {
                self.forget_table(table, false);
                self.returns.forget_table(table);
            }
            None => self.entries[table][0] = JumpEntry::none(0),
        }
        self.state[table].context = Some(*context);
    }

    /// Whether the table of `context.mode` is one for `context`.
    pub fn is_for(&self, context: &Context) -> bool {
        self.state[context.mode.table()].context == Some(*context)
    }

    /// Whether something can be set in a table without tidying up.
    pub fn has_room(&self, table: usize) -> bool {
        let state = &self.state[table];
        let entries = state.local.len().max(state.global.len());
        let pages = state.local_pages.len().max(state.global_pages.len());
        entries < TABLE_ENTRIES && pages < PAGE_ENTRIES
    }

    /// Where a jump to `rip` leads, if that is known.
    pub fn get(&self, table: usize, rip: u64) -> Option<u64> {
        let entry = self.entries[table][rip as u16 as usize];
        (entry.rip == rip).then_some(entry.host)
    }

    /// Whether any entry may lead to code on the page of `linear`.
    pub fn may_lead_to(&self, linear: u64) -> bool {
        let (word, bit) = page_bit(linear);
        self.pages[word] & bit != 0
    }

    /// Sets the entry for `rip`, whose block has its bytes on the pages of these linear addresses; `global` if these are
    /// global ones.
    pub fn set(&mut self, table: usize, rip: u64, linear: [u64; 2], host: u64, global: bool) {
        for (word, bit) in linear.map(page_bit) {
            self.pages[word] |= bit;
        }
        let state = &mut self.state[table];
        self.entries[table][rip as u16 as usize] = JumpEntry { rip, host };
        let list = if global { &mut state.global } else { &mut state.local };
        list.push(rip as u16);
        if list.len() > TABLE_ENTRIES {
            list.sort_unstable();
            list.dedup();
        }
    }

    /// Takes note that the page of `linear` is the one that is called `id` in table `table`.
    pub fn set_page(&mut self, table: usize, linear: u64, id: u32, global: bool) {
        let (word, bit) = page_bit(linear);
        self.pages[word] |= bit;
        let index = page_index(linear);
        let entry = &mut self.page_entries[table][index];
        let new = PageEntry { linear: linear & !0xfff, id };
        if *entry == new {
            return;
        }
        *entry = new;
        let state = &mut self.state[table];
        let list = if global { &mut state.global_pages } else { &mut state.local_pages };
        list.push(index as u16);
        if list.len() > PAGE_ENTRIES {
            list.sort_unstable();
            list.dedup();
        }
    }

    /// Empties the tables; what is of global pages stays if `keep_global`.
    pub fn forget(&mut self, keep_global: bool) {
        self.returns.forget();
        if !keep_global {
            self.pages = [0; PAGE_WORDS];
        }
        for table in 0..TABLES {
            self.forget_table(table, keep_global);
        }
    }

    fn forget_table(&mut self, table: usize, keep_global: bool) {
        let state = &mut self.state[table];
        let local = (&mut state.local, &mut state.local_pages);
        let global = (!keep_global).then_some((&mut state.global, &mut state.global_pages));
        for (entries, pages) in [local].into_iter().chain(global) {
            for index in entries.drain(..).map(usize::from) {
                self.entries[table][index] = JumpEntry::none(index);
            }
            for index in pages.drain(..).map(usize::from) {
                self.page_entries[table][index].id = NO_PAGE;
            }
        }
    }
}
