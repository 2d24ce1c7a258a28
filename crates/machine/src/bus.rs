//! The port and MMIO buses: finds the device at an address, tells it the time, and keeps its deadline.
//!
//! # Locks
//!
//! Each device has one lock, held while it is accessed. A device may drive interrupt lines and send messages under
//! its lock, so locks are taken in this order, and never the other way:
//!
//! 1. any device but those below; those behind a bridge have locks of their own, in an order of their own;
//! 2. the 8259 pair, the I/O APIC (never one under the other);
//! 3. what the engine locks in `Vm::set_extint` and `Vm::deliver_msi`.
//!
//! An engine therefore calls its `Bus` with none of those locks held.

use std::{
    ops::RangeInclusive,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use purlin_devices::{Bridge, Device, Effect, Space};
use purlin_state::{SavedState, StateError};

use crate::{clock::Clock, deadlines::Deadlines};

/// Where a device answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Addresses {
    /// These I/O ports.
    Ports(RangeInclusive<u16>),
    /// A 32-bit register at this I/O port. Narrower accesses, and those to the ports after it, do not reach it but
    /// whoever else is there.
    Dword(u16),
    /// These guest physical addresses.
    Mmio(RangeInclusive<u64>),
}

/// No deadline.
const NEVER: u64 = u64::MAX;

/// The devices of a machine and the addresses that they answer at.
pub struct DeviceBus {
    slots: Vec<Slot>,
    bridges: Vec<Arc<dyn Bridge>>,
    ports: Ranges,
    dwords: Ranges,
    mmio: Ranges,
    clock: Arc<Clock>,
    deadlines: Deadlines,
}

/// A device in its place.
struct Slot {
    device: Arc<Mutex<dyn Device>>,
    /// What [`Device::deadline`] said last.
    deadline: AtomicU64,
}

/// A device on a [`DeviceBus`], by its type.
pub struct Handle<T> {
    device: Arc<Mutex<T>>,
    slot: usize,
}

impl DeviceBus {
    /// A bus without devices.
    pub fn new(clock: Arc<Clock>) -> Self {
        Self {
            slots: Vec::new(),
            bridges: Vec::new(),
            ports: Ranges::default(),
            dwords: Ranges::default(),
            mmio: Ranges::default(),
            clock,
            deadlines: Deadlines::default(),
        }
    }

