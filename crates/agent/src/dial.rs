//! A connection to a port, for the host: one thread, which waits for whatever happens first.
//!
//! Each direction ends by itself. What is on its way is bounded: whoever sends more than [`MOST`] bytes that the other
//! side does not take is not read from meanwhile.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpStream},
    time::Duration,
};

use purlin_agent::{
    frame::encode_into,
    protocol::{AgentFrame, AgentMessage, Dial, Empty, Failed, FailureKind, HostMessage},
};
use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
};

use crate::{
    link::{CHUNK, End, Link},
    pending::Pending,
};

/// How long an address may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// Bytes for one side above which the other has to wait.
const MOST: usize = 256 << 10;

/// Connects, and passes what comes from either side, until both directions have ended.
pub fn run(link: &mut Link, dial: &Dial) -> Result<(), End> {
    let socket = connect(dial)?;
    link.send(AgentMessage::Dialed(Empty {}))?;
    socket.set_nonblocking(true).and_then(|()| link.stream.set_nonblocking(true)).map_err(|_| End::Gone)?;
    let mut relay = Relay::new(link, socket);
    let end = relay.run();
    // What is said from here on may wait; and what came before a failure is said before it.
    let _ = relay.link.stream.set_nonblocking(false);
    if let Err(End::Failed(_)) = end {
        let _ = relay.to_host.write(&relay.link.stream);
    }
    end
}

fn connect(dial: &Dial) -> Result<TcpStream, Failed> {
    let invalid = |what: String| Failed::new(FailureKind::Invalid, what);
    let port = u16::try_from(dial.port).ok().filter(|&port| port != 0);
    let port = port.ok_or_else(|| invalid(format!("{} is no port: those are 1 to 65535", dial.port)))?;
    let own = [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()];
    let hosts = match dial.host.as_str() {
        "" => own.to_vec(),
        host => vec![host.parse().map_err(|_| invalid(format!("'{}' is no IP address", host.escape_debug())))?],
    };
    let connect = |host: &IpAddr| {
        let socket = TcpStream::connect_timeout(&SocketAddr::new(*host, port), PATIENCE)?;
        // What comes is passed on as it comes.
        socket.set_nodelay(true).map(|()| socket)
    };
    // The first one's reason is the one to tell: a guest may have no IPv6.
    let mut results = hosts.iter().map(connect);
    let first = results.next().unwrap_or_else(|| Err(io::ErrorKind::AddrNotAvailable.into()));
    first.or_else(|error| results.find_map(Result::ok).ok_or(error)).map_err(|error| failure(&hosts[0], port, &error))
}

fn failure(host: &IpAddr, port: u16, error: &io::Error) -> Failed {
    use io::ErrorKind as Kind;
    let at = SocketAddr::new(*host, port);
    match error.kind() {
        Kind::ConnectionRefused => {
            Failed::new(FailureKind::Refused, format!("nobody listens at port {port} of {host} in the guest"))
        }
        Kind::TimedOut | Kind::WouldBlock => {
            Failed::new(FailureKind::Unreachable, format!("{at} does not answer the guest"))
        }
        Kind::HostUnreachable | Kind::NetworkUnreachable | Kind::AddrNotAvailable => {
            Failed::new(FailureKind::Unreachable, format!("the guest has no way to {at}"))
        }
        _ => Failed::new(FailureKind::Other, format!("cannot connect to {at} in the guest: {error}")),
    }
}

/// A connection and the host.
struct Relay<'a> {
    link: &'a mut Link,
    socket: TcpStream,
    to_socket: Pending,
    to_host: Pending,
    /// The host has said that there is no more.
    host_ended: bool,
    /// The socket is given nothing more: it has all, or does not want it.
    socket_is_fed: bool,
    /// Nothing more comes from the socket, and the host will be told.
    socket_ended: bool,
    chunk: Vec<u8>,
}

impl<'a> Relay<'a> {
    fn new(link: &'a mut Link, socket: TcpStream) -> Self {
        Self {
            link,
            socket,
            to_socket: Pending::default(),
            to_host: Pending::default(),
            host_ended: false,
            socket_is_fed: false,
            socket_ended: false,
            chunk: vec![0; CHUNK],
        }
    }

