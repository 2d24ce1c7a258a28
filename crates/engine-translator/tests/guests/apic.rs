//! What guests' code needs to program the local APIC.

use iced_x86::{IcedError, code_asm::*};
use purlin_arch::x86_64::msr;

type Result = std::result::Result<(), IcedError>;

// x2APIC registers as MSRs (SDM vol. 3A table 11-6).
pub const TPR: u32 = 0x808;
pub const EOI: u32 = 0x80b;
pub const SVR: u32 = 0x80f;
pub const ICR: u32 = 0x830;
pub const LVT_TIMER: u32 = 0x832;
pub const LVT_LINT0: u32 = 0x835;
pub const INITIAL_COUNT: u32 = 0x838;
pub const CURRENT_COUNT: u32 = 0x839;
pub const DIVIDE: u32 = 0x83e;
pub const SELF_IPI: u32 = 0x83f;

/// WRMSR of a constant. Changes EAX, ECX and EDX.
pub fn wrmsr(a: &mut CodeAssembler, index: u32, value: u64) -> Result {
    a.mov(ecx, index)?;
    a.mov(eax, value as u32)?;
    a.mov(edx, (value >> 32) as u32)?;
    a.wrmsr()
}

/// Enables the local APIC, in x2APIC mode.
pub fn x2apic(a: &mut CodeAssembler) -> Result {
    a.mov(ecx, msr::APIC_BASE)?;
    a.rdmsr()?;
    a.or(eax, 0xc00)?;
    a.wrmsr()?;
    wrmsr(a, SVR, 0x1ff)
}
