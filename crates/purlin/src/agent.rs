//! The way to the agent in a machine's guest: a websocket of the daemon's, as a stream.

use std::{
    io,
    os::unix::net::UnixStream,
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use futures_util::{SinkExt, StreamExt};
use purlin_agent::client::{Client, ClientError};
use purlin_api::{
    Reason,
    client::{self, WebSocket},
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_tungstenite::tungstenite::Message;

use crate::{client::Api, terminal};

/// A connection to an agent.
pub type Agent = Client<UnixStream, UnixStream>;

/// Bytes that are relayed at once.
const PIECE: usize = 64 << 10;
/// How often a guest that is still booting is asked again.
const AGAIN: Duration = Duration::from_millis(50);
/// How long it is waited for before the user is told.
const SILENCE: Duration = Duration::from_secs(2);

/// Connects to the agent of machine `name`, within `patience` if it is not up yet.
pub fn connect(name: &str, patience: Duration) -> Result<Agent> {
    let api = Api::reach()?;
    let _waiting = Waiting::begin(name);
    let begin = Instant::now();
    let path = format!("/1.0/instances/{name}/agent");
    loop {
        let left = patience.saturating_sub(begin.elapsed());
        // A guest that does not even refuse holds this up.
        match api.websocket_within(&path, left.max(AGAIN)) {
            None if left.is_zero() => return Err(ClientError::NoAgent.into()),
            None => {}
            Some(Ok(socket)) => match Client::over(relay(api.clone(), socket)?) {
                Err(ClientError::Ended | ClientError::NoAgent) if !left.is_zero() => {}
                client => return Ok(client?),
            },
            Some(Err(error)) if left.is_zero() || !is_not_yet(&error) => return Err(error),
            Some(Err(_)) => {}
        }
        thread::sleep(AGAIN);
    }
}

/// Tells the user what is waited for, if it is for long. Its end is that of the waiting.
struct Waiting(#[allow(dead_code, reason = "it is dropped")] mpsc::Sender<()>);

impl Waiting {
    fn begin(name: &str) -> Self {
        let (sender, ended) = mpsc::channel();
        let line = format!("'{name}' is still booting: waiting for its agent");
        thread::spawn(move || {
            if ended.recv_timeout(SILENCE) == Err(RecvTimeoutError::Timeout) {
                terminal::say(&line);
            }
        });
        Self(sender)
    }
}

/// Whether the guest is there, and its agent not.
fn is_not_yet(error: &anyhow::Error) -> bool {
    let refused = error.downcast_ref().and_then(client::ClientError::refused);
    refused.is_some_and(|body| body.reason == Reason::Unavailable)
}

/// The websocket as one end of a pair of sockets; a thread passes what comes, until either side ends.
fn relay(api: Api, socket: WebSocket) -> Result<UnixStream> {
    let (ours, theirs) = UnixStream::pair().context("cannot make sockets")?;
    theirs.set_nonblocking(true).context("cannot make sockets")?;
    thread::spawn(move || {
        // Its end is the end of the stream.
        let _ = api.block_on(pass(socket, theirs));
    });
    Ok(ours)
}

async fn pass(socket: WebSocket, stream: UnixStream) -> io::Result<()> {
    let (mut reader, mut writer) = tokio::net::UnixStream::from_std(stream)?.into_split();
    let (mut to_guest, mut from_guest) = socket.split();
    let outward = async {
        let mut piece = vec![0; PIECE];
        // A guest that takes no more may have said why: its end is seen where it is read from.
        let mut takes = true;
        while let Ok(length @ 1..) = reader.read(&mut piece).await {
            let bytes = piece[..length].to_vec();
            takes = takes && to_guest.send(Message::Binary(bytes.into())).await.is_ok();
        }
        let _ = to_guest.close().await;
    };
    let inward = async {
        while let Some(Ok(message)) = from_guest.next().await {
            if let Message::Binary(bytes) = message
                && writer.write_all(&bytes).await.is_err()
            {
                return;
            }
        }
    };
    tokio::select! {
        () = outward => {}
        () = inward => {}
    }
    Ok(())
}
