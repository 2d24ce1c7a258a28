//! What a sandboxed process is to reach.

use std::{
    fmt,
    os::fd::RawFd,
    path::{Component, PathBuf},
};

use crate::SandboxError;

/// All that the process is to reach, and what it cannot do without.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// Files, directories and devices.
    pub paths: Vec<Reachable>,
    /// Whom a privileged process becomes. What it is to open must be that user's by then.
    pub identity: Option<Identity>,
    /// Layers without which [`enter`](crate::enter) fails. Others that the host lacks are in the report only.
    pub require: Vec<Layer>,
    /// Descriptors of directories that the process holds on purpose. Any other open directory is an error, for it would
    /// be a way out of the new root.
    pub directories: Vec<RawFd>,
    /// Where the process works from then on; without it, at the top of its own root, if it has one.
    pub working_directory: Option<PathBuf>,
    /// Resource limits.
    pub limits: Limits,
    /// How strict the filters of system calls are.
    pub filters: Filters,
}

/// A path, and what may be done with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reachable {
    /// Absolute, without `..`. The process finds it by the same name. It must exist.
    pub path: PathBuf,
    /// What may be done with it and with what is in it.
    pub access: Access,
}

/// What may be done with a file or a directory. Nothing can be executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// To read it, and list it.
    Read,
    /// To read and write it; in a directory, to create, rename and remove files, directories and sockets, but no links
    /// and devices: others may follow those.
    ReadWrite,
    /// A device: to read and write it, and its ioctls.
    Device,
}

/// A user and group of the process's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// User id, not 0.
    pub uid: u32,
    /// Group id, not 0. There are no supplementary groups.
    pub gid: u32,
}

/// Resource limits, hard and soft. There are no core dumps in any case: they would be guests' memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Open descriptors.
    pub descriptors: u64,
    /// Bytes of locked memory.
    pub locked_memory: u64,
    /// Processes and threads of this user, for an identity that no other process has.
    pub threads: Option<u64>,
    /// Bytes that a file may grow to.
    pub file_size: Option<u64>,
}

impl Default for Limits {
    fn default() -> Self {
        Self { descriptors: 4096, locked_memory: 8 << 20, threads: None, file_size: None }
    }
}

/// How strict the filters of system calls are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Filters {
    /// What is not allowed ends the process.
    #[default]
    Enforce,
    /// What is not allowed is done, and told to the kernel's log: to find out what a new device needs.
    Log,
    /// No filters.
    Off,
}

/// A part of the sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Layer {
    /// A user other than who starts it, and not root.
    Identity,
    /// A user namespace: privileges, should it ever get any, are good for nothing.
    UserNamespace,
    /// A root of its own in a mount namespace, which has nothing but the plan's paths.
    Root,
    /// No other process is in sight.
    PidNamespace,
    /// No network, and no abstract socket.
    NetworkNamespace,
    /// No other System V IPC and POSIX message queues.
    IpcNamespace,
    /// Another host name.
    UtsNamespace,
    /// Landlock: files, TCP, signals and abstract sockets once more, as far as the kernel knows it.
    Landlock,
    /// Filters of system calls.
    Seccomp,
}

/// All of them.
pub(crate) const LAYERS: [Layer; 9] = [
    Layer::Identity,
    Layer::UserNamespace,
    Layer::Root,
    Layer::PidNamespace,
    Layer::NetworkNamespace,
    Layer::IpcNamespace,
    Layer::UtsNamespace,
    Layer::Landlock,
    Layer::Seccomp,
];

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Identity => "own user",
            Self::UserNamespace => "user namespace",
            Self::Root => "own root",
            Self::PidNamespace => "PID namespace",
            Self::NetworkNamespace => "network namespace",
            Self::IpcNamespace => "IPC namespace",
            Self::UtsNamespace => "UTS namespace",
            Self::Landlock => "Landlock",
            Self::Seccomp => "seccomp",
        })
    }
}

impl Plan {
    /// Paths are absolute and plain, and an identity is not root.
    pub(crate) fn check(&self) -> Result<(), SandboxError> {
        for Reachable { path, .. } in &self.paths {
            let plain = path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
            // The root itself would be all files.
            if !path.is_absolute() || !plain || path.parent().is_none() {
                return Err(SandboxError::BadPath(path.clone()));
            }
        }
        match self.identity {
            Some(Identity { uid: 0, .. } | Identity { gid: 0, .. }) => Err(SandboxError::RootIdentity),
            _ => Ok(()),
        }
    }

    /// The paths, each behind those that it is in.
    pub(crate) fn outermost_first(&self) -> Vec<&Reachable> {
        let mut paths: Vec<_> = self.paths.iter().collect();
        paths.sort_by_key(|reachable| reachable.path.components().count());
        paths
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_path(path: &str) -> Plan {
        Plan { paths: vec![Reachable { path: path.into(), access: Access::Read }], ..Plan::default() }
    }

    #[test]
    fn only_plain_absolute_paths_are_taken() {
        assert!(with_path("/var/lib/disk").check().is_ok());
        for bad in ["/", "disk", "/var/../etc", "", "./x"] {
            assert!(matches!(with_path(bad).check(), Err(SandboxError::BadPath(_))), "{bad}");
        }
    }

    #[test]
    fn nobody_becomes_root() {
        for (uid, gid) in [(0, 5), (5, 0)] {
            let plan = Plan { identity: Some(Identity { uid, gid }), ..Plan::default() };
            assert!(matches!(plan.check(), Err(SandboxError::RootIdentity)));
        }
    }
}
