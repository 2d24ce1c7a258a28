//! The guest's end of the wire: what is sent to it, with its headers.

use std::{
    collections::VecDeque,
    io::IoSlice,
    net::IpAddr,
    os::fd::{AsFd, OwnedFd},
};

use rustix::{
    io::Errno,
    net::{SendAncillaryBuffer, SendFlags, sendmsg},
};
use smoltcp::{
    phy::ChecksumCapabilities,
    wire::{
        EthernetAddress, EthernetFrame, EthernetProtocol, EthernetRepr, IpProtocol, Ipv4Packet, Ipv4Repr, Ipv6Packet,
        Ipv6Repr,
    },
};

use super::{checksum::Checksum, plan::GATEWAY_MAC};
use crate::{Offload, PacketHeader};

/// Bytes of all headers at most: packet header, Ethernet, IPv6, TCP with options.
const MAX_HEADERS: usize = PacketHeader::LENGTH + 14 + 40 + 60;

/// Answers that wait for room: what is beyond that is lost, as on any wire.
const MAX_WAITING: usize = 256;
/// Their bytes.
const MAX_WAITING_BYTES: usize = 1 << 20;

/// Whether something has been sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Sent {
    /// It has (or can never be).
    Yes,
    /// There is no room now; [`Link::is_blocked`] until there is.
    Blocked,
}

/// An IP packet to the guest.
pub struct Outgoing<'a> {
    /// From whom.
    pub source: IpAddr,
    /// To which address of the guest's; of the same family.
    pub destination: IpAddr,
    /// What is in it.
    pub protocol: IpProtocol,
    /// The header of that protocol. Its checksum field is filled where `checksum` says that it has one.
    pub header: &'a [u8],
    /// What follows, in two pieces.
    pub payload: (&'a [u8], &'a [u8]),
    /// Where in the header the checksum is still to be put.
    pub checksum: Option<usize>,
    /// The guest's system may cut a TCP segment into such as have this much payload.
    pub segment_size: Option<u16>,
}

/// The packet socket.
pub struct Link {
    socket: OwnedFd,
    /// What the guest takes.
    pub offload: Offload,
    /// Where the guest is.
    pub guest: EthernetAddress,
    blocked: bool,
    closed: bool,
    waiting: VecDeque<Vec<u8>>,
    waiting_bytes: usize,
    ident: u16,
}

impl Link {
    /// A link to the guest whose network device is at the other end of `socket`.
    pub fn new(socket: OwnedFd, guest: EthernetAddress) -> Self {
        let waiting = VecDeque::new();
        let offload = Offload::empty();
        Self { socket, offload, guest, blocked: false, closed: false, waiting, waiting_bytes: 0, ident: 0 }
    }

    /// The descriptor, to read from and to wait for.
    pub fn fd(&self) -> impl AsFd + '_ {
        &self.socket
    }

    /// Whether there was no room the last time.
    pub fn is_blocked(&self) -> bool {
        self.blocked
    }

    /// Whether the other end is gone.
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// Whether TCP segments to this kind of address may be larger than the MTU.
    pub fn takes_large_segments(&self, to: IpAddr) -> bool {
        self.offload.contains(if to.is_ipv4() { Offload::TSO4 } else { Offload::TSO6 })
    }

    /// The other end is gone.
    pub fn close(&mut self) {
        self.closed = true;
    }

    /// There is room again: sends what waited.
    pub fn unblock(&mut self) {
        self.blocked = false;
        while let Some(packet) = self.waiting.pop_front() {
            if self.transmit(&[IoSlice::new(&packet)]) == Sent::Blocked {
                self.waiting.push_front(packet);
                return;
            }
            self.waiting_bytes -= packet.len();
        }
    }

    /// Sends a packet if there is room.
    pub fn send(&mut self, packet: &Outgoing<'_>) -> Sent {
        if self.blocked {
            return Sent::Blocked;
        }
        let headers = self.headers(packet);
        let (first, second) = packet.payload;
        self.transmit(&[IoSlice::new(headers.bytes()), IoSlice::new(first), IoSlice::new(second)])
    }

    /// Sends a packet, or lets it wait for room: for answers that nobody would make again.
    pub fn send_or_wait(&mut self, packet: &Outgoing<'_>) {
        if self.send(packet) == Sent::Blocked {
            let headers = self.headers(packet);
            self.wait([headers.bytes(), packet.payload.0, packet.payload.1].concat());
        }
    }

    /// Sends a frame that is not IP, or lets it wait.
    pub fn send_frame(&mut self, destination: EthernetAddress, protocol: EthernetProtocol, payload: &[u8]) {
        let mut headers = Headers::new(PacketHeader::default());
        headers.ethernet(destination, protocol);
        let packet = [headers.bytes(), payload].concat();
        if self.blocked || self.transmit(&[IoSlice::new(&packet)]) == Sent::Blocked {
            self.wait(packet);
        }
    }

    fn wait(&mut self, packet: Vec<u8>) {
        if self.waiting.len() < MAX_WAITING && self.waiting_bytes + packet.len() <= MAX_WAITING_BYTES {
            self.waiting_bytes += packet.len();
            self.waiting.push_back(packet);
        }
    }

    fn transmit(&mut self, packet: &[IoSlice<'_>]) -> Sent {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        loop {
            match sendmsg(&self.socket, packet, &mut SendAncillaryBuffer::default(), flags) {
                Ok(_) => return Sent::Yes,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    self.blocked = true;
                    return Sent::Blocked;
                }
                Err(Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN) => {
                    self.closed = true;
                    return Sent::Yes;
                }
                Err(error) => {
                    tracing::debug!("a packet to the guest is lost: {error}");
                    return Sent::Yes;
                }
            }
        }
    }

    /// All headers of a packet, with its checksum or with what is needed to make it.
    fn headers(&mut self, packet: &Outgoing<'_>) -> Headers {
        let ip_header = if packet.source.is_ipv4() { 20 } else { 40 };
        let length = packet.header.len() + packet.payload.0.len() + packet.payload.1.len();
        let mut sum = Checksum::pseudo_header(packet.source, packet.destination, packet.protocol.into(), length);
        let mut header = PacketHeader::default();
        let checksum = packet.checksum.map(|offset| {
            if self.offload.contains(Offload::CSUM) {
                header.flags = PacketHeader::NEEDS_CSUM;
                header.csum_start = 14 + ip_header;
                header.csum_offset = offset as u16;
                return (offset, sum.partial());
            }
            sum.add(packet.header);
            sum.add(packet.payload.0);
            sum.add(packet.payload.1);
            // RFC 768: a sum of zero is sent as all ones. To TCP it is the same.
            (offset, if sum.finish() == 0 { 0xffff } else { sum.finish() })
        });
        if let Some(size) = packet.segment_size {
            let is_v4 = packet.source.is_ipv4();
            header.gso_type = if is_v4 { PacketHeader::GSO_TCPV4 } else { PacketHeader::GSO_TCPV6 };
            header.gso_size = size;
            header.hdr_len = 14 + ip_header + packet.header.len() as u16;
        }
        let mut headers = Headers::new(header);
        self.ident = self.ident.wrapping_add(1);
        headers.ip(self.guest, packet, length, self.ident);
        let at = headers.push(packet.header);
        if let Some((offset, value)) = checksum {
            headers.bytes[at + offset..][..2].copy_from_slice(&value.to_be_bytes());
        }
        headers
    }
}

