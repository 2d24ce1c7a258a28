//! A machine of an image, ready to be started: a disk of its own, a seed for cloud-init, its kernel.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use purlin_debian::{Error as HostError, Progress, home};
use purlin_storage::{Format, NewImage, open_read_only};
use rustix::fs::{FlockOperation, flock};
use tempfile::TempDir;

use crate::{
    Error, Origin,
    boot::{self, BootFiles},
    build::{Recipe, build},
    seed::{self, Seed},
    ssh::{self, Keys},
    store::{Image, Store},
};

/// What to make ready.
#[derive(Clone, Debug, Default)]
pub struct Request<'a> {
    /// The image: one in the store, or what can be built (`debian`, `debian:12`).
    pub image: &'a str,
    /// The guest's host name; the image's name (as far as it can be one) if there is none.
    pub host_name: Option<&'a str>,
    /// The user's user-data for cloud-init.
    pub user_data: Option<&'a [u8]>,
    /// Public keys that may log in, as lines of authorized_keys(5); the user's own ([`ssh::keys_of_user`]) if there are none.
    pub ssh_keys: Option<&'a [String]>,
    /// The disk's size in bytes, if it is to be larger than the image's.
    pub disk_size: Option<u64>,
    /// More words for the kernel's command line.
    pub arguments: Option<&'a str>,
}

/// A machine's files.
#[derive(Debug)]
pub struct Files {
    /// The image that it stands on.
    pub image: Image,
    /// Its disk, a thin qcow2 overlay.
    pub disk: PathBuf,
    /// The disk for cloud-init, raw, to be attached for reading only.
    pub seed: PathBuf,
    /// The kernel.
    pub kernel: PathBuf,
    /// The initial RAM disks, in order.
    pub initrds: Vec<PathBuf>,
    /// The kernel's command line.
    pub cmdline: String,
    /// The private key to name to ssh with -i, where ssh does not find one by itself.
    pub identity: Option<PathBuf>,
}

/// A machine that is there for one run; its files are gone when this is dropped.
#[derive(Debug)]
pub struct Prepared {
    files: Files,
    _dir: RunDir,
}

impl std::ops::Deref for Prepared {
    type Target = Files;

    fn deref(&self) -> &Files {
        &self.files
    }
}

impl std::ops::DerefMut for Prepared {
    fn deref_mut(&mut self) -> &mut Files {
        &mut self.files
    }
}

/// Makes a machine of `request.image` ready for one run; the image is built first if need be.
pub fn prepare_run(store: &Store, request: &Request, progress: &dyn Progress) -> Result<Prepared, Error> {
    let image = checked_image(store, request, progress)?;
    let dir = RunDir::new()?;
    let files = make_files(dir.path(), image, request)?;
    Ok(Prepared { files, _dir: dir })
}

/// Makes a machine of `request.image` ready in `dir`, which is there and empty; the image is built first if need be. On an
/// error `dir` may have files in it.
pub fn prepare_in(dir: &Path, store: &Store, request: &Request, progress: &dyn Progress) -> Result<Files, Error> {
    let image = checked_image(store, request, progress)?;
    make_files(dir, image, request)
}

/// The image, once it is known that the machine can be made of it.
fn checked_image(store: &Store, request: &Request, progress: &dyn Progress) -> Result<Image, Error> {
    // What the user said wrong is told before anything long begins.
    request.check()?;
    let image = find_or_build(store, request, progress)?;
    check_size(request, image.metadata.virtual_size)?;
    Ok(image)
}

fn make_files(dir: &Path, image: Image, request: &Request) -> Result<Files, Error> {
    let keys = match request.ssh_keys {
        Some(keys) => Keys { public: keys.to_vec(), identity: None },
        None => ssh::keys_of_user()?,
    };
    let disk = dir.join("disk.qcow2");
    let overlay = NewImage::overlay(&disk, image.disk(), image.format);
    request.disk_size.into_iter().fold(overlay, NewImage::size).create()?;
    let BootFiles { kernel, initrds, cmdline } =
        boot::copy(&open_read_only(&disk, Some(Format::Qcow2))?, &image.name, dir)?;

    let host_name = request.guest_name()?;
    let hostname_argument = format!("systemd.hostname={host_name}");
    let user_data = request.user_data.map(<[u8]>::to_vec);
    // What was built has it.
    let agent = !matches!(image.metadata.origin, Origin::Built(_));
    let seed = Seed { instance_id: instance_id(), host_name, ssh_keys: keys.public, user_data, agent };
    let seed_path = dir.join("seed.img");
    let seed_disk = seed.to_disk().map_err(HostError::file("make", &seed_path))?;
    fs::write(&seed_path, seed_disk).map_err(HostError::file("write", &seed_path))?;
    // The name is there before cloud-init is.
    let words = [Some(cmdline.as_str()), Some(hostname_argument.as_str()), request.arguments];
    let cmdline = words.into_iter().flatten().filter(|w| !w.is_empty()).collect::<Vec<_>>().join(" ");
    Ok(Files { image, disk, seed: seed_path, kernel, initrds, cmdline, identity: keys.identity })
}

