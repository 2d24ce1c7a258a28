//! User-mode NAT: a guest's network made of ordinary sockets of the host's.
//!
//! | what | IPv4 | IPv6 |
//! |---|---|---|
//! | network | 10.0.2.0/24 | fd70:7572:6c69:2::/64 |
//! | gateway | 10.0.2.2 | fd70:7572:6c69:2::2, fe80::2 |
//! | name server | 10.0.2.3 | fd70:7572:6c69:2::3 |
//! | guest | 10.0.2.15, by DHCP | by router advertisement |
//!
//! One thread does everything, and never waits but in [`Nat::wait`]. What the guest sends is dealt with at once
//! ([`Nat::on_packet`]); what the host's sockets have for the guest is fetched only while the guest's link has room, so
//! that nothing piles up here. All tables and buffers are bounded.
#![forbid(unsafe_code)]

mod checksum;
mod config;
mod datagrams;
mod dhcp;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod hosts;
mod icmp;
mod link;
mod neighbours;
mod plan;
mod process;
mod published;
mod resolvers;
mod sandbox;
mod slab;
mod tcp;
#[cfg(test)]
mod tests;
mod timers;

use std::{
    hash::{BuildHasher, Hash, RandomState},
    io,
    net::{IpAddr, SocketAddr},
    os::fd::OwnedFd,
    rc::Rc,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::{RecvFlags, recv},
};
use smoltcp::wire::{EthernetAddress, EthernetFrame, EthernetProtocol, IpProtocol, Ipv4Packet, Ipv6Packet, UdpPacket};

pub use self::{
    config::{NatConfig, Protocol, Publish, PublishError},
    hosts::icmp_allowed,
    process::{NatError, NatProcess, VERB, begin, main, start, wait_until_ready},
    published::{ListenError, Listener},
};
use self::{
    datagrams::{Datagrams, MAX_PAYLOAD},
    hosts::{Hosts, Token},
    icmp::Echo,
    link::Link,
    neighbours::Solicitation,
    plan::{GATEWAY_MAC, GATEWAY_V4, Reach, Route, is_guests, is_ours},
    published::Published,
    resolvers::Resolvers,
    tcp::Connections,
};
use crate::{MAX_PACKET, Offload, PacketHeader};

/// Packets taken from the guest before others have their turn.
const PACKETS: usize = 64;
/// Connections or datagrams taken of a published port at once.
const ARRIVALS: usize = 64;
/// How often the router is advertised without being asked for (RFC 4861 6.2.1: at most every 1800 s).
const ADVERTISE_EVERY: Duration = Duration::from_secs(300);
/// TCP connections at most.
const MAX_CONNECTIONS: usize = 4096;

/// What all parts of the NAT need.
struct Context {
    link: Link,
    hosts: Hosts,
    resolvers: Resolvers,
    /// The time at which this turn began.
    now: Instant,
    reach: Reach,
    mtu: u16,
    randomness: (RandomState, u64),
    /// When the NAT began.
    begin: Instant,
}

impl Context {
    fn route(&self, destination: SocketAddr) -> Route {
        plan::route(destination, self.reach)
    }

    /// The largest TCP segment in one packet to or from this kind of address.
    fn mss(&self, ip: IpAddr) -> u16 {
        self.mtu - if ip.is_ipv4() { 40 } else { 60 }
    }

    /// A number that nobody outside can guess.
    fn random(&mut self) -> u32 {
        self.randomness.1 += 1;
        self.randomness.0.hash_one(self.randomness.1) as u32
    }

    /// The first sequence number of a connection: nobody outside can guess it, and it is beyond those of an earlier one
    /// between the same ends, which the guest may remember, unless that was faster than the clock: 15 MB/s (RFC 6528 3).
    fn first_sequence_number(&self, ends: &impl Hash) -> u32 {
        // Every 64 ns, as Linux has it: around once in 275 s, which is more than TIME-WAIT.
        let ticks = self.now.duration_since(self.begin).as_nanos() / 64;
        (self.randomness.0.hash_one(ends) as u32).wrapping_add(ticks as u32)
    }
}

/// A NAT.
pub struct Nat {
    cx: Context,
    connections: Connections,
    datagrams: Datagrams,
    published: Vec<Published>,
    hostname: String,
    /// When to advertise the router; never before a guest has asked for one.
    advertise_at: Option<Instant>,
    buffer: Vec<u8>,
}

