//! The block device (virtio 1.3, 5.2): a disk of `purlin-storage`, with a thread for each queue.
//!
//! | file | subject |
//! |---|---|
//! | `config.rs` | what the driver is told of the disk |
//! | `request.rs` | from a descriptor chain to what is asked of the disk |
//! | `waiting.rs` | requests that have failed and wait to be made anew |
//! | `server.rs` | a queue's thread: requests begin, complete, and are drained for a pause |

mod config;
mod request;
mod server;
mod waiting;

use std::{fmt, io, path::Path, sync::Arc};

use prost::Message;
use purlin_sandbox::Role;
use purlin_state::{Saved, Section, StateError};
use purlin_storage::{Disk, IoError};
use virtio_bindings::{virtio_blk::VIRTIO_BLK_F_FLUSH, virtio_ids::VIRTIO_ID_BLOCK};

use self::{
    server::Server,
    waiting::{SavedWaiting, Waiting},
};
use super::{Activation, Running, VirtioDevice, Wake, Workers, feature, read_structure};

/// The size of each queue.
const QUEUE_SIZE: u16 = 256;
/// The most queues. More bring nothing on one disk.
const MOST_QUEUES: u16 = 4;

/// What comes of a request that the host cannot carry out: it is out of space, or its disk fails. (What the guest should
/// not have asked for is always answered with an error.)
#[derive(Clone, Default)]
pub enum OnIoError {
    /// The guest hears of it.
    #[default]
    Report,
    /// It waits until the device has been held and opened again, and is then made anew. Whoever is called, with the image
    /// and the error, sees to that; called on a queue's thread, which must not wait for it.
    Wait(OnFailure),
}

/// Who hears of a request that the host could not carry out: of the image and the error.
pub type OnFailure = Arc<dyn Fn(&Path, IoError) + Send + Sync>;

impl fmt::Debug for OnIoError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if matches!(self, Self::Report) { "Report" } else { "Wait" })
    }
}

/// A disk as the guest sees it.
pub struct Block {
    name: String,
    disk: Arc<Disk>,
    on_io_error: OnIoError,
    /// For each queue.
    waiting: Vec<Arc<Waiting>>,
}

/// What of the disk must be the same after a restore.
#[derive(Clone, PartialEq, Eq, Message)]
struct SavedBlock {
    /// Bytes.
    #[prost(uint64, tag = "1")]
    size: u64,
    #[prost(bool, tag = "2")]
    read_only: bool,
    /// For each queue the requests that wait to be made anew.
    #[prost(message, repeated, tag = "3")]
    waiting: Vec<SavedWaiting>,
}

impl Saved for SavedBlock {
    const NAME: &'static str = "virtio-blk";
    const VERSION: u32 = 1;
}

impl Block {
    /// A device with this instance's name, for a machine with so many processors.
    pub fn new(name: &str, disk: Arc<Disk>, cpus: u32, on_io_error: OnIoError) -> Self {
        let waiting = (0..cpus.clamp(1, MOST_QUEUES.into())).map(|_| Arc::default()).collect();
        Self { name: name.to_owned(), disk, on_io_error, waiting }
    }
}

impl VirtioDevice for Block {
    fn name(&self) -> &str {
        &self.name
    }

    fn device_type(&self) -> u16 {
        VIRTIO_ID_BLOCK as u16
    }

    fn class(&self) -> u32 {
        // Mass storage, SCSI: what firmware and old kernels look for.
        0x01_00_00
    }

    fn features(&self) -> u64 {
        config::features(&self.disk)
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; self.waiting.len()]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_structure(&config::structure(&self.disk, self.waiting.len() as u16), offset, data);
    }

    fn activate(&mut self, driver: Activation) -> io::Result<Box<dyn Running>> {
        // A driver that cannot flush takes every write for stable (5.2.6.2).
        let write_through = driver.features & feature(VIRTIO_BLK_F_FLUSH) == 0;
        let mut workers = Workers::default();
        for queue in driver.queues {
            let (index, disk, notifier) = (queue.index(), self.disk.clone(), driver.notifier.clone());
            let (on_io_error, waiting) = (self.on_io_error.clone(), self.waiting[usize::from(index)].clone());
            let job = move |wake: &Wake| {
                let served = purlin_storage::Queue::scope(&disk, |io| {
                    // Not before: no new io_uring is made from here on.
                    purlin_sandbox::thread(Role::Disk).map_err(io::Error::other)?;
                    Server::new(&queue, io, &disk, write_through, &on_io_error, &waiting).run(wake);
                    Ok(())
                });
                if let Err(error) = served.flatten() {
                    notifier.needs_reset(&error);
                }
            };
            workers.start(&format!("{}-{index}", self.name), &[index], None, Box::new(job))?;
        }
        Ok(Box::new(workers))
    }

    fn reset(&mut self) {
        self.waiting.iter().for_each(|waiting| waiting.clear());
    }

    fn save(&self) -> Section {
        let waiting = self.waiting.iter().map(|waiting| waiting.save()).collect();
        let saved = SavedBlock { size: self.disk.size(), read_only: self.disk.read_only(), waiting };
        Section::named(&self.name, &saved)
    }

    fn restore(&mut self, saved: &Section) -> Result<(), StateError> {
        let saved: SavedBlock = saved.decode()?;
        if (saved.size, saved.read_only) != (self.disk.size(), self.disk.read_only()) {
            return Err(StateError::corrupt(&self.name, "the disk has another size or mode than the one saved with"));
        }
        if saved.waiting.len() > self.waiting.len() || !saved.waiting.iter().all(|w| w.fits(QUEUE_SIZE)) {
            return Err(StateError::corrupt(
                &self.name,
                "there are more requests waiting than the queues have room for",
            ));
        }
        self.waiting.iter().zip(saved.waiting).for_each(|(waiting, saved)| waiting.restore(saved));
        Ok(())
    }
}

#[cfg(test)]
mod tests;