/// Headers in the making.
struct Headers {
    bytes: [u8; MAX_HEADERS],
    len: usize,
}

impl Headers {
    fn new(header: PacketHeader) -> Self {
        let mut new = Self { bytes: [0; MAX_HEADERS], len: 0 };
        new.push(&header.to_bytes());
        new
    }

    fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    /// Adds bytes and returns where they are.
    fn push(&mut self, bytes: &[u8]) -> usize {
        let at = self.len;
        self.room(bytes.len()).copy_from_slice(bytes);
        at
    }

    fn room(&mut self, len: usize) -> &mut [u8] {
        self.len += len;
        &mut self.bytes[self.len - len..self.len]
    }

    fn ethernet(&mut self, destination: EthernetAddress, protocol: EthernetProtocol) {
        let repr = EthernetRepr { src_addr: GATEWAY_MAC, dst_addr: destination, ethertype: protocol };
        repr.emit(&mut EthernetFrame::new_unchecked(self.room(repr.buffer_len())));
    }

    fn ip(&mut self, guest: EthernetAddress, packet: &Outgoing<'_>, payload_len: usize, ident: u16) {
        // To everybody on the link: DHCP before there is an address, router advertisements.
        let mac = |is_broadcast: bool, multicast: EthernetAddress| if is_broadcast { multicast } else { guest };
        match (packet.source, packet.destination) {
            (IpAddr::V4(src_addr), IpAddr::V4(dst_addr)) => {
                let mac = mac(dst_addr.is_broadcast(), EthernetAddress::BROADCAST);
                self.ethernet(mac, EthernetProtocol::Ipv4);
                let next_header = packet.protocol;
                let repr = Ipv4Repr { src_addr, dst_addr, next_header, payload_len, hop_limit: 64 };
                let mut ip = Ipv4Packet::new_unchecked(self.room(repr.buffer_len()));
                repr.emit(&mut ip, &ChecksumCapabilities::ignored());
                ip.set_ident(ident);
                ip.fill_checksum();
            }
            (IpAddr::V6(src_addr), IpAddr::V6(dst_addr)) => {
                let last = dst_addr.octets();
                let multicast = EthernetAddress([0x33, 0x33, last[12], last[13], last[14], last[15]]);
                self.ethernet(mac(dst_addr.is_multicast(), multicast), EthernetProtocol::Ipv6);
                // RFC 4861 6.1.2: neighbours check that their messages were not forwarded.
                let hop_limit = if packet.protocol == IpProtocol::Icmpv6 { 255 } else { 64 };
                let next_header = packet.protocol;
                let repr = Ipv6Repr { src_addr, dst_addr, next_header, payload_len, hop_limit };
                repr.emit(&mut Ipv6Packet::new_unchecked(self.room(repr.buffer_len())));
            }
            _ => unreachable!("a packet has addresses of one family"),
        }
    }
}
