//! The memory that an XSAVE area or an FXSAVE image is in.
#![allow(unsafe_code)]

use std::ops::Range;

use iced_x86::Instruction;

use super::AREA;
use crate::{
    cpu::Cpu,
    exception::Exception,
    mem::{Access, Target, copy_from_guest, copy_to_guest, page_rest},
    operand::truncate,
    segment::is_canonical,
    tlb::Privilege,
};

/// An area, as the instruction finds it.
pub(super) enum Memory {
    /// What an operand says: each access has all checks.
    Operand(Operand),
    /// Memory whose checks are made.
    Host(HostMemory),
}

/// A memory operand that is accessed in many units. Where addresses end within it, at 4 GiB or 64 KiB, each unit
/// has an address of its own, cut to its size and held against the segment's limit by itself: the area goes on at the
/// beginning of the segment. (The SDM leaves that open, vol. 3A 5.3.)
pub(super) struct Operand {
    segment: usize,
    offset: u64,
    /// Bytes of an address.
    width: usize,
    /// Linear address of the first byte.
    linear: u64,
    access: Access,
    privilege: Privilege,
}

impl Operand {
    /// That of `insn`, the first `size` bytes of which have to be within the segment, at a linear address that is a multiple of
    /// `alignment`.
    pub fn of(
        cpu: &mut Cpu,
        insn: &Instruction,
        size: usize,
        alignment: u64,
        access: Access,
    ) -> Result<Self, Exception> {
        let (segment, offset) = cpu.effective_address(insn);
        let (width, privilege) = (cpu.address_size(insn), cpu.privilege());
        let mut operand = Self { segment, offset, width, linear: 0, access, privilege };
        let size = if operand.goes_round(size) { UNIT } else { size };
        operand.linear = cpu.linear(segment, offset, size, access)?;
        if operand.linear & (alignment - 1) != 0 {
            return Err(Exception::GP0);
        }
        Ok(operand)
    }

    /// Reads `data`, units of `unit` bytes, from byte `at` on.
    pub fn read(&self, cpu: &mut Cpu, at: usize, unit: usize, data: &mut [u8]) -> Result<(), Exception> {
        self.each(cpu, at, data.len(), unit, |cpu, linear, part| cpu.read_as(linear, &mut data[part], self.privilege))
    }

    /// Writes `data`; its place has been probed.
    pub fn write(&self, cpu: &mut Cpu, at: usize, unit: usize, data: &[u8]) -> Result<(), Exception> {
        self.each(cpu, at, data.len(), unit, |cpu, linear, part| cpu.write_as(linear, &data[part], self.privilege))
    }

    /// Checks that an access to `size` bytes would not fault.
    pub fn probe(&self, cpu: &mut Cpu, at: usize, unit: usize, size: usize) -> Result<(), Exception> {
        self.each(cpu, at, size, unit, |cpu, linear, part| cpu.probe(linear, part.len(), self.access, self.privilege))
    }

    /// Checks that the segment holds all up to byte `end`, if addresses do not end before.
    fn check_end(&self, cpu: &mut Cpu, end: usize) -> Result<(), Exception> {
        match self.goes_round(end) {
            true => Ok(()),
            false => cpu.linear(self.segment, self.offset, end, self.access).map(drop),
        }
    }

    /// Whether addresses end within its first `size` bytes, and it goes on at their beginning. (Those of 64 bits end where no
    /// address is canonical.)
    fn goes_round(&self, size: usize) -> bool {
        self.width < 8 && self.offset + size as u64 > 1 << (8 * self.width)
    }

    /// Calls `act` with the linear address of each part of the `size` bytes from `at` on that is accessed by itself.
    fn each(
        &self,
        cpu: &mut Cpu,
        at: usize,
        size: usize,
        unit: usize,
        mut act: impl FnMut(&mut Cpu, u64, Range<usize>) -> Result<(), Exception>,
    ) -> Result<(), Exception> {
        if !self.goes_round(at + size) {
            return act(cpu, self.linear.wrapping_add(at as u64), 0..size);
        }
        for start in (0..size).step_by(unit) {
            let part = start..size.min(start + unit);
            let offset = truncate(self.offset.wrapping_add((at + start) as u64), self.width);
            let linear = cpu.linear(self.segment, offset, part.len(), self.access)?;
            act(cpu, linear, part)?;
        }
        Ok(())
    }
}

