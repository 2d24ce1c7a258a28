//! A sequence of instructions before it has an address.

use iced_x86::{Code, Encoder, Instruction, OpKind};

use crate::layout::{CODE, CODE_BYTES, CODE16, HIGH, PAGE};

/// The number of what is behind the code, where there is nothing.
pub const END: usize = usize::MAX;

/// What of an instruction depends on where others are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// Nothing.
    None,
    /// It branches to the item of that number; the number of items is the end.
    Branch(usize),
    /// Its immediate is that item's address.
    Immediate(usize),
    /// It throws away what the instruction before gives, and stays with it.
    Hides,
}

/// An instruction of a program.
#[derive(Clone, Copy, Debug)]
pub struct Item {
    /// It.
    pub insn: Instruction,
    /// Whom it names.
    pub link: Link,
}

/// Where the copies of the code are.
pub const BASES: [u64; 3] = [CODE16, CODE, HIGH + CODE];

/// Where a program lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    /// The first page of code, in one of its copies.
    pub base: u64,
    /// This many bytes of it on the first page of code, and a jump to the end of the second behind it; else it lies at
    /// the end of the second page.
    pub across: Option<u64>,
}

/// A sequence of instructions.
#[derive(Clone, Debug)]
pub struct Program {
    /// 16, 32 or 64.
    pub bits: u32,
    /// Where it lies.
    pub placement: Placement,
    /// What it does.
    pub items: Vec<Item>,
}

/// Encodes `insn` at `address`.
pub fn encode(insn: &Instruction, bits: u32, address: u64) -> Option<Vec<u8>> {
    let mut encoder = Encoder::try_new(bits).ok()?;
    encoder.encode(insn, address).ok()?;
    Some(encoder.take_buffer())
}

impl Program {
    /// Where it starts and its bytes; `None` if something is out of reach.
    pub fn assemble(&self) -> Option<(u64, Vec<u8>)> {
        let base = self.placement.base;
        let lengths = self.lengths(base)?;
        let total: u64 = lengths.iter().sum();
        let end = base + CODE_BYTES as u64;
        let (entry, limit) = match self.placement.across {
            Some(before) => (base + PAGE - before.min(PAGE), base + PAGE - before.min(PAGE) + total),
            None => (end - total, end),
        };
        let addresses: Vec<u64> = std::iter::once(entry)
            .chain(lengths.iter().scan(entry, |at, len| {
                *at += len;
                Some(*at)
            }))
            .collect();
        let mut code = Vec::new();
        for (item, &at) in self.items.iter().zip(&addresses) {
            code.extend(encode(&item.linked(&addresses, end), self.bits, at)?);
        }
        if code.len() as u64 != total {
            return None;
        }
        if self.placement.across.is_some() {
            code.extend(self.jump_to_end(limit, end)?);
        }
        Some((entry, code))
    }

    /// The items' lengths: they do not depend on addresses.
    fn lengths(&self, near: u64) -> Option<Vec<u64>> {
        let addresses = vec![near; self.items.len() + 1];
        self.items
            .iter()
            .map(|item| encode(&item.linked(&addresses, near), self.bits, near).map(|bytes| bytes.len() as u64))
            .collect()
    }

    fn jump_to_end(&self, at: u64, end: u64) -> Option<Vec<u8>> {
        let code = match self.bits {
            64 => Code::Jmp_rel32_64,
            32 => Code::Jmp_rel32_32,
            _ => Code::Jmp_rel16,
        };
        encode(&Instruction::with_branch(code, end).ok()?, self.bits, at)
    }
}

/// `insn` with a target that is close, if it is a branch.
pub fn near(insn: &Instruction, address: u64) -> Instruction {
    let mut insn = *insn;
    branch_to(&mut insn, address);
    insn
}

fn branch_to(insn: &mut Instruction, address: u64) {
    if insn.op_count() == 0 {
        return;
    }
    match insn.op0_kind() {
        OpKind::NearBranch64 => insn.set_near_branch64(address),
        OpKind::NearBranch32 => insn.set_near_branch32(address as u32),
        OpKind::NearBranch16 => insn.set_near_branch16(address as u16),
        OpKind::FarBranch32 => insn.set_far_branch32(address as u32),
        OpKind::FarBranch16 => insn.set_far_branch16(address as u16),
        _ => {}
    }
}

impl Item {
    fn linked(&self, addresses: &[u64], end: u64) -> Instruction {
        let address = |i: usize| if i == END { end } else { addresses[i.min(addresses.len() - 1)] };
        let mut insn = self.insn;
        match self.link {
            Link::None | Link::Hides => {}
            Link::Branch(i) => branch_to(&mut insn, address(i)),
            Link::Immediate(i) => {
                let last = insn.op_count() - 1;
                match insn.op_kind(last) {
                    OpKind::Immediate64 => insn.set_immediate64(address(i)),
                    OpKind::Immediate32to64 => insn.set_immediate32to64(address(i) as u32 as i32 as i64),
                    OpKind::Immediate16 => insn.set_immediate16(address(i) as u16),
                    _ => insn.set_immediate32(address(i) as u32),
                }
            }
        }
        insn
    }
}
