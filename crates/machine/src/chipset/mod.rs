//! The platform's devices in their places: what a `pc-1` has beside memory and processors.
//!
//! A new device is a row in [`Chipset::new`], one on the PCI bus a row in `pci.rs`.

mod interrupts;
mod pci;
pub mod ports;

use std::{
    io::Write,
    sync::{Arc, Mutex},
};

use purlin_devices::{
    Device, Effect,
    acpi_pm::AcpiPm,
    debug_exit::DebugExit,
    debugcon::Debugcon,
    i8042::I8042,
    ioapic::IoApic,
    output::Output,
    pci::PciRoot,
    pic::Pic,
    pit::Pit,
    port92::Port92,
    post::PostPort,
    pvpanic::Pvpanic,
    reset_control::ResetControl,
    rtc::{MemorySize, Rtc},
    serial::Serial,
    virtio::balloon::{Balloon, BalloonHandle},
    vmgenid::{self, VmGenId},
};
use purlin_engine::{After, Bus, Vm, memory::GuestRam};
use rustix::{
    rand::{GetRandomFlags, getrandom},
    time::{ClockId, clock_gettime},
};

use self::interrupts::Interrupts;
use crate::{
    acpi::{GENERATION_IRQ, SCI},
    bus::{
        Addresses::{self, Dword, Mmio, Ports},
        DeviceBus, Handle, lock,
    },
    clock::Clock,
    config::{MachineConfig, OptionalDevice},
    error::MachineError,
    events::Events,
    layout::{self, ECAM, ECAM_LENGTH, GENERATION_ID, IOAPIC, PCI_WINDOW, PCI_WINDOW_LENGTH},
};

/// What a guest asks of the machine as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// ACPI S5.
    PowerOff,
    /// One of the ways to reset a PC.
    Reset,
    /// The end of the run with this exit status.
    Exit(u8),
}

/// The devices of one machine, on their buses.
pub struct Chipset {
    /// All of them.
    pub devices: Arc<DeviceBus>,
    /// COM1.
    pub serial: Option<Handle<Serial>>,
    /// ACPI's fixed hardware, with the power button.
    pub power: Handle<AcpiPm>,
    /// What the guest says has happened to it.
    pub events: Events,
    generation: Handle<VmGenId>,
    /// What steers the memory balloon.
    pub balloon: Option<BalloonHandle>,
    rtc: Handle<Rtc>,
    pci: Arc<PciRoot>,
    interrupts: Interrupts,
    request: Mutex<Option<Request>>,
}

impl Chipset {
    /// Puts the devices of a machine in their places. `serial_out` takes what the guest writes to its serial port (and
    /// debug console).
    pub fn new(
        config: &MachineConfig,
        ram: &Arc<GuestRam>,
        vm: &Arc<dyn Vm>,
        clock: Arc<Clock>,
        serial_out: Box<dyn Write + Send>,
    ) -> Result<Self, MachineError> {
        let output = Output::new(serial_out).map_err(|source| MachineError::Host { what: "start a thread", source })?;
        let interrupts = Interrupts::new(vm);
        let irq = |number| interrupts.isa(number);
        let mut bus = DeviceBus::new(clock);

        bus.add(interrupts.pic.clone(), &[ports(0x20, Pic::PORTS), ports(0xa0, Pic::PORTS), ports(0x4d0, Pic::PORTS)]);
        bus.add(interrupts.ioapic.clone(), &[Mmio(IOAPIC..=IOAPIC + (IoApic::LENGTH - 1))]);
        bus.add(place(Pit::new(irq(0))), &[ports(0x40, Pit::PORTS), ports(0x61, 1)]);
        let rtc = place(Rtc::new(irq(8), wall_clock(), memory_size(config.memory)));
        let rtc = bus.add(rtc, &[ports(0x70, Rtc::PORTS)]);
        let power = bus.add(place(AcpiPm::new(irq(SCI))), &[ports(ports::ACPI_PM, AcpiPm::PORTS)]);
        let balloon = config.balloon.map(|config| Balloon::new("balloon0", config)).transpose();
        let balloon = balloon.map_err(|source| MachineError::Host { what: "create an event", source })?;
        let balloon_handle = balloon.as_ref().map(Balloon::handle);
        let pci = Arc::new(pci::root(config, ram, vm, balloon));
        let ecam = Mmio(ECAM..=ECAM + (ECAM_LENGTH - 1));
        let window = Mmio(PCI_WINDOW..=PCI_WINDOW + (PCI_WINDOW_LENGTH - 1));
        bus.add_bridge(pci.clone(), &[Dword(0xcf8), ports(0xcfc, 4), ecam, window]);
        bus.add(place(ResetControl::default()), &[ports(ports::RESET, ResetControl::PORTS)]);
        bus.add(place(I8042::new(irq(1))), &[ports(0x60, I8042::PORTS), ports(0x64, I8042::PORTS)]);
        bus.add(place(Port92::default()), &[ports(0x92, Port92::PORTS)]);
        bus.add(place(PostPort), &[ports(0x80, PostPort::PORTS)]);
        bus.add(place(Pvpanic), &[ports(ports::PVPANIC, Pvpanic::PORTS)]);
        let generation = VmGenId::new(ram.clone(), GENERATION_ID, irq(GENERATION_IRQ), new_generation_id()?);
        let generation = bus.add(place(generation), &[]);
        let serial = config.serial.then(|| {
            let serial = Serial::new("serial0", irq(4), output.clone());
            bus.add(place(serial), &[ports(ports::COM1, Serial::PORTS)])
        });
        for device in &config.devices {
            match device {
                // On the PCI bus.
                OptionalDevice::Rng => {}
                OptionalDevice::DebugExit => drop(bus.add(place(DebugExit), &[ports(0xf4, DebugExit::PORTS)])),
                OptionalDevice::Debugcon => {
                    drop(bus.add(place(Debugcon::new(output.clone())), &[ports(0xe9, Debugcon::PORTS)]));
                }
            }
        }
        let (devices, events, request) = (Arc::new(bus), Events::default(), Mutex::new(None));
        let balloon = balloon_handle;
        Ok(Self { devices, serial, power, events, generation, balloon, rtc, pci, interrupts, request })
    }

