//! `purlin port-forward`: ports of this host's that lead to a guest's, through its agent, while the command runs.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    os::unix::net::UnixStream,
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread,
    time::Duration,
};

use anyhow::{Result, anyhow};
use clap::{
    Args,
    builder::{NonEmptyStringValueParser, TypedValueParser},
};
use purlin_agent::{
    client::{Connection, ConnectionWriter},
    protocol::Dial,
};
use purlin_vmm::network::nat::{Protocol, Publish};

use crate::{
    agent::{self, Agent},
    exit::Ended,
    terminal,
};

/// How long a guest that is still booting is waited for.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long a connection waits for a guest that was there before.
const AGAIN: Duration = Duration::from_secs(5);
/// Connections at once; whoever comes then waits. The agent has 64 sessions, and some are for others.
const MOST: usize = 48;
/// Bytes that are passed on at once.
const PIECE: usize = 64 << 10;

/// Lead ports of this host's to a machine's guest, until Ctrl-C
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct PortForwardArgs {
    /// The machine
    name: String,

    /// A port here, and the guest's; without HOST it is 127.0.0.1's. PORT 0 is one that is free
    #[arg(required = true, value_name = "[HOST:]PORT:GUESTPORT", value_parser = parser())]
    ports: Vec<Publish>,
}

const EXAMPLES: &str = "\
Examples:
  purlin port-forward web 8080:80
  purlin port-forward db 5432:5432 0.0.0.0:9000:9000

It needs no network in the guest: connections go through its agent, to 127.0.0.1 there (or ::1, if nobody listens at the
former), so that a server is reached that listens to the guest alone. What is to be led there whenever the machine runs is
said to 'purlin launch --publish'.";

fn parser() -> impl TypedValueParser<Value = Publish> {
    NonEmptyStringValueParser::new().try_map(|text| match text.parse::<Publish>() {
        Ok(Publish { protocol: Protocol::Udp, .. }) => {
            Err(anyhow!("only TCP is led through the agent: 'purlin launch --publish' knows UDP"))
        }
        other => other.map_err(Into::into),
    })
}

/// A port, and where it leads.
struct Forward {
    listener: TcpListener,
    at: SocketAddr,
    name: String,
    guest_port: u16,
}

/// Leads them there.
pub fn port_forward(args: &PortForwardArgs) -> Result<Ended> {
    let forwards: Vec<_> = args.ports.iter().map(|port| Forward::open(&args.name, port)).collect::<Result<_>>()?;
    // What keeps all connections from being made is told before there is any.
    agent::connect(&args.name, PATIENCE)?;
    let turns = Arc::new(Turns::default());
    let threads: Vec<_> = forwards
        .into_iter()
        .map(|forward| {
            terminal::say(&format!("{} leads to port {} of {}", forward.at, forward.guest_port, forward.name));
            let turns = turns.clone();
            thread::spawn(move || forward.serve(&turns))
        })
        .collect();
    // They do not end by themselves.
    threads.into_iter().for_each(|thread| drop(thread.join()));
    Ok(Ended::Well)
}

impl Forward {
    fn open(name: &str, port: &Publish) -> Result<Self> {
        let cannot = |e: io::Error| anyhow!("cannot listen at {}: {e}", port.host);
        let listener = TcpListener::bind(port.host).map_err(cannot)?;
        let at = listener.local_addr().map_err(cannot)?;
        Ok(Self { listener, at, name: name.to_owned(), guest_port: port.guest_port })
    }

    /// Passes each connection.
    fn serve(&self, turns: &Arc<Turns>) {
        loop {
            match self.listener.accept() {
                Ok((ours, _)) => {
                    turns.take();
                    let (name, guest_port, turns) = (self.name.clone(), self.guest_port, turns.clone());
                    thread::spawn(move || {
                        let passed = agent::connect(&name, AGAIN).and_then(|agent| pass(agent, guest_port, &ours));
                        if let Err(error) = passed {
                            terminal::say(&format!("{name}: {error}"));
                        }
                        turns.give_back();
                    });
                }
                // No more files or memory, perhaps: it goes on when there are.
                Err(_) => thread::sleep(Duration::from_millis(100)),
            }
        }
    }
}

/// How many connections there are.
#[derive(Default)]
struct Turns {
    taken: Mutex<usize>,
    given_back: Condvar,
}

impl Turns {
    /// Waits until there are fewer than [`MOST`].
    fn take(&self) {
        let taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = self.given_back.wait_while(taken, |taken| *taken >= MOST);
        *taken.unwrap_or_else(PoisonError::into_inner) += 1;
    }

    fn give_back(&self) {
        *self.taken.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.given_back.notify_one();
    }
}

