//! The network of Debian's image: how fast it is against QEMU's, whether what is told comes true (a rate, a checksum),
//! and a TAP interface. Figures are printed, never judged, but for what a limit promises.

mod download;
mod iperf;
mod limits;
mod tap;

use anyhow::{Result, ensure};
use clap::Args;

use self::iperf::{Direction, Iperf};
use crate::{
    debian::{Connection, Debian, PROMPT, Runner, prepare, print_beyond_guest, purlin_translator, qemu},
    figures::median,
    machine,
};

/// What to try. Without any of these: the throughput of the user-mode network, against QEMU's.
#[derive(Args)]
pub struct NetArgs {
    /// An image of the store; it is built if it is not there yet
    #[arg(long, default_value = "debian")]
    image: String,
    /// How often to measure each, in turn
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// How long to measure at a time, in seconds
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    seconds: u32,
    /// Connections at a time
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=32))]
    streams: u32,
    /// Download so many MiB from the host, and compare the checksum
    #[arg(long, value_name = "MIB", num_args = 0..=1, default_missing_value = "1024")]
    download: Option<u64>,
    /// Whether a rate holds over 30 seconds, and two guests of equal rates get equal shares, within 5 %
    #[arg(long)]
    limits: bool,
    /// A guest on a TAP interface in a network namespace (as root)
    #[arg(long)]
    tap: bool,
}

/// Does what is asked for.
pub fn run(args: &NetArgs) -> Result<()> {
    machine::build()?;
    if let Some(size) = args.download {
        return download::run(&args.image, size << 20);
    }
    let iperf = Iperf::obtain()?;
    match (args.limits, args.tap) {
        (true, _) => limits::run(&args.image, &iperf),
        (_, true) => tap::run(&args.image, &iperf, args.seconds),
        _ => compare(args, &iperf),
    }
}

/// Both machines run all the time and are measured in turn, so that a change of the host's load meets both.
fn compare(args: &NetArgs, iperf: &Iperf) -> Result<()> {
    let prepared = [prepare(&args.image, None)?, prepare(&args.image, None)?];
    let mut guests = Vec::new();
    let names: [(&str, Runner); 2] = [("net-purlin", purlin_translator), ("net-qemu", qemu)];
    for ((name, runner), prepared) in names.into_iter().zip(&prepared) {
        guests.push(started(name, prepared, runner, Connection::user_with("user", &[iperf::PORT])?, iperf)?);
    }
    for direction in [Direction::ToGuest, Direction::FromGuest] {
        let mut figures = [Vec::new(), Vec::new()];
        for _ in 0..args.rounds {
            for (guest, figures) in guests.iter().zip(&mut figures) {
                figures.push(iperf::measure(&guest.connection, direction, args.seconds, args.streams)?);
            }
        }
        let [ours, theirs] = figures.map(median);
        let (ours_mib, theirs_mib) = (ours / MIB, theirs / MIB);
        println!(
            "{direction}, medians of {}: purlin {ours_mib:.0} MiB/s, QEMU {theirs_mib:.0} MiB/s: {:.2} times",
            args.rounds,
            ours / theirs
        );
    }
    print_beyond_guest(&guests[0], &guests[1])
}

/// Bytes.
const MIB: f64 = 1_048_576.0;

/// A guest that has booted, and serves iperf3.
fn started<'a>(
    name: &str,
    prepared: &'a purlin_images::prepare::Prepared,
    runner: Runner,
    connection: Connection,
    iperf: &Iperf,
) -> Result<Debian<'a>> {
    let mut guest = Debian::start(name, prepared, runner, connection)?;
    guest.wait_for(PROMPT)?;
    let said = guest.ssh("systemctl is-system-running --wait")?;
    ensure!(said.trim() == "running", "the guest says that it is {said:?}; see {}", guest.log().display());
    iperf.install(&guest)?;
    Ok(guest)
}
