//! Where things are behind GS, and which host register holds which guest register.

use std::mem::offset_of;

use super::{
    asm::{Mem, reg},
    helpers::LateFault,
    jumps::{Context, JumpTables, PAGE_ENTRIES, PageEntry, page_index},
};
use crate::{
    clock::GuestClock,
    cpu::{Block, Cpu, Segment},
    exception::Exception,
    mailbox::Mailbox,
    msr::Msrs,
    tlb::{Privilege, SecondSet, Set, StackPage, Tlb},
    xstate::XState,
};

/// What emitted code alone uses of a vCPU's state.
#[repr(C, align(64))]
pub struct EmittedState {
    /// Where an access that cannot go to memory directly is made instead: it crosses a page, or is not memory.
    pub bounce: [u8; 128],
    /// What the access under way raises when the instruction is done.
    pub late: Option<LateFault>,
    /// The linear address that `bounce` stands for, if the access under way uses it.
    pub bounce_for: Option<u64>,
    /// The mask under which it does.
    pub bounce_mask: u64,
    /// Where in guest memory the slow access under way goes, if it does not use `bounce`.
    pub slow_host: *mut u8,
    /// The low halves of the vector registers during [`super::helpers::quick_access`].
    pub xmm: [[u64; 2]; 16],
    /// A locked access crosses a page: the instruction is to be executed while no other vCPU is in emitted code.
    pub wants_world: bool,
    /// It is.
    pub has_world: bool,
    /// A helper runs that must not change the other halves: no bus, no allocation.
    pub lean: bool,
    /// It has met something in a page walk that it may not deal with.
    pub walk_cut: bool,
    /// Status flags as `lahf; seto al` leave them in AX.
    pub flag_word: u32,
    /// The same, after the copied instruction of a slow access or at a signal.
    pub late_flag_word: u32,
    /// An interrupt waits for RFLAGS.IF to be set.
    pub waiting: bool,
    /// Nonzero while vector and x87 registers are in the host's. In supervisor code they may be without its mode's
    /// saying so: they are the user's, and left alone.
    pub vectors: u32,
    /// They are not, but are to be for the user code that is entered next.
    pub load_vectors: bool,
    /// User code is to have them in the host's, always.
    pub user_vectors: bool,
    /// MXCSR for Rust code.
    pub host_mxcsr: u32,
    /// Which components XSAVE saves and XRSTOR restores.
    pub xsave_mask: u64,
    /// A value on its way from one access to the next.
    pub temp: u64,
    /// Linear address of the page that movable code under way lies on (see `place.rs`).
    pub code_page: u64,
    /// Where the `ExitDesc` of the last indirect branch in 64-bit code is, from the first stub on; 0 after a direct one to an address that is not
    /// canonical.
    pub branch: u64,
    /// The linear address that the page of the stack is not for.
    pub stack_address: u64,
    /// Host registers lent to an instruction.
    pub lent: [u64; 2],
    /// Host addresses of the groups of the block under way.
    pub groups: [u64; super::plan::GROUPS],
    /// The host's stack pointer in `enter`.
    pub host_rsp: u64,
    /// The stack of returns' pointer while it is not in RSP (see `returns.rs`).
    pub returns: u64,
    /// Lowest address of those stacks.
    pub returns_base: u64,
    /// Where `enter` jumps to.
    pub entry: u64,
    /// What an exit tells beside its kind.
    pub exit_value: u64,
    /// See [`ExitKind`].
    pub exit_kind: u32,
    /// At [`ExitKind::Signal`]: the signal, the exception's vector, the address of the host instruction and si_addr.
    pub signal: (u32, i32, u64, u64),
    /// The block itself.
    pub block: u64,
    /// Rust functions that stubs call.
    pub helpers: [u64; super::helpers::COUNT],
    /// An exception raised by a slow access.
    pub pending: Option<Exception>,
    /// The linear address that a refill found no page for, and whether for a store, if that may be a page fault; and
    /// which, where that is certain.
    pub refill_failed: Option<(u64, bool, Option<Exception>)>,
    /// Whether exceptions are delivered, not told.
    pub delivers: bool,
    /// Nonzero if an access raises the page fault in `fault` for certain.
    pub faulted: u32,
    /// See `faulted`.
    pub fault: Exception,
    /// How often the code cache had been emptied when the jump tables last were for that.
    pub generation: u64,
    /// What the run loop executes.
    pub context: Context,
    /// This vCPU's jump tables; null for processors without a block.
    pub jumps: *mut JumpTables,
}

