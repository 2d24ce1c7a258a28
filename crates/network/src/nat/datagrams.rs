//! UDP and echo requests: flows of datagrams, each with a socket of its own.
//!
//! A socket is connected, so that nobody but the other end gets through it to the guest, and errors come back. (A
//! guest's port looks different to each of its peers, then: RFC 4787's address- and port-dependent mapping.) A flow to
//! a published port goes through the socket of that.

use std::{
    collections::{HashMap, VecDeque},
    net::{IpAddr, SocketAddr},
    os::fd::OwnedFd,
    rc::Rc,
    time::{Duration, Instant},
};

use rustix::{
    io::Errno,
    net::{RecvFlags, SendFlags, recv, send, sendto},
};
use smoltcp::wire::{IpProtocol, UdpPacket};

use super::{
    Context,
    hosts::{self, Token},
    icmp::{self, Echo, Why},
    link::Outgoing,
    plan::{GATEWAY_V4, GUEST_V4, Route, seen_from_guest},
    published::UdpPort,
    slab::{Id, Slab},
    timers::Timers,
};

/// The longest payload of a datagram, in bytes.
pub const MAX_PAYLOAD: usize = 65535 - 20 - 8;
/// Datagrams that a flow may deliver before others have their turn.
const QUANTUM: usize = 16;

/// What a flow is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    Dns,
    Ping,
    Udp,
}

impl Class {
    /// How many there may be. One more, and the one that was silent longest gives way: a storm of one kind does not
    /// harm the others.
    fn limit(self) -> usize {
        match self {
            Self::Dns => 256,
            Self::Ping => 64,
            Self::Udp => 1024,
        }
    }
}

/// The sum of all limits: the sockets that there may be.
pub const LIMIT: usize = 256 + 64 + 1024;

/// Silence after which a flow is over: one where nothing has come back, or nothing more is to be expected, and others.
const SHORT: Duration = Duration::from_secs(30);
const LONG: Duration = Duration::from_secs(180);
/// A name server that has not answered for so long is not asked again when there is another.
const DNS_PATIENCE: Duration = Duration::from_secs(2);

/// Both ends, as the guest sees them. An echo's identifier is the guest's port; the remote one is 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    is_ping: bool,
    guest: SocketAddr,
    remote: SocketAddr,
}

/// How a flow reaches the host's network.
enum Via {
    /// By a socket connected to the other end.
    Own { socket: OwnedFd, to: SocketAddr },
    /// By a published port, from which `peer` has sent.
    Published { port: Rc<UdpPort>, peer: SocketAddr },
}

struct Flow {
    key: Key,
    class: Class,
    via: Via,
    last_active: Instant,
    /// When the guest sent the first datagram that nothing has come back to.
    unanswered: Option<Instant>,
    /// Something has come back.
    answered: bool,
    queued: bool,
    noted: Option<Instant>,
}

impl Flow {
    fn deadline(&self) -> Instant {
        let is_long = self.class == Class::Udp && self.answered;
        self.last_active + if is_long { LONG } else { SHORT }
    }

    fn send(&self, data: &[u8]) -> Result<(), Errno> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        match &self.via {
            Via::Own { socket, .. } => send(socket, data, flags),
            Via::Published { port, peer } => sendto(&port.socket, data, flags, peer),
        }
        .map(drop)
    }
}

/// All flows.
pub struct Datagrams {
    flows: Slab<Flow>,
    by_key: HashMap<Key, Id>,
    /// Those of published ports, by [`UdpPort::index`] and peer.
    by_peer: HashMap<(usize, SocketAddr), Id>,
    work: VecDeque<Id>,
    timers: Timers<Id>,
    buffer: Vec<u8>,
}

impl Datagrams {
    /// None yet.
    pub fn new() -> Self {
        Self {
            flows: Slab::new(),
            by_key: HashMap::new(),
            by_peer: HashMap::new(),
            work: VecDeque::new(),
            timers: Timers::new(),
            buffer: vec![0; 65536],
        }
    }

