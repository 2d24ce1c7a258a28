//! ICMP and ICMPv6: echo, and telling the guest what cannot be reached.

use std::net::IpAddr;

use rustix::io::Errno;
use smoltcp::{
    phy::ChecksumCapabilities,
    wire::{
        Icmpv4DstUnreachable, Icmpv4Packet, Icmpv4Repr, Icmpv6DstUnreachable, Icmpv6Packet, Icmpv6Repr, IpProtocol,
        Ipv4Repr, Ipv6Repr,
    },
};

use super::{
    link::{Link, Outgoing},
    plan::{GATEWAY_V4, GATEWAY_V6},
};

/// Why something cannot be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// No route to its network.
    Network,
    /// No such host there, or it does not answer.
    Host,
    /// Nobody at that port.
    Port,
    /// Not allowed.
    Prohibited,
}

impl Why {
    /// What ICMP has for an error of `connect`, if it is not that the other side refuses.
    pub fn of(error: Errno) -> Option<Self> {
        match error {
            Errno::NETUNREACH | Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL => Some(Self::Network),
            Errno::HOSTUNREACH | Errno::HOSTDOWN | Errno::TIMEDOUT => Some(Self::Host),
            Errno::ACCESS | Errno::PERM => Some(Self::Prohibited),
            _ => None,
        }
    }
}

/// An echo request or reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Echo<'a> {
    /// A request, otherwise a reply.
    pub is_request: bool,
    /// Whose it is.
    pub ident: u16,
    /// Which one.
    pub seq: u16,
    /// What is to come back.
    pub data: &'a [u8],
}

impl<'a> Echo<'a> {
    /// Parses an ICMP or ICMPv6 message: type, code, checksum, identifier, sequence number, data (RFC 792, RFC 4443
    /// 4.1).
    pub fn parse(is_v4: bool, bytes: &'a [u8]) -> Option<Self> {
        let (head, data) = bytes.split_at_checked(8)?;
        let (request, reply) = types(is_v4);
        let is_request = head[0] == request;
        if (!is_request && head[0] != reply) || head[1] != 0 {
            return None;
        }
        let word = |at: usize| u16::from_be_bytes([head[at], head[at + 1]]);
        Some(Self { is_request, ident: word(4), seq: word(6), data })
    }

    /// The first eight bytes, without a checksum.
    pub fn header(&self, is_v4: bool) -> [u8; 8] {
        let (request, reply) = types(is_v4);
        let [i, d] = self.ident.to_be_bytes();
        let [s, q] = self.seq.to_be_bytes();
        [if self.is_request { request } else { reply }, 0, 0, 0, i, d, s, q]
    }

    /// Sends it to the guest.
    pub fn send(&self, link: &mut Link, source: IpAddr, destination: IpAddr) {
        let is_v4 = source.is_ipv4();
        send(link, source, destination, &self.header(is_v4), self.data);
    }
}

/// Types of request and reply.
fn types(is_v4: bool) -> (u8, u8) {
    if is_v4 { (8, 0) } else { (128, 129) }
}

/// Sends a message whose checksum is still to be made. Unlike TCP's and UDP's, it is never left to the guest.
pub fn send(link: &mut Link, source: IpAddr, destination: IpAddr, header: &[u8; 8], data: &[u8]) {
    use super::checksum::Checksum;
    let protocol = if source.is_ipv4() { IpProtocol::Icmp } else { IpProtocol::Icmpv6 };
    // RFC 4443 2.3: with the pseudo-header; RFC 792: without.
    let mut sum = match source {
        IpAddr::V4(_) => Checksum::default(),
        IpAddr::V6(_) => Checksum::pseudo_header(source, destination, protocol.into(), header.len() + data.len()),
    };
    sum.add(header);
    sum.add(data);
    let mut header = *header;
    header[2..4].copy_from_slice(&sum.finish().to_be_bytes());
    link.send_or_wait(&Outgoing {
        source,
        destination,
        protocol,
        header: &header,
        payload: (data, &[]),
        checksum: None,
        segment_size: None,
    });
}

/// Tells `guest` that what it sent to `remote` did not arrive. `quote` is the beginning of that: eight bytes, by which
/// the guest finds whose it was.
pub fn unreachable(link: &mut Link, why: Why, guest: IpAddr, remote: IpAddr, protocol: IpProtocol, quote: &[u8; 8]) {
    let mut bytes = [0; 8 + 40 + 8];
    let checksums = ChecksumCapabilities::default();
    let payload_len = quote.len();
    let (source, length): (IpAddr, usize) = match (guest, remote) {
        (IpAddr::V4(src_addr), IpAddr::V4(dst_addr)) => {
            let reason = match why {
                Why::Network => Icmpv4DstUnreachable::NetUnreachable,
                Why::Host => Icmpv4DstUnreachable::HostUnreachable,
                Why::Port => Icmpv4DstUnreachable::PortUnreachable,
                Why::Prohibited => Icmpv4DstUnreachable::CommProhibited,
            };
            let header = Ipv4Repr { src_addr, dst_addr, next_header: protocol, payload_len, hop_limit: 64 };
            let repr = Icmpv4Repr::DstUnreachable { reason, header, data: quote };
            let length = repr.buffer_len();
            repr.emit(&mut Icmpv4Packet::new_unchecked(&mut bytes[..length]), &checksums);
            (GATEWAY_V4.into(), length)
        }
        (IpAddr::V6(src_addr), IpAddr::V6(dst_addr)) => {
            let reason = match why {
                Why::Network => Icmpv6DstUnreachable::NoRoute,
                Why::Host => Icmpv6DstUnreachable::AddrUnreachable,
                Why::Port => Icmpv6DstUnreachable::PortUnreachable,
                Why::Prohibited => Icmpv6DstUnreachable::AdminProhibit,
            };
            let header = Ipv6Repr { src_addr, dst_addr, next_header: protocol, payload_len, hop_limit: 64 };
            let repr = Icmpv6Repr::DstUnreachable { reason, header, data: quote };
            let length = repr.buffer_len();
            let mut packet = Icmpv6Packet::new_unchecked(&mut bytes[..length]);
            repr.emit(&GATEWAY_V6, &src_addr, &mut packet, &checksums);
            (GATEWAY_V6.into(), length)
        }
        _ => return,
    };
    send_message(link, source, guest, &bytes[..length]);
}

/// Sends a message that was made whole, of at least eight bytes; its checksum is made anew.
pub fn send_message(link: &mut Link, source: IpAddr, destination: IpAddr, message: &[u8]) {
    let Some((header, data)) = message.split_first_chunk::<8>() else { return };
    let mut header = *header;
    header[2..4].fill(0);
    send(link, source, destination, &header, data);
}
