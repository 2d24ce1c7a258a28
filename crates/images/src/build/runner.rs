//! Runs the build's script: what it says becomes progress, or the reason for a failure.

use std::{
    collections::VecDeque,
    io::{BufRead, BufReader, Read},
    os::unix::process::CommandExt,
    process::{Child, Command, Stdio},
    sync::mpsc::{self, RecvTimeoutError, Sender},
    thread,
    time::Duration,
};

use purlin_debian::{Error as HostError, Progress};
use rustix::process::{Pid, Signal, kill_process_group};

use super::tools;
use crate::Error;

/// Follows a script.
pub struct Runner<'a> {
    progress: &'a dyn Progress,
    packages: Packages,
    errors: Vec<String>,
    last: VecDeque<String>,
}

/// How many packages are to be installed in this step, and how many are.
#[derive(Default)]
struct Packages {
    all: usize,
    done: usize,
}

impl<'a> Runner<'a> {
    /// Tells `progress`, and asks it whether to go on.
    pub fn new(progress: &'a dyn Progress) -> Self {
        Self { progress, packages: Packages::default(), errors: vec![], last: VecDeque::new() }
    }

    /// Runs the command to its end. If it is cancelled, all that it started is killed.
    pub fn run(mut self, command: &mut Command) -> Result<(), Error> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // dpkg asks no questions; messages are read below. A group of its own, to be killed as one.
        command.env("LC_ALL", "C.UTF-8").env("DEBIAN_FRONTEND", "noninteractive").process_group(0);
        let program = command.get_program().to_string_lossy().into_owned();
        let mut child = command.spawn().map_err(tools::not_started(&program))?;
        let watch = Watch::over(&child).inspect_err(|_| kill(&child))?;
        let followed = self.follow(&mut child);
        if followed.is_err() {
            kill(&child);
        }
        drop(watch);
        let status = child.wait().map_err(tools::not_started(&program))?;
        followed?;
        if status.success() { Ok(()) } else { Err(self.failure()) }
    }

    fn follow(&mut self, child: &mut Child) -> Result<(), Error> {
        let (sender, lines) = mpsc::channel();
        if let Some(pipe) = child.stdout.take() {
            pass_lines(pipe, sender.clone());
        }
        if let Some(pipe) = child.stderr.take() {
            pass_lines(pipe, sender);
        }
        loop {
            match lines.recv_timeout(Duration::from_millis(100)) {
                Ok(line) => self.line(&line),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            }
            if self.progress.cancelled() {
                return Err(HostError::Cancelled.into());
            }
        }
    }

    /// One line of the script's, mmdebstrap's, apt's or dpkg's.
    fn line(&mut self, line: &str) {
        if let Some(step) = line.strip_prefix("purlin: step ") {
            self.progress.step(step);
            self.packages = Packages::default();
        } else if let Some(count) =
            line.split_once(" newly installed").and_then(|(before, _)| before.rsplit(' ').next())
        {
            self.packages.all += count.parse::<usize>().unwrap_or(0);
        } else if line.starts_with("Setting up ") || line.starts_with("Unpacking ") {
            self.packages.done += 1;
            // Each is unpacked, then set up.
            self.progress.fraction(self.packages.done as f64 / (2 * self.packages.all).max(1) as f64);
        }
        let line = line.trim();
        if line.starts_with("E: ") || line.starts_with("mke2fs: ") {
            self.errors.push(line.trim_start_matches("E: ").to_owned());
        }
        if !line.is_empty() {
            self.last.push_back(line.to_owned());
            self.last.drain(..self.last.len().saturating_sub(5));
        }
    }

    fn failure(&self) -> Error {
        // The first is the cause, "apt-get failed" and the like follow from it; but of a script's failure only the lines
        // before tell.
        let reason = match self.errors.first() {
            Some(error) if !error.contains("command failed") => error.clone(),
            _ => self.last.iter().map(String::as_str).collect::<Vec<_>>().join(" / "),
        };
        let all = self.errors.join(" ");
        let advice = match all.contains("No space left") || all.contains("enough free space") {
            true => "free some space, or set PURLIN_HOME to a directory on another disk",
            false if all.contains("fetch") || all.contains("resolv") || all.contains("onnect") => {
                "check the network (and http_proxy, if you need one), then try again"
            }
            false => "see whether 'apt-get update' works on this host, then try again",
        };
        Error::Build { reason, advice }
    }
}

