//! FXSAVE, FXRSTOR, LDMXCSR and STMXCSR (SDM vol. 1 10.5; APM vol. 2 11.4.4 for AMD's error pointers).

use std::{ops::Range, sync::OnceLock};

use iced_x86::{Instruction, Mnemonic};
use purlin_arch::x86_64::{
    cpuid::{CpuidEntry, Vendor, lookup, vendor},
    regs::{cr0, cr4},
};

use super::{
    MXCSR_INIT, XState, checks,
    memory::{Operand, UNIT, XMM_UNIT},
    offset,
};
use crate::{cpu::Cpu, exception::Exception, mem::Access};

/// Size of the image that FXSAVE writes and FXRSTOR reads.
const IMAGE: usize = 512;
/// Bits of the status word: an unmasked exception waits.
const FSW_ES: u16 = 1 << 7;
const FOP_MASK: u16 = 0x7ff;

/// The bits that MXCSR can have on a processor with these leaves.
pub fn mxcsr_mask(cpuid: &[CpuidEntry]) -> u32 {
    const MISALIGNED: u32 = 1 << 17;
    let misaligned = lookup(cpuid, 0x8000_0001, 0)[2] & 1 << 7 != 0;
    host_mxcsr_mask() & if misaligned { !0 } else { !MISALIGNED }
}

/// What the host's FXSAVE says of it: 0xffff, with bit 17 too on AMD's processors.
#[allow(unsafe_code)]
fn host_mxcsr_mask() -> u32 {
    static MASK: OnceLock<u32> = OnceLock::new();
    *MASK.get_or_init(|| {
        #[repr(align(16))]
        struct Image([u8; IMAGE]);
        let mut image = Image([0; IMAGE]);
        // SAFETY: every x86-64 processor has FXSAVE; the image is of the right size and alignment.
        unsafe { core::arch::x86_64::_fxsave64(image.0.as_mut_ptr()) };
        let at = offset::MXCSR_MASK;
        match u32::from_le_bytes([image.0[at], image.0[at + 1], image.0[at + 2], image.0[at + 3]]) {
            0 => 0xffbf,
            mask => mask,
        }
    })
}

/// The upper bits of FIP and of FDP that the host's FXRSTOR makes canonical: 16, 7 where addresses could have 57 bits (which CPUID
/// does not tell if a hypervisor has hidden LA57), or none. They may differ: Sapphire Rapids keeps all of FDP.
pub fn pointer_sign_bits() -> [u32; 2] {
    static BITS: OnceLock<[u32; 2]> = OnceLock::new();
    *BITS.get_or_init(|| {
        const SIGN_48: u64 = 1 << 47;
        const SIGN_57: u64 = 1 << 56;
        let (of_48, of_57) = (loaded_pointers(SIGN_48), loaded_pointers(SIGN_57));
        std::array::from_fn(|i| match (of_48[i] == SIGN_48, of_57[i] == SIGN_57) {
            (false, _) => 16,
            (true, false) => 7,
            (true, true) => 0,
        })
    })
}

/// What FIP and FDP are on the host after each was loaded with `pointer`.
#[allow(unsafe_code)]
fn loaded_pointers(pointer: u64) -> [u64; 2] {
    #[repr(align(16))]
    struct Image([u8; IMAGE]);
    let [mut saved, mut probe, mut found] = [const { Image([0; IMAGE]) }; 3];
    // An unmasked exception waits: without one, AMD's processors save no pointers.
    let words = [(offset::FCW, 0x37e), (offset::FSW, u64::from(FSW_ES) | 1), (offset::MXCSR, u64::from(MXCSR_INIT))];
    for (at, value) in words.into_iter().chain([(offset::FIP, pointer), (offset::FDP, pointer)]) {
        let size = if at < offset::FIP { 2 } else { 8 };
        probe.0[at..at + size].copy_from_slice(&value.to_le_bytes()[..size]);
    }
    // SAFETY: images of the right size and alignment; the registers are the same behind it as before.
    unsafe {
        std::arch::asm!(
            "fxsave64 [{saved}]",
            "fxrstor64 [{probe}]",
            "fxsave64 [{found}]",
            "fxrstor64 [{saved}]",
            saved = in(reg) saved.0.as_mut_ptr(),
            probe = in(reg) probe.0.as_ptr(),
            found = in(reg) found.0.as_mut_ptr(),
            options(nostack, preserves_flags),
        );
    }
    [offset::FIP, offset::FDP].map(|at| u64::from_le_bytes(found.0[at..at + 8].try_into().unwrap_or_default()))
}

