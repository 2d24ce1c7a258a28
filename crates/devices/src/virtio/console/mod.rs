//! The console device (virtio 1.3, 5.3): one port, characters both ways, and the size of the terminal.
//!
//! What the device is connected to is a [`Port`], whose input waits there until the driver offers buffers, and whose
//! output takes what it has room for: a terminal that takes nothing holds up the driver's buffers, but no vCPU.
//!
//! | file | subject |
//! |---|---|
//! | `port.rs` | what the host sees of it |
//! | `server.rs` | the thread between the port and the queues |
//! | `settling.rs` | when the driver can hear |

mod port;
mod server;
mod settling;
#[cfg(test)]
mod tests;

use std::{io, sync::Arc};

use prost::Message;
use purlin_sandbox::Role;
use purlin_state::{Saved, Section, StateError};
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;

pub use self::port::{Port, Size};
use self::{server::Server, settling::Settling};
use super::{Activation, Running, VirtioDevice, Wake, Workers, feature, read_structure};

/// Queues of port 0 (5.3.2).
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;

/// Entries of each. Linux puts a page into each of the receive queue.
const QUEUE_SIZE: u16 = 64;

/// Feature bits (5.3.3): the configuration has the size of the terminal…
const VIRTIO_CONSOLE_F_SIZE: u32 = 0;
/// …and a register that prints a character without a queue.
const VIRTIO_CONSOLE_F_EMERG_WRITE: u32 = 2;

/// Offset of `emerg_wr` in `struct virtio_console_config` (5.3.4).
const EMERGENCY_WRITE: u64 = 8;

/// The device.
pub struct Console {
    name: String,
    port: Arc<Port>,
}

impl Console {
    /// A device with this instance's name, connected to `port`.
    pub fn new(name: &str, port: Arc<Port>) -> Self {
        Self { name: name.to_owned(), port }
    }
}

impl VirtioDevice for Console {
    fn name(&self) -> &str {
        &self.name
    }

    fn device_type(&self) -> u16 {
        VIRTIO_ID_CONSOLE as u16
    }

    fn class(&self) -> u32 {
        // A communication controller of no further kind.
        0x07_80_00
    }

    fn features(&self) -> u64 {
        feature(VIRTIO_CONSOLE_F_SIZE) | feature(VIRTIO_CONSOLE_F_EMERG_WRITE)
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2]
    }

    /// `cols` and `rows`; 0 where the port has no size.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let Size { columns, rows } = self.port.size();
        let [[a, b], [c, d]] = [columns, rows].map(u16::to_le_bytes);
        read_structure(&[a, b, c, d], offset, data);
    }

    /// An emergency write works before the driver has set anything up (5.3.4.1), and waits for nothing.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (EMERGENCY_WRITE, Some(character)) = (offset, data.first()) {
            self.port.print_now(*character);
        }
    }

    fn activate(&mut self, driver: Activation) -> io::Result<Box<dyn Running>> {
        let queue = |index| driver.queues.iter().find(|queue| queue.index() == index).cloned();
        let server = Server {
            port: self.port.clone(),
            receive: queue(RECEIVE),
            transmit: queue(TRANSMIT),
            notifier: driver.notifier,
            wants_size: driver.features & feature(VIRTIO_CONSOLE_F_SIZE) != 0,
            settling: Settling::new()?,
        };
        let mut workers = Workers::default();
        workers.start(
            &self.name,
            &[RECEIVE, TRANSMIT],
            Some(Role::Device),
            Box::new(move |wake: &Wake| server.run(wake)),
        )?;
        Ok(Box::new(workers))
    }

    /// What was typed and not read waits for the next driver.
    fn reset(&mut self) {
        self.port.forget_driver();
    }

    fn save(&self) -> Section {
        Section::named(&self.name, &self.port.save())
    }

    fn restore(&mut self, saved: &Section) -> Result<(), StateError> {
        let saved: SavedConsole = saved.decode()?;
        self.port.restore(saved).map_err(|what| StateError::corrupt(&self.name, what))
    }
}

/// The saved state.
#[derive(Clone, PartialEq, Eq, Message)]
struct SavedConsole {
    /// What was typed, and no buffer has taken yet.
    #[prost(bytes = "vec", tag = "1")]
    input: Vec<u8>,
    /// Bytes of the next chain of the transmit queue that have been printed already.
    #[prost(uint64, tag = "2")]
    printed: u64,
    /// The size that the driver was told of last, if it was.
    #[prost(message, optional, tag = "3")]
    told: Option<SavedSize>,
    /// The driver has had the time to finish setting itself up.
    #[prost(bool, tag = "4")]
    is_settled: bool,
}

impl Saved for SavedConsole {
    const NAME: &'static str = "virtio-console";
    const VERSION: u32 = 1;
}

/// A terminal's size.
#[derive(Clone, PartialEq, Eq, Message)]
struct SavedSize {
    #[prost(uint32, tag = "1")]
    columns: u32,
    #[prost(uint32, tag = "2")]
    rows: u32,
}
