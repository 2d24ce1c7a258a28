//! Descriptors: what emitted code tells Rust of the place at which it calls or leaves. They are position-independent
//! and read-only. There are many of them, so all but [`AccessDesc`] are packed: they follow the call of a stub, which finds
//! them by its return address. RIPs in them are those of translations (see `place.rs`).
#![allow(unsafe_code)]

use super::{masking::Masking, place::resolve};

/// An access to memory.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug)]
pub struct AccessDesc {
    /// Offset in CS of the instruction.
    pub rip: u64,
    /// Offset in CS of the next instruction.
    pub next: u64,
    /// Bytes accessed: at most 64.
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
    /// It is made in two parts (see `helpers.rs`), with an address of 32 bits.
    pub const PARTS_32: u16 = 1 << 9;
    /// The same with an address of 16 bits.
    pub const PARTS_16: u16 = 1 << 10;

    /// What a store raises comes when the instruction is done (see `helpers.rs`).
    pub const LATE: u16 = 1 << 11;
    /// A store that faults has begun to enter MMX's state.
    pub const MMX: u16 = 1 << 12;

    /// Its alignment is not checked.
    pub const UNCHECKED: u16 = 1 << 13;

    /// A descriptor.
    pub fn new(rip: u64, next: u64, size: usize, flags: u16, segment: usize, masking: Masking) -> Self {
        Self { rip, next, size: size as u16, flags, masking, segment: segment as u8, _pad: [0; 7] }
    }

    /// With RIPs that are what they seem, while the page of movable code is the one at `code_page`.
    pub fn resolved(self, code_page: u64) -> Self {
        Self { rip: resolve(self.rip, code_page), next: resolve(self.next, code_page), ..self }
    }

