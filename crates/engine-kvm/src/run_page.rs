//! A vCPU's `kvm_run`, mapped a second time.
//!
//! kvm-ioctls hands out an exit as a borrow of the whole vCPU. What has to be read or written beside that (the size
//! of one port access, the interrupt window, a request to leave from another thread) goes through this mapping of
//! the same page, which also outlives the vCPU in the hands of whoever kicks it.

use std::{
    mem::offset_of,
    os::fd::{AsRawFd, BorrowedFd},
    ptr::NonNull,
    sync::atomic::{AtomicU8, Ordering},
};

use kvm_bindings::{kvm_run, kvm_run__bindgen_ty_1, kvm_run__bindgen_ty_1__bindgen_ty_4 as kvm_run_io};
use kvm_ioctls::VcpuFd;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// `kvm_run` proper is within the first page; the data of port accesses and the rings follow it.
const PAGE: usize = 4096;
const _: () = assert!(size_of::<kvm_run>() <= PAGE);

/// Where the union of what the exits say begins.
const EXIT: usize = offset_of!(kvm_run, __bindgen_anon_1);

/// The shared page.
#[derive(Debug)]
pub(crate) struct RunPage(NonNull<u8>);

// SAFETY: all accesses are single bytes, atomic, or to fields that the kernel writes within KVM_RUN only and that
// only the vCPU's thread reads.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

impl RunPage {
    /// Maps the page of `vcpu`.
    pub(crate) fn map(vcpu: &VcpuFd) -> rustix::io::Result<Self> {
        // SAFETY: the descriptor is open: `vcpu` is borrowed. A new shared mapping disturbs no other.
        let page = unsafe {
            let fd = BorrowedFd::borrow_raw(vcpu.as_raw_fd());
            mmap(std::ptr::null_mut(), PAGE, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, fd, 0)?
        };
        Ok(Self(NonNull::new(page.cast()).expect("mmap returns no null page")))
    }

    /// Makes KVM_RUN return EINTR before it enters the guest, once what is half done (a port or MMIO access) is
    /// completed. May be called from any thread.
    pub(crate) fn set_immediate_exit(&self) {
        self.byte(offset_of!(kvm_run, immediate_exit)).store(1, Ordering::SeqCst);
    }

    /// Lets KVM_RUN enter the guest again; whether it was to return.
    pub(crate) fn take_immediate_exit(&self) -> bool {
        self.byte(offset_of!(kvm_run, immediate_exit)).swap(0, Ordering::SeqCst) != 0
    }

    /// Makes KVM_RUN return as soon as the guest can take an external interrupt.
    pub(crate) fn request_interrupt_window(&self, on: bool) {
        self.byte(offset_of!(kvm_run, request_interrupt_window)).store(u8::from(on), Ordering::Relaxed);
    }

    /// Whether, when KVM_RUN last returned, the guest could take an external interrupt.
    pub(crate) fn ready_for_interrupt(&self) -> bool {
        self.byte(offset_of!(kvm_run, ready_for_interrupt_injection)).load(Ordering::Relaxed) != 0
    }

    /// Bytes of one access of a port exit, whose data may be several (`rep ins`, `rep outs`).
    pub(crate) fn io_size(&self) -> u8 {
        self.byte(EXIT + offset_of!(kvm_run_io, size)).load(Ordering::Relaxed)
    }

    /// What an exit says about itself, as bytes of the union in `kvm_run`.
    pub(crate) fn exit_details(&self) -> [u8; size_of::<kvm_run__bindgen_ty_1>()] {
        std::array::from_fn(|i| self.byte(EXIT + i).load(Ordering::Relaxed))
    }

    fn byte(&self, offset: usize) -> &AtomicU8 {
        assert!(offset < PAGE);
        // SAFETY: within the page, which stays mapped while `self` lives; no reference other than to atomics is made.
        unsafe { AtomicU8::from_ptr(self.0.as_ptr().add(offset)) }
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this length, and nobody borrows from it any more.
        let _ = unsafe { munmap(self.0.as_ptr().cast(), PAGE) };
    }
}
