//! Features by name: those of /proc/cpuinfo where there is one.

use super::{
    Register::{self, Eax, Ebx, Ecx, Edx},
    features::{e1_ecx, e1_edx, e8_ebx, e21_eax, l1_ecx, l1_edx, l7_1_eax, l7_ebx, l7_ecx, l7_edx, xsave},
};

/// A result of CPUID whose bits are features.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Word {
    /// EAX on input.
    pub leaf: u32,
    /// ECX on input; 0 where the leaf has no sub-leaves.
    pub subleaf: u32,
    /// Where it is.
    pub register: Register,
}

/// The names of the features `bits` of a word. One that has no name here is told by its place.
pub fn of(word: Word, bits: u32) -> Vec<String> {
    let known = NAMES
        .iter()
        .find(|(leaf, subleaf, register, _)| (*leaf, *subleaf, *register) == (word.leaf, word.subleaf, word.register));
    let known = known.map_or(&[][..], |(.., names)| names);
    let name = |number: u32| match known.iter().find(|(bit, _)| *bit == 1 << number) {
        Some((_, name)) => (*name).to_owned(),
        None => format!("CPUID {:#x}.{} {} bit {number}", word.leaf, word.subleaf, word.register),
    };
    (0..u32::BITS).filter(|number| bits >> number & 1 != 0).map(name).collect()
}

type Names = &'static [(u32, &'static str)];

const NAMES: &[(u32, u32, Register, Names)] = &[
    (1, 0, Ecx, L1_ECX),
    (1, 0, Edx, &[(l1_edx::VME, "vme")]),
    (7, 0, Ebx, L7_EBX),
    (7, 0, Ecx, L7_ECX),
    (7, 0, Edx, &[(l7_edx::FSRM, "fsrm")]),
    (7, 1, Eax, &[(l7_1_eax::AVX_VNNI, "avx_vnni"), (l7_1_eax::AVX512_BF16, "avx512_bf16")]),
    (0xd, 1, Eax, &[(xsave::XSAVEOPT, "xsaveopt"), (xsave::XSAVEC, "xsavec"), (xsave::XGETBV1, "xgetbv1")]),
    (0x4000_0001, 0, Eax, &[(1 << 3, "kvmclock"), (1 << 24, "kvmclock_stable")]),
    (0x8000_0001, 0, Ecx, E1_ECX),
    (0x8000_0001, 0, Edx, E1_EDX),
    (0x8000_0007, 0, Edx, &[(1 << 8, "invtsc")]),
    (
        0x8000_0008,
        0,
        Ebx,
        &[(e8_ebx::XSAVEERPTR, "xsaveerptr"), (e8_ebx::SSB_NO, "ssb_no"), (e8_ebx::BTC_NO, "btc_no")],
    ),
    (0x8000_0021, 0, Eax, &[(e21_eax::LFENCE_SERIALIZING, "lfence_rdtsc"), (e21_eax::SRSO_NO, "srso_no")]),
];

const L1_ECX: Names = &[
    (l1_ecx::SSE3, "sse3"),
    (l1_ecx::PCLMULQDQ, "pclmulqdq"),
    (l1_ecx::SSSE3, "ssse3"),
    (l1_ecx::FMA, "fma"),
    (l1_ecx::CX16, "cx16"),
    (l1_ecx::SSE4_1, "sse4.1"),
    (l1_ecx::SSE4_2, "sse4.2"),
    (l1_ecx::X2APIC, "x2apic"),
    (l1_ecx::MOVBE, "movbe"),
    (l1_ecx::POPCNT, "popcnt"),
    (l1_ecx::TSC_DEADLINE, "tsc_deadline_timer"),
    (l1_ecx::AES, "aes"),
    (l1_ecx::XSAVE, "xsave"),
    (l1_ecx::AVX, "avx"),
    (l1_ecx::F16C, "f16c"),
    (l1_ecx::RDRAND, "rdrand"),
    (l1_ecx::HYPERVISOR, "hypervisor"),
];

const L7_EBX: Names = &[
    (l7_ebx::FSGSBASE, "fsgsbase"),
    (l7_ebx::TSC_ADJUST, "tsc_adjust"),
    (l7_ebx::BMI1, "bmi1"),
    (l7_ebx::AVX2, "avx2"),
    (l7_ebx::SMEP, "smep"),
    (l7_ebx::BMI2, "bmi2"),
    (l7_ebx::ERMS, "erms"),
    (l7_ebx::AVX512F, "avx512f"),
    (l7_ebx::AVX512DQ, "avx512dq"),
    (l7_ebx::RDSEED, "rdseed"),
    (l7_ebx::ADX, "adx"),
    (l7_ebx::SMAP, "smap"),
    (l7_ebx::AVX512_IFMA, "avx512ifma"),
    (l7_ebx::CLFLUSHOPT, "clflushopt"),
    (l7_ebx::CLWB, "clwb"),
    (l7_ebx::AVX512CD, "avx512cd"),
    (l7_ebx::SHA, "sha_ni"),
    (l7_ebx::AVX512BW, "avx512bw"),
    (l7_ebx::AVX512VL, "avx512vl"),
];

const L7_ECX: Names = &[
    (l7_ecx::AVX512_VBMI, "avx512vbmi"),
    (l7_ecx::UMIP, "umip"),
    (l7_ecx::AVX512_VBMI2, "avx512_vbmi2"),
    (l7_ecx::GFNI, "gfni"),
    (l7_ecx::VAES, "vaes"),
    (l7_ecx::VPCLMULQDQ, "vpclmulqdq"),
    (l7_ecx::AVX512_VNNI, "avx512_vnni"),
    (l7_ecx::AVX512_BITALG, "avx512_bitalg"),
    (l7_ecx::AVX512_VPOPCNTDQ, "avx512_vpopcntdq"),
    (l7_ecx::RDPID, "rdpid"),
];

const E1_ECX: Names = &[
    (e1_ecx::LAHF_LM, "lahf_lm"),
    (e1_ecx::CMP_LEGACY, "cmp_legacy"),
    (e1_ecx::ABM, "lzcnt"),
    (e1_ecx::SSE4A, "sse4a"),
    (e1_ecx::MISALIGNSSE, "misalignsse"),
    (e1_ecx::PREFETCHW, "3dnowprefetch"),
    (e1_ecx::OSVW, "osvw"),
    (e1_ecx::TOPOEXT, "topoext"),
];

const E1_EDX: Names = &[
    (e1_edx::SYSCALL, "syscall"),
    (e1_edx::NX, "nx"),
    (e1_edx::MMXEXT, "mmxext"),
    (e1_edx::PDPE1GB, "pdpe1gb"),
    (e1_edx::RDTSCP, "rdtscp"),
    (e1_edx::LM, "lm"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_no_name_is_told_by_its_place() {
        let word = Word { leaf: 7, subleaf: 0, register: Ebx };
        assert_eq!(of(word, 1 << 5 | 1 << 4), ["CPUID 0x7.0 EBX bit 4", "avx2"]);
        assert!(of(word, 0).is_empty());
    }
}