impl Default for EmittedState {
    fn default() -> Self {
        Self {
            bounce: [0; 128],
            late: None,
            bounce_for: None,
            bounce_mask: 0,
            slow_host: std::ptr::null_mut(),
            xmm: [[0; 2]; 16],
            wants_world: false,
            has_world: false,
            lean: false,
            walk_cut: false,
            flag_word: 0,
            late_flag_word: 0,
            waiting: false,
            vectors: 0,
            load_vectors: false,
            user_vectors: false,
            host_mxcsr: 0x1f80,
            xsave_mask: 0,
            temp: 0,
            stack_address: 0,
            code_page: 0,
            branch: 0,
            lent: [0; 2],
            groups: [0; super::plan::GROUPS],
            host_rsp: 0,
            returns: 0,
            returns_base: 0,
            entry: 0,
            exit_value: 0,
            exit_kind: 0,
            signal: (0, 0, 0, 0),
            block: 0,
            helpers: [0; super::helpers::COUNT],
            pending: None,
            refill_failed: None,
            delivers: false,
            faulted: 0,
            fault: Exception::UD,
            generation: 0,
            context: Context::default(),
            jumps: std::ptr::null_mut(),
        }
    }
}

impl EmittedState {
    /// Forgets where indirect and cross-page jumps lead: linear addresses may mean other pages now.
    pub fn forget_jumps(&mut self) {
        self.forget(false);
    }

    /// The same, but for global pages.
    pub fn forget_local_jumps(&mut self) {
        self.forget(true);
    }

    /// The same for the page of `linear` alone, unless `all` pages changed.
    pub fn forget_jumps_to(&mut self, linear: u64, all: bool) {
        let concerned = self.jumps().is_some_and(|jumps| jumps.may_lead_to(linear));
        if all || concerned {
            self.forget_jumps();
        }
    }

    fn forget(&mut self, keep_global: bool) {
        if let Some(jumps) = self.jumps() {
            jumps.forget(keep_global);
        }
    }

    /// The jump tables.
    pub fn jumps(&mut self) -> Option<&mut JumpTables> {
        // SAFETY: null, or set once to the tables in the vCPU's own block, which only its thread uses.
        #[allow(unsafe_code)]
        unsafe {
            self.jumps.as_mut()
        }
    }
}

/// Why emitted code was left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum ExitKind {
    /// A jump to the RIP in `exit_value` that no table knew.
    Miss = 0,
    /// A direct jump that is not linked yet; `exit_value` is its `LinkDesc`.
    Link = 1,
    /// An instruction to be emulated; `exit_value` is its `ExitDesc`.
    Emulate = 2,
    /// An access raised `pending`, or `wants_world`; `exit_value` is its `AccessDesc`. The instruction has done nothing.
    Fault = 3,
    /// After the instruction of the `AccessDesc` in `exit_value` the run loop is wanted.
    After = 4,
    /// A host signal in emitted code; see `signal`.
    Signal = 5,
    /// A block that is no longer valid was entered at one of its first entries; `exit_value` is behind that.
    Dead = 6,
    /// There is more to an access than a look-up, perhaps `refill_failed`; `exit_value` is its `RefillDesc`.
    Apart = 7,
    /// A direct jump to another page that is not linked yet; `exit_value` is its `AcrossDesc`.
    Across = 8,
}

impl ExitKind {
    /// From what emitted code stored.
    pub fn from_raw(raw: u32) -> Self {
        match raw {
            0 => Self::Miss,
            1 => Self::Link,
            2 => Self::Emulate,
            3 => Self::Fault,
            4 => Self::After,
            6 => Self::Dead,
            7 => Self::Apart,
            8 => Self::Across,
            _ => Self::Signal,
        }
    }
}

const CPU: usize = offset_of!(Block, cpu);
const EMITTED: usize = CPU + offset_of!(Cpu, emitted);

macro_rules! emitted {
    ($($field:tt)*) => {
        Mem::gs((EMITTED + offset_of!(EmittedState, $($field)*)) as i32)
    };
}

/// GS-relative places.
pub mod at {
    #![allow(missing_docs)]
    use super::*;

