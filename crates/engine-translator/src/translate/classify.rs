//! What is done with an instruction: an allow-list of those that the host executes as they are.

use iced_x86::{Code, CpuidFeature, EncodingKind, Instruction, Mnemonic, OpKind, Register};
use purlin_arch::x86_64::regs::seg;

use super::{mode::Mode, offered::offered, registers::control_field, source::AMD};
use crate::xstate::Form;

/// What the translator does with an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Copied, with its memory operand and registers rewritten.
    Copy,
    /// Copied, once the vector state that it needs is in the host's registers.
    Vector(Needs),
    /// Nothing is emitted.
    Nothing,
    /// PUSH of a general register, immediate or memory.
    Push,
    /// POP to a general register or memory.
    Pop,
    /// LEAVE.
    Leave,
    /// A direct near jump.
    Jump,
    /// A conditional near jump.
    JumpIf,
    /// LOOP, LOOPE, LOOPNE, JRCXZ, JECXZ.
    Loop,
    /// A direct near call.
    Call,
    /// A direct near call to behind a byte that is never returned to (see [`fills_returns`]).
    Filler,
    /// A near jump through a register or memory.
    JumpIndirect,
    /// A near call through a register or memory.
    CallIndirect,
    /// A near return.
    Return,
    /// CLI or STI at CPL 0, SWAPGS there, and PUSHFQ, with code of their own (see [`inlined`]).
    Cli,
    /// See [`Self::Cli`].
    Sti,
    /// See [`Self::Cli`].
    Swapgs,
    /// See [`Self::Cli`].
    Pushf,
    /// Others that are emulated in general and have code of their own in 64-bit mode (see `registers.rs`, `strings.rs`,
    /// `extended.rs`).
    Own(Own),
    /// Plain Rust deals with it, or finds that it is undefined.
    Emulate,
}

/// What has code of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Own {
    /// MOV of a selector to a general register.
    Selector,
    /// RDTSC, RDTSCP.
    TimeStamp,
    /// RDFSBASE, RDGSBASE.
    ReadBase,
    /// WRFSBASE, WRGSBASE.
    WriteBase,
    /// CLD, STD.
    Direction,
    /// MOV from a control register.
    ReadControl,
    /// MOVS and STOS.
    String,
    /// XSAVE, XSAVEOPT, XSAVEC and XRSTOR.
    ExtendedState,
}

/// Which vector state an instruction needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// x87 or MMX.
    pub x87: bool,
    /// SSE.
    pub sse: bool,
    /// AVX.
    pub avx: bool,
    /// AVX-512.
    pub avx512: bool,
    /// It is an x87 instruction that updates the last-instruction pointers.
    pub pointers: bool,
}

/// The class of `insn`, decoded with the given code size.
pub fn classify(insn: &Instruction, bits: u32) -> Class {
    if insn.code() == Code::INVALID {
        return Class::Emulate;
    }
    if let Some(class) = control(insn, bits) {
        return class;
    }
    if !offered(insn) {
        return Class::Emulate;
    }
    match insn.encoding() {
        EncodingKind::Legacy => legacy(insn),
        // Outside of 64-bit mode they change the first eight registers only.
        EncodingKind::VEX if bits != 64 && matches!(insn.mnemonic(), Mnemonic::Vzeroupper | Mnemonic::Vzeroall) => {
            Class::Emulate
        }
        EncodingKind::VEX => vex(insn),
        EncodingKind::EVEX => evex(insn),
        _ => Class::Emulate,
    }
}

/// The class of an instruction of 64-bit code that is emulated in general, but has emitted code of its own in this mode.
pub fn inlined(insn: &Instruction, mode: Mode) -> Option<Class> {
    use Code::{
        Mov_r32m16_Sreg, Mov_r64_cr, Mov_r64m16_Sreg, Mov_rm16_Sreg, Rdfsbase_r32, Rdfsbase_r64, Rdgsbase_r32,
        Rdgsbase_r64, Rdtsc, Rdtscp, Wrfsbase_r32, Wrfsbase_r64, Wrgsbase_r32, Wrgsbase_r64,
    };
    let own = match insn.code() {
        Code::Cli if mode.kernel() => return Some(Class::Cli),
        Code::Sti if mode.kernel() => return Some(Class::Sti),
        Code::Swapgs if mode.kernel() => return Some(Class::Swapgs),
        Code::Pushfq => return Some(Class::Pushf),
        Mov_rm16_Sreg | Mov_r32m16_Sreg | Mov_r64m16_Sreg if insn.op0_kind() == OpKind::Register => Own::Selector,
        Rdtsc if mode.time_stamp() => Own::TimeStamp,
        Rdtscp if mode.time_stamp() && mode.rdtscp() => Own::TimeStamp,
        Rdfsbase_r32 | Rdfsbase_r64 | Rdgsbase_r32 | Rdgsbase_r64 if mode.fsgsbase() => Own::ReadBase,
        Wrfsbase_r32 | Wrfsbase_r64 | Wrgsbase_r32 | Wrgsbase_r64 if mode.fsgsbase() => Own::WriteBase,
        Code::Cld | Code::Std => Own::Direction,
        Mov_r64_cr if mode.kernel() && control_field(insn.op1_register()).is_some() => Own::ReadControl,
        _ if is_plain_string(insn) && mode.flat(seg::DS) => Own::String,
        _ if Form::of(insn.mnemonic()).is_some() && !has_short_address(insn) => Own::ExtendedState,
        _ => return None,
    };
    Some(Class::Own(own))
}

