mod several;

use std::{
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use purlin_network::PacketHeader;
use rustix::{
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair,
        sockopt::{Timeout, set_socket_timeout},
    },
};
use virtio_bindings::virtio_net::VIRTIO_NET_HDR_GSO_TCPV4;

use super::*;
use crate::{
    pci::PciFunction,
    virtio::testing::{Buffer, Driver, EVENT_IDX, INDIRECT, SLOT, page},
};

const RX: usize = 0;
const TX: usize = 1;
const CONFIG: NetConfig = NetConfig { mac: [0x52, 0x54, 0, 1, 2, 3], mtu: 1400 };
const MERGEABLE: u64 = feature(VIRTIO_NET_F_MRG_RXBUF);
const LARGE: u64 = feature(VIRTIO_NET_F_GUEST_CSUM) | feature(VIRTIO_NET_F_GUEST_TSO4);

/// A driver and its network.
struct Pair {
    driver: Driver,
    network: OwnedFd,
}

fn device() -> (Net, OwnedFd) {
    limited_device(None)
}

fn limited_device(rate: Option<Rate>) -> (Net, OwnedFd) {
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    set_socket_timeout(&theirs, Timeout::Recv, Some(Duration::from_secs(30))).unwrap();
    let network = Network { config: CONFIG, backends: vec![Arc::new(Backend::socket(ours).unwrap())], rate };
    (Net::new("net0", network), theirs)
}

impl Pair {
    fn new(features: u64) -> Self {
        let (net, network) = device();
        let mut driver = Driver::new(Box::new(net));
        driver.initialize(features);
        Self { driver, network }
    }

    /// What the network gets next.
    fn next_message(&mut self) -> Vec<u8> {
        let mut packet = vec![0; 70_000];
        let (length, _) = recv(&self.network, &mut packet[..], RecvFlags::empty()).unwrap();
        packet.truncate(length);
        packet
    }

    /// The packet that the network gets next; requests are left out.
    fn next(&mut self) -> Vec<u8> {
        std::iter::repeat_with(|| self.next_message()).find(|message| message.len() != 4).unwrap()
    }

    /// What the network is told that the driver takes, from a reset on.
    fn requests(&mut self) -> [Vec<u8>; 2] {
        [self.next_message(), self.next_message()]
    }

    fn send(&self, packet: &[u8]) {
        send(&self.network, packet, SendFlags::NOSIGNAL).unwrap();
    }

    /// Memory for packets.
    fn offer(&mut self, lengths: &[u32]) -> Vec<Buffer> {
        let mut buffers = Vec::new();
        for &length in lengths {
            let buffer = self.driver.writable(length);
            self.driver.offer(RX, &[buffer]);
            buffers.push(buffer);
        }
        self.driver.notify(RX);
        buffers
    }

    /// The next packet that the driver receives, with its header.
    fn received(&mut self, buffers: &[Buffer]) -> Vec<u8> {
        let mut used = vec![self.driver.wait_used(RX)];
        let mut data = self.driver.content(buffers[0]);
        let count = u16::from_le_bytes([data[10], data[11]]);
        // All of a packet's buffers are there as soon as the first is.
        used.extend((1..count).map(|_| self.driver.take_used(RX).unwrap()));
        data.clear();
        for (used, &buffer) in used.iter().zip(buffers) {
            data.extend(&self.driver.content(buffer)[..used.written as usize]);
        }
        data
    }

    fn is_quiet(&mut self) -> bool {
        self.driver.take_used(RX).is_none()
    }
}

/// A packet with this header and `length` bytes of frame, whose header says that it is in one buffer.
fn packet(header: PacketHeader, length: usize) -> Vec<u8> {
    let header = PacketHeader { num_buffers: 1, ..header };
    let frame = (0..length).map(|i| (i * 7 + i / 256) as u8);
    header.to_bytes().into_iter().chain(frame).collect()
}

fn plain(length: usize) -> Vec<u8> {
    packet(PacketHeader::default(), length)
}

