//! Being root, as far as installing packages takes it: really, in a user namespace, or by the libraries fakechroot and
//! fakeroot.

use std::{
    path::Path,
    process::{Command, Stdio},
};

use purlin_debian::Progress;

use super::tools;
use crate::Error;

/// A way that works on this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isolation {
    /// We are root and may mount.
    Root,
    /// A namespace in which we are root, with further users out of our subordinate ids (subuid(5)).
    Namespace,
    /// Libraries that pretend. Slower, but asks the host for nothing.
    Fakechroot,
}

/// A mount and a PID namespace in either case: nothing of it remains, and when the first process dies all do.
const NAMESPACES: [&str; 7] =
    ["--mount", "--propagation=private", "--pid", "--fork", "--kill-child", "--mount-proc", "--"];
const USER: [&str; 3] = ["--user", "--map-auto", "--map-root-user"];

impl Isolation {
    /// The first way that works, found by trying.
    pub fn choose(progress: &dyn Progress) -> Result<Self, Error> {
        let ways: &[Self] = match rustix::process::geteuid().is_root() {
            true => &[Self::Root, Self::Fakechroot],
            false => &[Self::Namespace, Self::Fakechroot],
        };
        match ways.iter().find(|way| way.works()) {
            Some(way) => Ok(*way),
            None if tools::install(&["fakechroot", "fakeroot"], progress)? && Self::Fakechroot.works() => {
                Ok(Self::Fakechroot)
            }
            None => Err(Error::NoIsolation),
        }
    }

    fn works(self) -> bool {
        let mut probe = self.command(Path::new("true"));
        probe.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        probe.status().is_ok_and(|status| status.success())
    }

    /// Runs `program` as root.
    pub fn command(self, program: &Path) -> Command {
        let mut command = match self {
            Self::Root => Command::new("unshare"),
            Self::Namespace => Command::new("unshare"),
            Self::Fakechroot => Command::new("fakechroot"),
        };
        match self {
            Self::Root => command.args(NAMESPACES),
            Self::Namespace => command.args(USER).args(NAMESPACES),
            Self::Fakechroot => command.args(["fakeroot", "--"]),
        };
        command.arg(program).env("PATH", tools::path());
        command
    }

    /// What the script has to know of it.
    pub fn environment(self) -> [(&'static str, &'static str); 1] {
        [("MODE", if self == Self::Fakechroot { "fakechroot" } else { "root" })]
    }

    /// Removes a directory with files of whichever users of the namespace.
    pub fn remove(self, path: &Path) -> Result<(), Error> {
        let mut command = self.command(Path::new("rm"));
        let output = command.arg("-rf").arg("--").arg(path).output().map_err(tools::not_started("rm"))?;
        if output.status.success() {
            return Ok(());
        }
        let reason = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Err(Error::Build { reason, advice: "remove that directory, as root if need be" })
    }
}
