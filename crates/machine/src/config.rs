//! What a machine is to be made of.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::Arc,
};

use prost::Message;
use purlin_arch::x86_64::cpuid::CpuModel;
pub use purlin_devices::virtio::{
    balloon::{BalloonConfig, BalloonHandle, Statistics as BalloonStatistics},
    block::{OnFailure, OnIoError},
    console::{Port as ConsolePort, Size as ConsoleSize},
    net::{NetConfig, Network},
    vsock::VsockConfig,
};
use purlin_state::{Saved, StateError};
use purlin_storage::Disk;

use crate::{boot::image::Image, error::MachineError, layout};

/// The machine type: the set of devices, addresses and firmware tables that a guest meets. It is saved with the
/// virtual machine, and what one name stands for never changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MachineType {
    /// A PC of 8259s, I/O APIC, 8254, MC146818, 16550 and ACPI; PCI Express with virtio devices.
    Pc1,
}

impl MachineType {
    /// The name under which it is saved.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pc1 => "pc-1",
        }
    }

    fn from_name(name: &str) -> Option<Self> {
        [Self::Pc1].into_iter().find(|t| t.name() == name)
    }
}

/// A device that a machine has only if it is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum OptionalDevice {
    /// Port 0xf4: a write ends the run with the exit status `(value << 1) | 1`.
    DebugExit = 0,
    /// Port 0xe9: what is written goes to the serial output.
    Debugcon = 1,
    /// virtio-rng: random bytes of the host's.
    Rng = 2,
}

/// Everything that makes one machine differ from another.
#[derive(Clone, Debug)]
pub struct MachineConfig {
    /// The machine type.
    pub machine_type: MachineType,
    /// Guest memory in bytes, a multiple of 4 KiB.
    pub memory: u64,
    /// Number of processors, 1 to [`layout::MAX_CPUS`].
    pub cpus: u32,
    /// The processor that CPUID shows.
    pub cpu_model: CpuModel,
    /// Whether there is a 16550 at COM1.
    pub serial: bool,
    /// Devices asked for beside those that every PC has.
    pub devices: BTreeSet<OptionalDevice>,
    /// Disks on virtio-blk, by number: at most [`layout::MAX_DISKS`].
    pub disks: Vec<Arc<Disk>>,
    /// Networks on virtio-net, by number: at most [`layout::MAX_NETWORKS`].
    pub networks: Vec<Network>,
    /// What the console on virtio-console is connected to, if there is one.
    pub console: Option<Arc<ConsolePort>>,
    /// What comes of a disk's request that the host cannot carry out.
    pub on_io_error: OnIoError,
    /// Sockets between guest and host, on virtio-vsock.
    pub vsock: Option<VsockConfig>,
    /// A memory balloon, on virtio-balloon.
    pub balloon: Option<BalloonConfig>,
    /// What to boot.
    pub boot: BootConfig,
}

impl MachineConfig {
    /// Checks memory size and processor count, against what the type can have and what the host could ever provide.
    pub fn validate(&self, host_memory: u64) -> Result<(), MachineError> {
        let balloon = self.balloon.map(|balloon| balloon.size);
        Size { memory: self.memory, cpus: self.cpus, cpu_model: self.cpu_model, balloon }.validate(host_memory)?;
        if self.disks.len() > layout::MAX_DISKS {
            return Err(MachineError::TooManyDisks { asked: self.disks.len() });
        }
        if self.networks.len() > layout::MAX_NETWORKS {
            return Err(MachineError::TooManyNetworks { asked: self.networks.len() });
        }
        Ok(())
    }

    /// The saved form: the hardware, without what is booted.
    pub fn saved(&self) -> SavedConfig {
        SavedConfig {
            machine_type: self.machine_type.name().into(),
            memory: self.memory,
            cpus: self.cpus,
            serial: self.serial,
            devices: self.devices.iter().map(|&d| d as i32).collect(),
            disks: self.disks.len() as u32,
            networks: self.networks.len() as u32,
            console: self.console.is_some(),
            vsock: self.vsock.is_some(),
            balloon: self.balloon.map(Into::into),
        }
    }
}

/// What of a machine the host must be able to provide.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// [`MachineConfig::memory`]
    pub memory: u64,
    /// [`MachineConfig::cpus`]
    pub cpus: u32,
    /// [`MachineConfig::cpu_model`]
    pub cpu_model: CpuModel,
    /// [`BalloonConfig::size`]
    pub balloon: Option<u64>,
}

impl Size {
    /// Checks it against what the machine type can have and a host with so many bytes of memory.
    pub fn validate(&self, host_memory: u64) -> Result<(), MachineError> {
        if self.memory < layout::MIN_MEMORY {
            return Err(MachineError::MemoryTooSmall { asked: self.memory });
        }
        if !self.memory.is_multiple_of(layout::PAGE) {
            return Err(MachineError::MemoryUnaligned { asked: self.memory });
        }
        if self.memory > host_memory {
            return Err(MachineError::MemoryTooLarge { asked: self.memory, host: host_memory });
        }
        if self.cpus == 0 || self.cpus > layout::MAX_CPUS {
            return Err(MachineError::CpuCount { asked: self.cpus });
        }
        if let Some(asked) = self.balloon.filter(|&size| size >= self.memory) {
            return Err(MachineError::BalloonTooLarge { asked, memory: self.memory });
        }
        let missing = crate::processor::missing(self.cpu_model);
        if !missing.is_empty() {
            return Err(MachineError::CpuModel { model: self.cpu_model, missing: missing.join(", ") });
        }
        Ok(())
    }
}

