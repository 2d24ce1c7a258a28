//! The host bridge: the function by which kernels recognise a PCI bus. It has no registers but its header.

use purlin_state::{Section, StateError};

use super::{ConfigSpace, Decoders, Identity, PciFunction};
use crate::stateless::Nothing;

/// A host bridge as such: QEMU's generic one.
const IDENTITY: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0008,
    revision: 0,
    // Bridge, host.
    class: 0x06_00_00,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
};

/// The host bridge.
pub struct HostBridge {
    space: ConfigSpace,
    decoders: Decoders,
}

impl Default for HostBridge {
    fn default() -> Self {
        let space = ConfigSpace::new(&IDENTITY);
        let decoders = Decoders::new(&space);
        Self { space, decoders }
    }
}

impl PciFunction for HostBridge {
    fn name(&self) -> &str {
        "pci-host-bridge"
    }

    fn read_config(&self, register: u16, data: &mut [u8]) {
        self.space.read(register, data);
    }

    /// Nothing behind it can be switched off.
    fn write_config(&self, _register: u16, _data: &[u8]) {}

    fn configure(&self, _act: &mut dyn FnMut(&mut ConfigSpace)) {}

    fn decoders(&self) -> &Decoders {
        &self.decoders
    }

    fn read_bar(&self, _bar: u8, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write_bar(&self, _bar: u8, _offset: u64, _data: &[u8]) {}

    fn reset(&self) {}

    fn save(&self) -> Section {
        Nothing::section(self.name())
    }

    fn restore(&self, saved: &Section) -> Result<(), StateError> {
        Nothing::check(saved)
    }
}
