//! Files that were obtained once, checked at every use: [`Entries`] with the checksums of their files in `SHA256SUMS`.

use std::{
    ffi::OsStr,
    fmt::Write as _,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

use crate::{Error, Progress, entries::Entries, home};

const SUMS: &str = "SHA256SUMS";

/// A cache directory.
pub struct Cache {
    entries: Entries,
}

impl Cache {
    /// The user's ([`home::cache`]). It is made at the first use.
    pub fn of_user() -> Result<Self, Error> {
        Ok(Self::at(home::cache()?))
    }

    /// The one at `dir`.
    pub fn at(dir: impl Into<PathBuf>) -> Self {
        Self { entries: Entries::at(dir) }
    }

    /// The directory of the entry `name`, which holds at least `files`, intact. If it is not there yet, `make` fills a
    /// new directory (its first argument) and may use another one for what it needs on the way (the second).
    pub fn entry(
        &self,
        name: &str,
        files: &[&str],
        progress: &dyn Progress,
        make: impl FnOnce(&Path, &Path) -> Result<(), Error>,
    ) -> Result<PathBuf, Error> {
        let entry = self.entries.path(name);
        if is_intact(&entry, files) {
            return Ok(entry);
        }
        let lock = self.entries.lock(name, "another purlin is obtaining the same files: waiting for it", progress)?;
        // Another process may have made it while this one waited for the lock.
        if is_intact(&entry, files) {
            return Ok(entry);
        }
        if entry.exists() {
            progress.note(&format!("{} is damaged: obtaining it anew", entry.display()));
        }
        let made = lock.make(|new, work| {
            make(new, work)?;
            seal(new).map_err(Error::file("write", new))
        });
        made.map_err(|error| match error {
            Error::DiskFull(_) => Error::DiskFull(self.entries.dir().to_owned()),
            other => other,
        })
    }
}

/// Writes the checksums of all files in `dir`.
fn seal(dir: &Path) -> io::Result<()> {
    let mut sums = String::new();
    for found in fs::read_dir(dir)? {
        let path = found?.path();
        let file_name = path.file_name().and_then(OsStr::to_str).ok_or(io::ErrorKind::InvalidFilename)?;
        let _ = writeln!(sums, "{}  {file_name}", checksum(&path)?);
    }
    fs::write(dir.join(SUMS), sums)
}

/// Whether every file of the entry has its checksum, and `files` are among them.
fn is_intact(entry: &Path, files: &[&str]) -> bool {
    let Ok(sums) = fs::read_to_string(entry.join(SUMS)) else { return false };
    let sums: Vec<(&str, &str)> = sums.lines().filter_map(|line| line.split_once("  ")).collect();
    files.iter().all(|file| sums.iter().any(|(_, name)| name == file))
        && sums.iter().all(|(sum, name)| checksum(&entry.join(name)).is_ok_and(|found| found == *sum))
}

/// The SHA-256 of a file, as sha256sum(1) writes it.
pub fn checksum(path: &Path) -> io::Result<String> {
    let mut hash = Sha256::new();
    io::copy(&mut File::open(path)?, &mut hash)?;
    Ok(hex(&hash.finalize()))
}

/// Lower-case hexadecimal, as sha256sum(1) writes it.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{
            Mutex,
            atomic::{AtomicBool, AtomicUsize, Ordering},
        },
        thread,
        time::Duration,
    };

    use super::*;

    #[derive(Default)]
    struct Listener {
        notes: Mutex<Vec<String>>,
        cancel: AtomicBool,
    }

    impl Progress for Listener {
        fn step(&self, _what: &str) {}
        fn fraction(&self, _done: f64) {}
        fn note(&self, what: &str) {
            self.notes.lock().unwrap().push(what.into());
        }
        fn cancelled(&self) -> bool {
            self.cancel.load(Ordering::SeqCst)
        }
    }

    fn write(text: &'static str) -> impl FnOnce(&Path, &Path) -> Result<(), Error> {
        move |new, _| fs::write(new.join("kernel"), text).map_err(Error::file("write", new))
    }

    fn never(_: &Path, _: &Path) -> Result<(), Error> {
        panic!("made although it was there")
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn is_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path().join("a/b"));
        let entry = cache.entry("e", &["kernel"], &Listener::default(), write("k")).unwrap();
        assert_eq!(fs::read(entry.join("kernel")).unwrap(), b"k");
        assert_eq!(cache.entry("e", &["kernel"], &Listener::default(), never).unwrap(), entry);
        assert_eq!(names(&dir.path().join("a/b")), ["e"]);
    }

    #[test]
    fn damage_is_noticed() {
        for damage in [Damage::Truncate("kernel"), Damage::Remove("kernel"), Damage::Truncate(SUMS), Damage::Flip] {
            let dir = tempfile::tempdir().unwrap();
            let cache = Cache::at(dir.path());
            let entry = cache.entry("e", &["kernel"], &Listener::default(), write("whole")).unwrap();
            damage.apply(&entry);
            let listener = Listener::default();
            cache.entry("e", &["kernel"], &listener, write("whole")).unwrap();
            assert_eq!(fs::read(entry.join("kernel")).unwrap(), b"whole");
            assert!(listener.notes.lock().unwrap()[0].contains("damaged"));
            assert_eq!(names(dir.path()), ["e"]);
        }
    }

    enum Damage {
        Truncate(&'static str),
        Remove(&'static str),
        Flip,
    }

    impl Damage {
        fn apply(self, entry: &Path) {
            match self {
                Self::Truncate(name) => fs::write(entry.join(name), "").unwrap(),
                Self::Remove(name) => fs::remove_file(entry.join(name)).unwrap(),
                Self::Flip => fs::write(entry.join("kernel"), "whale").unwrap(),
            }
        }
    }

    #[test]
    fn failure_leaves_nothing_and_the_old_entry() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path());
        let fail = |new: &Path, _: &Path| {
            fs::write(new.join("kernel"), "half").unwrap();
            Err(Error::DiskFull(new.into()))
        };
        let error = cache.entry("e", &["kernel"], &Listener::default(), fail).unwrap_err();
        assert!(matches!(error, Error::DiskFull(path) if path == dir.path()));
        assert_eq!(names(dir.path()), [] as [&str; 0]);
    }

    #[test]
    fn what_a_killed_process_left_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("e.tmp-dead/work")).unwrap();
        Cache::at(dir.path()).entry("e", &["kernel"], &Listener::default(), write("k")).unwrap();
        assert_eq!(names(dir.path()), ["e"]);
    }

    #[test]
    fn two_at_once_make_it_once() {
        let dir = tempfile::tempdir().unwrap();
        let (made, listener) = (AtomicUsize::new(0), Listener::default());
        let slowly = |new: &Path, _: &Path| {
            made.fetch_add(1, Ordering::SeqCst);
            thread::sleep(Duration::from_millis(300));
            write("k")(new, new)
        };
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| Cache::at(dir.path()).entry("e", &["kernel"], &listener, slowly).unwrap());
            }
        });
        assert_eq!(made.load(Ordering::SeqCst), 1);
        assert_eq!(listener.notes.lock().unwrap().len(), 1, "the other one says that it waits");
    }

    #[test]
    fn waiting_can_be_cancelled() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path());
        let _held = cache.entries.lock("e", "", &Listener::default()).unwrap();
        let listener = Listener { cancel: true.into(), ..Listener::default() };
        assert!(matches!(cache.entry("e", &["kernel"], &listener, never), Err(Error::Cancelled)));
    }
}
