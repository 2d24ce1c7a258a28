//! `--net user|tap=NAME|none`, with `,bps=…`, `,queues=…` and `,loopback`, and `--publish`.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
};

use anyhow::{Result, anyhow};
use purlin_vmm::{
    NetConfig, Network,
    network::{
        nat::{self, ListenError, NatConfig, NatError, NatProcess, Protocol, Publish},
        tap::{self, Queues},
    },
    storage::limit::Rate,
};

use super::quantity;

/// What the guest's network device is connected to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Net {
    /// The user-mode NAT. It is one thread, so several queues would bring nothing.
    User {
        /// The most that goes through it, in bytes each second and direction.
        rate: Option<Rate>,
        /// The gateway's address is the host's loopback.
        loopback: bool,
    },
    /// A TAP interface of the host's.
    Tap {
        /// Its name.
        name: String,
        /// As for [`Net::User`].
        rate: Option<Rate>,
        /// So many queues, if the user says so.
        queues: Option<u16>,
    },
    /// There is no network device.
    None,
}

/// The guest's network, connected.
#[derive(Default)]
pub struct Connected {
    /// For the machine.
    pub networks: Vec<Network>,
    /// Where the host leads ssh to the guest.
    pub ssh: Option<SocketAddr>,
    /// The NAT lives as long as this.
    _nat: Option<NatProcess>,
}

/// The ports of 127.0.0.1 that are tried for the guest's ssh.
const SSH_PORTS: std::ops::RangeInclusive<u16> = 2222..=2299;
const SSH: u16 = 22;
/// Bytes of an IP packet on an Ethernet (RFC 894).
const TAP_MTU: u16 = 1500;

impl Net {
    /// What an image gets.
    pub const DEFAULT: Self = Self::User { rate: None, loopback: false };

    /// Connects it, for a machine of so many processors. `ssh`: the guest is one to be reached by ssh, at a port of the
    /// host's that is free.
    pub fn connect(&self, cpus: u32, publish: &[Publish], host_name: &str, ssh: bool) -> Result<Connected> {
        match self {
            Self::None => Ok(Connected::default()),
            Self::Tap { name, rate, queues } => {
                let config = NetConfig { mac: random_mac(), mtu: TAP_MTU };
                // A queue for each processor; more bring nothing.
                let queues = queues.map_or(Queues::UpTo(cpus.min(tap::MOST_QUEUES.into()) as u16), Queues::Exactly);
                let backends = tap::open(name, queues)?.into_iter().map(Arc::new).collect();
                let network = Network { config, backends, rate: *rate };
                Ok(Connected { networks: vec![network], ..Connected::default() })
            }
            Self::User { rate, loopback } => {
                let config = NatConfig {
                    hostname: host_name.into(),
                    allow_host_loopback: *loopback,
                    publish: publish.to_vec(),
                    ..NatConfig::default()
                };
                connect_user(config, *rate, ssh)
            }
        }
    }
}

fn connect_user(config: NatConfig, rate: Option<Rate>, ssh: bool) -> Result<Connected> {
    let is_ssh = |p: &Publish| p.guest_port == SSH && p.protocol == Protocol::Tcp;
    let (config, (backend, nat)) = if !ssh || config.publish.iter().any(is_ssh) {
        let started = nat::start(&config)?;
        (config, started)
    } else {
        start_with_ssh(|port| {
            let host = (Ipv4Addr::LOCALHOST, port).into();
            let ssh = Publish { host, guest_port: SSH, protocol: Protocol::Tcp };
            let publish = config.publish.iter().copied().chain([ssh]).collect();
            NatConfig { publish, ..config.clone() }
        })?
    };
    let led = config.publish.iter().zip(nat.published()).find(|(p, _)| ssh && is_ssh(p)).map(|(_, address)| *address);
    let device = NetConfig { mac: config.mac, mtu: config.mtu };
    let network = Network { config: device, backends: vec![Arc::new(backend)], rate };
    Ok(Connected { networks: vec![network], ssh: led, _nat: Some(nat) })
}

