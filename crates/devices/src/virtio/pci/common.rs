//! The common configuration structure (virtio 1.3, 4.1.4.3): negotiation and the queues' set-up.

use prost::Message;
use virtio_bindings::{
    virtio_config::{
        VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
    },
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};
use virtio_queue::QueueState;

use crate::virtio::{Notifier, feature};

/// Bytes of the structure.
pub const LENGTH: usize = 0x40;

/// Features of the rings and of the transport.
const TRANSPORT_FEATURES: u64 =
    feature(VIRTIO_F_VERSION_1) | feature(VIRTIO_RING_F_INDIRECT_DESC) | feature(VIRTIO_RING_F_EVENT_IDX);

/// Status: the features are settled.
pub const FEATURES_OK: u8 = VIRTIO_CONFIG_S_FEATURES_OK as u8;
/// Status: the driver is ready.
pub const DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;
/// Status: the device is out of service until it is reset.
pub const NEEDS_RESET: u8 = VIRTIO_CONFIG_S_NEEDS_RESET as u8;

/// Registers by offset (`struct virtio_pci_common_cfg`).
mod register {
    pub const DEVICE_FEATURE_SELECT: u64 = 0x00;
    pub const DRIVER_FEATURE_SELECT: u64 = 0x08;
    pub const DRIVER_FEATURE: u64 = 0x0c;
    pub const CONFIG_VECTOR: u64 = 0x10;
    pub const DEVICE_STATUS: u64 = 0x14;
    pub const QUEUE_SELECT: u64 = 0x16;
    pub const QUEUE_SIZE: u64 = 0x18;
    pub const QUEUE_VECTOR: u64 = 0x1a;
    pub const QUEUE_ENABLE: u64 = 0x1c;
    pub const QUEUE_DESC: u64 = 0x20;
    pub const QUEUE_DRIVER: u64 = 0x28;
    pub const QUEUE_DEVICE: u64 = 0x30;
    pub const QUEUE_END: u64 = 0x38;
}

/// What the driver asks of the device by a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// Nothing that concerns others.
    Nothing,
    /// A reset.
    Reset,
    /// To begin: DRIVER_OK has been set.
    Begin,
}

/// The registers.
pub struct Common {
    offered: u64,
    status: u8,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    queue_select: u16,
    queues: Vec<QueueRegisters>,
}

/// The registers of one queue, but for its vector.
#[derive(Clone, Copy)]
struct QueueRegisters {
    max_size: u16,
    size: u16,
    enabled: bool,
    /// Addresses of the descriptor table, the driver's and the device's ring.
    rings: [u64; 3],
}

impl QueueRegisters {
    fn new(max_size: u16) -> Self {
        Self { max_size, size: max_size, enabled: false, rings: [0; 3] }
    }
}

/// The saved state.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct SavedCommon {
    #[prost(uint32, tag = "1")]
    status: u32,
    #[prost(uint32, tag = "2")]
    device_feature_select: u32,
    #[prost(uint32, tag = "3")]
    driver_feature_select: u32,
    #[prost(fixed64, tag = "4")]
    driver_features: u64,
    #[prost(uint32, tag = "5")]
    queue_select: u32,
    #[prost(message, repeated, tag = "6")]
    queues: Vec<SavedQueue>,
}

/// The saved state of a queue's registers.
#[derive(Clone, PartialEq, Eq, Message)]
struct SavedQueue {
    #[prost(uint32, tag = "1")]
    size: u32,
    #[prost(bool, tag = "2")]
    enabled: bool,
    #[prost(fixed64, repeated, tag = "3")]
    rings: Vec<u64>,
}

impl Common {
    /// The registers of a device that offers these features of its type, and has queues of these sizes.
    ///
    /// # Panics
    /// If a size is not a power of two up to 1024, or there are no or more than 64 queues: a mistake in the device.
    pub fn new(features: u64, queue_sizes: &[u16]) -> Self {
        assert!((1..=64).contains(&queue_sizes.len()));
        assert!(queue_sizes.iter().all(|size| size.is_power_of_two() && *size <= 1024));
        Self {
            offered: features | TRANSPORT_FEATURES,
            status: 0,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues: queue_sizes.iter().map(|&size| QueueRegisters::new(size)).collect(),
        }
    }

