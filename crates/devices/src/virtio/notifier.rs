//! What a device tells its driver: buffers are used, the configuration has changed, the device needs a reset
//! (virtio 1.3, 2.3 and 2.1.2).

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering},
};

use crate::pci::Msix;

/// No vector: nothing is sent (virtio 1.3, 4.1.5.1.2.1).
pub const NO_VECTOR: u16 = 0xffff;

/// ISR status: a queue.
const ISR_QUEUE: u8 = 1 << 0;
/// ISR status: the configuration.
const ISR_CONFIGURATION: u8 = 1 << 1;

/// A device's notifications to its driver, from any thread. Nothing here waits.
pub struct Notifier {
    name: String,
    msix: Arc<Msix>,
    configuration_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
    isr: AtomicU8,
    generation: AtomicU8,
    needs_reset: AtomicBool,
    /// A guest that breaks its device again and again is reported once.
    reported: AtomicBool,
}

impl Notifier {
    pub(super) fn new(name: &str, msix: Arc<Msix>, queues: usize) -> Self {
        Self {
            name: name.to_owned(),
            msix,
            configuration_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            isr: AtomicU8::new(0),
            generation: AtomicU8::new(0),
            needs_reset: AtomicBool::new(false),
            reported: AtomicBool::new(false),
        }
    }

    /// Buffers of queue `index` have been used.
    pub fn used_buffers(&self, index: u16) {
        if let Some(vector) = self.queue_vectors.get(usize::from(index)) {
            self.send(vector, ISR_QUEUE);
        }
    }

    /// The device's configuration is another one.
    pub fn configuration_changed(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.send(&self.configuration_vector, ISR_CONFIGURATION);
    }

    /// The driver did what no driver does, or the device cannot go on: it is out of service until it is reset.
    pub fn needs_reset(&self, reason: &dyn std::fmt::Display) {
        if self.needs_reset.swap(true, Ordering::SeqCst) {
            return;
        }
        if !self.reported.swap(true, Ordering::Relaxed) {
            tracing::warn!("{} waits for its driver to reset it: {reason}", self.name);
        }
        self.send(&self.configuration_vector, ISR_CONFIGURATION);
    }

    /// Whether the device waits for a reset. It leaves its queues alone then.
    pub fn is_out_of_service(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }

    fn send(&self, vector: &AtomicU16, isr: u8) {
        if self.msix.is_enabled() {
            self.msix.raise(vector.load(Ordering::SeqCst));
        } else {
            // Nobody is interrupted, for there is no INTx; but the driver may look (4.1.4.5.1).
            self.isr.fetch_or(isr, Ordering::SeqCst);
        }
    }

    /// A load from ISR status, which clears it.
    pub(super) fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::SeqCst)
    }

    pub(super) fn generation(&self) -> u8 {
        self.generation.load(Ordering::SeqCst)
    }

    pub(super) fn configuration_vector(&self) -> u16 {
        self.configuration_vector.load(Ordering::SeqCst)
    }

    pub(super) fn queue_vector(&self, index: u16) -> u16 {
        self.queue_vectors.get(usize::from(index)).map_or(NO_VECTOR, |v| v.load(Ordering::SeqCst))
    }

    pub(super) fn set_configuration_vector(&self, vector: u16) {
        self.configuration_vector.store(self.existing(vector), Ordering::SeqCst);
    }

    pub(super) fn set_queue_vector(&self, index: u16, vector: u16) {
        if let Some(v) = self.queue_vectors.get(usize::from(index)) {
            v.store(self.existing(vector), Ordering::SeqCst);
        }
    }

    /// A vector that there is not reads back as none, by which the driver knows (4.1.5.1.2.1).
    fn existing(&self, vector: u16) -> u16 {
        if vector < self.msix.count() { vector } else { NO_VECTOR }
    }

    /// As after power-up; but the generation goes on.
    pub(super) fn reset(&self) {
        self.set_configuration_vector(NO_VECTOR);
        (0..self.queue_vectors.len() as u16).for_each(|index| self.set_queue_vector(index, NO_VECTOR));
        self.isr.store(0, Ordering::SeqCst);
        self.needs_reset.store(false, Ordering::SeqCst);
    }

    pub(super) fn save(&self) -> SavedNotifier {
        SavedNotifier {
            configuration_vector: self.configuration_vector().into(),
            queue_vectors: self.queue_vectors.iter().map(|v| v.load(Ordering::SeqCst).into()).collect(),
            isr: self.isr.load(Ordering::SeqCst).into(),
            generation: self.generation().into(),
            needs_reset: self.is_out_of_service(),
        }
    }

    pub(super) fn restore(&self, saved: &SavedNotifier) {
        self.set_configuration_vector(saved.configuration_vector as u16);
        for (index, vector) in (0..).zip(&saved.queue_vectors) {
            self.set_queue_vector(index, *vector as u16);
        }
        self.isr.store(saved.isr as u8, Ordering::SeqCst);
        self.generation.store(saved.generation as u8, Ordering::SeqCst);
        self.needs_reset.store(saved.needs_reset, Ordering::SeqCst);
    }
}

/// The saved state.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(super) struct SavedNotifier {
    #[prost(uint32, tag = "1")]
    configuration_vector: u32,
    #[prost(uint32, repeated, tag = "2")]
    queue_vectors: Vec<u32>,
    #[prost(uint32, tag = "3")]
    isr: u32,
    #[prost(uint32, tag = "4")]
    generation: u32,
    #[prost(bool, tag = "5")]
    needs_reset: bool,
}
