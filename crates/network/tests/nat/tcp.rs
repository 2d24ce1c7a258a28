//! TCP between smoltcp as the guest and real sockets of this host.

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    thread::{self, JoinHandle},
};

use purlin_network::nat;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use smoltcp::socket::tcp;

use crate::guest::{GATEWAY, GATEWAY_V6, Guest, config};

/// Bytes that do not repeat soon.
fn data(length: usize, seed: u32) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as u8
    };
    (0..length).map(|_| next()).collect()
}

/// A server on the host's loopback that serves `count` connections, each in a thread.
fn serve<F>(count: usize, serve: F) -> (u16, JoinHandle<()>)
where
    F: Fn(TcpStream) + Send + Sync + Copy + 'static,
{
    serve_at("127.0.0.1:0", count, serve)
}

fn serve_at<F>(address: &str, count: usize, serve: F) -> (u16, JoinHandle<()>)
where
    F: Fn(TcpStream) + Send + Sync + Copy + 'static,
{
    let listener = TcpListener::bind(address).unwrap();
    // A SYN for which the queue has no room (the standard library makes it 128 long) is lost, and comes again after
    // 1, 3, 7 … seconds.
    rustix::net::listen(&listener, 4096).unwrap();
    let port = listener.local_addr().unwrap().port();
    let accept = move || {
        let connections = listener.incoming().take(count);
        let threads: Vec<_> = connections.map(|s| thread::spawn(move || serve(s.unwrap()))).collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    };
    (port, thread::spawn(accept))
}

/// Sends back all that comes, then closes.
fn echo(mut stream: TcpStream) {
    let mut reader = stream.try_clone().unwrap();
    std::io::copy(&mut reader, &mut stream).unwrap();
}

const BULK: usize = 16 << 20;

#[test]
fn bulk_from_the_host() {
    let (port, server) = serve(1, |mut stream| stream.write_all(&data(BULK, 7)).unwrap());
    let mut guest = Guest::new(&config());
    let handle = guest.connect((GATEWAY, port), 256 << 10);
    assert!(guest.receive_all_after_connect(handle) == data(BULK, 7));
    server.join().unwrap();
}

#[test]
fn bulk_to_the_host() {
    let (port, server) = serve(1, |mut stream| {
        let mut received = Vec::new();
        stream.read_to_end(&mut received).unwrap();
        assert!(received == data(BULK, 9));
    });
    let mut guest = Guest::new(&config());
    let handle = guest.connect((GATEWAY, port), 256 << 10);
    assert!(guest.wait_connected(handle));
    guest.send_all(handle, &data(BULK, 9));
    guest.close(handle);
    guest.run_until(|_| server.is_finished());
    server.join().unwrap();
}

#[test]
fn a_slow_reader_on_the_host_holds_the_guest_back() {
    let (port, server) = serve(1, |mut stream| {
        let mut received = Vec::new();
        // Long enough for every buffer on the way to fill; were it not, the test would only show less.
        thread::sleep(std::time::Duration::from_millis(300));
        stream.read_to_end(&mut received).unwrap();
        assert!(received == data(BULK, 3));
    });
    let mut guest = Guest::new(&config());
    let handle = guest.connect((GATEWAY, port), 256 << 10);
    assert!(guest.wait_connected(handle));
    guest.send_all(handle, &data(BULK, 3));
    guest.close(handle);
    guest.run_until(|_| server.is_finished());
    server.join().unwrap();
}

#[test]
fn over_ipv6() {
    let (port, server) = serve_at("[::1]:0", 1, echo);
    let mut guest = Guest::new(&config());
    let handle = guest.connect((GATEWAY_V6, port), 64 << 10);
    assert!(guest.wait_connected(handle));
    guest.send_all(handle, b"hello");
    guest.close(handle);
    assert_eq!(guest.receive_all(handle), b"hello");
    server.join().unwrap();
}

#[test]
fn the_guest_closes_its_half_first() {
    let (port, server) = serve(1, |mut stream| {
        let mut request = String::new();
        stream.read_to_string(&mut request).unwrap();
        stream.write_all(request.to_uppercase().as_bytes()).unwrap();
    });
    let mut guest = Guest::new(&config());
    let handle = guest.connect((GATEWAY, port), 64 << 10);
    assert!(guest.wait_connected(handle));
    guest.send_all(handle, b"request");
    guest.close(handle);
    assert_eq!(guest.receive_all(handle), b"REQUEST");
    server.join().unwrap();
}

#[test]
fn the_host_closes_its_half_first() {
    let (port, server) = serve(1, |mut stream| {
        stream.write_all(b"greeting").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "answer");
    });
    let mut guest = Guest::new(&config());
    let handle = guest.connect((GATEWAY, port), 64 << 10);
    assert_eq!(guest.receive_all_after_connect(handle), b"greeting");
    guest.send_all(handle, b"answer");
    guest.close(handle);
    guest.run_until(|_| server.is_finished());
    server.join().unwrap();
}

#[test]
fn a_reset_by_the_guest_reaches_the_host() {
    let (port, server) = serve(1, |mut stream| {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        let error = stream.read(&mut byte).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    });
    let mut guest = Guest::new(&config());
    let handle = guest.connect((GATEWAY, port), 64 << 10);
    assert!(guest.wait_connected(handle));
    guest.send_all(handle, b"x");
    guest.run_until(|sockets| sockets.get::<tcp::Socket>(handle).send_queue() == 0);
    guest.sockets.get_mut::<tcp::Socket>(handle).abort();
    guest.run_until(|_| server.is_finished());
    server.join().unwrap();
}

