//! The runtime state of one vCPU, as plain Rust and emitted code share it.
//!
//! While Rust code runs, everything is in [`Cpu`], vectors included. While emitted code runs, thirteen general
//! registers, the status flags and the vector registers are in the host's own registers, and GS points at the
//! [`Block`] that holds the [`Cpu`].

use std::{cell::UnsafeCell, sync::Arc};

use purlin_arch::x86_64::{
    cpuid::CpuidEntry,
    regs::{cr0, cr4, efer, rflags, seg},
    state::Activity,
};
use purlin_engine::Bus;

use crate::{
    clock::GuestClock,
    features::Features,
    interrupt::Event,
    lapic::Lapic,
    mailbox::Mailbox,
    msr::Msrs,
    tlb::{Tlb, TlbHandle},
    translate::{JumpTables, PageCopies, RecentBlocks},
    vm::Shared,
    xstate::XState,
};

/// One allocation per vCPU: what any thread may touch, and what belongs to the thread that runs it.
#[repr(C, align(64))]
pub struct Block {
    /// Reached by any thread.
    pub mailbox: Mailbox,
    /// The vCPU's software TLB.
    pub tlb: Tlb,
    /// Where indirect and cross-page jumps lead.
    pub jumps: JumpTables,
    /// Reached by the vCPU's thread alone.
    pub cpu: UnsafeCell<Cpu>,
}

/// A segment register with its hidden part. For `access` see `purlin_arch::x86_64::state::Segment::access`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// Base address.
    pub base: u64,
    /// Limit in bytes, granularity applied.
    pub limit: u32,
    /// Access rights in VMX's format: type 3:0, S 4, DPL 6:5, P 7, AVL 12, L 13, D/B 14, G 15, unusable 16.
    pub access: u32,
    /// Selector.
    pub selector: u16,
}

/// Bits of [`Segment::access`].
pub mod access {
    #![allow(missing_docs)]
    /// Accessed (code and data segments).
    pub const ACCESSED: u32 = 1 << 0;
    /// Writable (data) or readable (code).
    pub const RW: u32 = 1 << 1;
    /// Expand-down (data) or conforming (code).
    pub const DC: u32 = 1 << 2;
    /// Code segment.
    pub const CODE: u32 = 1 << 3;
    pub const S: u32 = 1 << 4;
    pub const DPL_SHIFT: u32 = 5;
    pub const DPL: u32 = 3 << 5;
    pub const P: u32 = 1 << 7;
    pub const L: u32 = 1 << 13;
    pub const DB: u32 = 1 << 14;
    pub const G: u32 = 1 << 15;
    pub const UNUSABLE: u32 = 1 << 16;
}

impl Segment {
    /// The descriptor privilege level.
    pub fn dpl(&self) -> u8 {
        ((self.access & access::DPL) >> access::DPL_SHIFT) as u8
    }

    /// Whether it is marked unusable (a null selector was loaded).
    pub fn unusable(&self) -> bool {
        self.access & access::UNUSABLE != 0
    }

