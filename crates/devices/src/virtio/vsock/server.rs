//! The device's thread, between the queues, the connections and the host's sockets.

use std::io;

use rustix::event::{PollFd, PollFlags};

use super::{
    super::{Chain, Malformed, Told, Virtqueue, Wake, fill},
    connection::BUFFER,
    host::{EVENTS, End, Event, Host},
    packet::{Header, shut},
    table::{Entry, Incoming, Key, Table},
};

/// Packets of one direction before it is the other's turn.
const TURN: usize = 64;

/// The event that all connections are gone (virtio 1.3, 5.10.6.7).
pub const TRANSPORT_RESET: u32 = 0;

/// The queues that the driver has enabled, under the driver's names (5.10.2).
pub struct Queues<'q> {
    pub receive: Option<&'q Virtqueue>,
    pub transmit: Option<&'q Virtqueue>,
    pub event: Option<&'q Virtqueue>,
}

/// What the thread has.
pub struct Server<'q> {
    queues: Queues<'q>,
    host: Host,
    table: Table<End>,
    /// The driver is to be told that its connections are gone.
    owes_reset: bool,
    /// A packet under way: its header, then its data.
    packet: Vec<u8>,
}

impl<'q> Server<'q> {
    pub fn new(queues: Queues<'q>, host: Host, guest_cid: u64, owes_reset: bool) -> Self {
        let packet = vec![0; Header::LENGTH + BUFFER as usize];
        Self { queues, host, table: Table::new(guest_cid), owes_reset, packet }
    }

    /// The thread's work, from its start to its end. Between two waits no packet is under way.
    pub fn run(mut self, wake: &Wake) {
        loop {
            match wake.wait(&[PollFd::from_borrowed_fd(self.host.ready(), PollFlags::IN)]) {
                Told::Work => {
                    if self.work(wake) {
                        // There is more: but first it is looked whether to hold.
                        wake.ring();
                    }
                }
                Told::Hold => {}
                Told::End => return,
            }
        }
    }

    /// Does some of what there is to do; returns whether there may be more.
    fn work(&mut self, wake: &Wake) -> bool {
        self.announce_reset();
        let mut more = self.take_events();
        let more_packets = self.take_packets(wake);
        more |= self.give_packets(wake);
        // If it is congested the driver's room for packets is what is waited for.
        more | (more_packets && !self.table.is_congested())
    }

    /// Tells the driver that its connections are gone, once it has room for that.
    fn announce_reset(&mut self) {
        let Some(queue) = self.queues.event.filter(|_| self.owes_reset) else { return };
        let chain = match queue.pop() {
            Some(chain) => chain,
            None if queue.enable_notification() => match queue.pop() {
                Some(chain) => chain,
                None => return,
            },
            None => return,
        };
        queue.disable_notification();
        self.owes_reset = false;
        if chain.writable_length() < 4 {
            return queue.notifier().needs_reset(&Malformed::Request);
        }
        fill(&chain.writable, &TRANSPORT_RESET.to_le_bytes());
        queue.push(chain.head(), 4);
        queue.notify_driver();
    }

    /// Looks what has happened at the host's side.
    fn take_events(&mut self) -> bool {
        let events = self.host.events();
        for event in &events {
            match event.key() {
                Some(key) => {
                    if let Some(entry) = self.table.get_mut(key) {
                        event.note(&mut entry.host);
                        self.settle(key);
                    }
                }
                None => self.greeted(*event),
            }
        }
        self.host.accept() || events.len() == EVENTS
    }

    /// A program may want to connect to the guest.
    fn greeted(&mut self, event: Event) {
        if let Some((stream, port)) = self.host.greeted(event)
            && let Some(key) = self.table.free_key(port)
            && let Ok(end) = self.host.adopt(stream, key)
        {
            self.table.request(key, end);
        }
    }

    /// Takes packets of the guest's; returns whether there may be more.
    fn take_packets(&mut self, wake: &Wake) -> bool {
        let Some(queue) = self.queues.transmit else { return false };
        queue.disable_notification();
        let (mut more, mut used) = (true, false);
        for _ in 0..TURN {
            if wake.is_interrupted() || self.table.is_congested() {
                break;
            }
            let Some(mut chain) = queue.pop() else {
                if queue.enable_notification() {
                    queue.disable_notification();
                    continue;
                }
                more = false;
                break;
            };
            if let Err(malformed) = self.take_packet(&mut chain) {
                queue.notifier().needs_reset(&malformed);
            }
            queue.push(chain.head(), 0);
            used = true;
        }
        if used {
            queue.notify_driver();
        }
        more
    }

    fn take_packet(&mut self, chain: &mut Chain<'_>) -> Result<(), Malformed> {
        let mut header = [0; Header::LENGTH];
        chain.read(&mut header)?;
        let header = Header::from_bytes(&header);
        if header.len as usize > chain.readable_length() {
            return Err(Malformed::Request);
        }
        match self.table.incoming(&header) {
            Incoming::Done => {}
            Incoming::Connect(key) => match self.host.connect(key) {
                Ok(end) => self.table.accept(key, &header, end),
                Err(error) => {
                    tracing::debug!("the guest's connection to port {} is refused: {error}", key.host_port);
                    self.table.refuse(&header);
                }
            },
            Incoming::Established(key) => self.tell_established(key),
            Incoming::Data(key) => {
                // The connection has let it in, so it has room here.
                let data = &mut self.packet[..header.len as usize];
                chain.read(data)?;
                self.pass_on(key, header.len as usize);
            }
            Incoming::Changed(key) => self.settle(key),
        }
        Ok(())
    }

