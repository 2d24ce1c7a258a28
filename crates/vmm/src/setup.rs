//! From what users say of a machine (`purlin_api`) to what it is made of.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
};

use purlin_api as api;
use purlin_arch::x86_64::cpuid::CpuModel;
use purlin_machine::{
    MachineError,
    config::{BalloonConfig, NetConfig, Network, OptionalDevice, Size},
    host_memory,
    processor::default_model,
};
use purlin_network::{
    nat::{self, ListenError, NatConfig, NatError, NatProcess, Protocol, Publish},
    tap::{self, Queues, TapError},
};
use purlin_storage::{
    DiskSpec, Format,
    limit::{Limits, Rate},
};

use crate::engines::EngineChoice;

/// A disk.
pub fn disk(disk: &api::Disk) -> DiskSpec {
    let format = disk.format.map(|format| match format {
        api::DiskFormat::Raw => Format::Raw,
        api::DiskFormat::Qcow2 => Format::Qcow2,
    });
    let limits = Limits { operations: disk.iops.map(Rate::new), bytes: disk.bytes_per_second.map(Rate::new) };
    DiskSpec { format, read_only: disk.read_only, serial: disk.serial.clone(), limits, ..DiskSpec::new(&disk.path) }
}

/// An engine.
pub fn engine(engine: api::Engine) -> EngineChoice {
    match engine {
        api::Engine::Auto => EngineChoice::Auto,
        api::Engine::Kvm => EngineChoice::Kvm,
        api::Engine::Translator => EngineChoice::Translator,
    }
}

/// A processor model.
pub fn cpu_model(model: api::CpuModel) -> CpuModel {
    match model {
        api::CpuModel::Host => CpuModel::Host,
        api::CpuModel::V2 => CpuModel::V2,
        api::CpuModel::V3 => CpuModel::V3,
        api::CpuModel::V4 => CpuModel::V4,
    }
}

/// A device.
pub fn device(device: api::Device) -> OptionalDevice {
    match device {
        api::Device::Rng => OptionalDevice::Rng,
        api::Device::DebugExit => OptionalDevice::DebugExit,
        api::Device::Debugcon => OptionalDevice::Debugcon,
    }
}

/// A memory balloon.
pub fn balloon(balloon: api::Balloon) -> BalloonConfig {
    let api::Balloon { size, deflate_on_oom, free_page_reporting } = balloon;
    BalloonConfig { size, deflate_on_oom, free_page_reporting }
}

/// The machine's network, connected.
#[derive(Default)]
pub struct Connected {
    /// For the machine.
    pub networks: Vec<Network>,
    /// Where the host leads ssh to the guest.
    pub ssh: Option<SocketAddr>,
    /// Where the host listens, in the order of what was to be published; ssh's port is the last where it was added.
    pub published: Vec<SocketAddr>,
    /// The NAT lives as long as this.
    nat: Option<NatProcess>,
}

impl Connected {
    /// The NAT's process, if there is one.
    pub fn process(&self) -> Option<u32> {
        self.nat.as_ref().map(NatProcess::id)
    }

    /// To be called before the machine is made.
    pub fn wait_until_ready(&self) -> Result<(), ConnectError> {
        let backends = self.nat.iter().flat_map(|_| &self.networks).flat_map(|network| &network.backends);
        Ok(backends.into_iter().try_for_each(|backend| nat::wait_until_ready(backend))?)
    }
}

/// Why the network cannot be connected.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The TAP interface.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// The NAT.
    #[error(transparent)]
    Nat(#[from] NatError),
    /// All ports for ssh are taken.
    #[error(
        "no port from {first} to {last} is free for the guest's ssh: give one with --publish PORT:{SSH}",
        first = SSH_PORTS.start(), last = SSH_PORTS.end()
    )]
    NoSshPort,
}

/// The ports of 127.0.0.1 that are tried for the guest's ssh.
const SSH_PORTS: std::ops::RangeInclusive<u16> = 2222..=2299;
const SSH: u16 = 22;
/// Bytes of an IP packet on an Ethernet (RFC 894).
const TAP_MTU: u16 = 1500;

