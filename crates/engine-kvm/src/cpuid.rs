//! The CPUID leaves that a vCPU is given: those the machine asked for, less what this host's KVM cannot do.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;
use purlin_arch::x86_64::cpuid::{
    CpuidEntry,
    Register::{self, Eax, Ebx, Ecx, Edx},
    Word, names_of,
};
use purlin_engine::EngineError;

use crate::host_error;

/// A result whose bits are features: one that KVM does not report as supported is withheld.
struct Features {
    leaf: u32,
    subleaf: u32,
    register: Register,
    /// Bits that are the machine's to say: topology, or what KVM computes itself or leaves out of its report.
    machines: u32,
}

const fn features(leaf: u32, subleaf: u32, register: Register, machines: u32) -> Features {
    Features { leaf, subleaf, register, machines }
}

/// Bit 3 KVM_FEATURE_CLOCKSOURCE2 (the MSRs 0x4b564d00 and 0x4b564d01) and bit 24
/// KVM_FEATURE_CLOCKSOURCE_STABLE_BIT: all of KVM's paravirtual features that both engines implement.
const PV_FEATURES: u32 = 1 << 3 | 1 << 24;

/// Leaf of KVM's signature, and the one that lists its paravirtual features.
const PV_FEATURES_LEAF: u32 = 0x4000_0001;

/// The architectural performance counters, which no engine saves.
const PERFMON_LEAF: u32 = 0xa;

/// The feature words (SDM vol. 2A CPUID; AMD APM vol. 3 appendix E).
const FEATURES: &[Features] = &[
    // X2APIC, TSC-deadline (both by the in-kernel local APIC), OSXSAVE (follows CR4), hypervisor.
    features(1, 0, Ecx, 1 << 21 | 1 << 24 | 1 << 27 | 1 << 31),
    // APIC (follows IA32_APIC_BASE), HTT (topology).
    features(1, 0, Edx, 1 << 9 | 1 << 28),
    features(7, 0, Ebx, 0),
    // OSPKE follows CR4.
    features(7, 0, Ecx, 1 << 4),
    features(7, 0, Edx, 0),
    features(7, 1, Eax, 0),
    features(7, 1, Edx, 0),
    features(7, 2, Edx, 0),
    features(0xd, 0, Eax, 0),
    features(0xd, 0, Edx, 0),
    features(0xd, 1, Eax, 0),
    features(0xd, 1, Ecx, 0),
    features(0xd, 1, Edx, 0),
    // CMP_LEGACY and TOPOEXT (topology); the bits that leaf 1 has too follow it.
    features(0x8000_0001, 0, Ecx, 1 << 1 | 1 << 22),
    features(0x8000_0001, 0, Edx, 1 << 9),
    features(0x8000_0007, 0, Edx, 0),
    features(0x8000_0008, 0, Ebx, 0),
    features(0x8000_000a, 0, Edx, 0),
    features(0x8000_0021, 0, Eax, 0),
];

/// What this host's KVM can offer to a guest.
pub(crate) fn supported(kvm: &Kvm) -> Result<Vec<CpuidEntry>, EngineError> {
    let list = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(host_error("KVM_GET_SUPPORTED_CPUID"))?;
    Ok(list.as_slice().iter().map(from_kvm).collect())
}

/// `wanted`, less the features that are not `supported`.
pub(crate) fn intersect(wanted: &[CpuidEntry], supported: &[CpuidEntry]) -> Vec<CpuidEntry> {
    let xcr0 = find(supported, 0xd, 0).map_or(0, |e| u64::from(e.edx) << 32 | u64::from(e.eax));
    wanted
        .iter()
        .filter(|entry| entry.leaf != 0xd || is_xsave_component_offered(entry, xcr0))
        .map(|entry| restrict(entry, supported))
        .collect()
}

/// Sub-leaves 2 and up of leaf 0xD describe one component of the XSAVE area each.
fn is_xsave_component_offered(entry: &CpuidEntry, xcr0: u64) -> bool {
    match entry.subleaf.unwrap_or(0) {
        0 | 1 => true,
        component @ 2..64 => xcr0 >> component & 1 != 0,
        _ => false,
    }
}

fn restrict(wanted: &CpuidEntry, supported: &[CpuidEntry]) -> CpuidEntry {
    let mut entry = *wanted;
    let subleaf = entry.subleaf.unwrap_or(0);
    if entry.leaf == PERFMON_LEAF {
        return CpuidEntry { eax: 0, ebx: 0, ecx: 0, edx: 0, ..entry };
    }
    if entry.leaf == PV_FEATURES_LEAF {
        let offered = find(supported, PV_FEATURES_LEAF, 0).map_or(0, |e| e.eax);
        return CpuidEntry { eax: entry.eax & offered & PV_FEATURES, ebx: 0, ecx: 0, edx: 0, ..entry };
    }
    for word in FEATURES.iter().filter(|w| w.leaf == wanted.leaf && w.subleaf == subleaf) {
        let offered = find(supported, word.leaf, word.subleaf).map_or(0, |mut e| *register(&mut e, word.register));
        *register(&mut entry, word.register) &= offered | word.machines;
    }
    entry
}

