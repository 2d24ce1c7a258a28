//! The guest's network: its addresses, and what of the world a guest may reach.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use smoltcp::wire::EthernetAddress;

/// The guest's IPv4 network is 10.0.2.0/24.
pub const PREFIX_LENGTH_V4: u8 = 24;
/// The gateway.
pub const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// The name server.
pub const DNS_V4: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
/// The guest.
pub const GUEST_V4: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);

/// The guest's IPv6 network: a unique local prefix (RFC 4193). Every NAT has the same, as it has the same 10.0.2.0/24.
pub const PREFIX_V6: Ipv6Addr = Ipv6Addr::new(0xfd70, 0x7572, 0x6c69, 2, 0, 0, 0, 0);
/// Bits of it.
pub const PREFIX_LENGTH_V6: u8 = 64;
/// The gateway.
pub const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfd70, 0x7572, 0x6c69, 2, 0, 0, 0, 2);
/// The name server.
pub const DNS_V6: Ipv6Addr = Ipv6Addr::new(0xfd70, 0x7572, 0x6c69, 2, 0, 0, 0, 3);
/// The gateway's link-local address, from which router advertisements come.
pub const ROUTER_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2);

/// The gateway's Ethernet address (locally administered).
pub const GATEWAY_MAC: EthernetAddress = EthernetAddress([0x52, 0x55, 0x0a, 0x00, 0x02, 0x02]);

/// Whether the gateway answers for this address on the link.
pub fn is_ours(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => [GATEWAY_V4, DNS_V4].contains(&address),
        IpAddr::V6(address) => [GATEWAY_V6, DNS_V6, ROUTER_V6].contains(&address),
    }
}

/// Whether a guest may send from this address to others than its neighbours.
pub fn is_guests(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address == GUEST_V4,
        IpAddr::V6(address) => in_prefix(address) && !is_ours(address.into()),
    }
}

fn in_prefix(address: Ipv6Addr) -> bool {
    address.segments()[..4] == PREFIX_V6.segments()[..4]
}

/// Where something that the guest sends to goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// To the host's name server.
    Resolver,
    /// To this address, as the host sees it.
    Host(SocketAddr),
    /// Nowhere.
    Denied,
}

/// What a guest may reach beside the name server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reach {
    /// Everything that a router would forward to.
    pub world: bool,
    /// The host's loopback, at the gateway's address.
    pub host_loopback: bool,
}

/// The way to `destination`.
pub fn route(destination: SocketAddr, reach: Reach) -> Route {
    match destination.ip() {
        ip if ip == DNS_V4 || ip == DNS_V6 => {
            if destination.port() == 53 {
                Route::Resolver
            } else {
                Route::Denied
            }
        }
        ip if ip == GATEWAY_V4 && reach.host_loopback => Route::Host((Ipv4Addr::LOCALHOST, destination.port()).into()),
        ip if ip == GATEWAY_V6 && reach.host_loopback => Route::Host((Ipv6Addr::LOCALHOST, destination.port()).into()),
        ip if reach.world && is_reachable(ip) => Route::Host(destination),
        _ => Route::Denied,
    }
}

/// Whether the world beyond the gateway has this address for a guest. What a router would not forward, a guest does
/// not reach: among it the host's loopback in all its spellings, and the link-local addresses at which clouds tell
/// their secrets.
pub fn is_reachable(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => {
            let first = v4.octets()[0];
            let is_own_network = v4.octets()[..3] == GATEWAY_V4.octets()[..3];
            first != 0 && first < 224 && !v4.is_loopback() && !v4.is_link_local() && !is_own_network
        }
        IpAddr::V6(v6) => {
            let first = v6.segments()[0];
            let is_global = first & 0xe000 == 0x2000;
            let is_unique_local = first & 0xfe00 == 0xfc00 && !in_prefix(v6);
            // RFC 6052: IPv4 by a translator of the host's network. All else under ::/8 may mean this host itself.
            let is_nat64 = v6.segments()[..6] == [0x64, 0xff9b, 0, 0, 0, 0]
                && v6.to_bits() as u32 != 0
                && is_reachable(Ipv4Addr::from_bits(v6.to_bits() as u32).into());
            is_global || is_unique_local || is_nat64
        }
    }
}

