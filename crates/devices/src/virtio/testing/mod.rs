//! For tests: a driver made by hand, which drives a device through its PCI function and rings in guest memory.

mod hostile;

use std::{
    sync::{Arc, Mutex, PoisonError, atomic::Ordering},
    time::{Duration, Instant},
};

use purlin_memory::GuestRam;
use purlin_state::Section;
use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};
use vm_memory::{Bytes, GuestAddress};

use super::{VirtioDevice, feature, pci::VirtioPci};
use crate::{MsiLine, pci::PciFunction};

pub use self::hostile::{abuse, is_held_in_a_flood, is_held_in_a_flood_of};

/// The feature bit that every driver accepts.
pub const VERSION_1: u64 = 1 << 32;

/// Far more than anything here takes.
const PATIENCE: Duration = Duration::from_secs(30);

/// The far end of a line of messages.
#[derive(Clone, Default)]
pub struct Messages(Arc<Mutex<Vec<(u64, u32)>>>);

impl Messages {
    /// A line that leads here.
    pub fn line(&self) -> MsiLine {
        let messages = self.0.clone();
        let push = move |address, data| messages.lock().unwrap_or_else(PoisonError::into_inner).push((address, data));
        MsiLine::new(push)
    }

    /// What came since the last call.
    pub fn take(&self) -> Vec<(u64, u32)> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A buffer of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Guest physical address.
    pub address: u64,
    /// Bytes.
    pub length: u32,
    /// Whether the device writes it.
    pub writable: bool,
}

/// A chain given back by the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// The chain.
    pub head: u16,
    /// Bytes that the device says it wrote.
    pub written: u32,
}

/// A queue as its driver sees it. Rings are where the driver put them; all else is up to whoever drives.
pub struct DriverQueue {
    /// Its number.
    pub index: u16,
    /// Its size.
    pub size: u16,
    /// Guest physical addresses of descriptor table, available ring and used ring.
    pub rings: [u64; 3],
    next_descriptor: u16,
    available: u16,
    used: u16,
}

/// A driver with its device, and the guest memory that they share: two adjacent slots of 4 MiB from 0.
pub struct Driver {
    /// The device.
    pub function: Arc<VirtioPci>,
    /// Guest memory.
    pub memory: Arc<GuestRam>,
    /// The device's interrupts: vector `n` sends data `0x40 + n`.
    pub messages: Messages,
    /// The queues.
    pub queues: Vec<DriverQueue>,
    free: u64,
}

/// What of a driver outlives its device's process.
pub struct DriverSide {
    queues: Vec<DriverQueue>,
    free: u64,
}

/// Bytes of a slot.
pub const SLOT: u64 = 4 << 20;

/// Offsets in the common configuration structure.
pub mod common {
    /// `device_feature_select`
    pub const DEVICE_FEATURE_SELECT: u64 = 0;
    /// `device_feature`
    pub const DEVICE_FEATURE: u64 = 4;
    /// `driver_feature_select`
    pub const DRIVER_FEATURE_SELECT: u64 = 8;
    /// `driver_feature`
    pub const DRIVER_FEATURE: u64 = 12;
    /// `config_msix_vector`
    pub const CONFIG_VECTOR: u64 = 16;
    /// `num_queues`
    pub const NUM_QUEUES: u64 = 18;
    /// `device_status`
    pub const STATUS: u64 = 20;
    /// `config_generation`
    pub const GENERATION: u64 = 21;
    /// `queue_select`
    pub const QUEUE_SELECT: u64 = 22;
    /// `queue_size`
    pub const QUEUE_SIZE: u64 = 24;
    /// `queue_msix_vector`
    pub const QUEUE_VECTOR: u64 = 26;
    /// `queue_enable`
    pub const QUEUE_ENABLE: u64 = 28;
    /// `queue_notify_off`
    pub const QUEUE_NOTIFY_OFF: u64 = 30;
    /// `queue_desc`
    pub const QUEUE_DESC: u64 = 32;
}

/// Pages behind base address register 0.
pub mod page {
    /// ISR status.
    pub const ISR: u64 = 0x1000;
    /// The device type's configuration.
    pub const DEVICE: u64 = 0x2000;
    /// Notifications.
    pub const NOTIFY: u64 = 0x3000;
    /// MSI-X table.
    pub const MSIX_TABLE: u64 = 0x4000;
}

