//! The host's side: its socket, programs that have not yet said where they want to, and the ends of connections.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
};

use rustix::{
    buffer::spare_capacity,
    event::{Timespec, epoll},
    io::Errno,
    net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown},
};

use super::{socket::HostSocket, table::Key};

/// Programs that have connected and not said where they want to. The one that has been silent longest goes first.
const MOST_GREETERS: usize = 256;
/// Bytes of the longest line that makes sense: `CONNECT 4294967295\n`, and some.
const LINE: usize = 32;
/// Events that are taken at once, and programs that are accepted.
pub const EVENTS: usize = 64;

/// The socket's number among those that events come with; greeters follow.
const LISTENER: u64 = Key::TOKENS;

/// A connection's end. What has happened to it is remembered until it has been looked at: events tell of a change only.
#[derive(Debug)]
pub struct End {
    stream: OwnedFd,
    /// There may be something to read.
    pub readable: bool,
    /// There may be room to write.
    pub writable: bool,
    /// Neither direction works any more.
    pub hung_up: bool,
    has_ended_writing: bool,
    has_ended_reading: bool,
}

impl End {
    fn new(stream: OwnedFd) -> Self {
        let (readable, writable) = (true, true);
        Self { stream, readable, writable, hung_up: false, has_ended_writing: false, has_ended_reading: false }
    }

    /// Bytes read; 0 at the end.
    pub fn read(&mut self, data: &mut [u8]) -> io::Result<usize> {
        loop {
            match recv(&self.stream, &mut *data, RecvFlags::empty()) {
                Ok((length, _)) => return Ok(length),
                Err(Errno::INTR) => {}
                Err(error) => {
                    self.readable &= error != Errno::AGAIN;
                    return Err(error.into());
                }
            }
        }
    }

    /// Bytes written: all of `data`, unless there is no room for it now.
    pub fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let mut done = 0;
        while done < data.len() && self.writable {
            match send(&self.stream, &data[done..], SendFlags::NOSIGNAL) {
                Ok(count) => done += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.writable = false,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(done)
    }

    /// The program will read nothing more than what has been written.
    pub fn end_writing(&mut self) {
        if !std::mem::replace(&mut self.has_ended_writing, true) {
            // It may be gone already.
            let _ = shutdown(&self.stream, Shutdown::Write);
        }
    }

    /// The program cannot write any more.
    pub fn end_reading(&mut self) {
        if !std::mem::replace(&mut self.has_ended_reading, true) {
            let _ = shutdown(&self.stream, Shutdown::Read);
        }
    }
}

/// What has happened at the host's side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    token: u64,
    readable: bool,
    writable: bool,
    hung_up: bool,
}

impl Event {
    /// The connection that it has happened to; `None` for a program that is not so far.
    pub fn key(&self) -> Option<Key> {
        (self.token < Key::TOKENS).then(|| Key::from_token(self.token))
    }

    /// Notes it at the connection's end.
    pub fn note(&self, end: &mut End) {
        end.readable |= self.readable;
        end.writable |= self.writable;
        end.hung_up |= self.hung_up;
    }
}

/// Everything that events come from.
pub struct Host {
    socket: Arc<HostSocket>,
    epoll: OwnedFd,
    /// There may be programs to accept.
    may_accept: bool,
    greeters: BTreeMap<u64, OwnedFd>,
    next_greeter: u64,
}

impl Host {
    /// Begins to listen.
    pub fn new(socket: Arc<HostSocket>) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(
            &epoll,
            &socket,
            epoll::EventData::new_u64(LISTENER),
            epoll::EventFlags::IN | epoll::EventFlags::ET,
        )?;
        Ok(Self { socket, epoll, may_accept: true, greeters: BTreeMap::new(), next_greeter: LISTENER + 1 })
    }

    /// What is ready when there are events.
    pub fn ready(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// The next events; there may be more if they are as many as the room in `events`.
    pub fn events(&self) -> Vec<Event> {
        let mut events = Vec::with_capacity(EVENTS);
        if epoll::wait(&self.epoll, spare_capacity(&mut events), Some(&Timespec::default())).is_err() {
            // A signal: they are still there.
            return Vec::new();
        }
        let event = |e: epoll::Event| {
            use epoll::EventFlags as F;
            let (data, flags) = (e.data, e.flags);
            let readable = flags.intersects(F::IN | F::RDHUP | F::HUP | F::ERR);
            let writable = flags.intersects(F::OUT | F::HUP | F::ERR);
            Event { token: data.u64(), readable, writable, hung_up: flags.contains(F::HUP) }
        };
        events.into_iter().map(event).collect()
    }

    /// Connects to the program behind a port of the host's, for the connection `key`.
    pub fn connect(&self, key: Key) -> io::Result<End> {
        let stream = self.socket.connect(key.host_port)?;
        epoll::add(&self.epoll, &stream, epoll::EventData::new_u64(key.token()), interest())?;
        Ok(End::new(stream))
    }

    /// Accepts some of the programs that have connected; returns whether there may be more. (Not all at once: what those
    /// say who are accepted is looked at before others could push them out.)
    pub fn accept(&mut self) -> bool {
        for _ in 0..EVENTS {
            if !self.may_accept {
                return false;
            }
            match self.socket.accept() {
                Ok(stream) => self.greet(stream),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.may_accept = false,
                // It gave up.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    // No more files, most likely: it waits until there are.
                    tracing::debug!("cannot accept a connection to the guest: {error}");
                    return false;
                }
            }
        }
        true
    }

    fn greet(&mut self, stream: OwnedFd) {
        if self.greeters.len() >= MOST_GREETERS {
            self.greeters.pop_first();
        }
        let token = self.next_greeter;
        self.next_greeter = self.next_greeter.checked_add(1).unwrap_or(LISTENER + 1);
        if epoll::add(&self.epoll, &stream, epoll::EventData::new_u64(token), interest()).is_ok() {
            self.greeters.insert(token, stream);
        }
    }

    /// What an event that is no connection's comes to: a program may have said to which port of the guest's it wants.
    pub fn greeted(&mut self, event: Event) -> Option<(OwnedFd, u32)> {
        if event.token == LISTENER {
            self.may_accept = true;
            return None;
        }
        let stream = self.greeters.get(&event.token)?;
        match greeting(stream) {
            Greeting::Unfinished => None,
            Greeting::Wrong => {
                self.greeters.remove(&event.token);
                None
            }
            Greeting::Port(port) => Some((self.greeters.remove(&event.token)?, port)),
        }
    }

    /// Makes a program's socket the end of the connection `key`.
    pub fn adopt(&self, stream: OwnedFd, key: Key) -> io::Result<End> {
        epoll::modify(&self.epoll, &stream, epoll::EventData::new_u64(key.token()), interest())?;
        Ok(End::new(stream))
    }
}

