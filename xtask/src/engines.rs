//! Machines that are kept, under KVM and from one engine to the other: this program inside emulated AMD-V, with the command
//! as users have it.
//!
//! Inside, a guest that does the same work whatever runs it ([`work`]) is launched, asked, paused, snapshotted, gone back and
//! cloned under KVM, in the whole sandbox. Then it goes on from a snapshot under the translator, and from one of that under
//! KVM again; or the first one is the translator's already (`--first translator`).

mod guest;
mod inside;
mod work;

use std::{env, fs, path::PathBuf, time::Duration};

use anyhow::{Result, ensure};
use clap::Args;

use crate::{
    machine::{self, Engine},
    nested::{self, Job},
    shell::target,
};

/// Where the image is in the outer guest.
const IMAGE: &str = "/image.raw";

/// What to do.
#[derive(Args)]
pub struct EnginesArgs {
    /// The engine that the machine is launched under. A boot under the translator inside emulated AMD-V takes minutes
    #[arg(long, value_enum, default_value = "kvm")]
    first: Engine,

    /// We are inside the emulated AMD-V already
    #[arg(long, hide = true)]
    inside: bool,
}

/// Does it all.
pub fn run(args: &EnginesArgs) -> Result<()> {
    if args.inside {
        return inside::run(args.first);
    }
    machine::build()?;
    let image = target().join("xtask/engines.raw");
    guest::make(&image)?;
    let same = |path: PathBuf| (path.clone(), path);
    let job = Job {
        program: env::current_exe()?,
        args: ["engines", "--inside", "--first", args.first.name()].map(String::from).to_vec(),
        env: vec![("CARGO_TARGET_DIR".into(), target().to_string_lossy().into())],
        files: vec![same(machine::program()), (image.clone(), IMAGE.into())],
        disks: Vec::new(),
        cpu: nested::CPUS[0].into(),
        cpus: 2,
        memory: 2048,
        timeout: Duration::from_secs(1200),
    };
    let shown = nested::succeeds_inside(&job)?;
    fs::remove_file(&image)?;
    ensure!(shown, "emulated AMD-V did not carry it in {} attempts: nothing is known", nested::ATTEMPTS);
    Ok(())
}
