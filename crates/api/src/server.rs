//! What the servers of Purlin's APIs have in common: connections, bodies, errors.

use std::{sync::Arc, time::Duration};

use axum::{
    Json, Router,
    extract::{
        DefaultBodyLimit, FromRequest, FromRequestParts, Path, Query, Request, WebSocketUpgrade,
        rejection::JsonRejection,
    },
    http::{StatusCode, request::Parts},
    response::{IntoResponse, Response},
};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use serde::de::DeserializeOwned;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::UnixListener,
    sync::Semaphore,
    time::timeout,
};

use crate::{ErrorBody, Reason};

/// Connections at once; further ones wait until one of them ends.
const MOST_CONNECTIONS: usize = 512;
/// How long a client may take to say what it wants.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);
/// Bytes of a request's line and headers, at most.
const MAX_HEADER: usize = 64 << 10;
/// How long a body may take to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);
/// How long it waits with a further connection where there are no descriptors left.
pub const EXHAUSTED: Duration = Duration::from_millis(100);

/// An error as an answer.
#[derive(Debug)]
pub struct Refusal(pub ErrorBody);

impl Refusal {
    /// One in words.
    pub fn new(reason: Reason, message: impl std::fmt::Display) -> Self {
        Self(ErrorBody::new(reason, message))
    }
}

impl From<ErrorBody> for Refusal {
    fn from(body: ErrorBody) -> Self {
        Self(body)
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.0.reason.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (status, Json(self.0)).into_response()
    }
}

/// A body in JSON; what it cannot be is refused with one line.
pub struct Body<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = Refusal;

    async fn from_request(request: Request, state: &S) -> Result<Self, Refusal> {
        match timeout(BODY_TIMEOUT, Json::<T>::from_request(request, state)).await {
            Ok(Ok(Json(body))) => Ok(Self(body)),
            Ok(Err(rejection)) => Err(refusal(&rejection)),
            Err(_) => {
                let message = format!("the body did not arrive within {} s", BODY_TIMEOUT.as_secs());
                Err(Refusal::new(Reason::TooSlow, message))
            }
        }
    }
}

fn refusal(rejection: &JsonRejection) -> Refusal {
    let reason = match rejection.status() {
        StatusCode::PAYLOAD_TOO_LARGE => Reason::TooLarge,
        _ => Reason::BadRequest,
    };
    let text = rejection.body_text();
    Refusal::new(reason, text.lines().next().unwrap_or_default())
}

/// The part of the path that is a name.
pub struct Segment(pub String);

impl<S: Send + Sync> FromRequestParts<S> for Segment {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        let path = Path::<String>::from_request_parts(parts, state).await;
        path.map(|Path(name)| Self(name)).map_err(|e| Refusal::new(Reason::BadRequest, e.body_text()))
    }
}

/// Two or more parts of the path that are names, in their order.
pub struct Segments<const N: usize>(pub [String; N]);

impl<const N: usize, S: Send + Sync> FromRequestParts<S> for Segments<N> {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        let bad = |message: String| Refusal::new(Reason::BadRequest, message);
        let path = Path::<Vec<String>>::from_request_parts(parts, state).await.map_err(|e| bad(e.body_text()))?;
        path.0.try_into().map(Self).map_err(|_| bad("the path has other parts".into()))
    }
}

/// What is behind the question mark.
pub struct Params<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Params<T> {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        let query = Query::<T>::from_request_parts(parts, state).await;
        query.map(|Query(params)| Self(params)).map_err(|e| Refusal::new(Reason::BadRequest, e.body_text()))
    }
}

/// A request for a websocket.
pub struct Upgrade(pub WebSocketUpgrade);

impl<S: Send + Sync> FromRequestParts<S> for Upgrade {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        let upgrade = WebSocketUpgrade::from_request_parts(parts, state).await.map(Self);
        upgrade.map_err(|e| Refusal::new(Reason::BadRequest, format!("this path is a websocket: {}", e.body_text())))
    }
}

/// A router that answers everything: also what it has no route for, and bodies of more than `max_body` bytes.
pub fn complete(router: Router, max_body: usize) -> Router {
    router
        .fallback(|| async { Refusal::new(Reason::NotFound, "there is nothing at this path") })
        .method_not_allowed_fallback(|| async {
            Refusal::new(Reason::MethodNotAllowed, "there is no such method at this path")
        })
        .layer(DefaultBodyLimit::max(max_body))
}

/// Serves `router` at a Unix socket, as long as this is polled.
pub async fn serve(listener: UnixListener, router: Router) {
    let connections = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    loop {
        let Ok(permit) = connections.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let router = router.clone();
                tokio::spawn(async move {
                    serve_one(stream, router).await;
                    drop(permit);
                });
            }
            // There are too many descriptors, or the client is gone already.
            Err(_) => tokio::time::sleep(EXHAUSTED).await,
        }
    }
}

/// Serves `router` to whoever is at the other end of `stream`, until one side ends.
pub async fn serve_one(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, router: Router) {
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(MAX_HEADER)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router))
        .with_upgrades();
    // Its end concerns nobody but the client.
    let _ = connection.await;
}
