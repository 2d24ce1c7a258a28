//! A sequence of instructions before it has an address.

use iced_x86::{Code, Encoder, Instruction, OpKind};

use crate::layout::{CODE, CODE_END, HIGH, PAGE};

/// What of an instruction depends on where others are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// Nothing.
    None,
    /// It branches to the item of that number; the number of items is the end.
    Branch(usize),
    /// Its immediate is that item's address.
    Immediate(usize),
}

/// An instruction of a program.
#[derive(Clone, Copy, Debug)]
pub struct Item {
    /// It.
    pub insn: Instruction,
    /// Whom it names.
    pub link: Link,
}

/// Where a program lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Beyond 4 GiB.
    pub high: bool,
    /// This many bytes of it on the first page of code, and a jump to the end of the second behind it; else it lies at
    /// the end of the second page.
    pub across: Option<u64>,
}

/// A sequence of instructions.
#[derive(Clone, Debug)]
pub struct Program {
    /// 32 or 64.
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
        let base = if self.placement.high { HIGH } else { 0 };
        let lengths = self.lengths(base + CODE)?;
        let total: u64 = lengths.iter().sum();
        let end = base + CODE_END;
        let (entry, limit) = match self.placement.across {
            Some(before) => (base + CODE + PAGE - before.min(PAGE), base + CODE + PAGE - before.min(PAGE) + total),
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
            code.extend(encode(&item.linked(&addresses), self.bits, at)?);
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
            .map(|item| encode(&item.linked(&addresses), self.bits, near).map(|bytes| bytes.len() as u64))
            .collect()
    }

    fn jump_to_end(&self, at: u64, end: u64) -> Option<Vec<u8>> {
        let code = if self.bits == 64 { Code::Jmp_rel32_64 } else { Code::Jmp_rel32_32 };
        encode(&Instruction::with_branch(code, end).ok()?, self.bits, at)
    }
}

impl Item {
    fn linked(&self, addresses: &[u64]) -> Instruction {
        let address = |i: usize| addresses[i.min(addresses.len() - 1)];
        let mut insn = self.insn;
        match self.link {
            Link::None => {}
            Link::Branch(i) => match insn.op0_kind() {
                OpKind::NearBranch64 => insn.set_near_branch64(address(i)),
                OpKind::NearBranch32 => insn.set_near_branch32(address(i) as u32),
                _ => insn.set_near_branch16(address(i) as u16),
            },
            Link::Immediate(i) => {
                let last = insn.op_count() - 1;
                match insn.op_kind(last) {
                    OpKind::Immediate64 => insn.set_immediate64(address(i)),
                    OpKind::Immediate32to64 => insn.set_immediate32to64(address(i) as u32 as i32 as i64),
                    _ => insn.set_immediate32(address(i) as u32),
                }
            }
        }
        insn
    }
}
