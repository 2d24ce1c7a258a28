//! The memory balloon (virtio 1.3, 5.5): pages that the guest does not need are the host's again.
//!
//! The guest gives pages back in two ways: by as many as it is asked for, until it is asked for less (the balloon), or
//! by itself whatever is free just now (free page reporting). Either way they read as zeroes when the guest next uses
//! them: it need not tell before it does.
//!
//! | file | subject |
//! |---|---|
//! | `handle.rs` | what steers the device |
//! | `statistics.rs` | what the driver tells of the guest's memory |
//! | `server.rs` | the thread that serves the queues |

mod handle;
mod server;
mod statistics;
#[cfg(test)]
mod tests;

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use prost::Message;
use purlin_sandbox::Role;
use purlin_state::{Saved, Section, StateError};
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;

pub use self::{handle::BalloonHandle, statistics::Statistics};
use self::{server::Server, statistics::SavedStatistics};
use super::{Activation, Running, VirtioDevice, Wake, Workers, feature, read_structure};

/// Queues (5.5.2).
const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
const STATISTICS: u16 = 2;
/// The queue of reports is 4. But Linux numbers only the queues that it uses, and there is none for free page hints.
const REPORTING: [u16; 2] = [3, 4];
const QUEUES: u16 = 5;

/// Entries of each queue.
const QUEUE_SIZE: u16 = 128;

/// Bytes of a page as the driver counts them (5.5.6).
const PAGE: u64 = 4096;

/// Features (5.5.3).
const F_STATS_VQ: u32 = 1;
const F_DEFLATE_ON_OOM: u32 = 2;
const F_PAGE_POISON: u32 = 4;
const F_REPORTING: u32 = 5;

/// Where `actual` and `poison_val` are in the configuration (5.5.4).
const ACTUAL: u64 = 4;
const POISON: u64 = 12;

/// What a balloon is to be like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BalloonConfig {
    /// Bytes that the guest is asked to give back at first.
    pub size: u64,
    /// The guest may take pages back when it would otherwise kill a program.
    pub deflate_on_oom: bool,
    /// The guest is to tell which pages are free.
    pub free_page_reporting: bool,
}

impl Default for BalloonConfig {
    fn default() -> Self {
        Self { size: 0, deflate_on_oom: true, free_page_reporting: true }
    }
}

/// The device.
pub struct Balloon {
    name: String,
    config: BalloonConfig,
    handle: BalloonHandle,
    /// What the driver fills free pages with.
    poison: Arc<AtomicU32>,
    /// The driver may not know the target.
    owes_news: bool,
}

impl Balloon {
    /// A device with this instance's name.
    pub fn new(name: &str, config: BalloonConfig) -> io::Result<Self> {
        let handle = BalloonHandle::new(config.size)?;
        Ok(Self { name: name.to_owned(), config, handle, poison: Arc::default(), owes_news: false })
    }

    /// What steers it.
    pub fn handle(&self) -> BalloonHandle {
        self.handle.clone()
    }

    /// `struct virtio_balloon_config` (5.5.4).
    fn structure(&self) -> Vec<u8> {
        // There is no free page hinting: its field is 0.
        let fields = [self.handle.target_pages(), self.handle.actual_pages(), 0, self.poison.load(Ordering::SeqCst)];
        fields.iter().flat_map(|field| field.to_le_bytes()).collect()
    }
}

impl VirtioDevice for Balloon {
    fn name(&self) -> &str {
        &self.name
    }

    fn device_type(&self) -> u16 {
        VIRTIO_ID_BALLOON as u16
    }

    fn features(&self) -> u64 {
        let mut features = feature(F_STATS_VQ);
        if self.config.deflate_on_oom {
            features |= feature(F_DEFLATE_ON_OOM);
        }
        if self.config.free_page_reporting {
            // A driver that fills free pages with something says what, and that they are to keep it.
            features |= feature(F_REPORTING) | feature(F_PAGE_POISON);
        }
        features
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; QUEUES.into()]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_structure(&self.structure(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let Ok(value) = data.try_into().map(u32::from_le_bytes) else { return };
        match offset {
            ACTUAL => self.handle.set_actual_pages(value),
            POISON => self.poison.store(value, Ordering::SeqCst),
            _ => {}
        }
    }

    fn activate(&mut self, driver: Activation) -> io::Result<Box<dyn Running>> {
        let (handle, poison) = (self.handle.clone(), self.poison.clone());
        let has_reporting = driver.features & feature(F_REPORTING) != 0;
        if std::mem::take(&mut self.owes_news) {
            handle.announce();
        }
        let job = move |wake: &Wake| {
            let queue = |index| driver.queues.iter().find(|queue| queue.index() == index).map(|queue| &**queue);
            let server = Server {
                handle,
                memory: &driver.memory,
                notifier: &driver.notifier,
                poison,
                inflate: queue(INFLATE),
                deflate: queue(DEFLATE),
                statistics: queue(STATISTICS),
                reporting: REPORTING.into_iter().filter_map(queue).filter(|_| has_reporting).collect(),
                buffer: None,
                is_known: false,
                is_wanted: false,
            };
            server.run(wake);
        };
        let mut workers = Workers::default();
        workers.start(
            &self.name,
            &[INFLATE, DEFLATE, STATISTICS, REPORTING[0], REPORTING[1]],
            Some(Role::Device),
            Box::new(job),
        )?;
        Ok(Box::new(workers))
    }

    /// The driver has all of its memory again. What it is asked for stays.
    fn reset(&mut self) {
        self.handle.set_actual_pages(0);
        *self.handle.lock() = Statistics::default();
        self.poison.store(0, Ordering::SeqCst);
        self.owes_news = false;
    }

    fn save(&self) -> Section {
        let saved = SavedBalloon {
            target: self.handle.target_pages(),
            actual: self.handle.actual_pages(),
            poison: self.poison.load(Ordering::SeqCst),
            statistics: Some(self.handle.lock().save()),
        };
        Section::named(&self.name, &saved)
    }

    fn restore(&mut self, saved: &Section) -> Result<(), StateError> {
        let saved: SavedBalloon = saved.decode()?;
        self.handle.set_target_pages(saved.target);
        self.handle.set_actual_pages(saved.actual);
        self.poison.store(saved.poison, Ordering::SeqCst);
        *self.handle.lock() = saved.statistics.as_ref().map(Statistics::restored).unwrap_or_default();
        // It may have changed while the machine stood still.
        self.owes_news = true;
        Ok(())
    }
}

/// The saved state. Pages are of 4 KiB.
#[derive(Clone, PartialEq, Eq, Message)]
struct SavedBalloon {
    #[prost(uint32, tag = "1")]
    target: u32,
    #[prost(uint32, tag = "2")]
    actual: u32,
    #[prost(uint32, tag = "3")]
    poison: u32,
    #[prost(message, optional, tag = "4")]
    statistics: Option<SavedStatistics>,
}

impl Saved for SavedBalloon {
    const NAME: &'static str = "virtio-balloon";
    const VERSION: u32 = 1;
}
