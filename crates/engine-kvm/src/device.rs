//! /dev/kvm itself: opened, and checked for what this engine needs of it.

use std::io::ErrorKind;

use kvm_bindings::KVM_API_VERSION;
use kvm_ioctls::{Cap, Kvm};

/// Where the kernel offers KVM.
const PATH: &str = "/dev/kvm";

/// Why /dev/kvm cannot be used. Each says what is wrong; [`DeviceError::advice`] says what to do.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The host has no /dev/kvm.
    #[error("this host has no {PATH}")]
    Missing,
    /// The user may not open it.
    #[error("no permission to open {PATH}")]
    Forbidden,
    /// Opening it failed otherwise.
    #[error("{PATH} cannot be opened: {0}")]
    Unopenable(std::io::Error),
    /// It answers with another version of the interface than the one that has been stable since Linux 2.6.22.
    #[error("{PATH} speaks version {found} of KVM's interface, not {KVM_API_VERSION}")]
    ApiVersion {
        /// What it speaks.
        found: i32,
    },
    /// The kernel's KVM is too old.
    #[error("this kernel's KVM has no {feature}")]
    TooOld {
        /// What it lacks.
        feature: &'static str,
    },
}

impl DeviceError {
    /// What a person can do about it: a sentence.
    #[must_use]
    pub fn advice(&self) -> &'static str {
        match self {
            Self::Missing => {
                "Turn on virtualisation (VT-x or AMD-V) in the firmware and load the module kvm_intel or kvm_amd; in a \
                 virtual machine ask for nested virtualisation, in a container for the device."
            }
            Self::Forbidden => {
                "Join the group that owns the device (`sudo usermod -aG kvm $USER`, then log in again), or ask for the \
                 device in the container."
            }
            Self::Unopenable(_) => "Look for kvm in the kernel's log (`dmesg`).",
            Self::ApiVersion { .. } => "Another program stands in for KVM there: use the host's own device.",
            Self::TooOld { .. } => "Use Linux 5.10 or newer.",
        }
    }
}

/// What this engine cannot do without.
const REQUIRED: &[(Cap, &str)] = &[
    (Cap::UserMemory, "user memory regions"),
    (Cap::SplitIrqchip, "split irqchip"),
    (Cap::X2ApicApi, "32-bit APIC IDs"),
    (Cap::SignalMsi, "KVM_SIGNAL_MSI"),
    (Cap::ImmediateExit, "immediate exit"),
    (Cap::MpState, "KVM_GET_MP_STATE"),
    (Cap::VcpuEvents, "KVM_GET_VCPU_EVENTS"),
    (Cap::Xsave, "KVM_GET_XSAVE"),
    (Cap::Xcrs, "KVM_GET_XCRS"),
    (Cap::Debugregs, "KVM_GET_DEBUGREGS"),
    (Cap::AdjustClock, "KVM_GET_CLOCK"),
    (Cap::GetTscKhz, "KVM_GET_TSC_KHZ"),
];

/// Opens /dev/kvm and checks that it offers what this engine needs. Runs no guest: see [`crate::probe()`] for that.
pub fn open() -> Result<Kvm, DeviceError> {
    let kvm = Kvm::new().map_err(|e| {
        let error = std::io::Error::from_raw_os_error(e.errno());
        match error.kind() {
            ErrorKind::NotFound => DeviceError::Missing,
            ErrorKind::PermissionDenied => DeviceError::Forbidden,
            // ENODEV and ENXIO: a node is there, a driver behind it is not.
            _ if matches!(e.errno(), 6 | 19) => DeviceError::Missing,
            _ => DeviceError::Unopenable(error),
        }
    })?;
    let found = kvm.get_api_version();
    if found != KVM_API_VERSION as i32 {
        return Err(DeviceError::ApiVersion { found });
    }
    for &(cap, feature) in REQUIRED {
        if !kvm.check_extension(cap) {
            return Err(DeviceError::TooOld { feature });
        }
    }
    Ok(kvm)
}

#[cfg(test)]
mod tests {
    use super::DeviceError;

    #[test]
    fn each_error_says_what_and_what_to_do() {
        let cases: [(DeviceError, &str, &str); 4] = [
            (DeviceError::Missing, "this host has no /dev/kvm", "VT-x"),
            (DeviceError::Forbidden, "no permission to open /dev/kvm", "usermod -aG kvm"),
            (DeviceError::TooOld { feature: "split irqchip" }, "this kernel's KVM has no split irqchip", "Linux 5.10"),
            (DeviceError::ApiVersion { found: 11 }, "/dev/kvm speaks version 11 of KVM's interface, not 12", "own"),
        ];
        for (error, text, advice) in cases {
            assert_eq!(error.to_string(), text);
            assert!(error.advice().contains(advice), "{}", error.advice());
        }
    }
}
