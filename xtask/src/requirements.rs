//! What the tests need of the host, installed from Debian's packages.

use std::process::Command;

use anyhow::{Result, bail, ensure};

use crate::shell::{is_installed, run};

/// A program and the Debian package that has it.
const PROGRAMS: [(&str, &str); 8] = [
    ("qemu-system-x86_64", "qemu-system-x86"), // to compare with, and the test bed for KVM
    ("iasl", "acpica-tools"),                  // the oracle for ACPI tables
    ("cpio", "cpio"),                          // the oracle for initramfs archives
    ("dpkg-deb", "dpkg"),
    ("ssh", "openssh-client"),  // into Debian's image
    ("qemu-img", "qemu-utils"), // the oracle for disk images
    ("mmdebstrap", "mmdebstrap"),
    ("gcc", "gcc"), // compiles the rows of the benchmark
];

/// A module of Python's and the Debian package that has it.
const MODULES: [(&str, &str); 1] = [("ensurepip", "python3-venv")]; // schemathesis is installed by it

/// Installs what is missing, and what that has pushed out: packages of one source that come from two releases (a
/// backport of qemu-utils beside the release's qemu-system-x86) exclude each other.
pub fn install() -> Result<()> {
    let mut packages = missing();
    if !packages.is_empty() {
        println!("The tests need these Debian packages: {}", packages.join(" "));
        ensure!(is_installed("apt-get"), "this is no Debian host: install them in the host's own way");
        run(as_root("apt-get")?.args(["-q", "update"]))?;
        install_packages(&packages)?;
        packages = missing();
    }
    if !packages.is_empty() {
        install_packages(&packages)?;
        packages = missing();
    }
    ensure!(packages.is_empty(), "these packages are missing still, see what apt-get says: {}", packages.join(" "));
    install_components()
}

/// The packages of the programs and modules that are not there.
fn missing() -> Vec<&'static str> {
    let programs = PROGRAMS.iter().filter(|(program, _)| !is_installed(program));
    let modules = MODULES.iter().filter(|(module, _)| !has_module(module));
    programs.chain(modules).map(|(_, package)| *package).collect()
}

fn has_module(module: &str) -> bool {
    let found = Command::new("python3").args(["-c", &format!("import {module}")]).output();
    found.is_ok_and(|output| output.status.success())
}

fn install_packages(packages: &[&str]) -> Result<()> {
    let install = ["-q", "-y", "--no-install-recommends", "install"];
    run(as_root("apt-get")?.env("DEBIAN_FRONTEND", "noninteractive").args(install).args(packages))
}

/// rustfmt and clippy, which a minimal Rust toolchain lacks.
fn install_components() -> Result<()> {
    for (program, component) in [("cargo-fmt", "rustfmt"), ("cargo-clippy", "clippy")] {
        let works = Command::new(program).arg("--version").output().is_ok_and(|output| output.status.success());
        if !works {
            ensure!(is_installed("rustup"), "{component} is missing: install it with this Rust toolchain");
            run(Command::new("rustup").args(["component", "add", component]))?;
        }
    }
    Ok(())
}

fn as_root(program: &str) -> Result<Command> {
    let id = Command::new("id").arg("-u").output()?.stdout;
    if id.trim_ascii() == b"0" {
        return Ok(Command::new(program));
    }
    if !is_installed("sudo") {
        bail!("installing packages takes root: run 'cargo xtask setup' as root once, or install sudo");
    }
    let mut command = Command::new("sudo");
    // sudo drops the environment; dpkg must not ask questions.
    command.args(["DEBIAN_FRONTEND=noninteractive", program]);
    Ok(command)
}