/// Passes a connection, both ways, each until it ends. What becomes of it once it is made is between its two ends.
fn pass(agent: Agent, guest_port: u16, ours: &TcpStream) -> Result<()> {
    let Connection { mut reader, writer } = agent.dial(Dial { host: String::new(), port: guest_port.into() })?;
    let up = ours.try_clone().map_err(|e| anyhow!("a connection: {e}"))?;
    let upward = thread::spawn(move || to_guest(&up, writer));
    let copied = copy(&mut reader, &mut &*ours);
    // An end is passed on as an end of this direction; a break is one of both.
    let _ = ours.shutdown(if copied.is_ok() { Shutdown::Write } else { Shutdown::Both });
    let _writer = upward.join();
    if copied.is_ok() {
        let _ = reader.finish();
    }
    Ok(())
}

type Writer = ConnectionWriter<UnixStream>;

/// Until whoever is connected ends its direction; the writer stays, for the other one. If it breaks, so does that.
fn to_guest(mut ours: &TcpStream, mut writer: Writer) -> Writer {
    let passed = copy(&mut ours, &mut writer).and_then(|()| writer.end().map_err(io::Error::other));
    if passed.is_err() {
        let _ = writer.stream().shutdown(Shutdown::Both);
    }
    writer
}

/// As `io::copy`, but what has come is never kept.
fn copy(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut piece = vec![0; PIECE];
    loop {
        match from.read(&mut piece) {
            Ok(0) => return Ok(()),
            Ok(count) => to.write_all(&piece[..count])?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use purlin_agent::{
        frame::{FrameReader, encode},
        protocol::{AgentFrame, AgentMessage, Empty, Failed, FailureKind, Hello, HostFrame, HostMessage, VERSION},
    };

    use super::*;

    /// An agent in whose guest everybody echoes at port 7, and nobody listens elsewhere.
    fn agent() -> Agent {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        thread::spawn(move || {
            let mut say = {
                let mut theirs = theirs.try_clone().unwrap();
                move |message| theirs.write_all(&encode(&AgentFrame::from(message)).unwrap()).unwrap()
            };
            say(AgentMessage::Hello(Hello { protocol: VERSION, agent: String::new() }));
            let (mut frames, mut bytes) = (FrameReader::<HostFrame>::new(), [0; 4096]);
            loop {
                while let Some(frame) = frames.next_message().unwrap() {
                    match frame.message.unwrap() {
                        HostMessage::Dial(Dial { port: 7, .. }) => say(AgentMessage::Dialed(Empty {})),
                        HostMessage::Data(data) => say(AgentMessage::Data(data)),
                        HostMessage::DataEnd(_) => return say(AgentMessage::DataEnd(Empty {})),
                        _ => return say(AgentMessage::Failed(Failed::new(FailureKind::Refused, "nobody listens"))),
                    }
                }
                match theirs.read(&mut bytes).unwrap() {
                    0 => return,
                    count => frames.feed(&bytes[..count]),
                }
            }
        });
        Agent::over(ours).unwrap()
    }

    fn connected() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let user = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (user, listener.accept().unwrap().0)
    }

    #[test]
    fn both_ways_and_their_ends() {
        let (mut user, ours) = connected();
        let passed = thread::spawn(move || pass(agent(), 7, &ours).unwrap());
        let data: Vec<u8> = (0..1_000_000_u32).map(|number| (number / 251) as u8).collect();
        let writer = thread::spawn({
            let (mut user, data) = (user.try_clone().unwrap(), data.clone());
            move || user.write_all(&data).and_then(|()| user.shutdown(Shutdown::Write)).unwrap()
        });
        let mut came = Vec::new();
        user.read_to_end(&mut came).unwrap();
        assert!(came == data);
        writer.join().unwrap();
        passed.join().unwrap();
    }

    #[test]
    fn where_nobody_listens() {
        let (mut user, ours) = connected();
        let error = pass(agent(), 8, &ours).unwrap_err();
        assert_eq!(error.to_string(), "nobody listens");
        drop(ours);
        assert_eq!(user.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn a_user_who_goes_ends_it() {
        let (mut user, ours) = connected();
        user.write_all(b"a").unwrap();
        drop(user);
        pass(agent(), 7, &ours).unwrap();
    }

    #[test]
    fn ports() {
        let parser = parser();
        let command = clap::Command::new("purlin");
        let parse = |text: &str| parser.parse_ref(&command, None, text.as_ref());
        assert_eq!(parse("[::1]:0:80").unwrap().host, "[::1]:0".parse().unwrap());
        assert!(parse("53:53/udp").unwrap_err().to_string().contains("only TCP"));
        assert!(parse("80").is_err());
    }
}