/// What a network is connected for.
pub struct Guest<'a> {
    /// The guest's name.
    pub name: &'a str,
    /// Its network card's address.
    pub mac: [u8; 6],
    /// Its processors.
    pub cpus: u32,
    /// Whether it is one to be reached by ssh, at a port of the host's that is free.
    pub ssh: bool,
}

/// Begins to connect a network, which is [`Connected::wait_until_ready`] somewhat later.
pub fn connect(network: &api::Network, publish: &[Publish], guest: &Guest) -> Result<Connected, ConnectError> {
    match network {
        api::Network::None => Ok(Connected::default()),
        api::Network::Tap { name, bytes_per_second, queues } => {
            let config = NetConfig { mac: guest.mac, mtu: TAP_MTU };
            // A queue for each processor; more bring nothing.
            let most = guest.cpus.min(tap::MOST_QUEUES.into()) as u16;
            let queues = queues.map_or(Queues::UpTo(most), Queues::Exactly);
            let backends = tap::open(name, queues)?.into_iter().map(Arc::new).collect();
            let network = Network { config, backends, rate: bytes_per_second.map(Rate::new) };
            Ok(Connected { networks: vec![network], ..Connected::default() })
        }
        api::Network::User { bytes_per_second, loopback } => {
            let config = NatConfig {
                mac: guest.mac,
                hostname: guest.name.into(),
                allow_host_loopback: *loopback,
                publish: publish.to_vec(),
                ..NatConfig::default()
            };
            connect_user(config, bytes_per_second.map(Rate::new), guest.ssh)
        }
    }
}

fn connect_user(config: NatConfig, rate: Option<Rate>, ssh: bool) -> Result<Connected, ConnectError> {
    let is_ssh = |p: &Publish| p.guest_port == SSH && p.protocol == Protocol::Tcp;
    let (config, (backend, nat)) = if !ssh || config.publish.iter().any(is_ssh) {
        let begun = nat::begin(&config)?;
        (config, begun)
    } else {
        start_with_ssh(|port| {
            let host = (Ipv4Addr::LOCALHOST, port).into();
            let ssh = Publish { host, guest_port: SSH, protocol: Protocol::Tcp };
            let publish = config.publish.iter().copied().chain([ssh]).collect();
            NatConfig { publish, ..config.clone() }
        })?
    };
    let published = nat.published().to_vec();
    let led = config.publish.iter().zip(&published).find(|(p, _)| ssh && is_ssh(p)).map(|(_, address)| *address);
    let device = NetConfig { mac: config.mac, mtu: config.mtu };
    let network = Network { config: device, backends: vec![Arc::new(backend)], rate };
    Ok(Connected { networks: vec![network], ssh: led, published, nat: Some(nat) })
}

/// Begins to start the NAT with the first port that nobody else has.
fn start_with_ssh(
    config: impl Fn(u16) -> NatConfig,
) -> Result<(NatConfig, (purlin_network::Backend, NatProcess)), ConnectError> {
    for port in SSH_PORTS {
        let config = config(port);
        match nat::begin(&config) {
            Err(NatError::Listen(ListenError::Taken { address, .. })) if address.port() == port => {}
            begun => return Ok((config, begun?)),
        }
    }
    Err(ConnectError::NoSshPort)
}

/// An address that is administered locally (IEEE 802, 8.2), in the range that virtual machines have.
pub fn random_mac() -> [u8; 6] {
    let mut mac = [0x52, 0x54, 0, 0, 0, 0];
    // If the host has no randomness, 0 does for one guest.
    let _ = rustix::rand::getrandom(&mut mac[3..], rustix::rand::GetRandomFlags::empty());
    mac
}

/// Whether a machine can have this size and processor on this host.
pub fn check(machine: &api::Machine) -> Result<(), MachineError> {
    let size = Size {
        memory: machine.memory(),
        cpus: machine.cpus(),
        cpu_model: machine.cpu.map_or_else(default_model, cpu_model),
        balloon: machine.balloon.map(|balloon| balloon.size),
    };
    size.validate(host_memory())
}
