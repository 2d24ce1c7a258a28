//! The process of one VM that is kept: started by the daemon, steered through a control socket, and not ended by the
//! daemon's end.
//!
//! It is the same program once more, with the machine's directory as its argument ([`VERB`]). Beside that it finds
//! what to run ([`vm::spec_of`]) and takes the lock ([`vm::lock_of`]) that says for as long as it lives that the machine runs; in it it listens at
//! its sockets, and in the end says how the run ended ([`vm::END`]). Standard output has one line: [`vm::Ready`].

mod console;
mod control;
mod freezer;
mod freezes;
mod sandbox;
mod shares;
mod start;

use std::{
    fs,
    io::{self, Write},
    path::Path,
    process::ExitCode,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use purlin_api::vm::{self, Ready};
use rustix::fs::Mode;
use tokio::{
    net::UnixListener,
    signal::unix::{SignalKind, signal},
    sync::watch,
};

use self::{
    control::Shared,
    start::{Started, start},
};
pub use self::{control::description, shares::shares};
use crate::config::Outcome;

/// The hidden verb by which the program becomes a VM's process: it then calls [`main`] with the argument behind.
pub const VERB: &str = "__vmm";

/// How long answers that are under way may take once the run is over.
const LAST_ANSWERS: Duration = Duration::from_secs(1);

/// Runs the machine in `dir` to its end.
pub fn main(dir: &Path) -> ExitCode {
    let _ = rustix::thread::set_name(c"purlin-vm");
    // What is in the directory is the machine's user's to use: others cannot enter it.
    rustix::process::umask(Mode::WGRP | Mode::WOTH);
    match run(dir) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            say(&Ready::Failed(error));
            ExitCode::FAILURE
        }
    }
}

fn run(dir: &Path) -> Result<(), purlin_api::ErrorBody> {
    let lock = start::enter(dir)?;
    let started = start(dir).inspect_err(|error| {
        // That the disk is full, too, is told by what is missing then.
        let _ =
            write_end(&vm::End { time: now(), crashed: true, message: format!("it could not be started: {error}") });
    })?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|e| start::failed(format!("cannot make the control socket's event loop: {e}")))?;
    let end = runtime.block_on(serve(started));
    runtime.shutdown_timeout(LAST_ANSWERS);
    let written = write_end(&end).map_err(|e| start::failed(format!("cannot write {}: {e}", vm::END)));
    // Only now another process may run the machine.
    drop(lock);
    written
}

/// Serves the control socket until the run is over, and says how it ended.
async fn serve(started: Started) -> vm::End {
    let Started { running, console, control, freezer, governor, network, about } = started;
    let running = Arc::new(running);
    let (ended, end) = watch::channel(None);
    let shared = Shared { running: running.clone(), console, freezer, governor, about, end: end.clone() };
    say(&Ready::Started(shared.process()));
    let listening = UnixListener::from_std(control).map(|listener| tokio::spawn(control::serve(listener, shared)));
    tokio::spawn(obey_signals(running.clone()));
    let outcome = tokio::task::spawn_blocking(move || running.wait()).await;
    let outcome = outcome.unwrap_or(Outcome::Quit);
    let end = end_of(&outcome);
    let _ = ended.send(Some(end.clone()));
    if let Ok(server) = listening {
        // Who waits for the end hears of it.
        tokio::time::sleep(Duration::from_millis(20)).await;
        server.abort();
    }
    drop(network);
    // Nobody connects any more.
    let _ = fs::remove_file(vm::CONTROL);
    end
}

/// SIGTERM is the power button, once, and then the end.
async fn obey_signals(running: Arc<crate::Running>) {
    let Ok(mut terminate) = signal(SignalKind::terminate()) else { return };
    let mut pressed = false;
    while terminate.recv().await.is_some() {
        if std::mem::replace(&mut pressed, true) || running.press_power_button().is_err() {
            running.stop();
        }
    }
}

fn end_of(outcome: &Outcome) -> vm::End {
    vm::End { time: now(), crashed: matches!(outcome, Outcome::Crashed { .. }), message: outcome.to_string() }
}

/// Milliseconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64
}

/// Whole or not at all: somebody else reads it when this process is gone.
fn write_end(end: &vm::End) -> io::Result<()> {
    let new = format!("{}.new", vm::END);
    fs::write(&new, serde_json::to_vec(end)?)?;
    fs::rename(new, vm::END)
}

/// Tells whoever started this process, and nobody else: standard output is closed behind it.
fn say(ready: &Ready) {
    let mut line = serde_json::to_vec(ready).unwrap_or_default();
    line.push(b'\n');
    let mut stdout = io::stdout().lock();
    // Nobody listens if the daemon is gone; the machine runs all the same.
    let _ = stdout.write_all(&line).and_then(|()| stdout.flush());
    if let Ok(null) = fs::File::options().write(true).open("/dev/null") {
        let _ = rustix::stdio::dup2_stdout(&null);
    }
}