/// How FIP and FDP look in an image: 64 bits with REX.W, else 32 with selectors, which are always zero here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pointers {
    Bits32,
    Bits64,
}

/// What becomes of FOP, FIP and FDP while no exception waits (FSW.ES clear).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IdlePointers {
    /// They are saved and restored all the same: Intel.
    #[default]
    Kept,
    /// Zeros are saved, whatever they are; they are restored. AMD with CPUID.8000_0008.EBX bit 2.
    SavedAsZero,
    /// They are neither saved nor restored. Older processors of AMD.
    Skipped,
}

/// What a processor with these leaves does.
pub fn idle_pointers(cpuid: &[CpuidEntry]) -> IdlePointers {
    let saves = lookup(cpuid, 0x8000_0008, 0)[1] & 1 << 2 != 0;
    match (vendor(cpuid), saves) {
        (Vendor::Intel, _) => IdlePointers::Kept,
        (Vendor::Amd, true) => IdlePointers::SavedAsZero,
        (Vendor::Amd, false) => IdlePointers::Skipped,
    }
}

/// The x87 part of an image: bytes 0 to 23 into `image`, whose old contents stay where nothing is saved.
pub(super) fn put_x87_control(cpu: &mut Cpu, image: &mut [u8], pointers: Pointers) {
    let idle = cpu.features.idle_pointers;
    let state = &mut cpu.xstate;
    state.materialise_for_reading();
    if idle == IdlePointers::Kept {
        state.settle_pointers();
    }
    image[..offset::FOP].copy_from_slice(&state.area[..offset::FOP]);
    let [fop, fip, fdp] = match (state.u16(offset::FSW) & FSW_ES != 0, idle, pointers) {
        (false, IdlePointers::Skipped, _) => return,
        (false, IdlePointers::SavedAsZero, _) => [0; 3],
        (_, _, Pointers::Bits64) => [state.fop, state.fip, state.fdp],
        (_, _, Pointers::Bits32) => {
            let far = |selector: u16, offset: u64| u64::from(selector) << 32 | offset & 0xffff_ffff;
            [state.fop, far(state.fcs, state.fip), far(state.fds, state.fdp)]
        }
    };
    image[offset::FOP..offset::FOP + 2].copy_from_slice(&(fop as u16 & FOP_MASK).to_le_bytes());
    image[offset::FIP..offset::FIP + 8].copy_from_slice(&fip.to_le_bytes());
    image[offset::FDP..offset::FDP + 8].copy_from_slice(&fdp.to_le_bytes());
}

/// Takes over the x87 part of an image, registers included.
pub(super) fn take_x87(cpu: &mut Cpu, image: &[u8], pointers: Pointers) {
    let idle = cpu.features.idle_pointers;
    let state = &mut cpu.xstate;
    state.materialise(0);
    state.area[..offset::FOP].copy_from_slice(&image[..offset::FOP]);
    state.area[offset::FTW + 1] = 0;
    state.area[offset::ST..offset::XMM].copy_from_slice(&image[offset::ST..offset::XMM]);
    // A register has ten bytes of its sixteen; a processor saves zeros behind them, whatever was loaded.
    state.area[offset::ST..offset::XMM].chunks_exact_mut(16).for_each(|register| register[10..].fill(0));
    if idle == IdlePointers::Skipped && state.u16(offset::FSW) & FSW_ES == 0 {
        return;
    }
    let number = |at: usize| u64::from_le_bytes(image[at..at + 8].try_into().unwrap_or_default());
    let canonical = |pointer: u64, unused: u32| ((pointer << unused) as i64 >> unused) as u64;
    let [of_fip, of_fdp] = cpu.features.pointer_sign_bits;
    let (fip, fdp) = (canonical(number(offset::FIP), of_fip), canonical(number(offset::FDP), of_fdp));
    let fop = number(offset::FOP) & u64::from(FOP_MASK);
    let (fip, fdp, fcs, fds) = match pointers {
        Pointers::Bits64 => (fip, fdp, 0, 0),
        Pointers::Bits32 => (fip & 0xffff_ffff, fdp & 0xffff_ffff, (fip >> 32) as u16, (fdp >> 32) as u16),
    };
    state.set_pointers(fip, fdp, fop);
    (state.fcs, state.fds) = if cpu.features.no_pointer_selectors { (0, 0) } else { (fcs, fds) };
}

impl XState {
    /// Makes the x87 bytes valid without marking the component as in use.
    pub(super) fn materialise_for_reading(&mut self) {
        if self.in_use() & 1 == 0 {
            self.write_initial(0);
        }
    }
}