    /// The D/B bit.
    pub fn db(&self) -> bool {
        self.access & access::DB != 0
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u16,
}

/// The runtime state of one vCPU. The order of the first fields is free: emitted code takes offsets from
/// `offset_of!`.
#[repr(C, align(64))]
pub struct Cpu {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15.
    pub gpr: [u64; 16],
    /// Offset in CS of the instruction to be executed (while one is emulated: of that instruction, until it is done).
    pub rip: u64,
    /// RFLAGS, bit 1 set. Emitted code keeps the status flags in the host's.
    pub rflags: u64,
    /// ES, CS, SS, DS, FS, GS.
    pub seg: [Segment; 6],
    /// What emitted code alone uses.
    pub emitted: crate::translate::EmittedState,
    /// LDTR.
    pub ldtr: Segment,
    /// TR.
    pub tr: Segment,
    /// GDTR.
    pub gdtr: Table,
    /// IDTR.
    pub idtr: Table,
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// IA32_EFER.
    pub efer: u64,
    /// XCR0.
    pub xcr0: u64,
    /// DR0 to DR3.
    pub dr: [u64; 4],
    /// DR6.
    pub dr6: u64,
    /// DR7.
    pub dr7: u64,
    /// PAE page-directory pointers, loaded by MOV CR3 under PAE paging.
    pub pdptes: [u64; 4],
    /// Current privilege level. Equal to SS.DPL in protected mode, 0 in real mode, 3 in virtual-8086 mode.
    pub cpl: u8,
    /// STI was the last instruction: no interrupt before the end of the next.
    pub sti_shadow: bool,
    /// SS was loaded by the last instruction: no interrupt or debug trap before the end of the next.
    pub mov_ss_shadow: bool,
    /// An event that was on its way when the state was saved; it comes before everything else.
    pub injected: Option<Event>,
    /// An NMI waits to be delivered.
    pub nmi_pending: bool,
    /// An NMI is being handled (until IRET).
    pub nmi_masked: bool,
    /// DR6 bits of a debug trap that waits for the end of the instruction under way (data breakpoint, task switch's T
    /// bit). The run loop delivers it, and single-steps by itself.
    pub pending_debug: u64,
    /// Whether it executes instructions.
    pub activity: Activity,
    /// x87 and vector state; what emitted code works on is loaded from here and saved back.
    pub xstate: XState,
    /// Model-specific registers without a field of their own.
    pub msrs: Msrs,
    /// The local APIC.
    pub lapic: Lapic,
    /// The time stamp counter and kvmclock.
    pub clock: GuestClock,
    /// What CPUID answers.
    pub cpuid: Arc<Vec<CpuidEntry>>,
    /// What follows from it.
    pub features: Features,
    /// Its number, which is its initial APIC ID.
    pub index: u32,
    /// The software TLB.
    pub tlb: TlbHandle,
    /// What it shares with the other vCPUs of the VM.
    pub shared: Arc<Shared>,
    /// What it has translated from lately.
    pub copies: PageCopies,
    /// Blocks that it has found lately.
    pub recent: RecentBlocks,
    /// The bus of the run under way.
    pub(crate) bus: Option<*const dyn Bus>,
    /// A bus access answered `After::Leave`: the run ends before the next instruction.
    pub leave: bool,
}

impl Cpu {
    /// Whether long mode is active (IA32_EFER.LMA).
    pub fn long_mode(&self) -> bool {
        self.efer & efer::LMA != 0
    }

    /// Whether 64-bit code runs (long mode, CS.L).
    pub fn code64(&self) -> bool {
        self.long_mode() && self.seg[seg::CS].access & access::L != 0
    }

    /// Whether protected mode is on (CR0.PE), virtual-8086 mode included.
    pub fn protected(&self) -> bool {
        self.cr0 & cr0::PE != 0
    }

    /// Whether it is in virtual-8086 mode.
    pub fn v86(&self) -> bool {
        self.rflags & rflags::VM != 0
    }

    /// Whether paging is on.
    pub fn paging(&self) -> bool {
        self.cr0 & cr0::PG != 0
    }

    /// The I/O privilege level.
    pub fn iopl(&self) -> u8 {
        ((self.rflags & rflags::IOPL) >> rflags::IOPL_SHIFT) as u8
    }

    /// Whether SMAP keeps supervisor code from user pages now.
    pub fn smap_active(&self) -> bool {
        self.cr4 & cr4::SMAP != 0 && self.rflags & rflags::AC == 0
    }

    /// The bus of the run under way; nobody answers outside of one.
    pub fn bus(&self) -> &dyn Bus {
        match self.bus {
            // SAFETY: `Vcpu::run` sets the pointer from a reference that outlives the run and clears it at its end.
            #[allow(unsafe_code)]
            Some(bus) => unsafe { &*bus },
            None => &crate::mem::NoBus,
        }
    }
}
