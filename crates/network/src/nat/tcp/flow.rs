//! One connection: the guest's TCP ends here, and a socket of the host's goes on from here.
//!
//! Towards the guest this is a TCP of its own (RFC 9293) over a wire that is short and loses nothing, but for what the
//! guest itself drops: there is no congestion control, and a loss is mended by going back to the first byte that is
//! not acknowledged. What the guest sends goes straight to the socket; only what that does not take is kept. What the
//! socket yields is kept until the guest has acknowledged it.
//!
//! Here are a connection's phases, its times and the host's socket; what the guest says is in [`arriving`], what it is
//! told in [`departing`].

mod arriving;
mod departing;

use std::{
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use rustix::{
    event::epoll::EventFlags,
    io::Errno,
    net::{
        RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendFlags, Shutdown, recvmsg, sendmsg, shutdown, sockopt,
    },
};
use smoltcp::wire::TcpControl;

use super::{
    ring::{Memory, Ring},
    segment::{Incoming, Key, Reply},
};
use crate::nat::link::{Link, Sent};

/// What windows are scaled by where the guest knows about it: up to 4 MiB, in steps of 64 bytes.
const WINDOW_SHIFT: u8 = 6;
/// How much is read of the host's socket before others have their turn, in bytes.
const QUANTUM: usize = 256 << 10;
/// The largest payload of one segment to the guest, in bytes.
const MAX_SEGMENT: usize = 65535 - 60 - 60;
/// A guest cannot ask for smaller segments than any host must take (RFC 9293 3.7.1).
const MIN_MSS: u16 = 536;

/// The first wait for an acknowledgement (RFC 6298 2.1). It doubles up to [`MAX_WAIT`].
const FIRST_WAIT: Duration = Duration::from_secs(1);
const MAX_WAIT: Duration = Duration::from_secs(60);
/// Waits in vain after which a connection is given up.
const MAX_SYN_RETRIES: u32 = 6;
const MAX_RETRIES: u32 = 15;
/// How long the host may take to connect.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(75);
/// How long an open connection may be silent (RFC 5382 REQ-5: not less than 2 h 4 min).
const IDLE_TIMEOUT: Duration = Duration::from_secs(2 * 3600 + 5 * 60);

/// How far a connection has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The guest has sent a SYN, the host's socket is connecting.
    Connecting,
    /// The host's socket stands, the guest is to acknowledge our SYN.
    SynReceived,
    /// Somebody has connected to a published port, the guest is to answer our SYN.
    SynSent,
    /// Both sides stand.
    Open,
}

/// What is to be done about a connection.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub enum Next {
    /// Nothing until something happens.
    Wait,
    /// There is more to do at once, when others have had their turn.
    Again,
    /// There is more to do as soon as the guest's link has room.
    Blocked,
    /// It is over: forget it.
    Gone,
    /// The host could not connect.
    Unreachable(Errno),
}

/// A connection.
pub struct Flow {
    key: Key,
    socket: OwnedFd,
    phase: Phase,
    /// The socket may have something to read.
    readable: bool,
    /// The socket may have room.
    writable: bool,
    from_guest: FromGuest,
    to_guest: ToGuest,
    /// When something last came from either side.
    last_active: Instant,
    timer: Timer,
    /// It is in the list of those with work to do.
    pub queued: bool,
    /// See [`crate::nat::timers::Timers`].
    pub noted: Option<Instant>,
}

/// The direction from the guest to the host.
#[derive(Debug, Default)]
struct FromGuest {
    /// RCV.NXT.
    next: u32,
    /// The first sequence number that the guest has not been allowed to send.
    edge: u32,
    /// The scale of the windows that the guest is told.
    shift: u8,
    /// What the socket has not taken yet.
    buffer: Ring,
    /// The guest has sent its FIN.
    fin: bool,
    /// The socket knows.
    shut: bool,
    /// The guest is to be told [`FromGuest::next`].
    ack_due: bool,
}

/// The direction from the host to the guest.
#[derive(Debug, Default)]
struct ToGuest {
    /// SND.UNA.
    una: u32,
    /// SND.NXT.
    next: u32,
    /// The highest SND.NXT there was: `next` goes back where something is sent again.
    max: u32,
    /// SND.WND, in bytes.
    window: u32,
    /// The scale of the windows that the guest tells.
    shift: u8,
    /// The largest segment that the guest takes.
    mss: u16,
    /// What the guest has not acknowledged, from `una` on.
    buffer: Ring,
    /// How much to read of the socket at once, in bytes: as much as there was of late.
    quantum: usize,
    /// The SYN is to be sent (again).
    syn_due: bool,
    /// It has been sent again before its time.
    syn_repeated: bool,
    /// The socket will yield nothing more.
    eof: bool,
    /// The guest knows.
    fin_acked: bool,
    duplicate_acks: u8,
}

