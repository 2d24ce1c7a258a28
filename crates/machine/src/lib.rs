//! Builds a PC out of memory, buses, devices and a boot method.
//!
//! [`Machine`] is the whole of it; [`config::MachineConfig`] says what it is made of. A new device is a row in
//! [`chipset`], a new boot method a module in [`boot`].
#![forbid(unsafe_code)]

pub mod acpi;
pub mod boot;
pub mod bus;
pub mod chipset;
pub mod clock;
pub mod config;
mod deadlines;
mod error;
mod events;
mod input;
pub mod layout;
mod machine;
pub mod processor;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub use chipset::Request;
pub use error::MachineError;
pub use events::Listener;
pub use input::{GuestInput, InputPort};
pub use machine::{Machine, check_processors, host_memory};
pub use purlin_devices::GuestEvent;