    /// Puts a device on the bus. Its ranges are numbered in each space in the order given here.
    ///
    /// # Panics
    /// If a range overlaps another device's: a mistake in the machine's table of devices.
    pub fn add<T: Device + 'static>(&mut self, device: Arc<Mutex<T>>, addresses: &[Addresses]) -> Handle<T> {
        let slot = self.slots.len();
        self.slots.push(Slot { device: device.clone(), deadline: AtomicU64::new(NEVER) });
        self.place(Target::Device(slot), addresses);
        Handle { device, slot }
    }

    /// Puts a bridge on the bus: no lock is taken to reach it, and no time is told. Its ranges are numbered as a
    /// device's are.
    ///
    /// # Panics
    /// As [`DeviceBus::add`].
    pub fn add_bridge(&mut self, bridge: Arc<dyn Bridge>, addresses: &[Addresses]) {
        let target = Target::Bridge(self.bridges.len());
        self.bridges.push(bridge);
        self.place(target, addresses);
    }

    fn place(&mut self, target: Target, addresses: &[Addresses]) {
        let (mut port_ranges, mut mmio_ranges) = (0, 0);
        for range in addresses {
            match range {
                Addresses::Ports(ports) => {
                    let space = Space::Port { range: port_ranges };
                    self.ports.add((*ports.start()).into()..=(*ports.end()).into(), target, space);
                    port_ranges += 1;
                }
                Addresses::Dword(port) => {
                    let space = Space::Port { range: port_ranges };
                    self.dwords.add((*port).into()..=u64::from(*port) + 3, target, space);
                    port_ranges += 1;
                }
                Addresses::Mmio(range) => {
                    self.mmio.add(range.clone(), target, Space::Mmio { range: mmio_ranges });
                    mmio_ranges += 1;
                }
            }
        }
    }

    /// The machine's clock.
    pub fn clock(&self) -> &Clock {
        &self.clock
    }

    /// Who waits for the devices' deadlines.
    pub fn deadlines(&self) -> &Deadlines {
        &self.deadlines
    }

    /// Reads from ports; nobody there: all ones.
    pub fn read_ports(&self, port: u16, data: &mut [u8]) {
        self.read(self.port_ranges(port, data.len()), port.into(), data);
    }

    /// Writes to ports.
    pub fn write_ports(&self, port: u16, data: &[u8]) -> Effect {
        self.write(self.port_ranges(port, data.len()), port.into(), data)
    }

    fn port_ranges(&self, port: u16, length: usize) -> &Ranges {
        let dword = length == 4 && matches!(self.dwords.find(port.into(), 4), Found::Whole(..));
        if dword { &self.dwords } else { &self.ports }
    }

    /// Reads from memory-mapped registers; nobody there: all ones.
    pub fn read_mmio(&self, address: u64, data: &mut [u8]) {
        self.read(&self.mmio, address, data);
    }

    /// Writes to memory-mapped registers.
    pub fn write_mmio(&self, address: u64, data: &[u8]) -> Effect {
        self.write(&self.mmio, address, data)
    }

    /// Does something with a device from outside the guest (its input, say): as an access, with its lock held.
    pub fn with<T: Device, R>(&self, handle: &Handle<T>, act: impl FnOnce(&mut T) -> R) -> R {
        let mut device = lock(&handle.device);
        device.advance(self.clock.now());
        let result = act(&mut device);
        self.note_deadline(&self.slots[handle.slot], &*device);
        result
    }

    fn read(&self, ranges: &Ranges, address: u64, data: &mut [u8]) {
        match ranges.find(address, data.len()) {
            Found::Whole(Target::Device(slot), space, offset) => {
                self.access(slot, |device| device.read(space, offset, data));
            }
            Found::Whole(Target::Bridge(bridge), space, offset) => self.bridges[bridge].read(space, offset, data),
            Found::Nobody => data.fill(0xff),
            // The bus splits what several devices (or one and nobody) answer to.
            Found::Split => {
                for (i, byte) in data.iter_mut().enumerate() {
                    self.read(ranges, address.wrapping_add(i as u64), std::slice::from_mut(byte));
                }
            }
        }
    }

    fn write(&self, ranges: &Ranges, address: u64, data: &[u8]) -> Effect {
        match ranges.find(address, data.len()) {
            Found::Whole(Target::Device(slot), space, offset) => {
                self.access(slot, |device| device.write(space, offset, data))
            }
            Found::Whole(Target::Bridge(bridge), space, offset) => self.bridges[bridge].write(space, offset, data),
            Found::Nobody => Effect::None,
            Found::Split => {
                let parts = data.iter().enumerate();
                let effects = parts
                    .map(|(i, byte)| self.write(ranges, address.wrapping_add(i as u64), std::slice::from_ref(byte)));
                effects.fold(Effect::None, |first, effect| if first == Effect::None { effect } else { first })
            }
        }
    }

    fn access<R>(&self, slot: usize, act: impl FnOnce(&mut dyn Device) -> R) -> R {
        let slot = &self.slots[slot];
        let mut device = lock(&slot.device);
        device.advance(self.clock.now());
        let result = act(&mut *device);
        self.note_deadline(slot, &*device);
        result
    }

    fn note_deadline(&self, slot: &Slot, device: &dyn Device) {
        let deadline = device.deadline().unwrap_or(NEVER);
        if slot.deadline.swap(deadline, Ordering::SeqCst) != deadline {
            self.deadlines.changed(deadline);
        }
    }

    /// The earliest deadline of all devices, [`u64::MAX`] for none.
    pub fn earliest_deadline(&self) -> u64 {
        self.slots.iter().map(|s| s.deadline.load(Ordering::SeqCst)).min().unwrap_or(NEVER)
    }

    /// Tells the time to every device whose deadline has come.
    pub fn advance_due(&self) {
        let now = self.clock.now();
        for slot in self.slots.iter().filter(|s| s.deadline.load(Ordering::SeqCst) <= now) {
            let mut device = lock(&slot.device);
            device.advance(now);
            self.note_deadline(slot, &*device);
        }
    }

    /// Tells the time to every device.
    pub fn advance(&self) {
        for index in 0..self.slots.len() {
            self.access(index, |_| ());
        }
    }

    /// Resets every device. No vCPU may run.
    pub fn reset(&self) {
        for index in 0..self.slots.len() {
            self.access(index, |device| device.reset());
        }
        self.bridges.iter().for_each(|bridge| bridge.reset());
    }

    /// When this returns, no thread of any device's own reads or writes guest memory or sends interrupts, until
    /// [`DeviceBus::open`]. (The deadlines' thread is held by its owner.)
    pub fn hold(&self) {
        self.bridges.iter().for_each(|bridge| bridge.hold());
    }

    /// Ends a hold.
    pub fn open(&self) {
        self.bridges.iter().for_each(|bridge| bridge.open());
    }

    /// Adds a section for each device. The clock stands, and all devices know where ([`DeviceBus::advance`]): to save
    /// one does not change another one that has been saved already.
    pub fn save(&self, state: &mut SavedState) {
        state.sections.extend(self.slots.iter().map(|slot| lock(&slot.device).save()));
        self.bridges.iter().for_each(|bridge| bridge.save(state));
    }

    /// Takes the devices' sections over. The clock stands where it stood when they were saved.
    pub fn restore(&self, state: &SavedState) -> Result<(), StateError> {
        for slot in &self.slots {
            let mut device = lock(&slot.device);
            let section = state.section(device.name())?;
            device.restore(section)?;
            self.note_deadline(slot, &*device);
        }
        self.bridges.iter().try_for_each(|bridge| bridge.restore(state))
    }
}

