//! What of the processor's state a translation depends on.

use std::sync::atomic::Ordering;

use purlin_arch::x86_64::regs::{cr0, cr4, rflags, seg, xcr0};

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::jumps::Context;
use crate::{
    cpu::{Cpu, Segment, access},
    tlb::Privilege,
};

/// The mode of a translation. Everything that emitted code bakes in, and that only Rust code can change, is here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable)]
#[repr(transparent)]
pub struct Mode(u32);

const CODE32: u32 = 1 << 0;
const CODE64: u32 = 1 << 1;
const PRIVILEGE_SHIFT: u32 = 2;
const PRIVILEGE: u32 = 3 << PRIVILEGE_SHIFT;
/// CS, DS, ES and SS have base 0 and no limit, and alignment is not checked.
const FLAT: u32 = 1 << 4;
const FLAT_FS: u32 = 1 << 5;
const FLAT_GS: u32 = 1 << 6;
const STACK32: u32 = 1 << 7;
/// Vector and x87 registers are in the host's.
const VECTORS: u32 = 1 << 8;
const X87: u32 = 1 << 9;
const SSE: u32 = 1 << 10;
const AVX: u32 = 1 << 11;
const AVX512: u32 = 1 << 12;
const STEP: u32 = 1 << 13;
/// No access is checked together with others.
const UNGROUPED: u32 = 1 << 14;
/// 64-bit code at CPL 0.
const KERNEL: u32 = 1 << 15;
/// RDTSC may be executed.
const TIME_STAMP: u32 = 1 << 16;
/// RDTSCP exists.
const RDTSCP: u32 = 1 << 17;
/// CR4.FSGSBASE.
const FSGSBASE: u32 = 1 << 18;
/// All code in the lower half of the addresses is movable.
const LOW_MOVABLE: u32 = 1 << 19;

impl Mode {
    /// That of no code.
    pub const NONE: Self = Self(u32::MAX);

    /// 16, 32 or 64.
    pub fn bits(self) -> u32 {
        match self.0 & (CODE32 | CODE64) {
            CODE64 => 64,
            CODE32 => 32,
            _ => 16,
        }
    }

    /// On whose behalf memory is accessed.
    pub fn privilege(self) -> Privilege {
        match (self.0 & PRIVILEGE) >> PRIVILEGE_SHIFT {
            0 => Privilege::User,
            1 => Privilege::Supervisor,
            _ => Privilege::SupervisorAc,
        }
    }

    /// Whether an access through segment `index` goes to base + offset unchecked (base 0 but for FS and GS).
    pub fn flat(self, index: usize) -> bool {
        let bit = match index {
            seg::FS => FLAT_FS,
            seg::GS => FLAT_GS,
            seg::CS if self.bits() != 64 => return false,
            _ => FLAT,
        };
        self.0 & bit != 0
    }

    /// Size of the stack pointer: 16, 32 or 64.
    pub fn stack_bits(self) -> u32 {
        match self.bits() {
            64 => 64,
            _ if self.0 & STACK32 != 0 => 32,
            _ => 16,
        }
    }

    /// Whether vector and x87 registers are in the host's.
    pub fn vectors(self) -> bool {
        self.0 & VECTORS != 0
    }

    /// Whether x87 and MMX instructions can be executed as they are.
    pub fn x87(self) -> bool {
        self.0 & X87 != 0
    }

    /// Whether SSE instructions can.
    pub fn sse(self) -> bool {
        self.0 & SSE != 0
    }

    /// Whether AVX instructions can.
    pub fn avx(self) -> bool {
        self.0 & AVX != 0
    }

    /// Whether AVX-512 instructions can.
    pub fn avx512(self) -> bool {
        self.0 & AVX512 != 0
    }

    /// Whether every block is one instruction.
    pub fn step(self) -> bool {
        self.0 & STEP != 0
    }

    /// Whether it is 64-bit code at CPL 0.
    pub fn kernel(self) -> bool {
        self.0 & KERNEL != 0
    }

    /// Whether RDTSC may be executed.
    pub fn time_stamp(self) -> bool {
        self.0 & TIME_STAMP != 0
    }

    /// Whether there is RDTSCP.
    pub fn rdtscp(self) -> bool {
        self.0 & RDTSCP != 0
    }

    /// Whether there are RDFSBASE and its kin.
    pub fn fsgsbase(self) -> bool {
        self.0 & FSGSBASE != 0
    }

    /// Whether all code in the lower half of the addresses is movable (see `place.rs`), not only what lies high enough.
    pub fn low_movable(self) -> bool {
        self.0 & LOW_MOVABLE != 0
    }

