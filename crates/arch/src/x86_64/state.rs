//! The saved state of an x86-64 vCPU: the same form for every engine.
//!
//! A VM saved under one engine resumes under another, so nothing here is an engine's own. Whatever the SDM calls
//! architectural is here; caches, translations and TLBs are not.

use prost::Message;
use purlin_state::Saved;

use super::cpuid::CpuidEntry;

/// A vCPU between two instructions.
#[derive(Clone, PartialEq, Message)]
pub struct VcpuState {
    /// General registers, RIP, RFLAGS.
    #[prost(message, required, tag = "1")]
    pub regs: Regs,
    /// Segments, tables, control and debug registers.
    #[prost(message, required, tag = "2")]
    pub system: SystemRegs,
    /// Model-specific registers, those of [`super::msr::SAVED`] that the vCPU has, any order.
    #[prost(message, repeated, tag = "3")]
    pub msrs: Vec<Msr>,
    /// XCR0.
    #[prost(uint64, tag = "4")]
    pub xcr0: u64,
    /// x87, SSE, AVX and AVX-512 state: an XSAVE area in the standard (non-compacted) format (SDM vol. 1 13.4), with
    /// the offsets that leaf 0xD in `cpuid` gives, which are those of the vendor's processors (AVX at 576; opmask,
    /// ZMM_Hi256 and Hi16_ZMM at 1088, 1152 and 1664 on Intel's, at 832, 896 and 1408 on AMD's). Components not in
    /// XSTATE_BV are in their initial state; bytes beyond the last one that is present may be left out.
    #[prost(bytes = "vec", tag = "5")]
    pub xsave: Vec<u8>,
    /// The local APIC.
    #[prost(message, required, tag = "6")]
    pub lapic: super::lapic::LapicState,
    /// Whether the vCPU executes instructions.
    #[prost(enumeration = "Activity", tag = "7")]
    pub activity: i32,
    /// What is on its way to be delivered, and what holds it back.
    #[prost(message, required, tag = "8")]
    pub events: Events,
    /// Guest TSC at the moment of saving. On restore it goes on from here without a step.
    #[prost(uint64, tag = "9")]
    pub tsc: u64,
    /// The processor that the guest sees.
    #[prost(message, repeated, tag = "10")]
    pub cpuid: Vec<CpuidEntry>,
}

impl Saved for VcpuState {
    const NAME: &'static str = "vcpu";
    const VERSION: u32 = 1;
}

/// General registers.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Regs {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15: always 16.
    #[prost(fixed64, repeated, tag = "1")]
    pub gpr: Vec<u64>,
    /// Address of the next instruction (the offset in CS).
    #[prost(fixed64, tag = "2")]
    pub rip: u64,
    /// RFLAGS, bit 1 set.
    #[prost(fixed64, tag = "3")]
    pub rflags: u64,
}

/// Segments, tables, control and debug registers.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct SystemRegs {
    /// ES, CS, SS, DS, FS, GS: always 6.
    #[prost(message, repeated, tag = "1")]
    pub segments: Vec<Segment>,
    /// LDTR.
    #[prost(message, required, tag = "2")]
    pub ldtr: Segment,
    /// TR.
    #[prost(message, required, tag = "3")]
    pub tr: Segment,
    /// GDTR.
    #[prost(message, required, tag = "4")]
    pub gdtr: Table,
    /// IDTR.
    #[prost(message, required, tag = "5")]
    pub idtr: Table,
    /// CR0.
    #[prost(uint64, tag = "6")]
    pub cr0: u64,
    /// CR2.
    #[prost(fixed64, tag = "7")]
    pub cr2: u64,
    /// CR3.
    #[prost(fixed64, tag = "8")]
    pub cr3: u64,
    /// CR4.
    #[prost(uint64, tag = "9")]
    pub cr4: u64,
    /// CR8 is in the LAPIC's TPR. IA32_EFER.
    #[prost(uint64, tag = "10")]
    pub efer: u64,
    /// DR0 to DR3: always 4.
    #[prost(fixed64, repeated, tag = "11")]
    pub dr: Vec<u64>,
    /// DR6.
    #[prost(uint64, tag = "12")]
    pub dr6: u64,
    /// DR7.
    #[prost(uint64, tag = "13")]
    pub dr7: u64,
    /// The four PAE page-directory pointers as loaded by MOV CR3 (SDM vol. 3A 4.4.1); empty outside PAE paging.
    #[prost(fixed64, repeated, tag = "14")]
    pub pdptes: Vec<u64>,
}

/// A segment register with its hidden part.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Segment {
    /// Selector.
    #[prost(uint32, tag = "1")]
    pub selector: u32,
    /// Base address.
    #[prost(fixed64, tag = "2")]
    pub base: u64,
    /// Limit in bytes, granularity already applied (0xffff_ffff for a flat segment).
    #[prost(uint32, tag = "3")]
    pub limit: u32,
    /// Access rights as VMX keeps them (SDM vol. 3C 24.4.1): bits 3:0 type, 4 S, 6:5 DPL, 7 P, 12 AVL, 13 L, 14 D/B,
    /// 15 G, 16 unusable.
    #[prost(uint32, tag = "4")]
    pub access: u32,
}

/// GDTR or IDTR.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Table {
    /// Linear base address.
    #[prost(fixed64, tag = "1")]
    pub base: u64,
    /// Limit in bytes, 16 bits.
    #[prost(uint32, tag = "2")]
    pub limit: u32,
}

/// A model-specific register.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Msr {
    /// Its index (what ECX holds for RDMSR).
    #[prost(uint32, tag = "1")]
    pub index: u32,
    /// Its value.
    #[prost(fixed64, tag = "2")]
    pub value: u64,
}

/// Whether a vCPU executes instructions (SDM vol. 3A 8.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum Activity {
    /// It runs.
    Running = 0,
    /// HLT was executed; an interrupt wakes it.
    Halted = 1,
    /// An application processor that waits for INIT, or one that INIT has reset and that waits for SIPI.
    WaitForSipi = 2,
}

/// What is on its way to be delivered, and what holds it back.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Events {
    /// An exception that was raised but not yet delivered: its vector plus one, 0 for none.
    #[prost(uint32, tag = "1")]
    pub exception_plus_one: u32,
    /// Its error code, if it has one.
    #[prost(uint32, optional, tag = "2")]
    pub error_code: Option<u32>,
    /// An external interrupt already taken from the controller but not yet delivered: its vector plus one, 0 for none.
    #[prost(uint32, tag = "3")]
    pub interrupt_plus_one: u32,
    /// An NMI waits.
    #[prost(bool, tag = "4")]
    pub nmi_pending: bool,
    /// An NMI is being handled (until IRET).
    #[prost(bool, tag = "5")]
    pub nmi_masked: bool,
    /// The last instruction was STI: interrupts wait for the end of this one.
    #[prost(bool, tag = "6")]
    pub sti_shadow: bool,
    /// The last instruction loaded SS: interrupts and debug traps wait for the end of this one.
    #[prost(bool, tag = "7")]
    pub mov_ss_shadow: bool,
    /// A single-step or breakpoint trap waits: the bits for DR6.
    #[prost(uint32, tag = "8")]
    pub pending_debug: u32,
}
