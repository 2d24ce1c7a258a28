//! Debian's image under load for a long time, with 2 vCPUs under the translator: stress-ng that checks its own results,
//! and a C project that is built and tested in the guest. The guest's kernel must have nothing to complain about either.

mod build;
mod complaints;
mod job;
mod stress;

use std::time::Instant;

use anyhow::{Result, ensure};
use clap::{Args, ValueEnum};

use self::job::LIMIT;
use crate::{
    debian::{Connection, Debian, PROMPT, prepare, purlin_translator},
    machine,
};

/// What to do, and for how long. The guest installs what it needs from its own mirror.
#[derive(Args)]
pub struct SoakArgs {
    /// An image of the store; it is built if it is not there yet
    #[arg(long, default_value = "debian")]
    image: String,
    /// How long stress-ng works
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    minutes: u32,
    /// One part only
    #[arg(long)]
    only: Option<Part>,
}

/// A part of the chore.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// stress-ng with --verify
    Stress,
    /// xz-utils is built, and its test suite is run
    Build,
}

impl Part {
    fn name(self) -> &'static str {
        match self {
            Self::Stress => "stress",
            Self::Build => "build",
        }
    }

    /// Debian packages that the guest needs for it.
    fn packages(self) -> &'static [&'static str] {
        match self {
            Self::Stress => &["stress-ng"],
            Self::Build => &["build-essential", "dpkg-dev"],
        }
    }
}

/// Boots, works, looks and powers off.
pub fn run(args: &SoakArgs) -> Result<()> {
    machine::build()?;
    let parts = args.only.map_or(vec![Part::Stress, Part::Build], |part| vec![part]);
    let prepared = prepare(&args.image, None)?;
    let mut guest = Debian::start("soak", &prepared, purlin_translator, Connection::user()?)?;
    guest.wait_for(PROMPT)?;
    guest.ssh("systemctl is-system-running --wait")?;
    install(&mut guest, &parts)?;
    for part in parts {
        let start = Instant::now();
        match part {
            Part::Stress => stress::run(&mut guest, args.minutes)?,
            Part::Build => build::run(&mut guest)?,
        }
        no_complaints(&guest)?;
        println!("soak: {} passed in {:.0?}, and the guest's kernel has no complaint", part.name(), start.elapsed());
    }
    guest.ssh("systemctl poweroff")?;
    guest.wait_for_end()
}

fn install(guest: &mut Debian<'_>, parts: &[Part]) -> Result<()> {
    let packages: Vec<_> = parts.iter().flat_map(|part| part.packages()).copied().collect();
    let script = format!(
        "apt-get -q update && DEBIAN_FRONTEND=noninteractive apt-get -q -y --no-install-recommends install {}",
        packages.join(" ")
    );
    job::run(guest, "install", &script, LIMIT)?;
    Ok(())
}

fn no_complaints(guest: &Debian<'_>) -> Result<()> {
    let log = guest.ssh("dmesg")?;
    ensure!(!log.is_empty(), "the guest's kernel log cannot be read; see {}", guest.log().display());
    let found = complaints::of(&log);
    ensure!(found.is_empty(), "the guest's kernel complains, see {}:\n{}", guest.log().display(), found.join("\n"));
    Ok(())
}
