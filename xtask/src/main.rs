//! Chores of the project, one file for each: `cargo xtask test` does all that a change must pass.
#![forbid(unsafe_code)]

mod agent;
mod bench;
mod boot;
mod boot_nested;
mod cycles;
mod debian;
mod disk;
mod engines;
mod figures;
mod footprint;
mod fuzz;
mod guests;
mod home;
mod image;
mod image_nested;
mod import;
mod kept;
mod lane;
mod lint;
mod machine;
mod midboot;
mod nested;
mod net;
mod outer;
mod piped;
mod requirements;
mod schemathesis;
mod shares;
mod shell;
mod soak;
mod unit;

use std::{process::ExitCode, time::Instant};

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::{
    lane::Lane,
    machine::{BedFailed, Engine},
};

/// The exit status where a machine did not come to its end, or QEMU's did not: it may be the test bed's fault.
const NOT_ENDED: u8 = 3;

/// Chores of the project.
#[derive(Parser)]
struct Xtask {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
    /// Install what the tests need, then run them all: lint, unit, piped, schemathesis, boot, image, kept, midboot, nested
    Test,
    /// Install what the tests need (Debian packages, with sudo if need be)
    Setup,
    /// Run a program, or the KVM engine's tests, on KVM inside an emulated AMD-V
    Nested(nested::NestedArgs),
    /// Check formatting, and clippy's warnings as errors
    Lint,
    /// Run the unit and integration tests of all crates
    Unit,
    /// Pipe commands into the shell of `purlin run shell`
    Piped,
    /// Boot Debian's kernels and check what they say, against QEMU too
    Boot(boot::BootArgs),
    /// Boot the image that `purlin image build debian` makes: set-up, ssh, the agent, a clean end
    Image(image::ImageArgs),
    /// That image as a machine that is kept: commands, snapshots, clones
    Kept(kept::KeptArgs),
    /// Machines that are kept, launched to deleted again and again: what is left of them; then many at once
    Cycles(cycles::CyclesArgs),
    /// How machines that are kept share the host: weights, caps, bad neighbours
    Shares(shares::SharesArgs),
    /// Import disks as other systems make them, and boot one
    Import(import::ImportArgs),
    /// The image's network: its throughput against QEMU's, its limits, a download, TAP
    Net(net::NetArgs),
    /// The disk of that image under fio: verified, or measured against QEMU's
    Disk(disk::DiskArgs),
    /// How fast guests run: natively, under QEMU's TCG and under the translator, in turn
    Bench(bench::BenchArgs),
    /// Fuzz what reads a guest's or the network's bytes
    Fuzz(fuzz::FuzzArgs),
    /// Move Debian's boot to new machines at random moments, under the translator
    Midboot(midboot::MidbootArgs),
    /// Machines that are kept under KVM, inside an emulated AMD-V, and from one engine to the other
    Engines(engines::EnginesArgs),
    /// Ask the daemon whatever its description allows and does not: it must never fail, and answer as described
    Schemathesis(schemathesis::SchemathesisArgs),
    /// The image under load for a long time: stress-ng that checks its results, a C project built and tested
    Soak(soak::SoakArgs),
}

fn main() -> ExitCode {
    let done = match Xtask::parse().chore {
        Chore::Test => test(),
        Chore::Setup => requirements::install(),
        Chore::Lint => lint::check(),
        Chore::Unit => unit::test(),
        Chore::Piped => piped::run(),
        Chore::Nested(args) => nested::run(&args),
        Chore::Boot(args) => boot::run(&args),
        Chore::Image(args) => image::run(&args),
        Chore::Kept(args) => kept::run(&args),
        Chore::Cycles(args) => cycles::run(&args),
        Chore::Shares(args) => shares::run(&args),
        Chore::Import(args) => import::run(&args),
        Chore::Net(args) => net::run(&args),
        Chore::Disk(args) => disk::run(&args),
        Chore::Bench(args) => bench::run(&args),
        Chore::Fuzz(args) => fuzz::run_all(&args),
        Chore::Midboot(args) => midboot::run(&args),
        Chore::Engines(args) => engines::run(&args),
        Chore::Schemathesis(args) => schemathesis::run_all(&args),
        Chore::Soak(args) => soak::run(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            if error.is::<BedFailed>() { ExitCode::from(NOT_ENDED) } else { ExitCode::FAILURE }
        }
    }
}

/// What needs KVM, in a lane of its own: inside emulated AMD-V all of it is slow.
const KVM: &[&[&str]] = &[&["nested"], &["boot", "--engine", "kvm"]];

/// The parts in the order in which they fail soonest.
fn test() -> Result<()> {
    let start = Instant::now();
    part("setup", requirements::install)?;
    part("lint", lint::check)?;
    part("unit", unit::test)?;
    part("piped", piped::run)?;
    part("schemathesis", || schemathesis::run_all(&schemathesis::SchemathesisArgs::default()))?;
    let kvm = Lane::start("kvm", KVM)?;
    let translator = test_translator();
    // It is waited for either way: what it has to say is then known too, and no guest is left behind.
    let kvm = kvm.finish();
    translator.and(kvm)?;
    println!("== all passed in {:.0?}", start.elapsed());
    Ok(())
}

fn test_translator() -> Result<()> {
    part("boot", || boot::run(&boot::BootArgs::on(Engine::Translator)))?;
    part("image", || image::run(&image::ImageArgs::default()))?;
    part("kept", || kept::run(&kept::KeptArgs::default()))?;
    part("midboot", || midboot::run(&midboot::MidbootArgs::default()))
}

fn part(name: &str, run: impl FnOnce() -> Result<()>) -> Result<()> {
    println!("== {name}");
    let start = Instant::now();
    run()?;
    println!("== {name}: passed in {:.0?}", start.elapsed());
    Ok(())
}
