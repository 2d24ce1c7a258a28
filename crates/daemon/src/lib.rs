//! The manager of a host's machines: what there is (in a database), the processes that run it, and the REST API.
//!
//! The daemon is not needed for a machine to run: each has a process of its own ([`purlin_vmm::process`]), which is found
//! again when the daemon returns. The truth about what runs is in those processes, the truth about what there is in the
//! database; a daemon that is killed at any moment comes back to both.
#![forbid(unsafe_code)]

pub mod api;
mod database;
mod error;
mod events;
mod images;
mod instances;
mod operations;
mod process;
mod record;
mod remote;
mod run;
mod tokens;

pub use error::StartError;
pub use images::shown as shown_image;
pub use remote::{Listen, Listening};
pub use run::{Places, run};