/// Waiting for an acknowledgement.
#[derive(Debug, Default)]
struct Timer {
    at: Option<Instant>,
    retries: u32,
}

impl Timer {
    fn wait(&self) -> Duration {
        (FIRST_WAIT * 2u32.pow(self.retries.min(6))).min(MAX_WAIT)
    }

    fn start(&mut self, now: Instant) {
        self.at.get_or_insert(now + self.wait());
    }

    fn clear(&mut self) {
        *self = Self::default();
    }
}

impl Flow {
    /// The connection that the guest's SYN asks for; `socket` is connecting. Segments are at most `mss` bytes.
    pub fn from_guest(key: Key, socket: OwnedFd, syn: &Incoming<'_>, mss: u16, iss: u32, now: Instant) -> Self {
        let mut flow = Self::new(key, socket, Phase::Connecting, iss, mss, now);
        flow.take_syn(syn);
        flow
    }

    /// The connection that somebody has made to a published port.
    pub fn from_host(key: Key, socket: OwnedFd, mss: u16, iss: u32, now: Instant) -> Self {
        let mut flow = Self::new(key, socket, Phase::SynSent, iss, mss, now);
        flow.to_guest.syn_due = true;
        flow.from_guest.shift = WINDOW_SHIFT;
        flow
    }

    fn new(key: Key, socket: OwnedFd, phase: Phase, iss: u32, mss: u16, now: Instant) -> Self {
        let to_guest = ToGuest { una: iss, next: iss, max: iss, mss, quantum: Memory::LEAST, ..ToGuest::default() };
        Self {
            key,
            socket,
            phase,
            readable: false,
            writable: false,
            from_guest: FromGuest::default(),
            to_guest,
            last_active: now,
            timer: Timer::default(),
            queued: false,
            noted: None,
        }
    }

    /// What the guest's SYN says of itself.
    fn take_syn(&mut self, syn: &Incoming<'_>) {
        self.from_guest.next = syn.seq.wrapping_add(1);
        self.from_guest.edge = self.from_guest.next;
        // RFC 7323 2.2: scaling only if both sides ask for it.
        self.from_guest.shift = if syn.scale.is_some() { WINDOW_SHIFT } else { 0 };
        self.to_guest.shift = syn.scale.unwrap_or(0);
        self.to_guest.window = syn.window.into();
        self.to_guest.mss = self.to_guest.mss.min(syn.mss.unwrap_or(MIN_MSS).max(MIN_MSS));
    }

    /// Both ends.
    pub fn key(&self) -> &Key {
        &self.key
    }

    /// The host's socket.
    pub fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    /// When something last came.
    pub fn last_active(&self) -> Instant {
        self.last_active
    }

    /// Whether all has been said, and only the guest's last acknowledgement is missing.
    pub fn is_ending(&self) -> bool {
        self.from_guest.shut && self.to_guest.eof && self.to_guest.buffer.is_empty()
    }

    /// The sequence number of the guest's SYN, for an error message about it.
    pub fn guest_syn(&self) -> u32 {
        self.from_guest.next.wrapping_sub(1)
    }

    /// When to call [`Flow::time_out`].
    pub fn deadline(&self) -> Instant {
        let limit = if self.phase == Phase::Connecting { CONNECT_TIMEOUT } else { IDLE_TIMEOUT };
        let idle = self.last_active + limit;
        self.timer.at.map_or(idle, |at| at.min(idle))
    }

    /// Gives all memory back.
    pub fn release(&mut self, memory: &mut Memory) {
        self.from_guest.buffer.release(memory);
        self.to_guest.buffer.release(memory);
    }

    /// The host's socket has news. Each is told once, as it comes up.
    pub fn on_event(&mut self, events: EventFlags, now: Instant) -> Next {
        let ended = EventFlags::ERR | EventFlags::HUP | EventFlags::RDHUP;
        self.readable |= events.intersects(EventFlags::IN | ended);
        self.writable |= events.intersects(EventFlags::OUT | ended);
        self.last_active = now;
        if self.phase != Phase::Connecting || !self.writable {
            return Next::Again;
        }
        match sockopt::socket_error(&self.socket) {
            Ok(Ok(())) => {
                self.phase = Phase::SynReceived;
                self.to_guest.syn_due = true;
                Next::Again
            }
            Ok(Err(error)) | Err(error) => Next::Unreachable(error),
        }
    }

    fn open(&mut self, now: Instant) {
        self.phase = Phase::Open;
        self.last_active = now;
        self.timer.clear();
    }

