//! MOVS, STOS, LODS, CMPS, SCAS, with and without REP (SDM vol. 2B, "REP").
//!
//! Repetitions go page by page on host memory where nothing can come in between. At each page's end the registers are
//! as the manual says, so that a fault or an interrupt finds them right; after an interrupt the instruction goes on.

use iced_x86::{Instruction, Mnemonic::*, OpKind};
use purlin_arch::x86_64::regs::{
    gpr::{RAX, RCX, RDI, RSI},
    rflags, seg,
};

use super::{
    Done, Flow,
    bulk::{self, Direction},
};
use crate::{
    cpu::Cpu,
    exception::Exception,
    mem::{Access, Target, page_rest},
    operand::{segment_index, truncate},
};

/// What the instruction does with an element.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    Move,
    Store,
    Load,
    Compare,
    Scan,
}

/// The prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Repeat {
    Once,
    /// REP, REPE.
    Equal,
    /// REPNE.
    NotEqual,
}

/// A string instruction's operands.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    /// Bytes of an element.
    pub size: usize,
    /// Bytes of an address: of RSI, RDI and RCX.
    pub width: usize,
    /// The source's segment register.
    pub segment: usize,
    pub repeat: Repeat,
}

impl Shape {
    pub fn of(insn: &Instruction) -> Self {
        let kinds = || (0..insn.op_count()).map(|op| insn.op_kind(op));
        let width = kinds()
            .find_map(|kind| match kind {
                OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => Some(2),
                OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI => Some(4),
                OpKind::MemorySegRSI | OpKind::MemorySegRDI | OpKind::MemoryESRDI => Some(8),
                _ => None,
            })
            .unwrap_or(8);
        let has_source =
            kinds().any(|kind| matches!(kind, OpKind::MemorySegSI | OpKind::MemorySegESI | OpKind::MemorySegRSI));
        let repeat = match (insn.has_rep_prefix(), insn.has_repne_prefix()) {
            (_, true) => Repeat::NotEqual,
            (true, false) => Repeat::Equal,
            _ => Repeat::Once,
        };
        let segment = if has_source { segment_index(insn.memory_segment()) } else { seg::DS };
        Self { size: insn.memory_size().size().clamp(1, 8), width, segment, repeat }
    }

    /// The repetitions left.
    pub fn count(&self, cpu: &Cpu) -> u64 {
        match self.repeat {
            Repeat::Once => 1,
            _ => truncate(cpu.gpr[RCX], self.width),
        }
    }

    /// Counts `done` repetitions.
    pub fn count_down(&self, cpu: &mut Cpu, done: u64) {
        if self.repeat != Repeat::Once {
            let left = truncate(cpu.gpr[RCX], self.width).wrapping_sub(done);
            cpu.set_gpr(RCX, self.width, left);
        }
    }

    /// Moves a pointer on by `done` elements.
    pub fn advance(&self, cpu: &mut Cpu, register: usize, done: u64) {
        let bytes = done.wrapping_mul(self.size as u64);
        let step = if direction(cpu) == Direction::Up { bytes } else { bytes.wrapping_neg() };
        let moved = cpu.gpr[register].wrapping_add(step);
        cpu.set_gpr(register, self.width, truncate(moved, self.width));
    }

    /// Whether repetitions are to stop here so that something else gets its turn: a single step, a data breakpoint, a
    /// request. RF then keeps the instruction's own breakpoint from being hit again.
    pub fn pauses(&self, cpu: &mut Cpu) -> bool {
        let requested = cpu.shared.mailbox(cpu.index as usize).is_some_and(|mailbox| mailbox.any());
        let pauses = requested || cpu.rflags & rflags::TF != 0 || cpu.pending_debug != 0 || cpu.leave;
        if pauses {
            cpu.rflags |= rflags::RF;
        }
        pauses
    }
}

pub(super) fn direction(cpu: &Cpu) -> Direction {
    if cpu.rflags & rflags::DF == 0 { Direction::Up } else { Direction::Down }
}

/// MOVS, STOS, LODS, CMPS, SCAS.
pub(super) fn execute(cpu: &mut Cpu, insn: &Instruction) -> Done {
    let operation = match insn.mnemonic() {
        Movsb | Movsw | Movsd | Movsq => Operation::Move,
        Stosb | Stosw | Stosd | Stosq => Operation::Store,
        Lodsb | Lodsw | Lodsd | Lodsq => Operation::Load,
        Cmpsb | Cmpsw | Cmpsd | Cmpsq => Operation::Compare,
        Scasb | Scasw | Scasd | Scasq => Operation::Scan,
        _ => return Err(Exception::UD),
    };
    let shape = Shape::of(insn);
    let flags = cpu.rflags;
    loop {
        let count = shape.count(cpu);
        if count == 0 {
            return Ok(Flow::Next);
        }
        let done = step(cpu, &shape, operation, count).inspect_err(|_| restore_flags(cpu, operation, flags))?;
        if operation != Operation::Store && operation != Operation::Scan {
            shape.advance(cpu, RSI, done);
        }
        if operation != Operation::Load {
            shape.advance(cpu, RDI, done);
        }
        shape.count_down(cpu, done);
        if shape.repeat == Repeat::Once || done == count || ends(cpu, operation, shape.repeat) {
            return Ok(Flow::Next);
        }
        if shape.pauses(cpu) {
            restore_flags(cpu, operation, flags);
            return Ok(Flow::Set);
        }
    }
}

