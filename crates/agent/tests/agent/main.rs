//! The program itself, at a Unix socket of this host.

mod commands;
mod connections;
mod dial;
mod files;
mod hostile;
mod terminals;

use std::{
    os::unix::net::UnixStream,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use purlin_agent::{
    client::{Client, ClientError, Finished},
    protocol::{Exec, Failed, FailureKind},
};
use tempfile::TempDir;

/// Far longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);

const PROGRAM: &str = env!("CARGO_BIN_EXE_purlin-agent");

/// A running agent, and a directory for a test's files.
struct Agent {
    process: Child,
    dir: TempDir,
}

type UnixClient = Client<UnixStream, UnixStream>;

impl Agent {
    fn start() -> Self {
        Self::start_by(&mut Command::new(PROGRAM))
    }

    /// By a command to which its arguments are added.
    fn start_by(command: &mut Command) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let place = format!("unix:{}", dir.path().join("agent").display());
        let process = command.args(["--listen", &place]).stdin(Stdio::null()).spawn().unwrap();
        let agent = Self { process, dir };
        wait_until("the agent listens", || UnixStream::connect(agent.path("agent")).is_ok());
        agent
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn stream(&self) -> UnixStream {
        let stream = UnixStream::connect(self.path("agent")).unwrap();
        // A test that waits in vain fails.
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    fn client(&self) -> UnixClient {
        Client::over(self.stream()).unwrap()
    }

    fn run(&self, exec: Exec, stdin: &[u8]) -> Finished {
        self.client().run(exec, stdin).unwrap()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A command of the user who runs the tests.
fn exec(argv: &[&str]) -> Exec {
    let argv = argv.iter().map(|word| word.as_bytes().to_vec()).collect();
    Exec { argv, user: own_user(), ..Exec::default() }
}

fn sh(script: &str) -> Exec {
    exec(&["sh", "-c", script])
}

fn own_user() -> String {
    rustix::process::geteuid().as_raw().to_string()
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

#[track_caller]
fn failure<T>(result: Result<T, ClientError>) -> Failed {
    match result {
        Err(ClientError::Failed(failed)) => failed,
        Err(other) => panic!("{other:?} instead of a failure that the agent tells"),
        Ok(_) => panic!("it should have failed"),
    }
}

#[track_caller]
fn kind<T>(result: Result<T, ClientError>) -> FailureKind {
    failure(result).kind()
}

/// Patiently: only what never comes fails.
fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < PATIENCE, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Bytes that have no period of a power of two.
fn noise(length: usize) -> Vec<u8> {
    (0..length as u32).map(|number| (number.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}
