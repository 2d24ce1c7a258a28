//! virtio 1.3 devices: what a device type is beside its transport.
//!
//! A device type implements [`VirtioDevice`]: who it is, its configuration, and what it does once a driver has set it
//! up ([`VirtioDevice::activate`]). What it does is a [`Running`], mostly [`Workers`]: threads that each do a [`Job`].
//! Everything else (discovery, negotiation, status, vectors, saving the queues) is the transport's, in [`pci`].
//!
//! | file | subject |
//! |---|---|
//! | `queue.rs` | a virtqueue in use: available chains in, used ones out, notifications both ways |
//! | `chain.rs` | a descriptor chain, checked once |
//! | `notifier.rs` | what a device tells its driver |
//! | `worker.rs` | threads that serve queues, and how they are held |
//! | `pci/` | the transport |
//! | others | a device type each |
//!
//! # Locks
//!
//! 1. the transport's registers;
//! 2. what a worker and its owner share;
//! 3. a device's own;
//! 4. a queue;
//! 5. MSI-X, then what the engine locks to deliver a message.

pub mod balloon;
pub mod block;
mod chain;
pub mod console;
pub mod net;
mod notifier;
pub mod pci;
mod queue;
pub mod rng;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod vsock;
mod worker;

use std::{io, sync::Arc};

use purlin_memory::GuestRam;
use purlin_state::{Section, StateError};

pub use self::{
    chain::{Chain, Malformed, Slices, fill},
    notifier::Notifier,
    queue::Virtqueue,
    worker::{Job, MOST_OTHERS, Told, Wake, Workers},
};

/// A feature bit as a mask.
pub const fn feature(bit: u32) -> u64 {
    1 << bit
}

/// A device type. Its methods are called with the transport's registers locked, one at a time.
pub trait VirtioDevice: Send {
    /// The instance's name, which is also that of its saved section and threads: `rng0`.
    fn name(&self) -> &str;

    /// The device type's number (virtio 1.3, 5).
    fn device_type(&self) -> u16;

    /// The class of its PCI function ([`crate::pci::Identity::class`]).
    fn class(&self) -> u32 {
        // Fits no class.
        0xff_00_00
    }

    /// Features of the type that are offered: bits 0 to 23 and 50 up. Those of rings and transport are added.
    fn features(&self) -> u64;

    /// The largest size of each queue: a power of two, at most 1024. There are so many queues; 1 to 64.
    fn queue_sizes(&self) -> Vec<u16>;

    /// A load from the configuration of the type (virtio 1.3, 5.x.4), which the device has filled with zeroes where
    /// the field does not exist. `offset` and length are the guest's.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// A store to it. Most types have nothing there that a driver writes.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// The driver is ready (DRIVER_OK): starts to serve the queues, held at first. On an error the driver is told to
    /// reset the device. What is returned is dropped when it does.
    fn activate(&mut self, driver: Activation) -> io::Result<Box<dyn Running>>;

    /// The driver has reset the device, and nothing is running any more.
    fn reset(&mut self) {}

    /// The state of the type, without queues and negotiated features, as a section named [`VirtioDevice::name`]. It
    /// is held. A type without state of its own returns [`nothing`].
    fn save(&self) -> Section;

    /// Takes over a section that [`VirtioDevice::save`] made. [`VirtioDevice::activate`] follows if the driver was
    /// ready.
    fn restore(&mut self, saved: &Section) -> Result<(), StateError>;
}

/// The saved section of a type that has no state of its own.
pub fn nothing(name: &str) -> Section {
    crate::stateless::Nothing::section(name)
}

/// What a device type gets of a driver that is ready.
pub struct Activation {
    /// The features that both have.
    pub features: u64,
    /// Guest memory.
    pub memory: Arc<GuestRam>,
    /// The queues that the driver has enabled, by rising [`Virtqueue::index`]. All rings are in guest memory.
    pub queues: Vec<Arc<Virtqueue>>,
    /// How to tell the driver of a change of configuration, or that the device needs a reset.
    pub notifier: Arc<Notifier>,
}

/// A device at work, from DRIVER_OK to the next reset. It begins held; its drop ends its threads.
pub trait Running: Send + Sync {
    /// The driver has made buffers available in queue `index`. Called on the vCPU's thread, several at once, held or
    /// not: does not wait.
    fn notify(&self, index: u16);

    /// When this returns, nothing of the device reads or writes guest memory or tells the driver anything, and no
    /// request is under way: each that was taken from a queue is used.
    fn hold(&self);

    /// Ends a hold. What has become available meanwhile is looked at.
    fn open(&self);
}

/// Copies what of a configuration structure a load wants; beyond its end there are zeroes.
pub fn read_structure(structure: &[u8], offset: u64, data: &mut [u8]) {
    let rest = usize::try_from(offset).ok().and_then(|offset| structure.get(offset..)).unwrap_or(&[]);
    data.fill(0);
    data.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
}
