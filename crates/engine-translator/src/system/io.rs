//! IN, OUT, INS, OUTS, and who may execute them (SDM vol. 1 chapter 19).

use iced_x86::{Instruction, OpKind};
use purlin_arch::x86_64::regs::{
    gpr::{RDI, RDX, RSI},
    seg,
};

use super::{
    Done, Flow,
    string::{Repeat, Shape},
};
use crate::{cpu::Cpu, exception::Exception, mem::Access, operand::truncate};

/// TSS types, bits 3:0 of the access rights: 32-bit (64-bit in long mode), available and busy.
const TSS32: u32 = 9;
const TSS32_BUSY: u32 = 11;
/// Where a TSS says where its I/O permission map is.
const MAP_BASE: u64 = 102;

/// IN.
pub(super) fn input(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Exception> {
    let size = insn.op_register(0).size();
    let port = port(cpu, insn, 1);
    cpu.check_port(port, size)?;
    let value = cpu.bus().port_in(port, size as u8);
    cpu.set_register(insn.op_register(0), truncate(u64::from(value), size));
    Ok(())
}

/// OUT.
pub(super) fn output(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Exception> {
    let register = insn.op_register(1);
    let port = port(cpu, insn, 0);
    cpu.check_port(port, register.size())?;
    let value = cpu.register(register) as u32;
    let after = cpu.bus().port_out(port, register.size() as u8, value);
    cpu.after_bus(after);
    Ok(())
}

fn port(cpu: &Cpu, insn: &Instruction, op: u32) -> u16 {
    match insn.op_kind(op) {
        OpKind::Register => cpu.gpr[RDX] as u16,
        _ => u16::from(insn.immediate8()),
    }
}

/// INS: the port is read after it is known that the store will not fault.
pub(super) fn input_string(cpu: &mut Cpu, insn: &Instruction) -> Done {
    let shape = Shape::of(insn);
    repeat(cpu, &shape, |cpu, port| {
        let address = cpu.linear(seg::ES, truncate(cpu.gpr[RDI], shape.width), shape.size, Access::Write)?;
        cpu.probe(address, shape.size, Access::Write, cpu.privilege())?;
        let value = cpu.bus().port_in(port, shape.size as u8);
        cpu.write_sized(address, shape.size, u64::from(value))?;
        shape.advance(cpu, RDI, 1);
        Ok(())
    })
}

/// OUTS.
pub(super) fn output_string(cpu: &mut Cpu, insn: &Instruction) -> Done {
    let shape = Shape::of(insn);
    repeat(cpu, &shape, |cpu, port| {
        let address = cpu.linear(shape.segment, truncate(cpu.gpr[RSI], shape.width), shape.size, Access::Read)?;
        let value = cpu.read_sized(address, shape.size)?;
        let after = cpu.bus().port_out(port, shape.size as u8, value as u32);
        cpu.after_bus(after);
        shape.advance(cpu, RSI, 1);
        Ok(())
    })
}

/// Both: the permission is checked once, since nothing in between can change it, and even if there is nothing to do.
fn repeat(cpu: &mut Cpu, shape: &Shape, mut element: impl FnMut(&mut Cpu, u16) -> Result<(), Exception>) -> Done {
    let port = cpu.gpr[RDX] as u16;
    cpu.check_port(port, shape.size)?;
    if shape.count(cpu) == 0 {
        return Ok(Flow::Next);
    }
    loop {
        element(cpu, port)?;
        shape.count_down(cpu, 1);
        if shape.repeat == Repeat::Once || shape.count(cpu) == 0 {
            return Ok(Flow::Next);
        }
        if shape.pauses(cpu) {
            return Ok(Flow::Set);
        }
    }
}

impl Cpu {
    /// #GP(0) unless the I/O privilege level or the I/O permission map allows `size` bytes at `port`.
    fn check_port(&mut self, port: u16, size: usize) -> Result<(), Exception> {
        if !self.protected() || !self.v86() && self.cpl <= self.iopl() {
            return Ok(());
        }
        let kind = self.tr.access & 0x1f;
        let whole_map_base = u64::from(self.tr.limit) > MAP_BASE;
        if !matches!(kind, TSS32 | TSS32_BUSY) || !whole_map_base {
            return Err(Exception::GP0);
        }
        let tss = self.tr.base;
        let map = u64::from(self.load_system::<u16>(self.tss_address(tss, MAP_BASE))?);
        // Two bytes are read always, so that the map has to be one byte longer than its ports need.
        let at = map + u64::from(port / 8);
        if at + 1 > u64::from(self.tr.limit) {
            return Err(Exception::GP0);
        }
        let bits = self.load_system::<u16>(self.tss_address(tss, at))?;
        let wanted = ((1 << size) - 1) << (port % 8);
        if bits & wanted != 0 { Err(Exception::GP0) } else { Ok(()) }
    }

    fn tss_address(&self, base: u64, offset: u64) -> u64 {
        let address = base.wrapping_add(offset);
        if self.long_mode() { address } else { address & 0xffff_ffff }
    }
}

#[cfg(test)]
mod tests;
