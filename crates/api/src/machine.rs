//! What a machine is made of, as users say it.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The hardware of a machine. What is left out has the value that it has at the command line.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Machine {
    /// Memory in bytes, a multiple of 4 KiB; 1 GiB if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<u64>,
    /// Virtual CPUs; 1 if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpus: Option<u32>,
    /// What executes the guest.
    pub engine: Engine,
    /// The processor that the guest sees; the best level up to x86-64-v3 that the host has if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu: Option<CpuModel>,
    /// Further devices.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<Device>,
    /// Disks behind those of the image.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<Disk>,
    /// The network.
    pub network: Network,
    /// Ports of the host's that lead to the guest's, as `[HOST:]PORT:GUESTPORT[/udp]`; without HOST it is 127.0.0.1.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub publish: Vec<String>,
    /// A memory balloon.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub balloon: Option<Balloon>,
    /// What comes of a disk's request that the host cannot carry out.
    pub on_io_error: OnIoError,
    /// Its weight against other machines that want the host's processors and disks at the same time: 1 to 10000; 100 if
    /// left out. Twice the weight is twice the time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_shares: Option<u32>,
    /// The most time of the host's processors, in percent of one: 150 is one and a half.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_cap: Option<u32>,
    /// The most memory of the host's, in bytes: the guest's and some more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_max: Option<u64>,
}

impl Machine {
    /// Bytes of memory where none are given: an image's.
    pub const MEMORY: u64 = 1 << 30;
    /// The weight of who says none.
    pub const CPU_SHARES: u32 = 100;

    /// Bytes of memory.
    pub fn memory(&self) -> u64 {
        self.memory.unwrap_or(Self::MEMORY)
    }

    /// Bytes of memory that the guest is left with by its balloon.
    pub fn memory_left(&self) -> u64 {
        self.memory().saturating_sub(self.balloon.map_or(0, |balloon| balloon.size))
    }

    /// Its weight against other machines.
    pub fn cpu_shares(&self) -> u32 {
        self.cpu_shares.unwrap_or(Self::CPU_SHARES)
    }

    /// Virtual CPUs.
    pub fn cpus(&self) -> u32 {
        self.cpus.unwrap_or(1)
    }
}

/// What executes the guest's instructions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    /// KVM where it really runs kernels, else the translator.
    #[default]
    Auto,
    /// KVM.
    Kvm,
    /// The translator.
    Translator,
}

/// A processor model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum CpuModel {
    /// What the host has.
    #[serde(rename = "host")]
    Host,
    /// The x86-64 psABI's level 2.
    #[serde(rename = "x86-64-v2")]
    V2,
    /// Level 3.
    #[serde(rename = "x86-64-v3")]
    V3,
    /// Level 4.
    #[serde(rename = "x86-64-v4")]
    V4,
}

/// A device that a machine has only if it is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Device {
    /// virtio-rng.
    Rng,
    /// Port 0xf4 ends the run.
    DebugExit,
    /// Port 0xe9 writes to the serial output.
    Debugcon,
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// The absolute path of the image.
    #[schema(value_type = String)]
    pub path: PathBuf,
    /// Its format; if left out, its name says it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<DiskFormat>,
    /// The guest cannot write.
    #[serde(default)]
    pub read_only: bool,
    /// What the guest sees as its serial number: up to 20 printable ASCII characters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// The most requests a second, at least 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iops: Option<u64>,
    /// The most bytes a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_per_second: Option<u64>,
}

impl Disk {
    /// The writable disk at `path`, without limits.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), format: None, read_only: false, serial: None, iops: None, bytes_per_second: None }
    }
}

/// The format of a disk's image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    /// The disk's bytes.
    Raw,
    /// QEMU's.
    Qcow2,
}

/// What a machine's network device is connected to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum Network {
    /// Behind the host's own address, with no privilege.
    User {
        /// The most bytes a second in each direction.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        bytes_per_second: Option<u64>,
        /// The gateway 10.0.2.2 is the host's own 127.0.0.1.
        #[serde(default)]
        loopback: bool,
    },
    /// A TAP interface of the host's.
    Tap {
        /// Its name.
        name: String,
        /// The most bytes a second in each direction.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        bytes_per_second: Option<u64>,
        /// Queues; one for each CPU if left out.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        queues: Option<u16>,
    },
    /// There is no network device.
    None,
}

impl Default for Network {
    fn default() -> Self {
        Self::User { bytes_per_second: None, loopback: false }
    }
}

/// A memory balloon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Balloon {
    /// Bytes that the guest is asked to give back.
    #[serde(default)]
    pub size: u64,
    /// The guest may take memory back when it runs out.
    #[serde(default = "yes")]
    pub deflate_on_oom: bool,
    /// The guest gives back what is free as it goes.
    #[serde(default = "yes")]
    pub free_page_reporting: bool,
}

fn yes() -> bool {
    true
}

/// What comes of a disk's request that the host cannot carry out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnIoError {
    /// The guest gets an error.
    #[default]
    Report,
    /// The machine is paused; when it is resumed, the request is made again.
    Pause,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_out_is_the_default() {
        assert_eq!(serde_json::from_str::<Machine>("{}").unwrap(), Machine::default());
        let machine: Machine =
            serde_json::from_str(r#"{"memory": 536870912, "network": {"kind": "tap", "name": "tap0"}}"#).unwrap();
        assert_eq!(machine.memory(), 512 << 20);
        assert_eq!(machine.network, Network::Tap { name: "tap0".into(), bytes_per_second: None, queues: None });
        let again: Machine = serde_json::from_str(&serde_json::to_string(&machine).unwrap()).unwrap();
        assert_eq!(again, machine);
    }

    #[test]
    fn what_nobody_knows_is_refused() {
        for wrong in [
            r#"{"memroy": 1}"#,
            r#"{"network": {"kind": "bridge"}}"#,
            r#"{"disks": [{}]}"#,
            r#"{"network": {"kind": "user", "queues": 2}}"#,
        ] {
            assert!(serde_json::from_str::<Machine>(wrong).is_err(), "{wrong}");
        }
    }
}
