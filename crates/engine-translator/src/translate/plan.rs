//! Which accesses of a block are checked together: those off one base (and index) register that nothing but known
//! constants are added to in between, if they lie close to each other. The first of them, the *lead*, is checked for the
//! range of all. What it finds is the host address of that range; the others just use it.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};
use purlin_arch::x86_64::regs::seg;

use super::{
    asm::reg,
    classify::{Class, Own},
    desc::AccessDesc,
    emit::Insn,
    masking::Masking,
    mode::Mode,
    operands::{Operand, STACK, access_flags, is_bit_string, operand_size, register_accesses},
};

/// Bytes that a group spans at most: the larger, the more often it crosses a page.
const MAX_SPAN: i64 = 512;
/// Groups that are open at the same time at most.
pub const GROUPS: usize = 6;

/// How an instruction's access is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Check {
    /// By itself, if there is one.
    Alone,
    /// Together with others.
    Lead(Lead),
    /// Its lead has found the host address of the group: it is at this offset from there.
    Member {
        /// Number of the group.
        group: u8,
        /// Offset in bytes.
        offset: i32,
    },
}

/// The first access of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lead {
    /// Number of the group, less than [`GROUPS`].
    pub group: u8,
    /// Its lowest byte, as this operand.
    pub low: Operand,
    /// Bytes from there on.
    pub span: u32,
    /// Whether any access of it stores.
    pub write: bool,
    /// Offset of the lead's own operand.
    pub offset: i32,
}

/// What the addresses of a group have in common.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Key {
    segment: usize,
    base: Option<u8>,
    index: Option<(u8, u8)>,
    movable: bool,
}

/// One access.
struct Reference {
    key: Key,
    disp: i64,
    size: i64,
    write: bool,
    operand: Operand,
}

struct Open {
    number: u8,
    lead: usize,
    key: Key,
    /// What has been added to the registers of the key since the lead.
    shift: i64,
    low: i64,
    high: i64,
    write: bool,
    /// Number of jumps out of the block before the lead.
    exits: usize,
    /// Offset of the lead from the key's value there; those of the others are in their checks until the group ends.
    at: i64,
    /// The last access.
    last: usize,
    operand: Operand,
}

/// How each instruction's access is checked.
pub fn plan(insns: &[Insn], mode: Mode) -> Vec<Check> {
    let mut planner = Planner { checks: vec![Check::Alone; insns.len()], open: Vec::new(), exits: 0 };
    if !mode.grouped() || mode.bits() != 64 {
        return planner.checks;
    }
    for (i, insn) in insns.iter().enumerate() {
        if let Some(reference) = reference(insn, mode) {
            planner.access(i, reference);
        }
        planner.registers(insn);
        if insn.class == Class::JumpIf {
            planner.exits += 1;
        }
    }
    planner.close(|_| true);
    planner.checks
}

struct Planner {
    checks: Vec<Check>,
    open: Vec<Open>,
    exits: usize,
}

impl Planner {
    fn access(&mut self, i: usize, access: Reference) {
        let exits = self.exits;
        let same = self.open.iter_mut().find(|open| {
            let at = open.shift + access.disp;
            let (low, high) = (open.low.min(at), open.high.max(at + access.size));
            // Where execution may leave in between, a page that is only read must not be checked for a store.
            let may_store = !access.write || open.write || open.exits == exits;
            open.key == access.key && high - low <= MAX_SPAN && may_store
        });
        if let Some(open) = same {
            let at = open.shift + access.disp;
            (open.low, open.high) = (open.low.min(at), open.high.max(at + access.size));
            open.write |= access.write;
            open.last = i;
            self.checks[i] = Check::Member { group: open.number, offset: at as i32 };
            return;
        }
        self.close(|open| open.key == access.key);
        let Some(number) = (0..GROUPS as u8).find(|n| self.open.iter().all(|open| open.number != *n)) else { return };
        self.open.push(Open {
            number,
            lead: i,
            key: access.key,
            shift: 0,
            low: access.disp,
            high: access.disp + access.size,
            write: access.write,
            exits,
            at: access.disp,
            last: i,
            operand: access.operand,
        });
    }

    /// What the instruction does to the registers that groups depend on.
    fn registers(&mut self, insn: &Insn) {
        if matches!(insn.class, Class::Call | Class::CallIndirect) {
            self.close(|_| true);
            return;
        }
        if matches!(insn.class, Class::Swapgs | Class::Own(Own::WriteBase)) {
            self.close(|open| matches!(open.key.segment, seg::FS | seg::GS));
        }
        let moved = adds(insn);
        if let Some((register, by)) = moved {
            for open in &mut self.open {
                if open.key.base == Some(register) {
                    open.shift += by;
                }
                if let Some((index, scale)) = open.key.index
                    && index == register
                {
                    open.shift += by << scale;
                }
            }
            // Far from where an address can be an offset.
            self.close(|open| open.shift.unsigned_abs() > 1 << 30);
        }
        if self.open.is_empty() {
            return;
        }
        let mut mask = register_accesses(&insn.insn).1;
        if let Some((register, _)) = moved {
            mask &= !(1 << register);
        }
        if mask != 0 {
            let hit = |register: u8| mask & 1 << register != 0;
            self.close(|open| open.key.base.is_some_and(hit) || open.key.index.is_some_and(|(index, _)| hit(index)));
        }
    }

