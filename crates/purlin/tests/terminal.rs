//! Runs on a terminal: the keys, and that the terminal is given back however the run ends.

mod support;

use std::{
    io::Read,
    ops::{Deref, DerefMut},
    thread,
    time::{Duration, Instant},
};

use rustix::{
    process::{Pid, Signal, kill_process},
    termios::{LocalModes, OutputModes, tcgetattr},
};
use support::{Kernel, command, terminal::OnTerminal};

/// A run on a terminal, whose guest has said that it is ready.
struct Run {
    on: OnTerminal,
    _kernel: Kernel,
}

impl Deref for Run {
    type Target = OnTerminal;

    fn deref(&self) -> &OnTerminal {
        &self.on
    }
}

impl DerefMut for Run {
    fn deref_mut(&mut self) -> &mut OnTerminal {
        &mut self.on
    }
}

impl Run {
    fn start() -> Self {
        let kernel = Kernel::new();
        let mut run = Self { on: OnTerminal::start(&mut kernel.run()), _kernel: kernel };
        run.expect("ready\n");
        assert!(run.is_raw());
        run
    }

    fn end(mut self) -> Option<i32> {
        self.on.end().code()
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
