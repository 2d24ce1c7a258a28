//! Accesses under an AVX-512 mask: elements whose mask bit is clear are not accessed, and raise nothing (SDM vol. 2A
//! 2.7, exception classes E1 to E6; those whose name ends in NF access the whole operand whatever the mask).

use iced_x86::{EncodingKind, Instruction, MemorySize, Mnemonic, OpKind, Register};

/// Which elements of a memory operand are accessed.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Masking {
    /// Number of the mask register; 0: the whole operand is accessed.
    pub register: u8,
    /// Bytes in an element.
    pub element: u8,
    /// Bits of the mask that count, from the lowest.
    pub lanes: u8,
    kind: Kind,
}

#[repr(u8)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Kind {
    /// Each bit stands for an element.
    #[default]
    Each,
    /// The operand is accessed if any bit is set.
    Broadcast,
    /// The operand's elements are repeated: each is accessed if any of its bits is set.
    Repeated,
    /// As many elements as bits are set lie side by side.
    Packed,
}

impl Masking {
    /// That of `insn`.
    pub fn of(insn: &Instruction) -> Self {
        let masked = insn.encoding() == EncodingKind::EVEX && insn.op_mask() != Register::None;
        if !masked || accesses_all(insn) {
            return Self::default();
        }
        let info = insn.code().op_code();
        let whole = info.memory_size();
        let element = match info.broadcast_memory_size() {
            _ if insn.mnemonic() == Mnemonic::Vpshufbitqmb => 1,
            // A complex number.
            _ if matches!(
                insn.mnemonic(),
                Mnemonic::Vfcmaddcsh | Mnemonic::Vfmaddcsh | Mnemonic::Vfcmulcsh | Mnemonic::Vfmulcsh
            ) =>
            {
                4
            }
            MemorySize::Unknown => whole.element_size(),
            // The operand's own elements may be smaller than what a mask bit stands for.
            broadcast => broadcast.size(),
        };
        let (kind, lanes) = if insn.is_broadcast() {
            (Kind::Broadcast, whole.size() / element)
        } else if broadcasts(insn.mnemonic()) {
            (Kind::Repeated, insn.op0_register().size() / element)
        } else if packs(insn.mnemonic()) {
            (Kind::Packed, whole.size() / element)
        } else {
            (Kind::Each, whole.size() / element)
        };
        Self { register: insn.op_mask().number() as u8, element: element as u8, lanes: lanes as u8, kind }
    }

    /// As bytes.
    pub fn to_bytes(self) -> [u8; 4] {
        [self.register, self.element, self.lanes, self.kind as u8]
    }

    /// The pieces of an operand of `size` bytes that are accessed under `mask`: offset and size, from the lowest.
    pub fn pieces(self, mask: u64, size: usize) -> impl Iterator<Item = (usize, usize)> {
        let mask = mask & (u64::MAX >> (64 - u32::from(self.lanes.clamp(1, 64))));
        let element = usize::from(self.element);
        let (active, step) = match self.kind {
            Kind::Each => (mask, element),
            Kind::Broadcast => (u64::from(mask != 0), size),
            Kind::Repeated => (fold(mask, size / element), element),
            Kind::Packed => (low_bits(mask.count_ones()), element),
        };
        (0..64).filter(move |i| active >> i & 1 != 0).map(move |i| (i * step, step)).take_while(move |p| p.0 < size)
    }
}

fn low_bits(count: u32) -> u64 {
    u64::MAX.checked_shr(64 - count).unwrap_or(0)
}

/// The bits of `mask`, which come round every `period`, laid over each other.
fn fold(mask: u64, period: usize) -> u64 {
    (0..64).step_by(period.max(1)).fold(0, |all, shift| all | mask >> shift) & low_bits(period as u32)
}

