//! An entry of the redirection table (82093AA 3.2.4).

use super::InterruptMessage;

/// Delivery status, always idle: a message is on its way at once.
const DELIVERY_STATUS: u64 = 1 << 12;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
const LOGICAL: u64 = 1 << 11;
/// Bits that software can set.
const WRITABLE: u64 = 0xff00_0000_0001_ffff & !(DELIVERY_STATUS | REMOTE_IRR);

/// The local APICs' range.
const APIC_BASE: u64 = 0xfee0_0000;
/// MSI data: level asserted.
const ASSERT: u32 = 1 << 14;
/// MSI data: level triggered.
const LEVEL_TRIGGERED: u32 = 1 << 15;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry(u64);

impl Default for Entry {
    fn default() -> Self {
        Self(MASKED)
    }
}

impl Entry {
    pub fn from_saved(bits: u64) -> Self {
        Self(bits & (WRITABLE | REMOTE_IRR))
    }

    pub fn bits(self) -> u64 {
        self.0
    }

    pub fn half(self, high: bool) -> u32 {
        (if high { self.0 >> 32 } else { self.0 }) as u32
    }

    /// Software stores one half. Making a pin edge triggered clears its remote IRR: that is how Linux ends interrupts
    /// on an I/O APIC without EOI register.
    pub fn set_half(&mut self, high: bool, value: u32) {
        let value = u64::from(value);
        let bits = if high { self.0 & 0xffff_ffff | value << 32 } else { self.0 & !0xffff_ffff | value };
        self.0 = bits & WRITABLE | self.0 & REMOTE_IRR;
        if !self.is_level() {
            self.set_remote_irr(false);
        }
    }

    pub fn vector(self) -> u8 {
        self.0 as u8
    }

    pub fn is_masked(self) -> bool {
        self.0 & MASKED != 0
    }

    /// Whether it is level triggered. Only fixed and lowest-priority interrupts can be; the others are edges whatever
    /// the bit says (82093AA 3.2.4, bits 10:8).
    pub fn is_level(self) -> bool {
        self.0 & LEVEL != 0 && self.delivery_mode() <= 1
    }

    pub fn remote_irr(self) -> bool {
        self.0 & REMOTE_IRR != 0
    }

    pub fn set_remote_irr(&mut self, on: bool) {
        self.0 = if on { self.0 | REMOTE_IRR } else { self.0 & !REMOTE_IRR };
    }

    fn delivery_mode(self) -> u32 {
        (self.0 >> 8) as u32 & 7
    }

    /// The interrupt as a message (SDM vol. 3A 11.11.1 and 11.11.2): destination and mode are in the address.
    pub fn message(self) -> InterruptMessage {
        let destination = self.0 >> 56;
        let logical = u64::from(self.0 & LOGICAL != 0);
        let trigger = if self.is_level() { LEVEL_TRIGGERED | ASSERT } else { 0 };
        InterruptMessage {
            address: APIC_BASE | destination << 12 | logical << 2,
            data: u32::from(self.vector()) | self.delivery_mode() << 8 | trigger,
        }
    }
}
