//! The guest's serial port, for whoever is there: a log of its last output, and any number of people at it.

use std::{
    collections::VecDeque,
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

use purlin_machine::GuestInput;
use tokio::sync::broadcast;

/// Bytes of the last output that somebody who comes is shown.
const SHOWN: usize = 16 << 10;
/// Bytes of the log, after which it becomes the old one and another begins.
const LOGGED: u64 = 1 << 20;
/// Pieces of output that somebody may lag behind before some are left out for him: the guest does not wait.
const LAG: usize = 4096;

/// The serial port.
pub struct Console {
    output: Mutex<Recent>,
    /// Everything that the guest writes.
    live: broadcast::Sender<Vec<u8>>,
    input: OnceLock<GuestInput>,
}

/// The last output, and the log.
struct Recent {
    shown: VecDeque<u8>,
    log: Log,
}

/// A file of what the guest has written, and the one before that.
struct Log {
    path: PathBuf,
    /// `None` where it cannot be written: the guest goes on without.
    file: Option<File>,
    length: u64,
}

impl Console {
    /// One with its log at `path`; there may be one of earlier runs.
    pub fn open(path: &Path) -> io::Result<Self> {
        let output = Mutex::new(Recent { shown: VecDeque::new(), log: Log::open(path)? });
        Ok(Self { output, live: broadcast::channel(LAG).0, input: OnceLock::new() })
    }

    /// Where the machine's output goes.
    pub fn writer(self: &Arc<Self>) -> Writer {
        Writer(self.clone())
    }

    /// Where input goes to.
    pub fn connect(&self, input: GuestInput) {
        let _ = self.input.set(input);
    }

    /// The port's other end, for input; none before the machine is there.
    pub fn input(&self) -> Option<GuestInput> {
        self.input.get().cloned()
    }

    /// The last output, and all that follows.
    pub fn attach(&self) -> (Vec<u8>, broadcast::Receiver<Vec<u8>>) {
        let recent = self.recent();
        (recent.shown.iter().copied().collect(), self.live.subscribe())
    }

    fn recent(&self) -> MutexGuard<'_, Recent> {
        self.output.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where the machine's output goes.
pub struct Writer(Arc<Console>);

impl Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut recent = self.0.recent();
        recent.log.append(bytes);
        let excess = (recent.shown.len() + bytes.len()).saturating_sub(SHOWN).min(recent.shown.len());
        recent.shown.drain(..excess);
        recent.shown.extend(&bytes[bytes.len().saturating_sub(SHOWN)..]);
        // Under the lock: who attaches sees each byte once. An error says that nobody is there.
        let _ = self.0.live.send(bytes.to_vec());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Log {
    fn open(path: &Path) -> io::Result<Self> {
        let file = File::options().create(true).append(true).open(path)?;
        let length = file.metadata()?.len();
        Ok(Self { path: path.to_owned(), file: Some(file), length })
    }

    fn append(&mut self, bytes: &[u8]) {
        if self.length > LOGGED {
            self.begin_anew();
        }
        let Some(file) = &mut self.file else { return };
        match file.write_all(bytes) {
            Ok(()) => self.length += bytes.len() as u64,
            Err(error) => {
                tracing::warn!("{}: {error}: the console is not logged any more", self.path.display());
                self.file = None;
            }
        }
    }

    fn begin_anew(&mut self) {
        let old = self.path.with_added_extension("old");
        let new = fs::rename(&self.path, old).and_then(|()| Self::open(&self.path));
        match new {
            Ok(new) => *self = new,
            // It grows until there is room to rename it.
            Err(_) => self.length = 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_comes_late_sees_the_last_output_and_then_all() {
        let dir = tempfile::tempdir().unwrap();
        let console = Arc::new(Console::open(&dir.path().join("log")).unwrap());
        let mut writer = console.writer();
        writer.write_all(&vec![b'a'; SHOWN]).unwrap();
        writer.write_all(b"end").unwrap();
        let (shown, mut live) = console.attach();
        assert_eq!((shown.len(), &shown[SHOWN - 4..]), (SHOWN, &b"aend"[..]));
        writer.write_all(b"more").unwrap();
        assert_eq!(live.try_recv().unwrap(), b"more");
        writer.write_all(&vec![b'b'; 3 * SHOWN]).unwrap();
        assert_eq!(console.attach().0, vec![b'b'; SHOWN]);
    }

    #[test]
    fn the_log_has_a_limit_and_loses_nothing_recent() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let console = Arc::new(Console::open(&path).unwrap());
        let mut writer = console.writer();
        for _ in 0..3 * LOGGED / 1000 {
            writer.write_all(&[b'x'; 1000]).unwrap();
        }
        writer.write_all(b"last").unwrap();
        let sizes = [path.clone(), path.with_added_extension("old")].map(|p| fs::metadata(p).unwrap().len());
        assert!(sizes.iter().all(|&size| size <= LOGGED + 2000), "{sizes:?}");
        assert!(fs::read(&path).unwrap().ends_with(b"xlast"));
        // A later run goes on behind it.
        let console = Arc::new(Console::open(&path).unwrap());
        console.writer().write_all(b"next").unwrap();
        assert!(fs::read(&path).unwrap().ends_with(b"lastnext"));
    }
}
