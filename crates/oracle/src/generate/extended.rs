//! What leads up to the instructions that work on the extended state, and to others with an operand that seldom is valid.

use iced_x86::{Code, Instruction, Mnemonic, Register};

use super::{
    memory::{at_offset, store_of},
    program::Link,
};
use crate::{generate::far::Linked, rng::Rng};

/// A header that can be loaded, components that exist, and the like.
pub fn lead_up(insn: &Instruction, rng: &mut Rng) -> Vec<Linked> {
    use Mnemonic::*;
    let plain = |insn| (insn, Link::None);
    match insn.mnemonic() {
        Xrstor | Xrstor64 => header(insn, rng).into_iter().map(plain).collect(),
        Xgetbv => load(Register::ECX, rng.below(2) as u32).into_iter().map(plain).collect(),
        _ => Vec::new(),
    }
}

fn load(register: Register, value: u32) -> Option<Instruction> {
    Instruction::with2(Code::Mov_r32_imm32, register, value).ok()
}

/// The header of an XSAVE area in the standard format: XSTATE_BV, and nothing else.
fn header(insn: &Instruction, rng: &mut Rng) -> Vec<Instruction> {
    const AT: u64 = 512;
    const MXCSR_AT: u64 = 24;
    let word = |offset, value| at_offset(insn, offset, store_of(4), value);
    let mut stores: Vec<_> = (1..16).map(|i| word(AT + 4 * i, 0)).collect();
    stores.push(word(AT, rng.below(8) as u32));
    stores.push(word(MXCSR_AT, 0x1f80 | rng.bits() as u32 & 0x603f));
    stores
}
