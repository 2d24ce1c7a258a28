//! A home of the command's own, for machines that are kept: nothing else of the user's is touched.

use std::{
    fs,
    os::unix::fs::symlink,
    path::PathBuf,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use purlin_debian::home;
use tempfile::TempDir;

use crate::machine::program;

/// How long things may take that come by themselves, also on a loaded host.
const PATIENCE: Duration = Duration::from_secs(120);

/// A home of its own.
pub struct Home {
    dir: TempDir,
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
        Ok(Self { dir: tempfile::tempdir()?, ended: false })
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
        let output = self.command(arguments).stderr(Stdio::inherit()).output()?;
        ensure!(output.status.success(), "purlin {}: {}", arguments.join(" "), output.status);
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
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
            ensure!(begin.elapsed() < PATIENCE, "{name}: in vain: {what}");
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

impl Drop for Home {
    fn drop(&mut self) {
        // Where a check failed, machines would go on.
        if !self.ended && self.end().is_err() {
            println!("processes of {} may be left", self.dir.path().display());
        }
    }
}
