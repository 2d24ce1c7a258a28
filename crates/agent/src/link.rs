//! A connection to the host, and how a session ends.

use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
};

use purlin_agent::{
    frame::{FrameError, FrameReader, encode},
    protocol::{AgentFrame, AgentMessage, Failed, FailureKind, HostFrame, HostMessage},
};

/// Bytes that are read at once.
pub const CHUNK: usize = 64 << 10;

/// Why a session ends before its time.
#[derive(Debug)]
pub enum End {
    /// The host has gone, or the connection is broken.
    Gone,
    /// The host is to be told why.
    Failed(Failed),
}

impl End {
    /// That the host did not say what it should.
    pub fn protocol(message: impl Into<String>) -> Self {
        Self::Failed(Failed::new(FailureKind::Protocol, message))
    }
}

impl From<Failed> for End {
    fn from(failed: Failed) -> Self {
        Self::Failed(failed)
    }
}

impl From<FrameError> for End {
    fn from(error: FrameError) -> Self {
        Self::protocol(error.to_string())
    }
}

/// A connection to the host.
#[derive(Debug)]
pub struct Link {
    /// The bytes. It may be a vsock socket.
    pub stream: UnixStream,
    /// The host's messages out of them.
    pub frames: FrameReader<HostFrame>,
}

impl Link {
    /// Nothing said yet.
    pub fn new(stream: UnixStream) -> Self {
        Self { stream, frames: FrameReader::new() }
    }

    /// Says something; waits until there is room for it.
    pub fn send(&mut self, message: AgentMessage) -> Result<(), End> {
        let frame = encode(&AgentFrame::from(message))?;
        self.stream.write_all(&frame).map_err(|_| End::Gone)
    }

    /// What the host says next; waits for it.
    pub fn receive(&mut self) -> Result<HostMessage, End> {
        let mut chunk = vec![0; CHUNK];
        loop {
            if let Some(message) = self.next_message()? {
                return Ok(message);
            }
            match self.stream.read(&mut chunk) {
                Ok(0) if self.frames.is_amid_frame() => {
                    return Err(End::protocol("the connection ends amid a message"));
                }
                Ok(0) => return Err(End::Gone),
                Ok(count) => self.frames.feed(&chunk[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Err(End::Gone),
            }
        }
    }

    /// What the host has said and nobody has looked at.
    pub fn next_message(&mut self) -> Result<Option<HostMessage>, End> {
        match self.frames.next_message()? {
            None => Ok(None),
            Some(HostFrame { message: Some(message) }) => Ok(Some(message)),
            Some(HostFrame { message: None }) => Err(End::protocol(
                "this guest's agent does not know what it is asked: it is older than the host's Purlin",
            )),
        }
    }
}
