//! What is said of a machine's processors before an engine runs them: CPUID and TSC.

use std::arch::x86_64::__cpuid_count;

use purlin_arch::x86_64::{
    cpuid::{CpuModel, CpuidEntry, leaves, unsupported},
    msr,
    state::VcpuState,
};

use crate::config::MachineConfig;

/// The CPUID leaves of every processor, by number; `tsc_khz` is 0 where the engine does not tell.
pub fn cpuid(config: &MachineConfig, tsc_khz: u32) -> Vec<Vec<CpuidEntry>> {
    (0..config.cpus).map(|id| leaves(config.cpu_model, &host, id, config.cpus, tsc_khz)).collect()
}

fn host(leaf: u32, subleaf: u32) -> [u32; 4] {
    let r = __cpuid_count(leaf, subleaf);
    [r.eax, r.ebx, r.ecx, r.edx]
}

/// The processor that a guest gets unless told otherwise: a named one, so that the machine can move to other hosts; the
/// best up to x86-64-v3 that this host has.
pub fn default_model() -> CpuModel {
    [CpuModel::V3, CpuModel::V2].into_iter().find(|m| missing(*m).is_empty()).unwrap_or(CpuModel::Host)
}

/// What this host lacks for `model`, by the names of /proc/cpuinfo.
pub fn missing(model: CpuModel) -> Vec<String> {
    unsupported(model, &host)
}

/// Makes the TSCs, read one after the other while the machine stood still, those of one moment: all processors of a
/// machine count alike, but for what the guest itself has added (IA32_TSC_ADJUST, SDM vol. 3B 18.17.3).
pub fn align_tsc(vcpus: &mut [VcpuState]) {
    let adjust = |v: &VcpuState| v.msrs.iter().find(|m| m.index == msr::TSC_ADJUST).map_or(0, |m| m.value);
    let latest = vcpus.iter().map(|v| v.tsc.wrapping_sub(adjust(v))).max().unwrap_or(0);
    for vcpu in vcpus {
        vcpu.tsc = latest.wrapping_add(adjust(vcpu));
    }
}

#[cfg(test)]
mod tests {
    use purlin_arch::x86_64::state::Msr;

    use super::*;

    #[test]
    fn tscs_are_those_of_one_moment_but_for_the_guests_own_offsets() {
        let vcpu = |tsc, adjust| VcpuState {
            tsc,
            msrs: vec![Msr { index: msr::TSC_ADJUST, value: adjust }],
            ..VcpuState::default()
        };
        let mut vcpus =
            [vcpu(1_000, 0), vcpu(1_250, 0), vcpu(1_100 + 5, 5), VcpuState { tsc: 7, ..Default::default() }];
        align_tsc(&mut vcpus);
        assert_eq!(vcpus.map(|v| v.tsc), [1_250, 1_250, 1_255, 1_250]);
    }
}