    /// Resets every device, and leaves them as firmware hands them over.
    pub fn reset(&self) {
        *lock(&self.request) = None;
        self.devices.reset();
        // The SCI is level-triggered; kernels that use no I/O APIC check for it.
        let [low, high] = (1u16 << SCI).to_le_bytes();
        let _: Effect = self.devices.write_ports(ports::ELCR, &[low, high]);
        self.pci.assign_addresses();
    }

    /// Sets the real-time clock right: the machine's clock, now about to run, has stood still for a while.
    pub fn set_wall_clock(&self) {
        let at_zero = wall_clock().saturating_sub_unsigned(self.devices.clock().now());
        self.devices.with(&self.rtc, |rtc| rtc.set_wall_clock(at_zero));
    }

    /// Gives the machine a new generation ID, and tells the guest as soon as it runs.
    pub fn renew_generation(&self) -> Result<(), MachineError> {
        let id = new_generation_id()?;
        self.devices.with(&self.generation, |generation| generation.renew(id));
        Ok(())
    }

    /// What the guest has asked for since the last reset; the first request counts.
    pub fn request(&self) -> Option<Request> {
        *lock(&self.request)
    }

    fn after(&self, effect: Effect) -> After {
        let request = match effect {
            Effect::None => return After::Continue,
            Effect::Event(event) => {
                self.events.tell(event);
                return After::Continue;
            }
            Effect::PowerOff => Request::PowerOff,
            Effect::Reset => Request::Reset,
            Effect::Exit(status) => Request::Exit(status),
        };
        lock(&self.request).get_or_insert(request);
        After::Leave
    }
}

/// Random bytes of the host's.
fn new_generation_id() -> Result<[u8; vmgenid::LENGTH], MachineError> {
    let mut id = [0; vmgenid::LENGTH];
    // So few come all at once (getrandom(2)).
    getrandom(&mut id, GetRandomFlags::empty())
        .map_err(|errno| MachineError::Host { what: "get random bytes", source: errno.into() })?;
    Ok(id)
}

/// The host's wall clock: Unix time in ns.
fn wall_clock() -> i64 {
    let now = clock_gettime(ClockId::Realtime);
    now.tv_sec.saturating_mul(1_000_000_000).saturating_add(now.tv_nsec)
}

fn memory_size(memory: u64) -> MemorySize {
    let below_4g = layout::low_end(memory);
    MemorySize { below_4g, above_4g: memory - below_4g }
}

fn place<T: Device>(device: T) -> Arc<Mutex<T>> {
    Arc::new(Mutex::new(device))
}

fn ports(first: u16, count: u16) -> Addresses {
    Ports(first..=first + (count - 1))
}

impl Bus for Chipset {
    fn port_in(&self, port: u16, size: u8) -> u32 {
        let mut data = [0; 4];
        self.devices.read_ports(port, &mut data[..usize::from(size.clamp(1, 4))]);
        u32::from_le_bytes(data)
    }

    fn port_out(&self, port: u16, size: u8, value: u32) -> After {
        let data = value.to_le_bytes();
        self.after(self.devices.write_ports(port, &data[..usize::from(size.clamp(1, 4))]))
    }

    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        self.devices.read_mmio(address, data);
    }

    fn mmio_write(&self, address: u64, data: &[u8]) -> After {
        self.after(self.devices.write_mmio(address, data))
    }

    fn acknowledge_interrupt(&self) -> u8 {
        lock(&self.interrupts.pic).acknowledge()
    }

    fn end_of_interrupt(&self, vector: u8) {
        lock(&self.interrupts.ioapic).end_of_interrupt(vector);
    }
}

#[cfg(test)]
mod tests;
