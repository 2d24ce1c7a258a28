//! A home of the command's own, for machines that are kept: nothing else of the user's is touched.

use std::{
    fs::{self, File},
    io::{Read, Seek},
    os::unix::fs::symlink,
    path::PathBuf,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow, ensure};
use purlin_debian::home;
use tempfile::TempDir;

use crate::machine::{BedFailed, program};

/// How long things may take that come by themselves, also on a loaded host.
const PATIENCE: Duration = Duration::from_secs(120);

/// A home of its own.
pub struct Home {
    dir: TempDir,
    /// Where things may stand still through no fault of theirs: how long they may take.
    limit: Option<Duration>,
    ended: bool,
}

impl Home {
    /// One with the user's images, and no machine.
    pub fn new() -> Result<Self> {
        let home = Self::empty()?;
        let images = home::data()?.join("images");
        fs::create_dir_all(&images)?;
        fs::create_dir_all(home.dir.path().join("data"))?;
        symlink(images, home.dir.path().join("data/images"))?;
        Ok(home)
    }

    /// One with nothing in it.
    pub fn empty() -> Result<Self> {
        Ok(Self { dir: tempfile::tempdir()?, limit: None, ended: false })
    }

    /// The same in emulated AMD-V: what takes longer than `limit` there, a verb or what comes by itself, is [`BedFailed`].
    pub fn on_test_bed(limit: Duration) -> Result<Self> {
        Ok(Self { dir: tempfile::tempdir()?, limit: Some(limit), ended: false })
    }

    /// Its directory.
    pub fn path(&self) -> PathBuf {
        self.dir.path().to_owned()
    }

    /// The command with these arguments.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(program());
        command.args(arguments).env("PURLIN_HOME", self.dir.path()).env_remove("PURLIN_HOST").stdin(Stdio::null());
        command
    }

    /// Runs a verb that succeeds; what it says.
    pub fn purlin(&self, arguments: &[&str]) -> Result<String> {
        if let Some(limit) = self.limit {
            return self.purlin_within(arguments, limit);
        }
        let output = self.command(arguments).stderr(Stdio::inherit()).output()?;
        ensure!(output.status.success(), "purlin {}: {}", arguments.join(" "), output.status);
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn purlin_within(&self, arguments: &[&str], limit: Duration) -> Result<String> {
        let words = arguments.join(" ");
        // Standard error is no terminal: nobody is to see progress.
        let (out, err) = (tempfile::tempfile()?, tempfile::tempfile()?);
        let mut child = self.command(arguments).stdout(out.try_clone()?).stderr(err.try_clone()?).spawn()?;
        let begin = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            if begin.elapsed() > limit {
                child.kill()?;
                child.wait()?;
                return Err(BedFailed(format!("purlin {words}: not done after {limit:?}")).into());
            }
            thread::sleep(Duration::from_millis(10));
        };
        eprint!("{}", read(err)?);
        ensure!(status.success(), "purlin {words}: {status}");
        read(out)
    }

    /// What a command in a guest says.
    pub fn exec(&self, name: &str, command: &str) -> Result<String> {
        self.purlin(&["exec", name, "--", "sh", "-c", command])
    }

    /// What is said of an instance.
    pub fn info(&self, name: &str) -> Result<serde_json::Value> {
        Ok(serde_json::from_str(&self.purlin(&["info", name, "--json"])?)?)
    }

    /// Waits for something that comes by itself.
    pub fn wait(&self, name: &str, what: &str, is_so: impl Fn(&Self) -> Result<bool>) -> Result<()> {
        let begin = Instant::now();
        while !is_so(self)? {
            if begin.elapsed() > self.limit.unwrap_or(PATIENCE) {
                let vain = format!("{name}: in vain: {what}");
                return Err(if self.limit.is_some() { BedFailed(vain).into() } else { anyhow!(vain) });
            }
            thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }

    /// Deletes everything: nothing is left of it.
    pub fn end(&mut self) -> Result<()> {
        self.ended = true;
        let listed: serde_json::Value = serde_json::from_str(&self.purlin(&["list", "--json"])?)?;
        for instance in listed.as_array().into_iter().flatten() {
            self.purlin(&["delete", "-f", instance["name"].as_str().unwrap_or_default()])?;
        }
        let left = fs::read_dir(self.dir.path().join("data/instances"))?.count();
        ensure!(left == 0, "{left} directories of instances are left");
        self.purlin(&["daemon", "stop"])?;
        Ok(())
    }
}

/// What somebody else has written to a file.
fn read(mut file: File) -> Result<String> {
    let mut bytes = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

impl Drop for Home {
    fn drop(&mut self) {
        // Where a check failed, machines would go on.
        if !self.ended && self.end().is_err() {
            println!("processes of {} may be left", self.dir.path().display());
        }
    }
}
