//! Descriptors: what emitted code tells Rust of the place at which it calls or leaves. They lie beside the code, are
//! position-independent and read-only.

use super::masking::Masking;

/// An access to memory.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug)]
pub struct AccessDesc {
    /// Offset in CS of the instruction.
    pub rip: u64,
    /// Offset in CS of the next instruction.
    pub next: u64,
    /// Bytes accessed: at most 64, or with [`Self::GROUP`] those of all accesses of the group.
    pub size: u16,
    /// See the constants.
    pub flags: u16,
    /// Which elements are accessed, if a mask register says so.
    pub masking: Masking,
    /// Segment register, in the encoding's order.
    pub segment: u8,
    _pad: [u8; 7],
}

impl AccessDesc {
    /// The access loads.
    pub const READ: u16 = 1 << 0;
    /// The access stores (or may store).
    pub const WRITE: u16 = 1 << 1;
    /// R10 holds an offset into the segment, not a linear address.
    pub const OFFSET: u16 = 1 << 2;
    /// Before the instruction the guest's flags are in `flag_word`.
    pub const SAVED_BEFORE: u16 = 1 << 3;
    /// After the instruction they still are.
    pub const SAVED_AFTER: u16 = 1 << 4;

    /// The block has to go on after the instruction (it is a call, whose jump is still to come).
    pub const STAY: u16 = 1 << 5;
    /// An address that is not a multiple of the size raises #GP, before any page fault.
    pub const ALIGNED: u16 = 1 << 6;
    /// An x87 exception that waits comes before the access.
    pub const X87: u16 = 1 << 7;
    /// A locked read-modify-write.
    pub const LOCK: u16 = 1 << 8;
    /// It stands for several accesses: all on one page of memory, or each has to be checked by itself.
    pub const GROUP: u16 = 1 << 9;
    /// One of them stores.
    pub const GROUP_WRITE: u16 = 1 << 10;

    /// A descriptor.
    pub fn new(rip: u64, next: u64, size: usize, flags: u16, segment: usize, masking: Masking) -> Self {
        Self { rip, next, size: size as u16, flags, masking, segment: segment as u8, _pad: [0; 7] }
    }

    /// As bytes.
    pub fn to_bytes(self) -> [u8; size_of::<Self>()] {
        let mut bytes = [0; size_of::<Self>()];
        bytes[0..8].copy_from_slice(&self.rip.to_ne_bytes());
        bytes[8..16].copy_from_slice(&self.next.to_ne_bytes());
        bytes[16..18].copy_from_slice(&self.size.to_ne_bytes());
        bytes[18..20].copy_from_slice(&self.flags.to_ne_bytes());
        bytes[20..24].copy_from_slice(&self.masking.to_bytes());
        bytes[24] = self.segment;
        bytes
    }
}

/// A place where emitted code is left.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug)]
pub struct ExitDesc {
    /// Offset in CS at which execution goes on (link) or of the instruction (emulate).
    pub rip: u64,
    /// Link: offset of the rel32 field to patch, from the descriptor's own address backwards; 0 for none.
    pub patch_back: u32,
    /// Emulate: the instruction's length and bytes.
    pub len: u8,
    /// See `len`.
    pub bytes: [u8; 15],
    /// Link: see the constants.
    pub link: u32,
}

impl ExitDesc {
    /// The jump has the flags in `flag_word`.
    pub const SAVED: u32 = 1 << 0;
    /// It leads to code in which each access is checked by itself.
    pub const UNGROUPED: u32 = 1 << 1;

    /// A direct jump to `rip`.
    pub fn link(rip: u64, link: u32) -> Self {
        Self { rip, patch_back: 0, len: 0, bytes: [0; 15], link }
    }

    /// An instruction to emulate.
    pub fn emulate(rip: u64, insn: &[u8]) -> Self {
        let mut bytes = [0; 15];
        let len = insn.len().min(15);
        bytes[..len].copy_from_slice(&insn[..len]);
        Self { rip, patch_back: 0, len: len as u8, bytes, link: 0 }
    }

    /// Offset of `patch_back` in the structure.
    pub const PATCH_BACK: usize = 8;

    /// As bytes.
    pub fn to_bytes(self) -> [u8; size_of::<Self>()] {
        let mut bytes = [0; size_of::<Self>()];
        bytes[0..8].copy_from_slice(&self.rip.to_ne_bytes());
        bytes[8..12].copy_from_slice(&self.patch_back.to_ne_bytes());
        bytes[12] = self.len;
        bytes[13..28].copy_from_slice(&self.bytes);
        bytes[28..32].copy_from_slice(&self.link.to_ne_bytes());
        bytes
    }
}
