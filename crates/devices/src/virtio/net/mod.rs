//! The network device (virtio 1.3, 5.1): Ethernet frames between a driver and a [`Backend`], straight from and to
//! guest memory.
//!
//! One pair of queues or several, each served by a thread ([`link`]) and with a back end of its own. Checksums and
//! segmentation are left undone as far as both sides can do without: the header before each frame is the same here and
//! at the back end.

mod control;
mod link;
mod pace;
mod pair;
mod receive;
#[cfg(test)]
mod tests;
mod transmit;

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU16, Ordering},
    },
};

use prost::Message;
use purlin_network::{Backend, Offload};
use purlin_sandbox::Role;
use purlin_state::{Saved, Section, StateError};
use purlin_storage::limit::Rate;
use virtio_bindings::{
    virtio_ids::VIRTIO_ID_NET,
    virtio_net::{
        VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN,
        VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4,
        VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
        VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
    },
};

use self::{
    control::Control,
    link::Link,
    pace::Limits,
    pair::{Pair, use_pairs},
};
use super::{Activation, Running, VirtioDevice, Wake, Workers, feature, read_structure};

/// Entries of each queue for packets: room for some dozen of the largest packets in page-sized buffers.
const QUEUE_SIZE: u16 = 256;
/// Entries of the control queue: a driver waits for the answer to each command.
const CONTROL_QUEUE_SIZE: u16 = 64;

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
/// What is offered where there are several pairs of queues.
const SEVERAL: &[u32] = &[VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ];

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
    /// Where packets come from and go to: one for each pair of queues, 1 to [`MOST_PAIRS`].
    pub backends: Vec<Arc<Backend>>,
    /// The most that goes each way, in bytes of frames each second.
    pub rate: Option<Rate>,
}

/// The most pairs of queues. (A device has 64 queues at most.)
pub const MOST_PAIRS: usize = 16;

/// The device.
pub struct Net {
    name: String,
    config: NetConfig,
    pairs: Vec<Arc<Pair>>,
    /// How many of them the driver uses.
    in_use: Arc<AtomicU16>,
    rate: Option<Rate>,
    /// The back end is there.
    link_up: Arc<AtomicBool>,
}

impl Net {
    /// A device with this instance's name.
    ///
    /// # Panics
    /// If there are no or more than [`MOST_PAIRS`] back ends: a mistake of the machine's.
    pub fn new(name: &str, network: Network) -> Self {
        let Network { config, backends, rate } = network;
        assert!((1..=MOST_PAIRS).contains(&backends.len()));
        let pairs = backends.into_iter().enumerate().map(|(index, backend)| Arc::new(Pair::new(backend, index)));
        let (in_use, link_up) = (Arc::new(AtomicU16::new(1)), Arc::new(AtomicBool::new(true)));
        Self { name: name.to_owned(), config, pairs: pairs.collect(), in_use, rate, link_up }
    }

    /// max_virtqueue_pairs
    fn most_pairs(&self) -> u16 {
        self.pairs.len() as u16
    }

    /// Linux shows the first 15 bytes.
    fn name_of_thread(&self, pair: u16) -> String {
        if self.pairs.len() > 1 { format!("{}-{pair}", self.name) } else { self.name.clone() }
    }

    /// All back ends lead to the same network: one of them is told what the driver takes.
    fn set_offload(&self, offload: Offload) -> io::Result<()> {
        self.pairs[0].backend.set_offload(offload)
    }

    /// `struct virtio_net_config` (5.1.4), as far as the features offered give it a meaning.
    fn structure(&self) -> [u8; 12] {
        let mut bytes = [0; 12];
        bytes[..6].copy_from_slice(&self.config.mac);
        let status = if self.link_up.load(Ordering::SeqCst) { VIRTIO_NET_S_LINK_UP as u16 } else { 0 };
        bytes[6..8].copy_from_slice(&status.to_le_bytes());
        bytes[8..10].copy_from_slice(&self.most_pairs().to_le_bytes());
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
        let several = if self.pairs.len() > 1 { SEVERAL } else { &[] };
        FEATURES.iter().chain(several).fold(0, |mask, &bit| mask | feature(bit))
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let mut sizes = vec![QUEUE_SIZE; 2 * self.pairs.len()];
        if self.pairs.len() > 1 {
            sizes.push(CONTROL_QUEUE_SIZE);
        }
        sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_structure(&self.structure(), offset, data);
    }