/// Starts the NAT with the first port that nobody else has.
fn start_with_ssh(
    config: impl Fn(u16) -> NatConfig,
) -> Result<(NatConfig, (purlin_vmm::network::Backend, NatProcess))> {
    for port in SSH_PORTS {
        let config = config(port);
        match nat::start(&config) {
            Err(NatError::Listen(ListenError::Taken { address, .. })) if address.port() == port => {}
            started => return Ok((config, started?)),
        }
    }
    let (first, last) = SSH_PORTS.into_inner();
    Err(anyhow!("no port from {first} to {last} is free for the guest's ssh: give one with --publish PORT:{SSH}"))
}

/// An address that is administered locally (IEEE 802, 8.2), in the range that virtual machines have.
fn random_mac() -> [u8; 6] {
    let mut mac = [0x52, 0x54, 0, 0, 0, 0];
    // If the host has no randomness, 0 does for one guest.
    let _ = rustix::rand::getrandom(&mut mac[3..], rustix::rand::GetRandomFlags::empty());
    mac
}

/// Reads the option.
pub fn parse(text: &str) -> Result<Net, String> {
    let mut parts = text.split(',');
    let kind = parts.next().unwrap_or_default();
    let mut net = match (kind, kind.strip_prefix("tap=")) {
        ("user", _) => Net::User { rate: None, loopback: false },
        ("none", _) => Net::None,
        (_, Some(name)) if !name.is_empty() => Net::Tap { name: name.into(), rate: None, queues: None },
        _ => return Err(format!("it is one of user, tap=NAME, none; {SETTINGS}")),
    };
    for setting in parts {
        match (&mut net, setting.split_once('=').unwrap_or((setting, ""))) {
            (Net::User { rate, .. } | Net::Tap { rate, .. }, ("bps", value)) => *rate = Some(parse_rate(value)?),
            (Net::User { loopback, .. }, ("loopback", "")) => *loopback = true,
            (Net::Tap { queues, .. }, ("queues", value)) => *queues = Some(parse_queues(value)?),
            _ => return Err(format!("'{setting}' is no setting of {kind}: {SETTINGS}")),
        }
    }
    Ok(net)
}

const SETTINGS: &str = "user takes ',bps=RATE' and ',loopback', tap ',bps=RATE' and ',queues=N'";

fn parse_rate(rate: &str) -> Result<Rate, String> {
    Ok(Rate::new(quantity::parse_rate(rate).map_err(|e| format!("bps={rate}: {e}"))?))
}

fn parse_queues(count: &str) -> Result<u16, String> {
    let most = tap::MOST_QUEUES;
    let count = count
        .bytes()
        .all(|b| b.is_ascii_digit())
        .then(|| count.parse().ok())
        .flatten()
        .filter(|count| (1..=most).contains(count));
    count.ok_or_else(|| format!("queues= takes a number from 1 to {most}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks() {
        assert_eq!(parse("user"), Ok(Net::User { rate: None, loopback: false }));
        assert_eq!(parse("none"), Ok(Net::None));
        let rate = Some(Rate::new(2 << 20));
        assert_eq!(parse("user,loopback,bps=2M"), Ok(Net::User { rate, loopback: true }));
        let tap = |rate, queues| Net::Tap { name: "tap0".into(), rate, queues };
        assert_eq!(parse("tap=tap0"), Ok(tap(None, None)));
        assert_eq!(parse("tap=tap0,bps=2M"), Ok(tap(rate, None)));
        assert_eq!(parse("tap=tap0,queues=4,bps=2M"), Ok(tap(rate, Some(4))));
        for wrong in [
            "",
            "tap",
            "tap=",
            "bridge",
            "user,mac=1",
            "none,bps=1M",
            "user,bps=0",
            "user,queues=2",
            "user,loopback=1",
            "user,",
            "tap=a,loopback",
            "tap=a,queues",
            "tap=a,queues=0",
            "tap=a,queues=9",
            "tap=a,queues=+1",
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
