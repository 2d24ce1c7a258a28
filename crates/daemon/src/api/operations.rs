//! `/1.0/operations`.

use std::time::Duration;

use axum::{Json, extract::State};
use purlin_api::{
    ErrorBody, Operation, OperationState, Reason,
    server::{Params, Refusal, Segment},
};
use serde::Deserialize;
use tokio::{sync::watch, time::timeout};
use utoipa::IntoParams;

use super::{Shared, int64};

/// The longest that an answer waits, in seconds.
const MOST_WAIT: u64 = 600;

/// The last operations, oldest first.
#[utoipa::path(get, path = "/1.0/operations", responses((status = 200, body = [Operation])))]
pub async fn list(State(Shared(shared)): State<Shared>) -> Json<Vec<Operation>> {
    Json(shared.operations.list())
}

/// An operation.
#[utoipa::path(get, path = "/1.0/operations/{id}", params(("id" = String, Path)), responses(
    (status = 200, body = Operation),
    (status = 400, body = ErrorBody),
    (status = 404, body = ErrorBody),
))]
pub async fn get(State(shared): State<Shared>, Segment(id): Segment) -> Result<Json<Operation>, Refusal> {
    let operation = find(&shared, &id)?;
    let operation = operation.borrow().clone();
    Ok(Json(operation))
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct Wait {
    /// For so many seconds at most, up to 600.
    #[serde(default, deserialize_with = "int64")]
    timeout: Option<u64>,
    /// Until its revision is beyond this one; without it, until it is over.
    #[serde(default, deserialize_with = "int64")]
    beyond: Option<u64>,
}

/// Waits until an operation is over, or has come further.
#[utoipa::path(get, path = "/1.0/operations/{id}/wait", params(("id" = String, Path), Wait), responses(
    (status = 200, body = Operation, description = "the operation as it is now: maybe still under way"),
    (status = 400, body = ErrorBody),
    (status = 404, body = ErrorBody),
))]
pub async fn wait(
    State(shared): State<Shared>,
    Segment(id): Segment,
    Params(Wait { timeout: seconds, beyond }): Params<Wait>,
) -> Result<Json<Operation>, Refusal> {
    let mut operation = find(&shared, &id)?;
    let arrived =
        |o: &Operation| o.state != OperationState::Running || beyond.is_some_and(|beyond| o.revision > beyond);
    let most = Duration::from_secs(seconds.unwrap_or(MOST_WAIT).min(MOST_WAIT));
    // At the end of its patience it says how far things are.
    let _ = timeout(most, operation.wait_for(arrived)).await;
    let operation = operation.borrow().clone();
    Ok(Json(operation))
}

fn find(Shared(shared): &Shared, id: &str) -> Result<watch::Receiver<Operation>, Refusal> {
    let missing = || Refusal::new(Reason::NotFound, "there is no such operation");
    shared.operations.get(id).ok_or_else(missing)
}