fn large(length: usize) -> Vec<u8> {
    let header = PacketHeader {
        flags: PacketHeader::NEEDS_CSUM,
        gso_type: VIRTIO_NET_HDR_GSO_TCPV4 as u8,
        hdr_len: 54,
        gso_size: 1460,
        csum_start: 34,
        csum_offset: 16,
        num_buffers: 1,
    };
    packet(header, length)
}

#[test]
fn configuration() {
    let pair = Pair::new(0);
    assert_eq!(pair.driver.read::<6>(page::DEVICE), 0x0302_0100_5452);
    assert_eq!(pair.driver.read::<2>(page::DEVICE + 6), 1, "the link is up");
    assert_eq!(pair.driver.read::<2>(page::DEVICE + 8), 1, "one pair of queues");
    assert_eq!(pair.driver.read::<2>(page::DEVICE + 10), 1400);
}

#[test]
fn packets_go_out_as_they_are() {
    let mut pair = Pair::new(feature(VIRTIO_NET_F_CSUM) | feature(VIRTIO_NET_F_HOST_TSO4) | INDIRECT | EVENT_IDX);
    for length in [14, 60, 1514, 60_000] {
        let sent = large(length);
        let (header, rest) = sent.split_at(12);
        let (first, second) = rest.split_at(length / 3);
        let buffers = [header, first, second].map(|part| pair.driver.readable(part));
        let head =
            if length > 100 { pair.driver.offer_indirect(TX, &buffers) } else { pair.driver.offer(TX, &buffers) };
        pair.driver.notify(TX);
        assert!(pair.next() == sent);
        let used = pair.driver.wait_used(TX);
        assert_eq!((used.head, used.written), (head, 0));
    }
}

#[test]
fn what_is_no_packet_is_used_and_not_sent() {
    let mut pair = Pair::new(0);
    let (short, huge, good) = (pair.driver.readable(&[0; 11]), pair.driver.readable(&[0; 70_000]), plain(60));
    assert_eq!(pair.driver.request(TX, &[short]).written, 0);
    assert_eq!(pair.driver.request(TX, &[huge]).written, 0);
    let buffer = pair.driver.readable(&good);
    pair.driver.request(TX, &[buffer]);
    assert!(pair.next() == good);
}

#[test]
fn a_packet_comes_in_one_buffer() {
    for features in [0, MERGEABLE, EVENT_IDX] {
        let mut pair = Pair::new(features);
        let buffers = pair.offer(&[1600, 1600]);
        for (i, length) in [60, 1414].into_iter().enumerate() {
            pair.send(&plain(length));
            assert!(pair.received(&buffers[i..]) == plain(length), "{features:#x}");
        }
    }
}

#[test]
fn a_large_packet_is_spread_over_buffers() {
    let mut pair = Pair::new(MERGEABLE | LARGE | EVENT_IDX);
    // More than the longest packet needs, and less.
    for sizes in [[5000; 15], [4500; 15]] {
        let buffers = pair.offer(&sizes);
        pair.send(&large(60_000));
        let received = pair.received(&buffers);
        assert_eq!(received[10..12], (60_012u16.div_ceil(sizes[0] as u16)).to_le_bytes());
        assert!(received[..10] == large(60_000)[..10] && received[12..] == large(60_000)[12..]);
        // The rest is for small ones.
        let rest = &buffers[60_012usize.div_ceil(sizes[0] as usize)..];
        for &buffer in rest {
            pair.send(&plain(100));
            assert!(pair.received(&[buffer]) == plain(100));
        }
        assert!(pair.is_quiet());
    }
}

#[test]
fn a_packet_waits_for_buffers() {
    let mut pair = Pair::new(MERGEABLE | LARGE);
    let mut buffers = pair.offer(&[2000]);
    pair.send(&plain(5000));
    pair.send(&plain(100));
    // Not before the driver has room.
    buffers.extend(pair.offer(&[2000]));
    buffers.extend(pair.offer(&[2000, 2000]));
    let received = pair.received(&buffers);
    assert!(received[12..] == plain(5000)[12..]);
    assert!(pair.received(&buffers[3..]) == plain(100));
}

