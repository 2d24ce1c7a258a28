//! The host's sockets.

use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd, OwnedFd},
};

use rustix::{
    event::epoll::{self, CreateFlags, Event, EventData, EventFlags},
    io::Errno,
    net::{AddressFamily, SocketFlags, SocketType, connect, ipproto, socket_with, sockopt},
};

use super::slab::Id;

/// What an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Token {
    /// A TCP connection.
    Tcp(Id),
    /// A UDP or ICMP flow.
    Datagram(Id),
    /// A published port, by its place in the configuration.
    Published(usize),
}

impl Token {
    /// The kind is in the upper 8 bits.
    fn to_bits(self) -> u64 {
        match self {
            Self::Tcp(id) => id.to_bits(),
            Self::Datagram(id) => 1 << 56 | id.to_bits(),
            Self::Published(index) => 2 << 56 | index as u64,
        }
    }

    fn from_bits(bits: u64) -> Self {
        match bits >> 56 {
            0 => Self::Tcp(Id::from_bits(bits)),
            1 => Self::Datagram(Id::from_bits(bits)),
            _ => Self::Published(bits as u32 as usize),
        }
    }
}

/// All sockets of the host's that are waited for. Each event is told once, as it comes up.
pub struct Hosts {
    epoll: OwnedFd,
}

impl Hosts {
    /// None yet.
    pub fn new() -> Result<Self, Errno> {
        Ok(Self { epoll: epoll::create(CreateFlags::CLOEXEC)? })
    }

    /// To wait for.
    pub fn fd(&self) -> impl AsFd + '_ {
        &self.epoll
    }

    /// Waits for a socket until it is closed.
    pub fn watch(&self, socket: impl AsFd, token: Token) -> Result<(), Errno> {
        let events = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        epoll::add(&self.epoll, socket, EventData::new_u64(token.to_bits()), events)
    }

    /// The same without edges: what is not taken at once is told again.
    pub fn watch_level(&self, socket: impl AsFd, token: Token) -> Result<(), Errno> {
        epoll::add(&self.epoll, socket, EventData::new_u64(token.to_bits()), EventFlags::IN)
    }

    /// What has come up.
    pub fn events(&self) -> Vec<(Token, EventFlags)> {
        let mut events = Vec::<Event>::with_capacity(128);
        let now = rustix::fs::Timespec { tv_sec: 0, tv_nsec: 0 };
        match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), Some(&now)) {
            Ok(_) => events.iter().map(|event| (Token::from_bits(event.data.u64()), event.flags)).collect(),
            Err(_) => Vec::new(),
        }
    }
}

fn open(address: SocketAddr, kind: SocketType, protocol: Option<rustix::net::Protocol>) -> Result<OwnedFd, Errno> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    socket_with(family, kind, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC, protocol)
}

/// A TCP socket that is connecting.
pub fn connect_tcp(address: SocketAddr) -> Result<OwnedFd, Errno> {
    let socket = open(address, SocketType::STREAM, None)?;
    sockopt::set_tcp_nodelay(&socket, true)?;
    match connect(&socket, &address) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
        Err(error) => Err(error),
    }
}

/// Makes a socket that was accepted like one that was connected.
pub fn prepare_accepted(socket: &OwnedFd) -> Result<(), Errno> {
    sockopt::set_tcp_nodelay(socket, true)
}

/// A UDP socket to `address`.
pub fn connect_udp(address: SocketAddr) -> Result<OwnedFd, Errno> {
    let socket = open(address, SocketType::DGRAM, None)?;
    connect(&socket, &address)?;
    Ok(socket)
}

/// A socket for echo requests to `address`, whose port does not matter.
pub fn connect_ping(address: SocketAddr) -> Result<OwnedFd, Errno> {
    let protocol = if address.is_ipv4() { ipproto::ICMP } else { ipproto::ICMPV6 };
    let socket = open(address, SocketType::DGRAM, Some(protocol))?;
    connect(&socket, &address)?;
    Ok(socket)
}

/// Whether this user may send echo requests (`net.ipv4.ping_group_range`), without which a guest's `ping` reaches the
/// gateway only.
pub fn icmp_allowed() -> bool {
    open((Ipv4Addr::LOCALHOST, 0).into(), SocketType::DGRAM, Some(ipproto::ICMP)).is_ok()
}

/// Whether the host has a way to the IPv6 Internet. Nothing is sent.
pub fn has_ipv6_route() -> bool {
    let anywhere = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
    connect_udp((anywhere, 53).into()).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_told_apart() {
        for token in [Token::Tcp(Id::from_bits(7)), Token::Datagram(Id::from_bits(7 << 32 | 1)), Token::Published(7)] {
            assert_eq!(Token::from_bits(token.to_bits()), token);
        }
    }
}
