//! A vCPU: KVM_RUN, and what to do with each of its exits.
//!
//! [`KvmVcpu::run`] leaves the guest through [`KvmVcpu::settle`] only (unless the vCPU is beyond going on), so that
//! the vCPU is between two instructions, with nothing half done inside KVM, whenever its state can be saved.

use std::sync::Arc;

use kvm_ioctls::{VcpuExit, VcpuFd};
use purlin_arch::x86_64::{cpuid::CpuidEntry, state::VcpuState};
use purlin_engine::{After, Bus, EngineError, Exit, Vcpu};

use crate::{
    failure, host_error, ioctls,
    kick::{Kicker, PendingKick},
    state,
    vm::Shared,
};

const EINTR: i32 = 4;
const EAGAIN: i32 = 11;

/// One processor on KVM.
pub(crate) struct KvmVcpu {
    pub(crate) index: u32,
    pub(crate) fd: VcpuFd,
    pub(crate) cpuid: Vec<CpuidEntry>,
    pub(crate) vm: Arc<Shared>,
    kicker: Arc<Kicker>,
    /// The vCPU shut down and was not given a state since.
    pub(crate) shut_down: bool,
    /// `ready_for_interrupt_injection` says nothing yet about the state that the vCPU is in.
    stale: bool,
}

/// What KVM_RUN came back with, once dealt with.
enum Step {
    /// On with the guest.
    Continue,
    /// A bus write asked to leave the guest.
    Leave,
    /// KVM_RUN was interrupted, between two instructions.
    Interrupted,
    /// The vCPU shut down.
    Shutdown,
}

impl From<After> for Step {
    fn from(after: After) -> Self {
        match after {
            After::Continue => Self::Continue,
            After::Leave => Self::Leave,
        }
    }
}

impl KvmVcpu {
    pub(crate) fn new(index: u32, fd: VcpuFd, cpuid: Vec<CpuidEntry>, kicker: Arc<Kicker>, vm: Arc<Shared>) -> Self {
        Self { index, fd, cpuid, vm, kicker, shut_down: false, stale: true }
    }

    fn run_until_exit(&mut self, bus: &dyn Bus) -> Result<Exit, EngineError> {
        if self.stale {
            // KVM_RUN that does not enter the guest brings the flags up to date.
            self.kicker.page().set_immediate_exit();
            self.stale = false;
        }
        loop {
            if self.index == 0 {
                self.offer_extint(bus)?;
            }
            match self.step(bus)? {
                Step::Continue => {}
                Step::Interrupted if !self.kicker.take() => {}
                Step::Leave | Step::Interrupted => return self.settle(bus),
                Step::Shutdown => return Ok(self.shutdown()),
            }
        }
    }

    /// Brings what is half done inside KVM to where it can be seen, without executing another instruction.
    ///
    /// That is a port or MMIO access that the next KVM_RUN completes, an EOI that KVM has not told yet, an expired
    /// timer or an 8259 vector that is not yet in the vCPU's events. KVM deals with all of them on its way into the
    /// guest, and a signal that is pending when KVM_RUN begins turns it back at the last step of that way. (With
    /// `immediate_exit` it turns back at the first.) Twice: of a vCPU that was halted the first only ends the halt.
    fn settle(&mut self, bus: &dyn Bus) -> Result<Exit, EngineError> {
        let kick = PendingKick::new();
        self.set_signal_mask(Some(kick.signal()))?;
        let exit = self.turn_back_twice(bus);
        self.set_signal_mask(None)?;
        exit
    }

    fn turn_back_twice(&mut self, bus: &dyn Bus) -> Result<Exit, EngineError> {
        let mut turned_back = 0;
        while turned_back < 2 {
            match self.step(bus)? {
                // A kick came meanwhile: it may have been turned back at the first step. `kicked` still tells of it.
                Step::Interrupted if self.kicker.page().take_immediate_exit() => {}
                Step::Interrupted => turned_back += 1,
                Step::Continue | Step::Leave => {}
                Step::Shutdown => return Ok(self.shutdown()),
            }
        }
        Ok(Exit::Kicked)
    }

