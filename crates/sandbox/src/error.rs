//! Why a process cannot be sandboxed.

use std::{os::fd::RawFd, path::PathBuf};

use rustix::io::Errno;

use crate::{Layer, filter::FilterError};

/// Why a process cannot be sandboxed.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// A path of the plan makes no sense.
    #[error("{} cannot be a path of a sandbox: give an absolute one without \"..\", and not the root", .0.display())]
    BadPath(PathBuf),
    /// The plan's identity is root's.
    #[error("a sandboxed process cannot be root: give it a user and a group of its own")]
    RootIdentity,
    /// The process has several threads; a sandbox would be the calling thread's only.
    #[error("the process has {0} threads already: a sandbox must be entered before the first thread is started")]
    Threads(usize),
    /// A directory is open.
    #[error("descriptor {fd} is open on the directory {}, a way out of the sandbox: close it first", .path.display())]
    OpenDirectory {
        /// The descriptor.
        fd: RawFd,
        /// What it is open on.
        path: PathBuf,
    },
    /// A path of the plan cannot be made reachable.
    #[error("cannot make {} reachable in the sandbox: {error}", .path.display())]
    Path {
        /// The path.
        path: PathBuf,
        /// Why.
        error: Errno,
    },
    /// A system call failed that has no reason to.
    #[error("cannot {what}: {error}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        error: Errno,
    },
    /// Landlock refuses something that it should know.
    #[error("cannot restrict files by Landlock: {0}")]
    Landlock(#[from] landlock::RulesetError),
    /// The filter of system calls cannot be installed.
    #[error(transparent)]
    Filter(#[from] FilterError),
    /// The host lacks what the plan requires.
    #[error("the sandbox would lack its {layer}, which is required: {reason}")]
    Required {
        /// The layer.
        layer: Layer,
        /// Why the host does not have it.
        reason: String,
    },
    /// A probe's process did not answer.
    #[error("cannot try the sandbox out: {0}")]
    Probe(String),
}

/// Turns the error of a system call into one that says what was tried.
pub(crate) fn host(what: &'static str) -> impl FnOnce(Errno) -> SandboxError {
    move |error| SandboxError::Host { what, error }
}
