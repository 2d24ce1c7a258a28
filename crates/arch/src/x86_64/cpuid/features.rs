//! Which feature flags a guest is offered.
//!
//! A flag is offered if it is in [`OFFERED`] (both engines can provide it) and in the model, and if the host has it or
//! the engines provide it on any host ([`EMULATED`]).

use super::{
    CpuModel, CpuidEntry, HostCpuid, Register, Vendor, lookup,
    names::{self, Word},
};

/// Whether process-context identifiers (CR4.PCIDE, INVPCID) are offered. Not yet: the translator's TLB knows no tags,
/// so that they would save the guest nothing.
pub const PCID: bool = false;

/// One value for each register of CPUID that holds feature flags.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Features {
    /// Leaf 1.
    pub l1_ecx: u32,
    pub l1_edx: u32,
    /// Leaf 7, sub-leaf 0.
    pub l7_ebx: u32,
    pub l7_ecx: u32,
    pub l7_edx: u32,
    /// Leaf 7, sub-leaf 1.
    pub l7_1_eax: u32,
    /// Leaf 0xD, sub-leaf 1.
    pub xsave: u32,
    /// Leaf 0x8000_0001.
    pub e1_ecx: u32,
    pub e1_edx: u32,
    /// Leaf 0x8000_0008.
    pub e8_ebx: u32,
    /// Leaf 0x8000_0021.
    pub e21_eax: u32,
}

impl Features {
    fn zip(self, other: Self, f: impl Fn(u32, u32) -> u32) -> Self {
        Self {
            l1_ecx: f(self.l1_ecx, other.l1_ecx),
            l1_edx: f(self.l1_edx, other.l1_edx),
            l7_ebx: f(self.l7_ebx, other.l7_ebx),
            l7_ecx: f(self.l7_ecx, other.l7_ecx),
            l7_edx: f(self.l7_edx, other.l7_edx),
            l7_1_eax: f(self.l7_1_eax, other.l7_1_eax),
            xsave: f(self.xsave, other.xsave),
            e1_ecx: f(self.e1_ecx, other.e1_ecx),
            e1_edx: f(self.e1_edx, other.e1_edx),
            e8_ebx: f(self.e8_ebx, other.e8_ebx),
            e21_eax: f(self.e21_eax, other.e21_eax),
        }
    }

    fn and(self, other: Self) -> Self {
        self.zip(other, |a, b| a & b)
    }

    fn or(self, other: Self) -> Self {
        self.zip(other, |a, b| a | b)
    }

    fn without(self, other: Self) -> Self {
        self.zip(other, |a, b| a & !b)
    }

    /// The names of all that are set.
    fn names(self) -> Vec<String> {
        use Register::{Eax, Ebx, Ecx, Edx};
        let words = [
            (1, 0, Ecx, self.l1_ecx),
            (1, 0, Edx, self.l1_edx),
            (7, 0, Ebx, self.l7_ebx),
            (7, 0, Ecx, self.l7_ecx),
            (7, 0, Edx, self.l7_edx),
            (7, 1, Eax, self.l7_1_eax),
            (0xd, 1, Eax, self.xsave),
            (0x8000_0001, 0, Ecx, self.e1_ecx),
            (0x8000_0001, 0, Edx, self.e1_edx),
            (0x8000_0008, 0, Ebx, self.e8_ebx),
            (0x8000_0021, 0, Eax, self.e21_eax),
        ];
        let named = words.map(|(leaf, subleaf, register, bits)| names::of(Word { leaf, subleaf, register }, bits));
        named.into_iter().flatten().collect()
    }

