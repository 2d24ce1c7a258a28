//! Who runs the rows: the host itself, QEMU's TCG or a purlin. Each is one column of the table.

use std::{path::PathBuf, process::Command, time::Duration};

use anyhow::{Context, Result};
use purlin_debian::guest::Guest;

use super::{Agent, Answer, Row, Sample, files::Files, rows::Kind};
use crate::machine::{self, Boot, Engine};

/// MiB of memory that a guest has.
pub const MEMORY: u32 = 1024;
/// What the machine has whose boot is timed: as in `cargo xtask boot`.
const SMALL_MEMORY: u32 = 512;

/// How far a guest's clock may be from the host's: this part, and the time that a line takes.
const CLOCK: (f64, Duration) = (0.05, Duration::from_millis(20));

/// Who runs the rows.
pub enum Runner {
    /// The host's processor.
    Native,
    /// QEMU's TCG with this processor model.
    Tcg(&'static str),
    /// The translator of the purlin in this file.
    Purlin(PathBuf),
}

impl Runner {
    /// The command that starts a guest; there is none natively.
    pub fn machine(&self, guest: &Guest, cpus: u32, memory: u32) -> Option<Command> {
        match self {
            Self::Native => None,
            Self::Tcg(model) => Some(machine::qemu_with(&["-accel", "tcg", "-cpu", model], guest, cpus, memory)),
            Self::Purlin(program) => Some(machine::purlin_with(program, Engine::Translator, guest, cpus, memory)),
        }
    }

    /// The command that starts the agent.
    fn agent(&self, files: &Files) -> Command {
        self.machine(&files.guest, 1, MEMORY).unwrap_or_else(|| native(files))
    }

    /// A name, which others may have, too.
    pub fn name(&self) -> String {
        match self {
            Self::Native => "native".into(),
            Self::Tcg(model) => format!("tcg-{model}"),
            Self::Purlin(_) => "purlin".into(),
        }
    }
}

/// In the guest's own files, with memory at /tmp as there.
fn native(files: &Files) -> Command {
    let mut command = Command::new("unshare");
    let script = r#"mount -t tmpfs tmpfs "$0/tmp" && exec chroot "$0" /bench pin"#;
    command.args(["--map-root-user", "--mount", "sh", "-c", script]).arg(&files.root);
    command
}

/// A column of the table.
pub struct Column {
    /// What is above it.
    pub name: String,
    /// Who runs its rows.
    pub runner: Runner,
    /// What it is asked through.
    pub agent: Agent,
    /// Why it is not asked any more.
    pub failed: Option<String>,
}

impl Column {
    /// Starts it under this name.
    pub fn start(runner: Runner, name: String, files: &Files) -> Result<Self> {
        let agent = Agent::start(runner.agent(files), !matches!(runner, Runner::Native), &name, &files.dir)?;
        Ok(Self { name, runner, agent, failed: None })
    }

    /// Runs a row, if it can.
    pub fn measure(&mut self, row: &Row, files: &Files) -> Option<Sample> {
        if self.failed.is_some() {
            return None;
        }
        let answer = if row.kind == Kind::Boot { self.boot(&files.small) } else { self.agent.run(row.name) };
        match answer {
            Ok(Answer::Done(sample)) => {
                self.check_clock(row, &sample);
                Some(sample)
            }
            Ok(Answer::Unable) => None,
            Err(error) => {
                let reason = format!("{error:#}");
                println!("{}: {}: {reason}", self.name, row.name);
                self.failed = Some(reason);
                None
            }
        }
    }

    /// Boots a machine of its own, and takes the time from its start to userspace.
    fn boot(&self, guest: &Guest) -> Result<Answer> {
        let Some(command) = self.runner.machine(guest, 1, SMALL_MEMORY) else { return Ok(Answer::Unable) };
        let boot = Boot::run(command, &format!("bench-{}", self.name))?;
        let wall = boot.to_userspace.with_context(|| format!("it does not reach userspace: {}", boot.tail()))?;
        Ok(Answer::Done(Sample { wall, own: wall, processor: wall, checksum: String::new() }))
    }

    /// The host's clock counts; a guest's that says something else is worth a word.
    fn check_clock(&self, row: &Row, sample: &Sample) {
        let (part, line) = CLOCK;
        if sample.wall.abs_diff(sample.own) > sample.wall.mul_f64(part) + line {
            println!("{}: {} took {:.0?}, by its own clock {:.0?}", self.name, row.name, sample.wall, sample.own);
        }
    }
}
