//! One vCPU without a machine, for tests that compare it with a processor: its state is open, and exceptions are
//! returned instead of being delivered.

use std::sync::Arc;

use purlin_arch::x86_64::cpuid::CpuidEntry;
use purlin_engine::{EngineError, Kick, Vm, VmConfig, memory::GuestRam};

use crate::{
    cpu::Cpu,
    engine::{TranslatedVm, TranslatorEngine},
    exception::Exception,
    vcpu::TranslatedVcpu,
};

/// The vCPU.
pub struct Subject {
    vcpu: TranslatedVcpu,
    vm: TranslatedVm,
}

impl Subject {
    /// A processor in the state after power-up, with this memory.
    pub fn new(memory: Arc<GuestRam>, cpuid: Vec<CpuidEntry>) -> Result<Self, EngineError> {
        let vm = TranslatorEngine::new()?.create(VmConfig { memory, cpuid: vec![cpuid] })?;
        let vcpu = vm.take(0)?;
        Ok(Self { vcpu, vm })
    }

    /// Its state.
    pub fn cpu(&mut self) -> &mut Cpu {
        self.vcpu.state()
    }

    /// Makes a run that goes on for ever return.
    pub fn kicker(&self) -> Arc<dyn Kick> {
        self.vm.kicker(0)
    }

    /// `len` bytes of memory at a guest physical address were written from outside.
    pub fn wrote_memory(&self, address: u64, len: u64) {
        self.vm.shared.ram.written_by_others(&self.vm.shared.code, address, len);
    }

    /// The next run begins as one that has not met a vector instruction yet.
    pub fn forget_vectors(&mut self) {
        self.vcpu.forget_vectors();
    }

    /// From here on what is translated is translated for speed, or for what has not been executed yet.
    pub fn all_hot(&mut self, all: bool) {
        self.vm.shared.code.set_all_hot(all);
    }

    /// From here on code below 4 GiB is translated like that above, or is not.
    pub fn low_movable(&mut self, movable: bool) {
        self.vm.shared.low_movable.store(movable, std::sync::atomic::Ordering::Relaxed);
    }

    /// Runs blocks until an exception. `None` if it was kicked.
    pub fn run(&mut self) -> Result<Option<Exception>, EngineError> {
        self.vcpu.run_to_exception(false, &mut |_| true)
    }

    /// Runs one instruction at a time until an exception. `before` is called before each (an instruction may come
    /// more than once, where it had to be looked at again); the run ends with `None` when it answers false.
    pub fn step(&mut self, before: &mut dyn FnMut(&Cpu) -> bool) -> Result<Option<Exception>, EngineError> {
        self.vcpu.run_to_exception(true, before)
    }
}
