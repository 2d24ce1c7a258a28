//! Operands of the emulated instructions: registers, memory, immediates.

use iced_x86::{Instruction, OpKind, Register};
use purlin_arch::x86_64::regs::gpr::{RDI, RSI};

use crate::{cpu::Cpu, exception::Exception, mem::Access};

/// Index of a segment register in [`Cpu::seg`].
pub fn segment_index(register: Register) -> usize {
    debug_assert!(register.is_segment_register());
    (register as usize - Register::ES as usize) % 6
}

/// Keeps the low `size` bytes (1, 2, 4 or 8) of `value`.
pub fn truncate(value: u64, size: usize) -> u64 {
    if size >= 8 { value } else { value & ((1 << (8 * size)) - 1) }
}

impl Cpu {
    /// The value of a general register of any size.
    pub fn register(&self, register: Register) -> u64 {
        let number = register.full_register().number() & 15;
        match register {
            Register::AH | Register::CH | Register::DH | Register::BH => self.gpr[number] >> 8 & 0xff,
            _ => truncate(self.gpr[number], register.size()),
        }
    }

    /// Sets a general register of any size: a 32-bit one clears the upper half, a smaller one leaves the rest.
    pub fn set_register(&mut self, register: Register, value: u64) {
        let number = register.full_register().number() & 15;
        match register {
            Register::AH | Register::CH | Register::DH | Register::BH => {
                let whole = &mut self.gpr[number];
                *whole = *whole & !0xff00 | (value & 0xff) << 8;
            }
            _ => self.set_gpr(number, register.size(), value),
        }
    }

    /// Sets the low `size` bytes (1, 2, 4 or 8) of general register `number`.
    pub fn set_gpr(&mut self, number: usize, size: usize, value: u64) {
        let whole = &mut self.gpr[number];
        *whole = match size {
            4 | 8 => truncate(value, size),
            _ => *whole & !truncate(u64::MAX, size) | truncate(value, size),
        };
    }

    /// Segment register and offset of the instruction's memory operand. The offset wraps at the address size.
    pub fn effective_address(&self, insn: &Instruction) -> (usize, u64) {
        let (base, index) = (insn.memory_base(), insn.memory_index());
        let segment = segment_index(insn.memory_segment());
        let mut offset = insn.memory_displacement64();
        if insn.is_ip_rel_memory_operand() {
            // Decoded as an absolute address; the code may run elsewhere than where it was decoded.
            offset = offset.wrapping_sub(insn.next_ip()).wrapping_add(self.rip).wrapping_add(insn.len() as u64);
        } else if base != Register::None {
            offset = offset.wrapping_add(self.register(base));
        }
        if index != Register::None {
            offset = offset.wrapping_add(self.register(index).wrapping_mul(u64::from(insn.memory_index_scale())));
        }
        (segment, truncate(offset, self.address_size(insn)))
    }

    /// Linear address of a part of the instruction's memory operand that the processor accesses by itself, `by` bytes
    /// on: its offset wraps at the address size, where one within a part does not.
    pub fn part_linear(
        &mut self,
        insn: &Instruction,
        by: usize,
        size: usize,
        access: Access,
    ) -> Result<u64, Exception> {
        let (segment, offset) = self.effective_address(insn);
        let offset = truncate(offset.wrapping_add(by as u64), self.address_size(insn));
        self.linear(segment, offset, size, access)
    }

    /// The size in bytes of the addresses of the instruction's memory operand.
    pub fn address_size(&self, insn: &Instruction) -> usize {
        let (base, index) = (insn.memory_base(), insn.memory_index());
        match (base, index) {
            (Register::None, Register::None) => match insn.memory_displ_size() {
                size @ (2 | 4 | 8) => size as usize,
                _ => self.code_size(),
            },
            (Register::None, index) => index.size(),
            (base, _) => base.size(),
        }
    }

    /// The default size of addresses in bytes: 2, 4 or 8.
    pub fn code_size(&self) -> usize {
        match (self.code64(), self.seg[purlin_arch::x86_64::regs::seg::CS].db()) {
            (true, _) => 8,
            (false, true) => 4,
            (false, false) => 2,
        }
    }

