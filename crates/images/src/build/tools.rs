//! The programs that a build takes, and where they come from.

use std::{
    env,
    ffi::OsString,
    io,
    process::{Command, Stdio},
};

use purlin_debian::Progress;

use crate::Error;

/// A program and the Debian package that has it.
const PROGRAMS: [(&str, &str); 5] = [
    ("apt-get", "apt"),
    ("mmdebstrap", "mmdebstrap"),
    ("mke2fs", "e2fsprogs"),
    ("unshare", "util-linux"),
    ("find", "findutils"),
];

/// Sees that all are there; root on a host of the Debian family gets what is missing.
pub fn provide(progress: &dyn Progress) -> Result<(), Error> {
    let missing = || PROGRAMS.iter().filter(|(program, _)| !is_installed(program));
    let packages: Vec<&str> = missing().map(|(_, package)| *package).collect();
    if packages.is_empty() || (install(&packages, progress)? && missing().next().is_none()) {
        return Ok(());
    }
    let programs = missing().map(|(program, _)| *program).collect::<Vec<_>>().join(", ");
    Err(Error::MissingTools { programs, packages: packages.join(" ") })
}

/// Installs packages if we are root and there is apt-get; whether that was done.
pub fn install(packages: &[&str], progress: &dyn Progress) -> Result<bool, Error> {
    if !rustix::process::geteuid().is_root() || !is_installed("apt-get") {
        return Ok(false);
    }
    progress.note(&format!("installing on this host, for the build: {}", packages.join(", ")));
    progress.step("installing programs for the build");
    let install = ["install", "--yes", "--quiet", "--no-install-recommends"];
    // The lists may be missing or old.
    Ok(apt_get(&[&install[..], packages].concat())?
        || (apt_get(&["update", "--quiet"])? && apt_get(&[&install[..], packages].concat())?))
}

fn apt_get(args: &[&str]) -> Result<bool, Error> {
    let mut command = Command::new("apt-get");
    command.args(args).env("DEBIAN_FRONTEND", "noninteractive");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    Ok(command.status().map_err(not_started("apt-get"))?.success())
}

/// $PATH with the directories of administrators' programs, which users often lack.
pub fn path() -> OsString {
    let mut path = env::var_os("PATH").unwrap_or_default();
    path.push(":/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin");
    path
}

fn is_installed(program: &str) -> bool {
    env::split_paths(&path()).any(|dir| dir.join(program).is_file())
}

/// For `map_err`.
pub fn not_started(program: &str) -> impl FnOnce(io::Error) -> Error {
    let program = program.to_owned();
    move |source| Error::Start { program, source }
}
