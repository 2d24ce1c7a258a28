//! From the back end to the driver.
//!
//! How long a packet is shows only once it has been received. So as much memory is laid out for each as the longest
//! one may need, and what it did not fill is for the next. A driver that offers less gets packets by way of a buffer
//! here, as far as they fit.

use std::{collections::VecDeque, io};

use purlin_network::{Backend, MAX_PACKET, Offload, PacketHeader};
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use vm_memory::VolatileSlice;

use super::{
    super::{Chain, Malformed, Slices, Virtqueue, feature, fill},
    link::TURN,
    offload,
    pace::Pace,
};

/// Bytes of an Ethernet header with a VLAN tag.
const ETHERNET_HEADER: usize = 18;

/// Where `num_buffers` is in the header.
const NUM_BUFFERS: usize = 10;

/// How far it got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// The back end has no more.
    All,
    /// There may be more.
    Some,
    /// The driver has no memory left; it tells when it has.
    NoBuffers,
    /// The rate does not allow more now.
    Paced,
    /// The back end is gone.
    Gone,
    /// The driver does not use this pair of queues.
    NotInUse,
}

/// The receive queue's side.
pub struct Receiver<'q> {
    queue: &'q Virtqueue,
    /// Chains taken from the queue in this order, and not used.
    stock: VecDeque<Chain<'q>>,
    /// Bytes in them.
    room: usize,
    /// Bytes of the longest packet to expect.
    longest: usize,
    /// A packet may be spread over several chains.
    mergeable: bool,
    /// A packet for which the stock had no room, if it is not empty.
    waiting: Vec<u8>,
    /// Chains have been given back of which the driver has not been told.
    has_used: bool,
}

impl<'q> Receiver<'q> {
    /// The receiving side of a driver with these features, in a network of this MTU.
    pub fn new(queue: &'q Virtqueue, features: u64, mtu: u16) -> Self {
        let has = |bit| features & feature(bit) != 0;
        let is_large = offload(features).intersects(Offload::TSO4 | Offload::TSO6);
        let longest = if is_large { MAX_PACKET } else { PacketHeader::LENGTH + ETHERNET_HEADER + usize::from(mtu) };
        let (stock, waiting) = (VecDeque::new(), Vec::new());
        Self { queue, stock, room: 0, longest, mergeable: has(VIRTIO_NET_F_MRG_RXBUF), waiting, has_used: false }
    }

    /// Puts back what was taken and not used.
    pub fn put_back(&mut self) {
        // At most as many as the queue has.
        self.queue.put_back(self.stock.len() as u16);
        self.stock.clear();
        self.room = 0;
    }

    /// Receives what there is, and what its pace allows.
    pub fn receive(&mut self, backend: &Backend, mut pace: Option<&mut Pace>) -> Received {
        let mut result = Received::Some;
        for _ in 0..TURN {
            self.stock_up();
            if self.stock.is_empty() || !self.deliver_waiting() {
                result = Received::NoBuffers;
                break;
            }
            if pace.as_ref().is_some_and(|pace| !pace.may_go()) {
                result = Received::Paced;
                break;
            }
            match self.receive_one(backend) {
                Ok(0) => {
                    result = Received::Gone;
                    break;
                }
                Ok(length) => {
                    if let Some(pace) = &mut pace {
                        pace.charge(length.saturating_sub(PacketHeader::LENGTH));
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    result = Received::All;
                    break;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    tracing::debug!("cannot receive for the guest: {error}");
                    result = Received::Gone;
                    break;
                }
            }
        }
        if std::mem::take(&mut self.has_used) {
            self.queue.notify_driver();
        }
        result
    }

    /// Takes chains until the longest packet has room, or there are none.
    fn stock_up(&mut self) {
        self.queue.disable_notification();
        while self.stock.len() < self.wanted_chains() && self.room < self.longest {
            let Some(chain) = self.queue.pop() else {
                if self.queue.enable_notification() {
                    self.queue.disable_notification();
                    continue;
                }
                return;
            };
            let length = chain.writable_length();
            // 5.1.6.3.1: room for the header at least.
            if length < PacketHeader::LENGTH {
                return self.queue.notifier().needs_reset(&Malformed::Request);
            }
            self.room += length;
            self.stock.push_back(chain);
        }
    }

    /// The most chains that one packet may take.
    fn wanted_chains(&self) -> usize {
        if self.mergeable { self.queue.size().into() } else { 1 }
    }

    /// Receives one packet, straight into guest memory if it has room for any. Returns its length.
    fn receive_one(&mut self, backend: &Backend) -> io::Result<usize> {
        if self.room >= self.longest {
            let slices: Slices<'_> = self.stock.iter().flat_map(|chain| chain.writable.iter().cloned()).collect();
            let length = backend.receive(&slices)?;
            self.used(length.min(self.room));
            return Ok(length);
        }
        let mut packet = vec![0; MAX_PACKET];
        let length = backend.receive(&[VolatileSlice::from(&mut packet[..])])?;
        packet.truncate(length);
        self.waiting = packet;
        // If it has no room now it waits for more.
        self.deliver_waiting();
        Ok(length)
    }

    /// Delivers the packet that waits, if there is one. Returns whether there is none any more.
    fn deliver_waiting(&mut self) -> bool {
        let length = self.waiting.len();
        if length == 0 {
            return true;
        }
        if length > self.room {
            // As much as there will ever be: the packet is lost.
            let is_hopeless = self.stock.len() == self.wanted_chains();
            if is_hopeless {
                self.waiting.clear();
            }
            return is_hopeless;
        }
        let mut rest = &self.waiting[..];
        for chain in &self.stock {
            let count = fill(&chain.writable, rest);
            rest = &rest[count..];
        }
        self.waiting.clear();
        self.used(length);
        true
    }

    /// The first `length` bytes of the stock hold a packet.
    fn used(&mut self, length: usize) {
        if length < PacketHeader::LENGTH {
            // Nobody sends that; the memory is for the next.
            return;
        }
        let (mut left, mut used) = (length, Vec::new());
        let mut header: Slices<'q> = Vec::new();
        while left > 0 {
            let Some(chain) = self.stock.pop_front() else { break };
            let (head, room) = (chain.head(), chain.writable_length());
            if used.is_empty() {
                header = chain.writable;
            }
            let here = left.min(room);
            used.push((head, here as u32));
            left -= here;
            self.room -= room;
        }
        write_at(&header, NUM_BUFFERS, &(used.len() as u16).to_le_bytes());
        self.queue.push_all(&used);
        self.has_used = true;
    }
}

/// Writes `data` at an offset into slices.
fn write_at(slices: &Slices<'_>, offset: usize, data: &[u8]) {
    let mut skip = offset;
    let mut data = data;
    for slice in slices {
        if skip >= slice.len() {
            skip -= slice.len();
            continue;
        }
        let (here, rest) = data.split_at(data.len().min(slice.len() - skip));
        if let Ok(to) = slice.offset(skip) {
            to.copy_from(here);
        }
        (skip, data) = (0, rest);
    }
}