    pub const FLAG_WORD: Mem = emitted!(flag_word);
    pub const LATE_FLAG_WORD: Mem = emitted!(late_flag_word);
    pub const WAITING: Mem = emitted!(waiting);
    pub const RIP: Mem = Mem::gs((CPU + offset_of!(Cpu, rip)) as i32);
    pub const RFLAGS: Mem = Mem::gs((CPU + offset_of!(Cpu, rflags)) as i32);
    pub const KERNEL_GS_BASE: Mem = Mem::gs((CPU + offset_of!(Cpu, msrs) + offset_of!(Msrs, kernel_gs_base)) as i32);
    pub const CR0: Mem = Mem::gs((CPU + offset_of!(Cpu, cr0)) as i32);
    pub const CR2: Mem = Mem::gs((CPU + offset_of!(Cpu, cr2)) as i32);
    pub const CR3: Mem = Mem::gs((CPU + offset_of!(Cpu, cr3)) as i32);
    pub const CR4: Mem = Mem::gs((CPU + offset_of!(Cpu, cr4)) as i32);
    pub const TSC_AUX: Mem = Mem::gs((CPU + offset_of!(Cpu, msrs) + offset_of!(Msrs, tsc_aux)) as i32);
    pub const TSC_OFFSET: Mem = Mem::gs((CPU + offset_of!(Cpu, clock) + offset_of!(GuestClock, tsc_offset)) as i32);
    pub const VECTORS: Mem = emitted!(vectors);
    pub const LOAD_VECTORS: Mem = emitted!(load_vectors);
    pub const HOST_MXCSR: Mem = emitted!(host_mxcsr);
    pub const XSAVE_MASK: Mem = emitted!(xsave_mask);
    pub const XSAVE_MASK_HIGH: Mem = Mem::gs(XSAVE_MASK.disp + 4);
    pub const TEMP: Mem = emitted!(temp);
    pub const CODE_PAGE: Mem = emitted!(code_page);
    pub const BRANCH: Mem = emitted!(branch);
    pub const STACK_ADDRESS: Mem = emitted!(stack_address);
    pub const LENT: Mem = emitted!(lent);
    pub const GROUPS: Mem = emitted!(groups);
    pub const HOST_RSP: Mem = emitted!(host_rsp);
    pub const RETURNS: Mem = emitted!(returns);
    pub const ENTRY: Mem = emitted!(entry);
    pub const EXIT_VALUE: Mem = emitted!(exit_value);
    pub const EXIT_KIND: Mem = emitted!(exit_kind);
    pub const BLOCK: Mem = emitted!(block);
    pub const HELPER_ACCESS: Mem = emitted!(helpers);
    pub const HELPER_COMMIT: Mem = Mem::gs(HELPER_ACCESS.disp + 8);
    pub const HELPER_QUICK: Mem = Mem::gs(HELPER_ACCESS.disp + 16);
    pub const HELPER_REFILL: Mem = Mem::gs(HELPER_ACCESS.disp + 24);
    pub const HELPER_FIND: Mem = Mem::gs(HELPER_ACCESS.disp + 32);
    pub const HELPER_TRANSFER: Mem = Mem::gs(HELPER_ACCESS.disp + 40);
    pub const HELPER_FAULT: Mem = Mem::gs(HELPER_ACCESS.disp + 48);
    pub const HELPER_EXTENDED: Mem = Mem::gs(HELPER_ACCESS.disp + 56);
    pub const FAULTED: Mem = emitted!(faulted);
    pub const XMM: Mem = emitted!(xmm);
    pub const POLL: Mem = Mem::gs((offset_of!(Block, mailbox) + offset_of!(Mailbox, poll)) as i32);
    pub const XSTATE: Mem = Mem::gs((CPU + offset_of!(Cpu, xstate) + offset_of!(XState, area)) as i32);
    pub const FIP: Mem = Mem::gs((CPU + offset_of!(Cpu, xstate) + offset_of!(XState, fip)) as i32);
    pub const FDP: Mem = Mem::gs((CPU + offset_of!(Cpu, xstate) + offset_of!(XState, fdp)) as i32);
    pub const SETTLED_FDP: Mem = Mem::gs((CPU + offset_of!(Cpu, xstate) + offset_of!(XState, settled)) as i32);
    pub const SETTLED_FOP: Mem = Mem::gs(SETTLED_FDP.disp + 8);
    pub const FOP: Mem = Mem::gs((CPU + offset_of!(Cpu, xstate) + offset_of!(XState, fop)) as i32);
}

