//! A command in the guest: its input and its output, which two threads may hold.

use std::{
    io::{Read, Write},
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread,
};

use super::{Client, ClientError, Receiver, Sender};
use crate::protocol::{AgentMessage, Empty, Exec, Exited, HostMessage, STDIN_WINDOW, Size};

/// A command that runs. Dropping both halves ends it with SIGHUP, if the connection ends with them.
#[derive(Debug)]
pub struct Command<R, W> {
    /// Its process in the guest.
    pub pid: u32,
    /// What it reads, and what happens to it.
    pub input: Input<W>,
    /// What it writes, and its end.
    pub output: Output<R>,
}

/// What a command has written, or its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// On standard output, or on its terminal.
    Stdout(Vec<u8>),
    /// On standard error.
    Stderr(Vec<u8>),
    /// Nothing follows.
    Exited(Exited),
}

/// A command that has ended, and all that it has written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finished {
    /// How it has ended.
    pub exited: Exited,
    /// Standard output, or the terminal.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
}

impl<R: Read, W: Write> Client<R, W> {
    /// Runs a command.
    pub fn exec(mut self, exec: Exec) -> Result<Command<R, W>, ClientError> {
        self.ask(HostMessage::Exec(exec))?;
        let AgentMessage::Started(started) = self.receiver.next()? else {
            return Err(ClientError::Unexpected("the command's process"));
        };
        let window = Arc::new(Window::default());
        let input = Input { sender: Mutex::new(self.sender), window: Arc::clone(&window) };
        Ok(Command { pid: started.pid, input, output: Output { receiver: self.receiver, window } })
    }

    /// Runs a command with this input to its end.
    pub fn run(self, exec: Exec, stdin: &[u8]) -> Result<Finished, ClientError>
    where
        W: Send,
    {
        let Command { input, mut output, .. } = self.exec(Exec { with_stdin: true, ..exec })?;
        thread::scope(|scope| {
            // It is no error that a command does not want its input; if the connection fails, the output tells.
            scope.spawn(|| input.write(stdin).and_then(|()| input.end()).ok());
            output.finish()
        })
    }
}

/// The way in.
#[derive(Debug)]
pub struct Input<W> {
    /// Held only while something is sent: who waits for room keeps no signal from being sent.
    sender: Mutex<Sender<W>>,
    window: Arc<Window>,
}

impl<W: Write> Input<W> {
    /// Writes all of `data` to its standard input, as it takes it. Needs somebody who reads [`Output`] meanwhile.
    /// [`ClientError::Ended`] is a command that has.
    pub fn write(&self, mut data: &[u8]) -> Result<(), ClientError> {
        while !data.is_empty() {
            let (now, later) = data.split_at(self.window.wait(data.len())?);
            self.send(HostMessage::Stdin(now.to_vec()))?;
            data = later;
        }
        Ok(())
    }

    /// Ends its standard input; what is written after that is lost.
    pub fn end(&self) -> Result<(), ClientError> {
        self.send(HostMessage::StdinEnd(Empty {}))
    }

    /// Tells its terminal's size.
    pub fn resize(&self, columns: u32, rows: u32) -> Result<(), ClientError> {
        self.send(HostMessage::Resize(Size { columns, rows }))
    }

    /// Sends a signal, see [`HostMessage::Signal`].
    pub fn signal(&self, signal: i32) -> Result<(), ClientError> {
        self.send(HostMessage::Signal(signal))
    }

    fn send(&self, message: HostMessage) -> Result<(), ClientError> {
        self.sender.lock().unwrap_or_else(PoisonError::into_inner).send(message)
    }
}

/// The way out.
#[derive(Debug)]
pub struct Output<R> {
    receiver: Receiver<R>,
    window: Arc<Window>,
}

impl<R: Read> Output<R> {
    /// What it has written next; waits for it.
    pub fn next_event(&mut self) -> Result<Event, ClientError> {
        loop {
            let message = self.receiver.next().inspect_err(|_| self.window.end())?;
            return Ok(match message {
                AgentMessage::Stdout(data) => Event::Stdout(data),
                AgentMessage::Stderr(data) => Event::Stderr(data),
                AgentMessage::StdinTaken(count) => {
                    self.window.open(count);
                    continue;
                }
                AgentMessage::Exited(exited) => {
                    self.window.end();
                    Event::Exited(exited)
                }
                _ => {
                    self.window.end();
                    return Err(ClientError::Unexpected("a command's output"));
                }
            });
        }
    }

    /// All that it writes, to its end.
    pub fn finish(&mut self) -> Result<Finished, ClientError> {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        loop {
            match self.next_event()? {
                Event::Stdout(data) => stdout.extend(data),
                Event::Stderr(data) => stderr.extend(data),
                Event::Exited(exited) => return Ok(Finished { exited, stdout, stderr }),
            }
        }
    }
}

impl<R> Drop for Output<R> {
    fn drop(&mut self) {
        // Nobody would tell.
        self.window.end();
    }
}

/// How much input the agent has room for.
#[derive(Debug)]
struct Window {
    /// Bytes; `None` once the command has ended.
    room: Mutex<Option<u64>>,
    changed: Condvar,
}

impl Default for Window {
    fn default() -> Self {
        Self { room: Mutex::new(Some(STDIN_WINDOW as u64)), changed: Condvar::new() }
    }
}

impl Window {
    /// Waits for room, and takes as much of it as there is, up to `wanted` bytes.
    fn wait(&self, wanted: usize) -> Result<usize, ClientError> {
        let room = self.room.lock().unwrap_or_else(PoisonError::into_inner);
        let room = self.changed.wait_while(room, |room| *room == Some(0));
        let mut room = room.unwrap_or_else(PoisonError::into_inner);
        let left = room.as_mut().ok_or(ClientError::Ended)?;
        let taken = wanted.min(super::CHUNK).min(*left as usize);
        *left -= taken as u64;
        Ok(taken)
    }

    fn open(&self, count: u64) {
        let mut room = self.room.lock().unwrap_or_else(PoisonError::into_inner);
        // Not more than there is, whatever the guest says.
        *room = room.map(|room| room.saturating_add(count).min(STDIN_WINDOW as u64));
        self.changed.notify_all();
    }

    fn end(&self) {
        *self.room.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.changed.notify_all();
    }
}