    /// Ends groups. One with a single access is none.
    fn close(&mut self, which: impl Fn(&Open) -> bool) {
        let checks = &mut self.checks;
        self.open.retain(|open| {
            if !which(open) {
                return true;
            }
            let low = open.operand.moved(open.low);
            for check in &mut checks[open.lead..=open.last] {
                match check {
                    Check::Member { group, offset } if *group == open.number => match low {
                        Some(_) => *offset = offset.wrapping_sub(open.low as i32),
                        None => *check = Check::Alone,
                    },
                    _ => {}
                }
            }
            if open.last != open.lead
                && let Some(low) = low
            {
                checks[open.lead] = Check::Lead(Lead {
                    group: open.number,
                    low,
                    span: (open.high - open.low) as u32,
                    write: open.write,
                    offset: (open.at - open.low) as i32,
                });
            }
            false
        });
    }
}

/// The access of an instruction, if it may be one of a group.
fn reference(insn: &Insn, mode: Mode) -> Option<Reference> {
    let (operand, size, write) = match insn.class {
        Class::Copy | Class::Vector(_) => {
            let at = memory_operand(&insn.insn)?;
            let whole = |insn: &Instruction| Masking::of(insn) == Masking::default();
            let pointers = matches!(insn.class, Class::Vector(needs) if needs.x87);
            if insn.insn.mnemonic() == Mnemonic::Lea || is_bit_string(&insn.insn) || pointers || !whole(&insn.insn) {
                return None;
            }
            let write = access_flags(&insn.insn, at) & AccessDesc::WRITE != 0;
            (Operand::of(&insn.insn), operand_size(&insn.insn), write)
        }
        Class::Push if insn.insn.op0_kind() != OpKind::Memory => {
            let size = width(insn);
            (Operand::register(reg::RSP, -(size as i32), STACK), size, true)
        }
        Class::Pushf => (Operand::register(reg::RSP, -8, STACK), 8, true),
        Class::Pop if insn.insn.op0_kind() == OpKind::Register => {
            let size = width(insn);
            (Operand::register(reg::RSP, 0, STACK), size, false)
        }
        Class::Leave => (Operand::register(reg::RBP, 0, STACK), 8, false),
        Class::Return => (Operand::register(reg::RSP, 0, STACK), 8, false),
        Class::Call | Class::Filler => (Operand::register(reg::RSP, -8, STACK), 8, true),
        _ => return None,
    };
    if !operand.is_wide() || !mode.flat(operand.segment) || !(1..=64).contains(&size) {
        return None;
    }
    // All segments without a base are one.
    let segment = match operand.segment {
        seg::FS | seg::GS => operand.segment,
        _ => STACK,
    };
    let key = Key { segment, base: operand.base(), index: operand.index(), movable: operand.is_movable() };
    Some(Reference { key, disp: operand.displacement(), size: size as i64, write, operand })
}

fn width(insn: &Insn) -> usize {
    insn.insn.stack_pointer_increment().unsigned_abs() as usize
}

fn memory_operand(insn: &Instruction) -> Option<u32> {
    (0..insn.op_count()).find(|&i| insn.op_kind(i) == OpKind::Memory)
}

/// The register that the instruction adds a constant to, and the constant.
fn adds(insn: &Insn) -> Option<(u8, i64)> {
    use Code::{
        Add_RAX_imm32, Add_rm64_imm8, Add_rm64_imm32, Dec_rm64, Inc_rm64, Lea_r64_m, Sub_RAX_imm32, Sub_rm64_imm8,
        Sub_rm64_imm32,
    };
    let i = &insn.insn;
    match insn.class {
        Class::Push | Class::Pushf => return Some((reg::RSP, i64::from(i.stack_pointer_increment()))),
        // What is popped replaces what was added.
        Class::Pop if i.op0_kind() == OpKind::Register && i.op0_register().full_register() == Register::RSP => {
            return None;
        }
        Class::Pop => return Some((reg::RSP, i64::from(i.stack_pointer_increment()))),
        Class::Call | Class::Filler => return Some((reg::RSP, -8)),
        Class::Copy if i.op0_kind() == OpKind::Register => {}
        _ => return None,
    }
    let register = i.op0_register().full_register().number() as u8;
    match i.code() {
        Add_rm64_imm8 | Add_rm64_imm32 | Add_RAX_imm32 => Some((register, i.immediate(1) as i64)),
        Sub_rm64_imm8 | Sub_rm64_imm32 | Sub_RAX_imm32 => Some((register, -(i.immediate(1) as i64))),
        Inc_rm64 => Some((register, 1)),
        Dec_rm64 => Some((register, -1)),
        Lea_r64_m => {
            let same = i.memory_base() == i.op0_register() && i.memory_index() == Register::None;
            same.then(|| (register, i.memory_displacement64() as i32 as i64))
        }
        _ => None,
    }
}
