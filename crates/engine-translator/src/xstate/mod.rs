//! x87, SSE, AVX and AVX-512 state, and the instructions that save, restore or check it.

mod checks;
mod environment;
mod fxsave;
mod layout;
mod masked;
mod memory;
mod saved;
#[cfg(test)]
mod tests;
mod xsave;

pub use checks::{check_avx, check_fpu, check_mmx, check_pending_x87, check_sse, check_x87};
pub use environment::execute as environment;
pub use fxsave::{IdlePointers, fxrstor, fxsave, idle_pointers, ldmxcsr, mxcsr_mask, pointer_sign_bits, stmxcsr};
use iced_x86::{Instruction, Mnemonic};
pub use layout::Layout;
pub use masked::execute as masked;
use purlin_arch::x86_64::regs::xcr0;
pub use saved::{restore, save};
pub use xsave::{Form, execute as xsave, quickly as xsave_quickly};

use crate::{cpu::Cpu, exception::Exception};

/// Size of [`XState::area`]: enough for every layout in use.
pub const AREA: usize = 2688;

/// Offsets in the legacy region and the header (SDM vol. 1 10.5.1 and 13.4).
mod offset {
    pub const FCW: usize = 0;
    pub const FSW: usize = 2;
    /// The abridged tag word: a bit for each physical register that is not empty.
    pub const FTW: usize = 4;
    pub const FOP: usize = 6;
    pub const FIP: usize = 8;
    pub const FDP: usize = 16;
    pub const MXCSR: usize = 24;
    pub const MXCSR_MASK: usize = 28;
    /// ST(0) to ST(7), 16 bytes each.
    pub const ST: usize = 32;
    pub const XMM: usize = 160;
    pub const LEGACY_END: usize = 512;
    pub const XSTATE_BV: usize = 512;
    pub const HEADER_END: usize = 576;
}

/// Control word after FNINIT: all exceptions masked, 64 bits of precision, round to nearest.
const FCW_INIT: u16 = 0x37f;
/// All exceptions masked, round to nearest.
const MXCSR_INIT: u32 = 0x1f80;

/// The registers in the XSAVE area's standard format, as the host's XSAVE writes it and its XRSTOR takes it (SDM vol. 1
/// 13.4): legacy region, header, extended components where the host's CPUID leaf 0xD puts them ([`Layout::host`]).
/// XCOMP_BV is zero.
///
/// A component whose XSTATE_BV bit is clear is in its initial state, whatever its bytes are. MXCSR is always valid.
#[derive(Clone)]
#[repr(C, align(64))]
pub struct XState {
    /// The area.
    pub area: [u8; AREA],
    /// x87 instruction pointer, data pointer and opcode of the last non-control x87 instruction: the area's own
    /// fields hold addresses of the translator's.
    pub fip: u64,
    /// See `fip`. Intel's processors keep this one and FOP of the last instruction only that raised an unmasked exception:
    /// see [`XState::settle_pointers`].
    pub fdp: u64,
    /// See `fip`: FOP, 11 bits.
    pub fop: u64,
    /// FDP and FOP, as they were settled last.
    pub settled: [u64; 2],
    /// Selectors of `fip` and `fdp`, as far as software has loaded them: x87 instructions do not record theirs, which
    /// is how processors with CPUID.7.EBX bit 13 behave.
    pub fcs: u16,
    /// See `fcs`.
    pub fds: u16,
}

impl Default for XState {
    fn default() -> Self {
        let mut state = Self { area: [0; AREA], fip: 0, fdp: 0, fop: 0, settled: [0; 2], fcs: 0, fds: 0 };
        state.set_u16(offset::FCW, FCW_INIT);
        state.set_u32(offset::MXCSR, MXCSR_INIT);
        state
    }
}