/// What the guest sees as the sender, where `peer` connects to a published port: `peer` itself, if the guest can
/// answer it by way of the gateway, and the gateway otherwise.
pub fn seen_from_guest(peer: SocketAddr) -> SocketAddr {
    match peer {
        SocketAddr::V4(v4) if is_reachable((*v4.ip()).into()) => peer,
        _ => (GATEWAY_V4, peer.port()).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reachable(address: &str) -> bool {
        is_reachable(address.parse().unwrap())
    }

    #[test]
    fn the_host_itself_is_not_reachable() {
        for spelling in [
            "127.0.0.1",
            "127.255.255.254",
            "0.0.0.0",
            "0.1.2.3",
            "::1",
            "::",
            "::ffff:127.0.0.1",
            "::127.0.0.1",
            "::ffff:0:127.0.0.1",
            "64:ff9b::127.0.0.1",
            "64:ff9b::",
            "169.254.169.254",
            "::ffff:169.254.169.254",
            "224.0.0.251",
            "255.255.255.255",
            "240.0.0.1",
            "fe80::1",
            "ff02::1",
            "fec0::1",
            "10.0.2.99",
            "fd70:7572:6c69:2::99",
            "64:ff9b::169.254.169.254",
        ] {
            assert!(!reachable(spelling), "{spelling}");
        }
    }

    #[test]
    fn the_world_is_reachable() {
        for address in
            ["10.0.1.15", "10.0.3.1", "192.168.1.1", "1.1.1.1", "2606:4700::1111", "fd00::1", "64:ff9b::8.8.8.8"]
        {
            assert!(reachable(address), "{address}");
        }
    }

    #[test]
    fn the_gateway_is_the_hosts_loopback_only_if_allowed() {
        let route = |to: &str, reach| route(to.parse().unwrap(), reach);
        let to = |address: &str| Route::Host(address.parse().unwrap());
        let world = Reach { world: true, host_loopback: false };
        let all = Reach { world: true, host_loopback: true };
        let none = Reach { world: false, host_loopback: false };
        assert_eq!(route("10.0.2.2:80", world), Route::Denied);
        assert_eq!(route("10.0.2.2:80", all), to("127.0.0.1:80"));
        assert_eq!(route("[fd70:7572:6c69:2::2]:80", all), to("[::1]:80"));
        assert_eq!(route("127.0.0.1:80", all), Route::Denied);
        assert_eq!(route("[::1]:80", all), Route::Denied);
        assert_eq!(route("192.0.2.1:80", world), to("192.0.2.1:80"));
        assert_eq!(route("192.0.2.1:80", none), Route::Denied);
        assert_eq!(route("10.0.2.3:53", none), Route::Resolver);
        assert_eq!(route("10.0.2.3:54", all), Route::Denied);
    }

    #[test]
    fn a_guest_is_only_itself() {
        assert!(is_guests("10.0.2.15".parse().unwrap()));
        assert!(is_guests("fd70:7572:6c69:2:1:2:3:4".parse().unwrap()));
        for other in
            ["10.0.2.2", "10.0.2.16", "192.168.1.1", "::", "fd70:7572:6c69:2::3", "fd70:7572:6c69:3::1", "fe80::2"]
        {
            assert!(!is_guests(other.parse().unwrap()), "{other}");
        }
    }

    #[test]
    fn peers_on_this_host_look_like_the_gateway() {
        assert_eq!(seen_from_guest("127.0.0.1:5".parse().unwrap()), "10.0.2.2:5".parse().unwrap());
        assert_eq!(seen_from_guest("[2001:db8::1]:5".parse().unwrap()), "10.0.2.2:5".parse().unwrap());
        assert_eq!(seen_from_guest("192.168.1.7:5".parse().unwrap()), "192.168.1.7:5".parse().unwrap());
    }
}