/// The image in the store of that name, or that which can be built of it.
fn find_or_build(store: &Store, request: &Request, progress: &dyn Progress) -> Result<Image, Error> {
    match (store.get(request.image), Recipe::of_name(request.image)) {
        (Err(Error::NoImage(_) | Error::Name(_)), Ok(recipe)) => {
            if !store.has(recipe.image) {
                check_size(request, recipe.disk_size())?;
            }
            build(store, recipe, recipe.image, false, progress)
        }
        (Ok(image), Ok(recipe)) => Ok(image).inspect(|image| recipe.compare(image, progress)),
        (found, _) => found,
    }
}

impl Request<'_> {
    /// Whether it makes sense, as far as that is known without the image.
    pub fn check(&self) -> Result<(), Error> {
        self.guest_name()?;
        self.user_data.map_or(Ok(()), seed::check_user_data)
    }

    /// The guest's host name.
    pub fn guest_name(&self) -> Result<String, Error> {
        if let Some(name) = self.host_name {
            seed::check_host_name(name)?;
            return Ok(name.to_owned());
        }
        // debian:12 → debian.
        let name: String = self.image.split(':').next().unwrap_or_default().replace(['.', '_'], "-");
        let name = name.trim_matches('-');
        Ok(if seed::check_host_name(name).is_ok() { name.to_owned() } else { "purlin".to_owned() })
    }
}

/// A disk can be larger than its image, but not smaller: the file system in it would be cut off.
fn check_size(request: &Request, image: u64) -> Result<(), Error> {
    match request.disk_size {
        Some(wanted) if wanted < image => Err(Error::DiskSize { wanted, image }),
        _ => Ok(()),
    }
}

/// No other machine has it: cloud-init does its first-boot work for each new one.
fn instance_id() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    format!("purlin-{:x}-{:x}", now.as_nanos(), std::process::id())
}

/// The files of one run, in `runs` in [`home::cache`]. They are removed at its end, or by a later run if this process
/// was killed: that sees by the lock that nobody uses them.
#[derive(Debug)]
struct RunDir {
    dir: TempDir,
    _lock: File,
}

const LOCK: &str = "lock";

impl RunDir {
    fn new() -> Result<Self, Error> {
        Ok(Self::new_in(&home::cache()?.join("runs"))?)
    }

    fn new_in(runs: &Path) -> Result<Self, HostError> {
        fs::create_dir_all(runs).map_err(HostError::file("create", runs))?;
        remove_left(runs);
        let dir = tempfile::Builder::new().prefix("run-").tempdir_in(runs);
        let dir = dir.map_err(HostError::file("create a directory in", runs))?;
        let path = dir.path().join(LOCK);
        let lock = File::create(&path).map_err(HostError::file("create", &path))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|e| HostError::file("lock", &path)(e.into()))?;
        Ok(Self { dir, _lock: lock })
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }
}

/// Removes the files of runs whose process is gone. One without a lock yet is about to begin.
fn remove_left(runs: &Path) {
    for entry in fs::read_dir(runs).into_iter().flatten().flatten() {
        let lock = File::open(entry.path().join(LOCK));
        let unused = |lock: &File| flock(lock, FlockOperation::NonBlockingLockExclusive).is_ok();
        let left = match &lock {
            Ok(lock) => unused(lock),
            Err(error) if error.kind() == io::ErrorKind::NotFound => is_old(&entry),
            Err(_) => false,
        };
        if left {
            // Another run may be removing it, too.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// Whether it was made more than a minute ago, far longer than it takes to lock it.
fn is_old(entry: &fs::DirEntry) -> bool {
    let age = entry.metadata().and_then(|m| m.modified()).ok().and_then(|made| made.elapsed().ok());
    age.is_some_and(|age| age.as_secs() > 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_killed_run_left_is_removed() {
        let runs = tempfile::tempdir().unwrap();
        let running = RunDir::new_in(runs.path()).unwrap();
        fs::write(running.path().join("disk.qcow2"), b"x").unwrap();
        let killed = runs.path().join("run-killed");
        fs::create_dir(&killed).unwrap();
        fs::write(killed.join(LOCK), "").unwrap();
        let other = RunDir::new_in(runs.path()).unwrap();
        assert!(!killed.exists());
        assert!(running.path().join("disk.qcow2").exists() && other.path().exists());
        let path = running.path().to_owned();
        drop(running);
        assert!(!path.exists());
    }

    #[test]
    fn host_names() {
        let of = |image, host_name| host_name_of(image, host_name);
        assert_eq!(of("debian", None).unwrap(), "debian");
        assert_eq!(of("debian:12", None).unwrap(), "debian");
        assert_eq!(of("my_image.1", None).unwrap(), "my-image-1");
        assert_eq!(of("debian", Some("web")).unwrap(), "web");
        assert!(of("debian", Some("a b")).is_err());
    }

    fn host_name_of(image: &str, wanted: Option<&str>) -> Result<String, Error> {
        Request { image, host_name: wanted, ..Request::default() }.guest_name()
    }
}
