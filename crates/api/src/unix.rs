//! Unix sockets at paths that may be longer than an address can be.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::fs::{Mode, OFlags, open};

/// The longest path in an address, in bytes (unix(7): sun_path has 108, with a NUL).
const MAX: usize = 107;

/// A path of the same socket that fits into an address, as long as this is held.
#[derive(Debug)]
pub struct Address {
    path: PathBuf,
    _dir: Option<OwnedFd>,
}

impl Address {
    /// Of the socket at `path`, which need not be there yet; its directory must be.
    pub fn of(path: &Path) -> io::Result<Self> {
        if path.as_os_str().len() <= MAX {
            return Ok(Self { path: path.to_owned(), _dir: None });
        }
        let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(io::ErrorKind::InvalidFilename.into());
        };
        let dir = open(dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let path = Path::new("/proc/self/fd").join(dir.as_raw_fd().to_string()).join(name);
        Ok(Self { path, _dir: Some(dir) })
    }

    /// The path to connect to or to bind.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    #[test]
    fn a_long_path_is_an_address_too() {
        let base = tempfile::tempdir().unwrap();
        let dir = base.path().join("d".repeat(120));
        std::fs::create_dir(&dir).unwrap();
        let path = dir.join("socket");
        assert!(UnixListener::bind(&path).is_err());
        let _listener = UnixListener::bind(Address::of(&path).unwrap().path()).unwrap();
        assert!(path.exists());
        UnixStream::connect(Address::of(&path).unwrap().path()).unwrap();
        let missing = Address::of(&base.path().join("x".repeat(150)).join("socket"));
        assert_eq!(missing.unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