    /// Whether accesses may be checked together. Where such a check does not hold, the same code without goes on; it
    /// leads back to code of the plain mode.
    pub fn grouped(self) -> bool {
        self.0 & (UNGROUPED | STEP) == 0
    }

    /// Whether code has only the short way for what the TLB does not answer, and leaves the rest to code of
    /// [`Self::ungrouped`].
    pub fn compact(self) -> bool {
        self.grouped() && self.bits() == 64
    }

    /// The same with checking accesses together.
    pub fn plain(self) -> Self {
        Self(self.0 & !UNGROUPED)
    }

    /// The same without checking accesses together.
    pub fn ungrouped(self) -> Self {
        Self(self.0 | UNGROUPED)
    }

    /// Which jump table its blocks use.
    pub fn table(self) -> usize {
        let vectors = usize::from(self.vectors());
        let kind = if self.step() || self.bits() != 64 { 3 } else { self.privilege() as usize };
        kind << 1 | vectors
    }
}

impl Cpu {
    /// The context of translations at this moment. `vectors`: the vector registers are to be in the host's; `step`:
    /// every block is to be one instruction.
    pub fn context(&self, vectors: bool, step: bool) -> Context {
        let mut mode = 0;
        let cs = &self.seg[seg::CS];
        let code64 = self.code64();
        if code64 {
            mode |= CODE64 | if self.cpl == 0 { KERNEL } else { 0 };
        } else if cs.db() {
            mode |= CODE32;
        }
        mode |= (self.privilege() as u32) << PRIVILEGE_SHIFT;
        if code64 {
            mode |= self.own_code();
        }
        let checks_alignment = self.cpl == 3 && self.cr0 & cr0::AM != 0 && self.rflags & rflags::AC != 0;
        if !checks_alignment && !self.watches_data() {
            let flat = |s: &Segment| code64 || no_limit(s);
            let based = |s: &Segment| code64 || s.base == 0 && no_limit(s);
            if [seg::DS, seg::ES, seg::SS].iter().all(|&i| based(&self.seg[i])) {
                mode |= FLAT;
            }
            if flat(&self.seg[seg::FS]) {
                mode |= FLAT_FS;
            }
            if flat(&self.seg[seg::GS]) {
                mode |= FLAT_GS;
            }
        }
        if self.seg[seg::SS].db() {
            mode |= STACK32;
        }
        if vectors {
            mode |= VECTORS | self.vector_classes();
        }
        if step {
            mode |= STEP;
        }
        let (cs_base, cs_limit) = if code64 { (0, 0) } else { (cs.base, cs.limit) };
        Context { mode: Mode(mode), cs_base, cs_limit }
    }

    /// Which instructions of 64-bit code can be executed without being emulated, and which code is movable.
    fn own_code(&self) -> u32 {
        let bit = |on: bool, bit: u32| if on { bit } else { 0 };
        bit(self.cpl == 0 || self.cr4 & cr4::TSD == 0, TIME_STAMP)
            | bit(self.features.rdtscp, RDTSCP)
            | bit(self.cr4 & cr4::FSGSBASE != 0, FSGSBASE)
            | bit(self.shared.low_movable.load(Ordering::Relaxed), LOW_MOVABLE)
    }

    /// Whether a debug register watches loads or stores.
    fn watches_data(&self) -> bool {
        self.dr7 & 0xff != 0 && (0..4).any(|n| self.dr7 >> (2 * n) & 3 != 0 && self.dr7 >> (16 + 4 * n) & 3 != 0)
    }

    /// Which classes of vector instructions need no check (CR0, CR4, XCR0; SDM vol. 3A 2.5, vol. 1 13.2).
    fn vector_classes(&self) -> u32 {
        let mut classes = 0;
        if self.cr0 & (cr0::EM | cr0::TS) == 0 {
            classes |= X87;
            if self.cr4 & cr4::OSFXSR != 0 {
                classes |= SSE;
            }
        }
        if self.cr0 & cr0::TS == 0 && self.cr4 & cr4::OSXSAVE != 0 && self.protected() && !self.v86() {
            let has = |bits| self.xcr0 & bits == bits;
            if has(xcr0::SSE | xcr0::AVX) {
                classes |= AVX;
                if has(xcr0::AVX512) {
                    classes |= AVX512;
                }
            }
        }
        classes
    }
}

/// A usable, writable, expand-up data segment without limit.
fn no_limit(s: &Segment) -> bool {
    let data_rw = s.access & (access::CODE | access::DC | access::RW) == access::RW;
    !s.unusable() && data_rw && s.limit == u32::MAX
}
