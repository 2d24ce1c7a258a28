//! `/1.0/instances/{name}/snapshots` and `/clone`.

use axum::{Json, extract::State, http::StatusCode};
use purlin_api::{
    ErrorBody, NewClones, NewSnapshot, Operation, Snapshot,
    server::{Body, Refusal, Segment, Segments},
};

use super::Shared;

type Begun = Result<(StatusCode, Json<Operation>), Refusal>;

/// The snapshots of an instance, in the order in which they were taken.
#[utoipa::path(get, path = "/1.0/instances/{name}/snapshots", params(("name" = String, Path)), responses(
    (status = 200, body = [Snapshot]),
    (status = 400, body = ErrorBody),
    (status = 404, body = ErrorBody),
))]
pub async fn list(
    State(Shared(shared)): State<Shared>,
    Segment(name): Segment,
) -> Result<Json<Vec<Snapshot>>, Refusal> {
    Ok(Json(shared.instances.snapshots(&name)?))
}

/// Takes a snapshot: of one that runs, memory, devices and disk of one moment; of others, the disk.
#[utoipa::path(post, path = "/1.0/instances/{name}/snapshots", params(("name" = String, Path)), request_body = NewSnapshot, responses(
    (status = 202, body = Operation),
    (status = 400, body = ErrorBody),
    (status = 404, body = ErrorBody),
    (status = 409, body = ErrorBody, description = "the name is taken"),
    (status = 413, body = ErrorBody),
))]
pub async fn take(State(Shared(shared)): State<Shared>, Segment(name): Segment, Body(new): Body<NewSnapshot>) -> Begun {
    Ok((StatusCode::ACCEPTED, Json(shared.instances.take_snapshot(&name, new)?)))
}

/// Goes back to a snapshot: what has happened since is gone.
#[utoipa::path(post, path = "/1.0/instances/{name}/snapshots/{snapshot}/restore",
    params(("name" = String, Path), ("snapshot" = String, Path)), responses(
    (status = 202, body = Operation),
    (status = 400, body = ErrorBody),
    (status = 404, body = ErrorBody),
    (status = 409, body = ErrorBody),
))]
pub async fn restore(State(Shared(shared)): State<Shared>, Segments([name, snapshot]): Segments<2>) -> Begun {
    Ok((StatusCode::ACCEPTED, Json(shared.instances.restore_snapshot(&name, &snapshot)?)))
}

/// Deletes a snapshot.
#[utoipa::path(delete, path = "/1.0/instances/{name}/snapshots/{snapshot}",
    params(("name" = String, Path), ("snapshot" = String, Path)), responses(
    (status = 200, body = [Snapshot], description = "those that are left"),
    (status = 400, body = ErrorBody),
    (status = 404, body = ErrorBody),
    (status = 409, body = ErrorBody),
    (status = 500, body = ErrorBody),
))]
pub async fn delete(
    State(Shared(shared)): State<Shared>,
    Segments([name, snapshot]): Segments<2>,
) -> Result<Json<Vec<Snapshot>>, Refusal> {
    shared.instances.delete_snapshot(&name, &snapshot)?;
    Ok(Json(shared.instances.snapshots(&name)?))
}

/// Makes clones: of one that runs, machines that go on from where it is, with an identity of their own.
#[utoipa::path(post, path = "/1.0/instances/{name}/clone", params(("name" = String, Path)), request_body = NewClones, responses(
    (status = 202, body = Operation),
    (status = 400, body = ErrorBody),
    (status = 404, body = ErrorBody),
    (status = 409, body = ErrorBody, description = "a name is taken"),
    (status = 413, body = ErrorBody),
))]
pub async fn clone_instance(
    State(Shared(shared)): State<Shared>,
    Segment(name): Segment,
    Body(new): Body<NewClones>,
) -> Begun {
    Ok((StatusCode::ACCEPTED, Json(shared.instances.clone_instance(&name, new)?)))
}
