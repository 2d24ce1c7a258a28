//! The Unix socket by which host programs reach the guest, and the paths of those that the guest reaches.

use std::{
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{fs::FileTypeExt, fs::MetadataExt},
    },
    path::{Path, PathBuf},
    thread,
};

use rustix::{
    fs::Mode,
    io::Errno,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen, socket_with},
};

use super::lent;

/// Connections that wait for the guest.
const BACKLOG: i32 = 128;

/// Why there can be no such socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Another program listens there.
    #[error("the socket '{}' is in use by another program: give another path, or end that program", .0.display())]
    InUse(PathBuf),
    /// There is a file of another kind.
    #[error("'{}' exists and is no socket: give another path, or remove it", .0.display())]
    NoSocket(PathBuf),
    /// Unix sockets have short names.
    #[error("'{}' is too long for the path of a socket: give one of at most {MOST_PATH} bytes", .0.display())]
    TooLong(PathBuf),
    /// The host refused.
    #[error("cannot create the socket '{}': {source}", path.display())]
    Host {
        /// The socket.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
}

/// Bytes of a path, so that `_` and a port fit behind it: `sun_path` has 108 with a NUL.
const MOST_PATH: usize = 107 - "_4294967295".len();

/// A listening socket, which goes when its owner drops this.
#[derive(Debug)]
pub struct HostSocket {
    fd: OwnedFd,
    whose: Whose,
}

/// Which process has made it.
#[derive(Debug)]
enum Whose {
    /// This one.
    Ours {
        path: PathBuf,
        /// Device and inode of the file.
        file: Option<(u64, u64)>,
    },
    /// The one at the other end, which connects for this one: the borrower's end.
    Lent(OwnedFd),
}

impl HostSocket {
    /// Creates the socket, for the host's user alone. One that a program left behind when it was killed is replaced.
    pub fn bind(path: &Path) -> Result<Self, SocketError> {
        let failed = |source: Errno| SocketError::Host { path: path.to_owned(), source: source.into() };
        if path.as_os_str().len() > MOST_PATH {
            return Err(SocketError::TooLong(path.to_owned()));
        }
        let address = SocketAddrUnix::new(path).map_err(failed)?;
        let fd = stream().map_err(failed)?;
        // Linux gives the file the mode of the socket that is bound: nobody else can ever connect.
        rustix::fs::fchmod(&fd, Mode::RUSR | Mode::WUSR).map_err(failed)?;
        match bind(&fd, &address) {
            Err(Errno::ADDRINUSE) => {
                remove_stale(path, &address)?;
                bind(&fd, &address).map_err(failed)?;
            }
            other => other.map_err(failed)?,
        }
        let bound = Self { fd, whose: Whose::Ours { path: path.to_owned(), file: identity(path) } };
        listen(&bound.fd, BACKLOG).map_err(failed)?;
        Ok(bound)
    }

    /// Lends it to a process that cannot connect to anything: the two descriptors are for [`HostSocket::lent`] there. A
    /// thread of this one connects for it.
    pub fn lend(&self) -> io::Result<[OwnedFd; 2]> {
        let Whose::Ours { path, .. } = &self.whose else { return Err(io::ErrorKind::PermissionDenied.into()) };
        let (path, listening) = (path.clone(), self.fd.try_clone()?);
        let (owner, borrower) = lent::pair(lent::PATIENCE)?;
        let connect = move |port| connect_to(&path, port);
        thread::Builder::new().name("vsock".into()).spawn(move || lent::serve(&owner, connect))?;
        Ok([listening, borrower])
    }

    /// A socket that another process has lent to this one, by what [`HostSocket::lend`] gave it.
    pub fn lent([listening, borrower]: [OwnedFd; 2]) -> Self {
        Self { fd: listening, whose: Whose::Lent(borrower) }
    }