/// What to boot. Opened before anything else is made, so that a missing file is found first, and kept open: a reset
/// loads the same files again, even where a path has been given to another file since.
#[derive(Clone, Debug)]
pub struct BootConfig {
    /// The kernel.
    pub kernel: Arc<Image>,
    /// Initial RAM disks in order, or multiboot modules.
    pub initrds: Vec<Arc<Image>>,
    /// The kernel's command line.
    pub cmdline: String,
}

impl BootConfig {
    /// Opens the files.
    pub fn open(kernel: &Path, initrds: &[PathBuf], cmdline: &str) -> Result<Self, MachineError> {
        let kernel = Arc::new(Image::open(kernel, "kernel")?);
        let initrds = initrds.iter().map(|path| Image::open(path, "initrd").map(Arc::new)).collect::<Result<_, _>>()?;
        Ok(Self { kernel, initrds, cmdline: cmdline.to_owned() })
    }
}

/// The hardware of a saved machine.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct SavedConfig {
    /// [`MachineType::name`].
    #[prost(string, tag = "1")]
    pub machine_type: String,
    /// Bytes.
    #[prost(uint64, tag = "2")]
    pub memory: u64,
    /// Number of processors.
    #[prost(uint32, tag = "3")]
    pub cpus: u32,
    /// Whether there is a 16550 at COM1.
    #[prost(bool, tag = "4")]
    pub serial: bool,
    /// Optional devices.
    #[prost(enumeration = "OptionalDevice", repeated, tag = "5")]
    pub devices: Vec<i32>,
    /// Number of disks. (What each one is, its device's section says.)
    #[prost(uint32, tag = "6")]
    pub disks: u32,
    /// Number of networks, likewise.
    #[prost(uint32, tag = "7")]
    pub networks: u32,
    /// Whether there is a console on virtio-console.
    #[prost(bool, tag = "10")]
    pub console: bool,
    /// Whether there is a virtio-vsock.
    #[prost(bool, tag = "12")]
    pub vsock: bool,
    /// What the memory balloon is like, if there is one. (How large it is, its device's section says.)
    #[prost(message, optional, tag = "13")]
    pub balloon: Option<SavedBalloonConfig>,
}

/// What of a memory balloon its driver has been told once and for all.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct SavedBalloonConfig {
    /// [`BalloonConfig::deflate_on_oom`]
    #[prost(bool, tag = "1")]
    deflate_on_oom: bool,
    /// [`BalloonConfig::free_page_reporting`]
    #[prost(bool, tag = "2")]
    free_page_reporting: bool,
}

impl From<BalloonConfig> for SavedBalloonConfig {
    fn from(BalloonConfig { deflate_on_oom, free_page_reporting, .. }: BalloonConfig) -> Self {
        Self { deflate_on_oom, free_page_reporting }
    }
}

impl From<SavedBalloonConfig> for BalloonConfig {
    fn from(SavedBalloonConfig { deflate_on_oom, free_page_reporting }: SavedBalloonConfig) -> Self {
        Self { size: 0, deflate_on_oom, free_page_reporting }
    }
}

impl Saved for SavedConfig {
    const NAME: &'static str = "machine";
    const VERSION: u32 = 1;
}

/// What of the host a saved machine is connected with when it goes on: as many and of the kinds that it had.
#[derive(Default)]
pub struct HostSide {
    /// Its disks, with the content that they had.
    pub disks: Vec<Arc<Disk>>,
    /// Its networks.
    pub networks: Vec<Network>,
    /// What its console is connected to.
    pub console: Option<Arc<ConsolePort>>,
    /// Where its sockets are.
    pub vsock: Option<VsockConfig>,
    /// What comes of a disk's request that the host cannot carry out; this may be another than it was.
    pub on_io_error: OnIoError,
}

impl SavedConfig {
    /// The configuration of the machine that continues this one, connected with `host` as it was. Its processors are those
    /// that were saved; the files to boot (and the model, whose CPUID is saved with each processor) serve its next reset.
    pub fn config(&self, cpu_model: CpuModel, host: HostSide, boot: BootConfig) -> Result<MachineConfig, MachineError> {
        let HostSide { disks, networks, console, vsock, on_io_error } = host;
        let machine_type = MachineType::from_name(&self.machine_type)
            .ok_or_else(|| MachineError::UnknownType { name: self.machine_type.clone() })?;
        let unknown = |device: i32| StateError::corrupt(Self::NAME, format!("there is no device {device}"));
        let device = |&d: &i32| OptionalDevice::try_from(d).map_err(|_| unknown(d));
        let devices = self.devices.iter().map(device).collect::<Result<_, _>>()?;
        if disks.len() != self.disks as usize {
            return Err(MachineError::DiskCount { saved: self.disks, given: disks.len() });
        }
        if networks.len() != self.networks as usize {
            return Err(MachineError::NetworkCount { saved: self.networks, given: networks.len() });
        }
        if console.is_some() != self.console {
            return Err(MachineError::Console { saved: self.console });
        }
        if vsock.is_some() != self.vsock {
            return Err(MachineError::VsockMismatch { saved: self.vsock });
        }
        let config = MachineConfig {
            machine_type,
            memory: self.memory,
            cpus: self.cpus,
            cpu_model,
            serial: self.serial,
            devices,
            disks,
            networks,
            console,
            on_io_error,
            vsock,
            balloon: self.balloon.map(Into::into),
            boot,
        };
        Ok(config)
    }
}