    /// As after power-up.
    pub fn reset(&mut self) {
        let sizes: Vec<u16> = self.queues.iter().map(|q| q.max_size).collect();
        *self = Self::new(self.offered, &sizes);
    }

    /// The features that both sides have.
    pub fn features(&self) -> u64 {
        self.driver_features
    }

    /// Whether the driver is ready.
    pub fn is_ready(&self) -> bool {
        self.status & DRIVER_OK != 0
    }

    /// The queues that the driver has enabled, at the beginning of their rings.
    pub fn enabled_queues(&self) -> impl Iterator<Item = (u16, QueueState)> {
        let event_idx = self.driver_features & feature(VIRTIO_RING_F_EVENT_IDX) != 0;
        (0..).zip(&self.queues).filter(|(_, q)| q.enabled).map(move |(index, q)| {
            let [desc_table, avail_ring, used_ring] = q.rings;
            let state = QueueState {
                max_size: q.max_size,
                next_avail: 0,
                next_used: 0,
                event_idx_enabled: event_idx,
                size: q.size,
                ready: true,
                desc_table,
                avail_ring,
                used_ring,
            };
            (index, state)
        })
    }

    /// A load.
    pub fn read(&self, notifier: &Notifier, offset: u64, data: &mut [u8]) {
        crate::virtio::read_structure(&self.image(notifier), offset, data);
    }

    /// All registers as bytes.
    fn image(&self, notifier: &Notifier) -> [u8; LENGTH] {
        let half = |features: u64, select: u32| match select {
            0 => features as u32,
            1 => (features >> 32) as u32,
            _ => 0,
        };
        let queue = self.queues.get(usize::from(self.queue_select));
        let out_of_service = if notifier.is_out_of_service() { NEEDS_RESET } else { 0 };
        let mut image = [0; LENGTH];
        let mut put = |at: usize, bytes: &[u8]| image[at..][..bytes.len()].copy_from_slice(bytes);
        put(0x00, &self.device_feature_select.to_le_bytes());
        put(0x04, &half(self.offered, self.device_feature_select).to_le_bytes());
        put(0x08, &self.driver_feature_select.to_le_bytes());
        put(0x0c, &half(self.driver_features, self.driver_feature_select).to_le_bytes());
        put(0x10, &notifier.configuration_vector().to_le_bytes());
        put(0x12, &(self.queues.len() as u16).to_le_bytes());
        put(0x14, &[self.status | out_of_service, notifier.generation()]);
        put(0x16, &self.queue_select.to_le_bytes());
        put(0x18, &queue.map_or(0, |q| q.size).to_le_bytes());
        put(0x1a, &notifier.queue_vector(self.queue_select).to_le_bytes());
        put(0x1c, &queue.map_or(0, |q| u16::from(q.enabled)).to_le_bytes());
        // queue_notify_off: each queue has its own address.
        put(0x1e, &queue.map_or(0, |_| self.queue_select).to_le_bytes());
        for (at, ring) in [0x20, 0x28, 0x30].into_iter().zip(queue.map_or([0; 3], |q| q.rings)) {
            put(at, &ring.to_le_bytes());
        }
        image
    }

    /// A store. Drivers access each register whole, the 64-bit ones in two halves (4.1.3.1); all else is ignored.
    pub fn write(&mut self, notifier: &Notifier, offset: u64, data: &[u8]) -> Asked {
        match (offset, data) {
            (register::DEVICE_STATUS, &[status]) => return self.set_status(status),
            (_, &[a, b]) => self.write_word(notifier, offset, u16::from_le_bytes([a, b])),
            (_, &[a, b, c, d]) => self.write_dword(offset, u32::from_le_bytes([a, b, c, d])),
            (_, &[a, b, c, d, e, f, g, h]) => {
                self.write_dword(offset, u32::from_le_bytes([a, b, c, d]));
                self.write_dword(offset + 4, u32::from_le_bytes([e, f, g, h]));
            }
            _ => {}
        }
        Asked::Nothing
    }

    fn write_word(&mut self, notifier: &Notifier, offset: u64, value: u16) {
        match offset {
            register::CONFIG_VECTOR => notifier.set_configuration_vector(value),
            register::QUEUE_SELECT => self.queue_select = value,
            register::QUEUE_VECTOR => notifier.set_queue_vector(self.queue_select, value),
            register::QUEUE_SIZE => {
                if let Some(q) = self.unused_queue()
                    && value.is_power_of_two()
                    && value <= q.max_size
                {
                    q.size = value;
                }
            }
            register::QUEUE_ENABLE => {
                // Only what a device that knows its features can use; and a queue is disabled by a reset only.
                if self.status & (FEATURES_OK | DRIVER_OK) == FEATURES_OK
                    && value == 1
                    && let Some(q) = self.unused_queue()
                {
                    q.enabled = true;
                }
            }
            _ => {}
        }
    }

