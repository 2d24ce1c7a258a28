//! A vCPU's state between KVM's form and the one that every engine saves.
//!
//! The order of the ioctls matters, both ways; each step says why it is where it is.

mod abilities;
mod events;
mod lapic;
mod msrs;
mod regs;
mod xsave;

pub(crate) use abilities::Abilities;

use purlin_arch::x86_64::{msr, state::VcpuState};
use purlin_engine::EngineError;
use purlin_state::{Saved, StateError};

use crate::{cpuid, host_error, routes::Message, vcpu::KvmVcpu};

/// The state of `vcpu`, which is between two instructions.
pub(crate) fn save(vcpu: &KvmVcpu) -> Result<VcpuState, EngineError> {
    let fd = &vcpu.fd;
    // First: KVM acts on an INIT or SIPI that waits when it is asked for this.
    let mp_state = fd.get_mp_state().map_err(host_error("KVM_GET_MP_STATE"))?;
    let msrs = msrs::get(fd, &vcpu.vm.host.abilities)?;
    let regs = fd.get_regs().map_err(host_error("KVM_GET_REGS"))?;
    let system = regs::system(fd, &vcpu.vm.host.abilities)?;
    let lapic = fd.get_lapic().map_err(host_error("KVM_GET_LAPIC"))?;
    let events = fd.get_vcpu_events().map_err(host_error("KVM_GET_VCPU_EVENTS"))?;
    let xcr0 = xsave::get_xcr0(fd)?;

    Ok(VcpuState {
        regs: regs::save(&regs),
        system,
        tsc: msrs::value(&msrs, msr::TSC).unwrap_or(0),
        msrs: msrs.into_iter().filter(|m| m.index != msr::TSC).collect(),
        xcr0,
        xsave: xsave::get(fd, xcr0)?,
        lapic: lapic::save(&lapic),
        activity: events::activity(mp_state)?.into(),
        events: events::save(&events),
        cpuid: vcpu.cpuid.clone(),
    })
}

/// Gives `vcpu` the state `saved`.
pub(crate) fn restore(vcpu: &mut KvmVcpu, saved: &VcpuState) -> Result<(), EngineError> {
    // First: it decides which of the rest KVM accepts.
    restore_cpuid(vcpu, saved)?;
    let (fd, abilities) = (&vcpu.fd, &vcpu.vm.host.abilities);
    if std::mem::take(&mut vcpu.shut_down) {
        regs::renew_mmu(fd, abilities)?;
    }
    let apic_base = msrs::value(&saved.msrs, msr::APIC_BASE);

    regs::restore(fd, abilities, saved, apic_base)?;
    xsave::set_xcr0(fd, saved.xcr0)?;
    // After XCR0, which says which components may hold something.
    xsave::set(fd, &saved.xsave)?;
    // After IA32_APIC_BASE (with the segments): the page's layout depends on the APIC's mode.
    lapic::restore(fd, &saved.lapic)?;
    // After the local APIC: TSC-deadline can be written in that mode of the timer only.
    msrs::set(fd, abilities, saved)?;
    // After the registers: setting those drops a pending exception.
    events::restore(fd, &saved.events, &saved.lapic)?;
    // Last: with these the vCPU may begin to run.
    events::restore_activity(fd, saved)?;
    if saved.lapic.init_pending {
        vcpu.vm.init(lapic::id(&saved.lapic, apic_base));
    }
    expect_eois(vcpu, saved, apic_base);
    Ok(())
}

fn restore_cpuid(vcpu: &mut KvmVcpu, saved: &VcpuState) -> Result<(), EngineError> {
    if saved.cpuid.is_empty() || saved.cpuid == vcpu.cpuid {
        return Ok(());
    }
    let missing = cpuid::missing(&saved.cpuid, &vcpu.vm.host.cpuid);
    if !missing.is_empty() {
        let missing = missing.join(", ");
        return Err(EngineError::Unavailable(format!(
            "this host's KVM lacks {missing}, which the saved processor has"
        )));
    }
    vcpu.fd.set_cpuid2(&cpuid::to_kvm(&saved.cpuid)?).map_err(host_error("KVM_SET_CPUID2"))?;
    vcpu.cpuid.clone_from(&saved.cpuid);
    Ok(())
}

/// Level-triggered interrupts that were on their way or being handled when the state was saved end in this VM, which
/// has not delivered them.
fn expect_eois(vcpu: &KvmVcpu, saved: &VcpuState, apic_base: Option<u64>) {
    let id = lapic::id(&saved.lapic, apic_base);
    for vector in lapic::level_vectors(&saved.lapic) {
        vcpu.vm.expect_eoi(Message::level(id, vector));
    }
}

fn corrupt(reason: impl Into<String>) -> EngineError {
    StateError::corrupt(VcpuState::NAME, reason).into()
}
