//! Directories that are made whole or not at all, by one process at a time.
//!
//! An entry `name` is a directory `name/`; `name.lock` is held by the process that makes or removes it, in `name.tmp-…`
//! until it is whole. The lock's file is there as long as the lock: its holder, and nobody else, removes it.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io,
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};

use crate::{Error, Progress};

/// A directory of entries.
pub struct Entries {
    dir: PathBuf,
}

impl Entries {
    /// Those in `dir`, which is made at the first use.
    pub fn at(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    /// The directory that they are in.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the entry `name` is, if it is there.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Takes the lock of an entry, unless another process has it.
    pub fn try_lock<'a>(&'a self, name: &'a str) -> Result<Option<Locked<'a>>, Error> {
        let path = self.dir.join(format!("{name}.lock"));
        Ok(try_lock(&path)?.map(|file| Locked { entries: self, name, path, _file: file }))
    }

    /// Names of entries that somebody makes or removes, or was at when they were killed.
    pub fn with_leftovers(&self) -> BTreeSet<String> {
        let found = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        let names = found.filter_map(|entry| entry.file_name().into_string().ok());
        let of = |name: String| {
            let temporary = name.split_once(".tmp-").map(|(of, _)| of.to_owned());
            temporary.or_else(|| name.strip_suffix(".lock").map(str::to_owned))
        };
        names.filter_map(of).collect()
    }

    /// Takes the lock of an entry, which need not be there; it is given back with the value, however the process ends.
    /// `waiting` is noted if another process has it.
    pub fn lock<'a>(&'a self, name: &'a str, waiting: &str, progress: &dyn Progress) -> Result<Locked<'a>, Error> {
        fs::create_dir_all(&self.dir).map_err(Error::file("create", &self.dir))?;
        let path = self.dir.join(format!("{name}.lock"));
        let mut told = false;
        loop {
            if let Some(file) = try_lock(&path)? {
                return Ok(Locked { entries: self, name, path, _file: file });
            }
            if progress.cancelled() {
                return Err(Error::Cancelled);
            }
            if !told {
                progress.note(waiting);
                told = true;
            }
            thread::sleep(Duration::from_millis(50));
        }
    }
}

/// The locked file at `path`, which is made if need be; `None` if another process has it.
fn try_lock(path: &Path) -> Result<Option<File>, Error> {
    let file = File::options().create(true).append(true).open(path).map_err(Error::file("create", path))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        // Its holder may have removed it since it was opened; a lock on it would then keep nobody out.
        Ok(()) => Ok(is_at(&file, path).map_err(Error::file("lock", path))?.then_some(file)),
        Err(Errno::WOULDBLOCK | Errno::INTR) => Ok(None),
        Err(error) => Err(Error::file("lock", path)(error.into())),
    }
}

/// Whether it is this file that `path` leads to.
fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let open = file.metadata()?;
    match fs::metadata(path) {
        Ok(found) => Ok((found.dev(), found.ino()) == (open.dev(), open.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// An entry that this process alone may change.
pub struct Locked<'a> {
    entries: &'a Entries,
    name: &'a str,
    /// The lock's file.
    path: PathBuf,
    _file: File,
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        // Still locked. If it stays, it is found unlocked by the next.
        let _ = fs::remove_file(&self.path);
    }
}

impl Locked<'_> {
    /// Where the entry is, if it is there.
    pub fn path(&self) -> PathBuf {
        self.entries.path(self.name)
    }

    /// Makes the entry, in place of an old one: `make` fills a new directory (its first argument) and may use another
    /// one for what it needs on the way (the second). If it fails, everything stays as it was.
    pub fn make<E: From<Error>>(&self, make: impl FnOnce(&Path, &Path) -> Result<(), E>) -> Result<PathBuf, E> {
        self.remove_leftovers()?;
        let (dir, entry) = (&self.entries.dir, self.path());
        // Dropped, and with it removed, on every way out.
        let temporary = tempfile::Builder::new().prefix(&self.temporary_prefix()).tempdir_in(dir);
        let temporary = temporary.map_err(Error::file("create a directory in", dir))?;
        let [new, work, old] = ["new", "work", "old"].map(|sub| temporary.path().join(sub));
        for dir in [&new, &work] {
            fs::create_dir(dir).map_err(Error::file("create", dir))?;
        }
        make(&new, &work)?;
        // A crash of the host must not leave a whole name on half a file.
        sync_files(&new).map_err(Error::file("write", &new))?;
        if entry.exists() {
            fs::rename(&entry, &old).map_err(Error::file("replace", &entry))?;
        }
        fs::rename(&new, &entry).map_err(Error::file("create", &entry))?;
        sync(dir).map_err(Error::file("write", dir))?;
        Ok(entry)
    }

    /// Removes the entry, if it is there.
    pub fn remove(&self) -> Result<(), Error> {
        self.remove_leftovers()?;
        let (dir, entry) = (&self.entries.dir, self.path());
        let temporary = tempfile::Builder::new().prefix(&self.temporary_prefix()).tempdir_in(dir);
        let temporary = temporary.map_err(Error::file("create a directory in", dir))?;
        // Gone at once, not file by file.
        match fs::rename(&entry, temporary.path().join("old")) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::file("remove", &entry)(error)),
            _ => Ok(()),
        }
    }

    /// Removes the directories that a killed process left behind.
    pub fn remove_leftovers(&self) -> Result<(), Error> {
        for path in self.leftovers()? {
            fs::remove_dir_all(&path).map_err(Error::file("remove", &path))?;
        }
        Ok(())
    }

    /// The directories that a killed process left behind; [`Locked::make`] and [`Locked::remove`] remove them.
    pub fn leftovers(&self) -> Result<Vec<PathBuf>, Error> {
        let (dir, prefix) = (&self.entries.dir, self.temporary_prefix());
        let found = fs::read_dir(dir).map_err(Error::file("read", dir))?.flatten();
        let left = found.filter(|entry| entry.file_name().as_bytes().starts_with(prefix.as_bytes()));
        Ok(left.map(|entry| entry.path()).collect())
    }

    fn temporary_prefix(&self) -> String {
        format!("{}.tmp-", self.name)
    }
}

