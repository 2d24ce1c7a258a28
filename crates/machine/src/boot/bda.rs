//! The BIOS data area: the few words of it that kernels read without any firmware call.

use purlin_engine::memory::GuestRam;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::layout::EBDA;

/// Port of COM1.
const COM1: GuestAddress = GuestAddress(0x400);
/// Segment of the extended BIOS data area.
const EBDA_SEGMENT: GuestAddress = GuestAddress(0x40e);
/// KiB of conventional memory.
const BASE_MEMORY: GuestAddress = GuestAddress(0x413);

/// Writes them.
pub(super) fn write(ram: &GuestRam) -> Result<(), GuestMemoryError> {
    ram.write_obj(0x3f8u16, COM1)?;
    ram.write_obj((EBDA >> 4) as u16, EBDA_SEGMENT)?;
    ram.write_obj((EBDA >> 10) as u16, BASE_MEMORY)
}
