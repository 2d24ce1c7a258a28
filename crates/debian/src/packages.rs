//! The two packages that every guest here is made of: a kernel and busybox.

use std::path::{Path, PathBuf};

use crate::{Error, Progress, apt::PrivateApt, deb};

/// The packages, downloaded.
pub struct Packages {
    /// The kernel with its modules.
    pub kernel: PathBuf,
    /// busybox, linked statically.
    pub busybox: PathBuf,
}

impl Packages {
    /// Downloads them into `dir`, which exists and is empty. `kernels` names packages that depend on the newest
    /// kernel, the first that there is counts: distributions name them differently.
    pub fn download(dir: &Path, architecture: &str, kernels: &[&str], progress: &dyn Progress) -> Result<Self, Error> {
        let apt = PrivateApt::new(dir, architecture, progress)?;
        let complaint = apt.update()?;
        let kernel = newest_kernel(&apt, kernels, complaint.clone())?;
        if let Some(complaint) = complaint {
            progress.note(&format!("going on without one of the package sources: {complaint}"));
        }
        match <[PathBuf; 2]>::try_from(apt.download(&[&kernel, "busybox-static"])?) {
            Ok([kernel, busybox]) => Ok(Self { kernel, busybox }),
            Err(_) => Err(Error::NoPackage("both packages".into())),
        }
    }

    /// Writes the kernel, a bzImage, to `to`.
    pub fn extract_kernel(&self, to: &Path) -> Result<(), Error> {
        let is_kernel = |path: &Path| path.starts_with("boot") && file_name(path).starts_with("vmlinuz-");
        deb::extract(&self.kernel, "a kernel", is_kernel, to)
    }

    /// Writes the kernel's modules of these names into the directory `to`, as far as it has them as modules: as
    /// `NAME.ko`, with a further suffix where they are compressed.
    pub fn extract_modules(&self, names: &[&str], to: &Path) -> Result<(), Error> {
        let is_wanted = |path: &Path| {
            let file = file_name(path);
            names.iter().any(|name| file.strip_prefix(name).is_some_and(|rest| rest.starts_with(".ko")))
        };
        deb::extract_all(&self.kernel, is_wanted, to)
    }

    /// Writes the program busybox to `to`.
    pub fn extract_busybox(&self, to: &Path) -> Result<(), Error> {
        let is_busybox = |path: &Path| file_name(path) == "busybox" && !path.starts_with("usr/share");
        deb::extract(&self.busybox, "busybox", is_busybox, to)
    }
}

/// The package with the kernel itself, which the first of `packages` that there is depends on.
fn newest_kernel(apt: &PrivateApt, packages: &[&str], complaint: Option<String>) -> Result<String, Error> {
    for package in packages {
        let Some(control) = apt.show(package)? else { continue };
        if let Some(kernel) = control.depends().find(|name| name.starts_with("linux-image-")) {
            return Ok(kernel.to_owned());
        }
    }
    let wanted = packages.join(" or ");
    match complaint {
        Some(_) => Err(apt.failure(&wanted, complaint)),
        None => Err(Error::NoPackage(wanted)),
    }
}

fn file_name(path: &Path) -> std::borrow::Cow<'_, str> {
    path.file_name().unwrap_or_default().to_string_lossy()
}
