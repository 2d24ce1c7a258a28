//! The daemon, as verbs talk to it.

use std::{
    fs::File,
    future::Future,
    io::{self, Write},
    process,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail};
use purlin_api::{
    ErrorBody, Operation, OperationState, Reason,
    client::{Client, ClientError, WebSocket},
};
use purlin_daemon::Places;
use purlin_debian::Progress;
use serde::{Serialize, de::DeserializeOwned};
use tokio::runtime::{Builder, Runtime};

use crate::{daemon, exit::Ended, progress::Shown, remote, signals::Signal, terminal};

/// How long a daemon may take to end.
const PATIENCE: Duration = Duration::from_secs(10);

/// The daemon.
#[derive(Clone)]
pub struct Api {
    runtime: Arc<Runtime>,
    client: Client,
}

impl Api {
    /// The daemon that the user wants: one on another host, or their own.
    pub fn reach() -> Result<Self> {
        let Some(url) = remote::chosen() else { return Self::reach_own() };
        let runtime = runtime()?;
        let remote = remote::find(url, &runtime)?;
        Ok(Self { runtime: Arc::new(runtime), client: Client::of_remote(remote) })
    }

    /// The user's own daemon, here, started if there is none.
    pub fn reach_own() -> Result<Self> {
        let places = daemon::places()?;
        let api = Self::of_running(&places)?;
        if api.try_get::<serde::de::IgnoredAny>("/1.0")?.is_none() {
            daemon::start(&places)?;
        }
        Ok(api)
    }

    /// The daemon at its place, whether it is there or not.
    pub fn of_running(places: &Places) -> Result<Self> {
        Ok(Self { runtime: Arc::new(runtime()?), client: Client::new(&places.socket) })
    }

    /// GET, or nothing where there is no daemon.
    pub fn try_get<T: DeserializeOwned>(&self, path: &str) -> Result<Option<T>> {
        match self.runtime.block_on(self.client.get(path)) {
            Ok(answer) => Ok(Some(answer)),
            Err(ClientError::Connect { .. }) => Ok(None),
            // It was about to end.
            Err(ClientError::Broken { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// GET.
    pub fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        Ok(self.runtime.block_on(self.client.get(path))?)
    }

    /// GET, of what is no JSON.
    pub fn bytes(&self, path: &str) -> Result<Vec<u8>> {
        Ok(self.runtime.block_on(self.client.bytes(path))?)
    }

    /// POST.
    pub fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T> {
        Ok(self.runtime.block_on(self.client.post(path, body))?)
    }

    /// PUT.
    pub fn put<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T> {
        Ok(self.runtime.block_on(self.client.put(path, body))?)
    }

    /// PUT of a file's content, with its progress shown.
    pub fn put_file<T: DeserializeOwned>(&self, path: &str, file: File) -> Result<T> {
        let shown = Shown::new(Arc::default());
        shown.step("sending it");
        Ok(self.runtime.block_on(self.client.put_file(path, file, move |sent| shown.fraction(sent)))?)
    }

    /// PATCH.
    pub fn patch<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T> {
        Ok(self.runtime.block_on(self.client.patch(path, body))?)
    }

    /// DELETE.
    pub fn delete<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        Ok(self.runtime.block_on(self.client.delete(path))?)
    }

    /// A websocket.
    pub fn websocket(&self, path: &str) -> Result<WebSocket> {
        Ok(self.runtime.block_on(self.client.websocket(path))?)
    }

    /// A websocket, or nothing if there is no answer in time.
    pub fn websocket_within(&self, path: &str, time: Duration) -> Option<Result<WebSocket>> {
        let socket = async { tokio::time::timeout(time, self.client.websocket(path)).await };
        self.runtime.block_on(socket).ok().map(|socket| Ok(socket?))
    }

    /// Runs something that waits for several things at once.
    pub fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(future)
    }

    /// Shows an operation's progress until it is over.
    pub fn follow(&self, mut operation: Operation) -> Result<()> {
        let mut shown: Option<Shown> = None;
        let (mut step, mut notes) = (None, 0);
        while operation.state == OperationState::Running {
            let path = format!("/1.0/operations/{}/wait?timeout=60&beyond={}", operation.id, operation.revision);
            operation = self.get(&path)?;
            if operation.step.is_none() && operation.notes.is_empty() {
                continue;
            }
            let shown = shown.get_or_insert_with(|| Shown::new(Arc::default()));
            if let Some(now) = operation.step.as_ref().filter(|now| step.as_ref() != Some(*now)) {
                shown.step(now);
                step = Some(now.clone());
            }
            operation.percent.iter().for_each(|percent| shown.fraction(f64::from(*percent) / 100.0));
            operation.notes.iter().skip(notes).for_each(|note| shown.note(note));
            notes = operation.notes.len();
        }
        drop(shown);
        match operation.error {
            None => Ok(()),
            Some(error) => Err(ClientError::Refused(error).into()),
        }
    }

    /// Waits until nobody has the daemon's place.
    pub fn wait_until_gone(&self, places: &Places) -> Result<()> {
        let start = Instant::now();
        while places.socket.exists() {
            if start.elapsed() > PATIENCE {
                bail!("the daemon does not end");
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

fn runtime() -> Result<Runtime> {
    Builder::new_current_thread().enable_all().build().context("cannot make an event loop")
}

/// Ends the process, which a signal has asked for while the daemon was at work.
pub fn leave(signal: Signal) {
    if terminal::is_shared() {
        // Behind a bar of progress, and the terminal's own ^C.
        let _ = writeln!(io::stderr());
    }
    let name = signal.as_str();
    terminal::say(&format!("ended by {name}; what the daemon has begun goes on: 'purlin monitor' tells of its end"));
    process::exit(128 + signal as i32);
}

/// How a verb ends whose request the daemon refused: what was wrong with the command line is wrong usage.
pub fn ended(done: Result<Ended>) -> Result<Ended> {
    let error = match done {
        Ok(ended) => return Ok(ended),
        Err(error) => error,
    };
    if let Some(ClientError::Untrusted { .. }) = error.downcast_ref() {
        return Err(anyhow!("{error}; {} says which", remote::who_says_which()));
    }
    match error.downcast_ref::<ClientError>().and_then(ClientError::refused) {
        Some(ErrorBody { reason: Reason::BadRequest, message }) => Ok(Ended::WrongUsage(message.clone())),
        Some(ErrorBody { message, .. }) => Err(anyhow!("{message}")),
        None => Err(error),
    }
}
