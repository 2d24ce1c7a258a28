//! A guest under purlin or QEMU, and what it said.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use clap::ValueEnum;
use purlin_debian::guest::Guest;

use crate::{
    footprint,
    shell::{cargo, describe, run, target},
};

/// Far more than a boot takes, also on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(120);
/// A guest that boots says something more often than that, also on a loaded machine.
const SILENCE: Duration = Duration::from_secs(45);

/// Purlin's engines, each with the accelerator of QEMU's that it is measured against.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Engine {
    /// Against QEMU's TCG.
    Translator,
    /// Against QEMU with KVM, both inside emulated AMD-V.
    Kvm,
}

impl Engine {
    /// As for `purlin run --engine`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Translator => "translator",
            Self::Kvm => "kvm",
        }
    }

    fn qemu_arguments(self) -> [&'static str; 4] {
        match self {
            Self::Translator => ["-accel", "tcg", "-cpu", "max"],
            Self::Kvm => ["-accel", "kvm", "-cpu", "host"],
        }
    }
}

/// The `purlin` that users get.
pub fn program() -> PathBuf {
    target().join("release/purlin")
}

/// `purlin run` with this guest.
pub fn purlin(guest: &Guest, cpus: u32, engine: Engine) -> Command {
    purlin_with(&program(), engine, guest, cpus, MEMORY)
}

/// The same by another `purlin`, with so many MiB of memory.
pub fn purlin_with(program: &Path, engine: Engine, guest: &Guest, cpus: u32, memory: u32) -> Command {
    let mut command = Command::new(program);
    command.args(["run", "--no-reboot", "--engine", engine.name(), "--cmdline", CMDLINE]);
    command.arg("--memory").arg(format!("{memory}M")).arg("--cpus").arg(cpus.to_string());
    command.arg("--kernel").arg(&guest.kernel).arg("--initrd").arg(&guest.initrd);
    command
}

/// QEMU with as few devices as it has.
pub fn qemu(guest: &Guest, cpus: u32, engine: Engine) -> Command {
    qemu_with(&engine.qemu_arguments(), guest, cpus, MEMORY)
}

/// The same with another accelerator or processor, and so many MiB of memory.
pub fn qemu_with(accelerator: &[&str], guest: &Guest, cpus: u32, memory: u32) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command.args(accelerator).args(["-nodefaults", "-no-user-config", "-no-reboot"]);
    command.args(["-display", "none", "-serial", "stdio", "-append", CMDLINE]);
    command.arg("-m").arg(memory.to_string()).arg("-smp").arg(cpus.to_string());
    command.arg("-kernel").arg(&guest.kernel).arg("-initrd").arg(&guest.initrd);
    command
}

/// MiB of memory, if not said otherwise.
const MEMORY: u32 = 512;
const CMDLINE: &str = "console=ttyS0";

/// Builds [`program`].
pub fn build() -> Result<()> {
    run(&mut cargo(&["build", "--release", "--locked", "--package", "purlin"]))
}

/// A run of a guest that has ended.
pub struct Boot {
    /// What it wrote to its console.
    pub transcript: String,
    /// What the monitor wrote to standard error.
    pub messages: String,
    /// How the monitor ended.
    pub status: ExitStatus,
    /// From the start of the monitor to the first line from userspace.
    pub to_userspace: Option<Duration>,
}

impl Boot {
    /// Runs the command until it ends; the transcript also goes to `target/xtask/boot/NAME.log`.
    pub fn run(command: Command, name: &str) -> Result<Self> {
        Self::follow(command, "", name, SILENCE)
    }

    /// The same with something on standard input, which must fit into a pipe.
    pub fn run_with(command: Command, input: &str, name: &str) -> Result<Self> {
        // What obtains its guest first says nothing on the console until it has it.
        Self::follow(command, input, name, PATIENCE)
    }

