//! What the host offers, and what of that a guest is offered: by CPUID.

use std::{arch::x86_64::__cpuid_count, collections::BTreeSet, sync::LazyLock};

use iced_x86::{Code, CpuidFeature, Instruction, Mnemonic};
use purlin_engine_translator::translate::offered::offered;

/// Whether the host has the extensions that `code` belongs to.
pub fn has(code: Code) -> bool {
    let mut insn = Instruction::default();
    insn.set_code(code);
    let there = |feature: &CpuidFeature| !NOWHERE.contains(feature) && !LACKING.contains(feature);
    is_hint(code) || offered(&insn) && code.cpuid_features().iter().all(there)
}

/// Whether a guest with the host's features is offered what `code` belongs to. The rest is undefined there.
pub fn guests_have(code: Code) -> bool {
    use CpuidFeature::*;
    let others = |f: &CpuidFeature| {
        matches!(
            f,
            CLZERO
                | INVPCID
                | XSAVES
                | MONITOR
                | MONITORX
                | RDPRU
                | MCOMMIT
                | WBNOINVD
                | INVLPGB
                | PKU
                | RTM
                | TSXLDTRK
                | HLE_or_RTM
                | WAITPKG
                | MOVDIRI
                | MOVDIR64B
                | ENQCMD
                | SERIALIZE
                | VMX
                | SVM
                | SKINIT_or_SVM
                | INVEPT
                | INVVPID
                | SMX
                | SGX1
                | CET_SS
                | AVX512_VP2INTERSECT
                | AMX_TILE
                | AMX_INT8
                | AMX_BF16
                | AMX_FP16
                | AMX_COMPLEX
                | D3NOW
                | D3NOWEXT
                | XOP
                | FMA4
                | TBM
                | LWP
        )
    };
    is_hint(code) || !code.cpuid_features().iter().any(others)
}

/// Encodings that do nothing on a processor that does not know them.
fn is_hint(code: Code) -> bool {
    use Mnemonic::*;
    matches!(
        code.mnemonic(),
        Endbr32 | Endbr64 | Rdsspd | Rdsspq | Cldemote | Prefetchit0 | Prefetchit1 | Prefetchw | Prefetchwt1
    )
}

/// Extensions that no processor with 64-bit mode has, that are asked for by other means than CPUID, or that are part of
/// a machine that no guest sees.
const NOWHERE: [CpuidFeature; 37] = {
    use CpuidFeature::*;
    [
        INTEL8086_ONLY,
        INTEL286_ONLY,
        INTEL386_ONLY,
        INTEL386_A0_ONLY,
        INTEL486_A_ONLY,
        UMOV,
        IA64,
        CL1INVMB,
        OSS,
        FPU287XL_ONLY,
        FPU387SL_ONLY,
        CYRIX_D3NOW,
        PADLOCK_ACE,
        PADLOCK_PHE,
        PADLOCK_PMM,
        PADLOCK_RNG,
        PADLOCK_GMI,
        PADLOCK_UNDOC,
        PCOMMIT,
        CYRIX_FPU,
        CYRIX_SMM,
        CYRIX_SMINT,
        CYRIX_SMINT_0F7E,
        CYRIX_SHR,
        CYRIX_DDI,
        CYRIX_EMMI,
        CYRIX_DMI,
        CENTAUR_AIS,
        MOV_TR,
        TDX,
        UDBG,
        KNC,
        RMPQUERY,
        TSE,
        PTWRITE,
        SEV_ES,
        SEV_SNP,
    ]
};