    /// Tells a program that its connection is there.
    fn tell_established(&mut self, key: Key) {
        let Some(entry) = self.table.get_mut(key) else { return };
        let line = format!("OK {}\n", key.host_port);
        // The first thing written to a socket has room there.
        if entry.host.write(line.as_bytes()).is_ok_and(|written| written == line.len()) {
            self.settle(key);
        } else {
            self.table.reset(key);
        }
    }

    /// Passes data on to the host, or keeps it: `length` bytes of [`Self::packet`].
    fn pass_on(&mut self, key: Key, length: usize) {
        let Some(Entry { connection, host, .. }) = self.table.get_mut(key) else { return };
        let data = &self.packet[..length];
        if connection.host_shut() & shut::RECEIVE != 0 {
            connection.forward(length);
        } else if !connection.kept().is_empty() {
            connection.keep(data);
        } else if let Ok(taken) = host.write(data) {
            connection.forward(taken);
            connection.keep(&data[taken..]);
        } else {
            connection.forward(length);
            connection.shut_host(shut::RECEIVE);
        }
        self.settle(key);
    }

    /// Does what a change makes possible: what is kept goes to the host, the ends of both directions are passed on, and
    /// the connection gets its turn to send to the guest.
    fn settle(&mut self, key: Key) {
        let Some(Entry { connection, host, .. }) = self.table.get_mut(key) else { return };
        while !connection.kept().is_empty() && host.writable {
            match host.write(connection.kept()) {
                Ok(count) => connection.drain(count),
                Err(_) => connection.shut_host(shut::RECEIVE),
            }
        }
        if connection.guest_has_ended() && connection.kept().is_empty() {
            host.end_writing();
        }
        if !connection.guest_receives() {
            host.end_reading();
        }
        if host.hung_up && (connection.host_shut() & shut::SEND != 0 || !connection.guest_receives()) {
            connection.shut_host(shut::BOTH);
        }
        let has_given_up = host.hung_up && !connection.is_established();
        if has_given_up || connection.is_over() {
            return self.table.reset(key);
        }
        let can_send = host.readable && connection.can_send();
        if can_send || connection.has_control() {
            self.table.schedule(key);
        }
    }

    /// Gives packets to the guest; returns whether there may be more.
    fn give_packets(&mut self, wake: &Wake) -> bool {
        let Some(queue) = self.queues.receive else { return false };
        queue.disable_notification();
        let (mut more, mut used) = (true, false);
        for _ in 0..TURN {
            if wake.is_interrupted() || !self.table.has_turns() {
                more = false;
                break;
            }
            let Some(chain) = queue.pop() else {
                if queue.enable_notification() {
                    queue.disable_notification();
                    continue;
                }
                more = false;
                break;
            };
            let room = chain.writable_length();
            if room <= Header::LENGTH {
                queue.notifier().needs_reset(&Malformed::Request);
                break;
            }
            let Some(length) = self.next_packet(room) else {
                queue.put_back(1);
                more = false;
                break;
            };
            fill(&chain.writable, &self.packet[..length]);
            queue.push(chain.head(), length as u32);
            used = true;
        }
        if used {
            queue.notify_driver();
        }
        more
    }

    /// Makes the next packet for the guest in [`Self::packet`], of at most `room` bytes; returns its length.
    fn next_packet(&mut self, room: usize) -> Option<usize> {
        let header = match self.table.next_reset() {
            Some(reset) => reset,
            None => loop {
                let key = self.table.next_turn()?;
                if let Some(packet) = self.packet_of(key, room) {
                    let packet = self.table.addressed(key, packet);
                    self.settle(key);
                    break packet;
                }
            },
        };
        self.packet[..Header::LENGTH].copy_from_slice(&header.to_bytes());
        Some(Header::LENGTH + header.len as usize)
    }

    /// What this connection has for the guest. Data is behind the header's place.
    fn packet_of(&mut self, key: Key, room: usize) -> Option<Header> {
        let Entry { connection, host, .. } = self.table.get_mut(key)?;
        if let Some(control) = connection.next_control() {
            return Some(control);
        }
        while host.readable && connection.can_send() {
            let most = room.min(self.packet.len()) - Header::LENGTH;
            let most = most.min(connection.credit() as usize);
            match host.read(&mut self.packet[Header::LENGTH..][..most]) {
                Ok(0) if host.hung_up => connection.shut_host(shut::BOTH),
                Ok(0) => connection.shut_host(shut::SEND),
                Ok(length) => return Some(connection.data(length as u32)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => connection.shut_host(shut::BOTH),
            }
        }
        connection.next_control()
    }
}
