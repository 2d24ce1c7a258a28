//! The structures by way of configuration space alone (virtio 1.3, 4.1.4.9), for firmware that has not mapped them: a
//! capability that says where, and a register that stands for what is there.

use super::{BAR, BAR_LENGTH, PciFunction, VENDOR_CAPABILITY, VirtioPci};
use crate::pci::ConfigSpace;

/// Kind of structure.
const KIND: u8 = 5;

/// The capability (`struct virtio_pci_cfg_cap`), by its offset.
pub struct AccessWindow(u16);

/// Where in it: register number, offset, length, data.
mod field {
    pub const BAR: u16 = 4;
    pub const OFFSET: u16 = 8;
    pub const LENGTH: u16 = 12;
    pub const DATA: u16 = 16;
}

impl AccessWindow {
    /// Adds the capability.
    pub fn add(space: &mut ConfigSpace) -> Self {
        let mut body = [0; 18];
        (body[0], body[1]) = (20, KIND);
        let mut writable = [0xff; 18];
        (writable[0], writable[1]) = (0, 0);
        writable[3..6].fill(0);
        Self(space.add_capability(VENDOR_CAPABILITY, &body, &writable))
    }

    /// A load from the data register finds there what is in the structure.
    pub fn before_read(&self, function: &VirtioPci, register: u16) {
        if !self.is_data(register) {
            return;
        }
        let mut data = [0; 4];
        if let Some((offset, length)) = self.selected(function) {
            function.read_bar(BAR, offset, &mut data[..length]);
        }
        function.endpoint.configure(|space| space.write(self.0 + field::DATA, &data));
    }

    /// A store to the data register goes to the structure.
    pub fn after_write(&self, function: &VirtioPci, register: u16) {
        if !self.is_data(register) {
            return;
        }
        if let Some((offset, length)) = self.selected(function) {
            let data = function.endpoint.configure(|space| space.dword(self.0 + field::DATA)).to_le_bytes();
            function.write_bar(BAR, offset, &data[..length]);
        }
    }

    fn is_data(&self, register: u16) -> bool {
        (self.0 + field::DATA..self.0 + field::DATA + 4).contains(&register)
    }

    /// Where, if that is somewhere: 1, 2 or 4 bytes, aligned, behind the register that there is.
    fn selected(&self, function: &VirtioPci) -> Option<(u64, usize)> {
        let (bar, offset, length) = function.endpoint.configure(|space| {
            let at = |field| space.dword(self.0 + field);
            (at(field::BAR) as u8, u64::from(at(field::OFFSET)), at(field::LENGTH))
        });
        let fits = bar == BAR && matches!(length, 1 | 2 | 4) && offset.is_multiple_of(length.into());
        (fits && offset < BAR_LENGTH).then_some((offset, length as usize))
    }
}
