//! Runs on a terminal: the keys, and that the terminal is given back however the run ends.

mod support;

use std::{
    fs::File,
    io::{Read, Write},
    os::fd::OwnedFd,
    thread,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, Signal, kill_process},
    pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt},
    termios::{LocalModes, OutputModes, tcgetattr},
};
use support::{Kernel, Killed, command, wait};

/// A run on a pseudo-terminal, whose guest has said that it is ready.
struct Run {
    terminal: File,
    /// Keeps the terminal open after the run's end.
    user: OwnedFd,
    child: Killed,
    seen: String,
    _kernel: Kernel,
}

impl Run {
    fn start() -> Self {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let terminal = openpt(flags).unwrap();
        grantpt(&terminal).unwrap();
        unlockpt(&terminal).unwrap();
        let user = ioctl_tiocgptpeer(&terminal, flags).unwrap();
        let kernel = Kernel::new();
        let stream = || user.try_clone().unwrap();
        let child = kernel.run().stdin(stream()).stdout(stream()).stderr(stream()).spawn().unwrap();
        let child = Killed(child);
        let mut run = Self { terminal: terminal.into(), user, child, seen: String::new(), _kernel: kernel };
        run.expect("ready\n");
        assert!(run.is_raw());
        run
    }

    /// Reads until `text` has come, and forgets what came before it.
    fn expect(&mut self, text: &str) {
        self.read_until(|seen| seen.contains(text), text);
        let end = self.seen.find(text).unwrap() + text.len();
        self.seen.drain(..end);
    }

    fn read_until(&mut self, has_come: impl Fn(&str) -> bool, text: &str) {
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
    fn expect_next(&mut self, text: &str) {
        self.read_until(|seen| seen.len() >= text.len(), text);
        assert!(self.seen.starts_with(text), "not '{text}' but {:?}", self.seen);
        self.seen.drain(..text.len());
    }

    fn type_keys(&mut self, keys: &[u8]) {
        self.terminal.write_all(keys).unwrap();
    }

    fn is_raw(&self) -> bool {
        let modes = tcgetattr(&self.user).unwrap();
        let cooked = LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG;
        match (modes.local_modes.intersection(cooked), modes.output_modes.contains(OutputModes::OPOST)) {
            (local, false) if local.is_empty() => true,
            (local, true) if local == cooked => false,
            other => panic!("neither raw nor cooked: {other:?}"),
        }
    }

    /// Waits for the end, and for the terminal to be given back.
    fn end(mut self) -> Option<i32> {
        let start = Instant::now();
        let status = wait(&mut self.child.0);
        // The keeper of a killed process may still be at it.
        while self.is_raw() {
            assert!(start.elapsed() < Duration::from_secs(60), "the terminal stays raw");
            thread::sleep(Duration::from_millis(10));
        }
        status.code()
    }
}

#[test]
fn keys() {
    let mut run = Run::start();
    run.type_keys(b"ab");
    run.expect("ab");
    run.type_keys(b"\x01h");
    run.expect("Ctrl-A x ends the run");
    run.expect("\r\n");
    // Ctrl-C and Ctrl-Z are the guest's.
    run.type_keys(b"\x03\x1a");
    run.expect("\x03\x1a");
    run.type_keys(b"\x01\x01");
    run.expect("\x01");
    run.type_keys(b"\x01x");
    assert_eq!(run.end(), Some(0));
}

#[test]
fn a_message_has_a_line_of_its_own() {
    let mut run = Run::start();
    run.type_keys(b"ab");
    run.expect("ab");
    run.type_keys(b"\x01h");
    run.expect_next("\r\npurlin: Ctrl-A x ends the run");
    run.expect("\r\n");
    // The message has ended its line itself, and so does the guest.
    run.type_keys(b"\x01h");
    run.expect_next("purlin: Ctrl-A");
    run.expect("\r\n");
    run.type_keys(b"c\n");
    run.expect_next("c\n");
    run.type_keys(b"\x01h");
    run.expect_next("purlin: Ctrl-A");
    run.expect("\r\n");
    run.type_keys(b"d");
    run.expect_next("d");
    kill_process(Pid::from_child(&run.child.0), Signal::TERM).unwrap();
    run.expect_next("\r\npurlin: ended by SIGTERM\r\n");
    assert_eq!(run.end(), Some(143));
}

#[test]
fn ctrl_a_works_while_the_guest_takes_no_input() {
    let mut run = Run::start();
    run.type_keys(&[command::FLOOD]);
    run.expect("FFFF");
    for _ in 0..100 {
        run.type_keys(b"typed in vain");
        run.expect("FFFF");
    }
    run.type_keys(b"\x01x");
    // Somebody reads, as terminals do.
    let mut reader = run.terminal.try_clone().unwrap();
    thread::spawn(move || while reader.read(&mut [0; 4096]).is_ok_and(|count| count > 0) {});
    assert_eq!(run.end(), Some(0));
}

#[test]
fn the_terminal_is_given_back_after_a_signal() {
    for (signal, status) in [(Signal::TERM, 143), (Signal::HUP, 129)] {
        let run = Run::start();
        kill_process(Pid::from_child(&run.child.0), signal).unwrap();
        assert_eq!(run.end(), Some(status));
    }
}

#[test]
fn the_terminal_is_given_back_after_a_crash() {
    for signal in [Signal::KILL, Signal::ABORT] {
        let run = Run::start();
        kill_process(Pid::from_child(&run.child.0), signal).unwrap();
        assert_eq!(run.end(), None);
    }
}

#[test]
fn the_terminal_is_given_back_when_the_guest_ends_the_run() {
    let mut run = Run::start();
    run.type_keys(&[command::EXIT]);
    assert_eq!(run.end(), Some(33));
}

#[test]
fn a_stopped_run_takes_the_terminal_again() {
    let mut run = Run::start();
    let pid = Pid::from_child(&run.child.0);
    kill_process(pid, Signal::STOP).unwrap();
    // As a shell does.
    let mut modes = tcgetattr(&run.user).unwrap();
    modes.local_modes |= LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG;
    modes.output_modes |= OutputModes::OPOST;
    rustix::termios::tcsetattr(&run.user, rustix::termios::OptionalActions::Now, &modes).unwrap();
    kill_process(pid, Signal::CONT).unwrap();
    let start = Instant::now();
    while !run.is_raw() {
        assert!(start.elapsed() < Duration::from_secs(60));
        thread::sleep(Duration::from_millis(10));
    }
    run.type_keys(b"\x01x");
    assert_eq!(run.end(), Some(0));
}
