//! Why a form is in no case.

use iced_x86::{Code, CpuidFeature, Mnemonic};

use crate::host;

/// Why a form is in no case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Left {
    /// The mode does not have it.
    Mode,
    /// No encoding of it was found: the generator lacks something.
    Unknown,
    /// Its encoding is decoded as another form.
    Alias,
    /// The host has no such extension.
    Host,
    /// The host has it, guests are not offered it: there it is undefined.
    Guests,
    /// It calls the host's kernel, which answers.
    Call,
    /// Hypervisors that intercept it give it back as a fault.
    Intercepted,
    /// The host's kernel gives user code made-up results in place of the fault (UMIP).
    MadeUp,
}

impl Left {
    /// Whether the host has the form, so that it counts.
    pub fn counts(self) -> bool {
        matches!(self, Self::Unknown | Self::Call | Self::Intercepted | Self::MadeUp)
    }

    /// The reason in words, and what holds the form against the manual instead.
    pub fn why(self) -> &'static str {
        match self {
            Self::Mode => "no mode of 16, 32 or 64 bits has it",
            Self::Unknown => "the generator cannot make it",
            Self::Alias => "its encoding is that of another form",
            Self::Host => "the host has no such extension",
            Self::Guests => "guests are not offered it",
            Self::Call => "the host's kernel answers; see system/tests/fast_calls.rs",
            Self::Intercepted => "a hypervisor gives it back as a fault; see interrupt/tests.rs",
            Self::MadeUp => "Linux gives user code made-up results; see system/tests/segments.rs",
        }
    }
}

/// The reason to leave `code` out that lies in the form itself.
pub fn left(code: Code) -> Option<Left> {
    use Mnemonic::*;
    match code.mnemonic() {
        // AMD's processors have no SYSENTER in long mode: there it is undefined, and generated.
        Syscall => return Some(Left::Call),
        Sysenter if !host::is_amd() => return Some(Left::Call),
        Int1 => return Some(Left::Intercepted),
        Sgdt | Sidt | Sldt | Smsw | Str => return Some(Left::MadeUp),
        _ => {}
    }
    match host::has(code) {
        _ if undefined_for_users(code) => None,
        true => (!host::guests_have(code)).then_some(Left::Guests),
        false => Some(Left::Host),
    }
}

/// VMX, and what waits for a store: without them, and in user code often with them, they are undefined. (SVM's are not:
/// a hypervisor has to leave them on in its guests' EFER, whatever it tells by CPUID.)
fn undefined_for_users(code: Code) -> bool {
    use CpuidFeature::{INVEPT, INVVPID, MONITOR, VMX};
    use Mnemonic::{Vmcall, Vmread, Vmwrite};
    // VMCALL leaves for the hypervisor of the host, where there is one. Of VMREAD and VMWRITE, AMD's processors do not
    // know the length.
    let known = |f: &CpuidFeature| matches!(f, INVEPT | INVVPID | MONITOR | VMX);
    !matches!(code.mnemonic(), Vmcall | Vmread | Vmwrite) && code.cpuid_features().iter().any(known)
}