/// Those that a processor may lack, and this one does, beside the ones that the translator asks about.
static LACKING: LazyLock<BTreeSet<CpuidFeature>> = LazyLock::new(|| {
    use CpuidFeature::*;
    let leaf = |leaf, subleaf| __cpuid_count(leaf, subleaf);
    let bit = |register: u32, bit: u32| register >> bit & 1 != 0;
    let (basic, seven, more, xsave) = (leaf(1, 0), leaf(7, 0), leaf(7, 1), leaf(0xd, 1));
    let (extended, eight) = (leaf(0x8000_0001, 0), leaf(0x8000_0008, 0));
    let (rtm, svm, vmx) = (bit(seven.ebx, 11), bit(extended.ecx, 2), bit(basic.ecx, 5));
    let found = [
        (MONITOR, bit(basic.ecx, 3)),
        (VMX, vmx),
        (INVEPT, vmx),
        (INVVPID, vmx),
        (SMX, bit(basic.ecx, 6)),
        (XSAVE, bit(basic.ecx, 26)),
        (SEP, bit(basic.edx, 11)),
        (FSGSBASE, bit(seven.ebx, 0)),
        (SGX1, bit(seven.ebx, 2)),
        (HLE, bit(seven.ebx, 4)),
        (INVPCID, bit(seven.ebx, 10)),
        (RTM, rtm),
        (HLE_or_RTM, rtm || bit(seven.ebx, 4)),
        (MPX, bit(seven.ebx, 14)),
        (SMAP, bit(seven.ebx, 20)),
        (PKU, bit(seven.ecx, 3)),
        (WAITPKG, bit(seven.ecx, 5)),
        (CET_SS, bit(seven.ecx, 7)),
        (CET_IBT, bit(seven.edx, 20)),
        (RDPID, bit(seven.ecx, 22)),
        (KL, bit(seven.ecx, 23)),
        (AESKLE, bit(seven.ecx, 23)),
        (WIDE_KL, bit(seven.ecx, 23)),
        (MOVDIRI, bit(seven.ecx, 27)),
        (MOVDIR64B, bit(seven.ecx, 28)),
        (ENQCMD, bit(seven.ecx, 29)),
        (UINTR, bit(seven.edx, 5)),
        (SERIALIZE, bit(seven.edx, 14)),
        (TSXLDTRK, bit(seven.edx, 16)),
        (PCONFIG, bit(seven.edx, 18)),
        (AMX_BF16, bit(seven.edx, 22)),
        (AMX_TILE, bit(seven.edx, 24)),
        (AMX_INT8, bit(seven.edx, 25)),
        (SHA512, bit(more.eax, 0)),
        (SM3, bit(more.eax, 1)),
        (SM4, bit(more.eax, 2)),
        (RAO_INT, bit(more.eax, 3)),
        (CMPCCXADD, bit(more.eax, 7)),
        (FRED, bit(more.eax, 17)),
        (LKGS, bit(more.eax, 18)),
        (WRMSRNS, bit(more.eax, 19)),
        (AMX_FP16, bit(more.eax, 21)),
        (HRESET, bit(more.eax, 22)),
        (AVX_IFMA, bit(more.eax, 23)),
        (MSRLIST, bit(more.eax, 27)),
        (AVX_VNNI_INT8, bit(more.edx, 4)),
        (AVX_NE_CONVERT, bit(more.edx, 5)),
        (AMX_COMPLEX, bit(more.edx, 8)),
        (AVX_VNNI_INT16, bit(more.edx, 10)),
        (XSAVEOPT, bit(xsave.eax, 0)),
        (XSAVEC, bit(xsave.eax, 1)),
        (XSAVES, bit(xsave.eax, 3)),
        (SVM, svm),
        (SKINIT, bit(extended.ecx, 12)),
        (SKINIT_or_SVM, svm || bit(extended.ecx, 12)),
        (LZCNT, bit(extended.ecx, 5)),
        (PREFETCHW, bit(extended.ecx, 8)),
        (XOP, bit(extended.ecx, 11)),
        (LWP, bit(extended.ecx, 15)),
        (FMA4, bit(extended.ecx, 16)),
        (TBM, bit(extended.ecx, 21)),
        (MONITORX, bit(extended.ecx, 29)),
        (RDTSCP, bit(extended.edx, 27)),
        (D3NOWEXT, bit(extended.edx, 30)),
        (D3NOW, bit(extended.edx, 31)),
        (CLZERO, bit(eight.ebx, 0)),
        (INVLPGB, bit(eight.ebx, 3)),
        (RDPRU, bit(eight.ebx, 4)),
        (MCOMMIT, bit(eight.ebx, 8)),
        (WBNOINVD, bit(eight.ebx, 9)),
    ];
    found.into_iter().filter(|(_, has)| !has).map(|(feature, _)| feature).collect()
});

/// Whether the host is an AMD processor of a family before Zen 5's (APM vol. 3, appendix E.3.2).
pub fn is_amd_before_zen_5() -> bool {
    const ZEN_5: u32 = 0x1a;
    let signature = __cpuid_count(1, 0).eax;
    let family = match signature >> 8 & 0xf {
        0xf => 0xf + (signature >> 20 & 0xff),
        family => family,
    };
    is_amd() && family < ZEN_5
}

/// Whether the host is an AMD processor, or one that says so.
pub fn is_amd() -> bool {
    let leaf = __cpuid_count(0, 0);
    purlin_arch::x86_64::cpuid::Vendor::of([leaf.eax, leaf.ebx, leaf.ecx, leaf.edx])
        == purlin_arch::x86_64::cpuid::Vendor::Amd
}
