//! `/1.0/tokens`: what lets programs in over the network. They are made and deleted on the daemon's host alone, so that who
//! has one that was stolen cannot make another.

use axum::{
    Json, Router,
    extract::State,
    http::StatusCode,
    routing::{any, delete, get},
};
use purlin_api::{
    CreatedToken, ErrorBody, NewToken, Reason, Token,
    server::{Body, Refusal, Segment},
};

use super::Shared;

/// The paths at the Unix socket.
pub fn router() -> Router<Shared> {
    Router::new().route("/1.0/tokens", get(list).post(create)).route("/1.0/tokens/{name}", delete(remove))
}

/// The paths on TCP.
pub fn forbidden() -> Router<Shared> {
    let refuse = || {
        any(|| async {
            Refusal::new(Reason::Forbidden, "tokens are the business of the daemon's own host: use its Unix socket")
        })
    };
    Router::new().route("/1.0/tokens", refuse()).route("/1.0/tokens/{name}", refuse())
}

/// The tokens that let programs in over the network, in the order of their names. Only at the Unix socket.
#[utoipa::path(get, path = "/1.0/tokens", responses(
    (status = 200, body = [Token]),
    (status = 403, body = ErrorBody, description = "on TCP"),
))]
pub async fn list(State(Shared(shared)): State<Shared>) -> Json<Vec<Token>> {
    Json(shared.gate.tokens.list())
}

/// Makes a token: whoever shows it over the network is an administrator. Only at the Unix socket.
#[utoipa::path(post, path = "/1.0/tokens", request_body = NewToken, responses(
    (status = 201, body = CreatedToken),
    (status = 400, body = ErrorBody),
    (status = 403, body = ErrorBody, description = "on TCP"),
    (status = 409, body = ErrorBody, description = "the name is taken"),
    (status = 413, body = ErrorBody),
    (status = 500, body = ErrorBody),
))]
pub async fn create(
    State(Shared(shared)): State<Shared>,
    Body(NewToken { name }): Body<NewToken>,
) -> Result<(StatusCode, Json<CreatedToken>), Refusal> {
    Ok((StatusCode::CREATED, Json(shared.gate.tokens.create(&name)?)))
}

/// Deletes a token, and ends the connections of whoever has come by it. Only at the Unix socket.
#[utoipa::path(delete, path = "/1.0/tokens/{name}", params(("name" = String, Path)), responses(
    (status = 200, body = [Token], description = "those that are left"),
    (status = 400, body = ErrorBody),
    (status = 403, body = ErrorBody, description = "on TCP"),
    (status = 404, body = ErrorBody),
    (status = 500, body = ErrorBody),
))]
pub async fn remove(State(Shared(shared)): State<Shared>, Segment(name): Segment) -> Result<Json<Vec<Token>>, Refusal> {
    shared.gate.tokens.delete(&name, |hash| shared.gate.peers.end_all_of(hash))?;
    Ok(Json(shared.gate.tokens.list()))
}
