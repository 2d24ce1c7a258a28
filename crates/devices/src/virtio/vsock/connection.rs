//! One connection: what the guest and the host may still send each other, and what the guest is to be told. There is
//! neither a queue nor a socket here.

use std::collections::VecDeque;

use super::packet::{Header, Op, STREAM, shut};

/// Bytes of the guest's that are kept for a host program that does not read (`buf_alloc`).
pub const BUFFER: u32 = 64 << 10;

/// What a packet of the guest's comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// The guest has accepted the host's connection.
    Established,
    /// Data follows.
    Data,
    /// Credit or shutdown have changed.
    Changed,
}

/// The packet is none that this connection can have: it is reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Violation;

/// A connection's state.
#[derive(Debug, Default)]
pub struct Connection {
    /// Both have agreed to it.
    established: bool,
    /// REQUEST or RESPONSE, if it has not been sent.
    opening: Option<Op>,
    /// What the guest has shut down ([`shut`]).
    guest_shut: u32,
    /// What the host has.
    host_shut: u32,
    /// What of that the guest has been told.
    told_shut: u32,
    /// The guest is to be told of its credit.
    owes_credit: bool,
    /// The guest is to be asked for credit.
    wants_credit: bool,
    /// It has been, since there was some.
    has_asked: bool,
    /// Bytes sent to the guest; this and all the following counters modulo 2³².
    sent: u32,
    /// The guest's last `buf_alloc` and `fwd_cnt`.
    guest_alloc: u32,
    guest_forwarded: u32,
    /// Bytes received from the guest.
    received: u32,
    /// Bytes of those that the host has taken.
    forwarded: u32,
    /// What of that the guest has been told.
    told_forwarded: u32,
    /// Bytes that the host has not taken: never more than [`BUFFER`].
    unsent: VecDeque<u8>,
    /// The guest has forgotten the connection; the host gets what is left.
    abandoned: bool,
}

impl Connection {
    /// A connection that the guest has requested with this packet, and the host has accepted.
    pub fn of_guest(request: &Header) -> Self {
        let mut connection = Self { established: true, opening: Some(Op::Response), ..Self::default() };
        connection.take_credit(request);
        connection
    }

    /// A connection that the host requests.
    pub fn of_host() -> Self {
        Self { opening: Some(Op::Request), ..Self::default() }
    }

    /// Takes a packet of the guest's, except for RST.
    pub fn take(&mut self, op: Op, packet: &Header) -> Result<Taken, Violation> {
        self.take_credit(packet);
        match op {
            // The request must have gone out.
            Op::Response if !self.established && self.opening.is_none() => {
                self.established = true;
                return Ok(Taken::Established);
            }
            Op::Rw if self.established && self.guest_shut & shut::SEND == 0 && packet.len <= self.free() => {
                self.received = self.received.wrapping_add(packet.len);
                return Ok(Taken::Data);
            }
            Op::Shutdown if self.established => self.guest_shut |= packet.flags & shut::BOTH,
            Op::CreditUpdate if self.established => {}
            Op::CreditRequest if self.established => self.owes_credit = true,
            _ => return Err(Violation),
        }
        Ok(Taken::Changed)
    }

    fn take_credit(&mut self, packet: &Header) {
        (self.guest_alloc, self.guest_forwarded) = (packet.buf_alloc, packet.fwd_cnt);
        self.has_asked &= self.credit() == 0;
    }

    /// Bytes that the guest may send.
    fn free(&self) -> u32 {
        BUFFER - self.received.wrapping_sub(self.forwarded).min(BUFFER)
    }

    /// Bytes that the guest has room for, as far as it says. (A guest that counts wrong has no room.)
    pub fn credit(&self) -> u32 {
        self.guest_alloc.saturating_sub(self.sent.wrapping_sub(self.guest_forwarded))
    }

    /// Whether both have agreed to it.
    pub fn is_established(&self) -> bool {
        self.established
    }

    /// Keeps data that [`Connection::take`] has let in, for the host to take later.
    pub fn keep(&mut self, data: &[u8]) {
        self.unsent.extend(data);
    }

    /// What is kept for the host: its first part, empty if there is nothing.
    pub fn kept(&self) -> &[u8] {
        self.unsent.as_slices().0
    }

    /// The host has taken `count` bytes of what was kept.
    pub fn drain(&mut self, count: usize) {
        self.unsent.drain(..count);
        if self.unsent.is_empty() {
            // Most connections never keep anything.
            self.unsent = VecDeque::new();
        }
        self.forward(count);
    }

    /// The host has taken `count` bytes, at most [`BUFFER`].
    pub fn forward(&mut self, count: usize) {
        self.forwarded = self.forwarded.wrapping_add(count as u32);
        // As long as it has half of the buffer the guest need not know.
        self.owes_credit |= self.received.wrapping_sub(self.told_forwarded) > BUFFER / 2;
    }