    /// Whether [`Datagrams::work`] has something to do.
    pub fn has_work(&self) -> bool {
        !self.work.is_empty()
    }

    /// When [`Datagrams::expire`] has something to do.
    pub fn deadline(&self) -> Option<Instant> {
        self.timers.next()
    }

    /// How many flows there are.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn len(&self) -> usize {
        self.flows.len()
    }

    /// A UDP datagram from the guest.
    pub fn on_udp(&mut self, cx: &mut Context, guest: IpAddr, remote: IpAddr, bytes: &[u8]) {
        let Ok(packet) = UdpPacket::new_checked(bytes) else { return };
        let guest = SocketAddr::new(guest, packet.src_port());
        let remote = SocketAddr::new(remote, packet.dst_port());
        if guest.port() == 0 || remote.port() == 0 {
            return;
        }
        self.send_out(cx, Key { is_ping: false, guest, remote }, packet.payload());
    }

    /// An echo request from the guest to somebody beyond the gateway.
    pub fn on_echo(&mut self, cx: &mut Context, guest: IpAddr, remote: IpAddr, echo: &Echo<'_>) {
        let key = Key { is_ping: true, guest: (guest, echo.ident).into(), remote: (remote, 0).into() };
        let header = echo.header(guest.is_ipv4());
        self.send_out(cx, key, &[&header, echo.data].concat());
    }

    fn send_out(&mut self, cx: &mut Context, key: Key, data: &[u8]) {
        let known = self.by_key.get(&key).copied();
        let Some(id) = known.filter(|&id| !self.is_stuck(cx, id)).or_else(|| self.open(cx, key)) else { return };
        let Some(flow) = self.flows.get_mut(id) else { return };
        flow.last_active = cx.now;
        flow.unanswered.get_or_insert(cx.now);
        match flow.send(data) {
            // As on any wire, what there is no room for is lost.
            Ok(()) | Err(Errno::AGAIN | Errno::NOBUFS | Errno::MSGSIZE) => {}
            Err(error) => self.on_error(cx, id, error),
        }
        self.note_deadline(id);
    }

    /// Whether the flow is to a name server that does not answer. It is gone then.
    fn is_stuck(&mut self, cx: &mut Context, id: Id) -> bool {
        let Some(flow) = self.flows.get_mut(id) else { return false };
        let since = flow.unanswered.filter(|_| flow.class == Class::Dns);
        let is_stuck = since.is_some_and(|since| cx.now.saturating_duration_since(since) >= DNS_PATIENCE);
        if is_stuck {
            self.give_up_resolver(cx, id);
            self.remove(id);
        }
        is_stuck
    }

    fn give_up_resolver(&mut self, cx: &mut Context, id: Id) {
        if let Some(Flow { class: Class::Dns, via: Via::Own { to, .. }, .. }) = self.flows.get_mut(id) {
            cx.resolvers.failed(*to);
        }
    }

    fn open(&mut self, cx: &mut Context, key: Key) -> Option<Id> {
        let (class, to) = match cx.route(key.remote) {
            Route::Host(address) if key.is_ping => (Class::Ping, address),
            Route::Host(address) => (Class::Udp, address),
            Route::Resolver if !key.is_ping => {
                cx.resolvers.refresh(cx.now);
                (Class::Dns, cx.resolvers.current())
            }
            Route::Resolver | Route::Denied => return None,
        };
        let socket = if key.is_ping { hosts::connect_ping(to) } else { hosts::connect_udp(to) };
        match socket {
            Ok(socket) => self.insert(cx, key, class, Via::Own { socket, to }),
            // The host does not let its users ping: doctor tells, the guest hears nothing.
            Err(Errno::ACCESS) if key.is_ping => None,
            Err(error) => {
                unreachable(cx, &key, error);
                None
            }
        }
    }

    fn insert(&mut self, cx: &mut Context, key: Key, class: Class, via: Via) -> Option<Id> {
        self.make_room(class);
        let id = self.flows.next_id();
        if let Via::Own { socket, .. } = &via
            && let Err(error) = cx.hosts.watch(socket, Token::Datagram(id))
        {
            tracing::warn!("datagrams to {} are lost: cannot watch their socket: {error}", key.remote);
            return None;
        }
        if let Via::Published { port, peer } = &via {
            self.by_peer.insert((port.index, *peer), id);
        }
        let last_active = cx.now;
        let flow = Flow { key, class, via, last_active, unanswered: None, answered: false, queued: false, noted: None };
        self.flows.insert(flow);
        self.by_key.insert(key, id);
        self.note_deadline(id);
        Some(id)
    }

    fn make_room(&mut self, class: Class) {
        let of_class = || self.flows.iter().filter(|(_, flow)| flow.class == class);
        if of_class().count() < class.limit() {
            return;
        }
        if let Some((oldest, _)) = of_class().min_by_key(|(_, flow)| flow.last_active) {
            self.remove(oldest);
        }
    }

    /// A flow's socket has news.
    pub fn on_event(&mut self, id: Id) {
        if let Some(flow) = self.flows.get_mut(id)
            && !std::mem::replace(&mut flow.queued, true)
        {
            self.work.push_back(id);
        }
    }

    /// Lets flows deliver what has come, until the link has no room.
    pub fn work(&mut self, cx: &mut Context) {
        for _ in 0..self.work.len() {
            if cx.link.is_blocked() {
                return;
            }
            let Some(id) = self.work.pop_front() else { return };
            if let Some(flow) = self.flows.get_mut(id) {
                flow.queued = false;
                if self.receive(cx, id) {
                    self.on_event(id);
                }
            }
        }
    }

    /// Delivers what a flow has. Returns whether there may be more.
    fn receive(&mut self, cx: &mut Context, id: Id) -> bool {
        for _ in 0..QUANTUM {
            if cx.link.is_blocked() {
                return true;
            }
            let Some(flow) = self.flows.get_mut(id) else { return false };
            let Via::Own { socket, .. } = &flow.via else { return false };
            match recv(socket, &mut self.buffer[..], RecvFlags::DONTWAIT) {
                Ok((length, _)) => {
                    flow.last_active = cx.now;
                    flow.unanswered = None;
                    flow.answered = true;
                    deliver(cx, &flow.key, &self.buffer[..length]);
                }
                Err(Errno::AGAIN) => return false,
                Err(Errno::INTR) => {}
                Err(error) => {
                    self.on_error(cx, id, error);
                    return true;
                }
            }
        }
        true
    }

    /// The host says why a datagram did not arrive. The flow goes on: the next one may.
    fn on_error(&mut self, cx: &mut Context, id: Id, error: Errno) {
        let Some(flow) = self.flows.get_mut(id) else { return };
        let key = flow.key;
        if flow.class == Class::Dns {
            self.give_up_resolver(cx, id);
            self.remove(id);
            return;
        }
        unreachable(cx, &key, error);
    }

    /// A datagram has come from `peer` to a published port.
    pub fn on_published(&mut self, cx: &mut Context, port: &Rc<UdpPort>, peer: SocketAddr, data: &[u8]) {
        let known = self.by_peer.get(&(port.index, peer)).copied();
        let Some(id) = known.or_else(|| self.open_published(cx, port, peer)) else { return };
        let Some(flow) = self.flows.get_mut(id) else { return };
        flow.last_active = cx.now;
        flow.answered = true;
        deliver(cx, &flow.key, data);
        self.note_deadline(id);
    }

    fn open_published(&mut self, cx: &mut Context, port: &Rc<UdpPort>, peer: SocketAddr) -> Option<Id> {
        let guest = (GUEST_V4, port.guest_port).into();
        let mut key = Key { is_ping: false, guest, remote: seen_from_guest(peer) };
        // Peers that all look like the gateway may have the same port.
        for _ in 0..64 {
            if !self.by_key.contains_key(&key) {
                return self.insert(cx, key, Class::Udp, Via::Published { port: port.clone(), peer });
            }
            key.remote = (GATEWAY_V4, 1024 | cx.random() as u16).into();
        }
        None
    }

    /// Forgets those that were silent too long.
    pub fn expire(&mut self, cx: &mut Context) {
        while let Some(id) = self.timers.pop(cx.now) {
            let Some(flow) = self.flows.get_mut(id) else { continue };
            flow.noted = None;
            if cx.now < flow.deadline() {
                self.note_deadline(id);
                continue;
            }
            if flow.unanswered.is_some() {
                self.give_up_resolver(cx, id);
            }
            self.remove(id);
        }
    }

    fn note_deadline(&mut self, id: Id) {
        if let Some(flow) = self.flows.get_mut(id) {
            let deadline = flow.deadline();
            self.timers.note(id, deadline, &mut flow.noted);
        }
    }

    fn remove(&mut self, id: Id) {
        if let Some(flow) = self.flows.remove(id) {
            self.by_key.remove(&flow.key);
            self.timers.forget(id, flow.noted);
            if let Via::Published { port, peer } = flow.via {
                self.by_peer.remove(&(port.index, peer));
            }
        }
    }
}

