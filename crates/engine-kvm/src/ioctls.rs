//! The ioctls that kvm-ioctls does not wrap.

use std::os::fd::{AsRawFd, BorrowedFd};

use kvm_bindings::{kvm_interrupt, kvm_sregs2};
use kvm_ioctls::VcpuFd;
use rustix::{
    io::Result,
    ioctl::{Getter, IntegerSetter, Opcode, Setter, ioctl, opcode},
};

/// KVM's ioctl group, 0xAE.
const KVMIO: u8 = kvm_bindings::KVMIO as u8;

const KVM_INTERRUPT: Opcode = opcode::write::<kvm_interrupt>(KVMIO, 0x86);
const KVM_SET_SIGNAL_MASK: Opcode = opcode::write::<u32>(KVMIO, 0x8b);
const KVM_GET_SREGS2: Opcode = opcode::read::<kvm_sregs2>(KVMIO, 0xcc);
const KVM_SET_SREGS2: Opcode = opcode::write::<kvm_sregs2>(KVMIO, 0xcd);

/// Hands KVM the vector that the 8259 answered. To be done only while `ready_for_interrupt_injection`.
pub(crate) fn interrupt(vcpu: &VcpuFd, vector: u8) -> Result<()> {
    // SAFETY: the opcode is KVM_INTERRUPT's, which reads one kvm_interrupt.
    unsafe { ioctl(borrow(vcpu), Setter::<KVM_INTERRUPT, _>::new(kvm_interrupt { irq: u32::from(vector) })) }
}

/// Lets only `signal` interrupt KVM_RUN, though the thread blocks it; `None`: those that the thread does not block.
pub(crate) fn set_signal_mask(vcpu: &VcpuFd, signal: Option<i32>) -> Result<()> {
    /// `struct kvm_signal_mask` with the kernel's signal set, which has 64 signals.
    #[repr(C, packed)]
    struct SignalMask {
        length: u32,
        blocked: u64,
    }
    let Some(signal) = signal else {
        // SAFETY: a null pointer is what KVM_SET_SIGNAL_MASK documents for "no mask".
        return unsafe { ioctl(borrow(vcpu), IntegerSetter::<KVM_SET_SIGNAL_MASK>::new_usize(0)) };
    };
    let mask = SignalMask { length: 8, blocked: !(1 << (signal - 1)) };
    // SAFETY: the opcode is KVM_SET_SIGNAL_MASK's, which reads the length and as many bytes after it.
    unsafe { ioctl(borrow(vcpu), Setter::<KVM_SET_SIGNAL_MASK, _>::new(mask)) }
}

/// Segments, tables, control registers and the PAE page-directory pointers (KVM_CAP_SREGS2).
pub(crate) fn get_sregs2(vcpu: &VcpuFd) -> Result<kvm_sregs2> {
    // SAFETY: the opcode is KVM_GET_SREGS2's, which writes one kvm_sregs2.
    unsafe { ioctl(borrow(vcpu), Getter::<KVM_GET_SREGS2, kvm_sregs2>::new()) }
}

/// The same, set.
pub(crate) fn set_sregs2(vcpu: &VcpuFd, sregs: &kvm_sregs2) -> Result<()> {
    // SAFETY: the opcode is KVM_SET_SREGS2's, which reads one kvm_sregs2.
    unsafe { ioctl(borrow(vcpu), Setter::<KVM_SET_SREGS2, _>::new(*sregs)) }
}

fn borrow(vcpu: &VcpuFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open for as long as `vcpu` lives, which the result does not outlive.
    unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) }
}
