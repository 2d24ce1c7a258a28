//! What is on its way to be delivered, and whether the vCPU runs.

use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_SIPI_RECEIVED,
    KVM_MP_STATE_UNINITIALIZED, KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SHADOW,
    KVM_VCPUEVENT_VALID_SIPI_VECTOR, KVM_X86_SHADOW_INT_MOV_SS, KVM_X86_SHADOW_INT_STI, kvm_mp_state, kvm_vcpu_events,
};
use kvm_ioctls::VcpuFd;
use purlin_arch::x86_64::{
    lapic::LapicState,
    state::{Activity, Events, VcpuState},
};
use purlin_engine::EngineError;

use super::corrupt;
use crate::host_error;

/// Vector of the debug exception.
const DEBUG: u8 = 1;

/// Without KVM_CAP_EXCEPTION_PAYLOAD, which this engine leaves off, KVM reports an exception that is pending as one
/// that is injected, its CR2 or DR6 already written: just what the saved form means.
pub(super) fn save(kvm: &kvm_vcpu_events) -> Events {
    let exception = &kvm.exception;
    Events {
        exception_plus_one: if exception.injected != 0 { u32::from(exception.nr) + 1 } else { 0 },
        error_code: (exception.injected != 0 && exception.has_error_code != 0).then_some(exception.error_code),
        interrupt_plus_one: if kvm.interrupt.injected != 0 { u32::from(kvm.interrupt.nr) + 1 } else { 0 },
        // An NMI in delivery already masks the next one; saved as pending, it is delivered again.
        nmi_pending: kvm.nmi.pending != 0 || kvm.nmi.injected != 0,
        nmi_masked: kvm.nmi.masked != 0 && kvm.nmi.injected == 0,
        sti_shadow: u32::from(kvm.interrupt.shadow) & KVM_X86_SHADOW_INT_STI != 0,
        mov_ss_shadow: u32::from(kvm.interrupt.shadow) & KVM_X86_SHADOW_INT_MOV_SS != 0,
        pending_debug: 0,
    }
}

pub(super) fn restore(fd: &VcpuFd, saved: &Events, lapic: &LapicState) -> Result<(), EngineError> {
    let mut kvm =
        kvm_vcpu_events { flags: KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW, ..Default::default() };
    if let Some(nr) = vector(saved.exception_plus_one)? {
        kvm.exception.injected = 1;
        kvm.exception.nr = nr;
        kvm.exception.has_error_code = saved.error_code.is_some().into();
        kvm.exception.error_code = saved.error_code.unwrap_or(0);
    } else if saved.pending_debug != 0 {
        // Its bits are in DR6 already.
        kvm.exception.injected = 1;
        kvm.exception.nr = DEBUG;
    }
    if let Some(nr) = vector(saved.interrupt_plus_one)? {
        kvm.interrupt.injected = 1;
        kvm.interrupt.nr = nr;
    }
    kvm.interrupt.shadow = (if saved.sti_shadow { KVM_X86_SHADOW_INT_STI } else { 0 }
        | if saved.mov_ss_shadow { KVM_X86_SHADOW_INT_MOV_SS } else { 0 }) as u8;
    kvm.nmi.pending = saved.nmi_pending.into();
    kvm.nmi.masked = saved.nmi_masked.into();
    if let Some(sipi) = vector(lapic.sipi_plus_one)? {
        kvm.flags |= KVM_VCPUEVENT_VALID_SIPI_VECTOR;
        kvm.sipi_vector = sipi.into();
    }
    fd.set_vcpu_events(&kvm).map_err(host_error("KVM_SET_VCPU_EVENTS"))
}

fn vector(plus_one: u32) -> Result<Option<u8>, EngineError> {
    let Some(vector) = plus_one.checked_sub(1) else { return Ok(None) };
    u8::try_from(vector).map(Some).map_err(|_| corrupt(format!("vector {vector}")))
}

pub(super) fn activity(kvm: kvm_mp_state) -> Result<Activity, EngineError> {
    Ok(match kvm.mp_state {
        KVM_MP_STATE_RUNNABLE => Activity::Running,
        KVM_MP_STATE_HALTED => Activity::Halted,
        KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED | KVM_MP_STATE_SIPI_RECEIVED => Activity::WaitForSipi,
        other => return Err(corrupt(format!("KVM reports the unknown activity {other}"))),
    })
}

/// After [`restore`], which sets the SIPI vector.
pub(super) fn restore_activity(fd: &VcpuFd, saved: &VcpuState) -> Result<(), EngineError> {
    let activity = Activity::try_from(saved.activity).map_err(|_| corrupt(format!("activity {}", saved.activity)))?;
    let mp_state = match activity {
        Activity::Running => KVM_MP_STATE_RUNNABLE,
        Activity::Halted => KVM_MP_STATE_HALTED,
        Activity::WaitForSipi if saved.lapic.sipi_plus_one != 0 => KVM_MP_STATE_SIPI_RECEIVED,
        // KVM ignores SIPI in its state before INIT; the saved form has one state for both.
        Activity::WaitForSipi => KVM_MP_STATE_INIT_RECEIVED,
    };
    fd.set_mp_state(kvm_mp_state { mp_state }).map_err(host_error("KVM_SET_MP_STATE"))
}

#[cfg(test)]
mod tests {
    use purlin_arch::x86_64::state::Events;

    use super::*;

    #[test]
    fn an_exception_with_error_code() {
        let mut kvm = kvm_vcpu_events::default();
        (kvm.exception.injected, kvm.exception.nr) = (1, 14);
        (kvm.exception.has_error_code, kvm.exception.error_code) = (1, 2);
        let expected = Events { exception_plus_one: 15, error_code: Some(2), ..Default::default() };
        assert_eq!(save(&kvm), expected);
    }

    #[test]
    fn an_nmi_in_delivery_is_delivered_again() {
        let mut kvm = kvm_vcpu_events::default();
        (kvm.nmi.injected, kvm.nmi.masked) = (1, 1);
        assert_eq!(save(&kvm), Events { nmi_pending: true, ..Default::default() });
        (kvm.nmi.injected, kvm.nmi.masked) = (0, 1);
        assert_eq!(save(&kvm), Events { nmi_masked: true, ..Default::default() });
    }

    #[test]
    fn shadows_are_told_apart() {
        let mut kvm = kvm_vcpu_events::default();
        kvm.interrupt.shadow = 1;
        assert_eq!(save(&kvm), Events { mov_ss_shadow: true, ..Default::default() });
        kvm.interrupt.shadow = 2;
        assert_eq!(save(&kvm), Events { sti_shadow: true, ..Default::default() });
    }

    #[test]
    fn vectors_beyond_a_byte_are_corrupt() {
        assert_eq!(vector(0).expect("none"), None);
        assert_eq!(vector(256).expect("highest"), Some(255));
        assert!(vector(257).is_err());
    }
}
