//! The guest's serial port, or console, on standard input and output.

use std::{
    io::{self, Stdout, Write},
    os::fd::AsFd,
    sync::{Arc, mpsc},
    thread,
};

use purlin_vmm::GuestInput;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fd::BorrowedFd,
    io::{Errno, read, retry_on_intr, write},
    stdio::stdin,
};

use crate::{
    prompt::Prompt,
    stop::{Reason, Stop},
    terminal,
};

const ESCAPE_HELP: &str = "Ctrl-A x ends the run, Ctrl-A c lets a guest go on that a failed disk has paused, Ctrl-A h shows this, Ctrl-A Ctrl-A sends Ctrl-A to the guest";

/// Standard output. The guest is stopped where it is lost: nobody could see what the guest does.
pub struct Output<F = Stdout> {
    stop: Arc<Stop>,
    to: F,
    is_shared: bool,
}

impl Output {
    /// `stop` is asked for the end where the output is lost, and ends its waiting.
    pub fn new(stop: Arc<Stop>) -> Self {
        Self { stop, to: io::stdout(), is_shared: terminal::is_shared() }
    }
}

/// A pipe that is ready takes this much without blocking (POSIX, PIPE_BUF).
const CHUNK: usize = 4096;

impl<F: AsFd> Write for Output<F> {
    /// Blocks while the reader does (nothing is lost), but not longer than the run is wanted: who has ended it does not
    /// wait for a reader that takes nothing. A guest that has panicked has said why just before.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let chunk = bytes.get(..CHUNK).unwrap_or(bytes);
        loop {
            if let Some(Reason::OutputLost(_)) = self.stop.reason() {
                return Ok(bytes.len());
            }
            if !is_ready(self.to.as_fd(), PollFlags::OUT) {
                match self.stop.reason() {
                    None | Some(Reason::GuestPanicked) => continue,
                    Some(_) => return Ok(bytes.len()),
                }
            }
            // Before it is seen, so that a message of somebody who has seen it finds where the line is.
            if self.is_shared {
                terminal::guest_wrote(chunk);
            }
            match write(&self.to, chunk) {
                Err(Errno::AGAIN | Errno::INTR) => {}
                // Said at the end of the run, which this is.
                Err(errno) => self.stop.request(Reason::OutputLost(errno.into())),
                Ok(count) => {
                    if self.is_shared && count < chunk.len() {
                        terminal::guest_wrote(&chunk[..count]);
                    }
                    return Ok(count);
                }
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Waits, for a moment at most, until a descriptor is ready (or broken, which the next call then tells).
fn is_ready(fd: BorrowedFd<'_>, what: PollFlags) -> bool {
    const MOMENT: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
    poll(&mut [PollFd::new(&fd, what)], Some(&MOMENT)).is_ok_and(|ready| ready > 0)
}

/// A file for what a port puts out. The guest goes on where it cannot be written, for example when the disk is full.
pub struct LogFile<W> {
    file: W,
    name: String,
    failed: bool,
}

impl<W: Write> LogFile<W> {
    /// Writes to `file`; `name` is for the message.
    pub fn new(file: W, name: String) -> Self {
        Self { file, name, failed: false }
    }
}

impl<W: Write> Write for LogFile<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.file.write_all(bytes) {
            Ok(()) => self.failed = false,
            Err(error) if !self.failed => {
                self.failed = true;
                terminal::say(&format!("cannot write to {}: {error}; the guest goes on without it", self.name));
            }
            Err(_) => {}
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Passes a pipe or file on standard input to the guest, as fast as that takes it; where `prompt` is given, once it shows
/// one. Its end means nothing to the guest.
pub fn pass_pipe(guest: GuestInput, prompt: Option<Arc<Prompt>>) {
    thread::spawn(move || {
        prompt.iter().for_each(|prompt| prompt.wait());
        let mut buffer = [0; 4096];
        while let Some(bytes) = read_stdin(&mut buffer) {
            if !guest.push(bytes) {
                break;
            }
        }
    });
}

/// How many reads of the terminal may wait for a guest that takes no input.
const TYPED_AHEAD: usize = 256;

/// Passes what is typed to the guest, and has what is typed behind Ctrl-A obeyed. Reading goes on where the guest takes
/// nothing, so that Ctrl-A always works. `say` tells the user something.
pub fn pass_terminal(
    mut guest: impl Write + Send + 'static,
    mut obey: impl FnMut(Command) + Send + 'static,
    say: impl Fn(&str) + Send + 'static,
) {
    let (sender, receiver) = mpsc::sync_channel::<Vec<u8>>(TYPED_AHEAD);
    thread::spawn(move || receiver.into_iter().take_while(|bytes| guest.write_all(bytes).is_ok()).for_each(drop));
    thread::spawn(move || {
        let (mut buffer, mut escape) = ([0; 4096], Escape::default());
        while let Some(bytes) = read_stdin(&mut buffer) {
            let (typed, commands) = escape.filter(bytes);
            for command in commands {
                match command {
                    Command::Help => say(ESCAPE_HELP),
                    command => obey(command),
                }
            }
            if !typed.is_empty() && sender.try_send(typed).is_err() {
                say("the guest takes no input; what you typed is lost (Ctrl-A x ends the run)");
            }
        }
    });
}

/// What was read, `None` at the end of standard input.
pub fn read_stdin(buffer: &mut [u8]) -> Option<&[u8]> {
    loop {
        match retry_on_intr(|| read(stdin(), &mut *buffer)) {
            Ok(0) => return None,
            Ok(count) => return buffer.get(..count),
            // Non-blocking, as some parents leave it.
            Err(Errno::AGAIN) => _ = is_ready(stdin(), PollFlags::IN),
            // A terminal that was hung up, a closed descriptor: there will be no more.
            Err(_) => return None,
        }
    }
}

const CTRL_A: u8 = 1;

/// Finds Ctrl-A and the key after it in what is typed.
#[derive(Default)]
pub struct Escape {
    pending: bool,
}

#[derive(Debug, PartialEq, Eq)]
pub enum Command {
    /// Ctrl-A x.
    Quit,
    /// Ctrl-A c.
    GoOn,
    /// Ctrl-A h.
    Help,
}

impl Escape {
    /// The bytes for the guest, and the commands.
    pub fn filter(&mut self, bytes: &[u8]) -> (Vec<u8>, Vec<Command>) {
        let (mut typed, mut commands) = (Vec::with_capacity(bytes.len()), Vec::new());
        for &byte in bytes {
            match (std::mem::take(&mut self.pending), byte) {
                (false, CTRL_A) => self.pending = true,
                (false, byte) => typed.push(byte),
                (true, b'x' | b'X') => commands.push(Command::Quit),
                (true, b'c' | b'C') => commands.push(Command::GoOn),
                (true, b'h' | b'H' | b'?') => commands.push(Command::Help),
                (true, CTRL_A) => typed.push(CTRL_A),
                // Not a command: both keys were meant for the guest.
                (true, byte) => typed.extend([CTRL_A, byte]),
            }
        }
        (typed, commands)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;
    use crate::signals::Signal;

    /// An output whose pipe is full, the reader of it, and how many bytes that has to read first.
    fn full_pipe(stop: &Arc<Stop>) -> (Output<io::PipeWriter>, io::PipeReader, usize) {
        let (reader, to) = io::pipe().unwrap();
        let size = rustix::pipe::fcntl_setpipe_size(&to, CHUNK).unwrap();
        let mut output = Output { stop: stop.clone(), to, is_shared: false };
        output.write_all(&vec![b'x'; size]).unwrap();
        (output, reader, size)
    }

    #[test]
    fn the_last_words_of_a_guest_that_panics_wait_for_their_reader() {
        let stop = Arc::default();
        let (mut output, mut reader, before) = full_pipe(&stop);
        stop.request(Reason::GuestPanicked);
        let writer = thread::spawn(move || output.write_all(&[b'y'; 3 * CHUNK]));
        let mut all = Vec::new();
        reader.read_to_end(&mut all).unwrap();
        writer.join().unwrap().unwrap();
        assert_eq!(all[before..], [b'y'; 3 * CHUNK]);
    }

    #[test]
    fn what_can_be_written_at_once_is_written_after_a_signal_and_the_rest_is_not_waited_for() {
        let stop = Arc::default();
        let (mut output, mut reader, before) = full_pipe(&stop);
        stop.request(Reason::Signal(Signal::SIGTERM));
        output.write_all(b"nobody reads").unwrap();
        reader.read_exact(&mut vec![0; before]).unwrap();
        output.write_all(b"last words").unwrap();
        drop(output);
        let mut rest = Vec::new();
        reader.read_to_end(&mut rest).unwrap();
        assert_eq!(rest, b"last words");
    }

    fn all(escape: &mut Escape, text: &[u8]) -> (Vec<u8>, Vec<Command>) {
        escape.filter(text)
    }

    #[test]
    fn commands_are_taken_out() {
        let mut escape = Escape::default();
        assert_eq!(all(&mut escape, b"a\x01xb"), (b"ab".to_vec(), vec![Command::Quit]));
        assert_eq!(all(&mut escape, b"\x01h\x01c"), (vec![], vec![Command::Help, Command::GoOn]));
        assert_eq!(all(&mut escape, b"\x01\x01x"), (b"\x01x".to_vec(), vec![]));
        assert_eq!(all(&mut escape, b"\x01e"), (b"\x01e".to_vec(), vec![]));
    }

    #[test]
    fn a_command_may_come_in_two_reads() {
        let mut escape = Escape::default();
        assert_eq!(all(&mut escape, b"a\x01"), (b"a".to_vec(), vec![]));
        assert_eq!(all(&mut escape, b"x"), (vec![], vec![Command::Quit]));
    }

    #[test]
    fn a_full_disk_is_told_once_and_does_not_stop_the_guest() {
        struct Full(usize);
        impl Write for Full {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                self.0 += 1;
                Err(io::ErrorKind::StorageFull.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut log = LogFile::new(Full(0), "log".into());
        assert_eq!(log.write(b"abc").unwrap(), 3);
        assert_eq!(log.write(b"abc").unwrap(), 3);
        assert_eq!(log.file.0, 2, "it is tried again: there may be room by then");
        assert!(log.failed);
    }
}
