//! Vector instructions that access memory element by element: masked moves, gathers and scatters. Elements that the
//! mask leaves out are not touched, and cannot fault (SDM vol. 2, VMASKMOV, VPMASKMOV, MASKMOVDQU, VPGATHER,
//! VPSCATTER).

use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use purlin_arch::x86_64::regs::gpr::RDI;

use super::checks;
use crate::{
    cpu::Cpu,
    exception::Exception,
    mem::Access,
    operand::{segment_index, truncate},
};

/// Executes one of them.
pub fn execute(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Exception> {
    use Mnemonic::*;
    checks::check_fpu(cpu, insn)?;
    match insn.mnemonic() {
        Vmaskmovps | Vmaskmovpd | Vpmaskmovd | Vpmaskmovq if insn.op0_kind() == OpKind::Register => load(cpu, insn),
        Vmaskmovps | Vmaskmovpd | Vpmaskmovd | Vpmaskmovq => store(cpu, insn),
        Maskmovdqu | Vmaskmovdqu | Maskmovq => store_bytes(cpu, insn),
        _ if insn.op0_kind() == OpKind::Register => gather(cpu, insn),
        _ => scatter(cpu, insn),
    }
}

/// Number of a vector register.
fn number(register: Register) -> usize {
    register.number()
}

/// Whether the sign bit of each element of `mask` is set, by element.
fn sign_bits(mask: &[u8; 64], size: usize, count: usize) -> u64 {
    (0..count).filter(|i| mask[(i + 1) * size - 1] & 0x80 != 0).fold(0, |bits, i| bits | 1 << i)
}

fn active(bits: u64, count: usize) -> impl Iterator<Item = usize> {
    (0..count).filter(move |i| bits & 1 << i != 0)
}

/// VMASKMOV from memory: the destination gets zeros where the mask is clear.
fn load(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Exception> {
    let (length, size) = (insn.op0_register().size(), element_size(insn));
    let mask = cpu.xstate.vector(number(insn.op1_register()), length);
    let bits = sign_bits(&mask, size, length / size);
    let (segment, offset) = cpu.effective_address(insn);
    let mut value = [0; 64];
    for i in active(bits, length / size) {
        let at = cpu.element_linear(segment, offset, i * size, size, Access::Read)?;
        let bytes = &mut value[i * size..(i + 1) * size];
        bytes.copy_from_slice(&cpu.read_sized(at, size)?.to_le_bytes()[..size]);
    }
    cpu.xstate.set_vector(number(insn.op0_register()), &value[..length]);
    Ok(())
}

/// VMASKMOV to memory: nothing is stored if an element that is to be stored faults.
fn store(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Exception> {
    let (length, size) = (insn.op2_register().size(), element_size(insn));
    let mask = cpu.xstate.vector(number(insn.op1_register()), length);
    let value = cpu.xstate.vector(number(insn.op2_register()), length);
    let bits = sign_bits(&mask, size, length / size);
    let (segment, offset) = cpu.effective_address(insn);
    store_active(cpu, &value, bits, size, length / size, |cpu, i| {
        cpu.element_linear(segment, offset, i * size, size, Access::Write)
    })
}

/// MASKMOVDQU, MASKMOVQ: bytes of the first operand to (R/E)DI, where the second's have their sign bit set.
fn store_bytes(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Exception> {
    let mmx = insn.mnemonic() == Mnemonic::Maskmovq;
    let (value, mask, length) = if mmx {
        let mut pair = [[0; 64]; 2];
        for (whole, register) in pair.iter_mut().zip([insn.op1_register(), insn.op2_register()]) {
            whole[..8].copy_from_slice(&cpu.xstate.mmx(number(register)).to_le_bytes());
        }
        (pair[0], pair[1], 8)
    } else {
        let value = cpu.xstate.vector(number(insn.op1_register()), 16);
        (value, cpu.xstate.vector(number(insn.op2_register()), 16), 16)
    };
    let width = match insn.op0_kind() {
        OpKind::MemorySegDI => 2,
        OpKind::MemorySegEDI => 4,
        _ => 8,
    };
    let segment = segment_index(insn.memory_segment());
    let start = cpu.gpr[RDI];
    let bits = sign_bits(&mask, 1, length);
    if mmx {
        cpu.xstate.enter_mmx();
    }
    // It is in halves, each aligned and with an address of its own; Intel's processors begin with the upper one. All of it is
    // checked, whatever the mask (the SDM leaves that open, vol. 2, "MASKMOVDQU").
    let mut halves = [0; 2];
    let (count, upper_first) = (length / HALF, !cpu.features.amd);
    for i in (0..count).map(|i| if upper_first { count - 1 - i } else { i }) {
        let offset = truncate(start.wrapping_add((i * HALF) as u64), width);
        halves[i] = cpu.linear(segment, offset, HALF, Access::Write)?;
        cpu.probe(halves[i], HALF, Access::Write, cpu.privilege())?;
    }
    store_active(cpu, &value, bits, 1, length, |_, i| Ok(halves[i / HALF].wrapping_add((i % HALF) as u64)))
}

/// Bytes of an XMM register's half.
const HALF: usize = 8;

fn store_active(
    cpu: &mut Cpu,
    value: &[u8; 64],
    bits: u64,
    size: usize,
    count: usize,
    mut address: impl FnMut(&mut Cpu, usize) -> Result<u64, Exception>,
) -> Result<(), Exception> {
    let (mut addresses, mut bits, mut beyond) = ([0; 64], bits, None);
    for i in active(bits, count) {
        match address(cpu, i) {
            Ok(address) => addresses[i] = address,
            Err(fault) if cpu.features.amd => return Err(fault),
            Err(fault) => {
                // To Intel's processors that is the next one's, and comes behind the stores of those before.
                (bits, beyond) = (bits & ((1 << i) - 1), Some(fault));
                break;
            }
        }
        if cpu.features.amd {
            cpu.probe(addresses[i], size, Access::Write, cpu.privilege())?;
        }
    }
    if !cpu.features.amd && bits != 0 {
        let [first, last] = [bits.trailing_zeros(), bits.ilog2()].map(|i| addresses[i as usize]);
        cpu.probe_ends(first, last.wrapping_add(size as u64 - 1))?;
    }
    for i in active(bits, count) {
        cpu.write_as(addresses[i], &value[i * size..(i + 1) * size], cpu.privilege())?;
    }
    beyond.map_or(Ok(()), Err)
}

/// A gather's or scatter's memory operand: an address for each element of the index register.
struct Vector {
    segment: usize,
    base: u64,
    scale: u64,
    indices: [u8; 64],
    index_size: usize,
    /// Bytes of an address.
    width: usize,
}

impl Vector {
    fn of(cpu: &mut Cpu, insn: &Instruction) -> Self {
        let (base, index) = (insn.memory_base(), insn.memory_index());
        let width = match (base, insn.memory_displ_size()) {
            (Register::None, 8) => 8,
            (Register::None, _) => 4,
            (base, _) => base.size(),
        };
        let start = if base == Register::None { 0 } else { cpu.register(base) };
        Self {
            segment: segment_index(insn.memory_segment()),
            base: start.wrapping_add(insn.memory_displacement64()),
            scale: u64::from(insn.memory_index_scale()),
            indices: cpu.xstate.vector(number(index), index.size()),
            index_size: if insn.is_vsib64() { 8 } else { 4 },
            width,
        }
    }

    /// Linear address of element `i`, checked.
    fn linear(&self, cpu: &mut Cpu, i: usize, size: usize, access: Access) -> Result<u64, Exception> {
        let bytes = &self.indices[i * self.index_size..(i + 1) * self.index_size];
        let index = match self.index_size {
            4 => i32::from_le_bytes(bytes.try_into().unwrap_or_default()) as u64,
            _ => u64::from_le_bytes(bytes.try_into().unwrap_or_default()),
        };
        let offset = truncate(self.base.wrapping_add(index.wrapping_mul(self.scale)), self.width);
        cpu.element_linear(self.segment, offset, 0, size, access)
    }
}

/// Where the mask of a gather or scatter is; elements are struck out one by one as they are done.
#[derive(Clone, Copy)]
enum Mask {
    /// AVX2: sign bits of a vector register, of so many bytes.
    Vector(usize, usize),
    /// AVX-512.
    Opmask(usize),
}

impl Mask {
    fn of(insn: &Instruction) -> Self {
        match insn.op_mask() {
            Register::None => Self::Vector(number(insn.op2_register()), insn.op2_register().size()),
            register => Self::Opmask(number(register)),
        }
    }

    fn bits(self, cpu: &mut Cpu, size: usize, count: usize) -> u64 {
        match self {
            Self::Vector(register, length) => sign_bits(&cpu.xstate.vector(register, length), size, count),
            Self::Opmask(register) => cpu.xstate.opmask(register),
        }
    }

    /// After the whole instruction: nothing is left of it.
    fn clear(self, cpu: &mut Cpu) {
        match self {
            Self::Vector(register, _) => cpu.xstate.set_vector(register, &[]),
            Self::Opmask(register) => cpu.xstate.set_opmask(register, 0),
        }
    }

    /// At a fault of element `at`: strikes those before it out. The rest stays as it is on AMD's processors; on Intel's all bits of
    /// an element are what its sign bit was, and what is above the instruction's `length` is gone.
    fn strike_out(self, cpu: &mut Cpu, at: usize, size: usize, length: usize) {
        match self {
            Self::Vector(register, _) => {
                let mut value = cpu.xstate.vector(register, 64);
                if !cpu.features.amd {
                    let left = sign_bits(&value, size, length / size);
                    value = [0; 64];
                    active(left, length / size).for_each(|i| value[i * size..(i + 1) * size].fill(0xff));
                }
                value[..at * size].fill(0);
                cpu.xstate.set_vector(register, &value);
            }
            Self::Opmask(register) => {
                let left = cpu.xstate.opmask(register) & !((1 << at) - 1);
                cpu.xstate.set_opmask(register, left);
            }
        }
    }
}

/// Elements of a gather or scatter: as many as the longer of data and indices allows.
fn element_count(register: Register, insn: &Instruction, size: usize) -> usize {
    let index_size = if insn.is_vsib64() { 8 } else { 4 };
    register.size().max(insn.memory_index().size()) / size.max(index_size)
}

/// VGATHER, VPGATHER: a fault leaves the elements before it loaded and struck out of the mask.
fn gather(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Exception> {
    let target = insn.op0_register();
    let (index, mask) = (insn.memory_index(), Mask::of(insn));
    let same = |a: Register, b: Register| number(a) == number(b);
    let legal = match mask {
        Mask::Vector(..) => {
            let mask = insn.op2_register();
            !same(target, index) && !same(target, mask) && !same(index, mask)
        }
        Mask::Opmask(_) => !same(target, index),
    };
    if !legal {
        return Err(Exception::UD);
    }
    let (size, memory) = (element_size(insn), Vector::of(cpu, insn));
    let count = element_count(target, insn, size);
    let mut value = cpu.xstate.vector(number(target), 64);
    let length = target.size().max(index.size());
    let bits = mask.bits(cpu, size, count);
    for i in active(bits, count) {
        match memory.linear(cpu, i, size, Access::Read).and_then(|at| cpu.read_sized(at, size)) {
            Ok(element) => value[i * size..(i + 1) * size].copy_from_slice(&element.to_le_bytes()[..size]),
            Err(exception) => {
                // On Intel's processors each element that is loaded clears what is above the result.
                let loaded = bits & ((1 << i) - 1) != 0;
                let kept = if loaded && !cpu.features.amd { length } else { value.len() };
                cpu.xstate.set_vector(number(target), &value[..kept]);
                mask.strike_out(cpu, i, size, length);
                return Err(exception);
            }
        }
    }
    cpu.xstate.set_vector(number(target), &value[..target.size().min(count * size)]);
    mask.clear(cpu);
    Ok(())
}

/// VSCATTER, VPSCATTER: in order from the lowest element, each struck out of the mask when it is stored.
fn scatter(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Exception> {
    let source = insn.op1_register();
    let (size, memory, mask) = (element_size(insn), Vector::of(cpu, insn), Mask::of(insn));
    let count = element_count(source, insn, size);
    let value = cpu.xstate.vector(number(source), source.size());
    for i in active(mask.bits(cpu, size, count), count) {
        let stored = memory
            .linear(cpu, i, size, Access::Write)
            .and_then(|at| cpu.write_as(at, &value[i * size..(i + 1) * size], cpu.privilege()));
        if let Err(exception) = stored {
            mask.strike_out(cpu, i, size, 0);
            return Err(exception);
        }
    }
    mask.clear(cpu);
    Ok(())
}

/// Bytes of an element in memory.
fn element_size(insn: &Instruction) -> usize {
    use Mnemonic::*;
    match insn.mnemonic() {
        Vmaskmovps | Vpmaskmovd => 4,
        Vmaskmovpd | Vpmaskmovq => 8,
        _ => insn.memory_size().element_size().clamp(4, 8),
    }
}
