//! Ports of the host's that lead to the guest.

use std::{io, net::SocketAddr, os::fd::OwnedFd, rc::Rc};

use rustix::{
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SocketFlags, SocketType, acceptfrom_with, bind, getsockname, listen, recvfrom,
        socket_with, sockopt,
    },
};

use super::config::{Protocol, Publish};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;

/// Why a port cannot be published.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Somebody else has it.
    #[error("{protocol} port {address} is in use by another program: publish another port, or stop that program")]
    Taken {
        /// TCP or UDP.
        protocol: Protocol,
        /// Which.
        address: SocketAddr,
    },
    /// Below `net.ipv4.ip_unprivileged_port_start`.
    #[error("no permission to use {protocol} port {address}: publish a port from 1024 up")]
    Permission {
        /// TCP or UDP.
        protocol: Protocol,
        /// Which.
        address: SocketAddr,
    },
    /// Not an address of this host's.
    #[error("cannot publish {address}: this host does not have the address {}", address.ip())]
    Address {
        /// Which.
        address: SocketAddr,
    },
    /// Anything else.
    #[error("cannot publish {protocol} port {address}: {source}")]
    Other {
        /// TCP or UDP.
        protocol: Protocol,
        /// Which.
        address: SocketAddr,
        /// What the host says.
        source: io::Error,
    },
}

/// A socket on which a port of the host's is published.
#[derive(Debug)]
pub struct Listener {
    /// It.
    pub socket: OwnedFd,
    /// Its address, with the port that the host has chosen where none was given.
    pub address: SocketAddr,
}

impl Listener {
    /// Takes the port.
    pub fn open(publish: &Publish) -> Result<Self, ListenError> {
        let (protocol, address) = (publish.protocol, publish.host);
        Self::try_open(protocol, address).map_err(|error| match error {
            Errno::ADDRINUSE => ListenError::Taken { protocol, address },
            Errno::ACCESS | Errno::PERM => ListenError::Permission { protocol, address },
            Errno::ADDRNOTAVAIL | Errno::AFNOSUPPORT => ListenError::Address { address },
            error => ListenError::Other { protocol, address, source: error.into() },
        })
    }

    fn try_open(protocol: Protocol, address: SocketAddr) -> Result<Self, Errno> {
        let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let kind = match protocol {
            Protocol::Tcp => SocketType::STREAM,
            Protocol::Udp => SocketType::DGRAM,
        };
        let socket = socket_with(family, kind, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC, None)?;
        if address.is_ipv6() {
            sockopt::set_ipv6_v6only(&socket, true)?;
        }
        if protocol == Protocol::Tcp {
            // A port whose last connections are in TIME-WAIT is free. (For UDP it would let others share the port.)
            sockopt::set_socket_reuseaddr(&socket, true)?;
        }
        bind(&socket, &address)?;
        if protocol == Protocol::Tcp {
            listen(&socket, BACKLOG)?;
        }
        let address = SocketAddr::try_from(getsockname(&socket)?)?;
        Ok(Self { socket, address })
    }
}

/// A published UDP port.
pub struct UdpPort {
    /// Which of the published ports it is.
    pub index: usize,
    /// The host's socket.
    pub socket: OwnedFd,
    /// The guest's port.
    pub guest_port: u16,
}

/// A published port, in the NAT.
pub enum Published {
    /// TCP.
    Tcp {
        /// Listens.
        socket: OwnedFd,
        /// The guest's port.
        guest_port: u16,
    },
    /// UDP.
    Udp(Rc<UdpPort>),
}

impl Published {
    /// The `index`th published port with its socket.
    pub fn new(index: usize, publish: &Publish, socket: OwnedFd) -> Self {
        let guest_port = publish.guest_port;
        match publish.protocol {
            Protocol::Tcp => Self::Tcp { socket, guest_port },
            Protocol::Udp => Self::Udp(Rc::new(UdpPort { index, socket, guest_port })),
        }
    }
}

/// Accepts a connection, if there is one.
pub fn accept(listener: &OwnedFd) -> Option<(OwnedFd, SocketAddr)> {
    loop {
        match acceptfrom_with(listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
            Ok((socket, peer)) => return Some((socket, SocketAddr::try_from(peer?).ok()?)),
            // It was given up before it was accepted.
            Err(Errno::INTR | Errno::CONNABORTED) => {}
            Err(_) => return None,
        }
    }
}

/// Receives a datagram, if there is one.
pub fn receive(port: &UdpPort, buffer: &mut [u8]) -> Option<(usize, SocketAddr)> {
    loop {
        match recvfrom(&port.socket, &mut *buffer, RecvFlags::DONTWAIT) {
            Ok((length, _, peer)) => return Some((length, SocketAddr::try_from(peer?).ok()?)),
            // What was sent before did not arrive: whose it was is not told.
            Err(Errno::INTR | Errno::CONNREFUSED | Errno::HOSTUNREACH | Errno::NETUNREACH) => {}
            Err(_) => return None,
        }
    }
}
