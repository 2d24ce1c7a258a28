//! What KVM said when it could not go on, for people.

use kvm_bindings::{
    KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES,
    KVM_INTERNAL_ERROR_SIMUL_EX, KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use purlin_engine::{EngineError, memory::GuestRam};
use vm_memory::{Bytes, GuestAddress};

use crate::{NAME, run_page::RunPage};

/// The longest instruction (SDM vol. 2A 2.3.11).
const LONGEST_INSTRUCTION: usize = 15;

/// An exit after which the vCPU cannot go on.
pub(crate) enum Reason {
    /// KVM_EXIT_INTERNAL_ERROR: what is wrong is in the shared page.
    Internal,
    /// KVM_EXIT_FAIL_ENTRY: the processor refused to enter the guest.
    Entry(u64),
    /// KVM_EXIT_MEMORY_FAULT: the host could not provide this page of guest memory.
    Memory(u64),
    /// An exit that this engine never asked for.
    Unexpected(String),
}

impl Reason {
    pub(crate) fn of(exit: &VcpuExit<'_>) -> Self {
        match exit {
            VcpuExit::InternalError => Self::Internal,
            VcpuExit::FailEntry(reason, _) => Self::Entry(*reason),
            VcpuExit::MemoryFault { gpa, .. } => Self::Memory(*gpa),
            other => Self::Unexpected(format!("{other:?}")),
        }
    }
}

/// The failure as the seam's error, with the guest's position.
pub(crate) fn explain(reason: Reason, vcpu: &VcpuFd, page: &RunPage, memory: &GuestRam) -> EngineError {
    let base = vcpu.get_sregs().map_or(0, |s| s.cs.base);
    let rip = base.wrapping_add(vcpu.get_regs().map_or(0, |r| r.rip));
    let reason = match reason {
        Reason::Internal => internal(&Internal::parse(&page.exit_details()), || read_code(vcpu, memory, rip)),
        Reason::Entry(code) => format!("the processor refused to enter the guest (reason {code:#x})"),
        Reason::Memory(address) => format!("the host has no memory behind guest physical address {address:#x}"),
        Reason::Unexpected(exit) => format!("unexpected exit {exit}"),
    };
    EngineError::Failed { engine: NAME, rip, reason }
}

/// `kvm_run.internal`, also `kvm_run.emulation_failure`.
#[derive(Debug, PartialEq)]
struct Internal {
    suberror: u32,
    data: Vec<u64>,
    /// The instruction that KVM could not emulate, if it tells.
    instruction: Vec<u8>,
}

impl Internal {
    /// `struct { u32 suberror; u32 ndata; u64 data[16]; }`; for an emulation failure data[0] is flags, and if they say
    /// so then `u8 insn_size; u8 insn_bytes[15]` follow.
    fn parse(details: &[u8; 256]) -> Self {
        let word = |at: usize| u32::from_le_bytes(details[at..at + 4].try_into().expect("four bytes"));
        let suberror = word(0);
        let count = (word(4) as usize).min(16);
        let data: Vec<u64> = details[8..8 + 8 * count]
            .chunks_exact(8)
            .map(|bytes| u64::from_le_bytes(bytes.try_into().expect("eight bytes")))
            .collect();
        let has_bytes = suberror == KVM_INTERNAL_ERROR_EMULATION
            && count >= 3
            && data[0] & u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) != 0;
        let instruction = if has_bytes {
            details[17..17 + usize::from(details[16]).min(LONGEST_INSTRUCTION)].to_vec()
        } else {
            Vec::new()
        };
        Self { suberror, data, instruction }
    }
}

fn internal(error: &Internal, read_code: impl FnOnce() -> Vec<u8>) -> String {
    match error.suberror {
        KVM_INTERNAL_ERROR_EMULATION => {
            let code = if error.instruction.is_empty() { read_code() } else { error.instruction.clone() };
            format!("KVM could not emulate the instruction there (bytes {})", hex(&code))
        }
        KVM_INTERNAL_ERROR_SIMUL_EX => format!("KVM met simultaneous exceptions (data {:x?})", error.data),
        KVM_INTERNAL_ERROR_DELIVERY_EV => format!("KVM could not deliver an event (data {:x?})", error.data),
        KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => {
            format!("KVM met an exit of the processor that it does not know (data {:x?})", error.data)
        }
        other => format!("KVM reported internal error {other} (data {:x?})", error.data),
    }
}

/// What the guest has at linear address `rip`, as far as the page reaches.
fn read_code(vcpu: &VcpuFd, memory: &GuestRam, rip: u64) -> Vec<u8> {
    let Ok(translation) = vcpu.translate_gva(rip) else { return Vec::new() };
    if translation.valid == 0 {
        return Vec::new();
    }
    let mut code = [0; LONGEST_INSTRUCTION];
    let to_page_end = (4096 - (rip & 0xfff)) as usize;
    let code = &mut code[..to_page_end.min(LONGEST_INSTRUCTION)];
    match memory.read_slice(code, GuestAddress(translation.physical_address)) {
        Ok(()) => code.to_vec(),
        Err(_) => Vec::new(),
    }
}

fn hex(bytes: &[u8]) -> String {
    if bytes.is_empty() {
        return "unknown".into();
    }
    bytes.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::{Internal, internal};

    /// Linux, Documentation/virt/kvm/api.rst, KVM_EXIT_INTERNAL_ERROR.
    fn emulation_failure(flags: u64, bytes: &[u8]) -> [u8; 256] {
        let mut details = [0; 256];
        details[0..4].copy_from_slice(&1u32.to_le_bytes());
        details[4..8].copy_from_slice(&(if flags == 0 { 0u32 } else { 3 }).to_le_bytes());
        details[8..16].copy_from_slice(&flags.to_le_bytes());
        details[16] = bytes.len() as u8;
        details[17..17 + bytes.len()].copy_from_slice(bytes);
        details
    }

    #[test]
    fn the_instruction_that_kvm_reports_is_shown() {
        let error = Internal::parse(&emulation_failure(1, &[0xf0, 0x48, 0x0f, 0xc7, 0x0e]));
        let text = internal(&error, || unreachable!("KVM told"));
        assert_eq!(text, "KVM could not emulate the instruction there (bytes f0 48 0f c7 0e)");
    }

    #[test]
    fn else_the_guests_memory_is_read() {
        let error = Internal::parse(&emulation_failure(0, &[1, 2, 3]));
        assert_eq!(internal(&error, || vec![0xcc]), "KVM could not emulate the instruction there (bytes cc)");
        assert_eq!(internal(&error, Vec::new), "KVM could not emulate the instruction there (bytes unknown)");
    }

    #[test]
    fn lengths_out_of_range_are_cut() {
        let mut details = emulation_failure(1, &[]);
        details[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        details[16] = 255;
        let error = Internal::parse(&details);
        assert_eq!((error.data.len(), error.instruction.len()), (16, 15));
    }
}