fn sync_files(dir: &Path) -> io::Result<()> {
    for found in fs::read_dir(dir)? {
        sync(&found?.path())?;
    }
    sync(dir)
}

fn sync(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    struct Silent;

    impl Progress for Silent {
        fn step(&self, _what: &str) {}
        fn fraction(&self, _done: f64) {}
        fn note(&self, _what: &str) {}
    }

    #[test]
    fn a_lock_leaves_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let entries = Entries::at(dir.path());
        let lock = entries.lock("e", "", &Silent).unwrap();
        assert!(dir.path().join("e.lock").exists());
        drop(lock);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_a_killed_process_left_behind_is_found_and_what_somebody_is_at_stays() {
        let dir = tempfile::tempdir().unwrap();
        let entries = Entries::at(dir.path());
        for left in ["dead.tmp-abc/new", "alive.tmp-abc/new", "whole"] {
            fs::create_dir_all(dir.path().join(left)).unwrap();
        }
        fs::write(dir.path().join("dead.lock"), "").unwrap();
        let alive = entries.lock("alive", "", &Silent).unwrap();
        assert_eq!(entries.with_leftovers().into_iter().collect::<Vec<_>>(), ["alive", "dead"]);
        assert!(entries.try_lock("alive").unwrap().is_none());
        entries.try_lock("dead").unwrap().unwrap().remove_leftovers().unwrap();
        assert_eq!(entries.with_leftovers().into_iter().collect::<Vec<_>>(), ["alive"]);
        assert!(dir.path().join("alive.tmp-abc").exists() && dir.path().join("whole").exists());
        drop(alive);
    }

    #[test]
    fn a_lock_on_a_file_that_is_gone_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("e.lock");
        let stale = File::create(&path).unwrap();
        assert!(is_at(&stale, &path).unwrap());
        fs::remove_file(&path).unwrap();
        assert!(!is_at(&stale, &path).unwrap());
        let other = try_lock(&path).unwrap().unwrap();
        assert!(!is_at(&stale, &path).unwrap() && is_at(&other, &path).unwrap());
        assert!(try_lock(&path).unwrap().is_none());
    }

    #[test]
    fn one_at_a_time_has_it() {
        let dir = tempfile::tempdir().unwrap();
        let (entries, holders) = (Entries::at(dir.path()), AtomicU32::new(0));
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        // Without the pause of one that waits its turn, so that they meet.
                        let Some(file) = try_lock(&dir.path().join("e.lock")).unwrap() else { continue };
                        let lock =
                            Locked { entries: &entries, name: "e", path: dir.path().join("e.lock"), _file: file };
                        assert_eq!(holders.fetch_add(1, Ordering::SeqCst), 0);
                        thread::yield_now();
                        assert_eq!(holders.fetch_sub(1, Ordering::SeqCst), 1);
                        drop(lock);
                    }
                });
            }
        });
    }
}
