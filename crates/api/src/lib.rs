//! What Purlin's programs say to each other: the types of the REST API that the daemon serves, of the control API of a
//! VM's process, and a client of both.
#![forbid(unsafe_code)]

#[cfg(feature = "client")]
pub mod client;
mod error;
mod event;
mod fingerprint;
mod image;
mod instance;
pub mod keep_alive;
mod machine;
mod operation;
#[cfg(feature = "server")]
pub mod server;
mod token;
pub mod unix;
pub mod vm;

pub use error::{ErrorBody, Reason};
pub use event::{Event, EventKind};
pub use fingerprint::{Fingerprint, InvalidFingerprint};
pub use image::{Image, ImageFormat, ImageOrigin, Images, NewImage};
pub use instance::{
    ChangeState, Instance, InstanceProcess, NewClones, NewInstance, NewSnapshot, Rename, ServerInfo, Snapshot, Status,
    Usage, check_name,
};
pub use machine::{Balloon, CpuModel, Device, Disk, DiskFormat, Engine, Machine, Network, OnIoError};
pub use operation::{Operation, OperationState};
pub use token::{CreatedToken, NewToken, Token};

/// The version of the API, which is the first part of every path.
pub const VERSION: &str = "1.0";
