//! The engine: /dev/kvm opened, and what its KVM can do.

use std::sync::Arc;

use kvm_ioctls::Kvm;
use purlin_arch::x86_64::cpuid::CpuidEntry;
use purlin_engine::{Engine, EngineError, Vm, VmConfig};

use crate::{NAME, cpuid, device, host_error, state::Abilities, vm::KvmVm};

/// The engine on /dev/kvm.
pub struct KvmEngine {
    kvm: Kvm,
    host: Arc<Host>,
    tsc_khz: u32,
}

/// What the host's KVM offers, shared by all that is made of it.
#[derive(Debug)]
pub(crate) struct Host {
    pub(crate) cpuid: Vec<CpuidEntry>,
    pub(crate) abilities: Abilities,
}

impl std::fmt::Debug for KvmEngine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KvmEngine").finish_non_exhaustive()
    }
}

impl KvmEngine {
    /// Opens /dev/kvm. Whether it can run kernels is [`crate::probe()`]'s to say.
    pub fn new() -> Result<Self, EngineError> {
        let kvm = device::open().map_err(|e| EngineError::Unavailable(format!("{e}. {}", e.advice())))?;
        Self::with(kvm)
    }

    /// The engine on a device that is already open.
    pub(crate) fn with(kvm: Kvm) -> Result<Self, EngineError> {
        let host = Host { cpuid: cpuid::supported(&kvm)?, abilities: Abilities::of(&kvm)? };
        let tsc_khz = tsc_khz(&kvm)?;
        Ok(Self { kvm, host: Arc::new(host), tsc_khz })
    }

    /// The CPUID leaves that this host's KVM can offer.
    #[must_use]
    pub fn supported_cpuid(&self) -> &[CpuidEntry] {
        &self.host.cpuid
    }

    /// How many vCPUs a VM can have.
    #[must_use]
    pub fn max_vcpus(&self) -> usize {
        self.kvm.get_max_vcpus()
    }
}

/// Frequency of a guest's TSC, which KVM tells of a vCPU only.
fn tsc_khz(kvm: &Kvm) -> Result<u32, EngineError> {
    let vm = kvm.create_vm().map_err(host_error("KVM_CREATE_VM"))?;
    let vcpu = vm.create_vcpu(0).map_err(host_error("KVM_CREATE_VCPU"))?;
    vcpu.get_tsc_khz().map_err(host_error("KVM_GET_TSC_KHZ"))
}

impl Engine for KvmEngine {
    fn name(&self) -> &'static str {
        NAME
    }

    fn tsc_khz(&self) -> u32 {
        self.tsc_khz
    }

    fn lacks(&self, cpuid: &[CpuidEntry]) -> Vec<String> {
        cpuid::missing(cpuid, &self.host.cpuid)
    }

    fn create_vm(&self, config: VmConfig) -> Result<Arc<dyn Vm>, EngineError> {
        if config.cpuid.len() > self.max_vcpus() {
            return Err(EngineError::Unavailable(format!(
                "this host's KVM runs {} vCPUs at most, {} were asked for",
                self.max_vcpus(),
                config.cpuid.len()
            )));
        }
        Ok(KvmVm::create(&self.kvm, self.host.clone(), config)?)
    }
}