impl Driver {
    /// A device after power-up, in a machine that runs. The driver has done nothing yet.
    pub fn new(device: Box<dyn VirtioDevice>) -> Self {
        let memory = purlin_memory::create(&[(0, SLOT), (SLOT, SLOT)]).expect("memory is made");
        let driver = Self::on(Arc::new(memory), device);
        driver.function.open();
        driver
    }

    /// A device after power-up on this memory, held.
    fn on(memory: Arc<GuestRam>, device: Box<dyn VirtioDevice>) -> Self {
        let messages = Messages::default();
        let function = Arc::new(VirtioPci::new(device, memory.clone(), messages.line()));
        Self { function, memory, messages, queues: Vec::new(), free: 0x1000 }
    }

    /// Saves the device, which is held, and goes on with `device`, into which it is restored. It is held.
    pub fn moved_to(self, device: Box<dyn VirtioDevice>) -> Self {
        let saved = self.function.save();
        let (memory, side) = (self.memory.clone(), self.detach());
        Self::restored(memory, device, &saved, side)
    }

    /// The driver alone, as it is in the guest's memory. The device is gone.
    pub fn detach(self) -> DriverSide {
        DriverSide { queues: self.queues, free: self.free }
    }

    /// The driver with `device`, which goes on from `saved` and is held.
    pub fn restored(memory: Arc<GuestRam>, device: Box<dyn VirtioDevice>, saved: &Section, side: DriverSide) -> Self {
        let mut driver = Self::on(memory, device);
        driver.function.restore(saved).expect("a saved state is taken over");
        assert_eq!(driver.function.save(), *saved);
        (driver.queues, driver.free) = (side.queues, side.free);
        driver
    }

    /// Sets the device up as virtio 1.3, 3.1.1 says, with all of its queues and a vector for each. Returns the
    /// features: `wanted` and VERSION_1.
    pub fn initialize(&mut self, wanted: u64) -> u64 {
        let features = wanted | VERSION_1;
        self.negotiate(features);
        assert_eq!(self.status() & 8, 8, "the device refuses {features:#x}, it offers {:#x}", self.offered());
        for index in 0..self.read::<2>(common::NUM_QUEUES) as u16 {
            self.set_up_queue(index, 16);
            self.enable_queue(index);
        }
        self.set_status(0xf);
        features
    }

    /// The steps up to FEATURES_OK, with these features.
    pub fn negotiate(&mut self, features: u64) {
        self.enable_msix();
        self.set_status(0);
        self.set_status(1);
        self.set_status(3);
        self.write(common::CONFIG_VECTOR, &0u16.to_le_bytes());
        for select in 0..2u32 {
            self.write(common::DRIVER_FEATURE_SELECT, &select.to_le_bytes());
            self.write(common::DRIVER_FEATURE, &((features >> (32 * select)) as u32).to_le_bytes());
        }
        self.set_status(0xb);
    }

    /// The features that the device offers.
    pub fn offered(&self) -> u64 {
        (0..2u32).fold(0, |features, select| {
            self.write(common::DEVICE_FEATURE_SELECT, &select.to_le_bytes());
            features | self.read::<4>(common::DEVICE_FEATURE) << (32 * select)
        })
    }

    fn enable_msix(&self) {
        for vector in 0..=self.read::<2>(common::NUM_QUEUES) {
            let entry: [u32; 4] = [0xfee0_0000, 0, 0x40 + vector as u32, 0];
            for (at, word) in (0..).step_by(4).zip(entry) {
                self.write(page::MSIX_TABLE + 16 * vector + at, &word.to_le_bytes());
            }
        }
        let control = self.capability(0x11).expect("there is MSI-X") + 2;
        self.function.write_config(control, &0x8000u16.to_le_bytes());
    }

    /// Offset of the first capability with this ID.
    pub fn capability(&self, id: u8) -> Option<u16> {
        self.capabilities().into_iter().find(|(found, _)| *found == id).map(|(_, at)| at)
    }