/// Guest register `index` in the state.
pub fn gpr(index: u8) -> Mem {
    Mem::gs((CPU + offset_of!(Cpu, gpr) + 8 * index as usize) as i32)
}

/// Base of segment register `index`.
pub fn segment_base(index: usize) -> Mem {
    segment(index, offset_of!(Segment, base))
}

/// Selector of segment register `index`.
pub fn selector(index: usize) -> Mem {
    segment(index, offset_of!(Segment, selector))
}

fn segment(index: usize, field: usize) -> Mem {
    Mem::gs((CPU + offset_of!(Cpu, seg) + index * size_of::<Segment>() + field) as i32)
}

/// Displacement of the TLB's entries of `privilege` for loads or stores, plus that of `field` in an entry.
pub fn tlb(privilege: Privilege, write: bool, field: usize) -> i32 {
    let set = privilege as usize * size_of::<Set>();
    let side = if write { offset_of!(Set, write) } else { offset_of!(Set, read) };
    (offset_of!(Block, tlb) + offset_of!(Tlb, sets) + set + side + field) as i32
}

/// From the first of those entries to the first of the second level's.
pub fn second_level(privilege: Privilege, write: bool) -> i32 {
    let set = privilege as usize * size_of::<SecondSet>();
    let side = if write { offset_of!(SecondSet, write) } else { offset_of!(SecondSet, read) };
    (offset_of!(Block, tlb) + offset_of!(Tlb, second) + set + side) as i32 - tlb(privilege, write, 0)
}

/// The field at `field` of the page of the stack of `privilege`.
pub fn stack_page(privilege: Privilege, field: usize) -> Mem {
    let page = privilege as usize * size_of::<StackPage>();
    Mem::gs((offset_of!(Block, tlb) + offset_of!(Tlb, stack) + page + field) as i32)
}

/// Displacement of jump table `table`.
pub fn jump_table(table: usize) -> i32 {
    (offset_of!(Block, jumps) + offset_of!(JumpTables, entries) + table * JumpTables::SIZE) as i32
}

/// Place in the table of pages that goes with jump table `table`, for the page of `linear`.
pub fn page_id(table: usize, linear: u64) -> Mem {
    let entry = size_of::<PageEntry>() * page_index(linear);
    Mem::gs(page_entries(table, offset_of!(PageEntry, id)) + entry as i32)
}

/// Displacement of that table, plus that of a field of its entries.
pub fn page_entries(table: usize, field: usize) -> i32 {
    let tables = offset_of!(Block, jumps) + offset_of!(JumpTables, page_entries);
    (tables + table * size_of::<[PageEntry; PAGE_ENTRIES]>() + field) as i32
}

/// The host register that holds guest register `index`, `None` for those kept in memory.
///
/// RSP is for the host's calls (see `returns.rs`), R10 and R11 are scratch; guest RSP is in R15 (measured: giving three registers up
/// beats pinning all sixteen).
pub fn pinned(index: u8) -> Option<u8> {
    match index {
        reg::RSP => Some(reg::R15),
        reg::R10 | reg::R11 | reg::R15 => None,
        other => Some(other),
    }
}

/// Guest registers that live in host registers, with those.
pub fn pinned_pairs() -> impl Iterator<Item = (u8, u8)> {
    (0..16).filter_map(|guest| pinned(guest).map(|host| (guest, host)))
}

/// The emitted state of the vCPU whose block GS points at.
///
/// # Safety
/// GS points at a vCPU's block (the thread is inside emitted code, or in a signal handler on top of it).
#[allow(unsafe_code)]
pub unsafe fn signal_place() -> *mut EmittedState {
    let block: u64;
    // SAFETY: as the caller vouches; `block` holds the block's own address.
    unsafe {
        std::arch::asm!("mov {}, gs:[{offset}]", out(reg) block, offset = const BLOCK_DISP, options(nostack, readonly, preserves_flags));
    }
    (block as usize + EMITTED) as *mut EmittedState
}

const BLOCK_DISP: usize = EMITTED + offset_of!(EmittedState, block);
