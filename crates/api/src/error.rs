//! What an answer says when something could not be done.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Why something could not be done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// For programs.
    pub reason: Reason,
    /// For people, in one line: what, why, what to do.
    pub message: String,
}

/// Why something could not be done, for programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// The request makes no sense (400).
    BadRequest,
    /// Nobody says who asks (401): it takes a token.
    Unauthorized,
    /// It is not to be had this way (403).
    Forbidden,
    /// There is no such thing (404).
    NotFound,
    /// There is no such method here (405).
    MethodNotAllowed,
    /// The request was not all there in time (408).
    TooSlow,
    /// It does not go with what is (409): a name that is taken, stopping what is stopped.
    Conflict,
    /// The request is too large (413).
    TooLarge,
    /// It could not be done (500).
    Failed,
    /// Not now (503): the other side is busy or ends.
    Unavailable,
}

impl Reason {
    /// The HTTP status that goes with it.
    pub fn status(self) -> u16 {
        match self {
            Self::BadRequest => 400,
            Self::Unauthorized => 401,
            Self::Forbidden => 403,
            Self::NotFound => 404,
            Self::MethodNotAllowed => 405,
            Self::TooSlow => 408,
            Self::Conflict => 409,
            Self::TooLarge => 413,
            Self::Failed => 500,
            Self::Unavailable => 503,
        }
    }
}

impl ErrorBody {
    /// An error in words.
    pub fn new(reason: Reason, message: impl fmt::Display) -> Self {
        Self { reason, message: message.to_string() }
    }
}

impl fmt::Display for ErrorBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for ErrorBody {}