    fn of_host(host: HostCpuid) -> Self {
        let basic = host(0, 0)[0];
        let extended = host(0x8000_0000, 0)[0];
        let at = |leaf: u32, subleaf| {
            let max = if leaf >= 0x8000_0000 { extended } else { basic };
            if leaf <= max { host(leaf, subleaf) } else { [0; 4] }
        };
        let ([_, _, l1_ecx, l1_edx], [subleaves, l7_ebx, l7_ecx, l7_edx]) = (at(1, 0), at(7, 0));
        let [_, _, e1_ecx, e1_edx] = at(0x8000_0001, 0);
        Self {
            l1_ecx,
            l1_edx,
            l7_ebx,
            l7_ecx,
            l7_edx,
            l7_1_eax: if subleaves >= 1 { at(7, 1)[0] } else { 0 },
            xsave: at(0xd, 1)[0],
            e1_ecx,
            e1_edx,
            e8_ebx: at(0x8000_0008, 0)[1],
            e21_eax: at(0x8000_0021, 0)[0],
        }
    }

    pub fn has_xsave(&self) -> bool {
        self.l1_ecx & l1_ecx::XSAVE != 0
    }

    pub fn has_avx(&self) -> bool {
        self.l1_ecx & l1_ecx::AVX != 0
    }

    pub fn has_avx512(&self) -> bool {
        self.l7_ebx & l7_ebx::AVX512F != 0
    }
}

/// What a guest with this model gets on this host.
pub(super) fn features(model: CpuModel, host: HostCpuid) -> Features {
    let wanted = model_features(model, Vendor::of(host(0, 0)));
    consistent(wanted.and(Features::of_host(host).or(EMULATED)))
}

/// The features that `model` promises and this host lacks, by name; empty if the host can run it. `host` is always
/// possible.
pub fn unsupported(model: CpuModel, host: HostCpuid) -> Vec<String> {
    let Some(level) = level(model) else { return Vec::new() };
    let missing = level.without(Features::of_host(host).or(EMULATED));
    // Without the others of a level a guest can be: those are for speed, or one vendor's.
    let told =
        Features { l1_ecx: missing.l1_ecx, l7_ebx: missing.l7_ebx, e1_ecx: missing.e1_ecx, ..Features::default() };
    told.names()
}

/// The features that a processor with this table has and that no guest of this host can be given, by name: where there
/// are any, its machine cannot go on here. What the topology says is not among them.
pub fn lacking(table: &[CpuidEntry], host: HostCpuid) -> Vec<String> {
    let mut has = Features::of_host(&|leaf, subleaf| lookup(table, leaf, subleaf));
    has.l1_edx &= !l1_edx::HTT;
    has.e1_edx &= !l1_edx::REPEATED;
    has.without(OFFERED.and(Features::of_host(host).or(EMULATED))).names()
}

fn model_features(model: CpuModel, vendor: Vendor) -> Features {
    let offered = match vendor {
        Vendor::Intel => OFFERED.without(AMD_ONLY),
        Vendor::Amd => OFFERED,
    };
    match level(model) {
        Some(level) => offered.and(level.or(BASELINE).or(EMULATED)),
        None => offered,
    }
}

/// Drops what makes no sense without something else that is missing.
fn consistent(mut f: Features) -> Features {
    use {l1_ecx as c1, l7_ebx as b7, l7_ecx as c7};
    if !f.has_xsave() {
        f.l1_ecx &= !(c1::AVX | c1::FMA | c1::F16C);
        f.xsave = 0;
    }
    if !f.has_avx() {
        f.l1_ecx &= !(c1::FMA | c1::F16C);
        f.l7_ebx &= !(b7::AVX2 | b7::AVX512);
        f.l7_ecx &= !(c7::VAES | c7::VPCLMULQDQ);
        f.l7_1_eax &= !l7_1_eax::AVX_VNNI;
    }
    if !f.has_avx512() {
        f.l7_ebx &= !b7::AVX512;
        f.l7_ecx &= !c7::AVX512;
        f.l7_1_eax &= !l7_1_eax::AVX512_BF16;
    }
    f
}

