//! The packet channel as a network device sees it.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    sync::{Mutex, PoisonError},
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
    net::{SendFlags, send},
};
use vm_memory::{VolatileSlice, bitmap::BitmapSlice};

use crate::{Offload, tap};

/// The outside of a network device, or of one of its pairs of queues: packets, each a [`crate::PacketHeader`] and an
/// Ethernet frame of up to 64 KiB. The descriptor does not block.
#[derive(Debug)]
pub struct Backend {
    fd: OwnedFd,
    kind: Kind,
    /// Of a TAP interface with several queues: whether the kernel gives this one packets.
    attached: Mutex<bool>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// A SOCK_SEQPACKET socket; messages shorter than a packet header are requests.
    Socket,
    Tap,
}

impl Backend {
    /// One end of a SOCK_SEQPACKET socket pair; at the other is a NAT, or anybody who speaks as it does: a message of
    /// four bytes tells it the guest's [`Offload`], all others are packets.
    pub fn socket(fd: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        Ok(Self { fd, kind: Kind::Socket, attached: Mutex::new(true) })
    }

    pub(crate) fn tap(fd: OwnedFd) -> Self {
        Self { fd, kind: Kind::Tap, attached: Mutex::new(true) }
    }

    /// Says whether this one of several is in use. A TAP interface spreads its packets over those that are; from one
    /// that is not nothing comes, and nothing may be sent there.
    pub fn set_in_use(&self, in_use: bool) -> io::Result<()> {
        let mut attached = self.attached.lock().unwrap_or_else(PoisonError::into_inner);
        if self.kind == Kind::Tap && *attached != in_use {
            tap::set_attached(self.fd.as_fd(), in_use)?;
        }
        *attached = in_use;
        Ok(())
    }

    /// Receives one packet straight into guest memory and returns its length; what does not fit is lost. A length of 0
    /// says that the other side is gone, [`io::ErrorKind::WouldBlock`] that there is no packet now.
    pub fn receive<B: BitmapSlice>(&self, into: &[VolatileSlice<'_, B>]) -> io::Result<usize> {
        let guards: Vec<_> = into.iter().map(|slice| slice.ptr_guard_mut()).collect();
        let iov: Vec<_> = guards.iter().map(|guard| iovec(guard.as_ptr(), guard.len())).collect();
        // SAFETY: every element describes memory that a volatile slice says is there to be written, and the guards
        // keep it mapped; the kernel may write to it at any time, which is what volatile memory is for.
        let result = unsafe { libc::readv(self.fd.as_raw_fd(), iov.as_ptr(), count(&iov)) };
        let length = usize::try_from(result).map_err(|_| io::Error::last_os_error())?;
        let mut left = length;
        for slice in into {
            let here = left.min(slice.len());
            slice.bitmap().mark_dirty(0, here);
            left -= here;
        }
        Ok(length)
    }

    /// Sends the packet that is in guest memory. [`io::ErrorKind::WouldBlock`] says that there is no room now.
    pub fn send<B: BitmapSlice>(&self, from: &[VolatileSlice<'_, B>]) -> io::Result<()> {
        let guards: Vec<_> = from.iter().map(|slice| slice.ptr_guard()).collect();
        let iov: Vec<_> = guards.iter().map(|guard| iovec(guard.as_ptr().cast_mut(), guard.len())).collect();
        // SAFETY: every element describes memory that a volatile slice says is there to be read, and the guards keep
        // it mapped; writev does not write to it.
        let result = unsafe { libc::writev(self.fd.as_raw_fd(), iov.as_ptr(), count(&iov)) };
        // Packets go whole or not at all.
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Tells the other side which packets the guest takes. Call it before packets of that form can matter: when the
    /// driver has negotiated its features, and with an empty set at a reset.
    pub fn set_offload(&self, offload: Offload) -> io::Result<()> {
        let offload = offload.consistent();
        match self.kind {
            Kind::Tap => tap::set_offload(self.fd.as_fd(), offload),
            Kind::Socket => self.request(&offload.bits().to_le_bytes()),
        }
    }

    /// Sends a request, which unlike a packet must not be lost: waits for room if need be.
    fn request(&self, request: &[u8]) -> io::Result<()> {
        loop {
            match send(&self.fd, request, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Err(Errno::AGAIN) => {
                    poll(&mut [PollFd::new(&self.fd, PollFlags::OUT)], None)?;
                }
                Err(Errno::INTR) => {}
                // Whoever is gone needs no word of it.
                Ok(_) | Err(Errno::PIPE | Errno::CONNRESET) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl AsFd for Backend {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn iovec(base: *mut u8, len: usize) -> libc::iovec {
    libc::iovec { iov_base: base.cast(), iov_len: len }
}

/// The kernel refuses more than IOV_MAX (1024) elements with EINVAL, as it does a negative count.
fn count(iov: &[libc::iovec]) -> i32 {
    i32::try_from(iov.len()).unwrap_or(-1)
}
