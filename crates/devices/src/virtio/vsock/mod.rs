//! The socket device (virtio 1.3, 5.10): stream connections between programs in the guest and programs of the host's.
//!
//! The host's side is a Unix socket, as Firecracker established it: a host program connects to it and says
//! `CONNECT PORT`, and once the guest has accepted it reads `OK HOSTPORT`; the guest's connections to the host's port P
//! lead to the program that listens at the socket's path with `_P` behind it.
//!
//! | file | subject |
//! |---|---|
//! | `packet.rs` | the header before each packet |
//! | `connection.rs` | a connection's state and credit |
//! | `table.rs` | all connections |
//! | `socket.rs` | the Unix socket |
//! | `host.rs` | the host's ends, and how programs say where they want to |
//! | `server.rs` | the thread between all of them and the queues |

mod connection;
mod host;
mod lent;
mod packet;
mod server;
mod socket;
mod table;
#[cfg(test)]
mod tests;

use std::{io, ops::RangeInclusive, sync::Arc};

use prost::Message;
use purlin_sandbox::Role;
use purlin_state::{Saved, Section, StateError};
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;

pub use self::socket::{HostSocket, SocketError};
use self::{
    host::Host,
    server::{Queues, Server},
};
use super::{Activation, Running, VirtioDevice, Wake, Workers, feature, read_structure};

/// Queues (5.10.2), under the driver's names.
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const EVENT: u16 = 2;

/// Entries of each queue.
const QUEUE_SIZE: u16 = 256;

/// VIRTIO_VSOCK_F_STREAM (5.10.3).
const F_STREAM: u32 = 0;

/// The context IDs that a guest can have (5.10.4): less stand for the hypervisor and the host, more for any.
pub const GUEST_CIDS: RangeInclusive<u32> = 3..=u32::MAX - 1;

/// A guest's address, and where it meets the host.
#[derive(Clone, Debug)]
pub struct VsockConfig {
    /// The guest's context ID, in [`GUEST_CIDS`].
    pub guest_cid: u32,
    /// The host's side.
    pub socket: Arc<HostSocket>,
}

/// The device.
pub struct Vsock {
    name: String,
    guest_cid: u32,
    socket: Arc<HostSocket>,
    /// The driver has connections of before a restore, and is to be told that they are gone.
    owes_reset: bool,
}

impl Vsock {
    /// A device with this instance's name.
    pub fn new(name: &str, config: VsockConfig) -> Self {
        let VsockConfig { guest_cid, socket } = config;
        Self { name: name.to_owned(), guest_cid, socket, owes_reset: false }
    }
}

impl VirtioDevice for Vsock {
    fn name(&self) -> &str {
        &self.name
    }

    fn device_type(&self) -> u16 {
        VIRTIO_ID_VSOCK as u16
    }

    fn class(&self) -> u32 {
        // A communication controller, other.
        0x07_80_00
    }

    fn features(&self) -> u64 {
        feature(F_STREAM)
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 3]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // `struct virtio_vsock_config`
        read_structure(&u64::from(self.guest_cid).to_le_bytes(), offset, data);
    }

    fn activate(&mut self, driver: Activation) -> io::Result<Box<dyn Running>> {
        let host = Host::new(self.socket.clone())?;
        let (guest_cid, owes_reset) = (self.guest_cid.into(), self.owes_reset);
        let job = move |wake: &Wake| {
            let queue = |index| driver.queues.iter().find(|queue| queue.index() == index).map(|queue| &**queue);
            let queues = Queues { receive: queue(RECEIVE), transmit: queue(TRANSMIT), event: queue(EVENT) };
            Server::new(queues, host, guest_cid, owes_reset).run(wake);
        };
        let mut workers = Workers::default();
        workers.start(&self.name, &[RECEIVE, TRANSMIT, EVENT], Some(Role::Vsock), Box::new(job))?;
        Ok(Box::new(workers))
    }

    fn reset(&mut self) {
        self.owes_reset = false;
    }

    fn save(&self) -> Section {
        Section::named(&self.name, &SavedVsock { guest_cid: self.guest_cid })
    }

    fn restore(&mut self, saved: &Section) -> Result<(), StateError> {
        let saved: SavedVsock = saved.decode()?;
        if !GUEST_CIDS.contains(&saved.guest_cid) {
            return Err(StateError::corrupt(&self.name, "no guest has that context ID"));
        }
        self.guest_cid = saved.guest_cid;
        // 5.10.6.7: connections do not survive it.
        self.owes_reset = true;
        Ok(())
    }
}

/// The guest keeps its address. Its connections are gone, which it is told.
#[derive(Clone, PartialEq, Eq, Message)]
struct SavedVsock {
    #[prost(uint32, tag = "1")]
    guest_cid: u32,
}

impl Saved for SavedVsock {
    const NAME: &'static str = "virtio-vsock";
    const VERSION: u32 = 1;
}
