//! All connections, whose turn it is to send to the guest, and what the guest's packets come to. `T` is a connection's
//! end at the host; nothing here knows what that is.

use std::collections::{HashMap, VecDeque};

use super::{
    connection::{Connection, Taken},
    packet::{ANY_PORT, HOST_CID, Header, Op, STREAM},
};

/// The most connections at a time. Each keeps up to [`super::connection::BUFFER`] bytes.
pub const MOST_CONNECTIONS: usize = 1024;
/// Answers to packets of no connection that wait for the guest; with more, no packets are taken (5.10.6.1).
const MOST_RESETS: usize = 256;
/// Ports of the host's connections: from here, as other hypervisors have them.
const FIRST_PORT: u32 = 1 << 30;
const LAST_PORT: u32 = (1 << 31) - 1;

/// What a connection is known by: there are only two addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    pub host_port: u32,
    pub guest_port: u32,
}

impl Key {
    /// As one number; never one of those from [`Key::TOKENS`] up.
    pub fn token(self) -> u64 {
        u64::from(self.guest_port) << 32 | u64::from(self.host_port)
    }

    /// The least number that is no key's: no connection has [`ANY_PORT`].
    pub const TOKENS: u64 = (ANY_PORT as u64) << 32;

    /// The reverse of [`Key::token`].
    pub fn from_token(token: u64) -> Self {
        Self { host_port: token as u32, guest_port: (token >> 32) as u32 }
    }
}

/// A connection with its end at the host.
pub struct Entry<T> {
    pub connection: Connection,
    pub host: T,
    /// It is in the queue of those to send.
    is_queued: bool,
}

/// What is to be done about a packet of the guest's.
#[derive(Debug, PartialEq, Eq)]
pub enum Incoming {
    /// Nothing.
    Done,
    /// To connect to the host's program behind this port, then [`Table::accept`] or [`Table::refuse`].
    Connect(Key),
    /// To tell the host that its connection is there.
    Established(Key),
    /// To pass its data on.
    Data(Key),
    /// To look what can be sent or shut down.
    Changed(Key),
}

/// The connections of one device.
pub struct Table<T> {
    guest_cid: u64,
    entries: HashMap<Key, Entry<T>>,
    turns: VecDeque<Key>,
    resets: VecDeque<Header>,
    next_port: u32,
}

impl<T> Table<T> {
    /// No connections yet, of the guest with this context ID.
    pub fn new(guest_cid: u64) -> Self {
        Self {
            guest_cid,
            entries: HashMap::new(),
            turns: VecDeque::new(),
            resets: VecDeque::new(),
            next_port: FIRST_PORT,
        }
    }