    /// IDs and offsets of the capabilities.
    pub fn capabilities(&self) -> Vec<(u8, u16)> {
        let byte = |at: u16| {
            let mut data = [0];
            self.function.read_config(at, &mut data);
            data[0]
        };
        let mut list = Vec::new();
        let mut at = byte(0x34);
        while at != 0 {
            list.push((byte(at.into()), at.into()));
            at = byte(u16::from(at) + 1);
        }
        list
    }

    /// Allocates rings of `size` entries for queue `index`, and tells the device of them.
    pub fn set_up_queue(&mut self, index: u16, size: u16) {
        let length = u64::from(size);
        let rings =
            [self.allocate(16 * length, 16), self.allocate(6 + 2 * length, 2), self.allocate(6 + 8 * length, 4)];
        self.write(common::QUEUE_SELECT, &index.to_le_bytes());
        self.write(common::QUEUE_SIZE, &size.to_le_bytes());
        self.write(common::QUEUE_VECTOR, &(index + 1).to_le_bytes());
        for (at, ring) in (0..).step_by(8).zip(rings) {
            self.write(common::QUEUE_DESC + at, &(ring as u32).to_le_bytes());
            self.write(common::QUEUE_DESC + at + 4, &((ring >> 32) as u32).to_le_bytes());
        }
        self.queues.retain(|q| q.index != index);
        self.queues.push(DriverQueue { index, size, rings, next_descriptor: 0, available: 0, used: 0 });
        self.queues.sort_by_key(|q| q.index);
    }

    /// Enables a queue.
    pub fn enable_queue(&self, index: u16) {
        self.write(common::QUEUE_SELECT, &index.to_le_bytes());
        self.write(common::QUEUE_ENABLE, &1u16.to_le_bytes());
    }

    /// Memory that nothing else uses.
    pub fn allocate(&mut self, length: u64, align: u64) -> u64 {
        let address = self.free.next_multiple_of(align);
        self.free = address + length;
        assert!(self.free <= 2 * SLOT, "out of the driver's memory");
        address
    }

    /// A buffer with this content for the device to read.
    pub fn readable(&mut self, data: &[u8]) -> Buffer {
        let address = self.allocate(data.len() as u64, 1);
        self.memory.write_slice(data, GuestAddress(address)).expect("allocated");
        Buffer { address, length: data.len() as u32, writable: false }
    }

    /// A buffer for the device to write; it is full of 0xee.
    pub fn writable(&mut self, length: u32) -> Buffer {
        let address = self.allocate(length.into(), 1);
        self.memory.write_slice(&vec![0xee; length as usize], GuestAddress(address)).expect("allocated");
        Buffer { address, length, writable: true }
    }

    /// A buffer's content.
    pub fn content(&self, buffer: Buffer) -> Vec<u8> {
        let mut data = vec![0; buffer.length as usize];
        self.memory.read_slice(&mut data, GuestAddress(buffer.address)).expect("allocated");
        data
    }

    /// Writes a descriptor into a table at `table`.
    pub fn put_descriptor(&self, table: u64, index: u16, buffer: Buffer, flags: u32, next: u16) {
        let flags = flags | if buffer.writable { VRING_DESC_F_WRITE } else { 0 };
        let at = GuestAddress(table + 16 * u64::from(index));
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&buffer.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&buffer.length.to_le_bytes());
        bytes[12..14].copy_from_slice(&(flags as u16).to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.memory.write_slice(&bytes, at).expect("the table is in memory");
    }

    /// Makes a chain of these buffers available, without telling the device. Returns its head. Descriptors are used
    /// round and round: whoever has more under way than the queue has room for overwrites them.
    pub fn offer(&mut self, queue: usize, buffers: &[Buffer]) -> u16 {
        let (table, size, head) = {
            let q = &mut self.queues[queue];
            let head = q.next_descriptor;
            q.next_descriptor = (head + buffers.len() as u16) % q.size;
            (q.rings[0], q.size, head)
        };
        for (i, buffer) in (0u16..).zip(buffers) {
            let last = usize::from(i) + 1 == buffers.len();
            let flags = if last { 0 } else { VRING_DESC_F_NEXT };
            self.put_descriptor(table, (head + i) % size, *buffer, flags, (head + i + 1) % size);
        }
        self.make_available(queue, head);
        head
    }

