//! What makes one NAT differ from another.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use prost::Message;

/// A guest's network, as [`super::start`] takes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NatConfig {
    /// The guest's Ethernet address.
    pub mac: [u8; 6],
    /// The name that the guest is given by DHCP; none if empty.
    pub hostname: String,
    /// Bytes of the largest IP packet, 1280 to 65520.
    pub mtu: u16,
    /// Whether the gateway's address (10.0.2.2, fd70:7572:6c69:2::2) is the host's loopback to the guest.
    pub allow_host_loopback: bool,
    /// Whether the world is out of the guest's reach: it has names, published ports, and the host's loopback if
    /// that is allowed.
    pub isolated: bool,
    /// Ports of the host's that lead to the guest.
    pub publish: Vec<Publish>,
    /// Name servers in place of those of the host; none for those.
    pub resolvers: Vec<SocketAddr>,
}

impl NatConfig {
    /// The smallest MTU (RFC 8200 5).
    pub const MIN_MTU: u16 = 1280;
    /// The largest.
    pub const MAX_MTU: u16 = 65520;
}

impl Default for NatConfig {
    fn default() -> Self {
        Self {
            mac: [0x52, 0x54, 0, 0x12, 0x34, 0x56],
            hostname: String::new(),
            mtu: 1500,
            allow_host_loopback: false,
            isolated: false,
            publish: Vec::new(),
            resolvers: Vec::new(),
        }
    }
}

/// What a port carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum Protocol {
    /// TCP.
    Tcp = 0,
    /// UDP.
    Udp = 1,
}

impl std::fmt::Display for Protocol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
        })
    }
}

/// A port of the host's that leads to one of the guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Publish {
    /// Where the host listens. Port 0 lets the host choose one.
    pub host: SocketAddr,
    /// The guest's port.
    pub guest_port: u16,
    /// What it carries.
    pub protocol: Protocol,
}

/// `text` does not say what to publish.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not [HOST:]PORT:GUESTPORT[/tcp|/udp]: for example 127.0.0.1:2222:22, [::1]:8080:80 or 5353:53/udp")]
pub struct PublishError(String);

impl std::str::FromStr for Publish {
    type Err = PublishError;

    /// `[HOST:]PORT:GUESTPORT[/tcp|/udp]`. Without HOST (an IP address, IPv6 in brackets) it is 127.0.0.1: what is to
    /// be reached from elsewhere says so, as `0.0.0.0:` or `[::]:`.
    fn from_str(text: &str) -> Result<Self, PublishError> {
        parse_publish(text).ok_or_else(|| PublishError(text.to_owned()))
    }
}

fn parse_publish(text: &str) -> Option<Publish> {
    let (ports, protocol) = match text.rsplit_once('/') {
        Some((ports, "tcp")) => (ports, Protocol::Tcp),
        Some((ports, "udp")) => (ports, Protocol::Udp),
        Some(_) => return None,
        None => (text, Protocol::Tcp),
    };
    let (host, guest_port) = ports.rsplit_once(':')?;
    let (host, port) = match host.rsplit_once(':') {
        Some((host, port)) => (parse_host(host)?, port),
        None => (Ipv4Addr::LOCALHOST.into(), host),
    };
    let number = |text: &str| text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse::<u16>().ok())?;
    let guest_port = number(guest_port).filter(|&port| port != 0)?;
    Some(Publish { host: (host, number(port)?).into(), guest_port, protocol })
}

fn parse_host(text: &str) -> Option<IpAddr> {
    match text.strip_prefix('[') {
        Some(rest) => rest.strip_suffix(']')?.parse().ok().map(IpAddr::V6),
        None => text.parse().ok().map(IpAddr::V4),
    }
}

/// The configuration on its way to the NAT's process. The listening sockets go with it, in the order of `published`.
#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct Wire {
    #[prost(bytes = "vec", tag = "1")]
    pub mac: Vec<u8>,
    #[prost(string, tag = "2")]
    pub hostname: String,
    #[prost(uint32, tag = "3")]
    pub mtu: u32,
    #[prost(bool, tag = "4")]
    pub allow_host_loopback: bool,
    #[prost(message, repeated, tag = "5")]
    pub published: Vec<WirePort>,
    #[prost(string, repeated, tag = "6")]
    pub resolvers: Vec<String>,
    #[prost(bool, tag = "7")]
    pub isolated: bool,
}

/// A published port.
#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct WirePort {
    #[prost(enumeration = "Protocol", tag = "1")]
    pub protocol: i32,
    #[prost(uint32, tag = "2")]
    pub guest_port: u32,
}

impl Wire {
    pub fn new(config: &NatConfig) -> Self {
        let port = |p: &Publish| WirePort { protocol: p.protocol as i32, guest_port: p.guest_port.into() };
        Self {
            mac: config.mac.to_vec(),
            hostname: config.hostname.clone(),
            mtu: config.mtu.into(),
            allow_host_loopback: config.allow_host_loopback,
            published: config.publish.iter().map(port).collect(),
            resolvers: config.resolvers.iter().map(SocketAddr::to_string).collect(),
            isolated: config.isolated,
        }
    }

    /// The configuration again. Where the host listens is not told: the sockets know.
    pub fn config(&self) -> Option<NatConfig> {
        let port = |p: &WirePort| {
            let (guest_port, protocol) = (u16::try_from(p.guest_port).ok()?, p.protocol.try_into().ok()?);
            Some(Publish { host: (Ipv4Addr::UNSPECIFIED, 0).into(), guest_port, protocol })
        };
        Some(NatConfig {
            mac: self.mac.clone().try_into().ok()?,
            hostname: self.hostname.clone(),
            mtu: u16::try_from(self.mtu).ok()?,
            allow_host_loopback: self.allow_host_loopback,
            isolated: self.isolated,
            publish: self.published.iter().map(port).collect::<Option<_>>()?,
            resolvers: self.resolvers.iter().map(|s| s.parse().ok()).collect::<Option<_>>()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_be_published() {
        let publish =
            |host: &str, guest_port, protocol| Ok(Publish { host: host.parse().unwrap(), guest_port, protocol });
        assert_eq!("2222:22".parse(), publish("127.0.0.1:2222", 22, Protocol::Tcp));
        assert_eq!("0.0.0.0:2222:22/tcp".parse(), publish("0.0.0.0:2222", 22, Protocol::Tcp));
        assert_eq!("[::]:5353:53/udp".parse(), publish("[::]:5353", 53, Protocol::Udp));
        assert_eq!("0:80".parse(), publish("127.0.0.1:0", 80, Protocol::Tcp));
        for wrong in [
            "",
            ":",
            "22",
            "22:",
            ":22",
            "1:2:3",
            "::1:80:80",
            "80:0",
            "80:65536",
            "80:+80",
            "80:80/sctp",
            "a:80:80",
            "[::1:80:80",
            "[127.0.0.1]:80:80",
            "80:80/",
            "-1:80",
        ] {
            assert_eq!(wrong.parse::<Publish>(), Err(PublishError(wrong.into())), "{wrong}");
        }
    }

    #[test]
    fn the_wire_carries_all_but_addresses() {
        let config = NatConfig {
            hostname: "guest".into(),
            allow_host_loopback: true,
            isolated: true,
            publish: vec!["0.0.0.0:0:53/udp".parse().unwrap()],
            resolvers: vec!["[::1]:5353".parse().unwrap()],
            ..NatConfig::default()
        };
        let wire = Wire::decode(&Wire::new(&config).encode_to_vec()[..]).unwrap();
        assert_eq!(wire.config(), Some(config));
        assert_eq!(Wire::default().config(), None);
    }
}
