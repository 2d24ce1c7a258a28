//! Networks of virtual machines: user-mode NAT, which needs no privilege, and TAP, which does.
//!
//! To a network device both are a [`Backend`]: a file descriptor of packets, each a [`PacketHeader`] followed by an
//! Ethernet frame. The NAT ([`nat`]) is a sandboxed process of its own at the other end of a packet socket.

#[expect(unsafe_code, reason = "scatter and gather over guest memory")]
mod backend;
mod header;
pub mod nat;
mod offload;
#[expect(unsafe_code, reason = "ioctls of the TUN driver")]
pub mod tap;

pub use backend::Backend;
pub use header::{MAX_PACKET, PacketHeader};
pub use offload::Offload;