    /// The same through an indirect table.
    pub fn offer_indirect(&mut self, queue: usize, buffers: &[Buffer]) -> u16 {
        let length = 16 * buffers.len() as u32;
        let table = self.allocate(length.into(), 16);
        for (i, buffer) in (0u16..).zip(buffers) {
            let last = usize::from(i) + 1 == buffers.len();
            let flags = if last { 0 } else { VRING_DESC_F_NEXT };
            self.put_descriptor(table, i, *buffer, flags, i + 1);
        }
        let q = &mut self.queues[queue];
        let head = q.next_descriptor;
        q.next_descriptor = (head + 1) % q.size;
        let rings = q.rings;
        let indirect = Buffer { address: table, length, writable: false };
        self.put_descriptor(rings[0], head, indirect, VRING_DESC_F_INDIRECT, 0);
        self.make_available(queue, head);
        head
    }

    /// Puts a head into the available ring.
    pub fn make_available(&mut self, queue: usize, head: u16) {
        let q = &mut self.queues[queue];
        let slot = q.rings[1] + 4 + 2 * u64::from(q.available % q.size);
        q.available = q.available.wrapping_add(1);
        self.memory.write_obj(head, GuestAddress(slot)).expect("the ring is in memory");
        self.memory.store(q.available, GuestAddress(q.rings[1] + 2), Ordering::SeqCst).expect("the ring is in memory");
    }

    /// Tells the device of what is available.
    pub fn notify(&self, queue: usize) {
        let index = self.queues[queue].index;
        self.write(page::NOTIFY + 4 * u64::from(index), &index.to_le_bytes());
    }

    /// The next chain that the device has given back, if there is one.
    pub fn take_used(&mut self, queue: usize) -> Option<Used> {
        let q = &mut self.queues[queue];
        let index: u16 =
            self.memory.load(GuestAddress(q.rings[2] + 2), Ordering::SeqCst).expect("the ring is in memory");
        if index == q.used {
            return None;
        }
        let slot = GuestAddress(q.rings[2] + 4 + 8 * u64::from(q.used % q.size));
        let element: [u32; 2] = self.memory.read_obj(slot).expect("the ring is in memory");
        q.used = q.used.wrapping_add(1);
        Some(Used { head: element[0] as u16, written: element[1] })
    }

    /// Waits for the next chain that the device gives back.
    pub fn wait_used(&mut self, queue: usize) -> Used {
        let start = Instant::now();
        loop {
            if let Some(used) = self.take_used(queue) {
                return used;
            }
            assert!(start.elapsed() < PATIENCE, "the device has not used a chain (status {:#x})", self.status());
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    /// Offers a chain, tells the device, and waits until it is used.
    pub fn request(&mut self, queue: usize, buffers: &[Buffer]) -> Used {
        let head = self.offer(queue, buffers);
        self.notify(queue);
        let used = self.wait_used(queue);
        assert_eq!(used.head, head);
        used
    }

    /// Waits until the device wants to be reset.
    pub fn wait_out_of_service(&self) {
        let start = Instant::now();
        while self.status() & 0x40 == 0 {
            assert!(start.elapsed() < PATIENCE, "the device is in service (status {:#x})", self.status());
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    /// Device status.
    pub fn status(&self) -> u8 {
        self.read::<1>(common::STATUS) as u8
    }

    /// Writes the device status.
    pub fn set_status(&self, status: u8) {
        self.write(common::STATUS, &[status]);
    }

    /// Reads `N` bytes of registers, at most 8.
    pub fn read<const N: usize>(&self, offset: u64) -> u64 {
        let mut data = [0; 8];
        self.function.read_bar(0, offset, &mut data[..N]);
        u64::from_le_bytes(data)
    }

    /// Writes registers.
    pub fn write(&self, offset: u64, data: &[u8]) {
        self.function.write_bar(0, offset, data);
    }
}

/// The feature of indirect tables.
pub const INDIRECT: u64 = feature(VIRTIO_RING_F_INDIRECT_DESC);
/// The feature of event indices.
pub const EVENT_IDX: u64 = feature(VIRTIO_RING_F_EVENT_IDX);
