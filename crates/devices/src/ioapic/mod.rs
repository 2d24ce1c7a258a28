//! The I/O APIC: an 82093AA with the EOI register of its successors (Intel 82093AA data sheet, order number 290566;
//! Intel ICH9 data sheet, section 13.5, for version 0x20).

mod entry;

use prost::Message;
use purlin_state::{Saved, Section, StateError};

use crate::{Device, Effect, Space};
use entry::Entry;

/// Interrupt inputs.
const PINS: usize = 24;

/// Offset of IOREGSEL, the register that says which register [`IOWIN`] is.
const IOREGSEL: u64 = 0x00;
/// Offset of the window.
const IOWIN: u64 = 0x10;
/// Offset of the EOI register.
const EOIR: u64 = 0x40;

/// The registers behind the window.
const IOAPICID: u8 = 0x00;
const IOAPICVER: u8 = 0x01;
const IOAPICARB: u8 = 0x02;
const IOREDTBL: u8 = 0x10;

/// Version 0x20 (there is an EOI register); bits 23:16 are the number of the last pin.
const VERSION: u32 = (PINS as u32 - 1) << 16 | 0x20;

/// Where the I/O APIC's messages go. Called with the I/O APIC locked.
pub trait MessageSink: Send {
    /// Delivers an interrupt (SDM vol. 3A 11.11, the same address and data as a device's MSI).
    fn send(&self, message: InterruptMessage);

    /// What `pin` sends is now this, whether it is masked or not. An engine that sees the end of interrupts by itself
    /// has to know which level-triggered vectors to report.
    fn route_changed(&self, pin: u8, message: InterruptMessage);
}

/// An interrupt as a store to the local APICs' range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InterruptMessage {
    /// 0xfee0_0000 and up.
    pub address: u64,
    /// Vector, delivery mode and trigger mode.
    pub data: u32,
}

/// The I/O APIC. One MMIO range of [`IoApic::LENGTH`] bytes, at 0xfec0_0000.
///
/// Its inputs carry "asserted", not a voltage: the polarity bits are kept, but mean nothing.
pub struct IoApic {
    id: u8,
    select: u8,
    /// The inputs' levels.
    lines: u32,
    entries: [Entry; PINS],
    sink: Box<dyn MessageSink>,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct SavedIoApic {
    #[prost(uint32, tag = "1")]
    id: u32,
    /// IOREGSEL.
    #[prost(uint32, tag = "2")]
    select: u32,
    /// The inputs' levels.
    #[prost(uint32, tag = "3")]
    lines: u32,
    /// The redirection table, remote IRR included.
    #[prost(fixed64, repeated, tag = "4")]
    entries: Vec<u64>,
}

impl Saved for SavedIoApic {
    const NAME: &'static str = "ioapic";
    const VERSION: u32 = 1;
}

impl IoApic {
    /// Length of the MMIO range.
    pub const LENGTH: u64 = 0x1000;
    /// Number of pins.
    pub const PINS: u8 = PINS as u8;

    /// An I/O APIC that sends to `sink`.
    pub fn new(sink: Box<dyn MessageSink>) -> Self {
        Self { id: 0, select: 0, lines: 0, entries: [Entry::default(); PINS], sink }
    }

    /// Drives the input `pin`, 0 to 23.
    pub fn set_irq(&mut self, pin: u8, high: bool) {
        let Some(entry) = self.entries.get(usize::from(pin)) else { return };
        let bit = 1 << pin;
        let rises = high && self.lines & bit == 0;
        self.lines = if high { self.lines | bit } else { self.lines & !bit };
        if entry.is_level() {
            self.deliver_level(pin);
        } else if rises && !entry.is_masked() {
            // An edge on a masked pin is lost (82093AA 3.2.4, bit 16).
            self.sink.send(entry.message());
        }
    }

    /// A local APIC ended a level-triggered interrupt of this vector. A line that is still asserted interrupts anew.
    pub fn end_of_interrupt(&mut self, vector: u8) {
        for pin in 0..Self::PINS {
            let entry = &mut self.entries[usize::from(pin)];
            if entry.is_level() && entry.vector() == vector && entry.remote_irr() {
                entry.set_remote_irr(false);
                self.deliver_level(pin);
            }
        }
    }

