//! A large download through the NAT, whose checksum the guest makes.

use std::{
    io::{BufWriter, Write},
    net::{TcpListener, TcpStream},
    process::Command,
    thread,
    time::Instant,
};

use anyhow::{Context, Result, ensure};

use super::MIB;
use crate::debian::{Connection, Debian, PROMPT, prepare, purlin};

/// Downloads `size` bytes from the host's loopback, once to the guest and once to the host itself.
pub fn run(image: &str, size: u64) -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // Who ends early has another checksum.
            thread::spawn(move || send(&stream, size));
        }
    });
    let sum = |host: &str| format!("sha256sum < /dev/tcp/{host}/{port}");
    let own = Command::new("bash").args(["-c", &sum("127.0.0.1")]).output().context("bash")?;
    let own = String::from_utf8(own.stdout)?;
    ensure!(own.len() > 64, "the host cannot make the checksum");

    let prepared = prepare(image, None)?;
    let mut guest = Debian::start("net-download", &prepared, purlin, Connection::user_with("user,loopback", &[])?)?;
    guest.wait_for(PROMPT)?;
    guest.ssh("systemctl is-system-running --wait")?;
    let start = Instant::now();
    let theirs = guest.ssh(&format!("bash -c '{}'", sum("10.0.2.2")))?;
    let rate = size as f64 / MIB / start.elapsed().as_secs_f64();
    ensure!(theirs == own, "the guest got something else: {theirs}instead of {own}");
    println!("{} MiB downloaded, with its checksum made in the guest: {rate:.0} MiB/s; it is right", size >> 20);
    Ok(())
}

/// Bytes that do not repeat (xorshift64, Marsaglia 2003), the same each time.
fn send(stream: &TcpStream, size: u64) -> std::io::Result<()> {
    let mut stream = BufWriter::with_capacity(1 << 20, stream);
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    for _ in 0..size / 8 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        stream.write_all(&state.to_le_bytes())?;
    }
    stream.flush()
}
