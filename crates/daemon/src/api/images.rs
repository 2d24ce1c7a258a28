//! `/1.0/images`.

use std::time::Duration;

use axum::{
    Json,
    body::{Body as RawBody, HttpBody as _},
    extract::State,
    http::{HeaderMap, StatusCode, header::CONTENT_LENGTH},
};
use futures_util::StreamExt;
use purlin_api::{
    ErrorBody, Image, ImageFormat, Images, NewImage, Operation, OperationState, Reason,
    server::{Body, Params, Refusal, Segment},
};
use purlin_images::import::MAX_BYTES;
use serde::Deserialize;
use tokio::time::timeout;
use utoipa::IntoParams;

use super::Shared;
use crate::images::{Receiving, Sent};

type Begun = Result<(StatusCode, Json<Operation>), Refusal>;

/// Characters of the longest name of a file that is sent.
const MOST_SOURCE: usize = 255;
/// How long the next piece of an image may take to arrive.
const PIECE: Duration = Duration::from_secs(30);

/// All images, in the order of their names.
#[utoipa::path(get, path = "/1.0/images", responses(
    (status = 200, body = Images),
    (status = 500, body = ErrorBody),
))]
pub async fn list(State(Shared(shared)): State<Shared>) -> Result<Json<Images>, Refusal> {
    Ok(Json(shared.images.list()?))
}

/// Makes an image: fetched from a URL, or built of a distribution's packages.
#[utoipa::path(post, path = "/1.0/images", request_body = NewImage, responses(
    (status = 202, body = Operation, description = "it is being made"),
    (status = 400, body = ErrorBody),
    (status = 409, body = ErrorBody, description = "the name is taken"),
    (status = 413, body = ErrorBody),
    (status = 500, body = ErrorBody, description = "there is a damaged image of this name"),
))]
pub async fn create(State(Shared(shared)): State<Shared>, Body(new): Body<NewImage>) -> Begun {
    Ok((StatusCode::ACCEPTED, Json(shared.images.create(new)?)))
}

/// An image, by its name or by what it is built as (`debian`).
#[utoipa::path(get, path = "/1.0/images/{name}", params(("name" = String, Path)), responses(
    (status = 200, body = Image),
    (status = 400, body = ErrorBody),
    (status = 404, body = ErrorBody),
    (status = 500, body = ErrorBody, description = "it is damaged"),
))]
pub async fn get(State(Shared(shared)): State<Shared>, Segment(name): Segment) -> Result<Json<Image>, Refusal> {
    Ok(Json(shared.images.get(&name)?))
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct Send {
    /// What the file is called where it comes from; a name that says another format than its content is refused.
    #[param(max_length = 255)]
    source: Option<String>,
    /// Its format; what its content says if left out.
    format: Option<ImageFormat>,
    /// The SHA-256 checksum that it must have, in hexadecimal.
    #[param(pattern = "^[0-9A-Fa-f]{64}$")]
    sha256: Option<String>,
}

/// Makes an image of the body: a disk's file in one of the formats. The answer comes when all of it is there; what it is
/// converted by goes on, or has failed.
#[utoipa::path(put, path = "/1.0/images/{name}", params(("name" = String, Path), Send),
    request_body(content = Vec<u8>, content_type = "application/octet-stream"), responses(
    (status = 202, body = Operation, description = "it has arrived, and is being made"),
    (status = 400, body = ErrorBody),
    (status = 409, body = ErrorBody, description = "the name is taken"),
    (status = 413, body = ErrorBody, description = "it is more than 1 TiB"),
    (status = 500, body = ErrorBody),
    (status = 503, body = ErrorBody, description = "as many are being received as can be"),
))]
pub async fn send(
    State(Shared(shared)): State<Shared>,
    Segment(name): Segment,
    Params(Send { source, format, sha256 }): Params<Send>,
    headers: HeaderMap,
    body: RawBody,
) -> Begun {
    let length = headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
    if length.is_some_and(|length: u64| length > MAX_BYTES) {
        return Err(too_large());
    }
    if body.is_end_stream() {
        return Err(Refusal::new(Reason::BadRequest, "there is no image in the body: it is empty"));
    }
    let source = source.filter(|source| !source.is_empty()).unwrap_or_else(|| "an upload".into());
    check_source(&source)?;
    let receiving = shared.images.receive(Sent { name, source, format, sha256, length })?;
    let id = receiving.operation.id.clone();
    match pass(body, &receiving, MAX_BYTES).await {
        Ok(true) => Ok((StatusCode::ACCEPTED, Json(receiving.end().await))),
        // It has failed before all of it was there.
        Ok(false) => {
            let mut operation = shared.operations.get(&id).ok_or_else(|| Refusal::new(Reason::Failed, "it is gone"))?;
            let ended = operation.wait_for(|operation| operation.state != OperationState::Running).await;
            let ended = ended.map_err(|e| Refusal::new(Reason::Failed, e))?.clone();
            match ended.error {
                Some(error) => Err(error.into()),
                None => Ok((StatusCode::ACCEPTED, Json(ended))),
            }
        }
        Err(refusal) => Err(refusal),
    }
}

fn check_source(source: &str) -> Result<(), Refusal> {
    if source.chars().count() > MOST_SOURCE || source.chars().any(char::is_control) {
        return Err(Refusal::new(
            Reason::BadRequest,
            "the source is a name of up to 255 characters that can be printed",
        ));
    }
    Ok(())
}

/// Passes a body on, piece by piece; whether all of it was wanted.
async fn pass(body: RawBody, receiving: &Receiving, most: u64) -> Result<bool, Refusal> {
    let (mut pieces, mut done) = (body.into_data_stream(), 0);
    loop {
        let piece = match timeout(PIECE, pieces.next()).await {
            Ok(None) => return Ok(true),
            Ok(Some(piece)) => piece.map_err(|e| Refusal::new(Reason::BadRequest, format!("the body ended: {e}")))?,
            Err(_) => {
                let message = format!("nothing of the body came for {} s", PIECE.as_secs());
                return Err(Refusal::new(Reason::TooSlow, message));
            }
        };
        done += piece.len() as u64;
        if done > most {
            return Err(too_large());
        }
        if !receiving.pass(piece).await {
            return Ok(false);
        }
    }
}

fn too_large() -> Refusal {
    Refusal::new(Reason::TooLarge, format!("an image has {} GiB at most", MAX_BYTES >> 30))
}

/// Deletes an image. Machines that were made of it stay as they are.
#[utoipa::path(delete, path = "/1.0/images/{name}", params(("name" = String, Path)), responses(
    (status = 202, body = Operation),
    (status = 400, body = ErrorBody),
    (status = 404, body = ErrorBody),
))]
pub async fn delete(State(Shared(shared)): State<Shared>, Segment(name): Segment) -> Begun {
    Ok((StatusCode::ACCEPTED, Json(shared.images.delete(&name)?)))
}