/// Whether 64-bit code of these bytes is a call by which a kernel fills the processor's stack of return addresses when it
/// switches threads, so that the one does not predict the other's returns: `call 1f; int3; 1:`, and behind that another one, or
/// the stack pointer's way back. (A retpoline begins like that, too.)
pub fn fills_returns(code: &[u8]) -> bool {
    const SLOT: &[u8] = &[0xe8, 1, 0, 0, 0, 0xcc];
    const ADD_RSP: &[u8] = &[0x48, 0x83, 0xc4];
    code.strip_prefix(SLOT).is_some_and(|behind| behind.starts_with(SLOT) || behind.starts_with(ADD_RSP))
}

/// Whether the memory operand of 64-bit code has an address of 32 bits.
fn has_short_address(insn: &Instruction) -> bool {
    [insn.memory_base().size(), insn.memory_index().size(), insn.memory_displ_size() as usize].contains(&4)
}

/// MOVS or STOS with addresses of 64 bits in flat segments.
fn is_plain_string(insn: &Instruction) -> bool {
    use Mnemonic::{Movsb, Movsd, Movsq, Movsw, Stosb, Stosd, Stosq, Stosw};
    let source = match insn.mnemonic() {
        // (Not SSE's MOVSD.)
        Movsb | Movsw | Movsd | Movsq if insn.is_string_instruction() => OpKind::MemorySegRSI,
        Stosb | Stosw | Stosd | Stosq => OpKind::Register,
        _ => return false,
    };
    let based = matches!(insn.memory_segment(), Register::FS | Register::GS);
    insn.op0_kind() == OpKind::MemoryESRDI && insn.op1_kind() == source && !based && !insn.has_lock_prefix()
}

/// Control transfers and stack instructions.
fn control(insn: &Instruction, bits: u32) -> Option<Class> {
    use Code::*;
    // With an operand-size prefix, processors of the two vendors disagree on near branches in 64-bit code, and RIP is
    // truncated in the others: rare enough for plain Rust.
    let natural = |code64, code32, code16, class| {
        let code = insn.code();
        let fits = code == code64 && bits == 64 || code == code32 && bits == 32 || code == code16 && bits == 16;
        Some(if fits { class } else { Class::Emulate })
    };
    match insn.mnemonic() {
        Mnemonic::Jmp if insn.is_jmp_short_or_near() => {
            let short = matches!(insn.code(), Jmp_rel8_64 | Jmp_rel8_32 | Jmp_rel8_16);
            if short {
                natural(Jmp_rel8_64, Jmp_rel8_32, Jmp_rel8_16, Class::Jump)
            } else {
                natural(Jmp_rel32_64, Jmp_rel32_32, Jmp_rel16, Class::Jump)
            }
        }
        Mnemonic::Jmp if insn.is_jmp_near_indirect() => natural(Jmp_rm64, Jmp_rm32, Jmp_rm16, Class::JumpIndirect),
        Mnemonic::Call if insn.is_call_near() => natural(Call_rel32_64, Call_rel32_32, Call_rel16, Class::Call),
        Mnemonic::Call if insn.is_call_near_indirect() => natural(Call_rm64, Call_rm32, Call_rm16, Class::CallIndirect),
        Mnemonic::Ret => match insn.op_count() {
            0 => natural(Retnq, Retnd, Retnw, Class::Return),
            _ => natural(Retnq_imm16, Retnd_imm16, Retnw_imm16, Class::Return),
        },
        _ if insn.is_jcc_short_or_near() => {
            let size = match insn.op0_kind() {
                OpKind::NearBranch64 => 64,
                OpKind::NearBranch32 => 32,
                _ => 16,
            };
            Some(if size == bits { Class::JumpIf } else { Class::Emulate })
        }
        _ if insn.is_loop() || insn.is_loopcc() || insn.is_jcx_short() => Some(looping(insn, bits)),
        Mnemonic::Push => Some(push_pop(insn, Class::Push)),
        Mnemonic::Pop => Some(push_pop(insn, Class::Pop)),
        Mnemonic::Leave => natural(Leaveq, Leaved, Leavew, Class::Leave),
        _ => None,
    }
}

