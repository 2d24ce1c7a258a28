//! Between the host and a command that runs: one thread, which waits for whatever happens first.
//!
//! What is on its way is bounded: a command is not read from while the host has [`MOST_OUTPUT`] bytes to take, the host
//! not while the command has [`STDIN_WINDOW`].

use std::{
    io,
    os::fd::OwnedFd,
    process::ExitStatus,
    time::{Duration, Instant},
};

use purlin_agent::{
    frame::encode_into,
    protocol::{AgentFrame, AgentMessage, Exited, HostMessage, STDIN_WINDOW},
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::{Errno, ioctl_fionread},
    process::{Signal, kill_process_group},
};

use super::{
    child::{Child, Streams},
    terminal::Terminal,
};
use crate::{
    link::{CHUNK, End, Link},
    pending::Pending,
};

/// Bytes for the host above which the command has to wait.
const MOST_OUTPUT: usize = 256 << 10;
/// So many bytes of input that have been taken are told at once, or all when there are none left.
const TAKEN_STEP: u64 = 32 << 10;
/// How long processes that outlive the command may go on writing to its pipes. What it has itself written, it had
/// written when it ended, and all of that is passed on; ssh waits for the others for ever.
const GRACE: Duration = Duration::from_millis(250);

/// A command and the host.
pub struct Relay<'a> {
    /// The host.
    pub link: &'a mut Link,
    /// The command.
    pub child: Child,
    terminal: Option<Terminal>,
    input: Option<OwnedFd>,
    /// The host has said that there is no more.
    input_ends: bool,
    outputs: Vec<Source>,
    to_command: Pending,
    /// Input that is taken, and of which the host has not been told.
    taken: u64,
    to_host: Pending,
    ended: Option<(ExitStatus, Instant)>,
    chunk: Vec<u8>,
}

/// What the command writes to.
struct Source {
    stream: OwnedFd,
    message: fn(Vec<u8>) -> AgentMessage,
    /// Bytes that were in it when the command ended.
    owed: u64,
}

impl<'a> Relay<'a> {
    /// Of a command that has just begun.
    pub fn new(link: &'a mut Link, child: Child, streams: Streams) -> Result<Self, End> {
        let source = |stream, message| Source { stream, message, owed: 0 };
        let mut outputs = vec![source(streams.output, AgentMessage::Stdout)];
        outputs.extend(streams.error.map(|stream| source(stream, AgentMessage::Stderr)));
        Ok(Self {
            link,
            child,
            terminal: streams.terminal,
            input: streams.input,
            input_ends: false,
            outputs,
            to_command: Pending::default(),
            taken: 0,
            to_host: Pending::default(),
            ended: None,
            chunk: vec![0; CHUNK],
        })
    }

    /// Until the command has ended and the host has been told. If the host goes first, the command is hung up.
    pub fn run(mut self) -> Result<(), End> {
        let end = self.relay();
        if end.is_err() {
            self.child.hang_up();
        }
        // What is said from here on may wait.
        let _ = self.link.stream.set_nonblocking(false);
        end
    }

    fn relay(&mut self) -> Result<(), End> {
        self.link.stream.set_nonblocking(true).map_err(|_| End::Gone)?;
        // The host may have said more behind its request.
        self.hear()?;
        while !self.is_complete() {
            self.turn()?;
        }
        let (status, _) = self.ended.ok_or(End::Gone)?;
        self.tell(AgentMessage::Exited(exited(status)))?;
        self.link.stream.set_nonblocking(false).map_err(|_| End::Gone)?;
        self.to_host.write(&self.link.stream).map(drop).map_err(|_| End::Gone)
    }

    /// Waits for something, and does what can be done then.
    fn turn(&mut self) -> Result<(), End> {
        let host = self.wait().map_err(|_| End::Gone)?;
        if self.wants_host() {
            if !host.is_empty() {
                self.read_host()?;
            }
        } else if host.intersects(PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR) {
            return Err(End::Gone);
        }
        self.write_command();
        self.note_end();
        self.read_outputs()?;
        self.tell_taken()?;
        self.to_host.write(&self.link.stream).map(drop).map_err(|_| End::Gone)
    }

