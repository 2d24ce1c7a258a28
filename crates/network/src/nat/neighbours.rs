//! Who is where on the link: ARP (RFC 826), neighbour discovery and router advertisements (RFC 4861, RFC 4862).

use std::net::{IpAddr, Ipv6Addr};

use smoltcp::{
    phy::ChecksumCapabilities,
    wire::{
        ArpOperation, ArpPacket, ArpRepr, EthernetProtocol, Icmpv6Packet, Icmpv6Repr, NdiscNeighborFlags, NdiscRepr,
    },
};

use super::{
    hosts::has_ipv6_route,
    icmp,
    link::Link,
    plan::{DNS_V6, GATEWAY_MAC, PREFIX_LENGTH_V6, PREFIX_V6, ROUTER_V6, is_ours},
};

/// All nodes of the link.
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
/// Seconds for which the gateway is a router and a name server, after an advertisement.
const ROUTER_LIFETIME: u16 = 1800;
/// Seconds for which addresses are valid, and preferred.
const VALID: u32 = 24 * 3600;
const PREFERRED: u32 = 4 * 3600;

/// Answers an ARP request for one of our addresses.
pub fn answer_arp(request: &[u8], link: &mut Link) {
    let Ok(packet) = ArpPacket::new_checked(request) else { return };
    let Ok(ArpRepr::EthernetIpv4 {
        operation, source_hardware_addr, source_protocol_addr, target_protocol_addr, ..
    }) = ArpRepr::parse(&packet)
    else {
        return;
    };
    if operation != ArpOperation::Request || !is_ours(target_protocol_addr.into()) {
        return;
    }
    let reply = ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Reply,
        source_hardware_addr: GATEWAY_MAC,
        source_protocol_addr: target_protocol_addr,
        target_hardware_addr: source_hardware_addr,
        target_protocol_addr: source_protocol_addr,
    };
    let mut bytes = [0; 28];
    reply.emit(&mut ArpPacket::new_unchecked(&mut bytes[..]));
    link.send_frame(source_hardware_addr, EthernetProtocol::Arp, &bytes);
}

/// What a guest wants of its neighbours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Solicitation {
    /// [`advertise_router`].
    Router,
    /// [`advertise_neighbour`] for this address.
    Neighbour(Ipv6Addr),
}

/// Parses an ICMPv6 message, whose hop limit must be 255 (RFC 4861 6.1.1, 7.1.1).
pub fn parse(source: Ipv6Addr, destination: Ipv6Addr, message: &[u8]) -> Option<Solicitation> {
    let packet = Icmpv6Packet::new_checked(message).ok()?;
    match Icmpv6Repr::parse(&source, &destination, &packet, &ChecksumCapabilities::default()).ok()? {
        Icmpv6Repr::Ndisc(NdiscRepr::RouterSolicit { .. }) => Some(Solicitation::Router),
        Icmpv6Repr::Ndisc(NdiscRepr::NeighborSolicit { target_addr, .. }) => {
            is_ours(target_addr.into()).then_some(Solicitation::Neighbour(target_addr))
        }
        _ => None,
    }
}

/// Says that `target` is here, to `asker`, or to all if it has no address yet.
pub fn advertise_neighbour(target: Ipv6Addr, asker: Ipv6Addr, link: &mut Link) {
    let mut flags = NdiscNeighborFlags::ROUTER | NdiscNeighborFlags::OVERRIDE;
    let to = if asker.is_unspecified() { ALL_NODES } else { asker };
    flags.set(NdiscNeighborFlags::SOLICITED, to == asker);
    let lladdr = Some(GATEWAY_MAC.into());
    let repr = Icmpv6Repr::Ndisc(NdiscRepr::NeighborAdvert { flags, target_addr: target, lladdr });
    let mut bytes = vec![0; repr.buffer_len()];
    let mut packet = Icmpv6Packet::new_unchecked(&mut bytes[..]);
    repr.emit(&target, &to, &mut packet, &ChecksumCapabilities::ignored());
    icmp::send_message(link, target.into(), to.into(), &bytes);
}

/// Tells the guest its prefix, MTU, router and name server. It is told to use the router only where the host has IPv6.
pub fn advertise_router(mtu: u16, link: &mut Link) {
    let lifetime = if has_ipv6_route() { ROUTER_LIFETIME } else { 0 };
    icmp::send_message(link, IpAddr::V6(ROUTER_V6), IpAddr::V6(ALL_NODES), &router_advertisement(mtu, lifetime));
}

fn router_advertisement(mtu: u16, lifetime: u16) -> Vec<u8> {
    // RFC 4861 4.2: type 134, current hop limit 64, no flags, router lifetime, reachable time, retransmission timer.
    let mut message = vec![134, 0, 0, 0, 64, 0];
    message.extend(lifetime.to_be_bytes());
    message.extend([0; 8]);
    // 4.6.1: source link-layer address.
    message.extend([1, 1]);
    message.extend(GATEWAY_MAC.0);
    // 4.6.4: MTU.
    message.extend([5, 1, 0, 0]);
    message.extend(u32::from(mtu).to_be_bytes());
    // 4.6.2: prefix, on the link and for autonomous configuration.
    message.extend([3, 4, PREFIX_LENGTH_V6, 0xc0]);
    message.extend(VALID.to_be_bytes());
    message.extend(PREFERRED.to_be_bytes());
    message.extend([0; 4]);
    message.extend(PREFIX_V6.octets());
    // RFC 8106 5.1: recursive name server.
    message.extend([25, 3, 0, 0]);
    message.extend(u32::from(ROUTER_LIFETIME).to_be_bytes());
    message.extend(DNS_V6.octets());
    message
}

#[cfg(test)]
mod tests {
    use smoltcp::wire::{NdiscPrefixInfoFlags, NdiscPrefixInformation};

    use super::*;

    #[test]
    fn smoltcp_understands_the_advertisement() {
        let message = router_advertisement(1500, 1800);
        let packet = Icmpv6Packet::new_checked(&message[..]).unwrap();
        let repr = Icmpv6Repr::parse(&ROUTER_V6, &ALL_NODES, &packet, &ChecksumCapabilities::ignored()).unwrap();
        let Icmpv6Repr::Ndisc(NdiscRepr::RouterAdvert { hop_limit, router_lifetime, lladdr, mtu, prefix_info, .. }) =
            repr
        else {
            panic!("{repr:?}");
        };
        assert_eq!((hop_limit, router_lifetime.secs(), mtu), (64, 1800, Some(1500)));
        assert_eq!(lladdr, Some(GATEWAY_MAC.into()));
        let NdiscPrefixInformation { prefix_len, flags, prefix, .. } = prefix_info.unwrap();
        assert_eq!((prefix_len, prefix), (64, PREFIX_V6));
        assert_eq!(flags, NdiscPrefixInfoFlags::ON_LINK | NdiscPrefixInfoFlags::ADDRCONF);
    }
}