/// The host's own instruction counts RCX or ECX, never CX, and branches to the whole RIP.
fn looping(insn: &Instruction, bits: u32) -> Class {
    use Code::*;
    let whole = match insn.op0_kind() {
        OpKind::NearBranch64 => bits == 64,
        OpKind::NearBranch32 => bits == 32,
        _ => bits == 16,
    };
    let cx = matches!(
        insn.code(),
        Loop_rel8_16_CX
            | Loop_rel8_32_CX
            | Loope_rel8_16_CX
            | Loope_rel8_32_CX
            | Loopne_rel8_16_CX
            | Loopne_rel8_32_CX
            | Jcxz_rel8_16
            | Jcxz_rel8_32
    );
    if whole && !cx { Class::Loop } else { Class::Emulate }
}

fn push_pop(insn: &Instruction, class: Class) -> Class {
    match insn.op0_kind() {
        OpKind::Register if insn.op0_register().is_segment_register() => Class::Emulate,
        _ => class,
    }
}

fn legacy(insn: &Instruction) -> Class {
    use Mnemonic::*;
    match insn.mnemonic() {
        Adc | Adcx | Add | Adox | And | Bsf | Bsr | Bswap | Bt | Btc | Btr | Bts | Cbw | Cdq | Cdqe | Clc | Cmc
        | Cmova | Cmovae | Cmovb | Cmovbe | Cmove | Cmovg | Cmovge | Cmovl | Cmovle | Cmovne | Cmovno | Cmovnp
        | Cmovns | Cmovo | Cmovp | Cmovs | Cmp | Cmpxchg | Cmpxchg16b | Cmpxchg8b | Cqo | Crc32 | Cwd | Cwde | Dec
        | Div | Idiv | Imul | Inc | Lahf | Lea | Lfence | Lzcnt | Mfence | Movbe | Movnti | Movsx | Movsxd | Movzx
        | Mul | Neg | Not | Or | Pause | Popcnt | Rcl | Rcr | Rol | Ror | Sahf | Sal | Sar | Sbb | Seta | Setae
        | Setb | Setbe | Sete | Setg | Setge | Setl | Setle | Setne | Setno | Setnp | Setns | Seto | Setp | Sets
        | Sfence | Shl | Shld | Shr | Shrd | Stc | Sub | Test | Tzcnt | Xadd | Xchg | Xor | Rdrand | Rdseed
        | Clflush | Clflushopt | Clwb => Class::Copy,
        Mov => match (insn.op0_kind(), insn.op1_kind()) {
            (OpKind::Register, _) if !general(insn.op0_register()) => Class::Emulate,
            (_, OpKind::Register) if !general(insn.op1_register()) => Class::Emulate,
            _ => Class::Copy,
        },
        // Without a memory operand 0F 0D is no prefetch, and undefined on AMD's processors.
        Reservednop if is_0f0d(insn) && insn.op0_kind() == OpKind::Register && *AMD => Class::Emulate,
        Nop | Reservednop | Endbr64 | Endbr32 | Prefetch | Prefetchnta | Prefetcht0 | Prefetcht1 | Prefetcht2
        | Prefetchw | Prefetchwt1 | Prefetchit0 | Prefetchit1 | Cldemote | Rdsspd | Rdsspq => Class::Nothing,
        Fnstenv | Fldenv | Fnsave | Frstor | Fxsave | Fxsave64 | Fxrstor | Fxrstor64 | Xsave | Xsave64 | Xsavec
        | Xsavec64 | Xsaveopt | Xsaveopt64 | Xsaves | Xsaves64 | Xrstor | Xrstor64 | Xrstors | Xrstors64 | Ldmxcsr
        | Stmxcsr | Maskmovdqu | Maskmovq => Class::Emulate,
        Fnclex if !*AMD => Class::Emulate,
        Wait => Class::Vector(Needs { x87: true, ..Needs::default() }),
        _ => legacy_vector(insn),
    }
}

fn is_0f0d(insn: &Instruction) -> bool {
    matches!(
        insn.code(),
        Code::Reservednop_rm16_r16_0F0D | Code::Reservednop_rm32_r32_0F0D | Code::Reservednop_rm64_r64_0F0D
    )
}

fn general(register: iced_x86::Register) -> bool {
    register.is_gpr()
}

