//! PCI Express: configuration space, MSI-X, and the bus that functions are on.
//!
//! | file | subject |
//! |---|---|
//! | `config_space.rs` | a function's configuration space: header, base address registers, capabilities |
//! | `decoders.rs` | which addresses a function's registers are at, by its base address and command registers |
//! | `msix.rs` | message-signalled interrupts |
//! | `endpoint.rs` | these together: what every function has |
//! | `root.rs` | the bus: ECAM, mechanism 1, the window of base addresses |
//! | `host_bridge.rs` | the function at 00:00.0 |

mod config_space;
mod decoders;
mod endpoint;
mod host_bridge;
mod msix;
mod root;

use purlin_state::{Section, StateError};

pub use self::{
    config_space::{ConfigSpace, Identity},
    decoders::{BarSpace, Decoders},
    endpoint::{Endpoint, SavedEndpoint},
    host_bridge::HostBridge,
    msix::{Msix, MsixPlace, SavedMsix},
    root::{PciRoot, Window},
};

/// A function's number on its bus: device in bits 7:3, function in bits 2:0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Devfn(u8);

impl Devfn {
    /// Function 0 of device `device`, 0 to 31.
    pub const fn of_device(device: u8) -> Self {
        assert!(device < 32);
        Self(device << 3)
    }

    /// The number as it is in a configuration address.
    pub fn number(self) -> u8 {
        self.0
    }
}

/// A function on the bus. It does its own locking: several vCPUs may be in it at once, each in another register.
pub trait PciFunction: Send + Sync {
    /// The instance's name, which is also that of its saved section.
    fn name(&self) -> &str;

    /// A load from configuration space, within one 32-bit register.
    fn read_config(&self, register: u16, data: &mut [u8]);

    /// A store to configuration space, within one 32-bit register.
    fn write_config(&self, register: u16, data: &[u8]);

    /// Changes the configuration space as firmware does.
    fn configure(&self, act: &mut dyn FnMut(&mut ConfigSpace));

    /// Where its registers are at this moment.
    fn decoders(&self) -> &Decoders;

    /// A load of 1 to 8 bytes from the registers behind base address register `bar`, wholly within them.
    fn read_bar(&self, bar: u8, offset: u64, data: &mut [u8]);

    /// A store to them.
    fn write_bar(&self, bar: u8, offset: u64, data: &[u8]);

    /// Back to the state after power-up.
    fn reset(&self);

    /// The state, as a section named [`PciFunction::name`]; the function is held.
    fn save(&self) -> Section;

    /// Takes over a section that [`PciFunction::save`] made. The function stays held.
    fn restore(&self, saved: &Section) -> Result<(), StateError>;

    /// When this returns, no thread of the function's own reads or writes guest memory or sends interrupts, until
    /// [`PciFunction::open`]. Functions begin held.
    fn hold(&self) {}

    /// Ends a hold.
    fn open(&self) {}
}