    /// Waits; returns what has happened to the host's stream.
    fn wait(&self) -> io::Result<PollFlags> {
        let mut host = PollFlags::RDHUP;
        host.set(PollFlags::IN, self.wants_host());
        host.set(PollFlags::OUT, !self.to_host.is_empty());
        let mut polled = vec![PollFd::new(&self.link.stream, host)];
        if self.ended.is_none() {
            polled.push(PollFd::from_borrowed_fd(self.child.end(), PollFlags::IN));
        }
        if let Some(input) = self.input.as_ref().filter(|_| !self.to_command.is_empty()) {
            polled.push(PollFd::new(input, PollFlags::OUT));
        }
        if self.has_room() {
            polled.extend(self.outputs.iter().map(|output| PollFd::new(&output.stream, PollFlags::IN)));
        }
        // Once all has been read that is owed, others may write until then.
        let until = self.ended.map(|(_, until)| until.saturating_duration_since(Instant::now()));
        let timeout = until.filter(|_| self.to_host.is_empty()).and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut polled, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => Ok(polled[0].revents()),
            Err(error) => Err(error.into()),
        }
    }

    fn wants_host(&self) -> bool {
        self.to_command.len() < STDIN_WINDOW
    }

    fn has_room(&self) -> bool {
        self.to_host.len() < MOST_OUTPUT
    }

    /// Whether the command has ended and nothing that it wrote is missing.
    fn is_complete(&self) -> bool {
        let Some((_, until)) = self.ended else { return false };
        let has_all = self.outputs.iter().all(|output| output.owed == 0);
        self.outputs.is_empty() || (has_all && Instant::now() >= until)
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
                HostMessage::Stdin(data) if self.input.is_none() || self.input_ends => self.taken += data.len() as u64,
                HostMessage::Stdin(data) => self.to_command.tail().extend(data),
                HostMessage::StdinEnd(_) => self.end_input(),
                // Without a terminal, or with one that is gone, there is nothing to be changed.
                HostMessage::Resize(size) => drop(self.terminal.as_ref().map(|terminal| terminal.resize(&size))),
                HostMessage::Signal(number) => self.signal(number)?,
                _ => return Err(End::protocol("this does not belong into the session of a command")),
            }
        }
        Ok(())
    }

    fn end_input(&mut self) {
        if std::mem::replace(&mut self.input_ends, true) {
            return;
        }
        if let Some(Ok(end)) = self.terminal.as_ref().map(Terminal::end_of_file) {
            self.to_command.tail().push(end);
        }
        self.write_command();
    }

    fn signal(&self, number: i32) -> Result<(), End> {
        let signal = Signal::from_named_raw(number)
            .ok_or_else(|| End::protocol(format!("there is no signal {number} that can be sent")))?;
        match self.terminal.as_ref().and_then(Terminal::foreground) {
            // It may be gone just now.
            Some(group) => drop(kill_process_group(group, signal)),
            None => self.child.signal(signal),
        }
        Ok(())
    }

    /// Gives the command what it takes of its input, and its end.
    fn write_command(&mut self) {
        let Some(input) = &self.input else {
            self.taken += self.to_command.clear() as u64;
            return;
        };
        match self.to_command.write(input) {
            Ok(count) => self.taken += count as u64,
            // It does not read any more.
            Err(_) => {
                self.input = None;
                self.taken += self.to_command.clear() as u64;
            }
        }
        if self.input_ends && self.to_command.is_empty() {
            self.input = None;
        }
    }

    fn note_end(&mut self) {
        if self.ended.is_some() {
            return;
        }
        let Some(status) = self.child.status() else { return };
        self.ended = Some((status, Instant::now() + GRACE));
        self.input = None;
        for output in &mut self.outputs {
            output.owed = ioctl_fionread(&output.stream).unwrap_or(0);
        }
    }

    fn read_outputs(&mut self) -> Result<(), End> {
        let mut at = 0;
        while at < self.outputs.len() && self.has_room() {
            let output = &mut self.outputs[at];
            match rustix::io::read(&output.stream, &mut self.chunk) {
                Ok(count @ 1..) => {
                    output.owed = output.owed.saturating_sub(count as u64);
                    let message = (output.message)(self.chunk[..count].to_vec());
                    self.tell(message)?;
                }
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => output.owed = 0,
                // A terminal that nobody has open any more says EIO.
                Ok(0) | Err(_) => {
                    self.outputs.remove(at);
                    continue;
                }
            }
            at += 1;
        }
        Ok(())
    }

    fn tell_taken(&mut self) -> Result<(), End> {
        let is_due = self.taken >= TAKEN_STEP || (self.taken > 0 && self.to_command.is_empty());
        // A host that does not listen is not told again and again.
        if is_due && self.has_room() {
            let taken = std::mem::take(&mut self.taken);
            self.tell(AgentMessage::StdinTaken(taken))?;
        }
        Ok(())
    }

    fn tell(&mut self, message: AgentMessage) -> Result<(), End> {
        Ok(encode_into(&AgentFrame::from(message), self.to_host.tail())?)
    }
}

fn exited(status: ExitStatus) -> Exited {
    use std::os::unix::process::ExitStatusExt;
    Exited { status: status.code().unwrap_or(0), signal: status.signal().unwrap_or(0) }
}
