//! Instructions that 64-bit mode has no encoding for, so that they cannot be copied: AAA, AAS, AAM, AAD, DAA, DAS,
//! SALC, BOUND and INTO.

use iced_x86::{
    Instruction,
    Mnemonic::{Aaa, Aad, Aam, Aas, Daa, Das},
    Register,
};
use purlin_arch::x86_64::regs::{
    gpr::RAX,
    rflags::{AF, CF, OF, PF, SF, ZF},
};

use super::{Done, Flow};
use crate::{
    cpu::Cpu,
    exception::{Exception, vector},
    interrupt::{Software, software_interrupt},
    mem::Access,
};

pub fn execute(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Exception> {
    match insn.mnemonic() {
        Aaa => ascii_adjust(cpu, 0x106),
        Aas => ascii_adjust(cpu, 0x106u16.wrapping_neg()),
        Aam => return aam(cpu, insn.immediate8()),
        Aad => aad(cpu, insn.immediate8()),
        Daa => decimal_adjust(cpu, Adjust::Add),
        Das => decimal_adjust(cpu, Adjust::Subtract),
        // SALC
        _ => cpu.set_register(Register::AL, if cpu.rflags & CF != 0 { 0xff } else { 0 }),
    }
    Ok(())
}

fn al(cpu: &Cpu) -> u8 {
    cpu.gpr[RAX] as u8
}

fn set_flags(cpu: &mut Cpu, mask: u64, values: u64) {
    cpu.rflags = cpu.rflags & !mask | values & mask;
}

/// SF, ZF and PF of an 8-bit result.
fn result_flags(value: u8) -> u64 {
    let mut flags = 0;
    if value & 0x80 != 0 {
        flags |= SF;
    }
    if value == 0 {
        flags |= ZF;
    }
    if value.count_ones().is_multiple_of(2) {
        flags |= PF;
    }
    flags
}

/// AAA and AAS: `step` is added to AX where a decimal digit has run over. OF, SF, ZF and PF are undefined.
fn ascii_adjust(cpu: &mut Cpu, step: u16) {
    let mut ax = cpu.gpr[RAX] as u16;
    let over = ax & 15 > 9 || cpu.rflags & AF != 0;
    if over {
        ax = ax.wrapping_add(step);
    }
    cpu.set_register(Register::AX, u64::from(ax & 0xff0f));
    set_flags(cpu, AF | CF, if over { AF | CF } else { 0 });
}

fn aam(cpu: &mut Cpu, base: u8) -> Result<(), Exception> {
    let al = al(cpu);
    let (Some(tens), Some(units)) = (al.checked_div(base), al.checked_rem(base)) else { return Err(Exception::DE) };
    cpu.set_register(Register::AX, u64::from(tens) << 8 | u64::from(units));
    set_flags(cpu, SF | ZF | PF, result_flags(units));
    Ok(())
}

fn aad(cpu: &mut Cpu, base: u8) {
    let ah = (cpu.gpr[RAX] >> 8) as u8;
    let value = al(cpu).wrapping_add(ah.wrapping_mul(base));
    cpu.set_register(Register::AX, u64::from(value));
    set_flags(cpu, SF | ZF | PF, result_flags(value));
}

/// DAA adds corrections, DAS subtracts them.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Adjust {
    Add,
    Subtract,
}

/// DAA and DAS (SDM vol. 2). OF is undefined.
fn decimal_adjust(cpu: &mut Cpu, adjust: Adjust) {
    let corrected = |value: u8, by: u8| match adjust {
        Adjust::Add => value.wrapping_add(by),
        Adjust::Subtract => value.wrapping_sub(by),
    };
    let old = al(cpu);
    let (old_cf, old_af) = (cpu.rflags & CF != 0, cpu.rflags & AF != 0);
    let low = old & 15 > 9 || old_af;
    let high = old > 0x99 || old_cf;
    let mut value = old;
    let mut carry = high;
    if low {
        // DAS: a borrow out of the low digit's correction carries too.
        carry |= adjust == Adjust::Subtract && old < 6;
        value = corrected(value, 6);
    }
    if high {
        value = corrected(value, 0x60);
    }
    cpu.set_register(Register::AL, u64::from(value));
    let flags = result_flags(value) | if low { AF } else { 0 } | if carry { CF } else { 0 };
    set_flags(cpu, AF | CF | SF | ZF | PF, flags);
}

/// BOUND: #BR unless lower bound ≤ index ≤ upper bound, all signed.
pub fn bound(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Exception> {
    let register = insn.op_register(0);
    let size = register.size();
    let signed = |value: u64| (value << (64 - 8 * size)) as i64 >> (64 - 8 * size);
    // Two accesses: each has its own alignment.
    let limit = |cpu: &mut Cpu, by: usize| {
        let address = cpu.part_linear(insn, by, size, Access::Read)?;
        cpu.read_sized(address, size).map(signed)
    };
    let lower = limit(cpu, 0)?;
    let index = signed(cpu.register(register));
    // Intel's processors do not look at the upper limit then.
    if index < lower && !cpu.features.amd {
        return Err(Exception::plain(vector::BR));
    }
    let upper = limit(cpu, size)?;
    if (lower..=upper).contains(&index) { Ok(()) } else { Err(Exception::plain(vector::BR)) }
}

/// INTO: a trap where OF is set.
pub fn into(cpu: &mut Cpu, next: u64) -> Done {
    if cpu.rflags & OF == 0 {
        return Ok(Flow::Next);
    }
    software_interrupt(cpu, vector::OF, Software::Trap, next)?;
    Ok(Flow::Set)
}