    fn write_dword(&mut self, offset: u64, value: u32) {
        match offset {
            register::DEVICE_FEATURE_SELECT => self.device_feature_select = value,
            register::DRIVER_FEATURE_SELECT => self.driver_feature_select = value,
            register::DRIVER_FEATURE if self.status & FEATURES_OK == 0 && self.driver_feature_select < 2 => {
                let shift = 32 * self.driver_feature_select;
                let mask = u64::from(u32::MAX) << shift;
                self.driver_features = self.driver_features & !mask | u64::from(value) << shift;
            }
            register::QUEUE_DESC..register::QUEUE_END if offset.is_multiple_of(4) => {
                let ring = match offset & !7 {
                    register::QUEUE_DESC => 0,
                    register::QUEUE_DRIVER => 1,
                    _ => 2,
                };
                debug_assert!(ring < 2 || offset & !7 == register::QUEUE_DEVICE);
                if let Some(q) = self.unused_queue() {
                    let shift = 8 * (offset & 7);
                    let mask = u64::from(u32::MAX) << shift;
                    q.rings[ring] = q.rings[ring] & !mask | u64::from(value) << shift;
                }
            }
            _ => {}
        }
    }

    /// The selected queue, whose registers can be written as long as it is not enabled.
    fn unused_queue(&mut self) -> Option<&mut QueueRegisters> {
        self.queues.get_mut(usize::from(self.queue_select)).filter(|q| !q.enabled)
    }

    /// Status (2.1). Zero is a reset; otherwise bits are only added.
    fn set_status(&mut self, status: u8) -> Asked {
        if status == 0 {
            return Asked::Reset;
        }
        let mut added = status & !self.status & !NEEDS_RESET;
        if added & FEATURES_OK != 0 && !self.accepts_features() {
            // The driver reads it back, and sees that it must not go on.
            added &= !FEATURES_OK;
        }
        if (self.status | added) & FEATURES_OK == 0 {
            added &= !DRIVER_OK;
        }
        self.status |= added;
        if added & DRIVER_OK != 0 { Asked::Begin } else { Asked::Nothing }
    }

    /// Nothing that is not offered; and no device can do without VERSION_1 (6.1, 6.2).
    fn accepts_features(&self) -> bool {
        self.driver_features & !self.offered == 0 && self.driver_features & feature(VIRTIO_F_VERSION_1) != 0
    }

    /// The state.
    pub fn save(&self) -> SavedCommon {
        let queue =
            |q: &QueueRegisters| SavedQueue { size: q.size.into(), enabled: q.enabled, rings: q.rings.to_vec() };
        SavedCommon {
            status: self.status.into(),
            device_feature_select: self.device_feature_select,
            driver_feature_select: self.driver_feature_select,
            driver_features: self.driver_features,
            queue_select: self.queue_select.into(),
            queues: self.queues.iter().map(queue).collect(),
        }
    }

    /// Takes over a saved state; `Err` says what is wrong with it.
    pub fn restore(&mut self, saved: &SavedCommon) -> Result<(), &'static str> {
        if saved.queues.len() != self.queues.len() {
            return Err("the number of queues is another one");
        }
        if saved.driver_features & !self.offered != 0 {
            return Err("the driver uses features that the device does not have");
        }
        self.status = saved.status as u8 & !NEEDS_RESET;
        self.device_feature_select = saved.device_feature_select;
        self.driver_feature_select = saved.driver_feature_select;
        self.driver_features = saved.driver_features;
        self.queue_select = saved.queue_select as u16;
        for (q, saved) in self.queues.iter_mut().zip(&saved.queues) {
            let size = u16::try_from(saved.size).ok().filter(|s| s.is_power_of_two() && *s <= q.max_size);
            q.size = size.ok_or("a queue's size is not one that it can have")?;
            q.rings = saved.rings.as_slice().try_into().map_err(|_| "a queue has too few rings")?;
            q.enabled = saved.enabled;
        }
        Ok(())
    }
}