fn find(entries: &[CpuidEntry], leaf: u32, subleaf: u32) -> Option<CpuidEntry> {
    entries.iter().find(|e| e.leaf == leaf && e.subleaf.unwrap_or(0) == subleaf).copied()
}

fn register(entry: &mut CpuidEntry, register: Register) -> &mut u32 {
    match register {
        Eax => &mut entry.eax,
        Ebx => &mut entry.ebx,
        Ecx => &mut entry.ecx,
        Edx => &mut entry.edx,
    }
}

/// The leaves as KVM_SET_CPUID2 takes them.
pub(crate) fn to_kvm(entries: &[CpuidEntry]) -> Result<CpuId, EngineError> {
    let entries: Vec<_> = entries
        .iter()
        .map(|e| kvm_cpuid_entry2 {
            function: e.leaf,
            index: e.subleaf.unwrap_or(0),
            flags: if e.subleaf.is_some() { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
            eax: e.eax,
            ebx: e.ebx,
            ecx: e.ecx,
            edx: e.edx,
            padding: [0; 3],
        })
        .collect();
    CpuId::from_entries(&entries)
        .map_err(|_| EngineError::Unavailable(format!("{} CPUID leaves are more than KVM takes", entries.len())))
}

fn from_kvm(entry: &kvm_cpuid_entry2) -> CpuidEntry {
    CpuidEntry {
        leaf: entry.function,
        subleaf: (entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0).then_some(entry.index),
        eax: entry.eax,
        ebx: entry.ebx,
        ecx: entry.ecx,
        edx: entry.edx,
    }
}

/// The features of `wanted` that are missing from `supported`, by name: a state with any cannot go on here.
pub(crate) fn missing(wanted: &[CpuidEntry], supported: &[CpuidEntry]) -> Vec<String> {
    let mut names = Vec::new();
    for entry in wanted.iter().filter(|e| e.leaf != PERFMON_LEAF) {
        let (mut wanted, mut given) = (*entry, restrict(entry, supported));
        for which in Register::ALL {
            let lost = *register(&mut wanted, which) & !*register(&mut given, which);
            let word = Word { leaf: entry.leaf, subleaf: entry.subleaf.unwrap_or(0), register: which };
            names.extend(names_of(word, lost));
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use purlin_arch::x86_64::cpuid::CpuidEntry;

    use super::{intersect, missing};

    fn entry(leaf: u32, subleaf: Option<u32>, [eax, ebx, ecx, edx]: [u32; 4]) -> CpuidEntry {
        CpuidEntry { leaf, subleaf, eax, ebx, ecx, edx }
    }

    #[test]
    fn features_are_intersected_and_the_rest_is_the_machines() {
        let supported = [entry(1, None, [0xa10f11, 0x800, 0x0000_2001, 0x078b_fbff])];
        // AES (ECX 25) is not supported; CMPXCHG16B (13) is; x2APIC, TSC-deadline and hypervisor are the machine's.
        let wanted = [entry(1, None, [0x0f_0000, 0x0102_0800, 0x8320_2001, 0x178b_fbff])];
        assert_eq!(
            intersect(&wanted, &supported),
            [entry(1, None, [0x0f_0000, 0x0102_0800, 0x8120_2001, 0x178b_fbff])]
        );
        assert_eq!(missing(&wanted, &supported), ["aes"]);
    }

    #[test]
    fn a_leaf_that_kvm_does_not_know_has_no_features() {
        let wanted = [entry(7, Some(0), [1, 0xffff, 0x10, 0xff]), entry(0x16, None, [2600, 0, 0, 0])];
        assert_eq!(intersect(&wanted, &[]), [entry(7, Some(0), [1, 0, 0x10, 0]), wanted[1]]);
    }

    #[test]
    fn xsave_components_go_with_xcr0() {
        let supported = [entry(0xd, Some(0), [7, 832, 832, 0])];
        let avx = entry(0xd, Some(2), [256, 576, 0, 0]);
        let opmask = entry(0xd, Some(5), [64, 1088, 0, 0]);
        let wanted = [entry(0xd, Some(0), [0xe7, 2688, 2688, 0]), avx, opmask];
        assert_eq!(intersect(&wanted, &supported), [entry(0xd, Some(0), [7, 2688, 2688, 0]), avx]);
    }

    #[test]
    fn of_kvms_own_features_only_the_clock_is_offered() {
        let signature = entry(0x4000_0000, None, [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d]);
        let supported = [entry(0x4000_0001, None, [0x0100_7efb, 0, 0, 0])];
        let wanted = [signature, entry(0x4000_0001, None, [!0, 1, 1, 1])];
        assert_eq!(intersect(&wanted, &supported), [signature, entry(0x4000_0001, None, [0x0100_0008, 0, 0, 0])]);
    }

    #[test]
    fn performance_counters_are_withheld_and_not_missed() {
        let wanted = [entry(0xa, None, [0x0730_0402, 0, 0, 0x603])];
        assert_eq!(intersect(&wanted, &wanted), [entry(0xa, None, [0; 4])]);
        assert!(missing(&wanted, &[]).is_empty());
    }
}
