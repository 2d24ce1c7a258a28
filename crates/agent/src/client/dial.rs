//! A connection to a port in the guest: two directions, which two threads may hold, and which end by themselves.

use std::io::{self, Read, Write};

use super::{CHUNK, Client, ClientError, Sender, data::DataReader};
use crate::protocol::{AgentMessage, Dial, Empty, HostMessage};

/// A connection. Dropping both halves breaks it, if the session's stream ends with them.
#[derive(Debug)]
pub struct Connection<R, W> {
    /// What comes from there.
    pub reader: ConnectionReader<R>,
    /// What goes there.
    pub writer: ConnectionWriter<W>,
}

/// Reads what comes, to its end. An error is a connection that broke.
#[derive(Debug)]
pub struct ConnectionReader<R>(DataReader<R>);

/// Writes; waits while the other side takes nothing.
#[derive(Debug)]
pub struct ConnectionWriter<W>(Sender<W>);

impl<R: Read, W: Write> Client<R, W> {
    /// Connects to a port.
    pub fn dial(mut self, dial: Dial) -> Result<Connection<R, W>, ClientError> {
        self.ask(HostMessage::Dial(dial))?;
        match self.receiver.next()? {
            AgentMessage::Dialed(_) => Ok(Connection {
                reader: ConnectionReader(DataReader::new(self.receiver, "a connection's data")),
                writer: ConnectionWriter(self.sender),
            }),
            _ => Err(ClientError::Unexpected("that it is connected")),
        }
    }
}

impl<R: Read> ConnectionReader<R> {
    /// Once both directions have ended: waits until the other side has been given all that was written. What is dropped
    /// before that may be lost.
    pub fn finish(self) -> Result<(), ClientError> {
        match self.0.into_receiver().next() {
            Err(ClientError::Ended) => Ok(()),
            Err(error) => Err(error),
            Ok(_) => Err(ClientError::Unexpected("the end of a connection")),
        }
    }
}

impl<R: Read> Read for ConnectionReader<R> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        self.0.read(to)
    }
}

impl<W: Write> ConnectionWriter<W> {
    /// Ends this direction: the other side reads an end of file, and may go on writing. What is written after that breaks
    /// the connection.
    pub fn end(&mut self) -> Result<(), ClientError> {
        self.0.send(HostMessage::DataEnd(Empty {}))
    }

    /// The stream of the session.
    pub fn stream(&self) -> &W {
        &self.0.writer
    }
}

impl<W: Write> Write for ConnectionWriter<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let piece = &bytes[..bytes.len().min(CHUNK)];
        // No message is for nothing.
        if !piece.is_empty() {
            self.0.send(HostMessage::Data(piece.to_vec())).map_err(io::Error::other)?;
        }
        Ok(piece.len())
    }

    /// What is written is on its way.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
