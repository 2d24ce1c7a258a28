//! The process of one virtual machine: a thread for each vCPU, and the lifecycle that they share.
//!
//! [`Vmm::start`] makes a machine and starts it; the [`Running`] that it returns pauses, saves and ends it and waits
//! for its [`Outcome`].
#![forbid(unsafe_code)]

mod config;
pub mod engines;
mod fork;
pub mod host;
mod lifecycle;
pub mod process;
mod running;
pub mod sandbox;
pub mod setup;
mod snapshot;
mod vcpu;

pub use config::{OnIoError, Outcome, RunConfig};
pub use fork::{FreezeError, FreezeSpec, Frozen};
pub use lifecycle::{LifecycleError, StartError};
pub use purlin_devices::virtio::vsock;
pub use purlin_engine::memory;
pub use purlin_engine_translator::profile;
pub use purlin_machine::{
    GuestEvent, GuestInput,
    config::{
        BalloonConfig, BalloonHandle, BalloonStatistics, ConsolePort, ConsoleSize, NetConfig, Network, OptionalDevice,
    },
};
pub use purlin_network as network;
pub use purlin_snapshot as snapshots;
pub use purlin_storage as storage;
pub use running::{Brake, Files, GuestMemory, Running, Vmm};
pub use snapshot::{Pages, RestoreError, SnapshotSpec, Snapshotted, TakeError, check_engine};
