//! Tokens: what lets a program in that comes over the network.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A token, without what is secret in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Token {
    /// Its name.
    pub name: String,
    /// When it was made, in seconds since 1970 (UTC).
    pub created: u64,
}

/// A token that was made just now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CreatedToken {
    /// Its name.
    pub name: String,
    /// When it was made, in seconds since 1970 (UTC).
    pub created: u64,
    /// It: what is sent as `Authorization: Bearer TOKEN`. It is said this once, and not kept.
    pub token: String,
}

/// A token to be made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewToken {
    /// Its name, as an instance's ([`check_name`](crate::check_name)).
    #[schema(pattern = "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
    pub name: String,
}
