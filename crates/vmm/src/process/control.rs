//! The control API: HTTP over the Unix socket in the machine's directory, which only the host's user can reach.

use std::{net::SocketAddr, sync::Arc};

use axum::{
    Json, Router,
    body::Bytes,
    extract::{
        State, WebSocketUpgrade,
        ws::{Message, WebSocket},
    },
    response::Response,
    routing::{delete, get, post, put},
};
use purlin_api::{
    ErrorBody, Reason,
    server::{self, Body, Refusal, Segment},
    vm::{self, Act, Action, Cap, Freeze, SetMemory, SnapshotTaken, TakeSnapshot},
};
use purlin_shares::throttle::Governor;
use tokio::{
    net::UnixListener,
    sync::{broadcast::error::RecvError, mpsc, watch},
    task,
};
use utoipa::OpenApi;

use super::{
    console::Console,
    freezer::{self, Freezer},
};
use crate::{GuestMemory, LifecycleError, Running};

/// Bytes of the longest request.
const MAX_BODY: usize = 64 << 10;

/// Messages of input that wait for the guest; then their sender waits.
const INPUTS: usize = 64;

/// What a VM's process says of itself that does not change.
#[derive(Clone, Debug)]
pub struct About {
    /// When its run began, in milliseconds since 1970.
    pub started: u64,
    /// Its engine, and why.
    pub engine: String,
    /// How its shares are enforced.
    pub shares: String,
    /// What its sandbox lacks.
    pub sandbox_lacks: Vec<String>,
    /// Where ssh is led to it from.
    pub ssh: Option<SocketAddr>,
    /// The ports that lead to it.
    pub published: Vec<String>,
}

/// What the API is about.
#[derive(Clone)]
pub struct Shared {
    /// The machine.
    pub running: Arc<Running>,
    /// Its serial port.
    pub console: Arc<Console>,
    /// What clones can be made of.
    pub freezer: Arc<Freezer>,
    /// What keeps its cap, if the process does that itself.
    pub governor: Option<Arc<Governor>>,
    /// What does not change.
    pub about: About,
    /// How the run ended, once it has.
    pub end: watch::Receiver<Option<vm::End>>,
}

impl Shared {
    /// What the process says of itself.
    pub fn process(&self) -> vm::Process {
        let About { started, engine, shares, sandbox_lacks, ssh, published } = self.about.clone();
        let state = if self.running.is_paused() { vm::State::Paused } else { vm::State::Running };
        let (disks, memory) = (self.running.disk_paths(), self.running.guest_memory().map(guest_memory));
        vm::Process { started, state, engine, disks, memory, shares, sandbox_lacks, ssh, published }
    }
}

fn guest_memory(memory: GuestMemory) -> vm::GuestMemory {
    let GuestMemory { most, wanted, now } = memory;
    vm::GuestMemory { most, wanted, now }
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Purlin's VM process",
        description = "Steers one virtual machine, over the Unix socket in its directory."
    ),
    paths(process, act, console, end, snapshot, cap, memory, freeze, thaw),
    components(schemas(vm::Process, vm::State, Act, Action, vm::End, ErrorBody, Reason))
)]
struct Description;

/// The API's description (OpenAPI 3.1), as a JSON document.
pub fn description() -> serde_json::Value {
    serde_json::to_value(Description::openapi()).unwrap_or_default()
}

/// Serves it, as long as this is polled.
pub async fn serve(listener: UnixListener, shared: Shared) {
    let router = Router::new()
        .route("/1.0", get(process))
        .route("/1.0/state", put(act))
        .route("/1.0/console", get(console))
        .route("/1.0/end", get(end))
        .route("/1.0/snapshot", post(snapshot))
        .route("/1.0/cap", put(cap))
        .route("/1.0/memory", put(memory))
        .route("/1.0/freezes", post(freeze))
        .route("/1.0/freezes/{freeze}", delete(thaw))
        .with_state(shared);
    server::serve(listener, server::complete(router, MAX_BODY)).await;
}

/// What the process is doing.
#[utoipa::path(get, path = "/1.0", responses((status = 200, body = vm::Process)))]
async fn process(State(shared): State<Shared>) -> Json<vm::Process> {
    Json(shared.process())
}

/// Pauses it, has it go on, presses its power button, or ends it.
#[utoipa::path(put, path = "/1.0/state", request_body = Act, responses(
    (status = 200, body = vm::Process),
    (status = 400, body = ErrorBody),
    (status = 409, body = ErrorBody, description = "the machine is paused, or its run is over"),
))]
async fn act(State(shared): State<Shared>, Body(Act { action }): Body<Act>) -> Result<Json<vm::Process>, Refusal> {
    let running = shared.running.clone();
    // It waits for the machine to stand still.
    let done = task::spawn_blocking(move || match action {
        Action::Pause => running.pause(),
        Action::Resume => running.resume(),
        Action::PressPowerButton => running.press_power_button(),
        Action::Quit => {
            running.stop();
            Ok(())
        }
    });
    match done.await.unwrap_or(Err(LifecycleError::Stopped)) {
        Ok(()) => Ok(Json(shared.process())),
        Err(e) => Err(Refusal::new(Reason::Conflict, e)),
    }
}

