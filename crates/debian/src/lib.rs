//! Obtains kernels and small userlands through the host's own apt, without root.
//!
//! The host's sources, keys and proxies are used as they are, so no mirror is named here and apt itself checks every
//! signature; all that apt writes goes to a private directory ([`apt::PrivateApt`]). What was obtained is kept in a
//! [`cache::Cache`]: made whole or not at all, and checked at every use.
#![forbid(unsafe_code)]

pub mod apt;
pub mod cache;
pub mod deb;
pub mod entries;
pub mod guest;
pub mod home;
pub mod initramfs;
pub mod packages;

use std::{
    io,
    path::{Path, PathBuf},
};

/// Who is told how far the work has come, and asked whether it is still wanted.
pub trait Progress: Sync {
    /// A new step begins: a phrase such as `fetching package lists`.
    fn step(&self, what: &str);

    /// How much of the step is done, 0.0 to 1.0.
    fn fraction(&self, done: f64);

    /// Something worth a line of its own: `the cached files are damaged, fetching them anew`.
    fn note(&self, what: &str);

    /// Whether to give up; asked several times a second. The work then ends with [`Error::Cancelled`].
    fn cancelled(&self) -> bool {
        false
    }
}

/// Why something could not be obtained: what failed, why, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host has no apt.
    #[error(
        "'{0}' is not installed, and Debian's packages are obtained with it; on a host that is not of the Debian \
         family give a kernel of your own with --kernel and --initrd"
    )]
    NotDebian(&'static str),
    /// apt failed, for example for want of a network.
    #[error("cannot obtain {what} from the package mirror: {reason}; {advice}")]
    Apt {
        /// What was to be obtained.
        what: String,
        /// apt's first error.
        reason: String,
        /// What to do.
        advice: &'static str,
    },
    /// No source of the host's has any of these packages.
    #[error(
        "none of the host's package sources offers {0}; see that /etc/apt has the distribution's own archive, for \
         example with 'apt-cache policy'"
    )]
    NoPackage(String),
    /// A package does not contain what it should.
    #[error("{package} does not contain {wanted}: the package has changed, please report it")]
    Contents {
        /// The package's file.
        package: String,
        /// What was looked for.
        wanted: &'static str,
    },
    /// No space left.
    #[error("no space left in {}: free some, or set PURLIN_HOME to a directory on another disk", .0.display())]
    DiskFull(PathBuf),
    /// A file or directory of ours cannot be written or read.
    #[error("cannot {what} {}: {source}; set PURLIN_HOME to a directory that you can write to", path.display())]
    File {
        /// `create`, `read`, …
        what: &'static str,
        /// Which.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// None of the variables that say where the user's files are.
    #[error("no place for Purlin's files: neither PURLIN_HOME, {0} nor HOME is set; set one of them")]
    NoHome(&'static str),
    /// [`Progress::cancelled`] said so.
    #[error("interrupted; nothing was kept")]
    Cancelled,
}

impl Error {
    /// Turns an I/O error on `path` into an [`Error`]; for `map_err`.
    pub fn file(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::DiskFull(path),
            _ => Self::File { what, path, source },
        }
    }
}
