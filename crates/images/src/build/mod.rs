//! Builds a bootable image of a distribution's packages, without root.
//!
//! mmdebstrap installs Debian's packages into a directory, and mke2fs makes a file system of it, both inside what
//! [`isolation`] found to work on this host. The package sources are the host's own ([`sources`]), and the guest gets
//! the same.

pub mod agent;
mod guest;
mod isolation;
mod runner;
mod sources;
mod tools;

use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use purlin_agent::PROGRAM_PATH;
use purlin_debian::{Error as HostError, Progress, cache};
use purlin_storage::{Conversion, Format, SourceFormat};
use sha2::{Digest, Sha256};

use self::{isolation::Isolation, runner::Runner, sources::Sources};
use crate::{
    Error, Metadata, Origin,
    store::{Image, Store, check_unused, disk_name},
};

/// What can be built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recipe {
    /// The image's name, if the user wants no other.
    pub image: &'static str,
    /// For people.
    title: &'static str,
    /// The release's code name.
    suite: &'static str,
}

impl Recipe {
    /// Debian 12.
    pub const DEBIAN_12: Self = Self { image: "debian-12", title: "Debian 12", suite: "bookworm" };

    /// The one that a user means: `debian` or `debian:12`.
    pub fn of_name(name: &str) -> Result<Self, Error> {
        match name {
            "debian" | "debian:12" | "debian-12" => Ok(Self::DEBIAN_12),
            other => Err(Error::UnknownBuild(other.escape_debug().to_string())),
        }
    }

    /// The size of its disk, in bytes.
    pub fn disk_size(&self) -> u64 {
        SIZE
    }

    /// A checksum of what Purlin itself puts into the image, and of how. Another Purlin's may differ.
    pub fn digest(&self) -> String {
        let mut hash = Sha256::new();
        let parts =
            [self.suite, UUID, MAKE, CUSTOMIZE, agent::SOURCE].into_iter().chain(guest::PACKAGES.iter().copied());
        for part in parts.chain(guest::FILES.iter().flat_map(|(path, content)| [*path, *content])) {
            hash.update(part.len().to_le_bytes());
            hash.update(part);
        }
        cache::hex(&hash.finalize())
    }

    fn is_another(&self, metadata: &Metadata) -> bool {
        matches!(metadata.origin, Origin::Built(_)) && metadata.recipe.as_deref() != Some(&self.digest())
    }

    /// Tells the user if `image` was built by another recipe than this one.
    pub fn compare(&self, image: &Image, progress: &dyn Progress) {
        if self.is_another(&image.metadata) {
            let name = &image.name;
            progress.note(&format!(
                "image '{name}' was built by another version of Purlin; to make it anew: purlin image build {} --name {name} \
                 --rebuild",
                self.image
            ));
        }
    }
}

/// The size of the disk. It is thin: what the guest has not written takes no room.
const SIZE: u64 = 10 << 30;
/// The file system's, so that two builds of the same packages are the same.
const UUID: &str = "5b0f2e1c-0d5c-4c1e-9a54-8d3f6f1c0b12";

/// The name of the image that a user means by `name`: one of the store's, or what it was built as (`debian`).
pub fn image_name<'a>(store: &Store, name: &'a str) -> &'a str {
    match Recipe::of_name(name) {
        Ok(recipe) if !store.has(name) && store.has(recipe.image) => recipe.image,
        _ => name,
    }
}

/// The image of `recipe` called `name`; made if it is not there yet, or if `rebuild`.
pub fn build(
    store: &Store,
    recipe: Recipe,
    name: &str,
    rebuild: bool,
    progress: &dyn Progress,
) -> Result<Image, Error> {
    let there = |image: &Result<Image, Error>| !rebuild && image.is_ok();
    let found = store.get(name);
    if there(&found) {
        return found.inspect(|image| recipe.compare(image, progress));
    }
    let lock = store.lock(name, progress)?;
    // Another process may have made it while this one waited for the lock.
    match store.get(name) {
        found if there(&found) => return found,
        Ok(image) => check_unused(&image)?,
        Err(Error::NoImage(_)) => {}
        Err(damaged @ Error::Damaged { .. }) => progress.note(&format!("{damaged}: building it anew")),
        Err(other) => return Err(other),
    }
    tools::provide(progress)?;
    let isolation = Isolation::choose(progress)?;
    for leftover in lock.leftovers()? {
        isolation.remove(&leftover)?;
    }
    store.add(&lock, name, |new, work| {
        let made = make(recipe, isolation, new, work, progress);
        if made.is_err() {
            // Files of other users of the namespace: we cannot remove them ourselves.
            isolation.remove(&work.join("root"))?;
        }
        made
    })
}

