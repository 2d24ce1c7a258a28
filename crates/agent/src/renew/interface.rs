//! Network interfaces by ioctl(2) (netdevice(7)): to run ip(8) takes longer than all else that is done to a clone.
#![allow(unsafe_code)]

use std::io;

use nix::libc::{ARPHRD_ETHER, IFF_UP, IFNAMSIZ, SIOCGIFFLAGS, SIOCSIFFLAGS, SIOCSIFHWADDR, c_char, ifreq};
use rustix::{
    fd::OwnedFd,
    ioctl::{Opcode, Setter, Updater, ioctl},
    net::{AddressFamily, SocketFlags, SocketType, socket_with},
    thread::{UnshareFlags, unshare_unsafe},
};

/// An interface of the guest's, by name.
pub struct Interface<'a> {
    name: &'a str,
    socket: OwnedFd,
}

impl<'a> Interface<'a> {
    /// The one that is called `name`.
    pub fn new(name: &'a str) -> io::Result<Self> {
        // Any socket will do.
        let socket = socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
        Ok(Self { name, socket })
    }

    /// Takes it up, or down.
    pub fn set_up(&self, up: bool) -> io::Result<()> {
        let mut request = self.request()?;
        // SAFETY: the kernel reads the name and writes the flags of an `ifreq`.
        unsafe { ioctl(&self.socket, Updater::<{ SIOCGIFFLAGS as Opcode }, ifreq>::new(&mut request))? };
        // SAFETY: the kernel has just written the flags.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        let flags = if up { flags | IFF_UP as i16 } else { flags & !(IFF_UP as i16) };
        request.ifr_ifru.ifru_flags = flags;
        // SAFETY: the kernel reads an `ifreq`.
        unsafe { Ok(ioctl(&self.socket, Setter::<{ SIOCSIFFLAGS as Opcode }, ifreq>::new(request))?) }
    }

    /// Gives it another address.
    pub fn set_address(&self, address: [u8; 6]) -> io::Result<()> {
        let mut request = self.request()?;
        let mut hardware = nix::libc::sockaddr { sa_family: ARPHRD_ETHER, sa_data: [0; 14] };
        for (to, byte) in hardware.sa_data.iter_mut().zip(address) {
            *to = byte as c_char;
        }
        request.ifr_ifru.ifru_hwaddr = hardware;
        // SAFETY: the kernel reads an `ifreq`.
        unsafe { Ok(ioctl(&self.socket, Setter::<{ SIOCSIFHWADDR as Opcode }, ifreq>::new(request))?) }
    }

    fn request(&self) -> io::Result<ifreq> {
        if self.name.len() >= IFNAMSIZ {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: it is numbers, and zero is valid for each.
        let mut request: ifreq = unsafe { std::mem::zeroed() };
        for (to, byte) in request.ifr_name.iter_mut().zip(self.name.bytes()) {
            *to = byte as c_char;
        }
        Ok(request)
    }
}

/// Has this thread, until it ends, see another network, of a loopback that is down.
pub fn leave_network() -> io::Result<()> {
    // SAFETY: descriptors stay shared with the other threads; the network is not shared with anybody by a library.
    Ok(unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_not_there_is_told() {
        let none = Interface::new("purlin-none").unwrap();
        assert_eq!(none.set_up(false).unwrap_err().raw_os_error(), Some(nix::libc::ENODEV));
        assert_eq!(none.set_address([2, 0, 0, 0, 0, 1]).unwrap_err().raw_os_error(), Some(nix::libc::ENODEV));
        assert!(Interface::new(&"x".repeat(16)).unwrap().set_up(true).is_err());
    }
}
