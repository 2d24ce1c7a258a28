//! What the database says of an instance.

use std::path::PathBuf;

use purlin_api::{Disk, DiskFormat, Machine, vm};
use serde::{Deserialize, Serialize};

/// An instance, as it is kept. Fields are only ever added, with a default.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// What it is called by.
    pub name: String,
    /// Its directory's name, which stays.
    pub id: String,
    /// The image it was made of.
    pub image: String,
    /// Seconds since 1970.
    pub created: u64,
    /// How far its making has come.
    pub stage: Stage,
    /// The hardware.
    pub machine: Machine,
    /// What it boots; nothing before it is ready.
    pub boot: Option<Boot>,
    /// Its network card's address.
    pub mac: [u8; 6],
    /// How its last run ended.
    pub last_end: Option<vm::End>,
}

/// How far an instance's making, or its deletion, has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stage {
    /// Its files are being made. A daemon that finds this when it starts takes it back.
    Creating,
    /// It is there.
    Ready,
    /// Its files are being removed. A daemon that finds this when it starts goes on with it.
    Deleting,
}

/// What an instance boots. Paths are in its directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Boot {
    /// The kernel.
    pub kernel: PathBuf,
    /// Initial RAM disks, in order.
    pub initrds: Vec<PathBuf>,
    /// The kernel's command line.
    pub cmdline: String,
    /// Its disk, in qcow2.
    pub disk: PathBuf,
    /// The disk for cloud-init.
    pub seed: PathBuf,
    /// The files that its disk stands on, which are elsewhere.
    #[serde(default)]
    pub backing: Vec<PathBuf>,
}

impl Record {
    /// What its process is to run.
    pub fn spec(&self) -> Option<vm::Spec> {
        let boot = self.boot.clone()?;
        let disk = Disk { format: Some(DiskFormat::Qcow2), ..Disk::new(boot.disk) };
        let seed = Disk { format: Some(DiskFormat::Raw), read_only: true, ..Disk::new(boot.seed) };
        Some(vm::Spec {
            name: self.name.clone(),
            machine: self.machine.clone(),
            kernel: boot.kernel,
            initrds: boot.initrds,
            cmdline: boot.cmdline,
            own_disks: vec![disk, seed],
            backing: boot.backing,
            mac: self.mac,
            ssh: true,
        })
    }
}
