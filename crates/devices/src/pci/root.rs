//! The root of PCI Express: its bus 0, the ways to configuration space, and the window of base addresses.
//!
//! The functions are fixed when the machine is made, so an access finds its function without a lock.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use prost::Message;
use purlin_state::{Saved, SavedState, Section, StateError};

use super::{Devfn, HostBridge, PciFunction};
use crate::{Bridge, Effect, Space};

/// CONFIG_ADDRESS (PCI Local Bus 3.0, 3.2.2.3.2): the data register reaches the configuration space.
const ENABLE: u32 = 1 << 31;
/// CONFIG_ADDRESS: the bits that exist; bus in 23:16, device in 15:11, function in 10:8, register in 7:2.
const ADDRESS_BITS: u32 = ENABLE | 0x00ff_fffc;

/// Guest physical addresses for base address registers.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    /// The first.
    pub start: u64,
    /// How many.
    pub length: u64,
}

/// The root complex with bus 0, the only one.
///
/// Port range 0 is CONFIG_ADDRESS, 0xcf8, of which only 32-bit accesses are (others go to whoever is there on the ISA
/// bus, such as the reset control at 0xcf9); range 1 is CONFIG_DATA, 0xcfc to 0xcff. MMIO range 0 is the enhanced
/// configuration access mechanism of buses from 0 up (PCI Express Base 5.0, 7.2.2); range 1 is the window.
pub struct PciRoot {
    functions: Vec<(Devfn, Arc<dyn PciFunction>)>,
    window: Window,
    address: AtomicU32,
}

/// The saved state.
#[derive(Clone, PartialEq, Eq, Message)]
struct SavedPciRoot {
    /// CONFIG_ADDRESS.
    #[prost(fixed32, tag = "1")]
    address: u32,
}

impl Saved for SavedPciRoot {
    const NAME: &'static str = "pci-host";
    const VERSION: u32 = 1;
}

impl PciRoot {
    /// A bus with the host bridge on it.
    pub fn new(window: Window) -> Self {
        let host_bridge: Arc<dyn PciFunction> = Arc::new(HostBridge::default());
        Self { functions: vec![(Devfn::of_device(0), host_bridge)], window, address: AtomicU32::new(0) }
    }

    /// Puts a function on the bus.
    ///
    /// # Panics
    /// If there is one already: a mistake in the machine's table of devices.
    pub fn add(&mut self, devfn: Devfn, function: Arc<dyn PciFunction>) {
        assert!(self.functions.iter().all(|(other, _)| *other != devfn), "two functions at {devfn:?}");
        self.functions.push((devfn, function));
    }

    /// Gives every base address register a place in the window and lets the functions answer there, as firmware does.
    /// Registers for which there is no room stay off.
    pub fn assign_addresses(&self) {
        let mut bars = Vec::new();
        for (_, function) in &self.functions {
            function.configure(&mut |space| bars.extend(space.bars().iter().map(|&(bar, kind)| (function, bar, kind))));
        }
        // Largest first: so each is at a multiple of its length with no gaps. (The sort keeps the order of the bus.)
        bars.sort_by_key(|(_, _, kind)| std::cmp::Reverse(kind.length()));
        let (mut next, end) = (self.window.start, self.window.start + self.window.length);
        for (function, bar, kind) in bars {
            let address = next.next_multiple_of(kind.length());
            if address + kind.length() > end {
                tracing::warn!("no room in the PCI window for register {bar} of {}", function.name());
                continue;
            }
            next = address + kind.length();
            function.configure(&mut |space| {
                space.set_bar_address(bar, kind, address);
                space.enable_memory();
            });
        }
    }

    /// The function with this number on this bus.
    fn function(&self, bus: u32, devfn: u32) -> Option<&dyn PciFunction> {
        let found = self.functions.iter().find(|(at, _)| bus == 0 && u32::from(at.number()) == devfn);
        found.map(|(_, function)| &**function)
    }

    /// The function, and register in it, that CONFIG_DATA stands for.
    fn selected(&self) -> Option<(&dyn PciFunction, u16)> {
        let address = self.address.load(Ordering::Relaxed);
        let function = self.function(address >> 16 & 0xff, address >> 8 & 0xff)?;
        (address & ENABLE != 0).then_some((function, (address & 0xfc) as u16))
    }

