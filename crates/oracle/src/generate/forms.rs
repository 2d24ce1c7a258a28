//! The instruction forms that cases are made of.

use iced_x86::{Code, CpuidFeature, Decoder, EncodingKind, Mnemonic, OpCodeOperandKind};
use purlin_engine_translator::translate::{
    classify::{Class, classify},
    source::DECODER_OPTIONS,
};

use super::{
    operands::Operands,
    program,
    reasons::{Left, left},
};
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
    /// Loads selectors, or asks about them.
    Segments,
    /// Privileged, or about the system: most of it faults in user code.
    System,
}

/// All groups.
pub const GROUPS: [Group; 10] = [
    Group::General,
    Group::Control,
    Group::X87,
    Group::Mmx,
    Group::Sse,
    Group::Avx,
    Group::Avx512,
    Group::Emulated,
    Group::Segments,
    Group::System,
];

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

/// The sizes of code.
pub const SIZES: [u32; 3] = [64, 32, 16];

/// What is done with `code` in code of `bits`.
pub fn form(code: Code, bits: u32) -> Result<Form, Left> {
    let info = code.op_code();
    let there = match bits {
        64 => info.mode64(),
        32 => info.mode32(),
        _ => info.mode16(),
    };
    if !info.is_instruction() || !there {
        return Err(Left::Mode);
    }
    if let Some(left) = left(code) {
        return Err(left);
    }
    // An example tells the class, which may depend on operands but little.
    let mut rng = Rng::new(code as u64);
    let mut reason = Left::Unknown;
    for _ in 0..40 {
        let mut operands = Operands::new(bits, bits, &mut rng);
        let Some(insn) = operands.instruction(code, &mut rng) else { continue };
        let Some(bytes) = program::encode(&program::near(&insn, EXAMPLE), bits, EXAMPLE) else { continue };
        let decoded = Decoder::with_ip(bits, &bytes, EXAMPLE, *DECODER_OPTIONS).decode();
        if decoded.code() != code {
            reason = Left::Alias;
            continue;
        }
        let class = classify(&decoded, bits);
        return Ok(Form { code, group: group(code, class), class });
    }
    Err(reason)
}

/// Where an example of a form lies.
const EXAMPLE: u64 = 0x5100;

/// All forms of code of `bits`.
pub fn forms(bits: u32) -> Vec<Form> {
    Code::values().filter_map(|code| form(code, bits).ok()).collect()
}

fn group(code: Code, class: Class) -> Group {
    let info = code.op_code();
    let features = code.cpuid_features();
    if of_system(code) {
        return Group::System;
    }
    if about_segments(code) {
        return Group::Segments;
    }
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

/// What only the system can execute, what it executes for others, and what loads selectors or asks about them: among the
/// emulated instructions they would be most, and nearly every case would end at one.
pub fn of_system(code: Code) -> bool {
    use Mnemonic::*;
    let info = code.op_code();
    !info.cpl3()
        || info.is_privileged()
        || matches!(
            code.mnemonic(),
            In | Out
                | Insb
                | Insw
                | Insd
                | Outsb
                | Outsw
                | Outsd
                | Cli
                | Sti
                | Rdpmc
                | Ud0
                | Ud1
                | Ud2
                | Rsm
                | Int
                | Int1
                | Int3
                | Into
                | Sysenter
                | Sysexit
                | Sysexitq
                | Sysret
                | Sysretq
                | Cpuid
        )
}

/// What loads selectors or asks about them.
fn about_segments(code: Code) -> bool {
    use Mnemonic::*;
    let fixed = |k: &OpCodeOperandKind| {
        use OpCodeOperandKind::{cs, ds, es, farbr2_2, farbr4_2, fs, gs, seg_reg, ss};
        matches!(k, cs | ds | es | fs | gs | ss | seg_reg | farbr2_2 | farbr4_2)
    };
    code.op_code().op_kinds().iter().any(fixed)
        || code.is_jmp_far_indirect()
        || code.is_call_far_indirect()
        || matches!(
            code.mnemonic(),
            Lds | Les
                | Lfs
                | Lgs
                | Lss
                | Lar
                | Lsl
                | Verr
                | Verw
                | Arpl
                | Retf
                | Iret
                | Iretd
                | Iretq
                | Rdfsbase
                | Rdgsbase
                | Wrfsbase
                | Wrgsbase
        )
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use crate::coverage;

    /// Each form of a processor is generated or has a reason, and those that the host has and that are left out all the
    /// same are these and no others.
    #[test]
    fn what_is_left_out_has_a_reason() {
        const CALLS: [&str; 2] = ["Syscall", "Int1"];
        const CALLS_OF_INTEL: [&str; 1] = ["Sysenter"];
        const MADE_UP: [&str; 5] = ["Sgdt", "Sidt", "Sldt", "Smsw", "Str"];
        let mut known: BTreeSet<String> = CALLS.iter().chain(&MADE_UP).map(|name| name.to_string()).collect();
        if !crate::host::is_amd() {
            known.extend(CALLS_OF_INTEL.iter().map(|name| name.to_string()));
        }
        let counting = coverage::left_out().into_iter().filter(|(_, left)| left.counts());
        let found: BTreeSet<String> = counting.map(|(code, _)| format!("{:?}", code.mnemonic())).collect();
        assert_eq!(found, known);
    }

    /// At least 99 of 100 forms of the host.
    #[test]
    fn nearly_all_are_generated() {
        let offered = coverage::generated().iter().filter(|form| crate::host::has(form.code)).count();
        let left = coverage::left_out().iter().filter(|(_, left)| left.counts()).count();
        assert!(left * 100 <= offered + left, "{left} left out, {offered} generated");
    }
}
