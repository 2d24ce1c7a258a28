//! Where indirect and cross-page jumps lead: tables from the low 16 bits of RIP to emitted code.
//!
//! The target's prologue checks that it is the block for that RIP; so an entry may be wrong, but it must lead to code
//! that was translated for the mode at hand, and from the page that the linear address means now. Tables are
//! therefore kept apart by mode, and emptied when linear addresses change their meaning.

use super::mode::Mode;

/// log2 of the entries of a table: `movzx r10d, r11w` is the only index that costs no flags.
const TABLE_BITS: u32 = 16;
const TABLE_ENTRIES: usize = 1 << TABLE_BITS;
/// Number of tables.
pub const TABLES: usize = 8;

/// The tables of one vCPU: host addresses of blocks' checked entries.
#[repr(C, align(64))]
pub struct JumpTables {
    /// Read by emitted code.
    pub entries: [[u64; TABLE_ENTRIES]; TABLES],
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

#[derive(Default)]
struct TableState {
    /// What its entries were translated for; `None`: never used, not even filled with misses.
    context: Option<Context>,
    /// Entries that lead somewhere, of pages that are not global.
    local: Vec<u16>,
    /// The same of global pages.
    global: Vec<u16>,
}

/// What translations depend on beside the bytes: two blocks of one context may jump to each other by RIP alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Context {
    /// The mode.
    pub mode: Mode,
    /// Base and limit of CS, where they matter.
    pub cs_base: u64,
    /// See `cs_base`.
    pub cs_limit: u32,
}

impl Context {
    /// That of code in which each access is checked by itself.
    pub fn ungrouped(self) -> Self {
        Self { mode: self.mode.ungrouped(), ..self }
    }
}

impl JumpTables {
    /// Makes zeroed memory an empty set of tables.
    ///
    /// # Safety
    /// `tables` is valid for writes, zeroed, and nobody else's.
    #[allow(unsafe_code)]
    pub unsafe fn init(tables: *mut Self) {
        for i in 0..TABLES {
            // SAFETY: in bounds; written without dropping what was not there.
            unsafe { (&raw mut (*tables).state[i]).write(TableState::default()) }
        }
    }

    /// Makes the table of `context.mode` one for `context`. `miss` is where its empty entries lead.
    pub fn enter(&mut self, context: &Context, miss: u64) {
        let table = context.mode.table();
        let state = &mut self.state[table];
        match state.context {
            Some(current) if current == *context => return,
            Some(_) => {
                for index in state.local.drain(..).chain(state.global.drain(..)) {
                    self.entries[table][index as usize] = miss;
                }
            }
            None => self.entries[table].fill(miss),
        }
        state.context = Some(*context);
    }

    /// The entry for `rip`.
    pub fn get(&self, table: usize, rip: u64) -> u64 {
        self.entries[table][rip as u16 as usize]
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
        self.entries[table][rip as u16 as usize] = host;
        let list = if global { &mut state.global } else { &mut state.local };
        list.push(rip as u16);
        if list.len() > TABLE_ENTRIES {
            list.sort_unstable();
            list.dedup();
        }
    }

    /// Empties the tables; those of global pages stay if `keep_global`.
    pub fn forget(&mut self, miss: u64, keep_global: bool) {
        if !keep_global {
            self.pages = [0; PAGE_WORDS];
        }
        for (entries, state) in self.entries.iter_mut().zip(&mut self.state) {
            for index in state.local.drain(..) {
                entries[index as usize] = miss;
            }
            if !keep_global {
                for index in state.global.drain(..) {
                    entries[index as usize] = miss;
                }
            }
        }
    }
}
