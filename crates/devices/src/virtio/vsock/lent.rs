//! A host socket that is used by a process which cannot connect to anything: its owner connects for it.
//!
//! The borrower has the listening socket, and one end of a pair of packet sockets. There it names a port in four bytes,
//! and is given an error number of the host's in four bytes, or 0 and a connected socket. So all that it can reach is what
//! the guest can: programs that listen at the path with a port behind it.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::Duration,
};

use rustix::{
    io::{Errno, retry_on_intr},
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
        SendFlags, Shutdown, SocketFlags, SocketType, recv, recvmsg, send, sendmsg, shutdown, socketpair,
        sockopt::{self, Timeout},
    },
};

/// A port, or an error number.
const MESSAGE: usize = 4;

/// How long an owner is waited for who does not answer: all of the guest's connections wait meanwhile.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// The owner's end, and the borrower's, which waits for an answer with this `patience`.
pub(super) fn pair(patience: Duration) -> io::Result<(OwnedFd, OwnedFd)> {
    let (owner, borrower) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    sockopt::set_socket_timeout(&borrower, Timeout::Recv, Some(patience))?;
    Ok((owner, borrower))
}

/// Connects for the borrower at the other end, until that is gone or makes no sense. Descriptors that come from there are
/// not taken.
pub(super) fn serve(owner: &OwnedFd, connect: impl Fn(u32) -> io::Result<OwnedFd>) {
    let mut port = [0; MESSAGE];
    while let Ok((MESSAGE, _)) = retry_on_intr(|| recv(owner, &mut port, RecvFlags::empty())) {
        let connected = connect(u32::from_ne_bytes(port));
        let (errno, stream) = match &connected {
            Ok(stream) => (0, Some(stream.as_fd())),
            Err(error) => (error.raw_os_error().unwrap_or(Errno::IO.raw_os_error()), None),
        };
        if answer(owner, errno, stream).is_err() {
            return;
        }
    }
}

fn answer(owner: &OwnedFd, errno: i32, stream: Option<BorrowedFd<'_>>) -> Result<(), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let stream = stream.as_slice();
    if !stream.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(stream));
    }
    let message = errno.to_ne_bytes();
    retry_on_intr(|| sendmsg(owner, &[IoSlice::new(&message)], &mut control, SendFlags::NOSIGNAL)).map(drop)
}

/// Has the owner connect to the program that listens for the guest's connections to `port`. Once it has not
/// answered it is not asked again: its answer would be taken for that to the next question.
pub(super) fn ask(borrower: &OwnedFd, port: u32) -> io::Result<OwnedFd> {
    // Who is gone, or was given up, listens as little as a program that is not there.
    retry_on_intr(|| send(borrower, &port.to_ne_bytes(), SendFlags::NOSIGNAL)).map_err(|_| Errno::CONNREFUSED)?;
    let mut errno = [0; MESSAGE];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received =
        retry_on_intr(|| recvmsg(borrower, &mut [IoSliceMut::new(&mut errno)], &mut control, RecvFlags::CMSG_CLOEXEC));
    let Ok(received) = received else {
        let _ = shutdown(borrower, Shutdown::Both);
        return Err(Errno::CONNREFUSED.into());
    };
    let streams = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(streams) => Some(streams),
        _ => None,
    });
    match (received.bytes, i32::from_ne_bytes(errno)) {
        (MESSAGE, 0) => streams.flatten().next().ok_or_else(|| Errno::CONNREFUSED.into()),
        (MESSAGE, errno) => Err(io::Error::from_raw_os_error(errno)),
        // The owner is gone.
        _ => Err(Errno::CONNREFUSED.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_owner_who_does_not_answer_is_given_up() {
        let (owner, borrower) = pair(Duration::from_millis(20)).unwrap();
        let refused = || assert_eq!(ask(&borrower, 7).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        refused();
        // Too late: whoever asks for another port must not get this.
        let _ = answer(&owner, 0, Some(owner.as_fd()));
        refused();
        // It has no reason to wait any more.
        serve(&owner, |_| Err(Errno::IO.into()));
    }
}
