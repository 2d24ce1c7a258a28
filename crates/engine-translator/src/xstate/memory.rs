//! The memory that an XSAVE area is in.
#![allow(unsafe_code)]

use iced_x86::Instruction;

use super::AREA;
use crate::{
    cpu::Cpu,
    exception::Exception,
    mem::{Access, Target, copy_from_guest, copy_to_guest, page_rest},
    segment::is_canonical,
    tlb::Privilege,
};

/// An area, as the instruction finds it.
pub(super) enum Memory<'a> {
    /// What an operand says: each access has all checks.
    Linear {
        /// Linear address of the area.
        address: u64,
        /// The instruction.
        insn: &'a Instruction,
        /// What it does with the area.
        access: Access,
        /// On whose behalf.
        privilege: Privilege,
    },
    /// Memory whose checks are made.
    Host(HostMemory),
}

impl Memory<'_> {
    /// Reads `data` from byte `offset` of the area on.
    pub fn read(&self, cpu: &mut Cpu, offset: usize, data: &mut [u8]) -> Result<(), Exception> {
        match self {
            Self::Linear { address, privilege, .. } => {
                cpu.read_as(address.wrapping_add(offset as u64), data, *privilege)
            }
            Self::Host(host) => {
                host.read(offset, data);
                Ok(())
            }
        }
    }

    /// Writes `data`; its place has been probed.
    pub fn write(&self, cpu: &mut Cpu, offset: usize, data: &[u8]) -> Result<(), Exception> {
        match self {
            Self::Linear { address, privilege, .. } => {
                cpu.write_as(address.wrapping_add(offset as u64), data, *privilege)
            }
            Self::Host(host) => {
                host.write(offset, data);
                Ok(())
            }
        }
    }

    /// Checks that the segment holds the area up to byte `end`.
    pub fn check_end(&self, cpu: &mut Cpu, end: usize) -> Result<(), Exception> {
        match self {
            Self::Linear { insn, access, .. } => {
                let (segment, at) = cpu.effective_address(insn);
                cpu.linear(segment, at, end, *access).map(drop)
            }
            Self::Host(_) => Ok(()),
        }
    }

    /// Checks that an access to `size` bytes would not fault.
    pub fn probe(&self, cpu: &mut Cpu, offset: usize, size: usize) -> Result<(), Exception> {
        match self {
            Self::Linear { address, access, privilege, .. } => {
                cpu.probe(address.wrapping_add(offset as u64), size, *access, *privilege)
            }
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
