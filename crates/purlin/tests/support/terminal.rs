//! A pseudo-terminal, and a program on it.

use std::{
    fs::File,
    io::{Read, Write},
    os::fd::OwnedFd,
    process::{Command, ExitStatus},
    thread,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt},
    termios::{LocalModes, OutputModes, Winsize, tcgetattr, tcsetwinsize},
};

use super::{Killed, wait};

/// A program on a terminal, which it has opened anew.
pub struct OnTerminal {
    pub terminal: File,
    /// Keeps the terminal open after the program's end.
    pub user: OwnedFd,
    pub child: Killed,
    pub seen: String,
}

impl OnTerminal {
    /// Starts it on a terminal of 80 columns and 24 lines.
    pub fn start(command: &mut Command) -> Self {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let terminal = openpt(flags).unwrap();
        grantpt(&terminal).unwrap();
        unlockpt(&terminal).unwrap();
        let user = ioctl_tiocgptpeer(&terminal, flags).unwrap();
        tcsetwinsize(&user, Winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
        let stream = || user.try_clone().unwrap();
        let child = command.stdin(stream()).stdout(stream()).stderr(stream()).spawn().unwrap();
        Self { terminal: terminal.into(), user, child: Killed(child), seen: String::new() }
    }

    /// Reads until `text` has come, and forgets what came before it.
    pub fn expect(&mut self, text: &str) {
        self.read_until(|seen| seen.contains(text), text);
        let end = self.seen.find(text).unwrap() + text.len();
        self.seen.drain(..end);
    }

    /// Reads until what has come is as it should be.
    pub fn read_until(&mut self, has_come: impl Fn(&str) -> bool, text: &str) {
        let start = Instant::now();
        while !has_come(&self.seen) {
            assert!(start.elapsed() < Duration::from_secs(60), "no '{text}' in: {}", self.seen);
            let timeout = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
            if poll(&mut [PollFd::new(&self.terminal, PollFlags::IN)], Some(&timeout)).unwrap() > 0 {
                let mut buffer = [0; 4096];
                let count = self.terminal.read(&mut buffer).unwrap();
                self.seen.push_str(&String::from_utf8_lossy(&buffer[..count]));
            }
        }
    }

    /// Waits until `text` comes, and nothing before it.
    pub fn expect_next(&mut self, text: &str) {
        self.read_until(|seen| seen.len() >= text.len(), text);
        assert!(self.seen.starts_with(text), "not '{text}' but {:?}", self.seen);
        self.seen.drain(..text.len());
    }

    pub fn type_keys(&mut self, keys: &[u8]) {
        self.terminal.write_all(keys).unwrap();
    }

    pub fn is_raw(&self) -> bool {
        let modes = tcgetattr(&self.user).unwrap();
        let cooked = LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG;
        match (modes.local_modes.intersection(cooked), modes.output_modes.contains(OutputModes::OPOST)) {
            (local, false) if local.is_empty() => true,
            (local, true) if local == cooked => false,
            other => panic!("neither raw nor cooked: {other:?}"),
        }
    }

    /// Waits for the end, and for the terminal to be given back.
    pub fn end(&mut self) -> ExitStatus {
        let start = Instant::now();
        let status = wait(&mut self.child.0);
        // The keeper of a killed process may still be at it.
        while self.is_raw() {
            assert!(start.elapsed() < Duration::from_secs(60), "the terminal stays raw");
            thread::sleep(Duration::from_millis(10));
        }
        status
    }
}
