//! Where the agent listens, and whom it serves: the host by vsock, or, for tests, its own user at a Unix socket.

use std::{
    convert::Infallible,
    fs, io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
    thread,
    time::Duration,
};

use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, VsockAddr, bind, getpeername, listen, socket};
use purlin_agent::PORT;

use crate::{rehearsal, session};

/// Of the host (`VMADDR_CID_HOST`); other guests, and this guest's own programs, have others.
const HOST: u32 = 2;
/// Any address of this guest's (`VMADDR_CID_ANY`).
const ANY: u32 = u32::MAX;
/// Connections that wait to be accepted.
const BACKLOG: i32 = 64;
/// The driver of the device, where it is a module.
const MODULE: &str = "vmw_vsock_virtio_transport";
/// The longest time between two looks for the device.
const LONGEST_WAIT: Duration = Duration::from_secs(10);
/// Sessions at once.
const MOST_SESSIONS: usize = 64;

/// Serves the host, for ever. Waits for the device if there is none yet.
pub fn vsock() -> io::Result<Infallible> {
    let socket = wait_for_socket()?;
    rehearsal::begin();
    serve(|| {
        let stream = accept(&socket)?;
        let peer = getpeername::<VsockAddr>(stream.as_raw_fd())?;
        Ok((peer.cid() == HOST).then_some(stream))
    })
}

/// Serves programs of the agent's own user at a Unix socket.
pub fn unix(path: &Path) -> io::Result<Infallible> {
    let _ = fs::remove_file(path);
    let listener = UnixListener::bind(path)?;
    let own = rustix::process::geteuid();
    serve(|| {
        let stream = listener.accept()?.0;
        let peer = rustix::net::sockopt::socket_peercred(&stream)?;
        Ok((peer.uid == own).then_some(stream))
    })
}

/// A thread for each connection of somebody who is served.
fn serve(mut next: impl FnMut() -> io::Result<Option<UnixStream>>) -> io::Result<Infallible> {
    let sessions = Arc::new(());
    loop {
        let stream = match next() {
            Ok(Some(stream)) => stream,
            Ok(None) => continue,
            Err(error) => {
                eprintln!("purlin-agent: a connection: {error}");
                // No more files or memory, perhaps: it goes on when there are.
                thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        if Arc::strong_count(&sessions) > MOST_SESSIONS {
            session::refuse(stream, MOST_SESSIONS);
            continue;
        }
        let mine = Arc::clone(&sessions);
        let spawned = thread::Builder::new().name("session".into()).spawn(move || {
            session::serve(stream);
            drop(mine);
        });
        if let Err(error) = spawned {
            eprintln!("purlin-agent: a session: {error}");
        }
    }
}

fn wait_for_socket() -> io::Result<OwnedFd> {
    let mut wait = Duration::from_millis(100);
    loop {
        load_module();
        match bound_socket() {
            Ok(socket) => return Ok(socket),
            // Another agent has the port: systemd tries again.
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => return Err(error),
            Err(error) if wait == LONGEST_WAIT => eprintln!("purlin-agent: no vsock device yet: {error}"),
            Err(_) => {}
        }
        thread::sleep(wait);
        wait = (wait * 2).min(LONGEST_WAIT);
    }
}

/// udev does that, too, but perhaps later; and there are systems without it.
fn load_module() {
    if Path::new("/sys/module").join(MODULE).exists() {
        return;
    }
    let mut modprobe = Command::new("modprobe");
    modprobe.args(["-q", MODULE]).env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin");
    // Where the driver is a part of the kernel there is nothing to be loaded.
    let _ = modprobe.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
}

fn bound_socket() -> io::Result<OwnedFd> {
    let socket = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    bind(socket.as_raw_fd(), &VsockAddr::new(ANY, PORT))?;
    listen(&socket, Backlog::new(BACKLOG)?)?;
    Ok(socket)
}

/// The standard library knows the sockets of the Internet and Unix only; but to read and write one needs no address.
fn accept(socket: &OwnedFd) -> io::Result<UnixStream> {
    let stream = rustix::net::accept_with(socket.as_fd(), rustix::net::SocketFlags::CLOEXEC)?;
    Ok(UnixStream::from(stream))
}
