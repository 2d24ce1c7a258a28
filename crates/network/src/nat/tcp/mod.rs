//! TCP: the table of connections.

mod flow;
mod ring;
mod segment;

use std::{
    collections::{HashMap, VecDeque},
    net::{IpAddr, SocketAddr},
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use rustix::{event::epoll::EventFlags, io::Errno};
use smoltcp::wire::{IpProtocol, TcpControl};

use self::{
    flow::{Flow, Next},
    ring::Memory,
    segment::{Incoming, Key, refuse},
};
use super::{
    Context,
    hosts::{self, Token},
    icmp::{self, Why},
    plan::{GATEWAY_V4, GUEST_V4, Route, seen_from_guest},
    slab::{Id, Slab},
    timers::Timers,
};

/// How long a connection must have been silent to give way to a new one when the table is full. (Whoever floods the
/// table has fresh ones.)
const MAY_GIVE_WAY_AFTER: Duration = Duration::from_secs(60);
/// What all connections may keep of data, in bytes, beside [`Memory::LEAST`] for each.
const MEMORY: usize = 64 << 20;
/// Turns given to connections before the guest and the host are heard again.
const TURNS: usize = 64;

/// All connections.
pub struct Connections {
    flows: Slab<Flow>,
    by_key: HashMap<Key, Id>,
    /// Those with something to do.
    work: VecDeque<Id>,
    timers: Timers<Id>,
    memory: Memory,
    /// How many there may be.
    limit: usize,
}

impl Connections {
    /// No connection yet, and never more than `limit`.
    pub fn new(limit: usize) -> Self {
        Self {
            flows: Slab::new(),
            by_key: HashMap::new(),
            work: VecDeque::new(),
            timers: Timers::new(),
            memory: Memory::new(MEMORY),
            limit,
        }
    }

    /// Whether [`Connections::work`] has something to do.
    pub fn has_work(&self) -> bool {
        !self.work.is_empty()
    }

    /// When [`Connections::expire`] has something to do.
    pub fn deadline(&self) -> Option<Instant> {
        self.timers.next()
    }

    /// Connections, and bytes kept for them.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn usage(&self) -> (usize, usize) {
        (self.flows.len(), self.memory.used())
    }

    /// A segment from the guest.
    pub fn on_segment(&mut self, cx: &mut Context, guest: IpAddr, remote: IpAddr, bytes: &[u8]) {
        let Some((key, segment)) = Incoming::parse(guest, remote, bytes) else { return };
        if let Some(&id) = self.by_key.get(&key) {
            let Some(flow) = self.flows.get_mut(id) else { return };
            let next = flow.on_segment(&segment, &mut self.memory, &mut cx.link, cx.now);
            self.proceed(cx, id, next);
        } else if segment.control == TcpControl::Syn && segment.ack.is_none() {
            self.connect(cx, key, &segment);
        } else {
            refuse(&key, &segment, &mut cx.link);
        }
    }

    /// The guest asks for a connection.
    fn connect(&mut self, cx: &mut Context, key: Key, syn: &Incoming<'_>) {
        let address = match cx.route(key.remote) {
            Route::Host(address) => address,
            Route::Resolver => cx.resolvers.current(),
            Route::Denied => return refuse(&key, syn, &mut cx.link),
        };
        if !self.has_room(cx) {
            return refuse(&key, syn, &mut cx.link);
        }
        match hosts::connect_tcp(address) {
            Ok(socket) => {
                let first = cx.first_sequence_number(&key);
                let flow = Flow::from_guest(key, socket, syn, cx.mss(key.guest.ip()), first, cx.now);
                self.insert(cx, flow);
            }
            Err(error) => self.unreachable(cx, &key, syn.seq, error),
        }
    }

    /// Somebody (`peer`) has connected to the published `port` of the guest's.
    pub fn on_accepted(&mut self, cx: &mut Context, socket: OwnedFd, peer: SocketAddr, port: u16) {
        let guest: SocketAddr = (GUEST_V4, port).into();
        let mut key = Key { guest, remote: seen_from_guest(peer) };
        // Peers that all look like the gateway may have the same port.
        for _ in 0..64 {
            if !self.by_key.contains_key(&key) {
                break;
            }
            key.remote = (GATEWAY_V4, 1024 | cx.random() as u16).into();
        }
        if self.by_key.contains_key(&key) || !self.has_room(cx) || hosts::prepare_accepted(&socket).is_err() {
            return;
        }
        let first = cx.first_sequence_number(&key);
        let flow = Flow::from_host(key, socket, cx.mss(guest.ip()), first, cx.now);
        if let Some(id) = self.insert(cx, flow) {
            self.enqueue(id);
        }
    }

    fn insert(&mut self, cx: &mut Context, flow: Flow) -> Option<Id> {
        let id = self.flows.next_id();
        let key = *flow.key();
        if let Err(error) = cx.hosts.watch(flow.socket(), Token::Tcp(id)) {
            tracing::warn!("a connection to {} is lost: cannot watch its socket: {error}", key.remote);
            return None;
        }
        self.flows.insert(flow);
        self.by_key.insert(key, id);
        self.note_deadline(id);
        Some(id)
    }

    /// Makes room for one more if need be.
    fn has_room(&mut self, cx: &Context) -> bool {
        if self.flows.len() < self.limit {
            return true;
        }
        let oldest = self.flows.iter().min_by_key(|(_, flow)| (!flow.is_ending(), flow.last_active()));
        let Some((id, flow)) = oldest else { return false };
        let is_old = cx.now.saturating_duration_since(flow.last_active()) >= MAY_GIVE_WAY_AFTER;
        let may_go = flow.is_ending() || is_old;
        if may_go {
            self.remove(id);
        }
        may_go
    }

    /// A connection's socket has news.
    pub fn on_event(&mut self, cx: &mut Context, id: Id, events: EventFlags) {
        if let Some(flow) = self.flows.get_mut(id) {
            let next = flow.on_event(events, cx.now);
            self.proceed(cx, id, next);
        }
    }

    /// Lets those that have something to do have a turn each, until the link has no room.
    pub fn work(&mut self, cx: &mut Context) {
        for _ in 0..TURNS {
            if cx.link.is_blocked() {
                return;
            }
            let Some(id) = self.work.pop_front() else { return };
            let Some(flow) = self.flows.get_mut(id) else { continue };
            flow.queued = false;
            let next = flow.work(&mut self.memory, &mut cx.link, cx.now);
            self.proceed(cx, id, next);
        }
    }

    /// Looks after those whose time has come.
    pub fn expire(&mut self, cx: &mut Context) {
        while let Some(id) = self.timers.pop(cx.now) {
            let Some(flow) = self.flows.get_mut(id) else { continue };
            flow.noted = None;
            let next = flow.time_out(&mut cx.link, cx.now);
            self.proceed(cx, id, next);
        }
    }

    fn proceed(&mut self, cx: &mut Context, id: Id, next: Next) {
        match next {
            Next::Wait => {}
            Next::Again => self.enqueue(id),
            // First in turn, as it has had none.
            Next::Blocked => {
                if let Some(flow) = self.flows.get_mut(id)
                    && !std::mem::replace(&mut flow.queued, true)
                {
                    self.work.push_front(id);
                }
            }
            Next::Gone => self.remove(id),
            Next::Unreachable(error) => {
                let known = self.flows.get_mut(id).map(|flow| (*flow.key(), flow.guest_syn()));
                self.remove(id);
                if let Some((key, seq)) = known {
                    self.unreachable(cx, &key, seq, error);
                }
            }
        }
        self.note_deadline(id);
    }

    fn enqueue(&mut self, id: Id) {
        if let Some(flow) = self.flows.get_mut(id)
            && !std::mem::replace(&mut flow.queued, true)
        {
            self.work.push_back(id);
        }
    }

    fn note_deadline(&mut self, id: Id) {
        if let Some(flow) = self.flows.get_mut(id) {
            let deadline = flow.deadline();
            self.timers.note(id, deadline, &mut flow.noted);
        }
    }

    fn remove(&mut self, id: Id) {
        if let Some(mut flow) = self.flows.remove(id) {
            flow.release(&mut self.memory);
            self.by_key.remove(flow.key());
            self.timers.forget(id, flow.noted);
        }
    }

    /// Tells the guest that the connection its SYN (with this sequence number) asked for cannot be.
    fn unreachable(&self, cx: &mut Context, key: &Key, seq: u32, error: Errno) {
        match Why::of(error) {
            Some(why) => {
                let mut quote = [0; 8];
                quote[..2].copy_from_slice(&key.guest.port().to_be_bytes());
                quote[2..4].copy_from_slice(&key.remote.port().to_be_bytes());
                quote[4..].copy_from_slice(&seq.to_be_bytes());
                icmp::unreachable(&mut cx.link, why, key.guest.ip(), key.remote.ip(), IpProtocol::Tcp, &quote);
            }
            None => {
                let ack = Some(seq.wrapping_add(1));
                segment::Reply::bare(TcpControl::Rst, 0, ack, 0).send_or_wait(key, &mut cx.link);
            }
        }
    }
}
