//! The disk of Debian's image under fio: whether what was written is read back, and how fast it is against QEMU's.
//! Figures are printed, never judged.

use std::fs;

use anyhow::{Context, Result, ensure};
use clap::Args;
use purlin_images::prepare::Prepared;

use crate::{
    debian::{Connection, Debian, PROMPT, Runner, prepare, print_beyond_guest, purlin_translator, qemu},
    figures::median,
    machine,
};

/// What to try. Without --verify: the throughput against QEMU's, on a qcow2 overlay each.
#[derive(Args)]
pub struct DiskArgs {
    /// An image of the store; it is built if it is not there yet
    #[arg(long, default_value = "debian")]
    image: String,
    /// How often to measure each, in turn
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// How long to measure at a time, in seconds
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    seconds: u32,
    /// Read and write at random for so many minutes, at several depths, with every block's checksum compared
    #[arg(long, value_name = "MINUTES", num_args = 0..=1, default_missing_value = "10")]
    verify: Option<u32>,
}

/// Requests under way in a part of the verification.
const DEPTHS: [u32; 4] = [1, 4, 16, 64];

/// What is measured: a name, and fio's settings.
const LOADS: [(&str, &str); 4] = [
    ("1 MiB reads in order", "--rw=read --bs=1M --iodepth=4"),
    ("1 MiB writes in order", "--rw=write --bs=1M --iodepth=4"),
    ("4 KiB reads at random", "--rw=randread --bs=4k --iodepth=16"),
    ("4 KiB writes at random", "--rw=randwrite --bs=4k --iodepth=16"),
];

/// All loads are on the same file, past the guest's own cache.
const COMMON: &str = "--name=load --filename=/root/fio.data --size=512M --ioengine=libaio --direct=1";

/// Does what is asked for.
pub fn run(args: &DiskArgs) -> Result<()> {
    machine::build()?;
    let prepared = [prepare(&args.image, None)?, prepare(&args.image, None)?];
    install(&prepared[0])?;
    match args.verify {
        Some(minutes) => verify(&prepared[0], minutes),
        None => {
            fs::copy(&prepared[0].disk, &prepared[1].disk)?;
            compare(args, &prepared)
        }
    }
}

/// Installs fio from the guest's own sources, and lays out its file.
fn install(prepared: &Prepared) -> Result<()> {
    let mut guest = booted("disk-install", prepared, purlin_translator)?;
    let install = "apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends install fio \
                   >/dev/null && fio --version";
    let said = guest.ssh(install)?;
    ensure!(said.starts_with("fio-"), "fio cannot be installed in the guest: {said}");
    fio(&guest, "--rw=write --bs=1M --iodepth=4")?;
    guest.ssh("systemctl poweroff")?;
    guest.wait_for_end()
}

fn booted<'a>(name: &str, prepared: &'a Prepared, runner: Runner) -> Result<Debian<'a>> {
    let mut guest = Debian::start(name, prepared, runner, Connection::user()?)?;
    guest.wait_for(PROMPT)?;
    guest.ssh("systemctl is-system-running --wait")?;
    Ok(guest)
}

/// Every block carries a checksum and its place; fio ends with an error at the first that is not what was written.
fn verify(prepared: &Prepared, minutes: u32) -> Result<()> {
    let guest = booted("disk-verify", prepared, purlin_translator)?;
    let seconds = minutes * 60 / DEPTHS.len() as u32;
    for depth in DEPTHS {
        let load = format!(
            "--rw=randrw --bsrange=4k-64k --iodepth={depth} --verify=crc32c --verify_backlog=512 --verify_fatal=1 \
             --randrepeat=0 --time_based --runtime={seconds}"
        );
        let [read, written] = fio(&guest, &load)?;
        println!(
            "depth {depth}, {seconds} s: {:.0} MiB/s read, {:.0} MiB/s written, no error",
            read / KIB,
            written / KIB
        );
    }
    Ok(())
}

/// KiB in a MiB.
const KIB: f64 = 1024.0;

/// Both machines run all the time and are measured in turn, so that a change of the host's load meets both.
fn compare(args: &DiskArgs, prepared: &[Prepared; 2]) -> Result<()> {
    let guests = [booted("disk-purlin", &prepared[0], purlin_translator)?, booted("disk-qemu", &prepared[1], qemu)?];
    for (name, load) in LOADS {
        let load = format!("{load} --time_based --runtime={}", args.seconds);
        let mut figures = [Vec::new(), Vec::new()];
        for _ in 0..args.rounds {
            for (guest, figures) in guests.iter().zip(&mut figures) {
                figures.push(fio(guest, &load)?.iter().sum::<f64>());
            }
        }
        let [ours, theirs] = figures.map(median);
        let (ours_mib, theirs_mib) = (ours / KIB, theirs / KIB);
        println!(
            "{name}, medians of {}: purlin {ours_mib:.1} MiB/s, QEMU {theirs_mib:.1} MiB/s: {:.2} times",
            args.rounds,
            ours / theirs
        );
    }
    print_beyond_guest(&guests[0], &guests[1])
}

/// Runs a load: KiB read and written each second.
fn fio(guest: &Debian<'_>, load: &str) -> Result<[f64; 2]> {
    let said = guest.ssh(&format!("fio --minimal --terse-version=3 {COMMON} {load} || echo failed"))?;
    ensure!(!said.contains("failed"), "fio {load}: {said}; see {}", guest.log().display());
    rates(&said).with_context(|| format!("fio {load} has no result: {said}"))
}

/// The bandwidths of fio's terse output, version 3: fields 7 and 48 (fio's manual, "Terse output").
fn rates(said: &str) -> Option<[f64; 2]> {
    let fields: Vec<&str> = said.lines().find(|line| line.starts_with("3;"))?.split(';').collect();
    let rate = |number: usize| fields.get(number - 1)?.parse().ok();
    Some([rate(7)?, rate(48)?])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rates_are_the_seventh_and_the_forty_eighth_field() {
        let fields: Vec<String> = (1..60).map(|number| number.to_string()).collect();
        let line = fields.join(";").replacen("1;", "3;", 1);
        assert_eq!(rates(&format!("note\n{line}\n")), Some([7.0, 48.0]));
        assert_eq!(rates("3;fio"), None);
    }
}