    fn follow(mut command: Command, input: &str, name: &str, silence: Duration) -> Result<Self> {
        let start = Instant::now();
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start: {}", describe(&command)))?;
        if let Some(mut pipe) = child.stdin.take() {
            // Where the program has ended before it read this, its status tells more.
            let _ = pipe.write_all(input.as_bytes());
        }
        let messages = child.stderr.take().map(|pipe| thread::spawn(move || read_lines(pipe, |_| {})));
        let (sender, userspace) = mpsc::channel();
        let (said, lines) = mpsc::channel();
        let transcript = child.stdout.take().map(|pipe| {
            thread::spawn(move || {
                read_lines(pipe, |line| {
                    // Nobody listens any more once it has ended.
                    let _ = said.send(());
                    if line.contains("purlin-test: userspace") {
                        // Only the first is received.
                        let _ = sender.send(start.elapsed());
                    }
                })
            })
        });
        let status = wait(&mut child, start, &lines, silence);
        let collect =
            |reader: Option<thread::JoinHandle<String>>| reader.and_then(|r| r.join().ok()).unwrap_or_default();
        let (transcript, messages) = (collect(transcript), collect(messages));
        let log = log(name, &transcript, &messages)?;
        let status = status.with_context(|| {
            format!("{}; see {}\n{}", describe(&command), log.display(), tail(&transcript, &messages))
        })?;
        Ok(Self { transcript, messages, status, to_userspace: userspace.try_recv().ok() })
    }

    /// The last that was said, for a message.
    pub fn tail(&self) -> String {
        tail(&self.transcript, &self.messages)
    }

    /// What the guest's process 1 says under this name.
    pub fn says(&self, name: &str) -> impl Iterator<Item = &str> {
        let name = format!("purlin-test: {name}");
        self.transcript.lines().filter_map(move |line| Some(line.split_once(&name)?.1.trim()))
    }
}

/// The last lines: where the guest is inside another one, its log is lost with that.
fn tail(transcript: &str, messages: &str) -> String {
    let lines: Vec<_> = transcript.lines().chain(messages.lines()).collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}

/// Where nothing is known of Purlin's guest: it did not come to its end, or QEMU's did not.
#[derive(Debug)]
pub struct BedFailed(pub String);

impl std::fmt::Display for BedFailed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for BedFailed {}

/// What each thread of a process and its descendants does: its name, state and times, the system call that it is in, where
/// it sleeps.
fn threads(process: u32) -> String {
    let tasks = |process| fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    let tasks = footprint::family(process).unwrap_or_default().into_iter().flat_map(tasks);
    let of = |task: &Path, file: &str| fs::read_to_string(task.join(file)).unwrap_or_default();
    let describe = |task: fs::DirEntry| {
        let task = task.path();
        format!("{}{}{}\n", of(&task, "stat"), of(&task, "syscall"), of(&task, "stack"))
    };
    tasks.map(describe).collect()
}

/// Waits for the end of a guest whose console sends to `lines` as it says something, unless it is silent for so long.
fn wait(child: &mut Child, start: Instant, lines: &mpsc::Receiver<()>, silence: Duration) -> Result<ExitStatus> {
    let mut heard = start;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if lines.try_iter().count() > 0 {
            heard = Instant::now();
        }
        if start.elapsed() > PATIENCE || heard.elapsed() > silence {
            let threads = threads(child.id());
            child.kill()?;
            child.wait()?;
            return Err(BedFailed(format!(
                "silent for {silence:?}, or not ended after {PATIENCE:?}; its threads, as proc(5) shows them:\n{threads}"
            ))
            .into());
        }
        thread::sleep(Duration::from_millis(10));
    }
}

fn read_lines(pipe: impl std::io::Read, mut each: impl FnMut(&str)) -> String {
    let (mut reader, mut text, mut line) = (BufReader::new(pipe), String::new(), Vec::new());
    while reader.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
        let decoded = String::from_utf8_lossy(&line);
        each(&decoded);
        text.push_str(&decoded);
        line.clear();
    }
    text
}

fn log(name: &str, transcript: &str, messages: &str) -> Result<PathBuf> {
    let dir = target().join("xtask/boot");
    std::fs::create_dir_all(&dir)?;
    let path = dir.join(format!("{name}.log"));
    std::fs::write(&path, format!("{transcript}\n-- standard error --\n{messages}"))?;
    Ok(path)
}
