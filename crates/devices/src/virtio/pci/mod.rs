//! The transport: a virtio device as a PCI function (virtio 1.3, 4.1), modern only, with MSI-X only.
//!
//! All structures are behind base address register 0, a page each.

mod common;
mod window;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use prost::Message;
use purlin_memory::GuestRam;
use purlin_state::{Saved, Section, StateError};

use self::{
    common::{Asked, Common, SavedCommon},
    window::AccessWindow,
};
use super::{Activation, Notifier, Running, VirtioDevice, Virtqueue, notifier::SavedNotifier};
use crate::{
    MsiLine,
    pci::{BarSpace, ConfigSpace, Decoders, Endpoint, Identity, Msix, MsixPlace, PciFunction, SavedEndpoint},
};

/// The vendor of all virtio functions; device IDs are this and up (4.1.2).
const VENDOR: u16 = 0x1af4;
const DEVICE_ID_BASE: u16 = 0x1040;

/// The base address register of all structures.
const BAR: u8 = 0;
/// Bytes behind it.
const BAR_LENGTH: u64 = 0x8000;
/// Each structure's page.
mod page {
    pub const COMMON: u64 = 0x0000;
    pub const ISR: u64 = 0x1000;
    pub const DEVICE: u64 = 0x2000;
    pub const NOTIFY: u64 = 0x3000;
    pub const MSIX_TABLE: u64 = 0x4000;
    pub const MSIX_PENDING: u64 = 0x5000;
}
/// Bytes from one queue's notification address to the next one's.
const NOTIFY_MULTIPLIER: u32 = 4;

/// Kinds of structures (4.1.4).
mod kind {
    pub const COMMON: u8 = 1;
    pub const NOTIFY: u8 = 2;
    pub const ISR: u8 = 3;
    pub const DEVICE: u8 = 4;
}
/// Capability ID: vendor-specific.
const VENDOR_CAPABILITY: u8 = 0x09;

/// A virtio device on a PCI bus.
///
/// A notification takes no lock but a shared one that is only ever held exclusively for a moment, when the driver
/// begins or resets. See [`super`] for the order of locks.
pub struct VirtioPci {
    name: String,
    memory: Arc<GuestRam>,
    endpoint: Endpoint,
    access: AccessWindow,
    notifier: Arc<Notifier>,
    registers: Mutex<Registers>,
    running: RwLock<Option<Box<dyn Running>>>,
}

/// What only one vCPU at a time is in.
struct Registers {
    device: Box<dyn VirtioDevice>,
    common: Common,
    /// The queues in use, since DRIVER_OK.
    queues: Vec<Arc<Virtqueue>>,
    held: bool,
}

/// The saved state.
#[derive(Clone, PartialEq, Message)]
struct SavedVirtioPci {
    #[prost(message, required, tag = "1")]
    endpoint: SavedEndpoint,
    #[prost(message, required, tag = "2")]
    common: SavedCommon,
    #[prost(message, required, tag = "3")]
    notifier: SavedNotifier,
    /// Of the queues in use.
    #[prost(message, repeated, tag = "4")]
    queues: Vec<SavedPosition>,
    /// The device type's own.
    #[prost(message, required, tag = "5")]
    device: Section,
}

impl Saved for SavedVirtioPci {
    const NAME: &'static str = "virtio-pci";
    const VERSION: u32 = 1;
}

/// How far a device has come in a queue.
#[derive(Clone, PartialEq, Eq, Message)]
struct SavedPosition {
    #[prost(uint32, tag = "1")]
    index: u32,
    #[prost(uint32, tag = "2")]
    next_avail: u32,
    #[prost(uint32, tag = "3")]
    next_used: u32,
}

