//! PUSH, POP, PUSHA, POPA, ENTER and LEAVE.

use iced_x86::{
    Code, Instruction,
    Mnemonic::{Enter, Leave, Pop, Popa, Popad, Push, Pusha},
    OpKind, Register,
};
use purlin_arch::x86_64::regs::{
    gpr::{RBP, RDI, RSP},
    seg::SS,
};

use super::stack_width;
use crate::{
    cpu::Cpu,
    exception::Exception,
    operand::{segment_index, truncate},
    stack::Stack,
};

pub fn execute(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Exception> {
    match insn.mnemonic() {
        Push => push(cpu, insn),
        Pop => pop(cpu, insn),
        Pusha => pusha(cpu, 2),
        Popa => popa(cpu, 2),
        Popad => popa(cpu, 4),
        Enter => enter(cpu, insn),
        Leave => leave(cpu, insn),
        _ => pusha(cpu, 4),
    }
}

fn push(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Exception> {
    let (value, size) = (cpu.read_op(insn, 0)?, stack_width(insn));
    if size != 4 || !is_selector_alone(cpu, insn) {
        return cpu.push(size, value);
    }
    let mut stack = Stack::current(cpu);
    stack.skip((size as u64).wrapping_neg());
    stack.poke(cpu, SELECTOR, value)?;
    stack.commit(cpu);
    Ok(())
}

fn pop(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Exception> {
    let size = stack_width(insn);
    let mut stack = Stack::current(cpu);
    let value = stack.peek(cpu, 0, if is_selector_alone(cpu, insn) { SELECTOR } else { size })?;
    stack.skip(size as u64);
    if insn.op_kind(0) == OpKind::Register {
        return pop_register(cpu, insn.op_register(0), &stack, value);
    }
    // An address off RSP is computed after the increment.
    let before = cpu.gpr[RSP];
    stack.commit(cpu);
    cpu.write_op(insn, 0, value).inspect_err(|_| cpu.gpr[RSP] = before)
}

/// Bytes of a selector.
const SELECTOR: usize = 2;

/// Whether the access is to a selector, however far the stack pointer moves: so do Intel's processors have it, but where they push
/// 64 bits (SDM vol. 2, "PUSH").
fn is_selector_alone(cpu: &Cpu, insn: &Instruction) -> bool {
    let selector = insn.op_kind(0) == OpKind::Register && insn.op_register(0).is_segment_register();
    selector && !cpu.features.amd
}

fn pop_register(cpu: &mut Cpu, register: Register, stack: &Stack, value: u64) -> Result<(), Exception> {
    if !register.is_segment_register() {
        stack.commit(cpu);
        cpu.set_register(register, value);
        return Ok(());
    }
    let segment = segment_index(register);
    cpu.load_segment(segment, value as u16)?;
    stack.commit(cpu);
    cpu.mov_ss_shadow = segment == SS;
    Ok(())
}

fn pusha(cpu: &mut Cpu, size: usize) -> Result<(), Exception> {
    let mut stack = Stack::current(cpu);
    stack.check_room(cpu, 8, size)?;
    for register in 0..=RDI {
        stack.push(cpu, size, cpu.gpr[register])?;
    }
    stack.commit(cpu);
    Ok(())
}

fn popa(cpu: &mut Cpu, size: usize) -> Result<(), Exception> {
    let mut stack = Stack::current(cpu);
    let mut values = [0; 8];
    for register in (0..=RDI).rev() {
        values[register] = stack.pop(cpu, size)?;
    }
    stack.commit(cpu);
    for register in (0..=RDI).filter(|&r| r != RSP) {
        cpu.set_gpr(register, size, values[register]);
    }
    Ok(())
}

fn enter(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Exception> {
    let size = match insn.code() {
        Code::Enterw_imm16_imm8 => 2,
        Code::Enterd_imm16_imm8 => 4,
        _ => 8,
    };
    let (room, level) = (insn.immediate16(), insn.immediate8_2nd() % 32);
    let mut stack = Stack::current(cpu);
    stack.push(cpu, size, cpu.gpr[RBP])?;
    let frame = stack.pointer;
    if level > 0 {
        let mut frames = Stack::current(cpu);
        frames.pointer = cpu.gpr[RBP];
        for _ in 1..level {
            frames.skip((size as u64).wrapping_neg());
            let outer = frames.peek(cpu, 0, size)?;
            stack.push(cpu, size, outer)?;
        }
        stack.push(cpu, size, frame)?;
    }
    stack.skip(u64::from(room).wrapping_neg());
    stack.probe_store(cpu, size)?;
    stack.commit(cpu);
    cpu.set_gpr(RBP, size, frame);
    Ok(())
}

fn leave(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Exception> {
    let size = match insn.code() {
        Code::Leavew => 2,
        Code::Leaved => 4,
        _ => 8,
    };
    let mut stack = Stack::current(cpu);
    stack.pointer = cpu.gpr[RBP];
    let frame = stack.pop(cpu, size)?;
    stack.commit(cpu);
    cpu.set_gpr(RBP, size, truncate(frame, size));
    Ok(())
}