/// What the levels of the psABI promise beyond [`BASELINE`], with the later flags that every processor of the level's
/// generation has on both vendors' side (v3: Haswell and Zen; v4: Skylake-SP and Zen 4), or on AMD's, where only those have
/// such a flag.
fn level(model: CpuModel) -> Option<Features> {
    let v2 = Features {
        l1_ecx: l1_ecx::SSE3 | l1_ecx::SSSE3 | l1_ecx::CX16 | l1_ecx::SSE4_1 | l1_ecx::SSE4_2 | l1_ecx::POPCNT,
        e1_ecx: e1_ecx::LAHF_LM,
        e1_edx: e1_edx::RDTSCP,
        ..Features::default()
    };
    let v3 = v2.or(Features {
        l1_ecx: l1_ecx::PCLMULQDQ
            | l1_ecx::FMA
            | l1_ecx::MOVBE
            | l1_ecx::AES
            | l1_ecx::XSAVE
            | l1_ecx::AVX
            | l1_ecx::F16C
            | l1_ecx::RDRAND,
        l7_ebx: l7_ebx::FSGSBASE | l7_ebx::BMI1 | l7_ebx::AVX2 | l7_ebx::SMEP | l7_ebx::BMI2,
        xsave: xsave::XSAVEOPT,
        e1_ecx: e1_ecx::ABM,
        e1_edx: e1_edx::PDPE1GB,
        // Without it Linux clears the x87's registers at each switch of threads, before it loads them.
        e8_ebx: e8_ebx::XSAVEERPTR,
        ..Features::default()
    });
    let v4 = v3.or(Features {
        l7_ebx: l7_ebx::ERMS
            | l7_ebx::AVX512F
            | l7_ebx::AVX512DQ
            | l7_ebx::RDSEED
            | l7_ebx::ADX
            | l7_ebx::SMAP
            | l7_ebx::CLFLUSHOPT
            | l7_ebx::CLWB
            | l7_ebx::AVX512CD
            | l7_ebx::AVX512BW
            | l7_ebx::AVX512VL,
        xsave: xsave::XSAVEC | xsave::XGETBV1,
        e1_ecx: e1_ecx::PREFETCHW,
        ..Features::default()
    });
    match model {
        CpuModel::Host => None,
        CpuModel::V2 => Some(v2),
        CpuModel::V3 => Some(v3),
        CpuModel::V4 => Some(v4),
    }
}

/// The first x86-64 processors: in every model.
const BASELINE: Features = Features {
    l1_ecx: 0,
    l1_edx: l1_edx::BASELINE,
    l7_ebx: 0,
    l7_ecx: 0,
    l7_edx: 0,
    l7_1_eax: 0,
    xsave: 0,
    e1_ecx: e1_ecx::CMP_LEGACY | e1_ecx::TOPOEXT,
    e1_edx: e1_edx::SYSCALL | e1_edx::NX | e1_edx::LM,
    e8_ebx: 0,
    e21_eax: 0,
};

/// What the engines provide whatever the host has. (Not VME, for which KVM needs the processor's: QEMU's TCG has none.)
const EMULATED: Features = Features {
    l1_ecx: l1_ecx::X2APIC | l1_ecx::TSC_DEADLINE | l1_ecx::HYPERVISOR,
    l1_edx: l1_edx::BASELINE & !l1_edx::VME,
    l7_ebx: l7_ebx::TSC_ADJUST,
    l7_ecx: 0,
    l7_edx: 0,
    l7_1_eax: 0,
    xsave: 0,
    e1_ecx: e1_ecx::CMP_LEGACY | e1_ecx::TOPOEXT,
    e1_edx: e1_edx::SYSCALL | e1_edx::NX | e1_edx::LM,
    e8_ebx: 0,
    e21_eax: 0,
};