    /// Whether it is made in two parts, the first of them of `first` bytes up to the last that an address of its size
    /// reaches.
    pub fn wraps_behind(&self, first: usize, offset: u64) -> bool {
        let end = match self.flags & (Self::PARTS_32 | Self::PARTS_16) {
            Self::PARTS_32 => 1 << 32,
            Self::PARTS_16 => 1 << 16,
            _ => return false,
        };
        offset + first as u64 == end
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

/// A direct jump that is not linked yet, to the page that its block begins on.
#[derive(Clone, Copy, Debug)]
pub struct LinkDesc {
    /// Where it leads, from the block's RIP: [`Self::DELTA`] bits with a sign. Then the flags. Then the distance to here from
    /// behind the conditional jump that leads to this one, and may as well lead where this one does; 0 if there is none.
    bits: u32,
}

impl LinkDesc {
    /// The jump has the flags in `flag_word`.
    pub const SAVED: u8 = 1 << 0;
    /// It leads to code in which each access is checked by itself.
    pub const UNGROUPED: u8 = 1 << 1;
    /// Length of the structure.
    pub const LEN: usize = 3;

    const DELTA: u32 = 13;
    const CONDITIONAL: u32 = Self::DELTA + 2;
    /// Distances are shorter.
    const FAR: u32 = 1 << (8 * Self::LEN as u32 - Self::CONDITIONAL);

    /// A jump from the block for `from` to `rip`.
    pub fn new(from: u64, rip: u64, flags: u8) -> Self {
        let mask = (1 << Self::DELTA) - 1;
        let delta = i32::from(delta(from, rip));
        debug_assert!((-0x1000..0x1000).contains(&delta), "on another page");
        Self { bits: delta as u32 & mask | u32::from(flags) << Self::DELTA }
    }

    /// The bits that say that there is a conditional jump that ends `distance` bytes before the structure; none if that is
    /// too far.
    pub fn behind(distance: u32) -> [u8; Self::LEN] {
        let [a, b, c, _] = if distance < Self::FAR { distance << Self::CONDITIONAL } else { 0 }.to_le_bytes();
        [a, b, c]
    }

    /// As bytes.
    pub fn to_bytes(self) -> [u8; Self::LEN] {
        let [a, b, c, _] = self.bits.to_le_bytes();
        [a, b, c]
    }

    /// From emitted code.
    ///
    /// # Safety
    /// One of these is at `at`.
    pub unsafe fn read(at: *const u8) -> Self {
        // SAFETY: as the caller vouches.
        let [a, b, c] = unsafe { at.cast::<[u8; Self::LEN]>().read() };
        Self { bits: u32::from_le_bytes([a, b, c, 0]) }
    }

    /// Where it leads from the block for `from`.
    pub fn rip(self, from: u64) -> u64 {
        let unused = 32 - Self::DELTA;
        from.wrapping_add(((self.bits << unused) as i32 >> unused) as u64)
    }

    /// See the constants.
    pub fn flags(self) -> u8 {
        (self.bits >> Self::DELTA) as u8 & (Self::SAVED | Self::UNGROUPED)
    }

    /// The address behind the conditional jump, where the structure is at `at`.
    pub fn conditional(self, at: u64) -> Option<u64> {
        let distance = self.bits >> Self::CONDITIONAL;
        (distance != 0).then(|| at - u64::from(distance))
    }
}

/// A direct jump to another page that is not linked yet. Behind it comes the load of the RIP that it leads to.
#[derive(Clone, Copy, Debug)]
pub struct AcrossDesc {
    /// From behind the field to the check of the page.
    check: i32,
    /// Where the jump leads; in movable code the distance from its page.
    pub rip: u64,
}

impl AcrossDesc {
    /// Length of the field.
    const LEN: usize = 4;
    /// Behind it come two bytes of the load, then its constant.
    const RIP: usize = Self::LEN + 2;

    /// From emitted code.
    ///
    /// # Safety
    /// The field and the load of [`super::asm::Asm::mov_wide`] are at `at`.
    pub unsafe fn read(at: *const u8) -> Self {
        // SAFETY: as the caller vouches.
        unsafe {
            let (check, rip) = (at.cast::<i32>(), at.add(Self::RIP).cast::<u64>());
            Self { check: check.read_unaligned(), rip: rip.read_unaligned() }
        }
    }

    /// The address of the check of the page, where the descriptor is at `at`.
    pub fn check(self, at: u64) -> u64 {
        (at + Self::LEN as u64).wrapping_add(self.check as u64)
    }
}

/// An access, or several that are checked together, that the TLB did not answer, in code that has no more than that to
/// say. Behind it may come a jump to code in which each access is checked by itself.
#[derive(Clone, Copy, Debug)]
pub struct RefillDesc {
    /// Bytes, and the constants.
    word: u16,
    /// Where the instruction is, from the block's RIP.
    delta: i16,
}

impl RefillDesc {
    /// The bytes, in the first word.
    pub const SIZE: u16 = 0x7ff;
    /// The access stores. (One that does not may still be for a group in which another one does.)
    pub const STORE: u16 = 1 << 13;
    /// A page fault is not necessarily what it raises.
    pub const EXACT: u16 = 1 << 14;
    /// The jump is there.
    pub const LINKED: u16 = 1 << 15;
    /// Length of the structure.
    pub const LEN: i32 = 4;

    /// `size` bytes for the instruction at `rip` in the block for `from`.
    pub fn new(from: u64, rip: u64, size: u16, flags: u16) -> Self {
        debug_assert!(size <= Self::SIZE);
        Self { word: size | flags, delta: delta(from, rip) }
    }

    /// As bytes.
    pub fn to_bytes(self) -> [u8; Self::LEN as usize] {
        let ([a, b], [c, d]) = (self.word.to_ne_bytes(), self.delta.to_ne_bytes());
        [a, b, c, d]
    }

    /// From emitted code.
    ///
    /// # Safety
    /// One of these is at `at`.
    pub unsafe fn read(at: *const u8) -> Self {
        // SAFETY: as the caller vouches.
        let [a, b, c, d] = unsafe { at.cast::<[u8; 4]>().read() };
        Self { word: u16::from_ne_bytes([a, b]), delta: i16::from_ne_bytes([c, d]) }
    }

    /// Whether the access stores.
    pub fn stores(self) -> bool {
        self.word & Self::STORE != 0
    }

    /// Whether a page fault is all that it can raise.
    pub fn is_plain(self) -> bool {
        self.word & Self::EXACT == 0
    }

    /// Where the instruction is in the block for `from`.
    pub fn rip(self, from: u64) -> u64 {
        from.wrapping_add(self.delta as u64)
    }
}

/// What lies on one page is not far from each other.
fn delta(from: u64, to: u64) -> i16 {
    let delta = to.wrapping_sub(from) as i64;
    debug_assert_eq!(delta, i64::from(delta as i16));
    delta as i16
}

/// An instruction to emulate, or that may have to be looked at again.
#[derive(Clone, Copy, Debug)]
pub struct ExitDesc {
    /// Offset in CS of the instruction.
    pub rip: u64,
    /// Its length and bytes.
    pub len: u8,
    /// See `len`.
    pub bytes: [u8; 15],
}

impl ExitDesc {
    /// The bytes that emitted code has of it.
    pub fn packed(rip: u64, insn: &[u8]) -> impl Iterator<Item = u8> {
        rip.to_ne_bytes().into_iter().chain([insn.len() as u8]).chain(insn.iter().copied())
    }

    /// With an RIP that is what it seems, while the page of movable code is the one at `code_page`.
    pub fn resolved(self, code_page: u64) -> Self {
        Self { rip: resolve(self.rip, code_page), ..self }
    }

    /// From emitted code.
    ///
    /// # Safety
    /// [`Self::packed`] is at `at`.
    pub unsafe fn read(at: *const u8) -> Self {
        // SAFETY: as the caller vouches.
        unsafe {
            let len = *at.add(8);
            let mut bytes = [0; 15];
            for (i, byte) in bytes.iter_mut().enumerate().take(usize::from(len)) {
                *byte = *at.add(9 + i);
            }
            Self { rip: at.cast::<u64>().read_unaligned(), len, bytes }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_say_where_they_lead_and_where_from() {
        const FROM: u64 = 0xffff_ffff_8000_0800;
        for (delta, flags, distance) in [(0i64, 0, 0), (-0x800, 1, 1), (0x7ff, 2, 511), (5, 3, 512), (-1, 0, 100)] {
            let rip = FROM.wrapping_add_signed(delta);
            let mut bytes = LinkDesc::new(FROM, rip, flags).to_bytes();
            bytes.iter_mut().zip(LinkDesc::behind(distance)).for_each(|(byte, more)| *byte |= more);
            // SAFETY: these are the bytes of one.
            #[allow(unsafe_code)]
            let desc = unsafe { LinkDesc::read(bytes.as_ptr()) };
            assert_eq!((desc.rip(FROM), desc.flags()), (rip, flags));
            let known = (1..512).contains(&distance).then(|| 0x1000 - u64::from(distance));
            assert_eq!(desc.conditional(0x1000), known, "{distance}");
        }
    }
}