#[test]
fn a_reset_by_the_host_reaches_the_guest() {
    let (port, server) = serve(1, |stream| {
        // Closed with unread data, Linux resets.
        let mut byte = [0];
        stream.peek(&mut byte).unwrap();
    });
    let mut guest = Guest::new(&config());
    let handle = guest.connect((GATEWAY, port), 64 << 10);
    assert!(guest.wait_connected(handle));
    guest.send_all(handle, b"x");
    guest.run_until(|sockets| sockets.get::<tcp::Socket>(handle).state() == tcp::State::Closed);
    server.join().unwrap();
}

#[test]
fn a_closed_port_refuses() {
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut guest = Guest::new(&config());
    let handle = guest.connect((GATEWAY, closed), 4096);
    assert!(!guest.wait_connected(handle));
}

#[test]
fn the_hosts_loopback_is_out_of_reach() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let denied = nat::NatConfig { allow_host_loopback: false, isolated: false, ..config() };
    let mut guest = Guest::new(&denied);
    for address in [GATEWAY, "169.254.169.254".parse().unwrap()] {
        let handle = guest.connect((address, port), 4096);
        assert!(!guest.wait_connected(handle), "{address}");
    }
    listener.set_nonblocking(true).unwrap();
    assert_eq!(listener.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
}

/// Makes sure that this process may have so many descriptors; many hosts allow 1024 if nobody asks for more.
fn need_descriptors(count: u64) {
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).unwrap();
    assert!(maximum.is_none_or(|maximum| maximum >= count), "this test needs 'ulimit -Hn {count}'");
}

/// `count` connections that all stand before the first byte is sent.
fn at_once(count: usize) {
    // Two for each connection in `echo`, and some.
    need_descriptors(2 * count as u64 + 100);
    let (port, server) = serve(count, echo);
    let mut guest = Guest::new(&config());
    let handles: Vec<_> = (0..count).map(|_| guest.connect((GATEWAY, port), 2048)).collect();
    guest.run_until(|sockets| handles.iter().all(|&h| sockets.get::<tcp::Socket>(h).may_send()));
    for (i, &handle) in (0u32..).zip(&handles) {
        let socket = guest.sockets.get_mut::<tcp::Socket>(handle);
        assert_eq!(socket.send_slice(&data(1024, i)), Ok(1024));
        socket.close();
    }
    // Taken as it comes: ten seconds after a connection has ended (TIME-WAIT), smoltcp forgets what was not, and the
    // first may be that old before a busy host has let the last one in.
    let mut received = vec![Vec::new(); count];
    guest.run_until(|sockets| {
        for (&handle, received) in handles.iter().zip(&mut received) {
            let socket = sockets.get_mut::<tcp::Socket>(handle);
            while socket.can_recv() {
                let taken = socket.recv(|bytes| (bytes.len(), received.extend_from_slice(bytes)));
                taken.unwrap();
            }
        }
        received.iter().all(|received| received.len() >= 1024)
    });
    for (i, received) in (0u32..).zip(&received) {
        assert!(*received == data(1024, i));
    }
    guest.run_until(|_| server.is_finished());
    server.join().unwrap();
}

#[test]
fn a_thousand_connections_at_once() {
    at_once(1000);
}

/// `count` connections one after the other.
fn short_ones(count: usize) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = thread::spawn(move || listener.incoming().take(count).for_each(|stream| echo(stream.unwrap())));
    let mut guest = Guest::new(&config());
    for i in 0..count {
        let handle = guest.connect((GATEWAY, port), 256);
        assert!(guest.wait_connected(handle), "connection {i}");
        guest.send_all(handle, &(i as u32).to_be_bytes());
        guest.close(handle);
        assert_eq!(guest.receive_all(handle), (i as u32).to_be_bytes());
        guest.sockets.remove(handle);
    }
    server.join().unwrap();
}

#[test]
fn ten_thousand_short_connections() {
    short_ones(10_000);
}

#[test]
fn a_published_port() {
    let publish = vec!["127.0.0.1:0:7".parse().unwrap()];
    let mut guest = Guest::new(&nat::NatConfig { publish, ..config() });
    let address = guest.nat.published()[0];
    let client = thread::spawn(move || {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(b"from outside").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        assert_eq!(answer, b"from inside");
    });
    let handle = guest.tcp(4096);
    guest.sockets.get_mut::<tcp::Socket>(handle).listen(7).unwrap();
    assert!(guest.wait_connected(handle));
    let peer = guest.sockets.get::<tcp::Socket>(handle).remote_endpoint().unwrap();
    assert_eq!(peer.addr, GATEWAY.into());
    assert_eq!(guest.receive_all(handle), b"from outside");
    guest.send_all(handle, b"from inside");
    guest.close(handle);
    guest.run_until(|_| client.is_finished());
    client.join().unwrap();
}

#[test]
fn a_published_port_where_nobody_listens() {
    let publish = vec!["127.0.0.1:0:7".parse().unwrap()];
    let mut guest = Guest::new(&nat::NatConfig { publish, ..config() });
    let address = guest.nat.published()[0];
    let client = thread::spawn(move || {
        let mut stream = TcpStream::connect(address).unwrap();
        assert_eq!(stream.read(&mut [0]).unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
    });
    guest.run_until(|_| client.is_finished());
    client.join().unwrap();
}

#[test]
fn a_port_that_is_taken_is_named() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let holder = TcpListener::bind(taken).unwrap();
    let publish = vec![format!("{taken}:22").parse().unwrap()];
    let error = nat::start(&nat::NatConfig { publish, ..config() }).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("TCP port {taken} is in use by another program: publish another port, or stop that program")
    );
    drop(holder);
}