    /// The next connection of a host program's; [`io::ErrorKind::WouldBlock`] if there is none.
    pub(super) fn accept(&self) -> io::Result<OwnedFd> {
        Ok(accept_with(&self.fd, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?)
    }

    /// Connects to the host program that listens for the guest's connections to `port`.
    pub(super) fn connect(&self, port: u32) -> io::Result<OwnedFd> {
        match &self.whose {
            Whose::Ours { path, .. } => connect_to(path, port),
            Whose::Lent(borrower) => lent::ask(borrower, port),
        }
    }
}

impl AsFd for HostSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for HostSocket {
    fn drop(&mut self) {
        let Whose::Ours { path, file } = &self.whose else { return };
        // What somebody else has put there is theirs.
        if file.is_some() && identity(path) == *file {
            let _ = fs::remove_file(path);
        }
    }
}

fn connect_to(path: &Path, port: u32) -> io::Result<OwnedFd> {
    let fd = stream()?;
    // Where its queue is full it is as if it did not listen: nobody may wait here.
    connect(&fd, &SocketAddrUnix::new(port_path(path, port))?)?;
    Ok(fd)
}

/// Where the host program for this port listens: `PATH_PORT`.
fn port_path(path: &Path, port: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!("_{port}"));
    name.into()
}

fn stream() -> rustix::io::Result<OwnedFd> {
    socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    fs::symlink_metadata(path).ok().map(|file| (file.dev(), file.ino()))
}

/// Removes a socket to which nobody listens any more.
fn remove_stale(path: &Path, address: &SocketAddrUnix) -> Result<(), SocketError> {
    let failed = |source| SocketError::Host { path: path.to_owned(), source };
    match fs::symlink_metadata(path) {
        Ok(file) if !file.file_type().is_socket() => return Err(SocketError::NoSocket(path.to_owned())),
        // It has gone meanwhile.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(failed)?,
    };
    match connect(&stream().map_err(|e| failed(e.into()))?, address) {
        Err(Errno::CONNREFUSED) => fs::remove_file(path).map_err(failed),
        // There is a listener, even if it has no room now.
        Ok(()) | Err(Errno::AGAIN) => Err(SocketError::InUse(path.to_owned())),
        Err(error) => Err(failed(error.into())),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        os::unix::{fs::PermissionsExt, net::UnixListener, net::UnixStream},
    };

    use super::*;

    #[test]
    fn a_socket_is_its_users_and_goes_in_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.vsock");
        let socket = HostSocket::bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(socket.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        let _client = UnixStream::connect(&path).unwrap();
        socket.accept().unwrap();
        let error = HostSocket::bind(&path).unwrap_err();
        assert!(matches!(error, SocketError::InUse(_)), "{error}");
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_file_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.vsock");
        // Rust's listener leaves its file behind.
        drop(UnixListener::bind(&path).unwrap());
        let socket = HostSocket::bind(&path).unwrap();
        UnixStream::connect(&path).unwrap();
        // Somebody takes the path away: what is theirs stays.
        fs::remove_file(&path).unwrap();
        let other = UnixListener::bind(&path).unwrap();
        drop(socket);
        assert!(path.exists());
        drop(other);
        fs::remove_file(&path).unwrap();
        fs::write(&path, "data").unwrap();
        assert!(matches!(HostSocket::bind(&path), Err(SocketError::NoSocket(_))));
        assert_eq!(fs::read(&path).unwrap(), b"data");
    }

    #[test]
    fn a_borrower_reaches_what_the_owner_would() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.vsock");
        let program = UnixListener::bind(dir.path().join("vm.vsock_7")).unwrap();
        let socket = HostSocket::bind(&path).unwrap();
        let borrowed = HostSocket::lent(socket.lend().unwrap());
        let _client = UnixStream::connect(&path).unwrap();
        borrowed.accept().unwrap();
        for _ in 0..2 {
            let mut stream = UnixStream::from(borrowed.connect(7).unwrap());
            stream.write_all(b"x").unwrap();
            program.accept().unwrap().0.read_exact(&mut [0]).unwrap();
        }
        assert_eq!(borrowed.connect(8).unwrap_err().kind(), io::ErrorKind::NotFound);
        drop(borrowed);
        assert!(path.exists(), "it is the owner's");
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn impossible_paths() {
        let long = PathBuf::from(format!("/tmp/{}", "x".repeat(100)));
        assert!(matches!(HostSocket::bind(&long), Err(SocketError::TooLong(_))));
        let error = HostSocket::bind(Path::new("/no/such/directory/x")).unwrap_err();
        assert_eq!(
            error.to_string(),
            "cannot create the socket '/no/such/directory/x': No such file or directory (os error 2)"
        );
    }
}
