//! RFLAGS and the interrupt flag: CLI, STI, PUSHF, POPF, STAC, CLAC, with virtual interrupts in virtual-8086 mode
//! (VME) and at CPL 3 (PVI) (SDM vol. 3A 20.3, 20.4).

use iced_x86::Instruction;
use purlin_arch::x86_64::regs::{
    cr4,
    rflags::{self, AC, DF, ID, IF, IOPL, NT, RF, STATUS, TF, VIF, VIP, VM},
};

use super::stack_width;
use crate::{cpu::Cpu, debug::dr6, exception::Exception, operand::truncate, stack::Stack};

/// Who may change the interrupt flag.
enum InterruptFlag {
    /// IF itself.
    Real,
    /// VIF stands in for it.
    Virtual,
    /// Neither: #GP(0).
    None,
}

fn interrupt_flag(cpu: &Cpu) -> InterruptFlag {
    let virtualized = if cpu.v86() { cr4::VME } else { cr4::PVI };
    match () {
        () if !cpu.protected() || cpu.cpl <= cpu.iopl() => InterruptFlag::Real,
        () if cpu.cpl == 3 && cpu.cr4 & virtualized != 0 => InterruptFlag::Virtual,
        () => InterruptFlag::None,
    }
}

pub fn cli(cpu: &mut Cpu) -> Result<(), Exception> {
    match interrupt_flag(cpu) {
        InterruptFlag::Real => cpu.rflags &= !IF,
        InterruptFlag::Virtual => cpu.rflags &= !VIF,
        InterruptFlag::None => return Err(Exception::GP0),
    }
    Ok(())
}

pub fn sti(cpu: &mut Cpu) -> Result<(), Exception> {
    match interrupt_flag(cpu) {
        InterruptFlag::Real => {
            cpu.sti_shadow = cpu.rflags & IF == 0;
            cpu.rflags |= IF;
        }
        InterruptFlag::Virtual if cpu.rflags & VIP == 0 => cpu.rflags |= VIF,
        _ => return Err(Exception::GP0),
    }
    Ok(())
}

/// STD and CLD.
pub fn set_direction(cpu: &mut Cpu, down: bool) -> Result<(), Exception> {
    cpu.rflags = if down { cpu.rflags | DF } else { cpu.rflags & !DF };
    Ok(())
}

/// STAC and CLAC.
pub fn set_ac(cpu: &mut Cpu, on: bool) -> Result<(), Exception> {
    if cpu.features.cr4 & cr4::SMAP == 0 || cpu.cpl != 0 {
        return Err(Exception::UD);
    }
    cpu.rflags = if on { cpu.rflags | AC } else { cpu.rflags & !AC };
    Ok(())
}

pub fn pushf(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Exception> {
    let size = stack_width(insn);
    let mut image = cpu.rflags & !(RF | VM);
    if cpu.v86() && cpu.iopl() < 3 {
        if cpu.cr4 & cr4::VME == 0 || size != 2 {
            return Err(Exception::GP0);
        }
        image = with_virtual_if(image);
    }
    cpu.push(size, image)
}

/// What a program in virtual-8086 mode with VME sees of its flags: VIF in IF's place, and IOPL 3.
pub fn with_virtual_if(flags: u64) -> u64 {
    let visible = if flags & VIF != 0 { IF } else { 0 };
    flags & !IF | visible | IOPL
}

pub fn popf(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Exception> {
    let size = stack_width(insn);
    let mut stack = Stack::current(cpu);
    if cpu.v86() && cpu.iopl() < 3 && (cpu.cr4 & cr4::VME == 0 || size != 2) {
        return Err(Exception::GP0);
    }
    let image = stack.pop(cpu, size)?;
    if cpu.v86() && cpu.iopl() < 3 {
        set_flags_with_virtual_if(cpu, image)?;
    } else {
        let mut mask = STATUS | TF | DF | NT;
        if cpu.cpl <= cpu.iopl() || !cpu.protected() {
            mask |= IF;
        }
        if cpu.cpl == 0 {
            mask |= IOPL;
        }
        set_flags(cpu, image, mask | AC | ID, size);
    }
    stack.commit(cpu);
    Ok(())
}

/// Takes 16 bits of flags over in virtual-8086 mode with VME: IF goes to VIF, IOPL stays. #GP(0) where the monitor
/// has to act: an interrupt waits for the flag, or the program wants to single-step.
pub fn set_flags_with_virtual_if(cpu: &mut Cpu, image: u64) -> Result<(), Exception> {
    if image & TF != 0 || image & IF != 0 && cpu.rflags & VIP != 0 {
        return Err(Exception::GP0);
    }
    set_flags(cpu, image, STATUS | DF | NT, 2);
    cpu.rflags = if image & IF != 0 { cpu.rflags | VIF } else { cpu.rflags & !VIF };
    Ok(())
}

/// Takes the bits in `mask` over from an image of `size` bytes. RF is not among them unless it is in `mask`.
pub fn set_flags(cpu: &mut Cpu, image: u64, mask: u64, size: usize) {
    let mask = truncate(mask, size);
    if cpu.rflags & TF & mask & !image != 0 {
        // The instruction that ends single-stepping is itself still stepped.
        cpu.pending_debug |= dr6::BS;
    }
    cpu.rflags = cpu.rflags & !mask | image & mask | rflags::FIXED;
}