/// Takes a snapshot: the machine stands still for a moment, and the file is written while it goes on.
#[utoipa::path(post, path = "/1.0/snapshot", request_body = TakeSnapshot, responses(
    (status = 200, body = SnapshotTaken),
    (status = 400, body = ErrorBody),
    (status = 500, body = ErrorBody, description = "there is none; the machine goes on, maybe with the overlay"),
))]
async fn snapshot(
    State(shared): State<Shared>,
    Body(wanted): Body<TakeSnapshot>,
) -> Result<Json<SnapshotTaken>, Refusal> {
    let taken = task::spawn_blocking(move || freezer::snapshot(&shared.running, &wanted)).await;
    Ok(Json(taken.unwrap_or_else(|e| Err(ErrorBody::new(Reason::Failed, e)))?))
}

/// Changes the cap that the process keeps itself; where a control group does that, nothing.
#[utoipa::path(put, path = "/1.0/cap", request_body = Cap, responses(
    (status = 200, body = vm::Process),
    (status = 400, body = ErrorBody),
))]
async fn cap(State(shared): State<Shared>, Body(Cap { percent }): Body<Cap>) -> Json<vm::Process> {
    shared.governor.iter().for_each(|governor| governor.set(percent));
    Json(shared.process())
}

/// Changes how much memory the guest is to have, by its balloon; where it has none, nothing.
#[utoipa::path(put, path = "/1.0/memory", request_body = SetMemory, responses(
    (status = 200, body = vm::Process),
    (status = 400, body = ErrorBody),
))]
async fn memory(State(shared): State<Shared>, Body(SetMemory { bytes }): Body<SetMemory>) -> Json<vm::Process> {
    shared.running.set_guest_memory(bytes);
    Json(shared.process())
}

/// Freezes the machine for clones: it stands still for a moment.
#[utoipa::path(post, path = "/1.0/freezes", request_body = Freeze, responses(
    (status = 200, body = vm::Frozen),
    (status = 400, body = ErrorBody),
    (status = 500, body = ErrorBody),
))]
async fn freeze(State(shared): State<Shared>, Body(wanted): Body<Freeze>) -> Result<Json<vm::Frozen>, Refusal> {
    let frozen = task::spawn_blocking(move || shared.freezer.freeze(&shared.running, wanted)).await;
    Ok(Json(frozen.unwrap_or_else(|e| Err(ErrorBody::new(Reason::Failed, e)))?))
}

/// Forgets a freeze: its clones are made.
#[utoipa::path(delete, path = "/1.0/freezes/{freeze}", params(("freeze" = String, Path)), responses(
    (status = 200, body = ()),
    (status = 400, body = ErrorBody),
))]
async fn thaw(State(shared): State<Shared>, Segment(freeze): Segment) -> Json<()> {
    shared.freezer.thaw(&freeze);
    Json(())
}

/// Waits for the end of the run.
#[utoipa::path(get, path = "/1.0/end", responses((status = 200, body = vm::End)))]
async fn end(State(mut shared): State<Shared>) -> Result<Json<vm::End>, Refusal> {
    let end = shared.end.wait_for(Option::is_some).await.ok().and_then(|end| end.clone());
    end.map(Json).ok_or_else(|| Refusal::new(Reason::Unavailable, "the process ends"))
}

/// The guest's serial port: a websocket of binary messages. It begins with the last output.
#[utoipa::path(get, path = "/1.0/console", responses((status = 101, description = "a websocket")))]
async fn console(State(shared): State<Shared>, upgrade: WebSocketUpgrade) -> Response {
    upgrade.on_upgrade(move |socket| pass_console(socket, shared.console))
}

async fn pass_console(mut socket: WebSocket, console: Arc<Console>) {
    let (shown, mut live) = console.attach();
    if !shown.is_empty() && socket.send(Message::Binary(shown.into())).await.is_err() {
        return;
    }
    let input = pass_input(&console);
    loop {
        tokio::select! {
            output = live.recv() => match output {
                Ok(output) => {
                    if socket.send(Message::Binary(output.into())).await.is_err() {
                        return;
                    }
                }
                Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => return,
            },
            message = socket.recv() => match message {
                Some(Ok(Message::Binary(bytes))) => {
                    if input.send(bytes).await.is_err() {
                        return;
                    }
                }
                Some(Ok(Message::Close(_)) | Err(_)) | None => return,
                Some(Ok(_)) => {}
            },
        }
    }
}

/// Where input goes to the guest from, on a thread of its own: it waits while the guest takes nothing.
fn pass_input(console: &Console) -> mpsc::Sender<Bytes> {
    let (sender, mut inbox) = mpsc::channel::<Bytes>(INPUTS);
    if let Some(port) = console.input() {
        task::spawn_blocking(move || while inbox.blocking_recv().is_some_and(|bytes| port.push(&bytes)) {});
    }
    sender
}
