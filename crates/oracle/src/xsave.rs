//! The XSAVE area in the standard format, as the host lays it out (SDM vol. 1 13.4).

use std::sync::LazyLock;

use crate::rng::Rng;

/// Room for all components up to AVX-512.
pub const AREA: usize = 2688;

/// Offsets in the legacy region and the header.
pub mod at {
    #![allow(missing_docs)]
    pub const FCW: usize = 0;
    pub const FSW: usize = 2;
    pub const FTW: usize = 4;
    pub const FOP: usize = 6;
    pub const FIP: usize = 8;
    pub const FDP: usize = 16;
    pub const MXCSR: usize = 24;
    pub const MXCSR_MASK: usize = 28;
    pub const ST: usize = 32;
    pub const XMM: usize = 160;
    pub const LEGACY_END: usize = 416;
    pub const HEADER: usize = 512;
}

/// An extended component.
#[derive(Clone, Copy, Debug)]
pub struct Component {
    /// Its bit in XCR0.
    pub bit: u32,
    /// Offset in the area.
    pub offset: usize,
    /// Bytes.
    pub size: usize,
    /// What it is called in reports.
    pub name: &'static str,
}

/// The extended components that the host has: upper halves of YMM, opmasks, upper halves of ZMM, ZMM16 to ZMM31.
pub static COMPONENTS: LazyLock<Vec<Component>> = LazyLock::new(|| {
    let mut found = Vec::new();
    for (bit, name) in [(2, "ymm-high"), (5, "k"), (6, "zmm-high"), (7, "zmm16-31")] {
        let leaf = std::arch::x86_64::__cpuid_count(0xd, bit);
        let (size, offset) = (leaf.eax as usize, leaf.ebx as usize);
        if size != 0 && offset + size <= AREA {
            found.push(Component { bit, offset, size, name });
        }
    }
    found
});

/// The XCR0 bits of the components that a case can use.
pub fn components() -> u64 {
    COMPONENTS.iter().fold(3, |bits, c| bits | 1 << c.bit)
}

/// The XCR0 bits that the host may have and no case uses: of PKRU, and of AMX's tiles. A guest's XCR0 is without them, so an
/// instruction that asks for them does something else natively.
pub static OTHERS: LazyLock<u64> = LazyLock::new(|| {
    let leaf = std::arch::x86_64::__cpuid_count(0xd, 0);
    (u64::from(leaf.edx) << 32 | u64::from(leaf.eax)) & !components()
});

/// Bytes of an area up to the end of the last of these components.
pub fn size() -> usize {
    COMPONENTS.iter().fold(at::HEADER + 64, |end, c| end.max(c.offset + c.size))
}

/// An area.
#[derive(Clone)]
#[repr(C, align(64))]
pub struct Area(pub [u8; AREA]);

impl Default for Area {
    fn default() -> Self {
        Self([0; AREA])
    }
}

impl Area {
    /// Two bytes of it.
    pub fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.0[at], self.0[at + 1]])
    }

    /// Four bytes of it.
    pub fn u32(&self, at: usize) -> u32 {
        u32::from(self.u16(at)) | u32::from(self.u16(at + 2)) << 16
    }

    /// Eight bytes of it.
    pub fn u64(&self, at: usize) -> u64 {
        u64::from(self.u32(at)) | u64::from(self.u32(at + 4)) << 32
    }

    /// Writes bytes.
    pub fn set(&mut self, at: usize, bytes: &[u8]) {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// The bytes of components that are in their initial state are what that state is, so that areas can be compared.
    pub fn normalise(&mut self) {
        let present = self.u64(at::HEADER);
        if present & 1 == 0 {
            self.0[..at::MXCSR].fill(0);
            self.0[at::ST..at::XMM].fill(0);
            self.set(at::FCW, &0x37fu16.to_le_bytes());
        }
        if present & 2 == 0 {
            self.0[at::XMM..at::LEGACY_END].fill(0);
        }
        for c in COMPONENTS.iter().filter(|c| present & 1 << c.bit == 0) {
            self.0[c.offset..c.offset + c.size].fill(0);
        }
        self.0[at::LEGACY_END..at::HEADER + 64].fill(0);
        self.set(at::MXCSR_MASK, &[0; 4]);
    }

    /// Random registers. Kept cases depend on what a seed gives: do not change it.
    pub fn random(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let mut area = Self::default();
        random_x87(&mut area, &mut rng);
        area.set(at::MXCSR, &random_mxcsr(&mut rng).to_le_bytes());
        fill(&mut area.0[at::XMM..at::LEGACY_END], &mut rng);
        let mut present = 3;
        for c in COMPONENTS.iter() {
            if rng.chance(85) {
                present |= 1 << c.bit;
                fill(&mut area.0[c.offset..c.offset + c.size], &mut rng);
            }
        }
        area.set(at::HEADER, &(present as u64).to_le_bytes());
        area
    }
}

