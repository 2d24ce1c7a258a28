//! A guest made of a distribution's own kernel and busybox: what `purlin run shell` boots.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

use crate::{Error, Progress, cache::Cache, cache::hex, initramfs::Initramfs, packages::Packages};

/// What a guest is made of.
pub struct Recipe<'a> {
    /// The name of its entry in the cache.
    pub name: &'a str,
    /// The packages' architecture: `amd64` or `i386`.
    pub architecture: &'a str,
    /// Packages that depend on the newest kernel, the first that there is counts: distributions name them differently.
    pub kernels: &'a [&'a str],
    /// Modules of the kernel that the script finds in /lib/modules, as far as they are not built in.
    pub modules: &'a [&'a str],
    /// The script that runs as process 1, by busybox's shell.
    pub init: &'a str,
}

impl Recipe<'static> {
    /// The guest with a shell on its console.
    pub const SHELL: Self = Recipe {
        name: "debian",
        architecture: "amd64",
        // Debian's kernel for virtual machines, Ubuntu's, and what both have for any machine.
        kernels: &["linux-image-cloud-amd64", "linux-image-virtual", "linux-image-amd64", "linux-image-generic"],
        modules: &[
            "virtio_ring",
            "virtio",
            "virtio_pci_modern_dev",
            "virtio_pci_legacy_dev",
            "virtio_pci",
            "virtio_console",
            "virtio_blk",
            "failover",
            "net_failover",
            "virtio_net",
            "vsock",
            "vmw_vsock_virtio_transport_common",
            "vmw_vsock_virtio_transport",
            "virtio_balloon",
            "pvpanic",
            "pvpanic-mmio",
        ],
        init: include_str!("init.sh"),
    };
}

/// A guest's files.
pub struct Guest {
    /// The kernel, a bzImage.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initrd: PathBuf,
}

const KERNEL: &str = "vmlinuz";
const INITRD: &str = "initrd";

/// The guest that `recipe` describes, from the cache or else from the host's package mirror.
pub fn obtain(cache: &Cache, recipe: &Recipe, progress: &dyn Progress) -> Result<Guest, Error> {
    let entry = cache.entry(&entry_name(recipe), &[KERNEL, INITRD], progress, |new, work| {
        let packages = Packages::download(work, recipe.architecture, recipe.kernels, progress)?;
        progress.step("unpacking");
        packages.extract_kernel(&new.join(KERNEL))?;
        let (busybox, modules, initrd) = (work.join("busybox"), work.join("modules"), new.join(INITRD));
        packages.extract_busybox(&busybox)?;
        fs::create_dir(&modules).map_err(Error::file("create", &modules))?;
        if !recipe.modules.is_empty() {
            packages.extract_modules(recipe.modules, &modules)?;
        }
        write_initrd(&initrd, &busybox, &modules, recipe.init).map_err(Error::file("write", &initrd))
    })?;
    Ok(Guest { kernel: entry.join(KERNEL), initrd: entry.join(INITRD) })
}

/// A new version of the init script, or of the lists, makes a new entry.
fn entry_name(recipe: &Recipe) -> String {
    let version = Sha256::new().chain_update(recipe.kernels.join(" ")).chain_update(recipe.modules.join(" "));
    let version = version.chain_update(recipe.init).finalize();
    format!("{}-{}-{}", recipe.name, recipe.architecture, &hex(&version)[..8])
}

fn write_initrd(path: &Path, busybox: &Path, modules: &Path, init: &str) -> io::Result<()> {
    let mut archive = Initramfs::new(io::BufWriter::new(File::create(path)?));
    for directory in ["bin", "dev", "etc", "lib", "lib/modules", "proc", "root", "run", "sys", "tmp"] {
        archive.directory(directory)?;
    }
    for link in ["sbin", "usr"] {
        archive.symlink(link, if link == "usr" { "." } else { "bin" })?;
    }
    // Process 1's standard streams, before devtmpfs is mounted.
    archive.character_device("dev/console", 5, 1)?;
    archive.file("bin/busybox", 0o755, &fs::read(busybox)?)?;
    archive.symlink("bin/sh", "busybox")?;
    let mut modules = fs::read_dir(modules)?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
    modules.sort();
    for module in modules {
        let name = module.file_name().unwrap_or_default().to_string_lossy();
        archive.file(&format!("lib/modules/{name}"), 0o644, &fs::read(&module)?)?;
    }
    archive.file("init", 0o755, init.as_bytes())?;
    use io::Write as _;
    archive.finish()?.flush()
}