/// Takes a lock even if a thread panicked with it: a device is never left in a state that could hurt the host.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The address ranges of one space, sorted.
#[derive(Default)]
struct Ranges(Vec<Range>);

struct Range {
    addresses: RangeInclusive<u64>,
    target: Target,
    space: Space,
}

/// Who answers at an address, by its number.
#[derive(Clone, Copy)]
enum Target {
    Device(usize),
    Bridge(usize),
}

enum Found {
    /// All of the access is one device's or bridge's: which, space, offset in its range.
    Whole(Target, Space, u64),
    /// Part of it is.
    Split,
    /// None of it is any device's.
    Nobody,
}

impl Ranges {
    fn add(&mut self, addresses: RangeInclusive<u64>, target: Target, space: Space) {
        let place = self.0.partition_point(|r| r.addresses.end() < addresses.start());
        let overlaps = self.0.get(place).is_some_and(|r| r.addresses.start() <= addresses.end());
        assert!(!overlaps, "two devices at {addresses:#x?}");
        self.0.insert(place, Range { addresses, target, space });
    }

    fn find(&self, address: u64, length: usize) -> Found {
        let last = address.saturating_add(length as u64 - 1);
        let place = self.0.partition_point(|r| *r.addresses.end() < address);
        match self.0.get(place) {
            Some(r) if r.addresses.contains(&address) && r.addresses.contains(&last) => {
                Found::Whole(r.target, r.space, address - r.addresses.start())
            }
            Some(r) if *r.addresses.start() <= last && length > 1 => Found::Split,
            _ => Found::Nobody,
        }
    }
}

#[cfg(test)]
mod tests;
