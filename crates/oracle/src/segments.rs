//! The descriptors that a case can name: those of Linux that user code can see, and an LDT that both sides have.

/// Linux's flat code segment of 32 bits, RPL 3.
pub const CODE32: u16 = 0x23;
/// Linux's flat data segment, RPL 3.
pub const DATA32: u16 = 0x2b;
/// Linux's code segment of 64 bits, RPL 3.
pub const CODE64: u16 = 0x33;
/// FS at the start of a case.
pub const FS: u16 = ldt(0);
/// GS at the start of a case.
pub const GS: u16 = ldt(1);
/// Code of 16 bits: the first 64 KiB.
pub const CODE16: u16 = ldt(2);
/// A stack of 16 bits: the first 64 KiB.
pub const STACK16: u16 = ldt(3);

/// The selector of an LDT entry, RPL 3.
const fn ldt(entry: u16) -> u16 {
    entry << 3 | 7
}

/// Linux's GDT entry whose limit is the number of the processor.
pub const PROCESSOR: usize = 15;

/// A descriptor as modify_ldt takes it.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// Base address.
    pub base: u32,
    /// Limit, in bytes or pages.
    pub limit: u32,
    /// What it is: bits of [`bit`].
    pub bits: u32,
}

/// The bits that follow the limit in `struct user_desc` (asm/ldt.h).
pub mod bit {
    /// D or B.
    pub const WIDE: u32 = 1 << 0;
    /// Expands down.
    pub const DOWN: u32 = 1 << 1;
    /// Code.
    pub const CODE: u32 = 2 << 1;
    /// Conforming code.
    pub const CONFORMING: u32 = 3 << 1;
    /// Data that cannot be written, or code that cannot be read.
    pub const LESS: u32 = 1 << 3;
    /// The limit is in pages.
    pub const PAGES: u32 = 1 << 4;
    /// Not present.
    pub const ABSENT: u32 = 1 << 5;
    /// AVL.
    pub const USABLE: u32 = 1 << 6;
}

/// The LDT.
pub const LDT: [Entry; 11] = {
    use crate::layout::{DATA, DATA16, FS_BASE, GS_BASE};
    use bit::*;
    const fn entry(base: u64, limit: u32, bits: u32) -> Entry {
        Entry { base: base as u32, limit, bits: bits | USABLE }
    }
    [
        entry(FS_BASE, 0xf_ffff, WIDE | PAGES),
        entry(GS_BASE, 0xf_ffff, WIDE | PAGES),
        entry(0, 0xffff, CODE),
        entry(0, 0xffff, 0),
        // Data that ends on its second page, and that begins there.
        entry(DATA, 0x17ff, WIDE),
        entry(DATA, 0x17ff, WIDE | DOWN),
        entry(DATA16, 0x17ff, DOWN),
        entry(DATA, 0x3fff, WIDE | LESS),
        // Code that cannot be read; code and data that are not there.
        entry(0, 0xf_ffff, WIDE | PAGES | CODE | LESS),
        entry(0, 0xf_ffff, WIDE | PAGES | CONFORMING | ABSENT),
        entry(0, 0xf_ffff, WIDE | PAGES | ABSENT),
    ]
};

impl Entry {
    /// What Linux makes of it, as it lies in the table.
    pub fn descriptor(&self) -> u64 {
        let has = |bit: u32| u64::from(self.bits & bit != 0);
        let kind = (1 - has(bit::LESS)) << 1 | u64::from(self.bits >> 1 & 3) << 2 | 1;
        let access = kind | 1 << 4 | 3 << 5 | (1 - has(bit::ABSENT)) << 7;
        let flags = has(bit::USABLE) | has(bit::WIDE) << 2 | has(bit::PAGES) << 3;
        raw(self.base, self.limit, access, flags)
    }
}

const fn raw(base: u32, limit: u32, access: u64, flags: u64) -> u64 {
    let (base, limit) = (base as u64, limit as u64);
    limit & 0xffff
        | (base & 0xff_ffff) << 16
        | access << 40
        | (limit >> 16 & 0xf) << 48
        | flags << 52
        | (base >> 24) << 56
}

/// Linux's GDT as far as user code can tell (asm/segment.h); its task and its LDT are in the translator's hidden
/// registers. `processor` is the limit of [`PROCESSOR`].
pub fn gdt(processor: u32) -> [u64; 16] {
    let mut table = [0; 16];
    table[1] = raw(0, 0xf_ffff, 0x9b, 0xc);
    table[2] = raw(0, 0xf_ffff, 0x9b, 0xa);
    table[3] = raw(0, 0xf_ffff, 0x93, 0xc);
    table[4] = raw(0, 0xf_ffff, 0xfb, 0xc);
    table[5] = raw(0, 0xf_ffff, 0xf3, 0xc);
    table[6] = raw(0, 0xf_ffff, 0xfb, 0xa);
    table[PROCESSOR] = raw(0, processor, 0xf5, 4);
    table
}

/// Selectors for a case to load: each of the tables' entries, null ones, some beyond the tables, some of other levels.
pub fn selectors() -> Vec<u16> {
    let mut all: Vec<u16> = (0..LDT.len() as u16).map(ldt).collect();
    all.extend([0, 1, 2, 3, CODE32, DATA32, CODE64, 0x7b, CODE32 & !3, DATA32 & !1, ldt(4) & !3]);
    all.extend([0x08, 0x10, 0x1b, 0x3b, 0x43, 0x53, 0x80, ldt(LDT.len() as u16), 0xfffc, 0xfff8]);
    all
}
