//! Registers, behaviour and saved state of each device: one folder or file per device.
//!
//! A device knows its own registers, an interrupt line, and the time it is told; no engine, no machine. Those that read
//! and write guest memory by themselves (virtio) are given it when they are made.
#![forbid(unsafe_code)]

pub mod acpi_pm;
mod byte_bus;
pub mod debug_exit;
pub mod debugcon;
mod event;
mod frequency;
pub mod i8042;
pub mod ioapic;
pub mod output;
pub mod pci;
pub mod pic;
pub mod pit;
pub mod port92;
pub mod post;
pub mod pvpanic;
pub mod reset_control;
pub mod rtc;
pub mod serial;
mod stateless;
#[cfg(test)]
mod testing;
pub mod virtio;
pub mod vmgenid;

use std::sync::Arc;

use purlin_state::{SavedState, Section, StateError};

/// A device on a bus. Methods are called with the device locked; a device never calls back into its bus.
pub trait Device: Send {
    /// The instance's name, which is also that of its saved section: `serial0`, `pit`.
    fn name(&self) -> &str;

    /// A load of `data.len()` bytes (1, 2, 4 or 8) at `offset` into the range that the device was registered for.
    fn read(&mut self, space: Space, offset: u64, data: &mut [u8]);

    /// A store. What it returns reaches the vCPU.
    fn write(&mut self, space: Space, offset: u64, data: &[u8]) -> Effect;

    /// Back to the state after power-up.
    fn reset(&mut self);

    /// The state as a section named [`Device::name`]. Every device says what its state is; a device that has none
    /// returns an empty section.
    fn save(&self) -> Section;

    /// Takes over a section that [`Device::save`] made. Interrupt lines are driven again to their saved level.
    fn restore(&mut self, saved: &Section) -> Result<(), StateError>;

    /// The moment (ns of the machine's clock, see [`Device::advance`]) at which the device next wants
    /// [`Device::advance`] to be called, `None` for never. Asked again after every access and every advance.
    fn deadline(&self) -> Option<u64> {
        None
    }

    /// The machine's clock now reads `now` (ns since power-up, stopped while the VM is paused, saved with it).
    /// Called before every access and when the deadline has come.
    fn advance(&mut self, _now: u64) {}
}

/// A bus behind the machine's own, whose devices do their own locking: several vCPUs may be in it at once.
pub trait Bridge: Send + Sync {
    /// A load of `data.len()` bytes (1, 2, 4 or 8) at `offset` into the range that the bridge was registered for.
    fn read(&self, space: Space, offset: u64, data: &mut [u8]);

    /// A store. What it returns reaches the vCPU.
    fn write(&self, space: Space, offset: u64, data: &[u8]) -> Effect;

    /// Back to the state after power-up, with all that is on the bus.
    fn reset(&self);

    /// Adds the sections of all that is on the bus. It is held.
    fn save(&self, state: &mut SavedState);

    /// Takes over sections that [`Bridge::save`] made. It is held, and stays so.
    fn restore(&self, state: &SavedState) -> Result<(), StateError>;

    /// When this returns, no thread of a device's own reads or writes guest memory or sends interrupts, until
    /// [`Bridge::open`]. Bridges begin held.
    fn hold(&self);

    /// Ends a hold.
    fn open(&self);
}

/// Which address space an access is in; a device may be registered in several, and several times in one: `range`
/// tells which (counted from 0 in the order of registration).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// I/O ports.
    Port {
        /// Which of the device's port ranges.
        range: u8,
    },
    /// Memory-mapped I/O.
    Mmio {
        /// Which of the device's MMIO ranges.
        range: u8,
    },
}

/// What a store asks of the machine beside its effect on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Effect {
    /// Nothing.
    None,
    /// The guest powers the machine off (ACPI S5).
    PowerOff,
    /// The guest resets the machine.
    Reset,
    /// The guest ends the run with this process exit status (debug-exit).
    Exit(u8),
    /// The guest says that something has happened to it, and goes on.
    Event(GuestEvent),
}

/// What a guest says has happened to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestEvent {
    /// Its kernel has panicked. What comes next is up to the kernel: it may wait for ever, or reset the machine.
    Panicked,
    /// Its kernel has panicked, and starts its crash kernel.
    CrashKernel,
}

/// An interrupt line: a level that a device drives. Cloned handles drive the same input.
#[derive(Clone)]
pub struct IrqLine(Arc<dyn Fn(bool) + Send + Sync>);

impl IrqLine {
    /// A line whose level changes are told to `sink`.
    pub fn new(sink: impl Fn(bool) + Send + Sync + 'static) -> Self {
        Self(Arc::new(sink))
    }

    /// A line that leads nowhere.
    pub fn unconnected() -> Self {
        Self::new(|_| {})
    }

    /// Drives the line high or low.
    pub fn set(&self, high: bool) {
        (self.0)(high);
    }
}

/// Where message-signalled interrupts go. Cloned handles lead to the same place.
#[derive(Clone)]
pub struct MsiLine(Arc<dyn Fn(u64, u32) + Send + Sync>);

impl MsiLine {
    /// A line whose messages, an address and data each, are told to `sink`.
    pub fn new(sink: impl Fn(u64, u32) + Send + Sync + 'static) -> Self {
        Self(Arc::new(sink))
    }

    /// Sends a message: a store of `data` to `address`.
    pub fn send(&self, address: u64, data: u32) {
        (self.0)(address, data);
    }
}