    fn set_signal_mask(&self, signal: Option<i32>) -> Result<(), EngineError> {
        ioctls::set_signal_mask(&self.fd, signal)
            .map_err(|e| EngineError::Host { what: "KVM_SET_SIGNAL_MASK", source: e.into() })
    }

    /// Delivers the 8259's interrupt if there is one and the processor takes it now; else sees to it that KVM_RUN
    /// returns when it will.
    fn offer_extint(&mut self, bus: &dyn Bus) -> Result<(), EngineError> {
        let page = self.kicker.page();
        if self.vm.extint() && page.ready_for_interrupt() {
            let vector = bus.acknowledge_interrupt();
            ioctls::interrupt(&self.fd, vector)
                .map_err(|e| EngineError::Host { what: "KVM_INTERRUPT", source: e.into() })?;
        }
        page.request_interrupt_window(self.vm.extint());
        Ok(())
    }

    /// One KVM_RUN, with what it came back for done.
    fn step(&mut self, bus: &dyn Bus) -> Result<Step, EngineError> {
        let exit = match self.fd.run() {
            Ok(exit) => exit,
            Err(e) if e.errno() == EINTR => return Ok(Step::Interrupted),
            // An application processor got INIT or SIPI while it slept.
            Err(e) if e.errno() == EAGAIN => return Ok(Step::Continue),
            Err(e) => return Err(host_error("KVM_RUN")(e)),
        };
        let size = self.kicker.page().io_size();
        Ok(match exit {
            VcpuExit::IoIn(port, data) => port_in(bus, port, size, data),
            VcpuExit::IoOut(port, data) => port_out(bus, port, size, data),
            VcpuExit::MmioRead(address, data) => {
                bus.mmio_read(address, data);
                Step::Continue
            }
            VcpuExit::MmioWrite(address, data) => bus.mmio_write(address, data).into(),
            VcpuExit::IoapicEoi(vector) => {
                bus.end_of_interrupt(vector);
                Step::Continue
            }
            // HLT is KVM's own affair; it comes up here on kernels that could not keep it.
            VcpuExit::IrqWindowOpen | VcpuExit::Intr | VcpuExit::Hlt => Step::Continue,
            VcpuExit::Shutdown => Step::Shutdown,
            exit => {
                let reason = failure::Reason::of(&exit);
                return Err(failure::explain(reason, &self.fd, self.kicker.page(), &self.vm.memory));
            }
        })
    }

    /// Where the vCPU was at its triple fault, as far as is known: AMD's processors leave the vCPU's state undefined
    /// at a shutdown, and KVM resets it then (AMD APM vol. 2 15.14.3).
    fn shutdown(&mut self) -> Exit {
        self.shut_down = true;
        let base = self.fd.get_sregs().map_or(0, |s| s.cs.base);
        let rip = self.fd.get_regs().map_or(0, |r| r.rip);
        Exit::Shutdown { rip: base.wrapping_add(rip) }
    }
}

/// `in` and `rep ins`: `data` holds one or several accesses of `size` bytes.
fn port_in(bus: &dyn Bus, port: u16, size: u8, data: &mut [u8]) -> Step {
    for access in data.chunks_exact_mut(usize::from(size)) {
        let value = bus.port_in(port, size).to_le_bytes();
        access.copy_from_slice(&value[..access.len()]);
    }
    Step::Continue
}

/// `out` and `rep outs`. All of `data` is written even if one access asks to leave: for the guest it has happened.
fn port_out(bus: &dyn Bus, port: u16, size: u8, data: &[u8]) -> Step {
    let mut after = After::Continue;
    for access in data.chunks_exact(usize::from(size)) {
        let mut value = [0; 4];
        value[..access.len()].copy_from_slice(access);
        if bus.port_out(port, size, u32::from_le_bytes(value)) == After::Leave {
            after = After::Leave;
        }
    }
    after.into()
}

impl Vcpu for KvmVcpu {
    fn run(&mut self, bus: &dyn Bus) -> Result<Exit, EngineError> {
        self.kicker.enter();
        let exit = self.run_until_exit(bus);
        self.kicker.leave();
        exit
    }

    fn save(&mut self) -> Result<VcpuState, EngineError> {
        state::save(self)
    }

    fn restore(&mut self, state: &VcpuState) -> Result<(), EngineError> {
        self.stale = true;
        state::restore(self, state)
    }
}
