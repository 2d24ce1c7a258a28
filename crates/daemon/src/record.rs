//! What the database says of an instance.

use std::path::{Path, PathBuf};

use purlin_api::{Disk, DiskFormat, Machine, Snapshot, vm};
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
    /// Its snapshots, in the order in which they were taken.
    #[serde(default)]
    pub snapshots: Vec<SnapshotRecord>,
    /// The file of a snapshot that is being taken.
    #[serde(default)]
    pub next_memory: Option<PathBuf>,
    /// It is a clone whose guest still thinks that it is the other one.
    #[serde(default)]
    pub is_to_be_renewed: bool,
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

/// What an instance boots, and its disk. Paths that are relative are in its directory; those of another instance's, whose
/// clone it is, are absolute.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Boot {
    /// The kernel.
    pub kernel: PathBuf,
    /// Initial RAM disks, in order.
    pub initrds: Vec<PathBuf>,
    /// The kernel's command line.
    pub cmdline: String,
    /// Its disk, in qcow2, which is written.
    pub disk: PathBuf,
    /// What that stands on, the topmost first: images that nobody writes any more.
    pub layers: Vec<PathBuf>,
    /// The overlay that the disk may have gone on with by now: it was about to.
    pub next_disk: Option<PathBuf>,
    /// How many overlays it has had.
    pub overlays: u32,
    /// The disk for cloud-init.
    pub seed: PathBuf,
}

impl Boot {
    /// The next overlay's name.
    pub fn overlay_name(&self) -> PathBuf {
        format!("{DISK}-{}.qcow2", self.overlays + 1).into()
    }

    /// The disk has gone on with `overlay`.
    pub fn go_on_with(&mut self, overlay: PathBuf) {
        self.layers.insert(0, std::mem::replace(&mut self.disk, overlay));
        self.next_disk = None;
    }

    /// All of its files.
    fn files(&self) -> impl Iterator<Item = &PathBuf> {
        let one = [&self.kernel, &self.disk, &self.seed].into_iter();
        one.chain(&self.initrds).chain(&self.layers).chain(&self.next_disk)
    }
}

/// What the names of disks' images begin with.
pub const DISK: &str = "disk";
/// What is added to the name of an image whose place a merged one is to take.
pub const MERGED: &str = "merged";
/// What the names of snapshots' files begin with.
pub const MEMORY: &str = "memory";

/// A snapshot, as it is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotRecord {
    /// What users and programs see of it.
    pub shown: Snapshot,
    /// The disk's image at that moment.
    pub disk: PathBuf,
    /// What that stands on.
    pub layers: Vec<PathBuf>,
    /// The file of its memory and devices, and those that it stands on; none if the instance did not run.
    pub memory: Vec<PathBuf>,
    /// The hardware at that moment.
    pub machine: Machine,
}

impl SnapshotRecord {
    /// All of its files.
    pub fn files(&self) -> impl Iterator<Item = &PathBuf> {
        [&self.disk].into_iter().chain(&self.layers).chain(&self.memory)
    }
}

impl Record {
    /// What its process is to run.
    pub fn spec(&self, origin: vm::Origin) -> Option<vm::Spec> {
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
            backing: boot.layers,
            mac: self.mac,
            origin,
            ssh: true,
        })
    }

    /// All files that it needs, by absolute paths; `dir` is its directory.
    pub fn files(&self, dir: &Path) -> Vec<PathBuf> {
        let of_snapshots = self.snapshots.iter().flat_map(SnapshotRecord::files);
        let own = self.boot.iter().flat_map(Boot::files).chain(&self.next_memory);
        own.chain(of_snapshots).map(|path| dir.join(path)).collect()
    }
}