    /// Linear address of memory operand `op`, checked for an access of `size` bytes.
    pub fn mem_linear(&mut self, insn: &Instruction, op: u32, size: usize, access: Access) -> Result<u64, Exception> {
        let (segment, offset) = match insn.op_kind(op) {
            OpKind::MemorySegSI => (segment_index(insn.memory_segment()), truncate(self.gpr[RSI], 2)),
            OpKind::MemorySegESI => (segment_index(insn.memory_segment()), truncate(self.gpr[RSI], 4)),
            OpKind::MemorySegRSI => (segment_index(insn.memory_segment()), self.gpr[RSI]),
            OpKind::MemorySegDI => (segment_index(insn.memory_segment()), truncate(self.gpr[RDI], 2)),
            OpKind::MemorySegEDI => (segment_index(insn.memory_segment()), truncate(self.gpr[RDI], 4)),
            OpKind::MemorySegRDI => (segment_index(insn.memory_segment()), self.gpr[RDI]),
            OpKind::MemoryESDI => (segment_index(Register::ES), truncate(self.gpr[RDI], 2)),
            OpKind::MemoryESEDI => (segment_index(Register::ES), truncate(self.gpr[RDI], 4)),
            OpKind::MemoryESRDI => (segment_index(Register::ES), self.gpr[RDI]),
            _ => self.effective_address(insn),
        };
        self.linear(segment, offset, size, access)
    }

    /// Operand `op`, zero-extended; an immediate as its instruction extends it.
    pub fn read_op(&mut self, insn: &Instruction, op: u32) -> Result<u64, Exception> {
        match insn.op_kind(op) {
            OpKind::Register => {
                let register = insn.op_register(op);
                if register.is_segment_register() {
                    return Ok(u64::from(self.seg[segment_index(register)].selector));
                }
                Ok(self.register(register))
            }
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => Ok(self.branch_target(insn)),
            OpKind::FarBranch16 | OpKind::FarBranch32 => Err(Exception::UD),
            kind if is_memory(kind) => {
                let size = insn.memory_size().size().clamp(1, 8);
                let address = self.mem_linear(insn, op, size, Access::Read)?;
                self.read_sized(address, size)
            }
            _ => Ok(insn.immediate(op)),
        }
    }

    /// Writes operand `op`, a general register or memory.
    pub fn write_op(&mut self, insn: &Instruction, op: u32, value: u64) -> Result<(), Exception> {
        if insn.op_kind(op) == OpKind::Register {
            self.set_register(insn.op_register(op), value);
            return Ok(());
        }
        let size = insn.memory_size().size().clamp(1, 8);
        let address = self.mem_linear(insn, op, size, Access::Write)?;
        self.write_sized(address, size, value)
    }

    /// Loads `size` bytes (up to 8) from a linear address.
    pub fn read_sized(&mut self, address: u64, size: usize) -> Result<u64, Exception> {
        let mut bytes = [0; 8];
        self.read_as(address, &mut bytes[..size], self.privilege())?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Stores the low `size` bytes (up to 8) of `value` to a linear address.
    pub fn write_sized(&mut self, address: u64, size: usize, value: u64) -> Result<(), Exception> {
        self.write_as(address, &value.to_le_bytes()[..size], self.privilege())
    }

    /// Where the instruction after this one is: the offset in CS.
    pub fn next_rip(&self, insn: &Instruction) -> u64 {
        let next = self.rip.wrapping_add(insn.len() as u64);
        if self.code64() { next } else { next & 0xffff_ffff }
    }

    /// Where a near branch leads, before it is cut to the operand size.
    pub fn branch_target(&self, insn: &Instruction) -> u64 {
        let distance = insn.near_branch_target().wrapping_sub(insn.next_ip());
        self.next_rip(insn).wrapping_add(distance)
    }
}

/// Whether an operand is in memory.
pub fn is_memory(kind: OpKind) -> bool {
    matches!(
        kind,
        OpKind::Memory
            | OpKind::MemorySegSI
            | OpKind::MemorySegESI
            | OpKind::MemorySegRSI
            | OpKind::MemorySegDI
            | OpKind::MemorySegEDI
            | OpKind::MemorySegRDI
            | OpKind::MemoryESDI
            | OpKind::MemoryESEDI
            | OpKind::MemoryESRDI
    )
}

#[cfg(test)]
mod tests;
