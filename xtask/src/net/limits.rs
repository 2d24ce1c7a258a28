//! Whether `--net user,bps=RATE` is what it says.

use std::thread;

use anyhow::{Result, ensure};

use super::{
    MIB,
    iperf::{self, Direction, Iperf},
    started,
};
use crate::debian::{Connection, prepare, purlin};

/// The guests' limit, in MiB each second, of what a machine under the translator does with ease.
const RATE: u32 = 8;
const SECONDS: u32 = 30;
/// How far a rate may be off.
const TOLERANCE: f64 = 0.05;

/// One guest alone, then two at once.
pub fn run(image: &str, iperf: &Iperf) -> Result<()> {
    let prepared = [prepare(image, None)?, prepare(image, None)?];
    let net = format!("user,bps={RATE}M");
    let mut guests = Vec::new();
    for (name, prepared) in ["net-one", "net-two"].into_iter().zip(&prepared) {
        guests.push(started(name, prepared, purlin, Connection::user_with(&net, &[iperf::PORT])?, iperf)?);
    }
    let wanted = f64::from(RATE) * MIB;
    for direction in [Direction::ToGuest, Direction::FromGuest] {
        let alone = iperf::measure(&guests[0].connection, direction, SECONDS, 1)?;
        println!("{direction}, limited to {RATE} MiB/s: {:.3} MiB/s", alone / MIB);
        ensure!((alone / wanted - 1.0).abs() <= TOLERANCE, "{direction}: the rate is off by more than {TOLERANCE}");
        let shares = thread::scope(|scope| {
            let measuring = guests.iter().map(|guest| &guest.connection);
            let measuring = measuring.map(|guest| scope.spawn(|| iperf::measure(guest, direction, SECONDS, 1)));
            let measuring: Vec<_> = measuring.collect();
            measuring
                .into_iter()
                .map(|thread| thread.join().expect("measuring does not panic"))
                .collect::<Result<Vec<_>>>()
        })?;
        println!("{direction}, two at once: {:.3} and {:.3} MiB/s", shares[0] / MIB, shares[1] / MIB);
        ensure!((shares[0] / shares[1] - 1.0).abs() <= TOLERANCE, "{direction}: the shares differ too much");
    }
    Ok(())
}
