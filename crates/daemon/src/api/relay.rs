//! Websockets that lead to a machine's process, or into its guest.

use axum::{
    body::Bytes,
    extract::{
        State,
        ws::{Message, WebSocket},
    },
    response::Response,
};
use futures_util::{SinkExt, StreamExt};
use purlin_api::{
    ErrorBody, client,
    server::{Refusal, Segment, Upgrade},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, BufReader},
    net::UnixStream,
};
use tokio_tungstenite::tungstenite;

use super::Shared;

/// Bytes of what is read from a guest at once.
const PIECE: usize = 64 << 10;

/// An instance's console: a websocket of binary messages, which begins with the last output.
#[utoipa::path(get, path = "/1.0/instances/{name}/console", params(("name" = String, Path)), responses(
    (status = 101, description = "a websocket"),
    (status = 400, body = ErrorBody),
    (status = 404, body = ErrorBody),
    (status = 409, body = ErrorBody, description = "it does not run"),
    (status = 503, body = ErrorBody),
))]
pub async fn console(
    State(Shared(shared)): State<Shared>,
    Segment(name): Segment,
    Upgrade(ws): Upgrade,
) -> Result<Response, Refusal> {
    let vm = shared.instances.get(&name)?.running_vm()?;
    let console = vm.console().await?;
    Ok(ws.on_upgrade(|socket| pass_websocket(socket, console)))
}

/// The agent in an instance's guest: a websocket of binary messages, which are pieces of the agent's byte stream
/// (docs/agent-protocol.md).
#[utoipa::path(get, path = "/1.0/instances/{name}/agent", params(("name" = String, Path)), responses(
    (status = 101, description = "a websocket"),
    (status = 400, body = ErrorBody),
    (status = 404, body = ErrorBody),
    (status = 409, body = ErrorBody, description = "it does not run"),
    (status = 503, body = ErrorBody, description = "there is no agent in the guest, or not yet"),
))]
pub async fn agent(
    State(Shared(shared)): State<Shared>,
    Segment(name): Segment,
    Upgrade(ws): Upgrade,
) -> Result<Response, Refusal> {
    let entry = shared.instances.get(&name)?;
    entry.wait_until_renewed().await;
    let stream = entry.running_vm()?.agent().await?;
    Ok(ws.on_upgrade(|socket| pass_stream(socket, stream)))
}

/// Both ways, until one side ends.
async fn pass_websocket(ours: WebSocket, theirs: client::WebSocket) {
    let (mut to_client, mut from_client) = ours.split();
    let (mut to_machine, mut from_machine) = theirs.split();
    let outward = async {
        while let Some(Ok(message)) = from_machine.next().await {
            if let tungstenite::Message::Binary(bytes) = message
                && to_client.send(Message::Binary(bytes)).await.is_err()
            {
                return;
            }
        }
        let _ = to_client.send(Message::Close(None)).await;
    };
    let inward = async {
        while let Some(Ok(message)) = from_client.next().await {
            if let Message::Binary(bytes) = message
                && to_machine.send(tungstenite::Message::Binary(bytes)).await.is_err()
            {
                return;
            }
        }
    };
    tokio::select! {
        () = outward => {}
        () = inward => {}
    }
}

/// Both ways, until one side ends.
async fn pass_stream(socket: WebSocket, stream: BufReader<UnixStream>) {
    let (mut to_client, mut from_client) = socket.split();
    let (mut from_guest, mut to_guest) = tokio::io::split(stream);
    let outward = async {
        let mut piece = vec![0; PIECE];
        while let Ok(length @ 1..) = from_guest.read(&mut piece).await {
            let bytes = Bytes::copy_from_slice(&piece[..length]);
            if to_client.send(Message::Binary(bytes)).await.is_err() {
                return;
            }
        }
        let _ = to_client.send(Message::Close(None)).await;
    };
    let inward = async {
        // A guest that takes no more may have said why: its end is seen where it is read from.
        let mut takes = true;
        while let Some(Ok(message)) = from_client.next().await {
            if let Message::Binary(bytes) = message {
                takes = takes && to_guest.write_all(&bytes).await.is_ok();
            }
        }
    };
    tokio::select! {
        () = outward => {}
        () = inward => {}
    }
}
