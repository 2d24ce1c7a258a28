//! Locks against opening an image twice.
//!
//! Open file description locks on single bytes, in the scheme that QEMU uses since 2.10 (its `block/file-posix.c`), so
//! that Purlin, QEMU and qemu-img keep out of each other's way: who does *X* to an image holds a shared lock on byte
//! 100 + *X*; who wants nobody else to do *X* holds one on byte 200 + *X*; each looks whether the other's byte is
//! locked. Both lock before they look, so of two at the same time at least one gives up.

use std::{fs::File, io, ops::Deref, os::fd::AsRawFd};

/// The byte for *reads and needs it consistent* is 0 here.
const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

const DOES: i64 = 100;
const FORBIDS: i64 = 200;

/// An open file that is locked until this is dropped.
#[derive(Debug)]
pub(crate) struct LockedFile(File);

impl LockedFile {
    /// Locks `file`: a writer keeps all others out, readers only writers. `None` if somebody is in the way. On file
    /// systems without such locks nobody is.
    pub fn lock(file: File, writable: bool) -> io::Result<Option<Self>> {
        // Dropped, it gives up what it has got.
        let file = Self(file);
        match take(&file, writable) {
            Ok(true) => Ok(Some(file)),
            Ok(false) => Ok(None),
            Err(error) if has_no_locks(&error) => {
                tracing::warn!("the file system has no locks: nothing keeps an image from being opened twice");
                Ok(Some(file))
            }
            Err(error) => Err(error),
        }
    }

    /// A writer becomes a reader: others may read the file from here on.
    pub fn stop_writing(&self) -> io::Result<()> {
        let freed = [WRITE, RESIZE].iter().try_for_each(|x| unlock(self, DOES + x));
        freed.or_else(|error| if has_no_locks(&error) { Ok(()) } else { Err(error) })
    }

    /// A reader that was a writer becomes one again. `false` if somebody reads the file by now.
    pub fn write_again(&self) -> io::Result<bool> {
        take(self, true).or_else(|error| if has_no_locks(&error) { Ok(true) } else { Err(error) })
    }
}

impl Deref for LockedFile {
    type Target = File;

    fn deref(&self) -> &File {
        &self.0
    }
}

impl Drop for LockedFile {
    /// Closing the file is not enough where a child process that was just begun has a copy of the descriptor for a moment.
    fn drop(&mut self) {
        for byte in (0..=RESIZE).flat_map(|x| [DOES + x, FORBIDS + x]) {
            let _ = unlock(&self.0, byte);
        }
    }
}

/// Takes the locks; returns whether nobody is in the way.
fn take(file: &File, writable: bool) -> io::Result<bool> {
    let does: &[i64] = if writable { &[CONSISTENT_READ, WRITE, RESIZE] } else { &[CONSISTENT_READ] };
    let forbids = [WRITE, RESIZE];
    for byte in does.iter().map(|x| DOES + x).chain(forbids.iter().map(|x| FORBIDS + x)) {
        set_shared(file, byte)?;
    }
    for byte in does.iter().map(|x| FORBIDS + x).chain(forbids.iter().map(|x| DOES + x)) {
        if is_locked_by_another(file, byte)? {
            return Ok(false);
        }
    }
    Ok(true)
}

fn has_no_locks(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOLCK | libc::EINVAL | libc::EOPNOTSUPP | libc::ENOSYS))
}

fn set_shared(file: &File, byte: i64) -> io::Result<()> {
    fcntl(file, libc::F_OFD_SETLK, &mut one_byte(libc::F_RDLCK, byte))
}

fn unlock(file: &File, byte: i64) -> io::Result<()> {
    fcntl(file, libc::F_OFD_SETLK, &mut one_byte(libc::F_UNLCK, byte))
}

fn is_locked_by_another(file: &File, byte: i64) -> io::Result<bool> {
    let mut lock = one_byte(libc::F_WRLCK, byte);
    fcntl(file, libc::F_OFD_GETLK, &mut lock)?;
    Ok(i32::from(lock.l_type) != libc::F_UNLCK)
}

fn one_byte(kind: i32, byte: i64) -> libc::flock {
    libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: byte, l_len: 1, l_pid: 0 }
}

fn fcntl(file: &File, command: i32, lock: &mut libc::flock) -> io::Result<()> {
    // SAFETY: the descriptor is open, and the commands take a pointer to a flock, which they may write to.
    match unsafe { libc::fcntl(file.as_raw_fd(), command, std::ptr::from_mut(lock)) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
