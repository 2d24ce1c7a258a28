//! What of a vCPU's state this host's KVM can get and set.

use kvm_bindings::KVM_CAP_SREGS2;
use kvm_ioctls::Kvm;
use purlin_arch::x86_64::msr;
use purlin_engine::EngineError;

use crate::host_error;

/// What of a vCPU's state this host's KVM can get and set.
#[derive(Debug)]
pub(crate) struct Abilities {
    /// KVM_GET_SREGS2 (Linux 5.14): the PAE page-directory pointers are state of their own.
    pub(crate) sregs2: bool,
    /// The MSRs that are saved: those of [`msr::SAVED`], the TSC and the MTRRs that KVM has.
    pub(crate) msrs: Vec<u32>,
}

/// IA32_MTRR_PHYSBASE0 to IA32_MTRR_PHYSMASK7 (SDM vol. 4): eight variable ranges, as KVM has them.
const MTRR_VARIABLE: std::ops::RangeInclusive<u32> = 0x200..=0x20f;

/// IA32_MTRR_FIX64K_00000, FIX16K_80000 and _A0000, FIX4K_C0000 to _F8000.
const MTRR_FIXED: [u32; 11] = [0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f];

impl Abilities {
    pub(crate) fn of(kvm: &Kvm) -> Result<Self, EngineError> {
        let list = kvm.get_msr_index_list().map_err(host_error("KVM_GET_MSR_INDEX_LIST"))?;
        let known = list.as_slice();
        // KVM has MTRRs always, but lists them since Linux 6.4 only.
        let mtrrs = MTRR_VARIABLE.chain(MTRR_FIXED).chain([msr::MTRR_DEF_TYPE]);
        let others = msr::SAVED.iter().copied().filter(|m| known.contains(m) && *m != msr::MTRR_DEF_TYPE);
        // The APIC base is not in the list either: it is part of KVM_GET_SREGS too.
        let always = [msr::TSC, msr::APIC_BASE];
        let mut msrs: Vec<u32> = always.into_iter().chain(others).chain(mtrrs).collect();
        let mut seen = std::collections::HashSet::new();
        msrs.retain(|m| seen.insert(*m));
        Ok(Self { sregs2: kvm.check_extension_raw(u64::from(KVM_CAP_SREGS2)) > 0, msrs })
    }
}
