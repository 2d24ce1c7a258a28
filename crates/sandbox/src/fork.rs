//! Children: the one that goes on in a new PID namespace, and those that try something out.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, OwnedFd};

use rustix::{
    io::Errno,
    net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair},
    process::{Pid, WaitOptions, waitpid},
};

use crate::{SandboxError, error::host};

enum Side {
    Parent(Pid),
    Child,
}

/// Forks a process that has one thread.
fn fork() -> Result<Side, Errno> {
    // SAFETY: with one thread the child finds no lock held by another one.
    match unsafe { libc::fork() } {
        0 => Ok(Side::Child),
        id => Ok(Side::Parent(Pid::from_raw(id).filter(|_| id > 0).ok_or_else(last_error)?)),
    }
}

fn last_error() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::AGAIN)
}

/// Ends the process at once: what it has buffered, and what it would clean up, is the other one's.
fn exit(status: i32) -> ! {
    // SAFETY: _exit(2) needs nothing.
    unsafe { libc::_exit(status) }
}

/// Returns in a child only, with its id as this process sees it; this process exits once the child has it.
pub(crate) fn go_on_in_child() -> Result<u32, SandboxError> {
    let failed = host("start the sandboxed process");
    let talk = || -> Result<u32, Errno> {
        let (parent, child) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        match fork()? {
            Side::Parent(id) => {
                drop(child);
                exit(i32::from(!introduce(&parent, id)))
            }
            Side::Child => {
                drop(parent);
                take_id(&child)
            }
        }
    };
    talk().map_err(failed)
}

/// Tells the child its id and waits for it to have heard.
fn introduce(child: &OwnedFd, id: Pid) -> bool {
    let id = id.as_raw_nonzero().get().to_ne_bytes();
    send(child, &id, SendFlags::NOSIGNAL).is_ok() && matches!(recv(child, &mut [0; 1], RecvFlags::empty()), Ok((1, _)))
}

fn take_id(parent: &OwnedFd) -> Result<u32, Errno> {
    let mut id = [0; 4];
    match recv(parent.as_fd(), &mut id, RecvFlags::empty())? {
        (4, _) => {}
        _ => return Err(Errno::CHILD),
    }
    send(parent, &[0], SendFlags::NOSIGNAL)?;
    Ok(u32::from_ne_bytes(id))
}

/// Does `attempt` in a child and returns what came of it.
pub(crate) fn succeeds_in_child(attempt: impl FnOnce() -> Result<(), Errno>) -> Result<(), Errno> {
    match fork()? {
        Side::Child => exit(attempt().err().map_or(0, |error| error.raw_os_error().clamp(1, 255))),
        Side::Parent(id) => {
            let status = rustix::io::retry_on_intr(|| waitpid(Some(id), WaitOptions::empty()))?;
            match status.and_then(|(_, status)| status.exit_status()) {
                Some(0) => Ok(()),
                Some(error) => Err(Errno::from_raw_os_error(error)),
                None => Err(Errno::PERM),
            }
        }
    }
}

/// Does `attempt` in a child and returns the bytes that it answers, `None` if it does not.
pub(crate) fn answer_of_child(attempt: impl FnOnce(&OwnedFd)) -> Result<Vec<u8>, Errno> {
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    match fork()? {
        Side::Child => {
            drop(ours);
            attempt(&theirs);
            exit(0)
        }
        Side::Parent(id) => {
            drop(theirs);
            let mut answer = vec![0; 64 << 10];
            let received = rustix::io::retry_on_intr(|| recv(&ours, &mut answer[..], RecvFlags::empty()));
            rustix::io::retry_on_intr(|| waitpid(Some(id), WaitOptions::empty()))?;
            answer.truncate(received?.0);
            Ok(answer)
        }
    }
}
