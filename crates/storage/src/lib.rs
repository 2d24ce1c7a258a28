//! Disks: image formats, host files, locks, queues of requests, limits.
//!
//! A [`DiskSpec`] says which image a guest's disk is, [`Disk::open`] opens and locks it with everything that it stands on,
//! and a [`Queue`] serves requests to it from one thread. Nothing here knows of virtio or of guests' CPUs.
//!
//! From a request to the host: `queue.rs` (limits, futures) → `disk.rs` (formats) → imago's qcow2 → `host_file.rs`
//! (system calls) → `ring.rs` (io_uring).
//!
//! Nothing here is saved with a machine: when a pause has drained the queues ([`Queue::drain`]), a disk's state is its
//! image, after a [`Request::Flush`] all of it. Limits begin with full buckets after a restore.
#![deny(unsafe_code)]

mod block_on;
mod convert;
mod create;
#[allow(unsafe_code, reason = "imago's discard, which asks for no other mappings")]
mod disk;
mod error;
mod event;
mod fence;
mod freeze;
#[allow(unsafe_code, reason = "preadv, pwritev and their io_uring forms on guest memory")]
mod host_file;
mod info;
pub mod limit;
#[allow(unsafe_code, reason = "fcntl with open file description locks, which rustix lacks")]
mod lock;
mod merge;
mod open;
mod qcow2_count;
mod qcow2_header;
mod qcow2_tables;
mod queue;
mod reader;
#[allow(unsafe_code, reason = "io_uring submissions")]
mod ring;
mod spec;
mod tasks;

pub use convert::{Conversion, ConvertError};
pub use create::{NewImage, grow};
pub use disk::{Disk, Request};
pub use error::{IoError, OpenError};
pub use freeze::{FrozenDisk, Overlay, Switch};
pub use info::{BackingInfo, ImageInfo, SourceFormat, UnknownSourceFormat, info, open_read_only};
pub use merge::{Merge, MergeError};
pub use queue::{Completion, Queue};
pub use reader::DiskReader;
pub use spec::{DiskSpec, Format, MAX_SERIAL, UnknownFormat};
