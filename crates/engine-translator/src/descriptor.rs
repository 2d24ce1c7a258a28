//! Segment and gate descriptors (SDM vol. 3A 3.4.5, 5.8.3, 7.2).

use crate::{
    cpu::{Cpu, Segment, access},
    exception::Exception,
    tlb::Privilege,
};

/// Types of system descriptors (SDM vol. 3A table 3-2).
pub mod system_type {
    #![allow(missing_docs)]
    pub const TSS16: u8 = 1;
    pub const LDT: u8 = 2;
    pub const TSS16_BUSY: u8 = 3;
    pub const CALL_GATE16: u8 = 4;
    pub const TASK_GATE: u8 = 5;
    pub const INTERRUPT_GATE16: u8 = 6;
    pub const TRAP_GATE16: u8 = 7;
    pub const TSS: u8 = 9;
    pub const TSS_BUSY: u8 = 11;
    pub const CALL_GATE: u8 = 12;
    pub const INTERRUPT_GATE: u8 = 14;
    pub const TRAP_GATE: u8 = 15;
}

/// A descriptor as it lies in the GDT, an LDT or the IDT.
#[derive(Clone, Copy, Debug)]
pub struct Descriptor {
    /// Its first eight bytes.
    pub low: u64,
    /// In long mode the other eight of a system descriptor, else zero.
    pub high: u64,
    /// The linear address it was read from.
    pub address: u64,
}

impl Descriptor {
    /// Access rights in the form of [`Segment::access`].
    pub fn access(&self) -> u32 {
        (self.low >> 40) as u32 & 0xf0ff
    }

    /// The type field, for a system descriptor one of [`system_type`].
    pub fn kind(&self) -> u8 {
        (self.low >> 40) as u8 & 15
    }

    /// Neither code nor data.
    pub fn is_system(&self) -> bool {
        self.access() & access::S == 0
    }

    /// A code segment.
    pub fn is_code(&self) -> bool {
        self.access() & (access::S | access::CODE) == access::S | access::CODE
    }

    /// A conforming code segment.
    pub fn is_conforming(&self) -> bool {
        self.is_code() && self.access() & access::DC != 0
    }

    /// A data segment, or a code segment that can be read.
    pub fn is_readable(&self) -> bool {
        !self.is_system() && (!self.is_code() || self.access() & access::RW != 0)
    }

    /// A data segment that can be written.
    pub fn is_writable(&self) -> bool {
        self.access() & (access::S | access::CODE | access::RW) == access::S | access::RW
    }

    /// A code segment for 64-bit mode: L set, D clear.
    pub fn is_code64(&self) -> bool {
        self.is_code() && self.access() & (access::L | access::DB) == access::L
    }

    /// The P bit.
    pub fn present(&self) -> bool {
        self.access() & access::P != 0
    }

    /// The descriptor privilege level.
    pub fn dpl(&self) -> u8 {
        (self.low >> 45) as u8 & 3
    }

    /// Base address of a segment.
    pub fn base(&self) -> u64 {
        self.low >> 16 & 0xff_ffff | self.low >> 32 & 0xff00_0000 | self.high << 32
    }

    /// Limit of a segment in bytes.
    pub fn limit(&self) -> u32 {
        let limit = self.low as u32 & 0xffff | (self.low >> 32) as u32 & 0xf_0000;
        if self.access() & access::G != 0 { limit << 12 | 0xfff } else { limit }
    }

    /// The selector in a gate.
    pub fn gate_selector(&self) -> u16 {
        (self.low >> 16) as u16
    }

    /// The offset in a gate; a 16-bit one has no more than 16 bits.
    pub fn gate_offset(&self) -> u64 {
        let low = self.low & 0xffff;
        match self.kind() {
            system_type::CALL_GATE16 | system_type::INTERRUPT_GATE16 | system_type::TRAP_GATE16 => low,
            _ => low | self.low >> 32 & 0xffff_0000 | self.high << 32,
        }
    }

    /// The segment register that results from loading `selector` with this descriptor.
    pub fn segment(&self, selector: u16) -> Segment {
        Segment { base: self.base(), limit: self.limit(), access: self.access(), selector }
    }
}

/// Whether a selector is null: index 0 of the GDT.
pub fn is_null(selector: u16) -> bool {
    selector & 0xfffc == 0
}

/// The requested privilege level in a selector.
pub fn rpl(selector: u16) -> u8 {
    selector as u8 & 3
}

impl Cpu {
    /// The descriptor that `selector` (not null) names. `outside` is raised where it is beyond its table's limit.
    pub fn descriptor(&mut self, selector: u16, outside: Exception) -> Result<Descriptor, Exception> {
        let address = self.descriptor_address(selector, 8).ok_or(outside)?;
        let low = self.load_system(address)?;
        Ok(Descriptor { low, high: 0, address })
    }

    /// The descriptor in the GDT that `selector` names, if it is present, was accessed before, and can be read without a
    /// page walk.
    pub fn descriptor_quickly(&self, selector: u16) -> Option<Descriptor> {
        if is_null(selector) || selector & 4 != 0 {
            return None;
        }
        let address = self.descriptor_address(selector, 8)?;
        let low = self.load_quickly(address, Privilege::Supervisor)?;
        let descriptor = Descriptor { low, high: 0, address };
        (descriptor.present() && descriptor.access() & access::ACCESSED != 0).then_some(descriptor)
    }

    /// Like [`Cpu::descriptor`]; in long mode a system descriptor has 16 bytes. `fault` is raised as well where the
    /// type field of its second half is not zero (SDM vol. 3A 5.8.3.1).
    pub fn system_descriptor(&mut self, selector: u16, fault: Exception) -> Result<Descriptor, Exception> {
        let mut descriptor = self.descriptor(selector, fault)?;
        if self.long_mode() && descriptor.is_system() {
            let address = self.descriptor_address(selector, 16).ok_or(fault)?;
            descriptor.high = self.load_system(address + 8)?;
            if descriptor.high >> 40 & 0x1f != 0 {
                return Err(fault);
            }
            descriptor.high &= 0xffff_ffff;
        }
        Ok(descriptor)
    }

    fn descriptor_address(&self, selector: u16, size: u64) -> Option<u64> {
        let (base, limit) = match selector & 4 {
            0 => (self.gdtr.base, u64::from(self.gdtr.limit)),
            _ if self.ldtr.unusable() => return None,
            _ => (self.ldtr.base, u64::from(self.ldtr.limit)),
        };
        let offset = u64::from(selector & 0xfff8);
        let address = base.wrapping_add(offset);
        (offset + size - 1 <= limit).then_some(if self.long_mode() { address } else { address & 0xffff_ffff })
    }

    /// Sets the accessed bit of a code or data descriptor, in memory and in `descriptor`.
    pub fn set_accessed(&mut self, descriptor: &mut Descriptor) -> Result<(), Exception> {
        if descriptor.low >> 40 & 1 == 0 {
            descriptor.low |= 1 << 40;
            self.store_system(descriptor.address.wrapping_add(5), (descriptor.low >> 40) as u8)?;
        }
        Ok(())
    }
}
