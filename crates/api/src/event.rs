//! What has happened.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{Operation, Status};

/// Something that has happened, as `/1.0/events` tells it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// Counts up; none is left out.
    pub number: u64,
    /// When, in milliseconds since 1970 (UTC).
    pub time: u64,
    /// What.
    #[serde(flatten)]
    pub kind: EventKind,
}

/// What has happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum EventKind {
    /// An instance does something else than before.
    Instance {
        /// Its name.
        name: String,
        /// What it does; nothing if it is gone.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        status: Option<Status>,
        /// Why, for people.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        message: Option<String>,
    },
    /// An instance has another name.
    Renamed {
        /// The one it had.
        from: String,
        /// The one it has.
        to: String,
    },
    /// An operation has begun, or ended.
    Operation {
        /// It.
        operation: Operation,
    },
}
