//! Whether x87, MMX, SSE, AVX and AVX-512 instructions may be executed now (SDM vol. 3A 2.5 and 13.1; vol. 2A 2.4 to
//! 2.8 for the exception classes).

use iced_x86::{CpuidFeature, EncodingKind, Instruction, Mnemonic, OpKind, Register};
use purlin_arch::x86_64::regs::{cr0, cr4, xcr0};

use crate::{
    cpu::Cpu,
    exception::{Exception, vector},
};

/// x87: #NM with CR0.EM or CR0.TS; WAIT only with both MP and TS (SDM vol. 3A table 9-3).
pub fn check_x87(cpu: &Cpu, insn: &Instruction) -> Result<(), Exception> {
    let blocked = match insn.mnemonic() {
        Mnemonic::Wait => cpu.cr0 & (cr0::MP | cr0::TS) == cr0::MP | cr0::TS,
        _ => cpu.cr0 & (cr0::EM | cr0::TS) != 0,
    };
    if blocked { Err(Exception::NM) } else { Ok(()) }
}

/// MMX: #UD with CR0.EM, then #NM with CR0.TS, then a pending x87 exception.
pub fn check_mmx(cpu: &Cpu, _insn: &Instruction) -> Result<(), Exception> {
    if cpu.cr0 & cr0::EM != 0 {
        return Err(Exception::UD);
    }
    check_task_switched(cpu)?;
    check_pending_x87(cpu)
}

/// Legacy SSE: #UD with CR0.EM or without CR4.OSFXSR, then #NM with CR0.TS.
pub fn check_sse(cpu: &Cpu, _insn: &Instruction) -> Result<(), Exception> {
    if cpu.cr0 & cr0::EM != 0 || cpu.cr4 & cr4::OSFXSR == 0 {
        return Err(Exception::UD);
    }
    check_task_switched(cpu)
}

/// VEX and EVEX: #UD in real and virtual-8086 mode, without CR4.OSXSAVE, or where XCR0 lacks SSE or AVX; then #NM with CR0.TS.
/// CR0.EM does not matter.
/// EVEX and the instructions on opmask registers need the components of AVX-512 too.
pub fn check_avx(cpu: &Cpu, insn: &Instruction) -> Result<(), Exception> {
    let components = match class(insn) {
        Class::Avx512 => xcr0::SSE | xcr0::AVX | xcr0::AVX512,
        _ => xcr0::SSE | xcr0::AVX,
    };
    check_vector_extension(cpu, components)
}

fn check_vector_extension(cpu: &Cpu, components: u64) -> Result<(), Exception> {
    let enabled = cpu.cr4 & cr4::OSXSAVE != 0 && cpu.xcr0 & components == components;
    if !cpu.protected() || cpu.v86() || !enabled {
        return Err(Exception::UD);
    }
    check_task_switched(cpu)
}

pub(super) fn check_task_switched(cpu: &Cpu) -> Result<(), Exception> {
    if cpu.cr0 & cr0::TS != 0 { Err(Exception::NM) } else { Ok(()) }
}

/// #MF if an unmasked x87 exception waits. Without CR0.NE the processor would signal it on a pin that a PC turns into
/// IRQ 13; nobody is there to listen, and the exception waits on.
pub fn check_pending_x87(cpu: &Cpu) -> Result<(), Exception> {
    if cpu.cr0 & cr0::NE != 0 && cpu.xstate.x87_exception_pending() {
        return Err(Exception::plain(vector::MF));
    }
    Ok(())
}

/// The checks that `insn` needs, whatever its class; none for instructions that use no x87 or vector state.
pub fn check_fpu(cpu: &Cpu, insn: &Instruction) -> Result<(), Exception> {
    match class(insn) {
        Class::None => Ok(()),
        Class::VexGeneral if !cpu.protected() || cpu.v86() => Err(Exception::UD),
        Class::VexGeneral => Ok(()),
        Class::X87 => check_x87(cpu, insn),
        Class::Mmx => check_mmx(cpu, insn),
        Class::Sse => check_sse(cpu, insn),
        Class::SseAndMmx => {
            check_sse(cpu, insn)?;
            check_pending_x87(cpu)
        }
        Class::Avx | Class::Avx512 => check_avx(cpu, insn),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    None,
    /// VEX-encoded on general registers (BMI): not in real and virtual-8086 mode.
    VexGeneral,
    X87,
    Mmx,
    Sse,
    /// SSE instructions that have an MMX operand too (conversions).
    SseAndMmx,
    Avx,
    Avx512,
}

fn class(insn: &Instruction) -> Class {
    let registers =
        || (0..insn.op_count()).filter(|op| insn.op_kind(*op) == OpKind::Register).map(|op| insn.op_register(op));
    let uses = |is: fn(Register) -> bool| registers().any(is);
    match insn.encoding() {
        EncodingKind::EVEX | EncodingKind::MVEX => Class::Avx512,
        EncodingKind::VEX | EncodingKind::XOP => {
            if uses(Register::is_k) {
                Class::Avx512
            } else if uses(Register::is_vector_register) || is_vex_without_register(insn.mnemonic()) {
                Class::Avx
            } else {
                Class::VexGeneral
            }
        }
        EncodingKind::D3NOW => Class::Mmx,
        _ => {
            let (xmm, mmx) = (uses(Register::is_xmm), uses(Register::is_mm));
            match (xmm, mmx) {
                (true, true) => Class::SseAndMmx,
                (true, false) => Class::Sse,
                (false, true) => Class::Mmx,
                _ => class_without_register(insn),
            }
        }
    }
}

fn is_vex_without_register(mnemonic: Mnemonic) -> bool {
    matches!(mnemonic, Mnemonic::Vzeroupper | Mnemonic::Vzeroall | Mnemonic::Vldmxcsr | Mnemonic::Vstmxcsr)
}

/// x87 instructions have their stack as an implied operand; a few of the others have none.
fn class_without_register(insn: &Instruction) -> Class {
    match insn.mnemonic() {
        Mnemonic::Ldmxcsr | Mnemonic::Stmxcsr => return Class::Sse,
        Mnemonic::Emms | Mnemonic::Femms => return Class::Mmx,
        Mnemonic::Wait => return Class::X87,
        _ => {}
    }
    let x87 = [
        CpuidFeature::FPU,
        CpuidFeature::FPU287,
        CpuidFeature::FPU287XL_ONLY,
        CpuidFeature::FPU387,
        CpuidFeature::FPU387SL_ONLY,
    ];
    if insn.cpuid_features().iter().any(|feature| x87.contains(feature)) { Class::X87 } else { Class::None }
}