impl Nat {
    /// A NAT for the guest at the other end of `socket`. `listeners` are the sockets of what `config` publishes;
    /// `max_connections` bounds the host's sockets for TCP.
    fn new(
        socket: OwnedFd,
        config: &NatConfig,
        listeners: Vec<OwnedFd>,
        max_connections: usize,
    ) -> Result<Self, Errno> {
        let hosts = Hosts::new()?;
        let mut published = Vec::new();
        for (index, (publish, listener)) in config.publish.iter().zip(listeners).enumerate() {
            hosts.watch_level(&listener, Token::Published(index))?;
            published.push(Published::new(index, publish, listener));
        }
        let cx = Context {
            link: Link::new(socket, EthernetAddress(config.mac)),
            hosts,
            resolvers: Resolvers::new(config.resolvers.clone()),
            now: Instant::now(),
            reach: Reach { world: !config.isolated, host_loopback: config.allow_host_loopback },
            mtu: config.mtu.clamp(NatConfig::MIN_MTU, NatConfig::MAX_MTU),
            randomness: (RandomState::new(), 0),
            begin: Instant::now(),
        };
        Ok(Self {
            cx,
            connections: Connections::new(max_connections),
            datagrams: Datagrams::new(),
            published,
            hostname: config.hostname.clone(),
            advertise_at: None,
            buffer: vec![0; MAX_PACKET.max(MAX_PAYLOAD)],
        })
    }

    /// Works until the guest's end is closed.
    fn run(&mut self) -> io::Result<()> {
        while !self.cx.link.is_closed() {
            self.wait()?;
            self.cx.now = Instant::now();
            self.turn();
        }
        Ok(())
    }