fn legacy_vector(insn: &Instruction) -> Class {
    use CpuidFeature::*;
    let mut needs = Needs::default();
    for feature in insn.cpuid_features() {
        match feature {
            FPU | FPU287 | FPU387 => {
                needs.x87 = true;
                needs.pointers = !x87_control(insn.mnemonic());
            }
            // FCMOVcc, FCOMI and their like: an x87 with these has CMOV.
            CMOV => {}
            MMX => needs.x87 = true,
            SSE | SSE2 | SSE3 | SSSE3 | SSE4_1 | SSE4_2 | SSE4A | AES | PCLMULQDQ | SHA | GFNI => needs.sse = true,
            _ => return Class::Emulate,
        }
    }
    let registers = (0..insn.op_count()).filter(|&i| insn.op_kind(i) == OpKind::Register).map(|i| insn.op_register(i));
    let (mut mm, mut xmm) = (false, false);
    for register in registers {
        mm |= register.is_mm();
        xmm |= register.is_xmm();
    }
    if mm {
        needs.x87 = true;
        needs.sse &= xmm;
    }
    if !needs.x87 && !needs.sse {
        return Class::Emulate;
    }
    Class::Vector(needs)
}

/// x87 instructions that leave the last-instruction pointers alone (SDM vol. 1 8.1.8).
fn x87_control(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(mnemonic, Fninit | Fnclex | Fldcw | Fnstcw | Fnstsw | Wait | Emms | Fneni | Fndisi | Fnsetpm)
}

/// Whether a memory operand that is not aligned to its size raises #GP (SDM vol. 2A 2.4, exception classes 1 and 4).
pub fn needs_alignment(insn: &Instruction) -> bool {
    use Mnemonic::*;
    let whole_register = insn.memory_size().size() >= 16;
    match (insn.mnemonic(), insn.encoding()) {
        (Cmpxchg16b, _) => true,
        (Movups | Movupd | Movdqu | Lddqu, _) => false,
        (Pcmpestri | Pcmpestri64 | Pcmpestrm | Pcmpestrm64 | Pcmpistri | Pcmpistrm, _) => false,
        // The two vendors differ.
        (Sha1msg1 | Sha1msg2 | Sha1nexte | Sha1rnds4 | Sha256msg1 | Sha256msg2 | Sha256rnds2, _) => !*AMD,
        (_, EncodingKind::Legacy) => whole_register,
        (Vmovaps | Vmovapd | Vmovdqa | Vmovdqa32 | Vmovdqa64, _) => whole_register,
        (Vmovntps | Vmovntpd | Vmovntdq | Vmovntdqa, _) => whole_register,
        _ => false,
    }
}

/// Whether an x87 or MMX instruction raises an exception that an earlier one has left.
pub fn waits(mnemonic: Mnemonic) -> bool {
    !matches!(mnemonic, Mnemonic::Fnstcw | Mnemonic::Fnstsw)
}

fn vex(insn: &Instruction) -> Class {
    use CpuidFeature::*;
    use Mnemonic::*;
    match insn.mnemonic() {
        Vmaskmovps | Vmaskmovpd | Vpmaskmovd | Vpmaskmovq | Vmaskmovdqu | Vldmxcsr | Vstmxcsr => return Class::Emulate,
        Vgatherdpd | Vgatherdps | Vgatherqpd | Vgatherqps | Vpgatherdd | Vpgatherdq | Vpgatherqd | Vpgatherqq => {
            return Class::Emulate;
        }
        _ => {}
    }
    let mut needs = Needs::default();
    for feature in insn.cpuid_features() {
        match feature {
            BMI1 | BMI2 => return Class::Copy,
            AVX | AVX2 | FMA | F16C | AES | VAES | PCLMULQDQ | VPCLMULQDQ | GFNI | AVX_VNNI => needs.avx = true,
            AVX512F | AVX512BW | AVX512DQ | AVX512VL => needs.avx512 = true,
            _ => return Class::Emulate,
        }
    }
    Class::Vector(needs)
}

fn evex(insn: &Instruction) -> Class {
    let vsib = insn.is_vsib();
    if vsib { Class::Emulate } else { Class::Vector(Needs { avx512: true, ..Needs::default() }) }
}

#[cfg(test)]
mod tests {
    use super::fills_returns;

    #[test]
    fn what_fills_returns() {
        let call = [0xe8, 1, 0, 0, 0, 0xcc];
        let add_rsp = [0x48, 0x83, 0xc4, 0x10];
        let retpoline = [0x48, 0x89, 0x04, 0x24, 0xc3];
        assert!(fills_returns(&[call, call].concat()));
        assert!(fills_returns(&[&call[..], &add_rsp].concat()));
        assert!(!fills_returns(&[&call[..], &retpoline].concat()));
        assert!(!fills_returns(&call), "the page ends");
        assert!(!fills_returns(&add_rsp));
    }
}
