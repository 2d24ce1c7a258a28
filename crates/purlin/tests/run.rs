//! Runs of a small guest: standard input and output, the ways in which a run ends, and the exit statuses.

mod support;

use std::{
    fs,
    io::{Read, Write},
    process::{ChildStdout, Command, ExitStatus, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, Signal, kill_process},
};
use support::{Kernel, Killed, command, stderr, wait};

/// A run with pipes, whose guest has said that it is ready.
struct Piped {
    child: Killed,
    stdout: Option<ChildStdout>,
}

impl Piped {
    fn start(run: &mut Command) -> Self {
        run.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = Killed(run.spawn().unwrap());
        let stdout = child.0.stdout.take();
        let mut piped = Self { child, stdout };
        assert_eq!(piped.read(6), b"ready\n");
        piped
    }

    fn read(&mut self, count: usize) -> Vec<u8> {
        let (stdout, mut bytes, start) = (self.stdout.as_mut().unwrap(), Vec::new(), Instant::now());
        while bytes.len() < count {
            assert!(start.elapsed() < Duration::from_secs(60), "only {} bytes of {count} came", bytes.len());
            let moment = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
            if poll(&mut [PollFd::new(stdout, PollFlags::IN)], Some(&moment)).unwrap() > 0 {
                let mut part = vec![0; count - bytes.len()];
                let length = stdout.read(&mut part).unwrap();
                assert!(length > 0, "the output ended after {} bytes of {count}", bytes.len());
                bytes.extend(&part[..length]);
            }
        }
        bytes
    }

    fn send(&mut self, bytes: &[u8]) {
        self.child.0.stdin.as_mut().unwrap().write_all(bytes).unwrap();
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child.0), signal).unwrap();
    }

    fn is_running(&mut self) -> bool {
        self.child.0.try_wait().unwrap().is_none()
    }

    /// How it ended, and what it said on standard error; the line about the engine apart.
    fn end(mut self) -> (ExitStatus, Vec<String>) {
        let status = wait(&mut self.child.0);
        let mut text = Vec::new();
        self.child.0.stderr.take().unwrap().read_to_end(&mut text).unwrap();
        let output = Output { status, stdout: vec![], stderr: text };
        (status, stderr(&output).into_iter().filter(|line| !line.contains("engine: ")).collect())
    }
}

#[test]
fn input_reaches_the_guest_and_its_end_does_not_stop_it() {
    let kernel = Kernel::new();
    let mut run = Piped::start(&mut kernel.run());
    run.send(b"abc");
    assert_eq!(run.read(3), b"abc");
    drop(run.child.0.stdin.take());
    thread::sleep(Duration::from_millis(300));
    assert!(run.is_running());
    run.signal(Signal::TERM);
    assert_eq!(run.end().0.code(), Some(143));
}

#[test]
fn nothing_of_a_long_input_is_lost() {
    let kernel = Kernel::new();
    let mut run = Piped::start(&mut kernel.run());
    let sent: Vec<u8> = (0..100_000u32).map(|n| b'a' + (n % 26) as u8).collect();
    let mut stdin = run.child.0.stdin.take().unwrap();
    let copy = sent.clone();
    let writer = thread::spawn(move || {
        stdin.write_all(&copy).unwrap();
        stdin.write_all(&[command::EXIT]).unwrap();
    });
    assert!(run.read(sent.len()) == sent);
    writer.join().unwrap();
    assert_eq!(run.end().0.code(), Some(33));
}

#[test]
fn the_guest_chooses_the_status() {
    let kernel = Kernel::new();
    let mut run = Piped::start(&mut kernel.run());
    run.send(&[command::EXIT]);
    let (status, lines) = run.end();
    assert_eq!((status.code(), lines), (Some(16 << 1 | 1), vec![]));
}

