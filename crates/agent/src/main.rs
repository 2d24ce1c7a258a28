//! Purlin's agent in a guest: runs commands, moves files and renews a copied machine for the host, which asks by
//! virtio-vsock. See the library's `protocol` for what is said.
//!
//! One thread for each session, one for each command that runs, and one for rehearsals. It is linked statically, so that one
//! program does for every Linux.

mod dial;
mod exec;
mod files;
mod info;
mod link;
mod listen;
mod pending;
mod rehearsal;
mod renew;
mod session;
mod turn;
mod users;

use std::{ffi::OsString, process::ExitCode};

const USAGE: &str = "usage: purlin-agent [--listen vsock | --listen unix:PATH] [--version]";

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let arguments: Option<Vec<&str>> = arguments.iter().map(|word| word.to_str()).collect();
    let listened = match arguments.as_deref() {
        Some([] | ["--listen", "vsock"]) => listen::vsock(),
        Some(["--listen", place]) if place.starts_with("unix:") => listen::unix(place["unix:".len()..].as_ref()),
        Some(["--version"]) => {
            println!("purlin-agent {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    let Err(error) = listened;
    eprintln!("purlin-agent: {error}");
    ExitCode::FAILURE
}
