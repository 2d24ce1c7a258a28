//! Pushing and popping (SDM vol. 1 6.2): on the current stack, and on one that is about to become the current.

use purlin_arch::x86_64::regs::{gpr::RSP, seg::SS};

use crate::{
    cpu::{Cpu, Segment},
    exception::Exception,
    mem::Access,
    segment::is_canonical,
    tlb::Privilege,
};

/// A stack whose pointer moves without the processor's doing so, until [`Stack::commit`]: an instruction that faults
/// half way leaves RSP alone.
pub struct Stack {
    segment: Segment,
    /// The stack pointer.
    pub pointer: u64,
    /// The bits of the pointer that move: SP, ESP or RSP.
    mask: u64,
    /// 64-bit: the segment's base and limit do not count.
    flat: bool,
    privilege: Privilege,
    /// What an access beyond the limit, or a non-canonical one, raises.
    fault: Exception,
}

impl Stack {
    /// The processor's stack.
    pub fn current(cpu: &Cpu) -> Self {
        let flat = cpu.code64();
        Self::new(cpu.seg[SS], cpu.gpr[RSP], flat, cpu.privilege(), Exception::SS0)
    }

    /// A 64-bit stack for privilege level `cpl`.
    pub fn new64(cpu: &Cpu, pointer: u64, cpl: u8, fault: Exception) -> Self {
        Self::new(Segment::default(), pointer, true, cpu.privilege_at(cpl), fault)
    }

    /// A stack in `segment` for privilege level `cpl`.
    pub fn in_segment(cpu: &Cpu, segment: Segment, pointer: u64, cpl: u8, fault: Exception) -> Self {
        Self::new(segment, pointer, false, cpu.privilege_at(cpl), fault)
    }

    fn new(segment: Segment, pointer: u64, flat: bool, privilege: Privilege, fault: Exception) -> Self {
        let mask = match (flat, segment.db()) {
            (true, _) => u64::MAX,
            (false, true) => 0xffff_ffff,
            (false, false) => 0xffff,
        };
        Self { segment, pointer, mask, flat, privilege, fault }
    }

    /// Pushes the low `size` bytes (2, 4 or 8) of `value`.
    pub fn push(&mut self, cpu: &mut Cpu, size: usize, value: u64) -> Result<(), Exception> {
        let before = self.pointer;
        self.skip((size as u64).wrapping_neg());
        self.poke(cpu, size, value).inspect_err(|_| self.pointer = before)
    }

    /// Pops `size` bytes.
    pub fn pop(&mut self, cpu: &mut Cpu, size: usize) -> Result<u64, Exception> {
        let value = self.peek(cpu, 0, size)?;
        self.skip(size as u64);
        Ok(value)
    }

    /// The `size` bytes at `offset` above the pointer.
    pub fn peek(&self, cpu: &mut Cpu, offset: u64, size: usize) -> Result<u64, Exception> {
        let address = self.address(cpu, self.moved(offset), size, Access::Read)?;
        let mut bytes = [0; 8];
        cpu.read_as(address, &mut bytes[..size], self.privilege)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Stores the low `size` bytes of `value` at the pointer.
    pub fn poke(&self, cpu: &mut Cpu, size: usize, value: u64) -> Result<(), Exception> {
        let address = self.address(cpu, self.pointer, size, Access::Write)?;
        cpu.write_as(address, &value.to_le_bytes()[..size], self.privilege)
    }

    /// Moves the pointer up by `bytes`.
    pub fn skip(&mut self, bytes: u64) {
        self.pointer = self.moved(bytes);
    }

    /// Checks that there is room for `count` pushes of `size` bytes; whether the pages are there is not asked. A
    /// 16-bit pointer may wrap between two pushes, not in one.
    pub fn check_room(&self, cpu: &Cpu, count: usize, size: usize) -> Result<(), Exception> {
        (1..=count).try_for_each(|i| {
            let pointer = self.moved(((i * size) as u64).wrapping_neg());
            self.check(cpu, pointer, size, Access::Write).map(|_| ())
        })
    }

    /// Raises what a store of `size` bytes at the pointer would.
    pub fn probe_store(&self, cpu: &mut Cpu, size: usize) -> Result<(), Exception> {
        let address = self.check(cpu, self.pointer, size, Access::Write)?;
        cpu.probe(address, size, Access::Write, self.privilege)
    }

    /// The same, with the alignment check, which comes first.
    pub fn probe_aligned_store(&self, cpu: &mut Cpu, size: usize) -> Result<(), Exception> {
        let address = self.address(cpu, self.pointer, size, Access::Write)?;
        cpu.probe(address, size, Access::Write, self.privilege)
    }

    /// The pointer becomes RSP's: SP, ESP or RSP, as wide as the stack is.
    pub fn commit(&self, cpu: &mut Cpu) {
        cpu.gpr[RSP] = match self.mask {
            0xffff => cpu.gpr[RSP] & !0xffff | self.pointer & 0xffff,
            mask => self.pointer & mask,
        };
    }

    /// The pointer, `by` further up; what is above the mask stays.
    fn moved(&self, by: u64) -> u64 {
        self.pointer & !self.mask | self.pointer.wrapping_add(by) & self.mask
    }

    fn check(&self, cpu: &Cpu, pointer: u64, size: usize, access: Access) -> Result<u64, Exception> {
        if self.flat {
            let last = pointer.wrapping_add(size as u64 - 1);
            return if is_canonical(pointer) && is_canonical(last) { Ok(pointer) } else { Err(self.fault) };
        }
        let offset = (pointer & self.mask) as u32;
        if !cpu.permits(&self.segment, offset, size, access) {
            return Err(self.fault);
        }
        Ok(self.segment.base.wrapping_add(u64::from(offset)) & 0xffff_ffff)
    }

    fn address(&self, cpu: &mut Cpu, pointer: u64, size: usize, access: Access) -> Result<u64, Exception> {
        let address = self.check(cpu, pointer, size, access)?;
        cpu.check_explicit(address, size, access, self.privilege)?;
        Ok(address)
    }
}

impl Cpu {
    /// Pushes `size` bytes of `value` on the processor's stack.
    pub fn push(&mut self, size: usize, value: u64) -> Result<(), Exception> {
        let mut stack = Stack::current(self);
        stack.push(self, size, value)?;
        stack.commit(self);
        Ok(())
    }

    /// Pops `size` bytes from the processor's stack.
    pub fn pop(&mut self, size: usize) -> Result<u64, Exception> {
        let mut stack = Stack::current(self);
        let value = stack.pop(self, size)?;
        stack.commit(self);
        Ok(value)
    }

    /// The privilege of explicit accesses at level `cpl`.
    pub fn privilege_at(&self, cpl: u8) -> Privilege {
        match cpl {
            3 => Privilege::User,
            _ if self.smap_active() => Privilege::Supervisor,
            _ => Privilege::SupervisorAc,
        }
    }
}