impl XState {
    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.area[at], self.area[at + 1]])
    }

    fn set_u16(&mut self, at: usize, value: u16) {
        self.area[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from(self.u16(at)) | u32::from(self.u16(at + 2)) << 16
    }

    fn set_u32(&mut self, at: usize, value: u32) {
        self.area[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }

    /// XSTATE_BV: the components that are not in their initial state.
    pub fn in_use(&self) -> u64 {
        u64::from(self.u32(offset::XSTATE_BV)) | u64::from(self.u32(offset::XSTATE_BV + 4)) << 32
    }

    pub(crate) fn set_in_use(&mut self, components: u64) {
        self.area[offset::XSTATE_BV..offset::XSTATE_BV + 8].copy_from_slice(&components.to_le_bytes());
    }

    /// MXCSR.
    pub fn mxcsr(&self) -> u32 {
        self.u32(offset::MXCSR)
    }

    fn set_mxcsr(&mut self, value: u32) {
        self.set_u32(offset::MXCSR, value);
    }

    /// Puts a component into its initial state.
    fn initialise(&mut self, component: u32) {
        self.set_in_use(self.in_use() & !(1 << component));
        self.write_initial(component);
    }

    /// Makes a component's bytes valid, so that they can be read or changed.
    fn materialise(&mut self, component: u32) {
        if self.in_use() & 1 << component == 0 {
            self.write_initial(component);
            self.set_in_use(self.in_use() | 1 << component);
        }
    }

    fn write_initial(&mut self, component: u32) {
        match component {
            0 => {
                self.area[..offset::MXCSR].fill(0);
                self.area[offset::ST..offset::XMM].fill(0);
                self.set_u16(offset::FCW, FCW_INIT);
                self.clear_pointers();
            }
            _ => {
                if let Some(range) = Layout::host().range(component) {
                    self.area[range].fill(0);
                }
            }
        }
    }

    /// The bytes of an extended component or of the XMM registers (component 1), made valid.
    fn component(&mut self, component: u32) -> Option<&mut [u8]> {
        let range = Layout::host().range(component)?;
        self.materialise(component);
        self.area.get_mut(range)
    }

    /// The x87 control word.
    pub fn fcw(&mut self) -> u16 {
        self.materialise(0);
        self.u16(offset::FCW)
    }

    /// The x87 status word.
    pub fn fsw(&mut self) -> u16 {
        self.materialise(0);
        self.u16(offset::FSW)
    }

    /// Whether an unmasked x87 exception waits for the next x87 instruction.
    pub fn x87_exception_pending(&self) -> bool {
        const ES: u16 = 1 << 7;
        self.in_use() & xcr0::X87 != 0 && self.u16(offset::FSW) & ES != 0
    }

    /// The lowest `size` bytes (16, 32 or 64) of vector register `number`; the rest of what is returned is zero.
    pub fn vector(&mut self, number: usize, size: usize) -> [u8; 64] {
        let mut value = [0; 64];
        for (component, part, at) in vector_parts(number) {
            let part = part.start..part.end.min(size);
            if !part.is_empty()
                && self.in_use() & 1 << component != 0
                && let Some(bytes) = self.component(component)
            {
                let n = part.len();
                value[part].copy_from_slice(&bytes[at..at + n]);
            }
        }
        value
    }

    /// Sets vector register `number`; bits above those of `value` become zero, as VEX and EVEX instructions have it.
    pub fn set_vector(&mut self, number: usize, value: &[u8]) {
        let mut whole = [0; 64];
        whole[..value.len()].copy_from_slice(value);
        for (component, part, at) in vector_parts(number) {
            let bytes = &whole[part];
            let initial = self.in_use() & 1 << component == 0;
            if initial && bytes.iter().all(|b| *b == 0) {
                continue;
            }
            if let Some(area) = self.component(component) {
                area[at..at + bytes.len()].copy_from_slice(bytes);
            }
        }
    }

    /// MMX register `number`: the mantissa of physical x87 register `number`.
    pub fn mmx(&mut self, number: usize) -> u64 {
        self.materialise(0);
        let top = usize::from(self.u16(offset::FSW) >> 11 & 7);
        let at = offset::ST + 16 * (number.wrapping_sub(top) & 7);
        u64::from(self.u32(at)) | u64::from(self.u32(at + 4)) << 32
    }

    fn clear_pointers(&mut self) {
        self.set_pointers(0, 0, 0);
        (self.fcs, self.fds) = (0, 0);
    }

    /// Sets FIP, FDP and FOP.
    pub fn set_pointers(&mut self, fip: u64, fdp: u64, fop: u64) {
        (self.fip, self.fdp, self.fop) = (fip, fdp, fop);
        self.settled = [fdp, fop];
    }

    /// FDP and FOP become what software can see, on a processor on which they are those of the last instruction that raised an
    /// unmasked exception (SDM vol. 1 8.1.8 and 8.1.9.1). Before anything reads them, or clears exceptions.
    pub fn settle_pointers(&mut self) {
        if self.x87_exception_pending() {
            self.settled = [self.fdp, self.fop];
        } else {
            [self.fdp, self.fop] = self.settled;
        }
    }

    /// Sets TOP while the registers keep their physical places: they are stored from ST(0) on.
    fn set_top(&mut self, top: u16) {
        let status = self.u16(offset::FSW);
        let distance = usize::from(top.wrapping_sub(status >> 11) & 7);
        self.area[offset::ST..offset::XMM].rotate_left(16 * distance);
        self.set_u16(offset::FSW, status & !0x3800 | (top & 7) << 11);
    }

    /// What an MMX instruction does to the rest of the x87 state: TOP is 0, no register is empty (SDM vol. 1 9.5).
    fn enter_mmx(&mut self) {
        self.materialise(0);
        self.set_top(0);
        self.area[offset::FTW] = 0xff;
    }

    /// What is left of that at a fault of the store of an MMX instruction: TOP is 0.
    pub fn enter_mmx_by_half(&mut self) {
        self.materialise(0);
        self.set_top(0);
    }

    /// Whether an unmasked exception waits with which an x87 instruction does not store: any but the one for precision (SDM vol. 1
    /// 8.5).
    pub fn keeps_from_storing(&self) -> bool {
        const BUT_PRECISION: u16 = 0x1f;
        self.x87_exception_pending() && self.u16(offset::FSW) & !self.u16(offset::FCW) & BUT_PRECISION != 0
    }

    /// What the processor makes of control and status words that it loads: reserved bits of the one have their fixed
    /// values, ES and B of the other say whether an unmasked exception waits (SDM vol. 1 8.1.3.3 and 8.1.5).
    fn settle_x87(&mut self) {
        const CONTROL: u16 = 0x1f3f;
        const CONTROL_FIXED: u16 = 0x40;
        const ES_AND_B: u16 = 0x8080;
        let control = self.u16(offset::FCW) & CONTROL | CONTROL_FIXED;
        let status = self.u16(offset::FSW) & !ES_AND_B;
        let waits = status & !control & 0x3f != 0;
        self.set_u16(offset::FCW, control);
        self.set_u16(offset::FSW, if waits { status | ES_AND_B } else { status });
    }

    /// Opmask register `number`.
    pub fn opmask(&mut self, number: usize) -> u64 {
        if self.in_use() & xcr0::OPMASK == 0 {
            return 0;
        }
        match self.component(5) {
            Some(bytes) => u64::from_le_bytes(bytes[8 * number..8 * number + 8].try_into().unwrap_or_default()),
            None => 0,
        }
    }

    /// Sets it.
    pub fn set_opmask(&mut self, number: usize, value: u64) {
        if let Some(bytes) = self.component(5) {
            bytes[8 * number..8 * number + 8].copy_from_slice(&value.to_le_bytes());
        }
    }
}

/// FNCLEX, on a processor whose pointers are to be settled before.
pub fn fnclex(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Exception> {
    const EXCEPTIONS: u16 = 0x80ff;
    check_x87(cpu, insn)?;
    cpu.xstate.settle_pointers();
    let status = cpu.xstate.fsw();
    cpu.xstate.set_u16(offset::FSW, status & !EXCEPTIONS);
    Ok(())
}

/// VZEROUPPER and VZEROALL outside of 64-bit mode, where there are eight registers: the host's own would change sixteen.
pub fn zero_vectors(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Exception> {
    check_avx(cpu, insn)?;
    let kept = if insn.mnemonic() == Mnemonic::Vzeroupper { 16 } else { 0 };
    for number in 0..8 {
        let value = cpu.xstate.vector(number, 16);
        cpu.xstate.set_vector(number, &value[..kept]);
    }
    Ok(())
}

/// Where the pieces of a vector register are: component, bytes of the register, offset in the component.
fn vector_parts(number: usize) -> impl Iterator<Item = (u32, std::ops::Range<usize>, usize)> {
    let low = number < 16;
    let parts = if low {
        [Some((1, 0..16, 16 * number)), Some((2, 16..32, 16 * number)), Some((6, 32..64, 32 * number))]
    } else {
        [Some((7, 0..64, 64 * (number - 16))), None, None]
    };
    parts.into_iter().flatten()
}
