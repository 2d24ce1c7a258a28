use std::{
    fs,
    io::{ErrorKind, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use proptest::{
    collection,
    prelude::{ProptestConfig, any, proptest},
};
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

use super::{
    connection::BUFFER,
    packet::{HOST_CID, Header, Op, STREAM, shut},
    server::TRANSPORT_RESET,
    table::MOST_CONNECTIONS,
    *,
};
use crate::{
    pci::PciFunction,
    virtio::testing::{Buffer, Driver, EVENT_IDX, INDIRECT, SLOT, abuse, is_held_in_a_flood, page},
};

const RX: usize = 0;
const TX: usize = 1;
const EV: usize = 2;
const CID: u64 = 77;
/// Bytes of data in each of the driver's buffers, and how many there are.
const CHUNK: u32 = 4096;
const BUFFERS: usize = 12;
/// What the driver says that it has room for.
const ROOM: u32 = 32 << 10;
/// Far more than anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);

fn device(path: &Path) -> Box<Vsock> {
    let socket = Arc::new(HostSocket::bind(path).unwrap());
    Box::new(Vsock::new("vsock0", VsockConfig { guest_cid: CID as u32, socket }))
}

/// A guest whose driver has buffers in the receive queue, and the directory of the host's sockets.
struct Guest {
    driver: Driver,
    dir: TempDir,
    /// For what it sends.
    out: u64,
    /// Received by the chain's number.
    buffers: [Option<Buffer>; 16],
}

/// The guest's end of a connection, which does not look at its credit.
#[derive(Clone, Copy)]
struct Ports {
    host: u32,
    guest: u32,
}

impl Guest {
    fn new(features: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut driver = Driver::new(device(&dir.path().join("v")));
        driver.initialize(features);
        let out = driver.allocate(128 << 10, 8);
        let mut guest = Self { driver, dir, out, buffers: [None; 16] };
        for _ in 0..BUFFERS {
            let buffer = guest.driver.writable(Header::LENGTH as u32 + CHUNK);
            guest.offer(buffer);
        }
        guest.driver.notify(RX);
        guest
    }

    fn offer(&mut self, buffer: Buffer) {
        let head = self.driver.offer(RX, &[buffer]);
        self.buffers[usize::from(head)] = Some(buffer);
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("v")
    }

    /// A host program that listens for connections to a port.
    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.dir.path().join(format!("v_{port}"))).unwrap()
    }

    /// A host program that has said where it wants to.
    fn dial(&self, port: u32) -> UnixStream {
        let mut stream = UnixStream::connect(self.path()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        writeln!(stream, "CONNECT {port}").unwrap();
        stream
    }

    fn send_raw(&mut self, header: Header, data: &[u8]) {
        let bytes = [&header.to_bytes(), data].concat();
        self.driver.memory.write_slice(&bytes, GuestAddress(self.out)).unwrap();
        let buffer = Buffer { address: self.out, length: bytes.len() as u32, writable: false };
        assert_eq!(self.driver.request(TX, &[buffer]).written, 0);
    }

    fn send(&mut self, ports: Ports, op: Op, flags: u32, fwd_cnt: u32, data: &[u8]) {
        let header = Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: ports.guest,
            dst_port: ports.host,
            len: data.len() as u32,
            kind: STREAM,
            op: op as u16,
            flags,
            buf_alloc: ROOM,
            fwd_cnt,
        };
        self.send_raw(header, data);
    }

    /// The next packet, if there is one. Its buffer is offered again.
    fn poll(&mut self) -> Option<(Header, Vec<u8>)> {
        let used = self.driver.take_used(RX)?;
        let buffer = self.buffers[usize::from(used.head)].take().unwrap();
        let bytes = self.driver.content(buffer);
        let header = Header::from_bytes(bytes[..Header::LENGTH].try_into().unwrap());
        assert_eq!(used.written as usize, Header::LENGTH + header.len as usize);
        assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, CID));
        let data = bytes[Header::LENGTH..used.written as usize].to_vec();
        self.offer(buffer);
        self.driver.notify(RX);
        Some((header, data))
    }

    fn next(&mut self) -> (Header, Vec<u8>) {
        let start = Instant::now();
        loop {
            if let Some(packet) = self.poll() {
                return packet;
            }
            assert!(start.elapsed() < PATIENCE, "the guest gets nothing");
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    /// The next packet, which is this one; credit updates are left out.
    fn expect(&mut self, op: Op) -> Header {
        loop {
            let (header, _) = self.next();
            if header.op != Op::CreditUpdate as u16 || op == Op::CreditUpdate {
                assert_eq!(header.op, op as u16, "{header:?}");
                return header;
            }
        }
    }

    /// A connection of the guest's to a program that listens at `port`.
    fn connect(&mut self, listener: &UnixListener, ports: Ports) -> UnixStream {
        self.send(ports, Op::Request, 0, 0, &[]);
        let response = self.expect(Op::Response);
        assert_eq!((response.src_port, response.dst_port), (ports.host, ports.guest));
        assert_eq!((response.buf_alloc, response.fwd_cnt, response.kind), (BUFFER, 0, STREAM));
        let (stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// A connection of the host's, accepted by the guest.
    fn accept(&mut self, port: u32) -> (UnixStream, Ports) {
        let mut stream = self.dial(port);
        let request = self.expect(Op::Request);
        assert_eq!(request.dst_port, port);
        let ports = Ports { host: request.src_port, guest: port };
        self.send(ports, Op::Response, 0, 0, &[]);
        assert_eq!(line(&mut stream), format!("OK {}", ports.host));
        (stream, ports)
    }
}

fn line(stream: &mut UnixStream) -> String {
    let mut line = Vec::new();
    let mut byte = [0];
    loop {
        stream.read_exact(&mut byte).unwrap();
        if byte == *b"\n" {
            return String::from_utf8(line).unwrap();
        }
        line.push(byte[0]);
    }
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i * 7 + i / 256) as u8).collect()
}

const PORTS: Ports = Ports { host: 1234, guest: 5678 };

#[test]
fn configuration() {
    let guest = Guest::new(0);
    assert_eq!(guest.driver.read::<8>(page::DEVICE), CID);
    assert_eq!(guest.driver.read::<4>(page::DEVICE + 8), 0);
}

#[test]
fn the_guest_connects() {
    for features in [0, EVENT_IDX | INDIRECT | feature(F_STREAM)] {
        let mut guest = Guest::new(features);
        let listener = guest.listen(PORTS.host);
        let mut stream = guest.connect(&listener, PORTS);
        guest.send(PORTS, Op::Rw, 0, 0, b"from the guest");
        let mut data = [0; 14];
        stream.read_exact(&mut data).unwrap();
        assert_eq!(&data, b"from the guest");
        stream.write_all(b"from the host").unwrap();
        let (header, data) = guest.next();
        assert_eq!((header.op, &data[..]), (Op::Rw as u16, &b"from the host"[..]));
        assert_eq!(header.fwd_cnt, 14);
    }
}

#[test]
fn the_host_connects() {
    let mut guest = Guest::new(0);
    let (mut stream, ports) = guest.accept(22);
    stream.write_all(b"hello").unwrap();
    assert_eq!(guest.next().1, b"hello");
    guest.send(ports, Op::Rw, 0, 5, b"world");
    let mut data = [0; 5];
    stream.read_exact(&mut data).unwrap();
    assert_eq!(&data, b"world");
    // A second one, to the same port, is another one.
    let (_, second) = guest.accept(22);
    assert_ne!(second.host, ports.host);
}

#[test]
fn nobody_listens() {
    let mut guest = Guest::new(0);
    guest.send(PORTS, Op::Request, 0, 0, &[]);
    let reset = guest.expect(Op::Rst);
    assert_eq!((reset.src_port, reset.dst_port), (PORTS.host, PORTS.guest));
    // A listener that has gone and left its file.
    drop(guest.listen(PORTS.host));
    guest.send(PORTS, Op::Request, 0, 0, &[]);
    guest.expect(Op::Rst);
    // And in the guest.
    let mut stream = guest.dial(22);
    let request = guest.expect(Op::Request);
    guest.send(Ports { host: request.src_port, guest: 22 }, Op::Rst, 0, 0, &[]);
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
}

#[test]
fn a_program_that_does_not_know_the_protocol_is_left() {
    let guest = Guest::new(0);
    for wrong in ["GET / HTTP/1.1\n", "CONNECT\n", "CONNECT 4294967295\n", "CONNECT 5 and much more than there is\n"] {
        let mut stream = UnixStream::connect(guest.path()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(wrong.as_bytes()).unwrap();
        let end = stream.read(&mut [0]);
        // What it has not read makes it a reset.
        assert!(matches!(&end, Ok(0)) || end.is_err_and(|e| e.kind() == ErrorKind::ConnectionReset), "{wrong}");
    }
}

#[test]
fn programs_that_say_nothing_do_not_keep_others_out() {
    let mut guest = Guest::new(0);
    let silent: Vec<_> = (0..400).map(|_| UnixStream::connect(guest.path()).unwrap()).collect();
    guest.accept(22);
    drop(silent);
}

#[test]
fn many_programs_at_once_are_all_heard() {
    let mut guest = Guest::new(0);
    guest.driver.function.hold();
    let programs: Vec<_> = (0..100).map(|port| guest.dial(port)).collect();
    guest.driver.function.open();
    let mut ports: Vec<_> = programs.iter().map(|_| guest.expect(Op::Request).dst_port).collect();
    ports.sort_unstable();
    assert!(ports.into_iter().eq(0..100));
}

#[test]
fn the_host_ends_first() {
    let mut guest = Guest::new(0);
    let listener = guest.listen(PORTS.host);
    let mut stream = guest.connect(&listener, PORTS);
    stream.write_all(b"last").unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(guest.next().1, b"last");
    assert_eq!(guest.expect(Op::Shutdown).flags, shut::SEND);
    // The other direction goes on.
    guest.send(PORTS, Op::Rw, 0, 4, b"answer");
    let mut data = [0; 6];
    stream.read_exact(&mut data).unwrap();
    assert_eq!(&data, b"answer");
    drop(stream);
    assert_eq!(guest.expect(Op::Shutdown).flags, shut::BOTH);
    guest.send(PORTS, Op::Rst, 0, 4, &[]);
    // Now there is none any more.
    guest.send(PORTS, Op::Rw, 0, 4, b"x");
    guest.expect(Op::Rst);
}

#[test]
fn the_guest_ends_first() {
    let mut guest = Guest::new(0);
    let listener = guest.listen(PORTS.host);
    let mut stream = guest.connect(&listener, PORTS);
    guest.send(PORTS, Op::Rw, 0, 0, b"last");
    guest.send(PORTS, Op::Shutdown, shut::SEND, 0, &[]);
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"last");
    stream.write_all(b"answer").unwrap();
    assert_eq!(guest.next().1, b"answer");
    guest.send(PORTS, Op::Shutdown, shut::RECEIVE, 6, &[]);
    // A clean end (5.10.6.6.1).
    guest.expect(Op::Rst);
    let end = stream.write_all(b"more").and_then(|()| stream.read(&mut [0]).map(drop));
    assert_eq!(end.unwrap_err().kind(), ErrorKind::BrokenPipe);
}

#[test]
fn a_guest_that_sends_after_it_said_it_would_not_is_reset() {
    let mut guest = Guest::new(0);
    let listener = guest.listen(PORTS.host);
    let _stream = guest.connect(&listener, PORTS);
    guest.send(PORTS, Op::Shutdown, shut::SEND, 0, &[]);
    guest.send(PORTS, Op::Rw, 0, 0, b"x");
    guest.expect(Op::Rst);
}

#[test]
fn a_program_that_has_gone_takes_the_connection_with_it() {
    let mut guest = Guest::new(0);
    let listener = guest.listen(PORTS.host);
    drop(guest.connect(&listener, PORTS));
    assert_eq!(guest.expect(Op::Shutdown).flags, shut::BOTH);
    // What is still under way is nobody's.
    guest.send(PORTS, Op::Rw, 0, 0, b"x");
    guest.send(PORTS, Op::Shutdown, shut::BOTH, 0, &[]);
    guest.expect(Op::Rst);
    // One that gives up before the guest has answered.
    let stream = guest.dial(22);
    guest.expect(Op::Request);
    drop(stream);
    guest.expect(Op::Rst);
}

#[test]
fn the_host_sends_no_more_than_the_guest_has_room_for() {
    let mut guest = Guest::new(0);
    let listener = guest.listen(PORTS.host);
    let mut stream = guest.connect(&listener, PORTS);
    let sent = pattern(5 * ROOM as usize / 2);
    let writer = std::thread::spawn({
        let sent = sent.clone();
        move || {
            stream.write_all(&sent).unwrap();
            stream
        }
    });
    let mut received = Vec::new();
    while received.len() < sent.len() {
        let (header, data) = guest.next();
        received.extend(data);
        let unacknowledged = received.len() % ROOM as usize;
        if header.op == Op::CreditRequest as u16 {
            assert_eq!(unacknowledged, 0, "it asks when it has none");
            guest.send(PORTS, Op::CreditUpdate, 0, received.len() as u32, &[]);
        } else {
            assert_eq!(header.op, Op::Rw as u16);
        }
    }
    assert!(received == sent);
    writer.join().unwrap();
}

#[test]
fn a_program_that_does_not_read_stops_only_its_connection() {
    let mut guest = Guest::new(0);
    let listener = guest.listen(PORTS.host);
    let mut slow = guest.connect(&listener, PORTS);
    let mut sent = 0usize;
    let mut forwarded = 0u32;
    let part = pattern(BUFFER as usize / 4);
    // As a driver counts: until there is no credit, which comes to rest when the socket is full.
    let mut last_news = Instant::now();
    while last_news.elapsed() < Duration::from_millis(300) {
        while let Some((header, _)) = guest.poll() {
            assert_eq!(header.op, Op::CreditUpdate as u16);
            (forwarded, last_news) = (header.fwd_cnt, Instant::now());
        }
        if sent + part.len() - forwarded as usize <= BUFFER as usize {
            guest.send(PORTS, Op::Rw, 0, 0, &part);
            (sent, last_news) = (sent + part.len(), Instant::now());
        }
    }
    assert!(sent > BUFFER as usize);
    let other = Ports { guest: 9999, ..PORTS };
    let mut quick = guest.connect(&listener, other);
    guest.send(other, Op::Rw, 0, 0, b"quick");
    quick.read_exact(&mut [0; 5]).unwrap();
    // The slow one reads all of it in the end, even of a guest that has closed meanwhile.
    guest.send(PORTS, Op::Shutdown, shut::BOTH, 0, &[]);
    guest.send(PORTS, Op::Rst, 0, 0, &[]);
    let mut all = Vec::new();
    slow.read_to_end(&mut all).unwrap();
    assert_eq!(all.len(), sent);
    assert!(all.chunks(part.len()).all(|chunk| chunk == part));
}

#[test]
fn a_guest_that_sends_more_than_there_is_room_for_is_reset() {
    let mut guest = Guest::new(0);
    let listener = guest.listen(PORTS.host);
    let _slow = guest.connect(&listener, PORTS);
    let part = pattern(BUFFER as usize / 2);
    let reset = (0..10_000).find_map(|_| {
        guest.send(PORTS, Op::Rw, 0, 0, &part);
        guest.poll().filter(|(header, _)| header.op == Op::Rst as u16)
    });
    assert!(reset.is_some());
}

#[test]
fn a_guest_that_lies_about_its_credit_hurts_itself() {
    let mut guest = Guest::new(0);
    let listener = guest.listen(PORTS.host);
    let mut stream = guest.connect(&listener, PORTS);
    // It claims to have forwarded what was never sent, or to have no room: it gets nothing, then all.
    guest.send(PORTS, Op::CreditUpdate, 0, 1_000_000, &[]);
    stream.write_all(&pattern(1000)).unwrap();
    assert_eq!(guest.expect(Op::CreditRequest).src_port, PORTS.host);
    guest.send(PORTS, Op::CreditUpdate, 0, 0, &[]);
    let (header, data) = guest.next();
    assert_eq!((header.op, data), (Op::Rw as u16, pattern(1000)));
}

#[test]
fn wrong_addresses_and_types_are_answered_by_resets() {
    let mut guest = Guest::new(0);
    let right = Header {
        src_cid: CID,
        dst_cid: HOST_CID,
        src_port: 1,
        dst_port: 2,
        kind: STREAM,
        op: Op::Request as u16,
        ..Header::default()
    };
    guest.send_raw(Header { src_cid: CID + 1, ..right }, &[]);
    guest.send_raw(Header { kind: 2, ..right }, &[]);
    let (reset, _) = guest.next();
    assert_eq!((reset.op, reset.kind, reset.dst_port), (Op::Rst as u16, 2, 1));
    for op in [0, 8, Op::Rw as u16, Op::Shutdown as u16] {
        guest.send_raw(Header { op, ..right }, &[]);
        guest.expect(Op::Rst);
    }
    assert_eq!(guest.poll(), None, "somebody else's packet got an answer");
}

#[test]
fn hostile_chains_stop_the_device_and_nothing_else() {
    /// A queue, and what is put into it.
    type Case = fn(&mut Guest) -> (usize, Buffer);
    fn header(len: u32) -> Header {
        Header { src_cid: CID, dst_cid: HOST_CID, len, kind: STREAM, op: Op::Rw as u16, ..Header::default() }
    }
    let short = |guest: &mut Guest| (TX, guest.driver.readable(&[0; Header::LENGTH - 1]));
    let lies = |guest: &mut Guest| (TX, guest.driver.readable(&header(1).to_bytes()));
    let huge = |guest: &mut Guest| (TX, guest.driver.readable(&header(u32::MAX).to_bytes()));
    let no_room = |guest: &mut Guest| (RX, guest.driver.writable(Header::LENGTH as u32));
    let outside = |_: &mut Guest| (TX, Buffer { address: 2 * SLOT - 4, length: 44, writable: false });
    let cases: [Case; 5] = [short, lies, huge, no_room, outside];
    for case in cases {
        let mut guest = Guest::new(0);
        let (queue, buffer) = case(&mut guest);
        if queue == RX {
            // It is the only one.
            guest.driver.set_status(0);
            guest.driver.initialize(0);
            guest.driver.offer(RX, &[buffer]);
            let _program = guest.dial(22);
            guest.driver.wait_out_of_service();
        } else {
            guest.driver.offer(queue, &[buffer]);
            guest.driver.notify(queue);
            guest.driver.wait_out_of_service();
        }
        guest.driver.initialize(0);
        let listener = guest.listen(PORTS.host);
        for _ in 0..BUFFERS {
            let buffer = guest.driver.writable(Header::LENGTH as u32 + CHUNK);
            guest.offer(buffer);
        }
        guest.connect(&listener, PORTS);
    }
}

#[test]
fn connections_are_bounded() {
    let mut guest = Guest::new(0);
    let listener = guest.listen(PORTS.host);
    let mut streams = Vec::new();
    // As many as there may be, or as the host lets the test have open.
    for port in 0..MOST_CONNECTIONS as u32 + 1 {
        let ports = Ports { guest: port, ..PORTS };
        guest.send(ports, Op::Request, 0, 0, &[]);
        let (answer, _) = guest.next();
        if answer.op == Op::Rst as u16 {
            assert!(streams.len() > 100, "{} connections", streams.len());
            break;
        }
        assert_eq!(answer.op, Op::Response as u16);
        match listener.accept() {
            Ok((stream, _)) => streams.push(stream),
            Err(_) => break,
        }
    }
    assert!(streams.len() <= MOST_CONNECTIONS);
    // One that ends makes room.
    streams.truncate(streams.len() - 4);
    let ports = Ports { guest: 1, ..PORTS };
    guest.send(ports, Op::Shutdown, shut::BOTH, 0, &[]);
    while guest.expect_any_of(&[Op::Shutdown, Op::Rst]).dst_port != 1 {}
    guest.send(ports, Op::Request, 0, 0, &[]);
    while guest.expect_any_of(&[Op::Shutdown, Op::Rst, Op::Response]).op != Op::Response as u16 {}
}

impl Guest {
    fn expect_any_of(&mut self, ops: &[Op]) -> Header {
        let (header, _) = self.next();
        assert!(ops.iter().any(|op| *op as u16 == header.op), "{header:?}");
        header
    }
}

#[test]
fn a_flood_without_room_for_answers_waits_and_loses_none() {
    let mut guest = Guest::new(0);
    // The driver takes nothing for a while: first its buffers fill, then packets stay in the queue.
    let header = Header { src_cid: CID, dst_cid: HOST_CID, kind: STREAM, op: 5, ..Header::default() };
    let buffer = guest.driver.readable(&header.to_bytes());
    let (mut offered, mut used) = (0, 0);
    let mut last_news = Instant::now();
    while last_news.elapsed() < Duration::from_millis(300) {
        while offered < used + 8 {
            guest.driver.offer(TX, &[buffer]);
            offered += 1;
        }
        guest.driver.notify(TX);
        while guest.driver.take_used(TX).is_some() {
            (used, last_news) = (used + 1, Instant::now());
        }
        assert!(used < 5000, "answers are kept without bound");
    }
    for _ in 0..offered {
        guest.expect(Op::Rst);
    }
    while used < offered {
        guest.driver.wait_used(TX);
        used += 1;
    }
}

#[test]
fn a_reset_by_the_driver_ends_connections_and_leaves_the_socket() {
    let mut guest = Guest::new(0);
    let (mut stream, _) = guest.accept(22);
    guest.driver.set_status(0);
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    // A program that comes meanwhile waits for the next driver.
    let _waiting = guest.dial(23);
    guest.driver.initialize(0);
    for _ in 0..BUFFERS {
        let buffer = guest.driver.writable(Header::LENGTH as u32 + CHUNK);
        guest.offer(buffer);
    }
    guest.driver.notify(RX);
    assert_eq!(guest.expect(Op::Request).dst_port, 23);
}

#[test]
fn a_pause_loses_nothing() {
    let mut guest = Guest::new(0);
    let (mut stream, ports) = guest.accept(22);
    guest.driver.function.hold();
    stream.write_all(b"meanwhile").unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(guest.poll(), None);
    guest.driver.function.open();
    assert_eq!(guest.next().1, b"meanwhile");
    guest.send(ports, Op::Rw, 0, 9, b"x");
    stream.read_exact(&mut [0]).unwrap();
}

#[test]
fn after_a_restore_the_driver_is_told_that_connections_are_gone() {
    let mut guest = Guest::new(0);
    let (stream, ports) = guest.accept(22);
    guest.driver.function.hold();
    let other = tempfile::tempdir().unwrap();
    let event = guest.driver.writable(8);
    guest.driver.offer(EV, &[event]);
    guest.driver = guest.driver.moved_to(device(&other.path().join("v")));
    drop(stream);
    guest.dir = other;
    guest.driver.function.open();
    guest.driver.notify(EV);
    assert_eq!(guest.driver.wait_used(EV).written, 4);
    assert_eq!(guest.driver.content(event)[..4], TRANSPORT_RESET.to_le_bytes());
    // What the guest sends on the old connection finds none; new ones work, with the buffers of before.
    guest.send(ports, Op::Rw, 0, 0, b"x");
    guest.expect(Op::Rst);
    guest.accept(22);
    assert_eq!(guest.driver.read::<8>(page::DEVICE), CID);
    assert!(guest.driver.take_used(EV).is_none());
}

#[test]
fn without_a_restore_there_is_no_event() {
    let mut guest = Guest::new(0);
    let event = guest.driver.writable(8);
    guest.driver.offer(EV, &[event]);
    guest.driver.notify(EV);
    guest.driver.function.hold();
    guest.driver.function.open();
    guest.accept(22);
    assert!(guest.driver.take_used(EV).is_none());
}

#[test]
fn a_state_with_an_impossible_address_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut device = device(&dir.path().join("v"));
    for guest_cid in [0, 2, u32::MAX] {
        assert!(device.restore(&Section::named("vsock0", &SavedVsock { guest_cid })).is_err());
    }
    device.restore(&Section::named("vsock0", &SavedVsock { guest_cid: 3 })).unwrap();
    assert_eq!(device.guest_cid, 3);
}

#[test]
fn a_flood_does_not_keep_it_from_being_held() {
    let dir = tempfile::tempdir().unwrap();
    let mut driver = Driver::new(device(&dir.path().join("v")));
    driver.initialize(0);
    // Queue 0 of the flood is the driver's first: here, packets of nobody's.
    driver.queues.swap(RX, TX);
    let header = Header { src_cid: 1, ..Header::default() };
    let buffer = driver.readable(&header.to_bytes());
    is_held_in_a_flood(driver, &[buffer]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_hostile_driver_breaks_nothing(bytes in collection::vec(any::<u8>(), 0..600)) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v");
        let make = || -> Box<dyn VirtioDevice> { device(&path) };
        abuse(make, INDIRECT, &bytes);
        assert!(fs::read_dir(dir.path()).unwrap().next().is_none(), "the socket stays behind");
    }
}
