//! Model-specific registers.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use purlin_arch::x86_64::{
    msr,
    state::{Msr, VcpuState},
};
use purlin_engine::EngineError;

use super::{Abilities, corrupt};
use crate::host_error;

/// The value of MSR `index` in a list.
pub(super) fn value(msrs: &[Msr], index: u32) -> Option<u64> {
    msrs.iter().find(|m| m.index == index).map(|m| m.value)
}

/// All that are saved, the TSC among them. One that this vCPU lacks is left out.
pub(super) fn get(fd: &VcpuFd, abilities: &Abilities) -> Result<Vec<Msr>, EngineError> {
    let mut found = Vec::with_capacity(abilities.msrs.len());
    let mut wanted = abilities.msrs.as_slice();
    while !wanted.is_empty() {
        let entries: Vec<_> = wanted.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        let mut list = to_list(&entries)?;
        // KVM stops at the first that it refuses and says how many it did.
        let done = fd.get_msrs(&mut list).map_err(host_error("KVM_GET_MSRS"))?;
        found.extend(list.as_slice()[..done].iter().map(|m| Msr { index: m.index, value: m.data }));
        wanted = wanted.get(done + 1..).unwrap_or_default();
    }
    Ok(found)
}

/// Sets those of a saved vCPU. One that this host's KVM refuses is an error unless it holds nothing.
pub(super) fn set(fd: &VcpuFd, abilities: &Abilities, saved: &VcpuState) -> Result<(), EngineError> {
    let entries = in_order(saved);
    let mut rest = entries.as_slice();
    while !rest.is_empty() {
        let done = fd.set_msrs(&to_list(rest)?).map_err(host_error("KVM_SET_MSRS"))?;
        if let Some(refused) = rest.get(done)
            && refused.data != 0
        {
            let why = if abilities.msrs.contains(&refused.index) { "refuses the value of" } else { "does not have" };
            return Err(corrupt(format!("KVM {why} MSR {:#x} (value {:#x})", refused.index, refused.data)));
        }
        rest = rest.get(done + 1..).unwrap_or_default();
    }
    Ok(())
}

/// The TSC before all that counts in it, TSC-deadline last. IA32_APIC_BASE was set with the segments.
fn in_order(saved: &VcpuState) -> Vec<kvm_msr_entry> {
    let tsc = Msr { index: msr::TSC, value: saved.tsc };
    let listed = |last: bool| {
        let wanted = move |m: &&Msr| (m.index == msr::TSC_DEADLINE) == last;
        saved.msrs.iter().filter(|m| !matches!(m.index, msr::TSC | msr::APIC_BASE)).filter(wanted)
    };
    std::iter::once(&tsc)
        .chain(listed(false))
        .chain(listed(true))
        .map(|m| kvm_msr_entry { index: m.index, data: m.value, ..Default::default() })
        .collect()
}

fn to_list(entries: &[kvm_msr_entry]) -> Result<Msrs, EngineError> {
    Msrs::from_entries(entries).map_err(|_| corrupt(format!("{} MSRs are more than KVM takes", entries.len())))
}

#[cfg(test)]
mod tests {
    use purlin_arch::x86_64::{
        msr,
        state::{Msr, VcpuState},
    };

    use super::in_order;

    #[test]
    fn the_tsc_comes_first_and_its_deadline_last() {
        let list = [msr::TSC_DEADLINE, msr::APIC_BASE, msr::TSC_ADJUST, msr::STAR];
        let msrs = list.iter().map(|&index| Msr { index, value: 7 }).collect();
        let saved = VcpuState { msrs, tsc: 1000, ..Default::default() };
        let order: Vec<_> = in_order(&saved).iter().map(|m| (m.index, m.data)).collect();
        assert_eq!(order, [(msr::TSC, 1000), (msr::TSC_ADJUST, 7), (msr::STAR, 7), (msr::TSC_DEADLINE, 7)]);
    }
}
