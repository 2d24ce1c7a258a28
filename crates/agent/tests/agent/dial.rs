//! Connections to ports, here of this host.

use std::{
    io::{Read, Write},
    net::{Ipv6Addr, Shutdown, TcpListener, TcpStream},
    os::unix::net::UnixStream,
    sync::mpsc,
    thread,
    time::Duration,
};

use purlin_agent::{
    client::{ClientError, Connection},
    protocol::{Dial, FailureKind},
};

use crate::{Agent, failure, kind, noise};

const LENGTH: usize = 10 << 20;

/// Where `serve` is called for one connection, and what it returned.
fn server<T: Send + 'static>(serve: impl FnOnce(TcpStream) -> T + Send + 'static) -> (u16, thread::JoinHandle<T>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    (port, thread::spawn(move || serve(listener.accept().unwrap().0)))
}

fn dial(agent: &Agent, port: u16) -> Connection<UnixStream, UnixStream> {
    agent.client().dial(Dial { host: String::new(), port: port.into() }).unwrap()
}

fn read_all(mut reader: impl Read) -> Vec<u8> {
    let mut data = Vec::new();
    reader.read_to_end(&mut data).unwrap();
    data
}

#[test]
fn ten_mebibytes_both_ways_at_once() {
    let agent = Agent::start();
    let (port, server) = server(|socket| {
        let mut writer = socket.try_clone().unwrap();
        let written = thread::spawn(move || {
            writer.write_all(&noise(LENGTH)).unwrap();
            writer.shutdown(Shutdown::Write).unwrap();
        });
        let data = read_all(socket);
        written.join().unwrap();
        data
    });
    let Connection { mut reader, mut writer } = dial(&agent, port);
    let sent: Vec<u8> = noise(LENGTH).into_iter().rev().collect();
    thread::scope(|scope| {
        scope.spawn(|| writer.write_all(&sent).map(|()| writer.end().unwrap()).unwrap());
        assert!(read_all(&mut reader) == noise(LENGTH));
    });
    reader.finish().unwrap();
    assert!(server.join().unwrap() == sent);
}

#[test]
fn a_direction_that_has_ended_leaves_the_other() {
    let agent = Agent::start();
    // It answers once it has read to the end.
    let (port, server) = server(|mut socket| {
        let question = read_all(&socket);
        socket.write_all(&question).unwrap();
    });
    let Connection { mut reader, mut writer } = dial(&agent, port);
    writer.write_all(b"what").unwrap();
    writer.end().unwrap();
    assert_eq!(read_all(&mut reader), b"what");
    reader.finish().unwrap();
    server.join().unwrap();
}

#[test]
fn what_comes_after_the_answers_end_arrives_too() {
    let agent = Agent::start();
    let (go, gone) = mpsc::channel();
    let (port, server) = server(move |socket| {
        socket.shutdown(Shutdown::Write).unwrap();
        // All of it is sent, as far as the sender knows, before anything is read.
        gone.recv().unwrap();
        read_all(socket)
    });
    let Connection { mut reader, mut writer } = dial(&agent, port);
    assert_eq!(read_all(&mut reader), b"");
    let data = noise(1 << 20);
    thread::scope(|scope| {
        scope.spawn(|| {
            writer.write_all(&data[..100_000]).unwrap();
            go.send(()).unwrap();
            writer.write_all(&data[100_000..]).unwrap();
            writer.end().unwrap();
        });
        reader.finish().unwrap();
    });
    drop(writer);
    assert!(server.join().unwrap() == data);
}

#[test]
fn ports_where_nobody_listens() {
    let agent = Agent::start();
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let failed = failure(agent.client().dial(Dial { host: String::new(), port: free.into() }));
    assert_eq!(failed.kind(), FailureKind::Refused);
    assert_eq!(failed.message, format!("nobody listens at port {free} of 127.0.0.1 in the guest"));
    for (host, port) in [("", 0), ("", 65536), ("localhost", 80), ("1.2.3", 80)] {
        assert_eq!(kind(agent.client().dial(Dial { host: host.into(), port })), FailureKind::Invalid, "{host}:{port}");
    }
}

#[test]
fn an_address_that_is_not_the_first() {
    let agent = Agent::start();
    let Ok(listener) = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)) else {
        eprintln!("this host has no IPv6");
        return;
    };
    let port = listener.local_addr().unwrap().port();
    for host in ["", "::1"] {
        let connected = agent.client().dial(Dial { host: host.into(), port: port.into() }).unwrap();
        drop(listener.accept().unwrap());
        assert_eq!(read_all(connected.reader), b"");
    }
}

/// Writes until nobody takes it any more; how much that was. A second is far longer than a copy takes, and if it were not
/// the test would only see less.
fn fill(mut to: impl Write) -> usize {
    let piece = [0; 1 << 16];
    let mut count = 0;
    // More than all buffers of the kernels' between here and there.
    while count < 64 << 20 && to.write_all(&piece).is_ok() {
        count += piece.len();
    }
    count
}

const STALLED: Option<Duration> = Some(Duration::from_secs(1));

#[test]
fn who_does_not_read_is_not_sent_to_for_ever() {
    let agent = Agent::start();
    let (stay, stays) = mpsc::channel::<()>();
    let (port, server) = server(move |socket| {
        socket.set_write_timeout(STALLED).unwrap();
        let count = fill(&socket);
        // It is there, and reads nothing, until the other direction has been tried.
        let _ = stays.recv();
        count
    });
    let connection = dial(&agent, port);
    connection.writer.stream().set_write_timeout(STALLED).unwrap();
    assert!(fill(connection.writer) < 64 << 20, "the agent takes whatever it is sent");
    drop(stay);
    assert!(server.join().unwrap() < 64 << 20, "the agent reads whatever there is");
    drop(connection.reader);
}

#[test]
fn a_host_that_goes_breaks_the_connection() {
    let agent = Agent::start();
    let (port, server) = server(read_all);
    let Connection { reader, mut writer } = dial(&agent, port);
    writer.write_all(b"half").unwrap();
    drop((reader, writer));
    server.join().unwrap();
    // Another one, of whom the agent reads nothing just then.
    let (go, gone) = mpsc::channel::<()>();
    let (port, server) = self::server(move |mut socket| {
        let _ = gone.recv();
        let _ = socket.read_to_end(&mut Vec::new());
    });
    let connection = dial(&agent, port);
    connection.writer.stream().set_write_timeout(STALLED).unwrap();
    fill(connection.writer);
    drop(connection.reader);
    drop(go);
    server.join().unwrap();
}

#[test]
fn what_does_not_belong_into_a_connection_ends_it() {
    let agent = Agent::start();
    let (port, _server) = server(read_all);
    let Connection { mut reader, mut writer } = dial(&agent, port);
    writer.end().unwrap();
    writer.write_all(b"behind the end").unwrap();
    let error = reader.read(&mut [0]).unwrap_err();
    let error = error.into_inner().unwrap().downcast::<ClientError>().unwrap();
    assert_eq!(kind(Err::<(), _>(*error)), FailureKind::Protocol);
}
