//! The outer guest's system, from Debian's packages: a kernel, and an initramfs with busybox and the modules of KVM and of
//! disks.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Result;
use purlin_debian::{Error, deb, guest::Guest, initramfs::Initramfs, packages::Packages};

use crate::guests::{Printed, cache};

const KERNEL: &str = "vmlinuz";
const INITRD: &str = "initrd";

/// The kernel and an initramfs that lacks `/init`: whoever boots it appends an archive with that. Its `/modules` are
/// to be inserted in the order of their names.
pub fn obtain() -> Result<Guest> {
    let progress = Printed("outer guest");
    let entry = cache().entry("outer-amd64-disks", &[KERNEL, INITRD], &progress, |new, work| {
        let packages = Packages::download(work, "amd64", &["linux-image-cloud-amd64"], &progress)?;
        packages.extract_kernel(&new.join(KERNEL))?;
        let busybox = work.join("busybox");
        packages.extract_busybox(&busybox)?;
        let executable = fs::set_permissions(&busybox, fs::Permissions::from_mode(0o755));
        executable.map_err(Error::file("change the mode of", &busybox))?;
        let tree = work.join("kernel");
        deb::unpack(&packages.kernel, &tree)?;
        let mut modules = Modules { tree: &tree, busybox: &busybox, found: Vec::new() };
        for name in MODULES {
            if !modules.visit(name).map_err(Error::file("read the modules in", &tree))? {
                let package = packages.kernel.file_name().unwrap_or_default().to_string_lossy().into_owned();
                return Err(Error::Contents {
                    package,
                    wanted: "KVM for AMD's processors, and virtio's disks, as modules",
                });
            }
        }
        let initrd = new.join(INITRD);
        write_initrd(&initrd, &busybox, &modules.found).map_err(Error::file("write", &initrd))
    })?;
    Ok(Guest { kernel: entry.join(KERNEL), initrd: entry.join(INITRD) })
}

const MODULES: [&str; 3] = ["kvm_amd", "virtio_pci", "virtio_blk"];

fn write_initrd(path: &Path, busybox: &Path, modules: &[(String, Vec<u8>)]) -> io::Result<()> {
    let mut archive = Initramfs::new(BufWriter::new(File::create(path)?));
    for directory in ["bin", "dev", "modules", "proc", "sys", "tmp"] {
        archive.directory(directory)?;
    }
    // Process 1's standard streams, before devtmpfs is mounted.
    archive.character_device("dev/console", 5, 1)?;
    archive.file("bin/busybox", 0o755, &fs::read(busybox)?)?;
    archive.symlink("bin/sh", "busybox")?;
    for (number, (name, module)) in modules.iter().enumerate() {
        archive.file(&format!("modules/{number:02}-{name}.ko"), 0o644, module)?;
    }
    archive.finish()?.flush()
}

/// The modules of a kernel package, each found after those that it needs itself.
struct Modules<'a> {
    tree: &'a Path,
    busybox: &'a Path,
    found: Vec<(String, Vec<u8>)>,
}

impl Modules<'_> {
    /// Finds the module and those that it needs. False if there is none of this name: then it is built into the kernel,
    /// or the kernel lacks it.
    fn visit(&mut self, name: &str) -> io::Result<bool> {
        if self.found.iter().any(|(found, _)| found == name) {
            return Ok(true);
        }
        let is_it = |file: &str| file.split_once(".ko").is_some_and(|(stem, _)| stem.replace('-', "_") == name);
        let Some(path) = find(self.tree, &is_it)? else { return Ok(false) };
        let module = self.read(&path)?;
        for dependency in dependencies(&module) {
            self.visit(&dependency)?;
        }
        self.found.push((name.to_owned(), module));
        Ok(true)
    }

    /// Debian 12 has its modules as they are, later ones have them compressed.
    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        if path.extension().is_some_and(|extension| extension == "ko") {
            return fs::read(path);
        }
        let output = Command::new(self.busybox).args(["xz", "-dc"]).arg(path).output()?;
        if output.status.success() {
            Ok(output.stdout)
        } else {
            Err(io::Error::other(format!("{}: {}", path.display(), String::from_utf8_lossy(&output.stderr).trim())))
        }
    }
}

/// The file below `dir` whose name fits.
fn find(dir: &Path, fits: &impl Fn(&str) -> bool) -> io::Result<Option<PathBuf>> {
    for entry in fs::read_dir(dir)? {
        let (entry, kind) = entry.and_then(|entry| Ok((entry.path(), entry.file_type()?)))?;
        if kind.is_file() && entry.file_name().and_then(|name| name.to_str()).is_some_and(fits) {
            return Ok(Some(entry));
        }
        if kind.is_dir()
            && let Some(found) = find(&entry, fits)?
        {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// `depends=` in the module's .modinfo section: names with commas between, as `modprobe` reads them.
fn dependencies(module: &[u8]) -> Vec<String> {
    let key = b"\0depends=";
    let Some(at) = module.windows(key.len()).position(|w| w == key) else { return Vec::new() };
    let value = module[at + key.len()..].split(|b| *b == 0).next().unwrap_or_default();
    let names = String::from_utf8_lossy(value);
    names.split(',').filter(|n| !n.is_empty()).map(|n| n.replace('-', "_")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_read_from_modinfo() {
        let module = b"\x7fELF...\0license=GPL\0depends=kvm,cpu-common\0retpoline=Y\0";
        assert_eq!(dependencies(module), ["kvm", "cpu_common"]);
        assert!(dependencies(b"\0depends=\0name=irqbypass\0").is_empty());
        assert!(dependencies(b"no section").is_empty());
    }
}
