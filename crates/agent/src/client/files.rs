//! Files, to the guest and from it.

use std::io::{self, Read, Write};

use super::{CHUNK, Client, ClientError, data::DataReader};
use crate::protocol::{AgentMessage, Empty, File, HostMessage, Pull, Push};

impl<R: Read, W: Write> Client<R, W> {
    /// Writes a file in the guest; returns its size.
    pub fn push(mut self, push: Push, mut from: impl Read) -> Result<u64, ClientError> {
        self.ask(HostMessage::Push(push))?;
        let AgentMessage::Ready(_) = self.receiver.next()? else {
            return Err(ClientError::Unexpected("that the file can come"));
        };
        let mut chunk = vec![0; CHUNK];
        loop {
            let message = match from.read(&mut chunk) {
                Ok(0) => HostMessage::DataEnd(Empty {}),
                Ok(count) => HostMessage::Data(chunk[..count].to_vec()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(ClientError::Source(error)),
            };
            let is_end = matches!(message, HostMessage::DataEnd(_));
            self.ask(message)?;
            if is_end {
                break;
            }
        }
        match self.receiver.next()? {
            AgentMessage::Stored(size) => Ok(size),
            _ => Err(ClientError::Unexpected("that the file is stored")),
        }
    }

    /// Begins to read a file of the guest's.
    pub fn pull(mut self, path: &[u8]) -> Result<Pulled<R, W>, ClientError> {
        self.ask(HostMessage::Pull(Pull { path: path.to_vec() }))?;
        match self.receiver.next()? {
            AgentMessage::File(file) => Ok(Pulled {
                file,
                data: DataReader::new(self.receiver, "the file's data"),
                _writer: self.sender.writer,
            }),
            _ => Err(ClientError::Unexpected("the file")),
        }
    }
}

/// A file of the guest's, to be read. A reader that comes to its end has all of it.
#[derive(Debug)]
pub struct Pulled<R, W> {
    /// What it is.
    pub file: File,
    data: DataReader<R>,
    /// While it is there the session is.
    _writer: W,
}

impl<R: Read, W> Read for Pulled<R, W> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        self.data.read(to)
    }
}
