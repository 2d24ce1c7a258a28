//! What is on the PCI bus, and in which slot.
//!
//! A new function is a row in [`root`]. Slots are part of the machine type: a device stays in its slot whatever else
//! there is.

use std::sync::Arc;

use purlin_devices::{
    MsiLine,
    pci::{Devfn, PciRoot, Window},
    virtio::{
        VirtioDevice, balloon::Balloon, block::Block, console::Console, net::Net, pci::VirtioPci, rng::Rng,
        vsock::Vsock,
    },
};
use purlin_engine::{Vm, memory::GuestRam};

use crate::{
    config::{MachineConfig, OptionalDevice},
    layout::{PCI_WINDOW, PCI_WINDOW_LENGTH},
};

/// Device numbers. 0 is the host bridge; 2 to 7 are for devices of which there is one each.
mod slot {
    pub const RNG: u8 = 1;
    pub const CONSOLE: u8 = 2;
    pub const BALLOON: u8 = 3;
    pub const VSOCK: u8 = 4;
    /// The first of [`MAX_DISKS`](crate::layout::MAX_DISKS).
    pub const DISKS: u8 = 8;
    /// The first of [`MAX_NETWORKS`](crate::layout::MAX_NETWORKS).
    pub const NETWORKS: u8 = 24;
}

/// The bus of a machine, with its functions. `balloon` is the one that the machine has, if it has one.
pub fn root(config: &MachineConfig, ram: &Arc<GuestRam>, vm: &Arc<dyn Vm>, balloon: Option<Balloon>) -> PciRoot {
    let vm = vm.clone();
    let messages = MsiLine::new(move |address, data| vm.deliver_msi(address, data));
    let mut root = PciRoot::new(Window { start: PCI_WINDOW, length: PCI_WINDOW_LENGTH });
    let mut add = |slot: u8, device: Box<dyn VirtioDevice>| {
        let function = VirtioPci::new(device, ram.clone(), messages.clone());
        root.add(Devfn::of_device(slot), Arc::new(function));
    };
    if config.devices.contains(&OptionalDevice::Rng) {
        add(slot::RNG, Box::new(Rng::new("rng0")));
    }
    if let Some(port) = &config.console {
        add(slot::CONSOLE, Box::new(Console::new("console0", port.clone())));
    }
    if let Some(balloon) = balloon {
        add(slot::BALLOON, Box::new(balloon));
    }
    if let Some(vsock) = &config.vsock {
        add(slot::VSOCK, Box::new(Vsock::new("vsock0", vsock.clone())));
    }
    for (number, disk) in (0..).zip(&config.disks) {
        add(
            slot::DISKS + number,
            Box::new(Block::new(&format!("disk{number}"), disk.clone(), config.cpus, config.on_io_error.clone())),
        );
    }
    for (number, network) in (0..).zip(&config.networks) {
        add(slot::NETWORKS + number, Box::new(Net::new(&format!("net{number}"), network.clone())));
    }
    root
}
