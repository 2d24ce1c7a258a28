//! The host's side, blocking: [`Client`] asks one agent one thing over one connection, which may be any reader and
//! writer; [`connect`] makes one through Purlin's vsock socket.

mod command;
mod connect;
mod data;
mod dial;
mod files;

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

pub use command::{Command, Event, Finished, Input, Output};
pub use connect::{connect, connect_when_up, greeting};
pub use dial::{Connection, ConnectionReader, ConnectionWriter};
pub use files::Pulled;

use crate::{
    frame::{FrameError, FrameReader, encode},
    protocol::{
        AgentFrame, AgentMessage, Failed, Hello, HostFrame, HostMessage, Info, InfoRequest, Renew, RenewEnded, Renewed,
        VERSION,
    },
};

/// Why the agent could not be asked, or what it answered instead.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The machine's vsock socket is not there, or nobody listens at it.
    #[error("cannot connect to the machine's socket {}: {source}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The machine is there, but its guest has no agent that answers.
    #[error("no agent answers in the guest: it is still booting, or has no purlin-agent.service")]
    NoAgent,
    /// The agent is another version's.
    #[error(
        "the guest's agent {agent} speaks version {found} of the protocol, this program {VERSION}: install the agent that belongs to it"
    )]
    Version {
        /// The version of the agent's program.
        agent: String,
        /// Its protocol's.
        found: u32,
    },
    /// It could not be done in the guest.
    #[error("{}", .0.message)]
    Failed(Failed),
    /// What was said, or is to be, is no frame.
    #[error("the guest's agent: {0}")]
    Frame(#[from] FrameError),
    /// The connection has ended too early.
    #[error("the guest's agent has ended the connection: the machine stopped, or the agent was restarted")]
    Ended,
    /// The connection has failed.
    #[error("the connection to the guest's agent failed: {0}")]
    Io(#[source] io::Error),
    /// A message that does not belong there.
    #[error("the guest's agent answered something else than {0}")]
    Unexpected(&'static str),
    /// What is to be sent cannot be read.
    #[error("cannot read what is to be sent: {0}")]
    Source(#[source] io::Error),
}

/// A connection to an agent that has said who it is, and has been asked nothing yet.
#[derive(Debug)]
pub struct Client<R, W> {
    receiver: Receiver<R>,
    sender: Sender<W>,
    hello: Hello,
}

impl Client<UnixStream, UnixStream> {
    /// Over a stream that leads to the agent.
    pub fn over(stream: UnixStream) -> Result<Self, ClientError> {
        let reader = stream.try_clone().map_err(ClientError::Io)?;
        Self::new(reader, stream)
    }
}

impl<R: Read, W: Write> Client<R, W> {
    /// Over both directions of a connection to the agent. Waits until the agent has said who it is.
    pub fn new(reader: R, writer: W) -> Result<Self, ClientError> {
        let mut receiver = Receiver { reader, frames: FrameReader::new() };
        let AgentMessage::Hello(hello) = receiver.next()? else { return Err(ClientError::Unexpected("a greeting")) };
        if hello.protocol != VERSION {
            return Err(ClientError::Version { agent: hello.agent, found: hello.protocol });
        }
        Ok(Self { receiver, sender: Sender { writer }, hello })
    }

    /// Who it is.
    pub fn hello(&self) -> &Hello {
        &self.hello
    }

    /// What the guest is.
    pub fn info(mut self) -> Result<Info, ClientError> {
        self.ask(HostMessage::Info(InfoRequest {}))?;
        match self.receiver.next()? {
            AgentMessage::Info(info) => Ok(info),
            _ => Err(ClientError::Unexpected("what the guest is")),
        }
    }

    /// Makes a copied machine one of its own. What is returned beside the answer waits for what takes long; it may be
    /// dropped, and is done all the same.
    pub fn renew(mut self, renew: Renew) -> Result<(Renewed, Renewing<R, W>), ClientError> {
        self.ask(HostMessage::Renew(renew))?;
        match self.receiver.next()? {
            AgentMessage::Renewed(renewed) => Ok((renewed, Renewing(self))),
            _ => Err(ClientError::Unexpected("the machine's new identity")),
        }
    }

    /// Sends a request. If the agent has said why it takes none and has gone, that is the error.
    fn ask(&mut self, request: HostMessage) -> Result<(), ClientError> {
        let sent = self.sender.send(request);
        self.reason(sent)
    }

    /// The result of sending; where nobody takes it any more, the agent may have said why.
    fn reason(&mut self, sent: Result<(), ClientError>) -> Result<(), ClientError> {
        match sent {
            Err(ClientError::Ended) => Err(match self.receiver.next() {
                Err(failed @ ClientError::Failed(_)) => failed,
                _ => ClientError::Ended,
            }),
            sent => sent,
        }
    }
}

/// A machine whose identity is new, while its keys and its network are being renewed.
#[derive(Debug)]
pub struct Renewing<R, W>(Client<R, W>);

impl<R: Read, W: Write> Renewing<R, W> {
    /// Waits until they are.
    pub fn wait(mut self) -> Result<RenewEnded, ClientError> {
        match self.0.receiver.next()? {
            AgentMessage::RenewEnded(ended) => Ok(ended),
            _ => Err(ClientError::Unexpected("the end of the renewal")),
        }
    }
}

/// Bytes that are read at once.
const CHUNK: usize = 64 << 10;

#[derive(Debug)]
struct Receiver<R> {
    reader: R,
    frames: FrameReader<AgentFrame>,
}

impl<R: Read> Receiver<R> {
    /// The next message, but for a failure: that is an error.
    fn next(&mut self) -> Result<AgentMessage, ClientError> {
        loop {
            if let Some(AgentFrame { message }) = self.frames.next_message()? {
                return match message {
                    Some(AgentMessage::Failed(failed)) => Err(ClientError::Failed(failed)),
                    Some(message) => Ok(message),
                    None => Err(ClientError::Unexpected("what this program knows")),
                };
            }
            let mut chunk = vec![0; CHUNK];
            match self.reader.read(&mut chunk) {
                Ok(0) => return Err(ClientError::Ended),
                Ok(count) => self.frames.feed(&chunk[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(of_stream(error)),
            }
        }
    }
}

#[derive(Debug)]
struct Sender<W> {
    writer: W,
}

impl<W: Write> Sender<W> {
    fn send(&mut self, message: HostMessage) -> Result<(), ClientError> {
        let frame = encode(&HostFrame::from(message))?;
        self.writer.write_all(&frame).and_then(|()| self.writer.flush()).map_err(of_stream)
    }
}

fn of_stream(error: io::Error) -> ClientError {
    use io::ErrorKind as Kind;
    match error.kind() {
        Kind::BrokenPipe | Kind::ConnectionReset | Kind::UnexpectedEof => ClientError::Ended,
        _ => ClientError::Io(error),
    }
}