fn random_x87(area: &mut Area, rng: &mut Rng) {
    let mut control = 0x37fu16;
    if rng.chance(40) {
        control = control & !0xf00 | rng.pick(&[0u16, 2, 3]) << 8 | (rng.below(4) as u16) << 10;
    }
    if rng.chance(12) {
        control = control & !0x3f | rng.bits() as u16 & 0x3f;
    }
    let mut status = (rng.below(8) as u16) << 11;
    if rng.chance(50) {
        status |= rng.bits() as u16 & 0x4700;
    }
    if rng.chance(30) {
        status |= rng.bits() as u16 & 0x7f;
    }
    // An exception that is unmasked and waits: the next x87 instruction raises it, so only now and then.
    if status & !control & 0x3f != 0 {
        if rng.chance(30) { status |= 0x8080 } else { status &= !(status & !control & 0x3f) }
    }
    area.set(at::FCW, &control.to_le_bytes());
    area.set(at::FSW, &status.to_le_bytes());
    area.0[at::FTW] = match rng.below(4) {
        0 => 0,
        1 => 0xff,
        2 => rng.bits() as u8,
        _ => (rng.bits() | rng.bits()) as u8,
    };
    for i in 0..8 {
        let mantissa = match rng.below(5) {
            0 => 1 << 63,
            1 => 1 << 63 | (rng.bits() & 0xffff) << 47,
            2 => rng.bits(),
            _ => rng.bits() | 1 << 63,
        };
        let exponent = match rng.below(6) {
            0 => rng.pick(&[0u16, 1, 0x7ffe, 0x7fff]),
            1 => rng.bits() as u16 & 0x7fff,
            _ => 0x3fff - 40 + rng.below(80) as u16,
        };
        let sign = (rng.bits() as u16) << 15;
        area.set(at::ST + 16 * i, &mantissa.to_le_bytes());
        area.set(at::ST + 16 * i + 8, &(exponent | sign).to_le_bytes());
    }
}

fn random_mxcsr(rng: &mut Rng) -> u32 {
    let mut mxcsr = 0x1f80u32;
    if rng.chance(40) {
        mxcsr |= (rng.below(4) as u32) << 13;
    }
    if rng.chance(20) {
        mxcsr |= rng.bits() as u32 & 0x8040;
    }
    if rng.chance(30) {
        mxcsr |= rng.bits() as u32 & 0x3f;
    }
    if rng.chance(8) {
        mxcsr &= !(rng.bits() as u32 & 0x1f80);
    }
    mxcsr
}

/// Fills `bytes` with numbers of several kinds, so that floating point and integers both meet their corners. Kept cases
/// depend on what a seed gives: do not change it.
pub fn fill(bytes: &mut [u8], rng: &mut Rng) {
    for chunk in bytes.chunks_exact_mut(8) {
        let value = match rng.below(8) {
            0 => u64::from(rng.bits() as u32 & 0x83ff_ffff | 0x3c00_0000) << 32 | u64::from(f32_corner(rng)),
            1 => f64_corner(rng),
            2 => u64::from(f32_corner(rng)) << 32 | u64::from(f32_corner(rng)),
            3 => (rng.bits() as i64 >> rng.below(64)) as u64,
            4 => rng.bits() & 0x800f_ffff_ffff_ffff | ((0x3ff - 20 + rng.below(40)) as u64) << 52,
            _ => rng.bits(),
        };
        chunk.copy_from_slice(&value.to_le_bytes());
    }
}

fn f32_corner(rng: &mut Rng) -> u32 {
    let sign = (rng.bits() as u32) << 31;
    let corner =
        [0, 1, 0x7f_ffff, 0x80_0000, 0x3f80_0000, 0x4f00_0000, 0x7f7f_ffff, 0x7f80_0000, 0x7f80_0001, 0x7fc0_0000];
    sign | if rng.chance(60) { rng.pick(&corner) } else { 0x3f80_0000 + (rng.bits() as u32 & 0xff_ffff) }
}

fn f64_corner(rng: &mut Rng) -> u64 {
    let sign = rng.bits() << 63;
    let corner = [
        0,
        1,
        0x000f_ffff_ffff_ffff,
        0x0010_0000_0000_0000,
        0x3ff0_0000_0000_0000,
        0x41e0_0000_0000_0000,
        0x43e0_0000_0000_0000,
        0x7fef_ffff_ffff_ffff,
        0x7ff0_0000_0000_0000,
        0x7ff0_0000_0000_0001,
        0x7ff8_0000_0000_0000,
    ];
    sign | rng.pick(&corner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(bytes: &[u8]) -> u64 {
        // FNV-1a.
        bytes.iter().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3))
    }

    /// Kept cases name seeds: what a seed gives must not change.
    #[test]
    fn seeds_keep_their_meaning() {
        let mut data = [0; 256];
        fill(&mut data, &mut Rng::new(1));
        assert_eq!(hash(&data), DATA_OF_SEED_1);
        assert_eq!(hash(&Area::random(1).0[..at::LEGACY_END]), REGISTERS_OF_SEED_1);
    }

    const DATA_OF_SEED_1: u64 = 8_934_491_795_007_640_399;
    const REGISTERS_OF_SEED_1: u64 = 16_529_979_004_041_932_641;
}
