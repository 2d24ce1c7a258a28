//! The network device (virtio 1.3, 5.1): Ethernet frames between a driver and a [`Backend`], straight from and to
//! guest memory.
//!
//! One pair of queues, served by one thread ([`link`]). Checksums and segmentation are left undone as far as both
//! sides can do without: the header before each frame is the same here and at the back end.

mod link;
mod pace;
mod receive;
#[cfg(test)]
mod tests;
mod transmit;

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use prost::Message;
use purlin_network::{Backend, Offload};
use purlin_state::{Saved, Section, StateError};
use purlin_storage::limit::Rate;
use virtio_bindings::{
    virtio_ids::VIRTIO_ID_NET,
    virtio_net::{
        VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
        VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
        VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
    },
};

use self::link::Link;
use super::{Activation, Running, VirtioDevice, Wake, Workers, feature, read_structure};

/// Queues of the one pair (virtio 1.3, 5.1.2).
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;

/// Entries of each: room for some dozen of the largest packets in page-sized buffers.
const QUEUE_SIZE: u16 = 256;

/// What is offered.
const FEATURES: &[u32] = &[
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_STATUS,
];

/// What the driver is told of its network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NetConfig {
    /// Its Ethernet address.
    pub mac: [u8; 6],
    /// Bytes of the largest IP packet, at least 68.
    pub mtu: u16,
}

/// A network as a device is connected to it.
#[derive(Clone, Debug)]
pub struct Network {
    /// What the driver is told.
    pub config: NetConfig,
    /// Where packets come from and go to.
    pub backend: Arc<Backend>,
    /// The most that goes each way, in bytes of frames each second.
    pub rate: Option<Rate>,
}

/// The device.
pub struct Net {
    name: String,
    config: NetConfig,
    backend: Arc<Backend>,
    rate: Option<Rate>,
    /// The back end is there.
    link_up: Arc<AtomicBool>,
}

impl Net {
    /// A device with this instance's name.
    pub fn new(name: &str, network: Network) -> Self {
        let Network { config, backend, rate } = network;
        Self { name: name.to_owned(), config, backend, rate, link_up: Arc::new(AtomicBool::new(true)) }
    }

    /// `struct virtio_net_config` (5.1.4), as far as the features offered give it a meaning.
    fn structure(&self) -> [u8; 12] {
        let mut bytes = [0; 12];
        bytes[..6].copy_from_slice(&self.config.mac);
        let status = if self.link_up.load(Ordering::SeqCst) { VIRTIO_NET_S_LINK_UP as u16 } else { 0 };
        bytes[6..8].copy_from_slice(&status.to_le_bytes());
        // max_virtqueue_pairs
        bytes[8..10].copy_from_slice(&1u16.to_le_bytes());
        bytes[10..].copy_from_slice(&self.config.mtu.to_le_bytes());
        bytes
    }
}

impl VirtioDevice for Net {
    fn name(&self) -> &str {
        &self.name
    }

    fn device_type(&self) -> u16 {
        VIRTIO_ID_NET as u16
    }

    fn class(&self) -> u32 {
        // An Ethernet controller.
        0x02_00_00
    }

    fn features(&self) -> u64 {
        FEATURES.iter().fold(0, |mask, &bit| mask | feature(bit))
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_structure(&self.structure(), offset, data);
    }

    fn activate(&mut self, driver: Activation) -> io::Result<Box<dyn Running>> {
        self.backend.set_offload(offload(driver.features))?;
        let queue = |index| driver.queues.iter().find(|queue| queue.index() == index).cloned();
        let link = Link {
            backend: self.backend.clone(),
            receive: queue(RECEIVE),
            transmit: queue(TRANSMIT),
            features: driver.features,
            mtu: self.config.mtu,
            rate: self.rate,
            notifier: driver.notifier,
            link_up: self.link_up.clone(),
        };
        let mut workers = Workers::default();
        workers.start(&self.name, &[RECEIVE, TRANSMIT], Box::new(move |wake: &Wake| link.run(wake)))?;
        Ok(Box::new(workers))
    }

    fn reset(&mut self) {
        if let Err(error) = self.backend.set_offload(Offload::empty()) {
            tracing::warn!("{}: the network is not told of a reset: {error}", self.name);
        }
    }

    fn save(&self) -> Section {
        let NetConfig { mac, mtu } = self.config;
        Section::named(&self.name, &SavedNet { mac: mac.to_vec(), mtu: mtu.into() })
    }

    fn restore(&mut self, saved: &Section) -> Result<(), StateError> {
        let saved: SavedNet = saved.decode()?;
        let corrupt = |what| StateError::corrupt(&self.name, what);
        let mac = saved.mac.try_into().map_err(|_| corrupt("an Ethernet address has six bytes"))?;
        let mtu = u16::try_from(saved.mtu).map_err(|_| corrupt("the MTU is too large"))?;
        self.config = NetConfig { mac, mtu };
        Ok(())
    }
}

/// What a driver with these features takes (5.1.3.1).
fn offload(features: u64) -> Offload {
    let has = |bit| features & feature(bit) != 0;
    let mut offload = Offload::empty();
    offload.set(Offload::CSUM, has(VIRTIO_NET_F_GUEST_CSUM));
    offload.set(Offload::TSO4, has(VIRTIO_NET_F_GUEST_TSO4));
    offload.set(Offload::TSO6, has(VIRTIO_NET_F_GUEST_TSO6));
    offload.set(Offload::TSO_ECN, has(VIRTIO_NET_F_GUEST_ECN));
    offload.consistent()
}

/// What was told to the driver is what it is told after a move. The link comes up with the new back end.
#[derive(Clone, PartialEq, Eq, Message)]
struct SavedNet {
    #[prost(bytes = "vec", tag = "1")]
    mac: Vec<u8>,
    #[prost(uint32, tag = "2")]
    mtu: u32,
}

impl Saved for SavedNet {
    const NAME: &'static str = "virtio-net";
    const VERSION: u32 = 1;
}
