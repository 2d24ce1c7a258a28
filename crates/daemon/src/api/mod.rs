//! The REST API, under /1.0, as its description ([`description`]) says.

mod description;
mod images;
mod instances;
mod operations;
mod relay;
mod snapshots;
mod tokens;

use std::sync::Arc;

use axum::{
    Json, Router,
    extract::{
        State,
        ws::{Message, WebSocket},
    },
    middleware,
    response::Response,
    routing::{delete, get, post, put},
};
use purlin_api::{
    ErrorBody, Event, Reason, ServerInfo,
    server::{self, Params, Refusal, Upgrade},
};
use serde::{Deserialize, Deserializer, de::Error as _};
use tokio::sync::{Notify, broadcast::error::RecvError};
use utoipa::{IntoParams, OpenApi};

use self::description::Everywhere;
use crate::{
    events::Events,
    images::Images,
    instances::Instances,
    operations::Operations,
    remote::{
        Listening,
        authorize::{Gate, authorize},
    },
};

/// Bytes of the longest request: user-data is the longest thing in one.
const MAX_BODY: usize = 4 << 20;

/// What the API is about.
#[derive(Clone)]
pub struct Shared(Arc<Inner>);

struct Inner {
    instances: Arc<Instances>,
    images: Arc<Images>,
    operations: Arc<Operations>,
    events: Arc<Events>,
    end: Arc<Notify>,
    gate: Gate,
    /// Where it listens on TCP.
    listening: Option<Listening>,
}

impl Shared {
    pub(crate) fn new(
        instances: Arc<Instances>,
        images: Arc<Images>,
        operations: Arc<Operations>,
        events: Arc<Events>,
        end: Arc<Notify>,
        gate: Gate,
        listening: Option<Listening>,
    ) -> Self {
        Self(Arc::new(Inner { instances, images, operations, events, end, gate, listening }))
    }
}

#[derive(OpenApi)]
#[openapi(
    info(title = "Purlin", description = "Virtual machines on this host."),
    paths(
        info,
        shutdown,
        events,
        openapi,
        instances::list,
        instances::create,
        instances::get,
        instances::change,
        instances::delete,
        instances::change_state,
        instances::rename,
        instances::log,
        snapshots::list,
        snapshots::take,
        snapshots::restore,
        snapshots::delete,
        snapshots::clone_instance,
        images::list,
        images::create,
        images::get,
        images::send,
        images::delete,
        relay::console,
        relay::agent,
        operations::list,
        operations::get,
        operations::wait,
        tokens::list,
        tokens::create,
        tokens::remove,
    ),
    components(schemas(Event)),
    modifiers(&Everywhere)
)]
struct Description;

/// The API's description (OpenAPI 3.1), as a JSON document.
pub fn description() -> serde_json::Value {
    serde_json::to_value(Description::openapi()).unwrap_or_default()
}

/// What is served at the Unix socket.
pub(crate) fn router(shared: Shared) -> Router {
    server::complete(routes().merge(tokens::router()).with_state(shared), MAX_BODY)
}

/// What is served on TCP, where each connection has its peer as an extension.
pub(crate) fn remote_router(shared: Shared) -> Router {
    let gate = shared.0.gate.clone();
    let router = routes().merge(tokens::forbidden()).with_state(shared);
    server::complete(router, MAX_BODY).layer(middleware::from_fn_with_state(gate, authorize))
}