/// Gives the guest what has come to it.
fn deliver(cx: &mut Context, key: &Key, data: &[u8]) {
    let (source, destination) = (key.remote.ip(), key.guest.ip());
    if key.is_ping {
        // The host has put its own identifier in the place of the guest's.
        if let Some(echo) = Echo::parse(source.is_ipv4(), data) {
            Echo { ident: key.guest.port(), ..echo }.send(&mut cx.link, source, destination);
        }
        return;
    }
    let fits = data.len() + 48 <= cx.mtu.into();
    // A guest that takes large segments takes any packet that its memory has room for, fragmented or not.
    if data.len() > MAX_PAYLOAD || !(fits || cx.link.takes_large_segments(destination)) {
        tracing::debug!("a datagram of {} bytes from {} is lost: the guest takes none so long", data.len(), key.remote);
        return;
    }
    let mut header = [0; 8];
    header[..2].copy_from_slice(&key.remote.port().to_be_bytes());
    header[2..4].copy_from_slice(&key.guest.port().to_be_bytes());
    header[4..6].copy_from_slice(&((8 + data.len()) as u16).to_be_bytes());
    cx.link.send_or_wait(&Outgoing {
        source,
        destination,
        protocol: IpProtocol::Udp,
        header: &header,
        payload: (data, &[]),
        checksum: Some(6),
        segment_size: None,
    });
}

/// Tells the guest that a datagram did not arrive.
fn unreachable(cx: &mut Context, key: &Key, error: Errno) {
    let why = match Why::of(error) {
        Some(why) => why,
        None if error == Errno::CONNREFUSED => Why::Port,
        None => return,
    };
    let mut quote = [0; 8];
    let protocol = match (key.is_ping, key.guest.is_ipv4()) {
        (false, _) => {
            quote[..2].copy_from_slice(&key.guest.port().to_be_bytes());
            quote[2..4].copy_from_slice(&key.remote.port().to_be_bytes());
            quote[5] = 8;
            IpProtocol::Udp
        }
        (true, is_v4) => {
            quote = Echo { is_request: true, ident: key.guest.port(), seq: 0, data: &[] }.header(is_v4);
            if is_v4 { IpProtocol::Icmp } else { IpProtocol::Icmpv6 }
        }
    };
    icmp::unreachable(&mut cx.link, why, key.guest.ip(), key.remote.ip(), protocol, &quote);
}
