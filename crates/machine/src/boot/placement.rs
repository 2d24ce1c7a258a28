//! Where things go in guest memory, and whether they fit.

use std::sync::Arc;

use purlin_engine::memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};

use super::image::Image;
use crate::{
    error::{MachineError, size},
    layout::{self, PAGE, RangeKind, handover},
};

/// The memory that a boot method loads into.
pub(super) struct Target<'a> {
    pub ram: &'a GuestRam,
    /// Bytes of it.
    pub memory: u64,
}

impl Target<'_> {
    /// Copies `bytes` to `address`.
    pub fn write(&self, address: u64, bytes: &[u8]) -> Result<(), MachineError> {
        Ok(self.ram.write_slice(bytes, GuestAddress(address))?)
    }

    /// Clears `length` bytes at `address`: the memory may hold what ran there before a reset.
    pub fn zero(&self, address: u64, length: u64) -> Result<(), MachineError> {
        let zeros = [0; PAGE as usize];
        let mut done = 0;
        while done < length {
            let part = &zeros[..(length - done).min(PAGE) as usize];
            self.write(address + done, part)?;
            done += part.len() as u64;
        }
        Ok(())
    }

    /// Checks that a part of the kernel can lie at `address`: in memory, and clear of what is handed over to it.
    pub fn check_kernel(&self, image: &Image, address: u64, length: u64) -> Result<(), MachineError> {
        let Some(end) = address.checked_add(length) else {
            return Err(image.not_a_kernel("it loads itself past the end of the address space: get the whole file"));
        };
        if address < handover::CMDLINE_END && end > handover::GDT {
            return Err(image.not_a_kernel(format!(
                "it loads itself to {address:#x}, over what the boot loader hands over: link it from 1 MiB up"
            )));
        }
        let map = layout::memory_map(self.memory);
        let ram = |r: &layout::Range| r.kind == RangeKind::Ram && address >= r.start && end <= r.start + r.length;
        if length > 0 && !map.iter().any(ram) {
            return Err(image.too_large(format!(
                "it needs {} at {address:#x}, memory ends at {:#x}: give the machine more memory",
                size(length),
                map.last().map_or(0, |_| layout::low_end(self.memory)),
            )));
        }
        Ok(())
    }

    /// Loads the initrds one after the other, as high as they go between `floor` and `limit` (the last byte's
    /// address). Linux takes a row of cpio archives as one, provided that each starts at a multiple of four
    /// (Documentation/driver-api/early-userspace/buffer-format.rst). Returns their address and length.
    pub fn load_initrds(&self, initrds: &[Arc<Image>], floor: u64, limit: u64) -> Result<(u64, u64), MachineError> {
        let padded = |image: &Arc<Image>| image.length().checked_next_multiple_of(4);
        let total = initrds.iter().try_fold(0u64, |sum, i| padded(i).and_then(|l| sum.checked_add(l)));
        let total = total.unwrap_or(u64::MAX);
        if total == 0 {
            return Ok((0, 0));
        }
        let end = layout::low_end(self.memory).min(limit.saturating_add(1));
        let start = end.checked_sub(total).map(|start| start / PAGE * PAGE).filter(|&start| start >= floor);
        let room = end.saturating_sub(floor.next_multiple_of(PAGE));
        let start = start.ok_or(MachineError::InitrdTooLarge { need: total, room })?;
        let mut address = start;
        for image in initrds {
            image.load(self.ram, address)?;
            let end = address + image.length();
            address = end.next_multiple_of(4);
            self.zero(end, address - end)?;
        }
        Ok((start, total))
    }

    /// Writes the command line with its final NUL at [`handover::CMDLINE`]. Returns the address after it.
    pub fn write_cmdline(&self, cmdline: &str, most: usize) -> Result<u64, MachineError> {
        let most = most.min((handover::CMDLINE_END - handover::CMDLINE - 1) as usize);
        if cmdline.len() > most {
            return Err(MachineError::CmdlineTooLong { length: cmdline.len(), most });
        }
        self.write(handover::CMDLINE, cmdline.as_bytes())?;
        self.zero(handover::CMDLINE + cmdline.len() as u64, 1)?;
        Ok(handover::CMDLINE + cmdline.len() as u64 + 1)
    }
}