#[test]
fn without_merging_what_does_not_fit_is_lost() {
    let mut pair = Pair::new(LARGE);
    let buffers = pair.offer(&[2000]);
    pair.send(&plain(5000));
    pair.send(&plain(100));
    assert!(pair.received(&buffers) == plain(100));
}

#[test]
fn the_network_learns_what_the_driver_takes() {
    let (net, network) = device();
    let mut pair = Pair { driver: Driver::new(Box::new(net)), network };
    pair.driver.initialize(LARGE | feature(VIRTIO_NET_F_GUEST_TSO6));
    let all = Offload::CSUM | Offload::TSO4 | Offload::TSO6;
    assert_eq!(pair.requests(), [vec![0; 4], all.bits().to_le_bytes().to_vec()]);
    pair.driver.set_status(0);
    assert_eq!(pair.next_message(), [0; 4]);
}

/// Buffers that the driver put there go on being used where the device had stopped.
#[test]
fn it_goes_on_after_a_move() {
    let mut pair = Pair::new(MERGEABLE | LARGE | EVENT_IDX);
    let buffers = pair.offer(&[2000; 8]);
    pair.send(&plain(100));
    assert!(pair.received(&buffers) == plain(100));
    pair.driver.function.hold();
    let (net, network) = device();
    let mut pair = Pair { driver: pair.driver.moved_to(Box::new(net)), network };
    assert_eq!(pair.requests()[1], (Offload::CSUM | Offload::TSO4).bits().to_le_bytes());
    pair.driver.function.open();
    pair.send(&plain(5000));
    assert!(pair.received(&buffers[1..])[12..] == plain(5000)[12..]);
    pair.send(&plain(200));
    assert!(pair.received(&buffers[4..]) == plain(200));
    let (sent, buffer) = (plain(300), pair.driver.readable(&plain(300)));
    pair.driver.request(TX, &[buffer]);
    assert!(pair.next() == sent);
    assert_eq!(pair.driver.read::<6>(page::DEVICE), 0x0302_0100_5452);
}

#[test]
fn a_full_network_holds_packets_back_and_loses_none() {
    let mut pair = Pair::new(0);
    let sent = plain(30_000);
    let buffer = pair.driver.readable(&sent);
    // Far more than a socket holds, and than the ring has entries.
    let mut taken = 0;
    for _ in 0..40 {
        for _ in 0..16 {
            pair.driver.offer(TX, &[buffer]);
        }
        pair.driver.notify(TX);
        for _ in 0..16 {
            assert!(pair.next() == sent);
            taken += 1;
        }
        for _ in 0..16 {
            pair.driver.wait_used(TX);
        }
    }
    assert_eq!(taken, 640);
}

#[test]
fn a_hold_while_the_network_is_full_leaves_the_rest_in_the_queue() {
    let mut pair = Pair::new(0);
    let sent = plain(60_000);
    let buffer = pair.driver.readable(&sent);
    for _ in 0..16 {
        pair.driver.offer(TX, &[buffer]);
    }
    pair.driver.notify(TX);
    // The socket has room for some.
    pair.driver.wait_used(TX);
    let start = Instant::now();
    let mut used = 1;
    while start.elapsed() < Duration::from_millis(100) {
        used += usize::from(pair.driver.take_used(TX).is_some());
    }
    assert!(used < 16);
    pair.driver.function.hold();
    let (net, network) = device();
    let old = std::mem::replace(&mut pair.network, network);
    pair.driver = pair.driver.moved_to(Box::new(net));
    pair.driver.function.open();
    while pair.driver.take_used(TX).is_some() {
        used += 1;
    }
    let there =
        std::iter::from_fn(|| recv(&old, &mut vec![0; 70_000][..], RecvFlags::DONTWAIT).ok().filter(|(n, _)| *n > 0));
    let there = there.filter(|(length, _)| *length == sent.len()).count();
    for _ in there..16 {
        assert!(pair.next() == sent);
    }
    for _ in used..16 {
        pair.driver.wait_used(TX);
    }
    let more = recv(&pair.network, &mut [0; 16][..], RecvFlags::DONTWAIT);
    assert_eq!(more.unwrap_err(), Errno::AGAIN, "none was sent twice");
}

