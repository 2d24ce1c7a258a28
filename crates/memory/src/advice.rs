//! What the host's kernel is told of guest memory.

// One call of madvise(2), with its reason.
#![allow(unsafe_code)]

use rustix::mm::{Advice, madvise};
use vm_memory::GuestRegionMmap;

use crate::PageLog;

/// Asks for huge pages, in which a guest under KVM is faster: it faults once for 512 small ones, and the processor finds
/// more of it in its TLB. Where the host gives none to shared memory (`transparent_hugepage/shmem_enabled`), it stays as
/// it is.
pub(crate) fn ask_for_huge_pages(slot: &GuestRegionMmap<PageLog>) {
    // SAFETY: MADV_HUGEPAGE changes neither what is mapped there nor its contents, and the range is the slot's own.
    let _ = unsafe { madvise(slot.as_ptr().cast(), slot.size(), Advice::LinuxHugepage) };
}
