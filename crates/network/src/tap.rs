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
    /// Anything else.
    #[error("cannot use TAP interface '{name}': {source}")]
    Other {
        /// The interface.
        name: String,
        /// What the host says.
        source: io::Error,
    },
}

/// Opens the TAP interface `name`, which must exist: what makes an interface also gives it addresses and bridges.
pub fn open(name: &str) -> Result<Backend, TapError> {
    let bytes = name.as_bytes();
    let is_name = !matches!(name, "" | "." | "..")
        && bytes.len() < libc::IFNAMSIZ
        && bytes.iter().all(|b| b.is_ascii_graphic() && !matches!(b, b'/' | b':' | b'%'));
    if !is_name {
        return Err(TapError::Name(name.into()));
    }
    let other = |source: io::Error| TapError::Other { name: name.into(), source };
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let fd = rustix::fs::open(DEVICE, flags, Mode::empty()).map_err(|error| match error.into() {
        error if io::Error::kind(&error) == io::ErrorKind::PermissionDenied => TapError::Permission(name.into()),
        error if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::ENXIO)) => TapError::NoDevice,
        error => other(error),
    })?;
    // TUNSETIFF would make an interface that is not there, if it may.
    if !Path::new("/sys/class/net").join(name).exists() {
        return Err(TapError::Missing(name.into()));
    }
    attach(&fd, bytes).map_err(|error| match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => TapError::Permission(name.into()),
        Some(libc::EBUSY) => TapError::Busy(name.into()),
        Some(libc::EINVAL) if !is_tap(name) => TapError::NotTap(name.into()),
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

fn attach(fd: &OwnedFd, name: &[u8]) -> io::Result<()> {
    // SAFETY: ifreq is plain data, for which zeroes are a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: the request reads and writes one ifreq.
    unsafe { ioctl(fd.as_raw_fd(), libc::TUNSETIFF, &raw mut request) }
}

/// TUN and TAP interfaces have this file; bit 1 of the flags is IFF_TAP (linux/if_tun.h).
fn is_tap(name: &str) -> bool {
    let text = fs::read_to_string(Path::new("/sys/class/net").join(name).join("tun_flags"));
    let flags = text.ok().and_then(|text| u32::from_str_radix(text.trim().trim_start_matches("0x"), 16).ok());
    flags.is_some_and(|flags| flags & libc::IFF_TAP as u32 != 0)
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
