//! The instruction forms that cases are made of.

use iced_x86::{Code, CpuidFeature, Decoder, DecoderOptions, EncodingKind, Mnemonic, OpCodeOperandKind};
use purlin_engine_translator::translate::{
    classify::{Class, classify},
    offered::offered,
};

use super::{operands::Operands, program};
use crate::rng::Rng;

/// What a form belongs to: cases draw a few groups and then forms of these, or AVX-512 would be most of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Group {
    /// On general registers.
    General,
    /// Branches and the stack.
    Control,
    /// x87.
    X87,
    /// MMX.
    Mmx,
    /// Legacy SSE, with AES and the like.
    Sse,
    /// VEX-encoded.
    Avx,
    /// EVEX-encoded, and on opmask registers.
    Avx512,
    /// Emulated by the translator, one by one.
    Emulated,
}

/// All groups.
pub const GROUPS: [Group; 8] =
    [Group::General, Group::Control, Group::X87, Group::Mmx, Group::Sse, Group::Avx, Group::Avx512, Group::Emulated];

/// A form.
#[derive(Clone, Copy, Debug)]
pub struct Form {
    /// It.
    pub code: Code,
    /// Where it belongs.
    pub group: Group,
    /// What the translator does with it.
    pub class: Class,
}

/// Why a form is in no case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Left {
    /// The mode does not have it.
    Mode,
    /// It has an operand of a kind that is not generated.
    Operand,
    /// Its encoding is decoded as another form.
    Alias,
    /// The host has no such extension.
    Host,
    /// It gives something else each time.
    Random,
    /// Privileged, or about the system: it has tests of its own.
    System,
}

/// What is done with `code` in code of `bits`.
pub fn form(code: Code, bits: u32) -> Result<Form, Left> {
    let info = code.op_code();
    if !info.is_instruction() || !(if bits == 64 { info.mode64() } else { info.mode32() }) {
        return Err(Left::Mode);
    }
    if matches!(code.mnemonic(), Mnemonic::Rdrand | Mnemonic::Rdseed) {
        return Err(Left::Random);
    }
    // An example tells the class, which may depend on operands but little.
    let mut rng = Rng::new(code as u64);
    let mut reason = Left::Operand;
    for _ in 0..40 {
        let mut operands = Operands::new(bits, &mut rng);
        let Some(insn) = operands.instruction(code, &mut rng) else { continue };
        let Some(bytes) = program::encode(&insn, bits, 0x2000_0000) else { continue };
        let decoded = Decoder::with_ip(bits, &bytes, 0x2000_0000, DecoderOptions::AMD).decode();
        if decoded.code() != code {
            reason = Left::Alias;
            continue;
        }
        if !offered(&decoded) {
            return Err(Left::Host);
        }
        let class = classify(&decoded, bits);
        if class == Class::Emulate && !emulated(code) {
            return Err(Left::System);
        }
        return Ok(Form { code, group: group(code, class), class });
    }
    Err(reason)
}

/// All forms of code of `bits`.
pub fn forms(bits: u32) -> Vec<Form> {
    Code::values().filter_map(|code| form(code, bits).ok()).collect()
}

fn group(code: Code, class: Class) -> Group {
    let info = code.op_code();
    let features = code.cpuid_features();
    match (class, info.encoding()) {
        (Class::Emulate, _) => Group::Emulated,
        (Class::Copy | Class::Nothing, _) => Group::General,
        (Class::Vector(_), EncodingKind::EVEX) => Group::Avx512,
        (Class::Vector(needs), EncodingKind::VEX) => {
            if needs.avx512 {
                Group::Avx512
            } else {
                Group::Avx
            }
        }
        (Class::Vector(_), _) if features.iter().any(|f| x87(*f)) => Group::X87,
        (Class::Vector(needs), _) => {
            if needs.x87 {
                Group::Mmx
            } else {
                Group::Sse
            }
        }
        _ => Group::Control,
    }
}

fn x87(feature: CpuidFeature) -> bool {
    matches!(feature, CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387)
}

/// Emulated instructions that user code may execute, and that give the same each time.
fn emulated(code: Code) -> bool {
    use Mnemonic::*;
    let string = |m| {
        matches!(m, Movsb | Movsw | Movsd | Movsq | Stosb | Stosw | Stosd | Stosq)
            || matches!(
                m,
                Lodsb | Lodsw | Lodsd | Lodsq | Scasb | Scasw | Scasd | Scasq | Cmpsb | Cmpsw | Cmpsd | Cmpsq
            )
    };
    match code.mnemonic() {
        Aaa | Aas | Aam | Aad | Daa | Das | Salc | Xlatb | Pusha | Pushad | Popa | Popad | Ldmxcsr | Stmxcsr
        | Vldmxcsr | Vstmxcsr | Cld | Std | Cmc => true,
        Vmaskmovps | Vmaskmovpd | Vpmaskmovd | Vpmaskmovq | Maskmovdqu | Vmaskmovdqu | Maskmovq => true,
        Fxsave64 | Fxrstor64 => true,
        Pushf | Pushfd | Pushfq | Popf | Popfd | Popfq | Enter | Bound | Vzeroupper | Vzeroall => true,
        Vgatherdpd | Vgatherdps | Vgatherqpd | Vgatherqps | Vpgatherdd | Vpgatherdq | Vpgatherqd | Vpgatherqq => true,
        Vscatterdpd | Vscatterdps | Vscatterqpd | Vscatterqps | Vpscatterdd | Vpscatterdq | Vpscatterqd
        | Vpscatterqq => true,
        Loop | Loope | Loopne | Jcxz | Jecxz | Jrcxz | Leave => true,
        m => string(m) && code.op_code().op_kinds().iter().any(|k| is_string_operand(*k)),
    }
}

fn is_string_operand(kind: OpCodeOperandKind) -> bool {
    matches!(kind, OpCodeOperandKind::seg_rSI | OpCodeOperandKind::es_rDI | OpCodeOperandKind::seg_rDI)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// A form that the translator neither copies nor emulates must not pass for the system's: these are all of the
    /// extensions for user code that do, and each has tests of its own.
    #[test]
    fn what_is_left_to_the_system_is_no_users() {
        use CpuidFeature::*;
        const OF_USERS: [CpuidFeature; 28] = [
            FPU, FPU287, FPU387, CMOV, MMX, SSE, SSE2, SSE3, SSSE3, SSE4_1, SSE4_2, SSE4A, AES, PCLMULQDQ, SHA, GFNI,
            AVX, AVX2, FMA, F16C, VAES, VPCLMULQDQ, AVX_VNNI, AVX512F, AVX512BW, AVX512DQ, AVX512VL, BMI2,
        ];
        const KNOWN: [Mnemonic; 4] = [Mnemonic::Fldenv, Mnemonic::Fnstenv, Mnemonic::Frstor, Mnemonic::Fnsave];
        let left = |code: &Code| [32, 64].iter().any(|bits| form(*code, *bits).err() == Some(Left::System));
        // What a host has is told by other bits than these.
        let newer = |f: &CpuidFeature| matches!(f, SHA512 | SM3 | SM4);
        let of_users = |code: &Code| {
            let features = code.cpuid_features();
            features.iter().any(|f| OF_USERS.contains(f)) && !features.iter().any(newer)
        };
        let found: BTreeSet<_> =
            Code::values().filter(left).filter(of_users).map(|code| format!("{:?}", code.mnemonic())).collect();
        assert_eq!(found, KNOWN.iter().map(|mnemonic| format!("{mnemonic:?}")).collect());
    }
}