/// What both engines can provide. Left out beside what is too new to have been looked at: virtualization, MONITOR, TSX,
/// protection keys, LA57, CET, performance counters, XSAVES, AMD's 3DNow!, XOP, FMA4, LWP and TBM.
const OFFERED: Features = Features {
    l1_ecx: l1_ecx::SSE3
        | l1_ecx::PCLMULQDQ
        | l1_ecx::SSSE3
        | l1_ecx::FMA
        | l1_ecx::CX16
        | if PCID { l1_ecx::PCID } else { 0 }
        | l1_ecx::SSE4_1
        | l1_ecx::SSE4_2
        | l1_ecx::X2APIC
        | l1_ecx::MOVBE
        | l1_ecx::POPCNT
        | l1_ecx::TSC_DEADLINE
        | l1_ecx::AES
        | l1_ecx::XSAVE
        | l1_ecx::AVX
        | l1_ecx::F16C
        | l1_ecx::RDRAND
        | l1_ecx::HYPERVISOR,
    l1_edx: l1_edx::BASELINE,
    l7_ebx: l7_ebx::FSGSBASE
        | l7_ebx::TSC_ADJUST
        | l7_ebx::BMI1
        | l7_ebx::AVX2
        | l7_ebx::SMEP
        | l7_ebx::BMI2
        | l7_ebx::ERMS
        | if PCID { l7_ebx::INVPCID } else { 0 }
        | l7_ebx::RDSEED
        | l7_ebx::ADX
        | l7_ebx::SMAP
        | l7_ebx::CLFLUSHOPT
        | l7_ebx::CLWB
        | l7_ebx::SHA
        | l7_ebx::AVX512,
    l7_ecx: l7_ecx::UMIP | l7_ecx::GFNI | l7_ecx::VAES | l7_ecx::VPCLMULQDQ | l7_ecx::RDPID | l7_ecx::AVX512,
    l7_edx: l7_edx::FSRM,
    l7_1_eax: l7_1_eax::AVX_VNNI | l7_1_eax::AVX512_BF16,
    xsave: xsave::XSAVEOPT | xsave::XSAVEC | xsave::XGETBV1,
    e1_ecx: e1_ecx::LAHF_LM
        | e1_ecx::CMP_LEGACY
        | e1_ecx::ABM
        | e1_ecx::SSE4A
        | e1_ecx::MISALIGNSSE
        | e1_ecx::PREFETCHW
        | e1_ecx::OSVW
        | e1_ecx::TOPOEXT,
    e1_edx: e1_edx::SYSCALL | e1_edx::NX | e1_edx::MMXEXT | e1_edx::PDPE1GB | e1_edx::RDTSCP | e1_edx::LM,
    e8_ebx: e8_ebx::XSAVEERPTR | e8_ebx::SSB_NO | e8_ebx::BTC_NO,
    e21_eax: e21_eax::LFENCE_SERIALIZING | e21_eax::SRSO_NO,
};

/// What only AMD's processors have.
const AMD_ONLY: Features = Features {
    l1_ecx: 0,
    l1_edx: 0,
    l7_ebx: 0,
    l7_ecx: 0,
    l7_edx: 0,
    l7_1_eax: 0,
    xsave: 0,
    e1_ecx: e1_ecx::CMP_LEGACY | e1_ecx::SSE4A | e1_ecx::MISALIGNSSE | e1_ecx::OSVW | e1_ecx::TOPOEXT,
    e1_edx: e1_edx::MMXEXT,
    e8_ebx: !0,
    e21_eax: !0,
};

/// Leaf 1, ECX (SDM vol. 2A, CPUID, table 3-10).
pub(super) mod l1_ecx {
    pub const SSE3: u32 = 1 << 0;
    pub const PCLMULQDQ: u32 = 1 << 1;
    pub const SSSE3: u32 = 1 << 9;
    pub const FMA: u32 = 1 << 12;
    pub const CX16: u32 = 1 << 13;
    pub const PCID: u32 = 1 << 17;
    pub const SSE4_1: u32 = 1 << 19;
    pub const SSE4_2: u32 = 1 << 20;
    pub const X2APIC: u32 = 1 << 21;
    pub const MOVBE: u32 = 1 << 22;
    pub const POPCNT: u32 = 1 << 23;
    pub const TSC_DEADLINE: u32 = 1 << 24;
    pub const AES: u32 = 1 << 25;
    pub const XSAVE: u32 = 1 << 26;
    pub const AVX: u32 = 1 << 28;
    pub const F16C: u32 = 1 << 29;
    pub const RDRAND: u32 = 1 << 30;
    pub const HYPERVISOR: u32 = 1 << 31;
}

