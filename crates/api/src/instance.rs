//! Instances: the machines that a daemon keeps.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{Machine, vm};

/// A machine that the daemon keeps.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Instance {
    /// Its name.
    pub name: String,
    /// What stays the same when it is renamed.
    pub id: String,
    /// The image that it was made of.
    pub image: String,
    /// What it is doing.
    pub status: Status,
    /// When it was made, in seconds since 1970 (UTC).
    pub created: u64,
    /// Its hardware.
    pub machine: Machine,
    /// Its process, while there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process: Option<InstanceProcess>,
    /// How its last run ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_end: Option<vm::End>,
}

/// An instance's process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct InstanceProcess {
    /// Its number.
    pub pid: u32,
    /// What it says of itself.
    #[serde(flatten)]
    pub said: vm::Process,
    /// What it uses.
    pub usage: Usage,
}

/// What a process uses of the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Usage {
    /// CPU time, in milliseconds.
    pub cpu_ms: u64,
    /// Memory of the host, in bytes; what it shares with others is in it.
    pub memory: u64,
    /// Memory that counts against the machine's `memory_max`, in bytes; left out where it has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_limited: Option<u64>,
}

/// What an instance is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// It is being made.
    Creating,
    /// It has no process.
    Stopped,
    /// Its process is there, and its guest not yet.
    Starting,
    /// Its guest runs.
    Running,
    /// Its guest stands still.
    Paused,
    /// Its last run ended by a crash, and it has no process.
    Crashed,
    /// It is being deleted.
    Deleting,
}

impl Status {
    /// As users read it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Stopped => "stopped",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Crashed => "crashed",
            Self::Deleting => "deleting",
        }
    }
}

/// An instance to be made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewInstance {
    /// Its name (see [`check_name`]); no other instance has it.
    #[schema(pattern = "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
    pub name: String,
    /// The image: its name, or what it is built as (`debian`).
    pub image: String,
    /// Its hardware.
    #[serde(default)]
    pub machine: Machine,
    /// The size of its own disk in bytes, if that is to be larger than the image's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_size: Option<u64>,
    /// What cloud-init is to do at its first boot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_data: Option<String>,
    /// Words for the kernel's command line, behind those of the image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cmdline: Option<String>,
    /// Public keys that may log in, as lines of authorized_keys(5); the daemon's user's own if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ssh_keys: Option<Vec<String>>,
    /// Whether it is started as soon as it is made.
    #[serde(default = "yes")]
    pub start: bool,
}

fn yes() -> bool {
    true
}

/// A change of what an instance is doing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "action", rename_all = "lowercase", deny_unknown_fields)]
pub enum ChangeState {
    /// Boots it.
    Start,
    /// Has its guest shut down, as by its power button.
    Stop {
        /// Ends its process at once instead, as if its power failed.
        #[serde(default)]
        force: bool,
        /// How many seconds the guest may take; 60 if left out.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        timeout: Option<u32>,
    },
    /// Stops it as `stop` does, and starts it.
    Restart {
        /// As of `stop`.
        #[serde(default)]
        force: bool,
        /// As of `stop`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        timeout: Option<u32>,
    },
    /// Has its guest stand still.
    Pause,
    /// Has its guest go on.
    Resume,
}

/// A new name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Rename {
    /// It.
    #[schema(pattern = "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
    pub name: String,
}

/// A moment of an instance that is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Snapshot {
    /// Its name; no other of the instance's has it.
    pub name: String,
    /// When it was taken, in seconds since 1970 (UTC).
    pub created: u64,
    /// Whether the instance ran: then its memory and devices are kept too, and it goes on where it was.
    pub running: bool,
    /// Bytes of its memory's file: what has changed since the snapshot before, if there is one.
    pub bytes: u64,
    /// For how long the instance stood still, in microseconds.
    pub pause_us: u64,
}

/// A snapshot to be taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewSnapshot {
    /// Its name, as an instance's ([`check_name`]).
    #[schema(pattern = "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
    pub name: String,
}

/// Clones to be made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewClones {
    /// The names of the new instances: 1 to 256.
    #[schema(min_items = 1, max_items = 256)]
    pub names: Vec<String>,
}

/// The daemon itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ServerInfo {
    /// The API's version.
    pub api_version: String,
    /// The program's version.
    pub version: String,
    /// The daemon's process.
    pub pid: u32,
    /// Where it listens on TCP, by TLS: `192.0.2.1:8443`; nothing where it does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listens_at: Option<String>,
    /// The SHA-256 fingerprint of its certificate there: `sha256:` and 64 hexadecimal digits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<String>,
}

/// Whether an instance can be called so: it is the guest's host name too (RFC 1123, 2.1), in small letters.
pub fn check_name(name: &str) -> Result<(), InvalidName> {
    let good = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    let edge = |byte: Option<u8>| byte.is_some_and(|b| b != b'-');
    let fits = name.len() <= 63 && name.bytes().all(good) && edge(name.bytes().next()) && edge(name.bytes().last());
    if fits { Ok(()) } else { Err(InvalidName(name.chars().take(80).collect::<String>().escape_debug().to_string())) }
}

/// No instance can be called so.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' cannot be a name: up to 63 small letters, digits and hyphens, with no hyphen at its ends")]
pub struct InvalidName(String);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for good in ["a", "web-1", "0", &"a".repeat(63)] {
            assert_eq!(check_name(good), Ok(()), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a.b", "a/b", "..", "a b", "ä", "a\n", &"a".repeat(64)] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }
}
