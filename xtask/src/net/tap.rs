//! A guest on a TAP interface, in a network namespace that is made for it.

use std::{fs, process::Command};

use anyhow::{Result, ensure};

use super::{
    MIB,
    iperf::{self, Direction, Iperf},
    started,
};
use crate::{
    debian::{Connection, prepare, purlin},
    shell,
};

const HOST: &str = "10.99.0.1";
const GUEST: &str = "10.99.0.2";
/// Of the transfer that is compared, in bytes.
const SIZE: usize = 64 << 20;

/// Gives the guest's card its address as soon as there is somebody who can.
const USER_DATA: &str = "#cloud-config\nbootcmd:\n- ip address add 10.99.0.2/24 dev $(ls /sys/class/net | grep ^e)\n";

/// The namespace, with a bridge and the interface in it; all gone when dropped.
struct Namespace(String);

impl Namespace {
    fn new() -> Result<Self> {
        let new = Self(format!("purlin-{}", std::process::id()));
        shell::run(Command::new("ip").args(["netns", "add", &new.0]))?;
        new.ip("link set lo up")?;
        new.ip("link add br0 type bridge")?;
        new.ip("tuntap add tap0 mode tap multi_queue")?;
        new.ip("link set tap0 master br0")?;
        new.ip(&format!("address add {HOST}/24 dev br0"))?;
        new.ip("link set br0 up")?;
        new.ip("link set tap0 up")?;
        Ok(new)
    }

    fn ip(&self, arguments: &str) -> Result<()> {
        shell::run(Command::new("ip").args(["-n", &self.0]).args(arguments.split(' ')))
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "delete", &self.0]).status();
    }
}

/// Ping, a transfer there and back, and how fast it is.
pub fn run(image: &str, iperf: &Iperf, seconds: u32) -> Result<()> {
    let namespace = Namespace::new()?;
    let dir = tempfile::tempdir()?;
    let user_data = dir.path().join("user-data");
    fs::write(&user_data, USER_DATA)?;
    let mut prepared = prepare(image, Some(&user_data))?;
    // Nobody answers DHCP here; that would count as a failure.
    prepared.cmdline.push_str(" systemd.mask=systemd-networkd-wait-online.service");
    let connection = Connection::tap("tap=tap0", GUEST, &namespace.0);
    let guest = started("net-tap", &prepared, purlin, connection, iperf)?;
    let said = guest.ssh(&format!("ping -c 3 -q {HOST} | grep -o '3 received'"))?;
    ensure!(said.trim() == "3 received", "the guest's ping gets no answer: {said}");

    let data: Vec<u8> = (0..SIZE).map(|i| b'a' + (i.wrapping_mul(i / 7 + 1) >> 5) as u8 % 26).collect();
    guest.ssh_with("cat > /root/data", &data)?;
    ensure!(guest.ssh("cat /root/data")?.as_bytes() == data, "the data came back changed");
    println!("{} MiB there and back are the same", SIZE >> 20);

    println!("queues: {}", guest.ssh("ls -d /sys/class/net/e*/queues/*")?.replace('\n', " "));
    for direction in [Direction::ToGuest, Direction::FromGuest] {
        for streams in [1, 4] {
            let rate = iperf::measure(&guest.connection, direction, seconds, streams)? / MIB;
            println!("{direction} by TAP, {streams} connections: {rate:.0} MiB/s");
        }
    }
    Ok(())
}