    /// Whether the guest takes data: it has not shut that down.
    pub fn guest_receives(&self) -> bool {
        self.guest_shut & shut::RECEIVE == 0
    }

    /// Whether the host gets nothing after what is kept.
    pub fn guest_has_ended(&self) -> bool {
        self.guest_shut & shut::SEND != 0 || self.abandoned
    }

    /// The host does not take, or not give, any more data.
    pub fn shut_host(&mut self, what: u32) {
        self.host_shut |= what;
        if self.host_shut & shut::RECEIVE != 0 {
            self.drain(self.unsent.len());
        }
    }

    /// What the host has shut down.
    pub fn host_shut(&self) -> u32 {
        self.host_shut
    }

    /// The guest has reset the connection. Returns whether the host still gets something: what a guest sent before it
    /// closed.
    pub fn abandon(&mut self) -> bool {
        self.abandoned = self.guest_shut & shut::SEND != 0 && !self.unsent.is_empty();
        self.abandoned
    }

    /// Whether the guest has forgotten the connection.
    pub fn is_abandoned(&self) -> bool {
        self.abandoned
    }

    /// Whether nothing more can happen (5.10.6.6.1): the guest has closed, and the host has all that it sent.
    pub fn is_over(&self) -> bool {
        (self.guest_shut == shut::BOTH || self.abandoned) && self.unsent.is_empty()
    }

    /// Whether data of the host's can go to the guest now. If only credit is lacking the guest will be asked for it.
    pub fn can_send(&mut self) -> bool {
        let is_open = self.established
            && !self.abandoned
            && self.opening.is_none()
            && self.guest_receives()
            && self.host_shut & shut::SEND == 0;
        if is_open && self.credit() == 0 && !self.has_asked {
            (self.wants_credit, self.has_asked) = (true, true);
        }
        is_open && self.credit() > 0
    }

    /// Whether [`Connection::next_control`] has something.
    pub fn has_control(&self) -> bool {
        !self.abandoned
            && (self.opening.is_some()
                || self.established && (self.host_shut != self.told_shut || self.wants_credit || self.owes_credit))
    }

    /// The next packet without data that the guest is to get. Addresses are missing.
    pub fn next_control(&mut self) -> Option<Header> {
        if !self.has_control() {
            return None;
        }
        let (op, flags) = if let Some(op) = self.opening.take() {
            (op, 0)
        } else if self.host_shut != self.told_shut {
            self.told_shut = self.host_shut;
            (Op::Shutdown, self.host_shut)
        } else if std::mem::take(&mut self.wants_credit) {
            (Op::CreditRequest, 0)
        } else {
            (Op::CreditUpdate, 0)
        };
        Some(Header { flags, ..self.header(op) })
    }

    /// The packet of `length` bytes of data, which is at most [`Connection::credit`]. Addresses are missing.
    pub fn data(&mut self, length: u32) -> Header {
        self.sent = self.sent.wrapping_add(length);
        Header { len: length, ..self.header(Op::Rw) }
    }