    /// Sends what a level-triggered pin has to send: once until its end of interrupt.
    fn deliver_level(&mut self, pin: u8) {
        let asserted = self.lines & 1 << pin != 0;
        let entry = &mut self.entries[usize::from(pin)];
        if asserted && !entry.is_masked() && !entry.remote_irr() {
            entry.set_remote_irr(true);
            self.sink.send(entry.message());
        }
    }

    fn read_selected(&self) -> u32 {
        match self.select {
            IOAPICID | IOAPICARB => u32::from(self.id) << 24,
            IOAPICVER => VERSION,
            register => self.entry_half(register).map_or(0, |(pin, high)| self.entries[pin].half(high)),
        }
    }

    fn write_selected(&mut self, value: u32) {
        if self.select == IOAPICID {
            self.id = (value >> 24) as u8 & 0x0f;
        } else if let Some((pin, high)) = self.entry_half(self.select) {
            self.write_entry(pin, high, value);
        }
    }

    /// Which half of which entry a register is.
    fn entry_half(&self, register: u8) -> Option<(usize, bool)> {
        let index = usize::from(register.checked_sub(IOREDTBL)?);
        (index < 2 * PINS).then_some((index / 2, index % 2 == 1))
    }

    fn write_entry(&mut self, index: usize, high: bool, value: u32) {
        let pin = index as u8;
        let entry = &mut self.entries[index];
        let before = entry.message();
        entry.set_half(high, value);
        let after = entry.message();
        if before != after {
            self.sink.route_changed(pin, after);
        }
        if self.entries[index].is_level() {
            self.deliver_level(pin);
        }
    }
}

impl Device for IoApic {
    fn name(&self) -> &str {
        SavedIoApic::NAME
    }

    /// Registers are 32 bits wide at multiples of 16; loads of other sizes give their low bytes.
    fn read(&mut self, _: Space, offset: u64, data: &mut [u8]) {
        let value = match offset & !3 {
            IOREGSEL => self.select.into(),
            IOWIN => self.read_selected(),
            _ => 0,
        };
        let bytes = u64::from(value).to_le_bytes();
        let first = (offset & 3) as usize;
        for (byte, &value) in data.iter_mut().zip(&bytes[first..]) {
            *byte = value;
        }
    }

    /// A store has to be of the whole register, or of the low byte where that is all there is.
    fn write(&mut self, _: Space, offset: u64, data: &[u8]) -> Effect {
        let whole = data.first_chunk().map(|&bytes| u32::from_le_bytes(bytes));
        match (offset, whole, data.first()) {
            (IOREGSEL, _, Some(&select)) => self.select = select,
            (EOIR, _, Some(&vector)) => self.end_of_interrupt(vector),
            (IOWIN, Some(value), _) => self.write_selected(value),
            _ => {}
        }
        Effect::None
    }

    /// The inputs keep the levels that are driven.
    fn reset(&mut self) {
        self.id = 0;
        self.select = 0;
        self.entries = [Entry::default(); PINS];
        self.tell_routes();
    }

    fn save(&self) -> Section {
        Section::new(&SavedIoApic {
            id: self.id.into(),
            select: self.select.into(),
            lines: self.lines,
            entries: self.entries.iter().map(|entry| entry.bits()).collect(),
        })
    }

    fn restore(&mut self, saved: &Section) -> Result<(), StateError> {
        let saved: SavedIoApic = saved.decode()?;
        if saved.entries.len() != PINS {
            let reason = format!("{} redirection entries, not {PINS}", saved.entries.len());
            return Err(StateError::corrupt(SavedIoApic::NAME, reason));
        }
        self.id = saved.id as u8 & 0x0f;
        self.select = saved.select as u8;
        self.lines = saved.lines & ((1 << PINS) - 1);
        for (entry, &bits) in self.entries.iter_mut().zip(&saved.entries) {
            *entry = Entry::from_saved(bits);
        }
        self.tell_routes();
        Ok(())
    }
}

impl IoApic {
    fn tell_routes(&self) {
        for (pin, entry) in (0..).zip(&self.entries) {
            self.sink.route_changed(pin, entry.message());
        }
    }
}

#[cfg(test)]
mod tests;