    /// How many connections there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn get_mut(&mut self, key: Key) -> Option<&mut Entry<T>> {
        self.entries.get_mut(&key)
    }

    /// Whether no packet is to be taken from the guest before it has taken some.
    pub fn is_congested(&self) -> bool {
        self.resets.len() >= MOST_RESETS
    }

    /// Takes a packet of the guest's.
    pub fn incoming(&mut self, packet: &Header) -> Incoming {
        // Nobody could be answered who is not the guest (5.10.6.4.2).
        if packet.src_cid != self.guest_cid {
            return Incoming::Done;
        }
        let key = Key { host_port: packet.dst_port, guest_port: packet.src_port };
        let op = Op::from_number(packet.op);
        let is_for_us = packet.dst_cid == HOST_CID && packet.kind == STREAM && key.guest_port != ANY_PORT;
        if op == Some(Op::Rst) {
            if is_for_us {
                self.forget(key);
            }
            return Incoming::Done;
        }
        if !is_for_us {
            return self.refuse(packet);
        }
        let is_full = self.len() >= MOST_CONNECTIONS;
        match (self.entries.get_mut(&key), op) {
            (None, Some(Op::Request)) if !is_full => Incoming::Connect(key),
            (None, _) => self.refuse(packet),
            // The guest has forgotten it.
            (Some(entry), _) if entry.connection.is_abandoned() => self.refuse(packet),
            (Some(entry), op) => match op.map(|op| entry.connection.take(op, packet)) {
                Some(Ok(Taken::Established)) => Incoming::Established(key),
                Some(Ok(Taken::Data)) => Incoming::Data(key),
                Some(Ok(Taken::Changed)) => Incoming::Changed(key),
                Some(Err(_)) | None => {
                    self.reset(key);
                    Incoming::Done
                }
            },
        }
    }

    /// There is no such connection.
    pub fn refuse(&mut self, packet: &Header) -> Incoming {
        self.resets.push_back(packet.reset());
        Incoming::Done
    }

    /// The guest's connection, requested by this packet, leads to `host`.
    pub fn accept(&mut self, key: Key, request: &Header, host: T) {
        self.insert(key, Connection::of_guest(request), host);
    }

    /// A key for a connection of the host's to a port of the guest's; `None` if there are too many, or no such port.
    pub fn free_key(&mut self, guest_port: u32) -> Option<Key> {
        if self.len() >= MOST_CONNECTIONS || guest_port == ANY_PORT {
            return None;
        }
        // It ends: there are more ports than connections.
        loop {
            let key = Key { host_port: self.next_port, guest_port };
            self.next_port = if self.next_port == LAST_PORT { FIRST_PORT } else { self.next_port + 1 };
            if !self.entries.contains_key(&key) {
                return Some(key);
            }
        }
    }

    /// Requests a connection from the guest, by a key of [`Table::free_key`].
    pub fn request(&mut self, key: Key, host: T) {
        self.insert(key, Connection::of_host(), host);
    }

    fn insert(&mut self, key: Key, connection: Connection, host: T) {
        self.entries.insert(key, Entry { connection, host, is_queued: false });
        self.schedule(key);
    }

    /// The guest has reset the connection.
    fn forget(&mut self, key: Key) {
        if self.entries.get_mut(&key).is_some_and(|entry| !entry.connection.abandon()) {
            self.remove(key);
        }
    }

    /// Ends the connection and tells the guest.
    pub fn reset(&mut self, key: Key) {
        if let Some(entry) = self.remove(key)
            && !entry.connection.is_abandoned()
        {
            let reset = Header { kind: STREAM, op: Op::Rst as u16, ..Header::default() };
            self.resets.push_back(self.addressed(key, reset));
        }
    }

    fn remove(&mut self, key: Key) -> Option<Entry<T>> {
        let entry = self.entries.remove(&key)?;
        if entry.is_queued {
            self.turns.retain(|queued| *queued != key);
        }
        Some(entry)
    }

    /// The connection has, or may have, something for the guest.
    pub fn schedule(&mut self, key: Key) {
        if let Some(entry) = self.entries.get_mut(&key).filter(|entry| !entry.is_queued) {
            entry.is_queued = true;
            self.turns.push_back(key);
        }
    }

    /// Whether there may be something for the guest.
    pub fn has_turns(&self) -> bool {
        !self.resets.is_empty() || !self.turns.is_empty()
    }

    /// An RST for the guest.
    pub fn next_reset(&mut self) -> Option<Header> {
        self.resets.pop_front()
    }

    /// Whose turn it is.
    pub fn next_turn(&mut self) -> Option<Key> {
        let key = self.turns.pop_front()?;
        if let Some(entry) = self.entries.get_mut(&key) {
            entry.is_queued = false;
        }
        Some(key)
    }

    /// A packet of this connection's, with its addresses.
    pub fn addressed(&self, key: Key, packet: Header) -> Header {
        let Key { host_port, guest_port } = key;
        Header { src_cid: HOST_CID, dst_cid: self.guest_cid, src_port: host_port, dst_port: guest_port, ..packet }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: Key = Key { host_port: 80, guest_port: 1000 };

    fn packet(op: Op) -> Header {
        Header {
            src_cid: 3,
            dst_cid: HOST_CID,
            src_port: KEY.guest_port,
            dst_port: KEY.host_port,
            kind: STREAM,
            op: op as u16,
            buf_alloc: 1000,
            ..Header::default()
        }
    }

    fn connected() -> Table<()> {
        let mut table = Table::new(3);
        let request = packet(Op::Request);
        assert_eq!(table.incoming(&request), Incoming::Connect(KEY));
        table.accept(KEY, &request, ());
        assert_eq!(table.next_turn(), Some(KEY));
        let response = table.get_mut(KEY).unwrap().connection.next_control().unwrap();
        let response = table.addressed(KEY, response);
        assert_eq!((response.src_port, response.dst_port), (80, 1000));
        table
    }

    #[test]
    fn packets_of_no_connection_are_reset_but_resets_are_not() {
        let mut table = Table::<()>::new(3);
        for op in [Op::Rw, Op::Response, Op::Shutdown, Op::CreditUpdate, Op::CreditRequest] {
            assert_eq!(table.incoming(&packet(op)), Incoming::Done);
            let reset = table.next_reset().unwrap();
            assert_eq!((reset.op, reset.src_port, reset.dst_port), (Op::Rst as u16, 80, 1000));
            assert_eq!((reset.src_cid, reset.dst_cid), (2, 3));
        }
        table.incoming(&packet(Op::Rst));
        table.incoming(&Header { kind: 2, ..packet(Op::Rst) });
        assert!(!table.has_turns());
    }

    #[test]
    fn wrong_addresses_and_types() {
        let mut table = connected();
        let request = Header { src_port: 7, ..packet(Op::Request) };
        table.incoming(&Header { src_cid: 4, ..request });
        assert!(!table.has_turns(), "who is not the guest gets no answer");
        let cases = [
            Header { dst_cid: 99, ..request },
            Header { kind: 2, ..request },
            Header { src_port: ANY_PORT, ..request },
            Header { op: 99, ..request },
            packet(Op::Request),
        ];
        for case in cases {
            assert_eq!(table.incoming(&case), Incoming::Done);
            let reset = table.next_reset().unwrap();
            assert_eq!((reset.src_cid, reset.dst_port, reset.kind), (case.dst_cid, case.src_port, case.kind));
        }
        assert_eq!(table.len(), 0, "to request it twice breaks a connection");
    }

    #[test]
    fn connections_are_bounded_and_so_are_their_turns() {
        let mut table = Table::new(3);
        for port in 0..MOST_CONNECTIONS as u32 {
            let key = table.free_key(port % 3).unwrap();
            table.request(key, ());
        }
        assert_eq!(table.free_key(5), None);
        assert_eq!(table.incoming(&packet(Op::Request)), Incoming::Done, "refused");
        assert_eq!(table.next_reset().unwrap().op, Op::Rst as u16);
        // To connect and to give up again leaves nothing behind.
        let mut table = Table::new(3);
        for _ in 0..10 {
            table.incoming(&packet(Op::Request));
            table.accept(KEY, &packet(Op::Request), ());
            table.incoming(&packet(Op::Rst));
        }
        assert_eq!((table.len(), table.turns.len(), table.resets.len()), (0, 0, 0));
        for _ in 0..MOST_RESETS {
            assert!(!table.is_congested());
            table.incoming(&packet(Op::Rw));
        }
        assert!(table.is_congested());
    }

    #[test]
    fn ports_of_the_hosts_go_round() {
        let mut table = Table::new(3);
        let first = table.free_key(5).unwrap();
        assert_eq!(first, Key { host_port: FIRST_PORT, guest_port: 5 });
        table.request(first, ());
        table.next_port = LAST_PORT;
        assert_eq!(table.free_key(5).unwrap().host_port, LAST_PORT);
        assert_eq!(table.free_key(5).unwrap().host_port, FIRST_PORT + 1);
        assert_eq!(table.free_key(ANY_PORT), None);
        assert_eq!(Key::from_token(first.token()), first);
        assert!(first.token() < Key::TOKENS);
    }

    #[test]
    fn a_closed_connection_stays_until_the_host_has_all() {
        let mut table = connected();
        assert_eq!(table.incoming(&Header { len: 3, ..packet(Op::Rw) }), Incoming::Data(KEY));
        table.get_mut(KEY).unwrap().connection.keep(b"abc");
        assert_eq!(table.incoming(&Header { flags: 3, ..packet(Op::Shutdown) }), Incoming::Changed(KEY));
        table.incoming(&packet(Op::Rst));
        assert_eq!(table.len(), 1);
        assert_eq!(table.incoming(&packet(Op::Request)), Incoming::Done, "its ports are in use");
        assert!(table.next_reset().is_some());
        table.get_mut(KEY).unwrap().connection.drain(3);
        assert!(table.get_mut(KEY).unwrap().connection.is_over());
        table.reset(KEY);
        assert!(!table.has_turns(), "the guest knows");
    }
}