    /// Does what there is to do.
    pub fn work(&mut self, memory: &mut Memory, link: &mut Link, now: Instant) -> Next {
        let more = match self.exchange_with_host(memory) {
            Ok(more) => more,
            Err(error) => return self.fail(error, link),
        };
        if self.talk_to_guest(memory, link, now) == Sent::Blocked {
            return Next::Blocked;
        }
        for buffer in [&mut self.from_guest.buffer, &mut self.to_guest.buffer] {
            if buffer.is_empty() {
                buffer.release(memory);
            }
        }
        match (more, self.from_guest.shut && self.to_guest.fin_acked) {
            (_, true) => Next::Gone,
            (true, _) => Next::Again,
            _ => Next::Wait,
        }
    }

    /// Writes to the socket and reads from it. Returns whether there may be more to read.
    fn exchange_with_host(&mut self, memory: &mut Memory) -> Result<bool, Errno> {
        if self.phase == Phase::Connecting {
            return Ok(false);
        }
        let from = &mut self.from_guest;
        while self.writable && !from.buffer.is_empty() {
            match send(&self.socket, &from.buffer.filled()) {
                Ok(count) => from.buffer.consume(count),
                Err(Errno::AGAIN) => self.writable = false,
                Err(error) => return Err(error),
            }
        }
        if from.fin && !from.shut && from.buffer.is_empty() {
            // A socket that is not connected any more will say so when it is read.
            let _ = shutdown(&self.socket, Shutdown::Write);
            from.shut = true;
        }
        let to = &mut self.to_guest;
        if self.phase != Phase::Open || !self.readable || to.eof {
            return Ok(false);
        }
        let room = to.buffer.make_room(to.quantum, memory);
        if room == 0 {
            return Ok(false);
        }
        let mut slices = to.buffer.free(room);
        match recvmsg(&self.socket, &mut slices, &mut RecvAncillaryBuffer::default(), RecvFlags::DONTWAIT) {
            Ok(message) if message.bytes == 0 => to.eof = true,
            Ok(message) => {
                to.buffer.added(message.bytes);
                let next = if message.bytes == to.quantum { to.quantum * 2 } else { message.bytes.next_power_of_two() };
                to.quantum = next.clamp(Memory::LEAST, QUANTUM);
                return Ok(true);
            }
            Err(Errno::AGAIN) => self.readable = false,
            Err(Errno::INTR) => return Ok(true),
            Err(error) => return Err(error),
        }
        Ok(false)
    }

    /// The deadline has come.
    pub fn time_out(&mut self, link: &mut Link, now: Instant) -> Next {
        let Some(at) = self.timer.at else {
            if now < self.deadline() {
                return Next::Wait;
            }
            return match self.phase {
                Phase::Connecting => Next::Unreachable(Errno::TIMEDOUT),
                _ => self.fail(Errno::TIMEDOUT, link),
            };
        };
        if now < at {
            return Next::Wait;
        }
        let limit = if self.phase == Phase::Open { MAX_RETRIES } else { MAX_SYN_RETRIES };
        if self.timer.retries == limit {
            return self.fail(Errno::TIMEDOUT, link);
        }
        self.timer.retries += 1;
        self.timer.at = Some(now + self.timer.wait());
        let to = &mut self.to_guest;
        if self.phase != Phase::Open {
            to.syn_due = true;
            to.syn_repeated = false;
        } else if to.max == to.una || to.window == 0 {
            // RFC 9293 3.8.6.1: a segment that is not acceptable is answered with the window as it is now.
            let probe = to.una.wrapping_sub(1);
            let _ = Reply::bare(TcpControl::None, probe, Some(self.from_guest.next), 0).send(&self.key, link);
        } else {
            to.next = to.una;
        }
        Next::Again
    }

    /// The host's side has failed, or waiting was in vain: both sides learn of it.
    fn fail(&mut self, error: Errno, link: &mut Link) -> Next {
        tracing::debug!("connection {} to {} ends: {error}", self.key.guest, self.key.remote);
        self.abort_host();
        if self.phase != Phase::SynSent {
            let reply = Reply::bare(TcpControl::Rst, self.to_guest.next, Some(self.from_guest.next), 0);
            reply.send_or_wait(&self.key, link);
        }
        Next::Gone
    }

    /// What is left of the socket ends with a reset instead of a FIN.
    fn abort_host(&self) {
        let _ = sockopt::set_socket_linger(&self.socket, Some(Duration::ZERO));
    }
}

fn send(socket: &OwnedFd, data: &[std::io::IoSlice<'_>]) -> Result<usize, Errno> {
    loop {
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        match sendmsg(socket, data, &mut SendAncillaryBuffer::default(), flags) {
            Err(Errno::INTR) => {}
            other => return other,
        }
    }
}
