//! README's `… | purlin run shell`: the shell gets what is piped in, all of it, and the run ends well.

use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::{
    machine::{self, Boot},
    shell::target,
};

/// All of it is in the pipe before the guest runs.
const INPUT: &str = "echo $(nproc) processors\ngrep SigIgn /proc/self/status\npoweroff\n";

/// Runs it.
pub fn run() -> Result<()> {
    machine::build()?;
    let mut purlin = Command::new(machine::program());
    purlin.args(["run", "shell", "--cpus", "2"]).env("PURLIN_HOME", target().join("xtask/home"));
    let boot = Boot::run_with(purlin, INPUT, "piped")?;
    check(&boot).context("what was piped in; see target/xtask/boot/piped.log")
}

fn check(boot: &Boot) -> Result<()> {
    ensure!(boot.transcript.contains("2 processors"), "the shell did not run what was piped in");
    let ignored = boot.transcript.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = ignored.and_then(|set| u64::from_str_radix(set.trim(), 16).ok()).context("no set of signals")?;
    ensure!(ignored & SIGINT == 0, "Ctrl-C would not reach what runs in the shell: it ignores {ignored:#x}");
    ensure!(boot.transcript.contains("reboot: Power down"), "the guest did not power off");
    ensure!(boot.status.code() == Some(0), "{}", boot.status);
    Ok(())
}

/// Signal 2, in a set of signals as proc(5) shows them.
const SIGINT: u64 = 1 << (2 - 1);
