//! The user's images: directories with a disk and its [`Metadata`], each made whole or not at all.

use std::{
    fs,
    path::{Path, PathBuf},
};

use purlin_debian::{
    Error as HostError, Progress,
    entries::{Entries, Locked},
    home,
};
use purlin_storage::{Disk, DiskSpec, Format, OpenError};

use crate::{Error, Metadata};

/// A directory of images.
pub struct Store {
    entries: Entries,
}

/// One image.
#[derive(Clone, Debug)]
pub struct Image {
    /// Its name.
    pub name: String,
    /// What is known of it.
    pub metadata: Metadata,
    /// The disk's format.
    pub format: Format,
    dir: PathBuf,
}

impl Image {
    /// Where its disk is.
    pub fn disk(&self) -> PathBuf {
        self.dir.join(disk_name(self.format))
    }

    fn read(name: &str, dir: PathBuf) -> Result<Self, Error> {
        let damaged = |reason| Error::Damaged { name: name.to_owned(), reason };
        let metadata = Metadata::read(&dir).map_err(damaged)?;
        let format = metadata.format().map_err(damaged)?;
        let image = Self { name: name.to_owned(), metadata, format, dir };
        match fs::metadata(image.disk()) {
            Ok(file) if file.len() == image.metadata.file_size => Ok(image),
            Ok(_) => Err(damaged("its disk has not the size that it had".into())),
            Err(error) => Err(damaged(format!("its disk: {error}"))),
        }
    }
}

/// The file's name of a disk in an image's directory.
pub(crate) fn disk_name(format: Format) -> &'static str {
    match format {
        Format::Raw => "disk.raw",
        Format::Qcow2 => "disk.qcow2",
    }
}

impl Store {
    /// The user's: `images` in [`home::data`].
    pub fn of_user() -> Result<Self, Error> {
        Ok(Self::at(home::data()?.join("images")))
    }

    /// The one in `dir`, which is made at the first use.
    pub fn at(dir: impl Into<PathBuf>) -> Self {
        Self { entries: Entries::at(dir) }
    }

    /// The image `name`.
    pub fn get(&self, name: &str) -> Result<Image, Error> {
        let dir = self.path(name)?;
        if dir.exists() { Image::read(name, dir) } else { Err(Error::NoImage(name.into())) }
    }

    /// Whether there is such an image, be it a damaged one.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.path(name).is_ok_and(|dir| dir.exists())
    }

    /// All images in the order of their names, those that are damaged as errors.
    pub fn list(&self) -> Result<Vec<Result<Image, Error>>, Error> {
        let dir = self.entries.dir();
        let found = match fs::read_dir(dir) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(vec![]),
            found => found.map_err(HostError::file("read", dir))?,
        };
        let directories = found.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        let names = directories.filter_map(|entry| entry.file_name().into_string().ok());
        let mut names: Vec<_> = names.filter(|name| check_name(name).is_ok()).collect();
        names.sort();
        Ok(names.iter().map(|name| Image::read(name, self.entries.path(name))).collect())
    }

    /// Makes the image `name`: `make` puts a disk into a new directory (its first argument) and may use another one for
    /// what it needs on the way (the second).
    pub(crate) fn add(
        &self,
        lock: &Locked,
        name: &str,
        make: impl FnOnce(&Path, &Path) -> Result<Metadata, Error>,
    ) -> Result<Image, Error> {
        let dir = lock.make(|new, work| -> Result<(), Error> {
            let metadata = make(new, work)?;
            Ok(metadata.write(new).map_err(HostError::file("write", new))?)
        })?;
        Image::read(name, dir)
    }

    /// Takes the right to change the image `name`.
    pub(crate) fn lock<'a>(&'a self, name: &'a str, progress: &dyn Progress) -> Result<Locked<'a>, Error> {
        check_name(name)?;
        let waiting = format!("another purlin is making or deleting the image '{name}': waiting for it");
        Ok(self.entries.lock(name, &waiting, progress)?)
    }

    /// Deletes an image, a damaged one too, unless a machine runs on it.
    pub fn delete(&self, name: &str, progress: &dyn Progress) -> Result<(), Error> {
        if !self.path(name)?.exists() {
            return Err(Error::NoImage(name.into()));
        }
        let lock = self.lock(name, progress)?;
        if let Ok(image) = Image::read(name, lock.path()) {
            check_unused(&image)?;
        }
        Ok(lock.remove()?)
    }

    /// Removes what makers of images have left behind that were killed. What somebody is at stays; so does what takes another
    /// build to be removed.
    pub fn sweep(&self) {
        for name in self.entries.with_leftovers() {
            if let Ok(Some(lock)) = self.entries.try_lock(&name) {
                let _ = lock.remove_leftovers();
            }
        }
    }

    fn path(&self, name: &str) -> Result<PathBuf, Error> {
        check_name(name)?;
        Ok(self.entries.path(name))
    }
}