    fn header(&mut self, op: Op) -> Header {
        // Every packet tells the guest of its credit.
        (self.told_forwarded, self.owes_credit) = (self.forwarded, false);
        Header { kind: STREAM, op: op as u16, buf_alloc: BUFFER, fwd_cnt: self.forwarded, ..Header::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(op: Op, buf_alloc: u32, fwd_cnt: u32) -> Header {
        Header { op: op as u16, kind: STREAM, buf_alloc, fwd_cnt, ..Header::default() }
    }

    fn data(len: u32) -> Header {
        Header { len, ..packet(Op::Rw, 1000, 0) }
    }

    /// A connection that the guest has opened with 1000 bytes of room, and the RESPONSE sent.
    fn established() -> Connection {
        let mut connection = Connection::of_guest(&packet(Op::Request, 1000, 0));
        assert_eq!(connection.next_control().unwrap().op, Op::Response as u16);
        assert_eq!(connection.next_control(), None);
        connection
    }

    #[test]
    fn the_host_connects() {
        let mut connection = Connection::of_host();
        assert_eq!(connection.take(Op::Response, &packet(Op::Response, 1000, 0)), Err(Violation), "not yet requested");
        assert_eq!(connection.next_control().unwrap().op, Op::Request as u16);
        assert!(!connection.can_send());
        for too_early in [Op::Rw, Op::Shutdown, Op::CreditRequest, Op::Request] {
            assert_eq!(connection.take(too_early, &packet(too_early, 0, 0)), Err(Violation));
        }
        assert_eq!(connection.take(Op::Response, &packet(Op::Response, 1000, 0)), Ok(Taken::Established));
        assert!(connection.can_send());
        assert_eq!(connection.take(Op::Response, &packet(Op::Response, 1000, 0)), Err(Violation), "twice");
    }

    #[test]
    fn the_guests_credit_ends_and_comes_back() {
        let mut connection = established();
        assert_eq!(connection.credit(), 1000);
        assert_eq!(connection.data(600).len, 600);
        connection.data(400);
        assert_eq!(connection.credit(), 0);
        assert!(!connection.can_send() && !connection.can_send());
        assert_eq!(connection.next_control().unwrap().op, Op::CreditRequest as u16);
        assert!(!connection.can_send() && !connection.has_control(), "it asks once");
        connection.take(Op::CreditUpdate, &packet(Op::CreditUpdate, 1000, 600)).unwrap();
        assert_eq!(connection.credit(), 600);
        // A smaller buffer than what is under way, and counters that lie.
        for (alloc, forwarded) in [(100, 600), (1000, 2000), (0, 1000), (u32::MAX, 1001)] {
            connection.take(Op::CreditUpdate, &packet(Op::CreditUpdate, alloc, forwarded)).unwrap();
            assert_eq!(connection.credit(), 0, "{alloc} {forwarded}");
        }
    }

    #[test]
    fn counters_wrap() {
        let mut connection = established();
        let mut total = 0u32;
        for _ in 0..5 {
            connection.take(Op::CreditUpdate, &packet(Op::CreditUpdate, 1 << 30, total)).unwrap();
            assert_eq!(connection.credit(), 1 << 30);
            connection.data(1 << 30);
            total = total.wrapping_add(1 << 30);
        }
    }

    #[test]
    fn a_guest_has_its_buffer_and_no_more() {
        let mut connection = established();
        assert_eq!(connection.take(Op::Rw, &data(BUFFER - 10)), Ok(Taken::Data));
        connection.keep(&vec![7; BUFFER as usize - 10]);
        assert_eq!(connection.take(Op::Rw, &data(11)), Err(Violation));
        assert_eq!(connection.take(Op::Rw, &data(10)), Ok(Taken::Data));
        connection.keep(&[7; 10]);
        assert!(!connection.has_control());
        connection.drain(1);
        let update = connection.next_control().unwrap();
        assert_eq!((update.op, update.buf_alloc, update.fwd_cnt), (Op::CreditUpdate as u16, BUFFER, 1));
        assert_eq!(connection.take(Op::Rw, &data(2)), Err(Violation));
        assert_eq!(connection.take(Op::Rw, &data(1)), Ok(Taken::Data));
    }

    #[test]
    fn the_guest_is_told_of_its_credit_when_half_is_gone() {
        let mut connection = established();
        connection.take(Op::Rw, &data(BUFFER / 2)).unwrap();
        connection.forward(BUFFER as usize / 2);
        assert!(!connection.has_control());
        connection.take(Op::Rw, &data(1)).unwrap();
        connection.forward(1);
        assert_eq!(connection.next_control().unwrap().fwd_cnt, BUFFER / 2 + 1);
        assert!(!connection.has_control());
        connection.take(Op::CreditRequest, &packet(Op::CreditRequest, 1000, 0)).unwrap();
        assert_eq!(connection.next_control().unwrap().op, Op::CreditUpdate as u16);
    }

    #[test]
    fn each_side_shuts_down_by_itself() {
        let mut connection = established();
        let shutdown = |flags| Header { flags, ..packet(Op::Shutdown, 1000, 0) };
        connection.take(Op::Rw, &data(5)).unwrap();
        connection.keep(b"12345");
        connection.take(Op::Shutdown, &shutdown(shut::SEND)).unwrap();
        assert_eq!(connection.take(Op::Rw, &data(1)), Err(Violation), "it said that it would not send");
        assert!(connection.guest_has_ended() && connection.can_send());
        connection.shut_host(shut::SEND);
        assert!(!connection.can_send());
        assert_eq!(connection.next_control().unwrap().flags, shut::SEND);
        connection.take(Op::Shutdown, &shutdown(shut::RECEIVE)).unwrap();
        assert!(!connection.is_over(), "the host has not taken all");
        connection.drain(5);
        assert!(connection.is_over());
    }

    #[test]
    fn what_a_guest_sent_before_it_closed_is_kept() {
        let mut connection = established();
        connection.take(Op::Rw, &data(5)).unwrap();
        connection.keep(b"12345");
        assert!(!connection.abandon(), "it did not close, it broke off");
        connection.take(Op::Shutdown, &Header { flags: shut::BOTH, ..packet(Op::Shutdown, 1000, 0) }).unwrap();
        assert!(connection.abandon() && !connection.has_control() && !connection.is_over());
        connection.drain(5);
        assert!(connection.is_over());
    }
}
