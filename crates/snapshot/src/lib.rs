//! Snapshots of machines as files: state and memory of one moment, all of it or what has changed since another one.
//!
//! [`write`] makes a file, [`Chain::open`] opens one with those that it stands on. docs/snapshot-format.md describes what
//! is in it. Nothing here knows what runs a machine, and nothing is half done: a file is there when it is whole, and a
//! chain is checked before anything is made of it.
//!
//! | file | subject |
//! |---|---|
//! | `header.rs` | the first page: version, features, where the sections are |
//! | `messages.rs` | what the sections say |
//! | `write.rs` | from a machine's state and layers to a file |
//! | `open.rs` | from a file to a checked snapshot |
//! | `chain.rs` | a snapshot with its parents, and the layers that they make |
#![forbid(unsafe_code)]

mod chain;
mod error;
mod header;
mod messages;
mod open;
mod write;

pub use chain::Chain;
pub use error::SnapshotError;
pub use messages::{DiskImage, Manifest, ParentName, SnapshotId};
pub use open::Snapshot;
pub use write::{Contents, Parent, Written, check, write};

/// The format's version that is written, and the newest that is read.
pub const VERSION: u32 = 1;

/// The most snapshots that may stand on each other.
pub const MAX_DEPTH: usize = 64;

/// Bytes of the memory section that have a checksum each; the last ones may be fewer.
const CHUNK: usize = 1 << 20;