fn interest() -> epoll::EventFlags {
    use epoll::EventFlags as F;
    F::IN | F::OUT | F::RDHUP | F::ET
}

#[derive(Debug, PartialEq, Eq)]
enum Greeting {
    Unfinished,
    Wrong,
    Port(u32),
}

/// Takes the line `CONNECT PORT` from a program's socket once all of it is there, and nothing behind it.
fn greeting(stream: &OwnedFd) -> Greeting {
    let mut start = [0; LINE];
    let length = match recv(stream, &mut start[..], RecvFlags::PEEK) {
        Ok((0, _)) => return Greeting::Wrong,
        Ok((length, _)) => length,
        Err(Errno::AGAIN | Errno::INTR) => return Greeting::Unfinished,
        Err(_) => return Greeting::Wrong,
    };
    let Some(end) = start[..length].iter().position(|byte| *byte == b'\n') else {
        return if length < LINE { Greeting::Unfinished } else { Greeting::Wrong };
    };
    let mut line = [0; LINE];
    match recv(stream, &mut line[..=end], RecvFlags::empty()) {
        Ok((length, _)) if length == end + 1 => parse_greeting(&line[..end]).map_or(Greeting::Wrong, Greeting::Port),
        _ => Greeting::Wrong,
    }
}

/// The port of the line, without its end. (Programs written for other hypervisors say it in either case.)
fn parse_greeting(line: &[u8]) -> Option<u32> {
    let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    let is_connect = words.next()?.eq_ignore_ascii_case("connect");
    let port = words.next().filter(|port| port.bytes().all(|byte| byte.is_ascii_digit()))?;
    (is_connect && words.next().is_none()).then(|| port.parse().ok())?
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::unix::net::UnixStream};

    use super::*;

    #[test]
    fn lines() {
        for (line, port) in [
            ("CONNECT 52", Some(52)),
            ("connect 4294967295", Some(u32::MAX)),
            ("CONNECT 52\r", Some(52)),
            ("CONNECT", None),
            ("CONNECT 4294967296", None),
            ("CONNECT +5", None),
            ("CONNECT 5 5", None),
            ("GET 5", None),
            ("", None),
        ] {
            assert_eq!(parse_greeting(line.as_bytes()), port, "{line}");
        }
    }

    #[test]
    fn a_line_may_come_in_parts_and_what_follows_stays() {
        let (mut program, ours) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let ours = OwnedFd::from(ours);
        assert_eq!(greeting(&ours), Greeting::Unfinished);
        program.write_all(b"CONN").unwrap();
        assert_eq!(greeting(&ours), Greeting::Unfinished);
        program.write_all(b"ECT 9\nhello").unwrap();
        assert_eq!(greeting(&ours), Greeting::Port(9));
        let mut end = End::new(ours);
        let mut rest = [0; 16];
        assert_eq!(end.read(&mut rest).unwrap(), 5);
        assert_eq!(&rest[..5], b"hello");
        assert!(end.read(&mut rest).is_err() && !end.readable);
        drop(program);
        assert_eq!(end.read(&mut rest).unwrap(), 0);
        assert!(end.write(b"x").is_err());
    }

    #[test]
    fn a_program_that_says_nothing_sensible_is_left() {
        let (mut program, ours) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let ours = OwnedFd::from(ours);
        program.write_all(&[b'x'; LINE]).unwrap();
        assert_eq!(greeting(&ours), Greeting::Wrong);
    }
}
