//! `Data` and `DataEnd` of the agent's, as a reader.

use std::io::{self, Read};

use super::{ClientError, Receiver};
use crate::protocol::AgentMessage;

/// Reads what is in them, to the end that the agent has told: an end of the connection before that is an error.
#[derive(Debug)]
pub struct DataReader<R> {
    receiver: Receiver<R>,
    /// What is expected, for an error.
    what: &'static str,
    data: Vec<u8>,
    /// How much of `data` has been read.
    at: usize,
    ended: bool,
}

impl<R> DataReader<R> {
    /// Of a session in which `what` comes next.
    pub fn new(receiver: Receiver<R>, what: &'static str) -> Self {
        Self { receiver, what, data: Vec::new(), at: 0, ended: false }
    }

    /// The session, in which something else may come.
    pub fn into_receiver(self) -> Receiver<R> {
        self.receiver
    }
}

impl<R: Read> Read for DataReader<R> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        while self.at == self.data.len() && !self.ended {
            match self.receiver.next().map_err(io::Error::other)? {
                AgentMessage::Data(data) => (self.data, self.at) = (data, 0),
                AgentMessage::DataEnd(_) => self.ended = true,
                _ => return Err(io::Error::other(ClientError::Unexpected(self.what))),
            }
        }
        let count = (&self.data[self.at..]).read(to)?;
        self.at += count;
        Ok(count)
    }
}
