//! `/1.0/instances`.

use axum::{Json, extract::State, http::StatusCode};
use futures_util::future::join_all;
use purlin_api::{
    ChangeState, ErrorBody, Instance, NewInstance, Operation, Rename,
    server::{Body, Params, Refusal, Segment},
};
use serde::Deserialize;
use utoipa::IntoParams;

use super::Shared;

type Begun = Result<(StatusCode, Json<Operation>), Refusal>;

fn begun(operation: Operation) -> (StatusCode, Json<Operation>) {
    (StatusCode::ACCEPTED, Json(operation))
}

/// All instances, in the order of their names.
#[utoipa::path(get, path = "/1.0/instances", responses((status = 200, body = [Instance])))]
pub async fn list(State(Shared(shared)): State<Shared>) -> Json<Vec<Instance>> {
    let entries = shared.instances.entries();
    Json(join_all(entries.iter().map(|entry| shared.instances.describe(entry))).await)
}

/// Makes an instance, and starts it.
#[utoipa::path(post, path = "/1.0/instances", request_body = NewInstance, responses(
    (status = 202, body = Operation, description = "it is being made"),
    (status = 400, body = ErrorBody),
    (status = 404, body = ErrorBody, description = "there is no such image"),
    (status = 409, body = ErrorBody, description = "the name is taken"),
    (status = 413, body = ErrorBody),
    (status = 500, body = ErrorBody),
))]
pub async fn create(State(Shared(shared)): State<Shared>, Body(new): Body<NewInstance>) -> Begun {
    Ok(begun(shared.instances.create(new)?))
}

/// An instance.
#[utoipa::path(get, path = "/1.0/instances/{name}", params(("name" = String, Path)), responses(
    (status = 200, body = Instance),
    (status = 400, body = ErrorBody),
    (status = 404, body = ErrorBody),
))]
pub async fn get(State(Shared(shared)): State<Shared>, Segment(name): Segment) -> Result<Json<Instance>, Refusal> {
    let entry = shared.instances.get(&name)?;
    Ok(Json(shared.instances.describe(&entry).await))
}

/// Changes the hardware of an instance, by a JSON merge patch (RFC 7396) of `machine`: `cpu_shares`, `cpu_cap` and
/// `memory_max` at once; `memory` and the balloon's `size` at once, too, as far as the guest was started with that much (see
/// `process.memory`); the rest from its next start on.
#[utoipa::path(patch, path = "/1.0/instances/{name}", params(("name" = String, Path)), request_body = Object, responses(
    (status = 200, body = Instance),
    (status = 400, body = ErrorBody),
    (status = 404, body = ErrorBody),
    (status = 409, body = ErrorBody),
    (status = 413, body = ErrorBody),
    (status = 500, body = ErrorBody),
))]
pub async fn change(
    state: State<Shared>,
    Segment(name): Segment,
    Body(patch): Body<serde_json::Map<String, serde_json::Value>>,
) -> Result<Json<Instance>, Refusal> {
    state.0.0.instances.change_machine(&name, &patch.into()).await?;
    get(state, Segment(name)).await
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct Delete {
    /// One that runs, too.
    #[serde(default)]
    force: bool,
}

/// Deletes an instance with its disk.
#[utoipa::path(delete, path = "/1.0/instances/{name}", params(("name" = String, Path), Delete), responses(
    (status = 202, body = Operation),
    (status = 400, body = ErrorBody),
    (status = 404, body = ErrorBody),
    (status = 409, body = ErrorBody, description = "it runs"),
))]
pub async fn delete(
    State(Shared(shared)): State<Shared>,
    Segment(name): Segment,
    Params(Delete { force }): Params<Delete>,
) -> Begun {
    Ok(begun(shared.instances.delete(&name, force)?))
}

/// Starts, stops, restarts, pauses or resumes an instance.
#[utoipa::path(put, path = "/1.0/instances/{name}/state", params(("name" = String, Path)), request_body = ChangeState, responses(
    (status = 202, body = Operation),
    (status = 400, body = ErrorBody),
    (status = 404, body = ErrorBody),
    (status = 409, body = ErrorBody, description = "it does so already, or cannot now"),
    (status = 413, body = ErrorBody),
))]
pub async fn change_state(
    State(Shared(shared)): State<Shared>,
    Segment(name): Segment,
    Body(change): Body<ChangeState>,
) -> Begun {
    Ok(begun(shared.instances.change_state(&name, change)?))
}

/// Gives an instance another name.
#[utoipa::path(post, path = "/1.0/instances/{name}/rename", params(("name" = String, Path)), request_body = Rename, responses(
    (status = 200, body = Instance),
    (status = 400, body = ErrorBody),
    (status = 404, body = ErrorBody),
    (status = 409, body = ErrorBody, description = "the name is taken"),
    (status = 413, body = ErrorBody),
    (status = 500, body = ErrorBody),
))]
pub async fn rename(
    state: State<Shared>,
    Segment(name): Segment,
    Body(Rename { name: to }): Body<Rename>,
) -> Result<Json<Instance>, Refusal> {
    state.0.0.instances.rename(&name, &to)?;
    get(state, Segment(to)).await
}

/// What an instance's guest has last written to its serial port, up to 1 MiB: text as it came.
#[utoipa::path(get, path = "/1.0/instances/{name}/log", params(("name" = String, Path)), responses(
    (status = 200, body = String, content_type = "application/octet-stream"),
    (status = 400, body = ErrorBody),
    (status = 404, body = ErrorBody),
    (status = 500, body = ErrorBody),
))]
pub async fn log(State(Shared(shared)): State<Shared>, Segment(name): Segment) -> Result<Vec<u8>, Refusal> {
    let entry = shared.instances.get(&name)?;
    Ok(shared.instances.console_log(&entry).await?)
}