    /// The function and register at an offset in ECAM: bus in 27:20, device and function in 19:12, register below.
    fn enhanced(&self, offset: u64) -> Option<(&dyn PciFunction, u16)> {
        let function = self.function((offset >> 20) as u32, (offset >> 12) as u32 & 0xff)?;
        Some((function, (offset & 0xfff) as u16))
    }

    /// The function, register and offset at an offset in the window.
    fn decoded(&self, offset: u64, length: usize) -> Option<(&dyn PciFunction, u8, u64)> {
        let address = self.window.start + offset;
        self.functions.iter().find_map(|(_, function)| {
            let (bar, offset) = function.decoders().find(address, length)?;
            Some((&**function, bar, offset))
        })
    }
}

/// Splits an access of configuration space at 32-bit registers. Nobody there: no part is `None`.
fn parts(register: u16, length: usize) -> impl Iterator<Item = (u16, std::ops::Range<usize>)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let register = register.checked_add(at as u16)?;
        let end = (at + 4 - usize::from(register & 3)).min(length);
        let part = (at < length).then_some((register, at..end));
        at = end;
        part
    })
}

impl Bridge for PciRoot {
    fn read(&self, space: Space, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        let (function, register) = match space {
            Space::Port { range: 0 } => {
                let address = self.address.load(Ordering::Relaxed).to_le_bytes();
                data.iter_mut().zip(address).for_each(|(to, from)| *to = from);
                return;
            }
            Space::Port { .. } => match self.selected() {
                Some((function, register)) => (function, register + offset as u16),
                None => return,
            },
            Space::Mmio { range: 0 } => match self.enhanced(offset) {
                Some(found) => found,
                None => return,
            },
            Space::Mmio { .. } => {
                if let Some((function, bar, offset)) = self.decoded(offset, data.len()) {
                    function.read_bar(bar, offset, data);
                }
                return;
            }
        };
        for (register, part) in parts(register, data.len()) {
            function.read_config(register, &mut data[part]);
        }
    }

    fn write(&self, space: Space, offset: u64, data: &[u8]) -> Effect {
        let (function, register) = match space {
            Space::Port { range: 0 } => {
                if let Ok(bytes) = data.try_into() {
                    self.address.store(u32::from_le_bytes(bytes) & ADDRESS_BITS, Ordering::Relaxed);
                }
                return Effect::None;
            }
            Space::Port { .. } => match self.selected() {
                Some((function, register)) => (function, register + offset as u16),
                None => return Effect::None,
            },
            Space::Mmio { range: 0 } => match self.enhanced(offset) {
                Some(found) => found,
                None => return Effect::None,
            },
            Space::Mmio { .. } => {
                if let Some((function, bar, offset)) = self.decoded(offset, data.len()) {
                    function.write_bar(bar, offset, data);
                }
                return Effect::None;
            }
        };
        for (register, part) in parts(register, data.len()) {
            function.write_config(register, &data[part]);
        }
        Effect::None
    }

    fn reset(&self) {
        self.address.store(0, Ordering::Relaxed);
        self.functions.iter().for_each(|(_, function)| function.reset());
    }

    fn save(&self, state: &mut SavedState) {
        state.sections.push(Section::new(&SavedPciRoot { address: self.address.load(Ordering::Relaxed) }));
        state.sections.extend(self.functions.iter().map(|(_, function)| function.save()));
    }

    fn restore(&self, state: &SavedState) -> Result<(), StateError> {
        let saved: SavedPciRoot = state.decode(SavedPciRoot::NAME)?;
        self.address.store(saved.address & ADDRESS_BITS, Ordering::Relaxed);
        self.functions.iter().try_for_each(|(_, function)| function.restore(state.section(function.name())?))
    }

    fn hold(&self) {
        self.functions.iter().for_each(|(_, function)| function.hold());
    }

    fn open(&self) {
        self.functions.iter().for_each(|(_, function)| function.open());
    }
}

#[cfg(test)]
mod tests;
