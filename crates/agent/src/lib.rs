//! The guest's agent: what the host and the program `purlin-agent` in the guest say to each other ([`protocol`], in
//! [frames](frame)), and a [`client`] for the host.
//!
//! The program itself is `src/main.rs` and what is beside it; it listens on virtio-vsock and serves the host only.
#![forbid(unsafe_code)]

pub mod client;
pub mod frame;
pub mod protocol;

/// The vsock port that the agent listens on.
pub const PORT: u32 = 20565;

/// Where the program is in a guest.
pub const PROGRAM_PATH: &str = "/usr/lib/purlin/purlin-agent";

/// The name of [`UNIT`].
pub const UNIT_NAME: &str = "purlin-agent.service";

/// systemd's unit that runs the program.
pub const UNIT: &str = include_str!("../purlin-agent.service");