/// A fault or a pause finds the flags as they were before the first repetition (SDM vol. 2B, "REP"); on AMD's processors as after
/// the last.
fn restore_flags(cpu: &mut Cpu, operation: Operation, before: u64) {
    if !cpu.features.amd && matches!(operation, Operation::Compare | Operation::Scan) {
        cpu.rflags = cpu.rflags & !rflags::STATUS | before & rflags::STATUS;
    }
}

/// Whether a comparison's result ends the repetition.
fn ends(cpu: &Cpu, operation: Operation, repeat: Repeat) -> bool {
    let zero = cpu.rflags & rflags::ZF != 0;
    match operation {
        Operation::Compare | Operation::Scan => zero == (repeat == Repeat::NotEqual),
        _ => false,
    }
}

/// Does up to `count` elements, at least one. Returns how many; the pointers are the caller's to move.
fn step(cpu: &mut Cpu, shape: &Shape, operation: Operation, count: u64) -> Result<u64, Exception> {
    let size = shape.size;
    match operation {
        Operation::Move => move_elements(cpu, shape, count),
        Operation::Store => {
            let target = Span::find(cpu, shape, seg::ES, RDI, Access::Write, count)?;
            let value = truncate(cpu.gpr[RAX], size);
            match target.place {
                Place::Ram(host) => {
                    // SAFETY: `Span` found so many bytes of guest memory there, to be stored to.
                    #[allow(unsafe_code)]
                    unsafe {
                        bulk::fill(host, target.bytes(size), size, value);
                    }
                    cpu.wrote_ram(host, target.bytes(size));
                }
                Place::Single(linear) => cpu.write_sized(linear, size, value)?,
            }
            Ok(target.count)
        }
        Operation::Load => {
            let source = Span::find(cpu, shape, shape.segment, RSI, Access::Read, count)?;
            let value = source.element(cpu, size, source.count - 1)?;
            cpu.set_gpr(RAX, size, value);
            Ok(source.count)
        }
        Operation::Compare => {
            let find_left = |cpu: &mut Cpu, most| Span::find(cpu, shape, shape.segment, RSI, Access::Read, most);
            let find_right = |cpu: &mut Cpu, most| Span::find(cpu, shape, seg::ES, RDI, Access::Read, most);
            // Which of two faults comes first is not in the manuals. AMD's processors before Zen 5 read ES:RDI first, but for
            // REPE CMPSB, which some of them treat by itself.
            let by_itself = (size, shape.repeat) == (1, Repeat::Equal) && cpu.features.amd;
            let right_first = cpu.features.cmps_right_first && !by_itself;
            let (left, right) = if right_first {
                let right = find_right(cpu, count)?;
                (find_left(cpu, right.count)?, right)
            } else {
                let left = find_left(cpu, count)?;
                (left, find_right(cpu, left.count)?)
            };
            let common = left.count.min(right.count);
            let (left, right) = (left.shortened(common, size), right.shortened(common, size));
            compare_elements(cpu, shape, common, |cpu, i| {
                Ok((left.element(cpu, size, i)?, right.element(cpu, size, i)?))
            })
        }
        Operation::Scan => {
            let right = Span::find(cpu, shape, seg::ES, RDI, Access::Read, count)?;
            let left = truncate(cpu.gpr[RAX], size);
            compare_elements(cpu, shape, right.count, |cpu, i| Ok((left, right.element(cpu, size, i)?)))
        }
    }
}

fn move_elements(cpu: &mut Cpu, shape: &Shape, count: u64) -> Result<u64, Exception> {
    let size = shape.size;
    let source = Span::find(cpu, shape, shape.segment, RSI, Access::Read, count)?;
    let target = Span::find(cpu, shape, seg::ES, RDI, Access::Write, source.count)?;
    let source = source.shortened(target.count, size);
    if let (Place::Ram(from), Place::Ram(to)) = (source.place, target.place) {
        // SAFETY: the spans found so many bytes of guest memory at both.
        #[allow(unsafe_code)]
        unsafe {
            bulk::copy(from, to, target.bytes(size), size, direction(cpu));
        }
        cpu.wrote_ram(to, target.bytes(size));
        return Ok(target.count);
    }
    // One of them is a device, or on two pages.
    let value = source.element(cpu, size, 0)?;
    target.store_first(cpu, size, value)?;
    Ok(1)
}

/// Compares elements until one ends the repetition; the flags are those of the last comparison.
fn compare_elements(
    cpu: &mut Cpu,
    shape: &Shape,
    count: u64,
    mut elements: impl FnMut(&mut Cpu, u64) -> Result<(u64, u64), Exception>,
) -> Result<u64, Exception> {
    let mut done = 0;
    loop {
        let (left, right) = elements(cpu, done)?;
        done += 1;
        if done == count || (left == right) == (shape.repeat == Repeat::NotEqual) {
            cpu.rflags = cpu.rflags & !rflags::STATUS | subtraction_flags(left, right, shape.size);
            return Ok(done);
        }
    }
}

