//! The guest's agent: `purlin-agent` of crates/agent, which the build script of this crate has built.

/// The program, linked statically.
pub const PROGRAM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/purlin-agent"));

/// A checksum of what it is made of, in hexadecimal.
pub const SOURCE: &str = env!("PURLIN_AGENT_SOURCE");