fn broadcasts(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        mnemonic,
        Vbroadcastf32x2
            | Vbroadcastf32x4
            | Vbroadcastf32x8
            | Vbroadcastf64x2
            | Vbroadcastf64x4
            | Vbroadcasti32x2
            | Vbroadcasti32x4
            | Vbroadcasti32x8
            | Vbroadcasti64x2
            | Vbroadcasti64x4
            | Vbroadcastsd
            | Vbroadcastss
            | Vpbroadcastb
            | Vpbroadcastd
            | Vpbroadcastq
            | Vpbroadcastw
    )
}

fn packs(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        mnemonic,
        Vcompresspd
            | Vcompressps
            | Vpcompressb
            | Vpcompressd
            | Vpcompressq
            | Vpcompressw
            | Vexpandpd
            | Vexpandps
            | Vpexpandb
            | Vpexpandd
            | Vpexpandq
            | Vpexpandw
    )
}

/// Exception classes E3NF to E9NF.
fn accesses_all(insn: &Instruction) -> bool {
    use Mnemonic::*;
    match insn.mnemonic() {
        Valignd | Valignq | Vcvtne2ps2bf16 | Vdbpsadbw | Vextractf32x4 | Vextractf32x8 | Vextractf64x2
        | Vextractf64x4 | Vextracti32x4 | Vextracti32x8 | Vextracti64x2 | Vextracti64x4 | Vgf2p8affineinvqb
        | Vgf2p8affineqb | Vinsertf32x4 | Vinsertf32x8 | Vinsertf64x2 | Vinsertf64x4 | Vinserti32x4 | Vinserti32x8
        | Vinserti64x2 | Vinserti64x4 | Vmovddup | Vmovshdup | Vmovsldup | Vpackssdw | Vpacksswb | Vpackusdw
        | Vpackuswb | Vpalignr | Vpconflictd | Vpconflictq | Vpermb | Vpermd | Vpermi2b | Vpermi2d | Vpermi2pd
        | Vpermi2ps | Vpermi2q | Vpermi2w | Vpermilpd | Vpermilps | Vpermpd | Vpermps | Vpermq | Vpermt2b
        | Vpermt2d | Vpermt2pd | Vpermt2ps | Vpermt2q | Vpermt2w | Vpermw | Vpmaddubsw | Vpmaddwd | Vpmultishiftqb
        | Vpshufb | Vpshufd | Vpshufhw | Vpshuflw | Vpunpckhbw | Vpunpckhdq | Vpunpckhqdq | Vpunpckhwd | Vpunpcklbw
        | Vpunpckldq | Vpunpcklqdq | Vpunpcklwd | Vshuff32x4 | Vshuff64x2 | Vshufi32x4 | Vshufi64x2 | Vshufpd
        | Vshufps | Vunpckhpd | Vunpckhps | Vunpcklpd | Vunpcklps => true,
        // With the count in memory.
        Vpslld | Vpsllq | Vpsllw | Vpsrad | Vpsraq | Vpsraw | Vpsrld | Vpsrlq | Vpsrlw => {
            insn.op_kind(2) == OpKind::Memory
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(kind: Kind, element: u8, lanes: u8, mask: u64, size: usize) -> Vec<(usize, usize)> {
        Masking { register: 1, element, lanes, kind }.pieces(mask, size).collect()
    }

    #[test]
    fn pieces_follow_the_mask() {
        assert_eq!(pieces(Kind::Each, 4, 4, 0b1_0110, 16), [(4, 4), (8, 4)]);
        assert_eq!(pieces(Kind::Each, 1, 64, 1 << 63, 64), [(63, 1)]);
        assert_eq!(pieces(Kind::Broadcast, 4, 16, 1 << 15, 4), [(0, 4)]);
        assert_eq!(pieces(Kind::Broadcast, 4, 8, 1 << 15, 4), []);
        assert_eq!(pieces(Kind::Repeated, 4, 8, 0b0010_0000, 16), [(4, 4)]);
        assert_eq!(pieces(Kind::Packed, 8, 8, 0b1000_0001, 64), [(0, 8), (8, 8)]);
        assert_eq!(pieces(Kind::Packed, 1, 64, 0, 64), []);
    }
}