/// An error if a machine stands on the image: who opens a disk for writing must be its only user.
pub(crate) fn check_unused(image: &Image) -> Result<(), Error> {
    match Disk::open(&DiskSpec::new(image.disk()).format(image.format)) {
        Err(OpenError::InUse { .. }) => Err(Error::InUse(image.name.clone())),
        _ => Ok(()),
    }
}

/// Names are directories', and part of others' (`NAME.lock`, `NAME.tmp-…`).
fn check_name(name: &str) -> Result<(), Error> {
    let good = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-._".contains(&byte);
    let begins = name.bytes().next().is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    let ours = name.ends_with(".lock") || name.contains(".tmp-");
    if begins && name.len() <= 63 && name.bytes().all(good) && !ours {
        Ok(())
    } else {
        Err(Error::Name(name.escape_debug().to_string()))
    }
}

#[cfg(test)]
mod tests {
    use purlin_storage::NewImage;

    use super::*;
    use crate::Origin;

    struct Silent;

    impl Progress for Silent {
        fn step(&self, _what: &str) {}
        fn fraction(&self, _done: f64) {}
        fn note(&self, _what: &str) {}
    }

    fn add(store: &Store, name: &str) -> Result<Image, Error> {
        let lock = store.lock(name, &Silent)?;
        store.add(&lock, name, |new, _| {
            let disk = new.join(disk_name(Format::Qcow2));
            NewImage::empty(&disk, Format::Qcow2, 1 << 20).create()?;
            let origin = Origin::Imported("/tmp/x".into());
            Ok(Metadata::of_disk(&disk, Format::Qcow2, 1 << 20, origin).map_err(HostError::file("read", &disk))?)
        })
    }

    #[test]
    fn what_is_added_is_found_and_deleted() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::at(dir.path().join("images"));
        assert!(store.list().unwrap().is_empty());
        let added = add(&store, "b").unwrap();
        add(&store, "a").unwrap();
        let names: Vec<_> = store.list().unwrap().into_iter().map(|image| image.unwrap().name).collect();
        assert_eq!(names, ["a", "b"]);
        let found = store.get("b").unwrap();
        assert_eq!((found.metadata, found.dir), (added.metadata, added.dir));
        store.delete("b", &Silent).unwrap();
        assert!(matches!(store.get("b"), Err(Error::NoImage(_))));
        assert!(matches!(store.delete("b", &Silent), Err(Error::NoImage(_))));
        assert!(!dir.path().join("images/b.lock").exists());
    }

    #[test]
    fn a_failure_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::at(dir.path());
        let lock = store.lock("a", &Silent).unwrap();
        let failed = store.add(&lock, "a", |new, _| {
            fs::write(new.join("disk.qcow2"), "half").unwrap();
            Err(Error::NoRelease)
        });
        assert!(matches!(failed, Err(Error::NoRelease)));
        assert!(store.list().unwrap().is_empty());
        drop(lock);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn an_image_in_use_stays() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::at(dir.path());
        let image = add(&store, "a").unwrap();
        let overlay = dir.path().join("overlay.qcow2");
        NewImage::overlay(&overlay, image.disk(), image.format).create().unwrap();
        let running = Disk::open(&DiskSpec::new(&overlay)).unwrap();
        assert!(matches!(store.delete("a", &Silent), Err(Error::InUse(_))));
        drop(running);
        store.delete("a", &Silent).unwrap();
    }

    #[test]
    fn damage_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::at(dir.path());
        for damage in ["disk.qcow2", "image.json"] {
            let image = add(&store, "a").unwrap();
            fs::write(image.dir.join(damage), "{}").unwrap();
            assert!(matches!(store.get("a"), Err(Error::Damaged { .. })), "{damage}");
            assert!(store.list().unwrap()[0].is_err());
            store.delete("a", &Silent).unwrap();
        }
    }

    #[test]
    fn names() {
        for good in ["debian-12", "a", "0.1_x"] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        let long = "a".repeat(64);
        for bad in ["", ".", "..", "a/b", "A", "-a", ".a", "a b", "a\n", "ä", "x.lock", "x.tmp-1", &long] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }
}