/// Bytes of a unit, but of vector registers.
pub(super) const UNIT: usize = 8;
/// Bytes of a unit of XMM registers.
pub(super) const XMM_UNIT: usize = 16;

/// Bytes of a unit of component `component`.
pub(super) fn unit(component: u32) -> usize {
    match component {
        1 | 2 => XMM_UNIT,
        6 => 32,
        7 => 64,
        _ => UNIT,
    }
}

impl Memory {
    /// Reads `data`, units of `unit` bytes, from byte `offset` of the area on.
    pub fn read(&self, cpu: &mut Cpu, offset: usize, unit: usize, data: &mut [u8]) -> Result<(), Exception> {
        match self {
            Self::Operand(operand) => operand.read(cpu, offset, unit, data),
            Self::Host(host) => {
                host.read(offset, data);
                Ok(())
            }
        }
    }

    /// Writes `data`; its place has been probed.
    pub fn write(&self, cpu: &mut Cpu, offset: usize, unit: usize, data: &[u8]) -> Result<(), Exception> {
        match self {
            Self::Operand(operand) => operand.write(cpu, offset, unit, data),
            Self::Host(host) => {
                host.write(offset, data);
                Ok(())
            }
        }
    }

    /// Checks that the segment holds the area up to byte `end`.
    pub fn check_end(&self, cpu: &mut Cpu, end: usize) -> Result<(), Exception> {
        match self {
            Self::Operand(operand) => operand.check_end(cpu, end),
            Self::Host(_) => Ok(()),
        }
    }

    /// Checks that an access to `size` bytes would not fault.
    pub fn probe(&self, cpu: &mut Cpu, offset: usize, unit: usize, size: usize) -> Result<(), Exception> {
        match self {
            Self::Operand(operand) => operand.probe(cpu, offset, unit, size),
            Self::Host(_) => Ok(()),
        }
    }
}

/// Guest memory that stays accessible as it was found, for as long as no other Rust code runs: where an area is that lies on
/// one page or on two.
#[derive(Clone, Copy)]
pub(super) struct HostMemory {
    /// Host address of its first byte.
    first: *mut u8,
    /// So many bytes are on that page.
    on_first: usize,
    /// Host address of the next one.
    second: *mut u8,
}

impl HostMemory {
    /// The area at linear `address` in 64-bit code, if all that one may have is memory that can be accessed without anybody's
    /// taking note. (One that has less is not looked at more closely.)
    pub fn find(cpu: &mut Cpu, address: u64, access: Access) -> Option<Self> {
        let (on_first, last) = (page_rest(address).min(AREA), address.wrapping_add(AREA as u64 - 1));
        if !is_canonical(address) || !is_canonical(last) {
            return None;
        }
        let first = Self::page(cpu, address, access)?;
        let second = match on_first {
            AREA => first,
            _ => Self::page(cpu, last & !0xfff, access)?,
        };
        Some(Self { first, on_first, second })
    }

    fn page(cpu: &mut Cpu, address: u64, access: Access) -> Option<*mut u8> {
        let privilege = cpu.privilege();
        match cpu.resolve(address, access, privilege) {
            Ok(Target::Ram(host)) if access == Access::Read || cpu.tlb.may_store(privilege, address) => Some(host),
            _ => None,
        }
    }

    /// The host addresses of the bytes from `offset` on, and how many of `size` the first of them is for.
    fn place(&self, offset: usize, size: usize) -> (*mut u8, *mut u8, usize) {
        assert!(offset + size <= AREA);
        match self.on_first.checked_sub(offset) {
            Some(left @ 1..) => (self.first.wrapping_add(offset), self.second, size.min(left)),
            _ => (self.second.wrapping_add(offset - self.on_first), self.second, size),
        }
    }

    /// Reads `data` from byte `offset` of the area on.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        let (at, second, split) = self.place(offset, data.len());
        let (here, there) = data.split_at_mut(split);
        copy_from_guest(at, here);
        if !there.is_empty() {
            copy_from_guest(second, there);
        }
    }

    /// Writes `data`.
    pub fn write(&self, offset: usize, data: &[u8]) {
        let (at, second, split) = self.place(offset, data.len());
        let (here, there) = data.split_at(split);
        copy_to_guest(at, here);
        if !there.is_empty() {
            copy_to_guest(second, there);
        }
    }
}
