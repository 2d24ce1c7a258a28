//! Which instruction sets the host has. What it lacks is #UD, before anything else can go wrong with an instruction.

use std::sync::LazyLock;

use iced_x86::{CpuidFeature, Instruction};

/// More than iced has features.
const FEATURES: usize = 256;

/// Whether the host has what `insn` needs.
pub fn offered(insn: &Instruction) -> bool {
    insn.cpuid_features().iter().all(|feature| !MISSING[*feature as usize])
}

/// Those that a processor may lack, and this one does, by number.
static MISSING: LazyLock<[bool; FEATURES]> = LazyLock::new(|| {
    use CpuidFeature::*;
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    let [basic, extended] = [__cpuid(1), __cpuid(0x8000_0001)];
    let highest = __cpuid(0).eax;
    let structured = |subleaf| __cpuid_count(if highest >= 7 { 7 } else { highest }, subleaf);
    let (seven, more) = (structured(0), structured(1));
    let bit = |register: u32, bit: u32| register >> bit & 1 != 0;
    let offered = [
        (SSE3, bit(basic.ecx, 0)),
        (PCLMULQDQ, bit(basic.ecx, 1)),
        (SSSE3, bit(basic.ecx, 9)),
        (FMA, bit(basic.ecx, 12)),
        (CMPXCHG16B, bit(basic.ecx, 13)),
        (SSE4_1, bit(basic.ecx, 19)),
        (SSE4_2, bit(basic.ecx, 20)),
        (MOVBE, bit(basic.ecx, 22)),
        (POPCNT, bit(basic.ecx, 23)),
        (AES, bit(basic.ecx, 25)),
        (AVX, bit(basic.ecx, 28)),
        (F16C, bit(basic.ecx, 29)),
        (RDRAND, bit(basic.ecx, 30)),
        (SSE4A, bit(extended.ecx, 6)),
        (BMI1, bit(seven.ebx, 3)),
        (AVX2, bit(seven.ebx, 5)),
        (BMI2, bit(seven.ebx, 8)),
        (AVX512F, bit(seven.ebx, 16)),
        (AVX512DQ, bit(seven.ebx, 17)),
        (AVX512PF, bit(seven.ebx, 26)),
        (AVX512ER, bit(seven.ebx, 27)),
        (RDSEED, bit(seven.ebx, 18)),
        (ADX, bit(seven.ebx, 19)),
        (AVX512_IFMA, bit(seven.ebx, 21)),
        (CLFLUSHOPT, bit(seven.ebx, 23)),
        (CLWB, bit(seven.ebx, 24)),
        (AVX512CD, bit(seven.ebx, 28)),
        (SHA, bit(seven.ebx, 29)),
        (AVX512BW, bit(seven.ebx, 30)),
        (AVX512VL, bit(seven.ebx, 31)),
        (AVX512_VBMI, bit(seven.ecx, 1)),
        (AVX512_VBMI2, bit(seven.ecx, 6)),
        (GFNI, bit(seven.ecx, 8)),
        (VAES, bit(seven.ecx, 9)),
        (VPCLMULQDQ, bit(seven.ecx, 10)),
        (AVX512_VNNI, bit(seven.ecx, 11)),
        (AVX512_BITALG, bit(seven.ecx, 12)),
        (AVX512_VPOPCNTDQ, bit(seven.ecx, 14)),
        (AVX512_4VNNIW, bit(seven.edx, 2)),
        (AVX512_4FMAPS, bit(seven.edx, 3)),
        (AVX512_VP2INTERSECT, bit(seven.edx, 8)),
        (AVX512_FP16, bit(seven.edx, 23)),
        (AVX_VNNI, bit(more.eax, 4)),
        (AVX512_BF16, bit(more.eax, 5)),
    ];
    let mut missing = [false; FEATURES];
    for (feature, has) in offered {
        missing[feature as usize] = !has;
    }
    missing
});
