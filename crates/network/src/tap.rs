//! TAP: an Ethernet interface of the host's that leads to the guest. Needs the privilege to open it, or an interface
//! that an administrator has made for this user (`ip tuntap add NAME mode tap user USER vnet_hdr`).

use std::{
    fs, io,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
    path::Path,
};

use rustix::fs::{Mode, OFlags};

use crate::{Backend, Offload, PacketHeader};

/// Where the kernel hands out TAP interfaces.
const DEVICE: &str = "/dev/net/tun";

/// Why a TAP interface cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// No such name can be.
    #[error("'{0}' is not a name of a network interface: use 1 to 15 characters, without '/' and spaces")]
    Name(String),
    /// It is not there.
    #[error("there is no network interface '{0}': make it with 'ip tuntap add {0} mode tap' as root")]
    Missing(String),
    /// No TAP on this host.
    #[error("this host has no {DEVICE}: load the kernel module 'tun', or use '--net user'")]
    NoDevice,
    /// Not allowed.
    #[error(
        "no permission to use TAP interface '{0}': run as root, give this user the interface with 'ip tuntap add {0} mode tap user USER', or use '--net user'"
    )]
    Permission(String),
    /// Somebody else has it.
    #[error("TAP interface '{0}' is in use by another program: each machine needs one of its own")]
    Busy(String),
    /// Not a TAP interface.
    #[error("network interface '{0}' is not a TAP interface: name one made with 'ip tuntap add NAME mode tap'")]
    NotTap(String),
    /// It has only one queue.
    #[error(
        "TAP interface '{0}' has one queue only: make it with 'ip tuntap add {0} mode tap multi_queue', or leave queues= out"
    )]
    OneQueue(String),
    /// Anything else.
    #[error("cannot use TAP interface '{name}': {source}")]
    Other {
        /// The interface.
        name: String,
        /// What the host says.
        source: io::Error,
    },
}

/// The most queues of an interface that are opened.
pub const MOST_QUEUES: u16 = 8;

/// How many queues of an interface to open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queues {
    /// Just so many, 1 to [`MOST_QUEUES`].
    Exactly(u16),
    /// So many, or one where the interface has no more.
    UpTo(u16),
}

/// Opens the TAP interface `name`, which must exist: what makes an interface also gives it addresses and bridges. Returns
/// a back end for each queue; all but the first are not in use yet.
pub fn open(name: &str, queues: Queues) -> Result<Vec<Backend>, TapError> {
    let bytes = name.as_bytes();
    let is_name = !matches!(name, "" | "." | "..")
        && bytes.len() < libc::IFNAMSIZ
        && bytes.iter().all(|b| b.is_ascii_graphic() && !matches!(b, b'/' | b':' | b'%'));
    if !is_name {
        return Err(TapError::Name(name.into()));
    }
    // Who has no TAP at all is told that first.
    let first = open_device(name)?;
    // TUNSETIFF would make an interface that is not there, if it may.
    if !Path::new("/sys/class/net").join(name).exists() {
        return Err(TapError::Missing(name.into()));
    }
    let is_multiple = flags(name).is_some_and(|flags| flags & libc::IFF_MULTI_QUEUE != 0);
    // The kernel would spread packets over everybody's queues.
    if is_multiple && has_carrier(name) {
        return Err(TapError::Busy(name.into()));
    }
    let count = match queues {
        Queues::Exactly(2..) if !is_multiple => return Err(TapError::OneQueue(name.into())),
        Queues::UpTo(_) if !is_multiple => 1,
        Queues::Exactly(count) | Queues::UpTo(count) => count,
    };
    let mut backends = vec![attach(first, name, is_multiple)?];
    while backends.len() < count.clamp(1, MOST_QUEUES).into() {
        let next = attach(open_device(name)?, name, is_multiple)?;
        next.set_in_use(false).map_err(|source| TapError::Other { name: name.into(), source })?;
        backends.push(next);
    }
    Ok(backends)
}

