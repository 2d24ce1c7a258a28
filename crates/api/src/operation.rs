//! What takes longer than a request.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::ErrorBody;

/// Something under way, or over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Operation {
    /// Its name in `/1.0/operations`.
    pub id: String,
    /// What it does, for people: `launch web`.
    pub what: String,
    /// The instance that it is about.
    pub instance: String,
    /// When it began, in seconds since 1970 (UTC).
    pub created: u64,
    /// How far it is.
    pub state: OperationState,
    /// Counts up with each change of what is said here.
    pub revision: u64,
    /// The step that it is at, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step: Option<String>,
    /// How much of that step is done, from 0 to 100, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub percent: Option<u8>,
    /// What somebody should know though it goes on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<ErrorBody>,
}

/// How far an operation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum OperationState {
    /// Under way.
    Running,
    /// Done.
    Done,
    /// It could not be done, and all is as before.
    Failed,
}