#[test]
fn a_rate_holds_both_ways() {
    let (net, network) = limited_device(Some(Rate { per_second: 1_000_000, burst: 1 }));
    let mut pair = Pair { driver: Driver::new(Box::new(net)), network };
    pair.driver.initialize(MERGEABLE | LARGE);
    let buffers = pair.offer(&[10_012; 16]);
    let buffer = pair.driver.readable(&plain(10_000));
    let start = Instant::now();
    for sent in &buffers {
        pair.send(&plain(10_000));
        pair.driver.offer(TX, &[buffer]);
        pair.driver.notify(TX);
        assert!(pair.received(&[*sent]) == plain(10_000));
        assert!(pair.next() == plain(10_000));
    }
    // All but the first have waited for the one before. (How much longer it took is the host's affair.)
    assert!(start.elapsed() >= Duration::from_millis(150), "{:?}", start.elapsed());
}

#[test]
fn a_network_that_is_gone_is_an_unplugged_cable() {
    let mut pair = Pair::new(feature(VIRTIO_NET_F_STATUS));
    pair.offer(&[2000]);
    drop(pair.network);
    let start = Instant::now();
    while pair.driver.read::<2>(page::DEVICE + 6) != 0 {
        assert!(start.elapsed() < Duration::from_secs(30));
        std::thread::sleep(Duration::from_millis(1));
    }
    let start = Instant::now();
    while !pair.driver.messages.take().contains(&(0xfee0_0000, 0x40)) {
        assert!(start.elapsed() < Duration::from_secs(30), "the driver is not told");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn hostile_chains_stop_the_device_and_nothing_else() {
    let outside = Buffer { address: 2 * SLOT - 8, length: 4096, writable: true };
    let nowhere = Buffer { address: u64::MAX - 4, length: 4096, writable: false };
    let tiny = Buffer { address: 0x1000, length: 11, writable: true };
    let readable = Buffer { address: 0x1000, length: 2000, writable: false };
    for (queue, buffer) in [(RX, outside), (TX, nowhere), (RX, tiny), (RX, readable)] {
        let mut pair = Pair::new(MERGEABLE);
        pair.driver.offer(queue, &[buffer]);
        pair.driver.notify(queue);
        pair.driver.wait_out_of_service();
        // A reset makes it a device again.
        pair.driver.initialize(0);
        let buffer = pair.driver.readable(&plain(60));
        pair.driver.request(TX, &[buffer]);
        assert!(pair.next() == plain(60));
    }
}

#[test]
fn buffers_that_overlap_hurt_only_who_laid_them_out() {
    let mut pair = Pair::new(MERGEABLE | LARGE);
    let whole = pair.driver.writable(4000);
    let buffer = Buffer { length: 3000, ..whole };
    let overlapping = Buffer { address: buffer.address + 1000, ..buffer };
    // Over the rings themselves, too.
    let ring = Buffer { address: pair.driver.queues[RX].rings[0] + 512, length: 2000, writable: true };
    for b in [buffer, overlapping, buffer, ring] {
        pair.driver.offer(RX, &[b]);
    }
    pair.driver.notify(RX);
    for _ in 0..4 {
        pair.send(&plain(2900));
    }
    pair.driver.wait_used(RX);
    pair.driver.initialize(0);
    let good = pair.driver.readable(&plain(60));
    pair.driver.request(TX, &[good]);
    while pair.next() != plain(60) {}
}