    fn run(&mut self) -> Result<(), End> {
        // The host may have said more behind its request.
        self.hear()?;
        self.write()?;
        while !(self.socket_is_fed && self.socket_ended && self.to_host.is_empty()) {
            self.turn()?;
        }
        Ok(())
    }

    /// Waits for something, and does what can be done then.
    fn turn(&mut self) -> Result<(), End> {
        let (host, socket) = self.wait().map_err(|_| End::Gone)?;
        if self.wants_host() && !host.is_empty() {
            self.read_host()?;
        } else if host.intersects(PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR) {
            return Err(End::Gone);
        }
        if self.wants_socket() && !socket.is_empty() {
            self.read_socket()?;
        }
        self.write()
    }

    /// Waits; returns what has happened to the host's stream and to the socket.
    fn wait(&self) -> io::Result<(PollFlags, PollFlags)> {
        let mut host = PollFlags::RDHUP;
        host.set(PollFlags::IN, self.wants_host());
        host.set(PollFlags::OUT, !self.to_host.is_empty());
        let mut socket = PollFlags::empty();
        socket.set(PollFlags::IN, self.wants_socket());
        socket.set(PollFlags::OUT, !self.to_socket.is_empty());
        let mut polled = vec![PollFd::new(&self.link.stream, host)];
        // One that has hung up says so again and again, asked or not.
        if !socket.is_empty() {
            polled.push(PollFd::new(&self.socket, socket));
        }
        match poll(&mut polled, None) {
            Ok(_) | Err(Errno::INTR) => {
                Ok((polled[0].revents(), polled.get(1).map_or(PollFlags::empty(), PollFd::revents)))
            }
            Err(error) => Err(error.into()),
        }
    }

    fn wants_host(&self) -> bool {
        self.to_socket.len() < MOST
    }

    fn wants_socket(&self) -> bool {
        !self.socket_ended && self.to_host.len() < MOST
    }

    fn read_host(&mut self) -> Result<(), End> {
        match rustix::io::read(&self.link.stream, &mut self.chunk) {
            Ok(0) => Err(End::Gone),
            Ok(count) => {
                self.link.frames.feed(&self.chunk[..count]);
                self.hear()
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(()),
            Err(_) => Err(End::Gone),
        }
    }

    /// What the host has said.
    fn hear(&mut self) -> Result<(), End> {
        while let Some(message) = self.link.next_message()? {
            match message {
                HostMessage::Data(_) if self.host_ended => return Err(End::protocol("there is data behind its end")),
                HostMessage::Data(_) if self.socket_is_fed => {}
                HostMessage::Data(data) => self.to_socket.tail().extend(data),
                HostMessage::DataEnd(_) => self.host_ended = true,
                _ => return Err(End::protocol("this does not belong into a connection")),
            }
        }
        Ok(())
    }

    fn read_socket(&mut self) -> Result<(), End> {
        match rustix::io::read(&self.socket, &mut self.chunk) {
            Ok(0) => {
                self.socket_ended = true;
                self.tell(AgentMessage::DataEnd(Empty {}))
            }
            Ok(count) => self.tell(AgentMessage::Data(self.chunk[..count].to_vec())),
            Err(Errno::AGAIN | Errno::INTR) => Ok(()),
            Err(error) => {
                Err(Failed::new(FailureKind::Other, format!("the connection in the guest is broken: {error}")).into())
            }
        }
    }

    /// Gives both sides what they take.
    fn write(&mut self) -> Result<(), End> {
        if self.to_socket.write(&self.socket).is_err() {
            // It may still have something to say.
            self.to_socket.clear();
            self.socket_is_fed = true;
        }
        if self.host_ended && self.to_socket.is_empty() && !self.socket_is_fed {
            let _ = self.socket.shutdown(Shutdown::Write);
            self.socket_is_fed = true;
        }
        self.to_host.write(&self.link.stream).map(drop).map_err(|_| End::Gone)
    }

    fn tell(&mut self, message: AgentMessage) -> Result<(), End> {
        Ok(encode_into(&AgentFrame::from(message), self.to_host.tail())?)
    }
}