/// Where a namespace's first process dies, all in it die; of the others the group must do.
fn kill(child: &Child) {
    if let Some(group) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        // It may have ended by itself.
        let _ = kill_process_group(group, Signal::KILL);
    }
}

/// A process that kills a group at the end of this process, however violent: the group's would go on otherwise, and write
/// into a directory that the next build removes.
struct Watch {
    process: Child,
}

impl Watch {
    fn over(group: &Child) -> Result<Self, Error> {
        // The pipe ends when this process does.
        let script = "read -r _; kill -s KILL -- \"-$1\"";
        let mut command = Command::new("sh");
        command.args(["-c", script, "sh", &group.id().to_string()]);
        // What kills this process's group spares it.
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
        Ok(Self { process: command.spawn().map_err(tools::not_started("sh"))? })
    }
}

impl Drop for Watch {
    /// The group has ended: from here on its number may be another's.
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn pass_lines(pipe: impl Read + Send + 'static, lines: Sender<String>) {
    thread::spawn(move || {
        let mut reader = BufReader::new(pipe);
        let mut line = Vec::new();
        while reader.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
            if lines.send(String::from_utf8_lossy(&line).trim_end().to_owned()).is_err() {
                break;
            }
            line.clear();
        }
    });
}

#[cfg(test)]
mod tests {
    use std::{os::unix::process::ExitStatusExt, sync::Mutex};

    use super::*;

    #[derive(Default)]
    struct Listener {
        steps: Mutex<Vec<String>>,
        fractions: Mutex<Vec<f64>>,
        cancel: bool,
    }

    impl Progress for Listener {
        fn step(&self, what: &str) {
            self.steps.lock().unwrap().push(what.into());
        }
        fn fraction(&self, done: f64) {
            self.fractions.lock().unwrap().push(done);
        }
        fn note(&self, _what: &str) {}
        fn cancelled(&self) -> bool {
            self.cancel
        }
    }

    fn run(script: &str, listener: &Listener) -> Result<(), Error> {
        Runner::new(listener).run(Command::new("sh").args(["-c", script]))
    }

    #[test]
    fn what_is_said_becomes_progress() {
        let listener = Listener::default();
        let script = "echo 'purlin: step one'; echo '0 upgraded, 2 newly installed, 0 to remove.' >&2; echo 'Setting up x (1) ...'";
        run(script, &listener).unwrap();
        assert_eq!(*listener.steps.lock().unwrap(), ["one"]);
        assert!(listener.fractions.lock().unwrap().iter().all(|f| (0.0..=1.0).contains(f)));
    }

    #[test]
    fn each_step_is_counted_by_itself() {
        let listener = Listener::default();
        let round = "echo '0 upgraded, 1 newly installed, 0 to remove.'; echo 'Unpacking x'; echo 'Setting up x'";
        run(&format!("echo 'purlin: step a'; {round}; echo 'purlin: step b'; {round}"), &listener).unwrap();
        assert_eq!(*listener.steps.lock().unwrap(), ["a", "b"]);
        assert_eq!(*listener.fractions.lock().unwrap(), [0.5, 1.0, 0.5, 1.0]);
    }

    #[test]
    fn the_first_error_is_the_reason() {
        let error = run("echo 'E: Failed to fetch x' >&2; echo 'E: apt-get failed' >&2; exit 3", &Listener::default());
        let text = error.unwrap_err().to_string();
        assert!(text.contains("Failed to fetch x; check the network"), "{text}");
    }

    #[test]
    fn what_is_watched_dies_with_this_process() {
        let mut command = Command::new("sh");
        command.args(["-c", "sleep 1000 & sleep 1000"]).process_group(0);
        let mut child = command.spawn().unwrap();
        let mut watch = Watch::over(&child).unwrap();
        // As the kernel closes it then.
        drop(watch.process.stdin.take());
        assert_eq!(child.wait().unwrap().signal(), Some(9));
    }

    #[test]
    fn a_cancelled_script_dies_with_what_it_started() {
        let listener = Listener { cancel: true, ..Listener::default() };
        // It holds the pipe: without being killed the run would not end.
        let error = run("sleep 1000 & sleep 1000", &listener);
        assert!(matches!(error, Err(Error::Host(HostError::Cancelled))));
    }
}