fn open_device(name: &str) -> Result<OwnedFd, TapError> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    rustix::fs::open(DEVICE, flags, Mode::empty()).map_err(|error| match error.into() {
        error if io::Error::kind(&error) == io::ErrorKind::PermissionDenied => TapError::Permission(name.into()),
        error if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::ENXIO)) => TapError::NoDevice,
        error => TapError::Other { name: name.into(), source: error },
    })
}

/// Makes `fd` a queue of the interface.
fn attach(fd: OwnedFd, name: &str, is_multiple: bool) -> Result<Backend, TapError> {
    let other = |source: io::Error| TapError::Other { name: name.into(), source };
    let mut request = request();
    for (to, from) in request.ifr_name.iter_mut().zip(name.as_bytes()) {
        *to = from.cast_signed();
    }
    let multiple = if is_multiple { libc::IFF_MULTI_QUEUE } else { 0 };
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | multiple) as libc::c_short;
    // SAFETY: the request reads and writes one ifreq.
    let attached = unsafe { ioctl(fd.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    attached.map_err(|error| match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => TapError::Permission(name.into()),
        // E2BIG: the host gives an interface no more queues.
        Some(libc::EBUSY | libc::E2BIG) => TapError::Busy(name.into()),
        // TUN and TAP interfaces have these flags.
        Some(libc::EINVAL) if flags(name).is_none_or(|flags| flags & libc::IFF_TAP == 0) => {
            TapError::NotTap(name.into())
        }
        _ => other(error),
    })?;
    let length = PacketHeader::LENGTH as libc::c_int;
    // SAFETY: the request reads one int.
    unsafe { ioctl(fd.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const length) }.map_err(other)?;
    let little_endian: libc::c_int = 1;
    // SAFETY: as above.
    unsafe { ioctl(fd.as_raw_fd(), libc::TUNSETVNETLE, &raw const little_endian) }.map_err(other)?;
    let backend = Backend::tap(fd);
    backend.set_offload(Offload::empty()).map_err(other)?;
    Ok(backend)
}

/// An ifreq of zeroes.
fn request() -> libc::ifreq {
    // SAFETY: ifreq is plain data, for which zeroes are a value.
    unsafe { std::mem::zeroed() }
}

/// What kind of TUN or TAP interface it is (`IFF_*`, linux/if_tun.h), if it is one.
fn flags(name: &str) -> Option<libc::c_int> {
    let text = fs::read_to_string(Path::new("/sys/class/net").join(name).join("tun_flags")).ok()?;
    libc::c_int::from_str_radix(text.trim().trim_start_matches("0x"), 16).ok()
}

/// Whether somebody has a queue of it. (Of an interface that is down nobody knows.)
fn has_carrier(name: &str) -> bool {
    let text = fs::read_to_string(Path::new("/sys/class/net").join(name).join("carrier"));
    text.is_ok_and(|text| text.trim() == "1")
}

/// Takes a queue out of the interface, or puts it back. (The kernel drops what is in one that is taken out.)
pub(crate) fn set_attached(fd: BorrowedFd<'_>, attached: bool) -> io::Result<()> {
    let mut request = request();
    let flag = if attached { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
    request.ifr_ifru.ifru_flags = flag as libc::c_short;
    // SAFETY: the request reads one ifreq.
    unsafe { ioctl(fd.as_raw_fd(), libc::TUNSETQUEUE, &raw mut request) }
}

/// Tells the kernel what the guest takes.
pub(crate) fn set_offload(fd: BorrowedFd<'_>, offload: Offload) -> io::Result<()> {
    // SAFETY: the request takes its argument by value.
    unsafe { ioctl(fd.as_raw_fd(), libc::TUNSETOFFLOAD, offload.bits() as usize as *const libc::c_void) }
}

/// # Safety
/// `argument` is what `request` expects.
unsafe fn ioctl<T>(fd: libc::c_int, request: libc::Ioctl, argument: *const T) -> io::Result<()> {
    // SAFETY: the caller's promise.
    if unsafe { libc::ioctl(fd, request, argument) } < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