    fn activate(&mut self, driver: Activation) -> io::Result<Box<dyn Running>> {
        let has = |bit| driver.features & feature(bit) != 0;
        let queue = |index| driver.queues.iter().find(|queue| queue.index() == index).cloned();
        // 5.1.2: receiveq1, transmitq1 and so on, then the control queue.
        let pairs = if has(VIRTIO_NET_F_MQ) { self.most_pairs() } else { 1 };
        let usable = (0..pairs).take_while(|&i| queue(2 * i).is_some() && queue(2 * i + 1).is_some()).count() as u16;
        // One that was restored may say anything.
        let in_use = self.in_use.load(Ordering::SeqCst).clamp(1, usable.max(1));
        self.in_use.store(in_use, Ordering::SeqCst);
        self.set_offload(offload(driver.features))?;
        use_pairs(&self.pairs, in_use)?;

        let mut workers = Workers::default();
        let mut started = Vec::new();
        let limits = self.rate.map(Limits::new);
        for (pair, first) in self.pairs.iter().zip((0..2 * pairs).step_by(2)) {
            let link = Link {
                pair: pair.clone(),
                receive: queue(first),
                transmit: queue(first + 1),
                features: driver.features,
                mtu: self.config.mtu,
                limits: limits.clone(),
                notifier: driver.notifier.clone(),
                link_up: self.link_up.clone(),
            };
            let name = self.name_of_thread(first / 2);
            let wake = workers.start(
                &name,
                &[first, first + 1],
                Some(Role::Device),
                Box::new(move |wake: &Wake| link.run(wake)),
            )?;
            started.push((pair.clone(), wake));
        }
        if let Some(queue) = queue(2 * pairs).filter(|_| has(VIRTIO_NET_F_CTRL_VQ)) {
            let in_use = self.in_use.clone();
            let (index, name) = (queue.index(), format!("{}-control", self.name));
            let control = Control { queue, pairs: started, usable, in_use };
            workers.start(&name, &[index], Some(Role::Device), Box::new(move |wake: &Wake| control.run(wake)))?;
        }
        Ok(Box::new(workers))
    }

    fn reset(&mut self) {
        self.in_use.store(1, Ordering::SeqCst);
        if let Err(error) = use_pairs(&self.pairs, 1).and_then(|()| self.set_offload(Offload::empty())) {
            tracing::warn!("{}: the network is not told of a reset: {error}", self.name);
        }
    }

    fn save(&self) -> Section {
        let NetConfig { mac, mtu } = self.config;
        let pairs = self.in_use.load(Ordering::SeqCst);
        Section::named(&self.name, &SavedNet { mac: mac.to_vec(), mtu: mtu.into(), pairs: pairs.into() })
    }

    fn restore(&mut self, saved: &Section) -> Result<(), StateError> {
        let saved: SavedNet = saved.decode()?;
        let corrupt = |what| StateError::corrupt(&self.name, what);
        let mac = saved.mac.try_into().map_err(|_| corrupt("an Ethernet address has six bytes"))?;
        let mtu = u16::try_from(saved.mtu).map_err(|_| corrupt("the MTU is too large"))?;
        // Without the field there was one.
        let pairs = u16::try_from(saved.pairs.max(1)).ok().filter(|&pairs| pairs <= self.most_pairs());
        let pairs = pairs.ok_or_else(|| corrupt("the network has fewer queues than the one saved with"))?;
        self.in_use.store(pairs, Ordering::SeqCst);
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
    /// Pairs of queues that the driver uses.
    #[prost(uint32, tag = "3")]
    pairs: u32,
}

impl Saved for SavedNet {
    const NAME: &'static str = "virtio-net";
    const VERSION: u32 = 1;
}