/// Leaf 1, EDX (SDM vol. 2A, CPUID, table 3-11).
pub(super) mod l1_edx {
    pub const VME: u32 = 1 << 1;
    pub const HTT: u32 = 1 << 28;
    /// FPU, VME, DE, PSE, TSC, MSR, PAE, MCE, CX8, APIC, SEP, MTRR, PGE, MCA, CMOV, PAT, PSE36, CLFSH, MMX, FXSR, SSE,
    /// SSE2.
    pub const BASELINE: u32 = 0x078b_fbff;
    /// Those that leaf 0x8000_0001 repeats on AMD's processors.
    pub const REPEATED: u32 = 0x0183_f3ff;
}

/// Leaf 7, EBX.
pub(super) mod l7_ebx {
    pub const FSGSBASE: u32 = 1 << 0;
    pub const TSC_ADJUST: u32 = 1 << 1;
    pub const BMI1: u32 = 1 << 3;
    pub const AVX2: u32 = 1 << 5;
    pub const SMEP: u32 = 1 << 7;
    pub const BMI2: u32 = 1 << 8;
    pub const ERMS: u32 = 1 << 9;
    pub const INVPCID: u32 = 1 << 10;
    pub const AVX512F: u32 = 1 << 16;
    pub const AVX512DQ: u32 = 1 << 17;
    pub const RDSEED: u32 = 1 << 18;
    pub const ADX: u32 = 1 << 19;
    pub const SMAP: u32 = 1 << 20;
    pub const AVX512_IFMA: u32 = 1 << 21;
    pub const CLFLUSHOPT: u32 = 1 << 23;
    pub const CLWB: u32 = 1 << 24;
    pub const AVX512CD: u32 = 1 << 28;
    pub const SHA: u32 = 1 << 29;
    pub const AVX512BW: u32 = 1 << 30;
    pub const AVX512VL: u32 = 1 << 31;
    /// All that depend on AVX512F.
    pub const AVX512: u32 = AVX512F | AVX512DQ | AVX512_IFMA | AVX512CD | AVX512BW | AVX512VL;
}

/// Leaf 7, ECX.
pub(super) mod l7_ecx {
    pub const AVX512_VBMI: u32 = 1 << 1;
    pub const UMIP: u32 = 1 << 2;
    pub const AVX512_VBMI2: u32 = 1 << 6;
    pub const GFNI: u32 = 1 << 8;
    pub const VAES: u32 = 1 << 9;
    pub const VPCLMULQDQ: u32 = 1 << 10;
    pub const AVX512_VNNI: u32 = 1 << 11;
    pub const AVX512_BITALG: u32 = 1 << 12;
    pub const AVX512_VPOPCNTDQ: u32 = 1 << 14;
    pub const RDPID: u32 = 1 << 22;
    /// All that depend on AVX512F.
    pub const AVX512: u32 = AVX512_VBMI | AVX512_VBMI2 | AVX512_VNNI | AVX512_BITALG | AVX512_VPOPCNTDQ;
}

/// Leaf 7, EDX.
pub(super) mod l7_edx {
    pub const FSRM: u32 = 1 << 4;
}

/// Leaf 7, sub-leaf 1, EAX.
pub(super) mod l7_1_eax {
    pub const AVX_VNNI: u32 = 1 << 4;
    pub const AVX512_BF16: u32 = 1 << 5;
}

/// Leaf 0xD, sub-leaf 1, EAX.
pub(super) mod xsave {
    pub const XSAVEOPT: u32 = 1 << 0;
    pub const XSAVEC: u32 = 1 << 1;
    pub const XGETBV1: u32 = 1 << 2;
}

/// Leaf 0x8000_0001, ECX (APM vol. 3, E.4.2).
pub(super) mod e1_ecx {
    pub const LAHF_LM: u32 = 1 << 0;
    pub const CMP_LEGACY: u32 = 1 << 1;
    pub const ABM: u32 = 1 << 5;
    pub const SSE4A: u32 = 1 << 6;
    pub const MISALIGNSSE: u32 = 1 << 7;
    pub const PREFETCHW: u32 = 1 << 8;
    pub const OSVW: u32 = 1 << 9;
    pub const TOPOEXT: u32 = 1 << 22;
}

