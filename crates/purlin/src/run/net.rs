//! `--net user|tap=NAME|none`, with `,bps=…`, and `--publish`.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
};

use anyhow::{Result, anyhow};
use purlin_vmm::{
    NetConfig, Network,
    network::{
        nat::{self, ListenError, NatConfig, NatError, NatProcess, Protocol, Publish},
        tap,
    },
    storage::limit::Rate,
};

use super::quantity;

/// What the guest's network device is connected to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Net {
    /// The user-mode NAT.
    User {
        /// The most that goes through it, in bytes each second and direction.
        rate: Option<Rate>,
    },
    /// A TAP interface of the host's.
    Tap {
        /// Its name.
        name: String,
        /// As for [`Net::User`].
        rate: Option<Rate>,
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
    /// Connects it. `ssh`: the guest is one to be reached by ssh, at a port of the host's that is free.
    pub fn connect(&self, publish: &[Publish], host_name: &str, ssh: bool) -> Result<Connected> {
        match self {
            Self::None => Ok(Connected::default()),
            Self::Tap { name, rate } => {
                let config = NetConfig { mac: random_mac(), mtu: TAP_MTU };
                let network = Network { config, backend: Arc::new(tap::open(name)?), rate: *rate };
                Ok(Connected { networks: vec![network], ..Connected::default() })
            }
            Self::User { rate } => connect_user(*rate, publish, host_name, ssh),
        }
    }
}

fn connect_user(rate: Option<Rate>, publish: &[Publish], host_name: &str, ssh: bool) -> Result<Connected> {
    let config = |publish| NatConfig { hostname: host_name.into(), publish, ..NatConfig::default() };
    let is_ssh = |p: &Publish| p.guest_port == SSH && p.protocol == Protocol::Tcp;
    let (config, (backend, nat)) = if !ssh || publish.iter().any(is_ssh) {
        let config = config(publish.to_vec());
        let started = nat::start(&config)?;
        (config, started)
    } else {
        start_with_ssh(|port| {
            let host = (Ipv4Addr::LOCALHOST, port).into();
            let ssh = Publish { host, guest_port: SSH, protocol: Protocol::Tcp };
            config(publish.iter().copied().chain([ssh]).collect())
        })?
    };
    let led = config.publish.iter().zip(nat.published()).find(|(p, _)| ssh && is_ssh(p)).map(|(_, address)| *address);
    let device = NetConfig { mac: config.mac, mtu: config.mtu };
    let network = Network { config: device, backend: Arc::new(backend), rate };
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
    let (kind, rate) = match text.split_once(',') {
        Some((kind, setting)) => (kind, Some(parse_rate(setting)?)),
        None => (text, None),
    };
    match (kind, kind.strip_prefix("tap=")) {
        ("user", _) => Ok(Net::User { rate }),
        ("none", _) if rate.is_none() => Ok(Net::None),
        (_, Some(name)) if !name.is_empty() => Ok(Net::Tap { name: name.into(), rate }),
        _ => Err("it is one of user, tap=NAME, none; user and tap take ',bps=RATE'".into()),
    }
}

fn parse_rate(setting: &str) -> Result<Rate, String> {
    let rate = setting.strip_prefix("bps=").ok_or_else(|| format!("'{setting}' is not bps=RATE"))?;
    Ok(Rate::new(quantity::parse_rate(rate).map_err(|e| format!("bps={rate}: {e}"))?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks() {
        assert_eq!(parse("user"), Ok(Net::User { rate: None }));
        assert_eq!(parse("none"), Ok(Net::None));
        let rate = Some(Rate::new(2 << 20));
        assert_eq!(parse("tap=tap0,bps=2M"), Ok(Net::Tap { name: "tap0".into(), rate }));
        for wrong in ["", "tap", "tap=", "bridge", "user,mac=1", "none,bps=1M", "user,bps=0"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
