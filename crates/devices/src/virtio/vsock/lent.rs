//! A host socket that is used by a process which cannot connect to anything: its owner connects for it.
//!
//! The borrower has the listening socket, and one end of a pair of packet sockets. There it names a port in four bytes,
//! and is given an error number of the host's in four bytes, or 0 and a connected socket. So all that it can reach is what
//! the guest can: programs that listen at the path with a port behind it.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    io::{Errno, retry_on_intr},
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
        SendFlags, SocketFlags, SocketType, recv, recvmsg, send, sendmsg, socketpair,
    },
};

/// A port, or an error number.
const MESSAGE: usize = 4;

/// The owner's end, and the borrower's.
pub(super) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

/// Connects for the borrower at the other end, until that is gone or makes no sense. Descriptors that come from there are
/// not taken.
pub(super) fn serve(borrower: &OwnedFd, connect: impl Fn(u32) -> io::Result<OwnedFd>) {
    let mut port = [0; MESSAGE];
    while let Ok((MESSAGE, _)) = retry_on_intr(|| recv(borrower, &mut port, RecvFlags::empty())) {
        let connected = connect(u32::from_ne_bytes(port));
        let (errno, stream) = match &connected {
            Ok(stream) => (0, Some(stream.as_fd())),
            Err(error) => (error.raw_os_error().unwrap_or(Errno::IO.raw_os_error()), None),
        };
        if answer(borrower, errno, stream).is_err() {
            return;
        }
    }
}

fn answer(borrower: &OwnedFd, errno: i32, stream: Option<BorrowedFd<'_>>) -> Result<(), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let stream = stream.as_slice();
    if !stream.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(stream));
    }
    let message = errno.to_ne_bytes();
    retry_on_intr(|| sendmsg(borrower, &[IoSlice::new(&message)], &mut control, SendFlags::NOSIGNAL)).map(drop)
}

/// Has the owner connect to the program that listens for the guest's connections to `port`.
pub(super) fn ask(owner: &OwnedFd, port: u32) -> io::Result<OwnedFd> {
    retry_on_intr(|| send(owner, &port.to_ne_bytes(), SendFlags::NOSIGNAL))?;
    let mut errno = [0; MESSAGE];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received =
        retry_on_intr(|| recvmsg(owner, &mut [IoSliceMut::new(&mut errno)], &mut control, RecvFlags::CMSG_CLOEXEC))?;
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