#[test]
fn a_reset_starts_the_guest_again() {
    for how in [command::RESET, command::TRIPLE_FAULT] {
        let kernel = Kernel::new();
        let mut run = Piped::start(&mut kernel.run());
        run.send(&[how]);
        assert_eq!(run.read(6), b"ready\n");
        run.send(&[command::EXIT]);
        assert_eq!(run.end().0.code(), Some(33));
    }
}

#[test]
fn no_reboot_ends_the_run() {
    let kernel = Kernel::new();
    let mut run = Piped::start(kernel.run().arg("--no-reboot"));
    run.send(&[command::RESET]);
    let (status, lines) = run.end();
    assert_eq!((status.code(), lines), (Some(0), vec![]));

    let mut run = Piped::start(kernel.run().arg("--no-reboot"));
    run.send(&[command::TRIPLE_FAULT]);
    let (status, lines) = run.end();
    assert_eq!(status.code(), Some(4));
    assert_eq!(lines.len(), 1, "{lines:#?}");
    assert!(lines[0].contains("rip 0x100"), "where: {lines:#?}");
}

#[test]
fn signals_end_the_run() {
    for (signal, status, name) in
        [(Signal::TERM, 143, "SIGTERM"), (Signal::INT, 130, "SIGINT"), (Signal::HUP, 129, "SIGHUP")]
    {
        let kernel = Kernel::new();
        let run = Piped::start(&mut kernel.run());
        run.signal(signal);
        let (ended, lines) = run.end();
        assert_eq!((ended.code(), lines), (Some(status), vec![format!("purlin: ended by {name}")]));
    }
}

/// As timeout(1) does, which signals the process and its group: the second one must not cut the end short.
#[test]
fn two_signals_at_once_are_one() {
    for _ in 0..5 {
        let kernel = Kernel::new();
        let run = Piped::start(&mut kernel.run());
        run.signal(Signal::TERM);
        thread::sleep(Duration::from_millis(2));
        run.signal(Signal::TERM);
        let (ended, lines) = run.end();
        assert_eq!((ended.code(), lines), (Some(143), vec!["purlin: ended by SIGTERM".to_owned()]));
    }
}

#[test]
fn a_signal_ends_a_run_whose_output_nobody_reads() {
    let kernel = Kernel::new();
    let mut run = Piped::start(&mut kernel.run());
    run.send(&[command::FLOOD]);
    // Until the pipe is full.
    thread::sleep(Duration::from_millis(500));
    run.signal(Signal::TERM);
    assert_eq!(run.end().0.code(), Some(143));
}

#[test]
fn a_lost_standard_output_ends_the_run() {
    let kernel = Kernel::new();
    let mut run = Piped::start(&mut kernel.run());
    drop(run.stdout.take());
    run.send(b"x");
    let (status, lines) = run.end();
    assert_eq!(status.code(), Some(1));
    assert_eq!(lines.len(), 1, "{lines:#?}");
    assert!(lines[0].contains("standard output is lost"), "{lines:#?}");
}

#[test]
fn serial_to_a_file() {
    let kernel = Kernel::new();
    let log = kernel.path("log");
    let mut run = kernel.run();
    run.arg("--serial").arg(format!("file:{}", log.display())).stdin(Stdio::null());
    let mut child = Killed(run.spawn().unwrap());
    let start = Instant::now();
    while fs::read(&log).unwrap_or_default() != b"ready\n" {
        assert!(start.elapsed() < Duration::from_secs(60));
        thread::sleep(Duration::from_millis(20));
    }
    kill_process(Pid::from_child(&child.0), Signal::TERM).unwrap();
    assert_eq!(wait(&mut child.0).code(), Some(143));
}

#[test]
fn debugcon_writes_to_the_output() {
    let kernel = Kernel::new();
    let mut run = Piped::start(kernel.run().args(["--device", "debugcon"]));
    run.send(&[command::DEBUGCON]);
    assert_eq!(run.read(1), b"D");
    run.send(&[command::EXIT]);
    assert_eq!(run.end().0.code(), Some(33));
}
