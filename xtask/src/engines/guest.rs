//! The image of the guest: Debian's kernel for virtual machines, an initramfs with the work and the agent, and a file system
//! that the work is written to.

use std::{
    fs::{self, File},
    io::Write,
    path::Path,
    process::Command,
};

use anyhow::{Context, Result};
use purlin_debian::{
    guest::{Recipe, obtain},
    initramfs::Initramfs,
};
use purlin_images::build::agent;

use crate::{
    guests::{Printed, cache},
    shell,
};

/// Modules of the kernel: for the disk, vsock, the disk's file system, the power button.
const MODULES: &[&str] = &[
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "virtio_blk",
    "vsock",
    "vmw_vsock_virtio_transport_common",
    "vmw_vsock_virtio_transport",
    "crc32c_generic",
    "crc16",
    "mbcache",
    "jbd2",
    "ext4",
    "button",
    "evdev",
];

/// Makes it: a raw disk without partitions.
pub fn make(image: &Path) -> Result<()> {
    let recipe = Recipe {
        name: "test-engines",
        architecture: "amd64",
        kernels: &["linux-image-cloud-amd64"],
        modules: MODULES,
        init: include_str!("init.sh"),
    };
    let guest = obtain(&cache(), &recipe, &Printed(recipe.name))?;
    let root = tempfile::tempdir()?;
    let (boot, etc) = (root.path().join("boot"), root.path().join("etc/kernel"));
    for directory in [&boot, &etc] {
        fs::create_dir_all(directory)?;
    }
    fs::copy(&guest.kernel, boot.join("vmlinuz"))?;
    fs::copy(&guest.initrd, boot.join("initrd.img"))?;
    add_agent(&boot.join("initrd.img"))?;
    // A kernel that has crashed ends the run.
    fs::write(etc.join("cmdline"), "console=ttyS0 quiet panic=-1")?;
    fs::write(root.path().join("etc/os-release"), "ID=test")?;
    let _ = fs::remove_file(image);
    let mut make = Command::new("/sbin/mke2fs");
    shell::run(make.args(["-q", "-F", "-t", "ext4", "-d"]).arg(root.path()).arg(image).arg("64M"))
        .context("mke2fs is in Debian's package e2fsprogs")
}

/// The kernel unpacks several archives, one behind the other.
fn add_agent(initrd: &Path) -> Result<()> {
    let mut archive = Initramfs::new(File::options().append(true).open(initrd)?);
    archive.file("bin/purlin-agent", 0o755, agent::PROGRAM)?;
    Ok(archive.finish()?.flush()?)
}