/// Number of XMM register bytes that an instruction moves: sixteen registers in 64-bit mode, else eight; none if the
/// system does not know of them.
fn xmm_bytes(cpu: &Cpu) -> usize {
    match (cpu.cr4 & cr4::OSFXSR != 0, cpu.code64()) {
        (false, _) => 0,
        (true, true) => 256,
        (true, false) => 128,
    }
}

fn image(cpu: &mut Cpu, insn: &Instruction, access: Access) -> Result<Operand, Exception> {
    if cpu.cr0 & (cr0::EM | cr0::TS) != 0 {
        return Err(Exception::NM);
    }
    Operand::of(cpu, insn, IMAGE, 16, access)
}

/// The parts of an image, and the bytes that are accessed as one in each: x87, XMM registers, what is not the instruction's.
fn parts(cpu: &Cpu) -> [(Range<usize>, usize); 3] {
    let end = offset::XMM + xmm_bytes(cpu);
    [(0..offset::XMM, UNIT), (offset::XMM..end, XMM_UNIT), (end..IMAGE, UNIT)]
}

fn read_image(cpu: &mut Cpu, operand: &Operand) -> Result<[u8; IMAGE], Exception> {
    let mut image = [0; IMAGE];
    for (part, unit) in parts(cpu) {
        operand.read(cpu, part.start, unit, &mut image[part])?;
    }
    Ok(image)
}

fn pointers(insn: &Instruction) -> Pointers {
    match insn.mnemonic() {
        Mnemonic::Fxsave64 | Mnemonic::Fxrstor64 => Pointers::Bits64,
        _ => Pointers::Bits32,
    }
}

/// FXSAVE.
pub fn fxsave(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Exception> {
    let operand = image(cpu, insn, Access::Write)?;
    for (part, unit) in parts(cpu) {
        operand.probe(cpu, part.start, unit, part.len())?;
    }
    let mut image = read_image(cpu, &operand)?;

    put_x87_control(cpu, &mut image, pointers(insn));
    image[offset::ST..offset::XMM].copy_from_slice(&cpu.xstate.area[offset::ST..offset::XMM]);
    let xmm = xmm_bytes(cpu);
    if xmm != 0 {
        let mask = cpu.features.mxcsr;
        image[offset::MXCSR..offset::MXCSR + 4].copy_from_slice(&cpu.xstate.mxcsr().to_le_bytes());
        image[offset::MXCSR_MASK..offset::MXCSR_MASK + 4].copy_from_slice(&mask.to_le_bytes());
        let range = offset::XMM..offset::XMM + xmm;
        match cpu.xstate.in_use() & 2 {
            0 => image[range].fill(0),
            _ => image[range.clone()].copy_from_slice(&cpu.xstate.area[range]),
        }
    }
    let [x87, xmm, _] = parts(cpu);
    [x87, xmm].into_iter().try_for_each(|(part, unit)| operand.write(cpu, part.start, unit, &image[part]))
}

/// FXRSTOR.
pub fn fxrstor(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Exception> {
    let operand = image(cpu, insn, Access::Read)?;
    let image = read_image(cpu, &operand)?;

    let xmm = xmm_bytes(cpu);
    let mxcsr = u32::from_le_bytes(image[offset::MXCSR..offset::MXCSR + 4].try_into().unwrap_or_default());
    if xmm != 0 && mxcsr & !cpu.features.mxcsr != 0 {
        return Err(Exception::GP0);
    }
    take_x87(cpu, &image, pointers(insn));
    cpu.xstate.settle_x87();
    if xmm != 0 {
        cpu.xstate.set_mxcsr(mxcsr);
        cpu.xstate.materialise(1);
        let range = offset::XMM..offset::XMM + xmm;
        cpu.xstate.area[range.clone()].copy_from_slice(&image[range]);
    }
    Ok(())
}

/// LDMXCSR and its VEX form: #GP if a reserved bit is set.
pub fn ldmxcsr(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Exception> {
    checks::check_fpu(cpu, insn)?;
    let value = cpu.read_op(insn, 0)? as u32;
    if value & !cpu.features.mxcsr != 0 {
        return Err(Exception::GP0);
    }
    cpu.xstate.set_mxcsr(value);
    Ok(())
}

/// STMXCSR and its VEX form.
pub fn stmxcsr(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Exception> {
    checks::check_fpu(cpu, insn)?;
    let value = cpu.xstate.mxcsr();
    cpu.write_op(insn, 0, u64::from(value))
}