fn make(
    recipe: Recipe,
    isolation: Isolation,
    new: &Path,
    work: &Path,
    progress: &dyn Progress,
) -> Result<Metadata, Error> {
    let sources = Sources::find(work, recipe.suite, progress)?;
    write_inputs(work, &sources)?;
    let raw = work.join("disk.raw");
    let mut script = isolation.command(&work.join("make.sh"));
    script
        .current_dir(work)
        .envs(isolation.environment())
        .env("SUITE", recipe.suite)
        .env("PACKAGES", guest::PACKAGES.join(","))
        .env("SIZE", format!("{}k", SIZE >> 10))
        .env("UUID", UUID)
        .env("EPOCH", sources.date.to_string())
        .env("DISK", &raw);
    Runner::new(progress).run(&mut script)?;

    progress.step("writing the image");
    let disk = new.join(disk_name(Format::Qcow2));
    let conversion = Conversion {
        source: (&raw, SourceFormat::Disk(Format::Raw)),
        target: (&disk, Format::Qcow2),
        other_files: false,
    };
    conversion.run(&mut |done, all| progress.fraction(done as f64 / all as f64))?;
    if progress.cancelled() {
        return Err(HostError::Cancelled.into());
    }
    let origin = Origin::Built(format!("{} from {}", recipe.title, sources.mirror()));
    let mut metadata = Metadata::of_disk(&disk, Format::Qcow2, SIZE, origin).map_err(HostError::file("read", &disk))?;
    metadata.recipe = Some(recipe.digest());
    Ok(metadata)
}

/// What installs the packages, and makes a disk of them.
const MAKE: &str = include_str!("make.sh");
/// What it does to the installed system.
const CUSTOMIZE: &str = include_str!("customize.sh");

/// The scripts, the guest's own files, and apt's configuration.
fn write_inputs(work: &Path, sources: &Sources) -> Result<(), Error> {
    write(&work.join("make.sh"), 0o755, MAKE)?;
    write(&work.join("customize.sh"), 0o755, CUSTOMIZE)?;
    write(&work.join("sources/debian.sources"), 0o644, &sources.text)?;
    write(&work.join("apt.conf"), 0o644, &sources.options)?;
    let files = work.join("files");
    for (path, content) in guest::FILES {
        write(&files.join(path), 0o644, content)?;
    }
    write(&files.join(PROGRAM_PATH.trim_start_matches('/')), 0o755, agent::PROGRAM)?;
    if !sources.guest_options.is_empty() {
        write(&files.join("etc/apt/apt.conf.d/80purlin-host"), 0o644, &sources.guest_options)?;
    }
    Ok(())
}

fn write(path: &Path, mode: u32, content: impl AsRef<[u8]>) -> Result<(), Error> {
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).map_err(HostError::file("create", dir))?;
    }
    let written = fs::write(path, content).and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(mode)));
    Ok(written.map_err(HostError::file("write", path))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_of_another_recipe_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk");
        fs::write(&disk, "").unwrap();
        let image = |origin, recipe| {
            let mut metadata = Metadata::of_disk(&disk, Format::Raw, 0, origin).unwrap();
            metadata.recipe = recipe;
            metadata.write(dir.path()).unwrap();
            assert_eq!(Metadata::read(dir.path()).unwrap(), metadata);
            metadata
        };
        let recipe = Recipe::DEBIAN_12;
        let built = || Origin::Built("Debian".into());
        assert!(!recipe.is_another(&image(built(), Some(recipe.digest()))));
        assert!(recipe.is_another(&image(built(), Some("0".repeat(64)))));
        assert!(recipe.is_another(&image(built(), None)));
        assert!(!recipe.is_another(&image(Origin::Imported("file".into()), None)));
    }
}
