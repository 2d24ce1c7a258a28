//! Stores of constants, to lead up to instructions that read memory.

use iced_x86::{Code, Instruction, MemorySize, OpKind, Register};

/// `code`, a MOV of an immediate, to `offset` bytes behind where `insn`'s memory operand begins.
pub fn at_offset(insn: &Instruction, offset: u64, code: Code, value: u32) -> Instruction {
    let mut store = Instruction::default();
    store.set_code(code);
    store.set_op0_kind(OpKind::Memory);
    store.set_memory_base(insn.memory_base());
    store.set_memory_index(insn.memory_index());
    store.set_memory_index_scale(insn.memory_index_scale());
    store.set_segment_prefix(insn.segment_prefix());
    let bits = address_bits(insn);
    let mask = u64::MAX >> (64 - bits);
    store.set_memory_displacement64(insn.memory_displacement64().wrapping_add(offset) & mask);
    store.set_memory_displ_size(bits / 8);
    set_immediate(&mut store, code, value);
    store
}

/// `code`, a MOV of an immediate, to `offset` bytes above the stack pointer.
pub fn on_stack(offset: u64, code: Code, value: u32, bits: u32) -> Instruction {
    let mut store = Instruction::default();
    store.set_code(code);
    store.set_op0_kind(OpKind::Memory);
    store.set_memory_base(if bits == 64 { Register::RSP } else { Register::ESP });
    store.set_memory_displacement64(offset);
    store.set_memory_displ_size(1);
    set_immediate(&mut store, code, value);
    store
}

/// The MOV of an immediate to memory of `size` bytes.
pub fn store_of(size: u64) -> Code {
    match size {
        2 => Code::Mov_rm16_imm16,
        4 => Code::Mov_rm32_imm32,
        _ => Code::Mov_rm64_imm32,
    }
}

fn set_immediate(store: &mut Instruction, code: Code, value: u32) {
    match code {
        Code::Mov_rm16_imm16 => {
            store.set_op1_kind(OpKind::Immediate16);
            store.set_immediate16(value as u16);
        }
        Code::Mov_rm64_imm32 => {
            store.set_op1_kind(OpKind::Immediate32to64);
            store.set_immediate32to64(i64::from(value as i32));
        }
        _ => {
            store.set_op1_kind(OpKind::Immediate32);
            store.set_immediate32(value);
        }
    }
    debug_assert_ne!(store.memory_size(), MemorySize::Unknown);
}

/// The size of the addresses that the memory operand is made of.
fn address_bits(insn: &Instruction) -> u32 {
    let register = |r: Register| (r != Register::None).then(|| r.size() as u32 * 8);
    let base = if insn.memory_base() == Register::RIP { Some(64) } else { register(insn.memory_base()) };
    base.or_else(|| register(insn.memory_index())).unwrap_or(match insn.memory_displ_size() {
        2 => 16,
        8 => 64,
        _ => 32,
    })
}
