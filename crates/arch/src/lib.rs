//! Guest processor state and its pure rules, split by *guest* architecture.
//!
//! Nothing here knows an engine or a device.
#![forbid(unsafe_code)]

pub mod x86_64;