/// Leaf 0x8000_0001, EDX.
pub(super) mod e1_edx {
    pub const SYSCALL: u32 = 1 << 11;
    pub const NX: u32 = 1 << 20;
    pub const MMXEXT: u32 = 1 << 22;
    pub const PDPE1GB: u32 = 1 << 26;
    pub const RDTSCP: u32 = 1 << 27;
    pub const LM: u32 = 1 << 29;
}

/// Leaf 0x8000_0008, EBX (APM vol. 3, E.4.7).
pub(super) mod e8_ebx {
    pub const XSAVEERPTR: u32 = 1 << 2;
    pub const SSB_NO: u32 = 1 << 26;
    pub const BTC_NO: u32 = 1 << 29;
}

/// Leaf 0x8000_0021, EAX.
pub(super) mod e21_eax {
    pub const LFENCE_SERIALIZING: u32 = 1 << 2;
    pub const SRSO_NO: u32 = 1 << 29;
}

#[cfg(test)]
mod tests {
    use super::{super::leaves, *};

    fn nothing(_: u32, _: u32) -> [u32; 4] {
        [0; 4]
    }

    #[test]
    fn a_host_without_a_level_is_told_what_it_lacks() {
        let missing = unsupported(CpuModel::V3, &nothing);
        for name in ["avx2", "bmi2", "fma", "movbe", "lzcnt", "sse4.2"] {
            assert!(missing.iter().any(|m| m == name), "{missing:?}");
        }
        assert!(!missing.contains(&"avx512f".into()));
        assert!(unsupported(CpuModel::V4, &nothing).contains(&"avx512f".into()));
        assert!(unsupported(CpuModel::Host, &nothing).is_empty());
    }

    #[test]
    fn what_a_saved_processor_has_and_a_host_has_not_is_named() {
        let full = |leaf: u32, _| match leaf {
            0 => [0xd, 0x6874_7541, 0x444d_4163, 0x6974_6e65],
            7 => [1, !0, !0, !0],
            0xd => [0x100, 0x240, 0, 0],
            0x8000_0000 => [0x8000_0021, 0, 0, 0],
            _ => [!0; 4],
        };
        let table = leaves(CpuModel::Host, &full, 0, 2, 1_000_000);
        assert!(lacking(&table, &full).is_empty());
        let lesser = |leaf, subleaf| match leaf {
            7 => [1, !(l7_ebx::SHA | l7_ebx::AVX512F), !l7_ecx::VAES, !0],
            0x8000_0008 => [!0, !e8_ebx::BTC_NO, !0, !0],
            _ => full(leaf, subleaf),
        };
        assert_eq!(lacking(&table, &lesser), ["avx512f", "sha_ni", "vaes", "btc_no"]);
        // One of a lower level asks for none of these.
        assert!(lacking(&leaves(CpuModel::V3, &full, 0, 2, 1_000_000), &lesser).is_empty());
        // What the engines provide themselves no host lacks.
        assert!(lacking(&leaves(CpuModel::V2, &full, 0, 2, 1_000_000), &nothing).iter().all(|name| name != "x2apic"));
    }

    #[test]
    fn nothing_depends_on_what_is_missing() {
        // A host with AVX-512 flags whose XSAVE has been switched off.
        let host = |leaf, _| match leaf {
            0 => [7, 0, 0, 0],
            1 => [0, 0, !l1_ecx::XSAVE, !0],
            7 => [1, !0, !0, !0],
            _ => [0; 4],
        };
        let f = features(CpuModel::Host, &host);
        assert!(!f.has_avx() && !f.has_avx512());
        assert_eq!(f.l7_ebx & (l7_ebx::AVX2 | l7_ebx::AVX512), 0);
        assert_eq!(f.l7_ecx & (l7_ecx::AVX512 | l7_ecx::VAES), 0);
        assert_ne!(f.l7_ecx & l7_ecx::GFNI, 0);
    }
}
