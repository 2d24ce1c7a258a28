//! Chores that run beside others: most keep one core busy, and a test machine has two.

use std::{
    env,
    fs::{self, File},
    path::PathBuf,
    process::{Command, Stdio},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

use crate::shell::target;

/// Chores, one after the other, of which nothing is printed before they are all done.
pub struct Lane {
    name: &'static str,
    log: PathBuf,
    thread: JoinHandle<Result<Duration>>,
}

impl Lane {
    /// Starts `cargo xtask CHORE` for each, until one fails.
    pub fn start(name: &'static str, chores: &'static [&'static [&'static str]]) -> Result<Self> {
        let dir = target().join("xtask");
        fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let log = dir.join(format!("{name}.log"));
        let file = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        let thread = thread::spawn(move || {
            let start = Instant::now();
            chores.iter().try_for_each(|chore| run(chore, &file)).map(|()| start.elapsed())
        });
        println!("== {name}: beside what follows; see {}", log.display());
        Ok(Self { name, log, thread })
    }

    /// Waits for the end of them all, and prints what they said.
    pub fn finish(self) -> Result<()> {
        let done = self.thread.join().expect("a lane does not panic");
        println!("== {}\n{}", self.name, String::from_utf8_lossy(&fs::read(&self.log)?));
        println!("== {}: passed in {:.0?}", self.name, done?);
        Ok(())
    }
}

fn run(chore: &[&str], log: &File) -> Result<()> {
    let mut program = Command::new(env::current_exe()?);
    program.args(chore).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log.try_clone()?);
    let status = program.status().context("cannot run this program")?;
    ensure!(status.success(), "cargo xtask {}: {status}", chore.join(" "));
    Ok(())
}