fn routes() -> Router<Shared> {
    Router::new()
        .route("/1.0", get(info))
        .route("/1.0/openapi.json", get(openapi))
        .route("/1.0/shutdown", post(shutdown))
        .route("/1.0/events", get(events))
        .route("/1.0/instances", get(instances::list).post(instances::create))
        .route("/1.0/instances/{name}", get(instances::get).patch(instances::change).delete(instances::delete))
        .route("/1.0/instances/{name}/state", put(instances::change_state))
        .route("/1.0/instances/{name}/rename", post(instances::rename))
        .route("/1.0/instances/{name}/log", get(instances::log))
        .route("/1.0/instances/{name}/snapshots", get(snapshots::list).post(snapshots::take))
        .route("/1.0/instances/{name}/snapshots/{snapshot}", delete(snapshots::delete))
        .route("/1.0/instances/{name}/snapshots/{snapshot}/restore", post(snapshots::restore))
        .route("/1.0/instances/{name}/clone", post(snapshots::clone_instance))
        .route("/1.0/instances/{name}/console", get(relay::console))
        .route("/1.0/instances/{name}/agent", get(relay::agent))
        .route("/1.0/images", get(images::list).post(images::create))
        .route("/1.0/images/{name}", get(images::get).put(images::send).delete(images::delete))
        .route("/1.0/operations", get(operations::list))
        .route("/1.0/operations/{id}", get(operations::get))
        .route("/1.0/operations/{id}/wait", get(operations::wait))
}

/// The daemon itself.
#[utoipa::path(get, path = "/1.0", responses((status = 200, body = ServerInfo)))]
async fn info(State(Shared(shared)): State<Shared>) -> Json<ServerInfo> {
    Json(ServerInfo {
        api_version: purlin_api::VERSION.into(),
        version: env!("CARGO_PKG_VERSION").into(),
        pid: std::process::id(),
        listens_at: shared.listening.map(|listening| listening.at.to_string()),
        fingerprint: shared.listening.map(|listening| listening.fingerprint.to_string()),
    })
}

/// This description.
#[utoipa::path(get, path = "/1.0/openapi.json", responses((status = 200, body = Object)))]
async fn openapi() -> Json<serde_json::Value> {
    Json(description())
}

/// Ends the daemon; machines go on.
#[utoipa::path(post, path = "/1.0/shutdown", responses((status = 200, body = ServerInfo)))]
async fn shutdown(state: State<Shared>) -> Json<ServerInfo> {
    state.0.0.end.notify_one();
    info(state).await
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
struct From {
    /// The number of the first event that is wanted; without it, what happens from now on.
    #[serde(default, deserialize_with = "int64")]
    from: Option<u64>,
}

/// A number that is one by its description, too, where its format is int64.
fn int64<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    let number = i64::deserialize(deserializer)?;
    u64::try_from(number).map(Some).map_err(|_| D::Error::custom("it is less than 0"))
}

/// What happens: a websocket of [`Event`]s in JSON.
#[utoipa::path(get, path = "/1.0/events", params(From), responses(
    (status = 101, description = "a websocket"),
    (status = 400, body = ErrorBody, description = "the request is none for a websocket"),
    (status = 500, body = ErrorBody),
))]
async fn events(
    State(Shared(shared)): State<Shared>,
    Params(From { from }): Params<From>,
    Upgrade(upgrade): Upgrade,
) -> Result<Response, Refusal> {
    let (past, live) = shared.events.listen(from).map_err(|e| Refusal::new(Reason::Failed, e))?;
    Ok(upgrade.on_upgrade(|socket| pass_events(socket, past, live)))
}

async fn pass_events(mut socket: WebSocket, past: Vec<Event>, mut live: tokio::sync::broadcast::Receiver<Event>) {
    for event in &past {
        if send_event(&mut socket, event).await.is_err() {
            return;
        }
    }
    loop {
        tokio::select! {
            event = live.recv() => match event {
                Ok(event) => {
                    if send_event(&mut socket, &event).await.is_err() {
                        return;
                    }
                }
                Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => return,
            },
            message = socket.recv() => match message {
                Some(Ok(Message::Close(_)) | Err(_)) | None => return,
                Some(Ok(_)) => {}
            },
        }
    }
}

async fn send_event(socket: &mut WebSocket, event: &Event) -> Result<(), axum::Error> {
    let text = serde_json::to_string(event).unwrap_or_default();
    socket.send(Message::Text(text.into())).await
}