impl VirtioPci {
    /// The PCI function of `device`. Its messages go to `line`.
    pub fn new(device: Box<dyn VirtioDevice>, memory: Arc<GuestRam>, line: MsiLine) -> Self {
        let queue_sizes = device.queue_sizes();
        let common = Common::new(device.features(), &queue_sizes);
        // A vector for each queue and one for the configuration.
        let msix = Arc::new(Msix::new(queue_sizes.len() as u16 + 1, line));
        let notifier = Arc::new(Notifier::new(device.name(), msix.clone(), queue_sizes.len()));

        let mut space = ConfigSpace::new(&Identity {
            vendor: VENDOR,
            device: DEVICE_ID_BASE + device.device_type(),
            revision: 1,
            class: device.class(),
            subsystem_vendor: VENDOR,
            subsystem: DEVICE_ID_BASE + device.device_type(),
        });
        space.add_bar(BAR, BarSpace::Memory32(BAR_LENGTH));
        let mut add = |kind, page, length, more: &[u8]| {
            let body = structure(kind, page, length, more);
            space.add_capability(VENDOR_CAPABILITY, &body, &vec![0; body.len()]);
        };
        add(kind::COMMON, page::COMMON, common::LENGTH as u32, &[]);
        add(kind::ISR, page::ISR, 1, &[]);
        add(kind::DEVICE, page::DEVICE, 0x1000, &[]);
        let notify_length = NOTIFY_MULTIPLIER * queue_sizes.len() as u32;
        add(kind::NOTIFY, page::NOTIFY, notify_length, &NOTIFY_MULTIPLIER.to_le_bytes());
        let access = AccessWindow::add(&mut space);
        let place = MsixPlace { bar: BAR, table: page::MSIX_TABLE as u32, pending: page::MSIX_PENDING as u32 };

        Self {
            name: device.name().to_owned(),
            memory,
            endpoint: Endpoint::new(space, Some((msix, place))),
            access,
            notifier,
            registers: Mutex::new(Registers { device, common, queues: Vec::new(), held: true }),
            running: RwLock::new(None),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something with the device at work, if it is.
    fn with_running(&self, act: impl FnOnce(&dyn Running)) {
        if let Some(running) = &*self.running.read().unwrap_or_else(PoisonError::into_inner) {
            act(&**running);
        }
    }

    /// Replaces the device at work; the old one ends before this returns.
    fn set_running(&self, running: Option<Box<dyn Running>>) {
        let old = std::mem::replace(&mut *self.running.write().unwrap_or_else(PoisonError::into_inner), running);
        drop(old);
    }

    fn write_common(&self, offset: u64, data: &[u8]) {
        let mut registers = self.lock();
        match registers.common.write(&self.notifier, offset, data) {
            Asked::Nothing => {}
            Asked::Reset => self.reset_device(&mut registers),
            Asked::Begin => {
                let states: Vec<_> = registers.common.enabled_queues().collect();
                if let Err(reason) = self.begin(&mut registers, states) {
                    self.notifier.needs_reset(&reason);
                }
            }
        }
    }

    /// Starts the device with the queues that the driver has enabled.
    fn begin(&self, registers: &mut Registers, states: Vec<(u16, virtio_queue::QueueState)>) -> Result<(), String> {
        let queue = |(index, state)| {
            Virtqueue::new(index, state, self.memory.clone(), self.notifier.clone())
                .ok_or_else(|| format!("queue {index} is not in memory"))
        };
        let queues: Vec<_> = states.into_iter().map(queue).collect::<Result<_, _>>()?;
        let running = registers.device.activate(Activation {
            features: registers.common.features(),
            memory: self.memory.clone(),
            queues: queues.clone(),
            notifier: self.notifier.clone(),
        });
        let running = running.map_err(|error| error.to_string())?;
        if !registers.held {
            running.open();
        }
        registers.queues = queues;
        self.set_running(Some(running));
        Ok(())
    }

    /// The driver's reset (2.4), or the machine's.
    fn reset_device(&self, registers: &mut Registers) {
        self.set_running(None);
        registers.queues.clear();
        registers.device.reset();
        registers.common.reset();
        self.notifier.reset();
    }
}

/// What follows the header of `struct virtio_pci_cap` (4.1.4), `more` behind it.
fn structure(kind: u8, page: u64, length: u32, more: &[u8]) -> Vec<u8> {
    let mut body = vec![16 + more.len() as u8, kind, BAR, 0, 0, 0];
    body.extend((page as u32).to_le_bytes());
    body.extend(length.to_le_bytes());
    body.extend(more);
    body
}

impl PciFunction for VirtioPci {
    fn name(&self) -> &str {
        &self.name
    }

    fn read_config(&self, register: u16, data: &mut [u8]) {
        self.access.before_read(self, register);
        self.endpoint.read_config(register, data);
    }

    fn write_config(&self, register: u16, data: &[u8]) {
        self.endpoint.write_config(register, data);
        self.access.after_write(self, register);
    }

    fn configure(&self, act: &mut dyn FnMut(&mut ConfigSpace)) {
        self.endpoint.configure(act);
    }

    fn decoders(&self) -> &Decoders {
        self.endpoint.decoders()
    }

    fn read_bar(&self, bar: u8, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let (page, at) = (offset & !0xfff, offset & 0xfff);
        match page {
            page::COMMON => self.lock().common.read(&self.notifier, at, data),
            page::ISR if at == 0 => data[0] = self.notifier.take_isr(),
            page::DEVICE => self.lock().device.read_config(at, data),
            _ => {
                self.endpoint.read_msix(bar, offset, data);
            }
        }
    }

    fn write_bar(&self, bar: u8, offset: u64, data: &[u8]) {
        let (page, at) = (offset & !0xfff, offset & 0xfff);
        match page {
            page::COMMON => self.write_common(at, data),
            page::DEVICE => self.lock().device.write_config(at, data),
            page::NOTIFY => self.with_running(|running| running.notify((at / u64::from(NOTIFY_MULTIPLIER)) as u16)),
            _ => {
                self.endpoint.write_msix(bar, offset, data);
            }
        }
    }

    fn reset(&self) {
        self.reset_device(&mut self.lock());
        self.endpoint.reset();
    }

    fn save(&self) -> Section {
        let registers = self.lock();
        let position = |queue: &Arc<Virtqueue>| {
            let state = queue.state();
            SavedPosition {
                index: queue.index().into(),
                next_avail: state.next_avail.into(),
                next_used: state.next_used.into(),
            }
        };
        let in_use = if self.notifier.is_out_of_service() { &[] } else { registers.queues.as_slice() };
        let saved = SavedVirtioPci {
            endpoint: self.endpoint.save(),
            common: registers.common.save(),
            notifier: self.notifier.save(),
            queues: in_use.iter().map(position).collect(),
            device: registers.device.save(),
        };
        Section::named(&self.name, &saved)
    }

    fn restore(&self, section: &Section) -> Result<(), StateError> {
        let saved: SavedVirtioPci = section.decode()?;
        let corrupt = |reason: &str| StateError::corrupt(&self.name, reason);
        let mut registers = self.lock();
        self.reset_device(&mut registers);
        self.endpoint.restore(&saved.endpoint)?;
        registers.common.restore(&saved.common).map_err(corrupt)?;
        self.notifier.restore(&saved.notifier);
        registers.device.restore(&saved.device)?;
        if !registers.common.is_ready() || self.notifier.is_out_of_service() {
            return Ok(());
        }
        let mut states: Vec<_> = registers.common.enabled_queues().collect();
        for (index, state) in &mut states {
            let position = saved.queues.iter().find(|p| p.index == u32::from(*index));
            let position = position.ok_or_else(|| corrupt("a queue's position is missing"))?;
            (state.next_avail, state.next_used) = (position.next_avail as u16, position.next_used as u16);
        }
        self.begin(&mut registers, states).map_err(|reason| corrupt(&reason))
    }

    fn hold(&self) {
        self.lock().held = true;
        self.with_running(|running| running.hold());
    }

    fn open(&self) {
        self.lock().held = false;
        self.with_running(|running| running.open());
    }
}

#[cfg(test)]
mod tests;