    /// Waits for something to do.
    fn wait(&self) -> io::Result<()> {
        let link = &self.cx.link;
        let is_blocked = link.is_blocked();
        let wanted = if is_blocked { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
        let (link_fd, hosts_fd) = (link.fd(), self.cx.hosts.fd());
        // While there is no room for the guest, what comes from outside stays where it is.
        let mut fds = [PollFd::new(&link_fd, wanted), PollFd::new(&hosts_fd, PollFlags::IN)];
        let fds = if is_blocked { &mut fds[..1] } else { &mut fds[..] };
        let timeout = self.timeout().map(|wait| Timespec {
            tv_sec: wait.as_secs().cast_signed(),
            // Rounded up: not to wake up shortly before the time.
            tv_nsec: i64::from(wait.subsec_nanos()),
        });
        match poll(fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// How long to wait at most.
    fn timeout(&self) -> Option<Duration> {
        if !self.cx.link.is_blocked() && (self.connections.has_work() || self.datagrams.has_work()) {
            return Some(Duration::ZERO);
        }
        let deadlines = [self.connections.deadline(), self.datagrams.deadline(), self.advertise_at];
        let next = deadlines.into_iter().flatten().min()?;
        Some(next.saturating_duration_since(Instant::now()))
    }

    /// Does what there is to do, a bounded part of it.
    fn turn(&mut self) {
        if self.cx.link.is_blocked() {
            self.cx.link.unblock();
        }
        self.take_packets();
        if !self.cx.link.is_blocked() {
            self.take_events();
        }
        self.connections.work(&mut self.cx);
        self.datagrams.work(&mut self.cx);
        self.connections.expire(&mut self.cx);
        self.datagrams.expire(&mut self.cx);
        if self.advertise_at.is_some_and(|at| at <= self.cx.now) {
            self.advertise_router();
        }
    }

    /// Takes what the guest has sent.
    fn take_packets(&mut self) {
        let mut buffer = std::mem::take(&mut self.buffer);
        for _ in 0..PACKETS {
            let received = recv(self.cx.link.fd(), &mut buffer[..], RecvFlags::DONTWAIT);
            match received {
                Ok((0, _)) | Err(Errno::CONNRESET | Errno::NOTCONN) => {
                    self.cx.link.close();
                    break;
                }
                Ok((length, _)) => self.on_message(&buffer[..length]),
                Err(Errno::INTR) => {}
                Err(_) => break,
            }
        }
        self.buffer = buffer;
    }

    /// A request (see [`crate::Backend::socket`]) or a packet.
    fn on_message(&mut self, message: &[u8]) {
        if let Ok(request) = message.try_into() {
            self.cx.link.offload = Offload::from_bits_truncate(u32::from_le_bytes(request)).consistent();
        } else if let Some((_, frame)) = message.split_at_checked(PacketHeader::LENGTH) {
            // What the header says is still to be done to the frame need not be done: nobody looks at checksums, and
            // segments may have any size.
            self.on_frame(frame);
        }
    }

    fn on_frame(&mut self, frame: &[u8]) {
        let Ok(frame) = EthernetFrame::new_checked(frame) else { return };
        let (to, from) = (frame.dst_addr(), frame.src_addr());
        if !(to == GATEWAY_MAC || to.is_multicast() || to.is_broadcast()) || !from.is_unicast() {
            return;
        }
        match frame.ethertype() {
            EthernetProtocol::Arp => neighbours::answer_arp(frame.payload(), &mut self.cx.link),
            EthernetProtocol::Ipv4 => self.on_ipv4(from, frame.payload()),
            EthernetProtocol::Ipv6 => self.on_ipv6(from, frame.payload()),
            EthernetProtocol::Unknown(_) => {}
        }
    }

    fn on_ipv4(&mut self, from: EthernetAddress, bytes: &[u8]) {
        let Ok(packet) = Ipv4Packet::new_checked(bytes) else { return };
        let is_whole = !packet.more_frags() && packet.frag_offset() == 0;
        if packet.version() != 4 || !packet.verify_checksum() || !is_whole {
            return;
        }
        let (guest, remote) = (packet.src_addr(), packet.dst_addr());
        let protocol = packet.next_header();
        // Who has no address yet may ask for one.
        let is_local = remote == GATEWAY_V4 || remote.is_broadcast();
        if protocol == IpProtocol::Udp && is_local && (guest.is_unspecified() || is_guests(guest.into())) {
            match UdpPacket::new_checked(packet.payload()) {
                Ok(udp) if udp.dst_port() == dhcp::SERVER_PORT => {
                    return dhcp::answer(udp.payload(), &self.hostname, self.cx.mtu, &mut self.cx.link);
                }
                _ => {}
            }
        }
        if is_guests(guest.into()) {
            self.cx.link.guest = from;
            self.on_ip(guest.into(), remote.into(), protocol, packet.payload());
        }
    }

    fn on_ipv6(&mut self, from: EthernetAddress, bytes: &[u8]) {
        let Ok(packet) = Ipv6Packet::new_checked(bytes) else { return };
        if packet.version() != 6 {
            return;
        }
        let (guest, remote) = (packet.src_addr(), packet.dst_addr());
        let protocol = packet.next_header();
        // Neighbours have link-local addresses or none.
        if protocol == IpProtocol::Icmpv6 && packet.hop_limit() == 255 {
            match neighbours::parse(guest, remote, packet.payload()) {
                Some(Solicitation::Router) => {
                    self.cx.link.guest = from;
                    return self.advertise_router();
                }
                Some(Solicitation::Neighbour(target)) => {
                    self.cx.link.guest = from;
                    return neighbours::advertise_neighbour(target, guest, &mut self.cx.link);
                }
                None => {}
            }
        }
        let is_neighbour = guest.is_unicast_link_local() && protocol == IpProtocol::Icmpv6 && is_ours(remote.into());
        if is_guests(guest.into()) || is_neighbour {
            self.cx.link.guest = from;
            self.on_ip(guest.into(), remote.into(), protocol, packet.payload());
        }
    }

    /// A packet from the guest to somebody.
    fn on_ip(&mut self, guest: IpAddr, remote: IpAddr, protocol: IpProtocol, payload: &[u8]) {
        match protocol {
            IpProtocol::Tcp => self.connections.on_segment(&mut self.cx, guest, remote, payload),
            IpProtocol::Udp => self.datagrams.on_udp(&mut self.cx, guest, remote, payload),
            IpProtocol::Icmp | IpProtocol::Icmpv6 => {
                let is_own = (protocol == IpProtocol::Icmp) == guest.is_ipv4();
                match Echo::parse(guest.is_ipv4(), payload) {
                    Some(echo) if is_own && echo.is_request => self.on_echo(guest, remote, &echo),
                    _ => {}
                }
            }
            _ => {}
        }
    }

    fn on_echo(&mut self, guest: IpAddr, remote: IpAddr, echo: &Echo<'_>) {
        if is_ours(remote) {
            Echo { is_request: false, ..*echo }.send(&mut self.cx.link, remote, guest);
        } else {
            self.datagrams.on_echo(&mut self.cx, guest, remote, echo);
        }
    }

    fn advertise_router(&mut self) {
        self.advertise_at = Some(self.cx.now + ADVERTISE_EVERY);
        neighbours::advertise_router(self.cx.mtu, &mut self.cx.link);
    }

    /// Takes note of what the host's sockets have.
    fn take_events(&mut self) {
        for (token, events) in self.cx.hosts.events() {
            match token {
                Token::Tcp(id) => self.connections.on_event(&mut self.cx, id, events),
                Token::Datagram(id) => self.datagrams.on_event(id),
                Token::Published(index) => self.on_arrival(index),
            }
        }
    }

    /// Somebody comes to a published port.
    fn on_arrival(&mut self, index: usize) {
        match self.published.get(index) {
            Some(Published::Tcp { socket, guest_port }) => {
                for (socket, peer) in std::iter::from_fn(|| published::accept(socket)).take(ARRIVALS) {
                    self.connections.on_accepted(&mut self.cx, socket, peer, *guest_port);
                }
            }
            Some(Published::Udp(port)) => {
                let port = Rc::clone(port);
                for _ in 0..ARRIVALS {
                    if self.cx.link.is_blocked() {
                        break;
                    }
                    let Some((length, peer)) = published::receive(&port, &mut self.buffer) else { break };
                    self.datagrams.on_published(&mut self.cx, &port, peer, &self.buffer[..length]);
                }
            }
            None => {}
        }
    }
}
