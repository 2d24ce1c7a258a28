//! What the process can learn of itself from /proc, while it has one.

use std::{fs, os::fd::OwnedFd};

use rustix::{
    fs::{Mode, OFlags, openat},
    io::Errno,
};

use crate::SandboxError;

/// The process's own directory in /proc, where there is one. It stays usable when the new root hides it, and must be
/// opened again after a fork.
pub(crate) struct Proc(Option<OwnedFd>);

impl Proc {
    pub fn open() -> Self {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Self(rustix::fs::open("/proc/self", flags, Mode::empty()).ok())
    }

    /// Writes all of `content` to the file `name`.
    pub fn write(&self, name: &str, content: &str) -> Result<(), Errno> {
        let directory = self.0.as_ref().ok_or(Errno::NOENT)?;
        let file = openat(directory, name, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
        // The kernel takes such a file's content in one write.
        match rustix::io::write(&file, content.as_bytes())? {
            written if written == content.len() => Ok(()),
            _ => Err(Errno::IO),
        }
    }
}

/// Without /proc nobody can tell; the kernel refuses user namespaces to several threads anyway.
pub(crate) fn check_single_threaded() -> Result<(), SandboxError> {
    match fs::read_dir("/proc/self/task").map(Iterator::count) {
        Ok(several @ 2..) => Err(SandboxError::Threads(several)),
        _ => Ok(()),
    }
}