/// The status flags of `left - right` for operands of `size` bytes.
fn subtraction_flags(left: u64, right: u64, size: usize) -> u64 {
    let result = truncate(left.wrapping_sub(right), size);
    let sign = 1 << (8 * size - 1);
    let flag = |on: bool, bit: u64| if on { bit } else { 0 };
    flag(left < right, rflags::CF)
        | flag((result as u8).count_ones().is_multiple_of(2), rflags::PF)
        | flag((left ^ right ^ result) & 0x10 != 0, rflags::AF)
        | flag(result == 0, rflags::ZF)
        | flag(result & sign != 0, rflags::SF)
        | flag((left ^ right) & (left ^ result) & sign != 0, rflags::OF)
}

/// Elements of a string that one look at the page tables covers.
#[derive(Clone, Copy)]
struct Span {
    count: u64,
    place: Place,
    direction: Direction,
}

#[derive(Clone, Copy)]
enum Place {
    /// `count` elements from this host address up (the lowest one, whatever the direction).
    Ram(*mut u8),
    /// One element at this linear address: in a device, or on two pages.
    Single(u64),
}

impl Span {
    /// The elements at the pointer in `register`, `most` at most: those on the same page, inside the segment, before
    /// the pointer wraps.
    fn find(
        cpu: &mut Cpu,
        shape: &Shape,
        segment: usize,
        register: usize,
        access: Access,
        most: u64,
    ) -> Result<Self, Exception> {
        let (size, direction) = (shape.size, direction(cpu));
        let offset = truncate(cpu.gpr[register], shape.width);
        let linear = cpu.linear(segment, offset, size, access)?;
        let single = Self { count: 1, place: Place::Single(linear), direction };
        if page_rest(linear) < size {
            cpu.probe(linear, size, access, cpu.privilege())?;
            return Ok(single);
        }
        let target = cpu.resolve(linear, access, cpu.privilege())?;
        let Target::Ram(host) = target else { return Ok(single) };

        let count = if singly(cpu) { 1 } else { most.min(elements_on_page(linear, offset, shape, direction)) };
        let below = match direction {
            Direction::Up => 0,
            Direction::Down => (count - 1) * size as u64,
        };
        let whole = count as usize * size;
        let count_fits = count == 1 || cpu.linear(segment, offset - below, whole, access).is_ok();
        if !count_fits {
            return Ok(Self { count: 1, place: Place::Ram(host), direction });
        }
        Ok(Self { count, place: Place::Ram(host.wrapping_sub(below as usize)), direction })
    }

    /// The first `count` of the elements.
    fn shortened(self, count: u64, size: usize) -> Self {
        let cut = (self.count - count.min(self.count)) as usize * size;
        let place = match (self.place, self.direction) {
            (Place::Ram(host), Direction::Down) => Place::Ram(host.wrapping_add(cut)),
            (place, _) => place,
        };
        Self { count: count.min(self.count), place, ..self }
    }

    fn bytes(&self, size: usize) -> usize {
        self.count as usize * size
    }

    /// Element `i`, in the order of the string instruction.
    fn element(&self, cpu: &mut Cpu, size: usize, i: u64) -> Result<u64, Exception> {
        match self.place {
            Place::Ram(host) => {
                let index = if self.direction == Direction::Up { i } else { self.count - 1 - i };
                // SAFETY: `find` saw `count` elements there.
                #[allow(unsafe_code)]
                Ok(unsafe { bulk::load(host.wrapping_add(index as usize * size), size) })
            }
            Place::Single(linear) => cpu.read_sized(linear, size),
        }
    }

    /// Stores the first element.
    fn store_first(&self, cpu: &mut Cpu, size: usize, value: u64) -> Result<(), Exception> {
        match self.place {
            Place::Ram(host) => {
                let first = if self.direction == Direction::Up { 0 } else { self.count as usize - 1 };
                cpu.write_target(Target::Ram(host.wrapping_add(first * size)), &value.to_le_bytes()[..size]);
                Ok(())
            }
            Place::Single(linear) => cpu.write_sized(linear, size, value),
        }
    }
}

/// Whether each element has to be looked at by itself: single-stepping, data breakpoints, alignment checks.
fn singly(cpu: &Cpu) -> bool {
    cpu.rflags & rflags::TF != 0 || cpu.dr7 & 0xff != 0 || cpu.cpl == 3 && cpu.alignment_checked()
}

/// How many elements, the one at `linear` included, are on its page before the offset wraps.
fn elements_on_page(linear: u64, offset: u64, shape: &Shape, direction: Direction) -> u64 {
    let size = shape.size as u64;
    match direction {
        Direction::Up => {
            let to_wrap = truncate(u64::MAX, shape.width) - offset + u64::from(shape.width < 8);
            (page_rest(linear) as u64 / size).min((to_wrap / size).max(1))
        }
        Direction::Down => ((linear & 0xfff) / size + 1).min(offset / size + 1),
    }
}

#[cfg(test)]
mod tests;
