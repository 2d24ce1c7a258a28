//! Selectors, and what leads up to the instructions that load them: segment registers, far branches and returns.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};
use purlin_arch::x86_64::regs::rflags;

use super::{
    memory::{at_offset, on_stack, store_of},
    program::{END, Link},
};
use crate::{
    layout::DATA16,
    rng::Rng,
    segments::{CODE16, CODE32, CODE64, DATA32, STACK16, selectors},
};

/// An instruction, and whom it names.
pub type Linked = (Instruction, Link);

/// A selector to load: one of the tables, or anything.
pub fn any_selector(rng: &mut Rng) -> u16 {
    if rng.chance(95) { rng.pick(&selectors()) } else { rng.bits() as u16 }
}

/// A selector for a stack: rather one that will do.
fn stack_selector(rng: &mut Rng) -> u16 {
    if rng.chance(70) { rng.pick(&[DATA32, DATA32, STACK16]) } else { any_selector(rng) }
}

/// Where a far transfer goes: the code segment, and a link. Code of another size is left alone: only the end, where
/// there is none, can be gone to.
pub fn destination(bits: u32, rng: &mut Rng) -> (u16, Target) {
    let own = match bits {
        16 => CODE16,
        32 => CODE32,
        _ => CODE64,
    };
    match rng.below(100) {
        0..60 => (own, Target::Item),
        60..85 => (rng.pick(&[CODE16, CODE32, CODE64]), Target::End),
        _ => (any_selector(rng), Target::End),
    }
}

/// What of the program a far transfer goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// An instruction.
    Item,
    /// The end.
    End,
}

impl Target {
    /// The link, to be aimed when all items are there.
    pub fn link(self) -> Link {
        match self {
            Self::Item => Link::Immediate(super::ANY),
            Self::End => Link::Immediate(END),
        }
    }
}

/// Whether `insn` takes a selector from its register or memory operand.
fn selector_operand(insn: &Instruction) -> Option<u32> {
    use Mnemonic::*;
    match insn.mnemonic() {
        Mov if insn.op0_kind() == OpKind::Register && insn.op0_register().is_segment_register() => Some(1),
        Lar | Lsl => Some(1),
        Verr | Verw | Lldt | Ltr | Arpl => Some(0),
        _ => None,
    }
}

/// What leads up to an instruction that loads a selector, with the memory that it reads.
pub fn lead_up(insn: &Instruction, bits: u32, rng: &mut Rng) -> Vec<Linked> {
    use Mnemonic::*;
    if let Some(operand) = selector_operand(insn) {
        let to_ss = insn.op0_kind() == OpKind::Register && insn.op0_register() == Register::SS;
        let selector = if to_ss { stack_selector(rng) } else { any_selector(rng) };
        return load_selector(insn, operand, selector).into_iter().map(plain).collect();
    }
    match insn.mnemonic() {
        Lds | Les | Lfs | Lgs | Lss => {
            let selector = if insn.mnemonic() == Lss { stack_selector(rng) } else { any_selector(rng) };
            vec![plain(at_offset(insn, insn.op0_register().size() as u64, store_of(2), selector.into()))]
        }
        Jmp | Call if insn.is_jmp_far_indirect() || insn.is_call_far_indirect() => far_pointer(insn, bits, rng),
        Pop if insn.op0_register().is_segment_register() => {
            let selector = if insn.op0_register() == Register::SS { stack_selector(rng) } else { any_selector(rng) };
            vec![plain(on_stack(0, store_of(2), selector.into(), bits))]
        }
        Retf => return_frame(insn, bits, rng)[..2].to_vec(),
        Iret | Iretd | Iretq => return_frame(insn, bits, rng),
        _ => Vec::new(),
    }
}

fn plain(insn: Instruction) -> Linked {
    (insn, Link::None)
}

fn load_selector(insn: &Instruction, operand: u32, selector: u16) -> Option<Instruction> {
    if insn.op_kind(operand) == OpKind::Memory {
        return Some(at_offset(insn, 0, store_of(2), selector.into()));
    }
    let register = insn.op_register(operand);
    let value = u32::from(selector);
    match register.size() {
        2 => Instruction::with2(Code::Mov_r16_imm16, register, value as i32).ok(),
        4 => Instruction::with2(Code::Mov_r32_imm32, register, value).ok(),
        _ => Instruction::with2(Code::Mov_r64_imm64, register, u64::from(value)).ok(),
    }
}

/// Offset and selector in memory.
fn far_pointer(insn: &Instruction, bits: u32, rng: &mut Rng) -> Vec<Linked> {
    let size = insn.memory_size().size() as u64 - 2;
    let (selector, target) = destination(bits, rng);
    let offset = at_offset(insn, 0, store_of(size), 0);
    vec![(offset, target.link()), plain(at_offset(insn, size, store_of(2), selector.into()))]
}

/// Offset, CS, flags, stack pointer and SS on the stack.
fn return_frame(insn: &Instruction, bits: u32, rng: &mut Rng) -> Vec<Linked> {
    let size = match insn.code() {
        Code::Retfw | Code::Retfw_imm16 | Code::Iretw => 2,
        Code::Retfd | Code::Retfd_imm16 | Code::Iretd => 4,
        _ => 8,
    };
    let (selector, target) = destination(bits, rng);
    let pointer = (DATA16 + rng.below(0x2000) as u64) as u32;
    let mut at = 0;
    let mut word = |value: u32| {
        at += size;
        on_stack(at - size, store_of(size), value, bits)
    };
    vec![
        (word(0), target.link()),
        plain(word(selector.into())),
        plain(word(flags(rng))),
        plain(word(pointer)),
        plain(word(stack_selector(rng).into())),
    ]
}

/// Flags for IRET to load.
fn flags(rng: &mut Rng) -> u32 {
    let mut flags = rflags::FIXED | rng.bits() & rflags::STATUS;
    for (percent, flag) in [(50, rflags::IF), (10, rflags::DF), (3, rflags::AC), (3, rflags::TF), (5, rflags::NT)] {
        flags |= if rng.chance(percent) { flag } else { 0 };
    }
    if rng.chance(10) {
        flags |= rng.bits() & 0x3f_fe00 & !rflags::TF;
    }
    flags as u32
}
