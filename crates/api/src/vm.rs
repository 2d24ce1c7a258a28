//! The control API of a VM's process: what it is started with, and what it says of itself.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{Disk, Machine};

/// The socket in the machine's directory at which its clones are given what it was when it was frozen.
pub const FROZEN: &str = "frozen.sock";
/// The file that says what to run, beside the machine's directory, where its process cannot change it.
pub fn spec_of(dir: &Path) -> PathBuf {
    dir.with_added_extension("json")
}

/// The file beside the machine's directory that a process has locked as long as it lives.
pub fn lock_of(dir: &Path) -> PathBuf {
    dir.with_added_extension("lock")
}

/// The control socket in it.
pub const CONTROL: &str = "control.sock";
/// The socket that leads to the guest's sockets: a program says `CONNECT PORT` there.
pub const VSOCK: &str = "vsock.sock";
/// The file that says how the last run ended.
pub const END: &str = "end.json";
/// What the guest has written to its serial port.
pub const CONSOLE_LOG: &str = "console.log";
/// What the process has to say.
pub const LOG: &str = "process.log";

/// What a VM's process is to run. Paths that are relative are in the machine's directory, which is all that it can write
/// to beside the disks of [`Machine::disks`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    /// Its name: the guest's host name.
    pub name: String,
    /// The hardware.
    pub machine: Machine,
    /// The kernel.
    pub kernel: PathBuf,
    /// Initial RAM disks, in order.
    pub initrds: Vec<PathBuf>,
    /// The kernel's command line.
    pub cmdline: String,
    /// The machine's own disks, before those of [`Spec::machine`].
    pub own_disks: Vec<Disk>,
    /// Files that its own disks stand on, which it can read.
    #[serde(default)]
    pub backing: Vec<PathBuf>,
    /// The network card's address.
    pub mac: [u8; 6],
    /// Where it begins.
    #[serde(default)]
    pub origin: Origin,
    /// Whether ssh is led to the guest from a free port of the host's.
    pub ssh: bool,
}

/// Where a run begins.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Origin {
    /// With its kernel.
    #[default]
    Boot,
    /// Where it was when a snapshot was taken.
    Snapshot {
        /// The snapshot's file.
        file: PathBuf,
    },
    /// Where another machine is that has been frozen for this.
    Clone {
        /// That machine's socket ([`FROZEN`]).
        socket: PathBuf,
        /// Which freeze of its.
        freeze: String,
    },
}

/// A VM's process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Process {
    /// When the run began, in milliseconds since 1970 (UTC).
    pub started: u64,
    /// Whether the guest runs.
    pub state: State,
    /// The engine, and why this one.
    pub engine: String,
    /// The images of its disks, as they are now.
    #[serde(default)]
    #[schema(value_type = Vec<String>)]
    pub disks: Vec<PathBuf>,
    /// The guest's memory, as it is now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<GuestMemory>,
    /// How its shares of the host are enforced.
    #[serde(default)]
    pub shares: String,
    /// What its sandbox lacks on this host, a sentence for each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sandbox_lacks: Vec<String>,
    /// Where the host leads ssh to the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub ssh: Option<SocketAddr>,
    /// The ports of the host's that lead to the guest's, as they came to be.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub published: Vec<String>,
}

/// What a guest has of memory, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GuestMemory {
    /// What it was started with: it cannot have more before its next start.
    pub most: u64,
    /// What it is to have: it is asked to give back the rest, through its balloon.
    pub wanted: u64,
    /// What it has, by what it says that it has given back.
    pub now: u64,
}

/// Whether a guest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It does.
    Running,
    /// It stands still.
    Paused,
}

/// What a VM's process can be asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// Has the guest stand still.
    Pause,
    /// Has it go on.
    Resume,
    /// Presses the power button.
    PressPowerButton,
    /// Ends the run, as if the power failed.
    Quit,
}

/// The body of a request to do something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Act {
    /// What.
    pub action: Action,
}

/// What snapshot is to be taken. Paths are names in the machine's directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TakeSnapshot {
    /// The file to write; nothing is there yet.
    #[schema(value_type = String)]
    pub file: PathBuf,
    /// The overlay that the machine's own disk goes on with; nothing is there yet.
    #[schema(value_type = String)]
    pub overlay: PathBuf,
    /// It is to stand on no other.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub whole: bool,
}

/// A snapshot that was taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SnapshotTaken {
    /// The file that it stands on, if it is not whole.
    #[schema(value_type = Option<String>)]
    pub parent: Option<PathBuf>,
    /// For how long the machine stood still, in microseconds.
    pub pause_us: u64,
    /// Pages of memory in it.
    pub pages: u64,
    /// Bytes of the file.
    pub bytes: u64,
}

/// A freeze, for clones.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Freeze {
    /// What clones ask for it by.
    pub freeze: String,
    /// As of [`TakeSnapshot`].
    #[schema(value_type = String)]
    pub overlay: PathBuf,
}

/// A machine was frozen, and goes on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Frozen {
    /// For how long it stood still, in microseconds.
    pub pause_us: u64,
}

/// A cap that the process is to keep itself, where the host has no control groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Cap {
    /// In percent of one processor; none if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub percent: Option<u32>,
}

/// How much memory the guest is to have: more than it was started with is as much as that.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetMemory {
    /// Bytes.
    pub bytes: u64,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct End {
    /// When, in milliseconds since 1970 (UTC).
    pub time: u64,
    /// Whether the guest or its engine failed, or the process was killed.
    pub crashed: bool,
    /// How, for people.
    pub message: String,
}

/// The one line that the process writes to standard output once its guest runs, or why it does not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ready {
    /// The guest runs.
    Started(Process),
    /// It could not be started.
    Failed(crate::ErrorBody),
}
