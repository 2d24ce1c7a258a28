//! What a hostile guest sends, in the same process: for tests and fuzz targets.

use std::{net::SocketAddr, os::fd::OwnedFd, time::Instant};

use rustix::net::{RecvFlags, recv};

use super::{Nat, NatConfig, process::packet_sockets};

/// A NAT that can reach nothing but the name server that it is given.
pub struct Victim {
    nat: Nat,
    guest: OwnedFd,
}

impl Victim {
    /// A NAT with a limit of connections that a guest reaches soon. `resolver` is on this host.
    ///
    /// # Panics
    /// If the host has no sockets.
    pub fn new(resolver: SocketAddr) -> Self {
        let (guest, socket) = packet_sockets().expect("there are packet sockets");
        let config = NatConfig { isolated: true, resolvers: vec![resolver], ..NatConfig::default() };
        Self { nat: Nat::new(socket, &config, Vec::new(), 64).expect("there is epoll"), guest }
    }

    /// The guest sends `message`: a packet or a request.
    pub fn send(&mut self, message: &[u8]) {
        self.nat.cx.now = Instant::now();
        self.nat.on_message(message);
        self.nat.turn();
        assert!(!self.nat.cx.link.is_closed());
    }

    /// What the guest gets, if there is something.
    pub fn receive(&self) -> Option<Vec<u8>> {
        let mut packet = vec![0; crate::MAX_PACKET];
        let (length, _) = recv(&self.guest, &mut packet[..], RecvFlags::DONTWAIT).ok()?;
        packet.truncate(length);
        Some(packet)
    }

    /// Connections, bytes kept for them, and flows of datagrams.
    pub fn usage(&self) -> (usize, usize, usize) {
        let (connections, bytes) = self.nat.connections.usage();
        (connections, bytes, self.nat.datagrams.len())
    }
}
