//! iperf3: its client on the host, its server in the guest, which gets the host's own packages.

use std::{
    fmt, fs,
    path::PathBuf,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use crate::{
    debian::{Connection, Debian},
    shell::{is_installed, run},
};

/// The port that the guest's server listens to.
pub const PORT: u16 = 5201;

/// How often to try again while the server is busy, each after a second.
const SERVER_RETRIES: u32 = 30;

/// Which way the data goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the host to the guest.
    ToGuest,
    /// From the guest to the host.
    FromGuest,
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ToGuest => "host to guest",
            Self::FromGuest => "guest to host",
        })
    }
}

/// The tool, with what a guest needs of it.
pub struct Iperf {
    packages: TempDir,
}

impl Iperf {
    /// Finds it, and fetches its packages for the guest: an image is made of the same sources as the host's packages.
    pub fn obtain() -> Result<Self> {
        ensure!(is_installed("iperf3"), "this chore needs iperf3: install it with 'apt-get install iperf3'");
        let packages = tempfile::tempdir()?;
        let fetch = ["-q", "download", "iperf3", "libiperf0", "libsctp1"];
        run(Command::new("apt-get").args(fetch).current_dir(packages.path()))?;
        Ok(Self { packages })
    }

    /// Installs and starts the server.
    pub fn install(&self, guest: &Debian<'_>) -> Result<()> {
        let mut packages: Vec<PathBuf> =
            fs::read_dir(&self.packages)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
        packages.sort();
        for package in packages {
            let name = package.file_name().context("a package without a name")?.to_string_lossy().into_owned();
            guest.ssh_with(&format!("cat > '/tmp/{name}'"), &fs::read(&package)?)?;
        }
        let said = guest.ssh(&format!(
            "DEBIAN_FRONTEND=noninteractive dpkg -i /tmp/*.deb >/dev/null && iperf3 -s -D -p {PORT} && echo started"
        ))?;
        ensure!(said.trim() == "started", "iperf3 cannot be installed in the guest: {said}");
        Ok(())
    }
}

/// How much arrives, in bytes each second.
pub fn measure(guest: &Connection, direction: Direction, seconds: u32, streams: u32) -> Result<f64> {
    // The server serves one client at a time, and needs a moment after each.
    for _ in 0..SERVER_RETRIES {
        let output = command(guest, direction, seconds, streams)?.output().context("iperf3")?;
        if output.status.success() {
            return figure(&output);
        }
        thread::sleep(Duration::from_secs(1));
    }
    figure(&command(guest, direction, seconds, streams)?.output()?)
}

/// The client's command.
fn command(guest: &Connection, direction: Direction, seconds: u32, streams: u32) -> Result<Command> {
    let (address, port) = guest.address_of(PORT)?;
    let mut command = guest.command("iperf3");
    command.args(["-c", &address, "-p", &port.to_string(), "-f", "k"]);
    command.args(["-t", &seconds.to_string(), "-P", &streams.to_string()]);
    if direction == Direction::FromGuest {
        command.arg("-R");
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    Ok(command)
}

/// What the receiver counted, in bytes each second: the number before `Kbits/sec` in the last line about it (with
/// several connections that of their sum).
fn figure(output: &std::process::Output) -> Result<f64> {
    let said = String::from_utf8_lossy(&output.stdout);
    let line = said.lines().rev().find(|line| line.trim_end().ends_with("receiver"));
    let words: Vec<&str> = line.unwrap_or_default().split_whitespace().collect();
    let rate = words.iter().position(|word| *word == "Kbits/sec").and_then(|at| words.get(at.checked_sub(1)?));
    let rate = rate
        .and_then(|rate| rate.parse::<f64>().ok())
        .with_context(|| format!("iperf3 has no result: {said}{}", String::from_utf8_lossy(&output.stderr)))?;
    Ok(rate * 1000.0 / 8.0)
}

#[cfg(test)]
mod tests {
    use std::{os::unix::process::ExitStatusExt, process::ExitStatus};

    use super::*;

    fn output(stdout: &str) -> std::process::Output {
        std::process::Output { status: ExitStatus::from_raw(0), stdout: stdout.into(), stderr: Vec::new() }
    }

    #[test]
    fn the_receivers_figure_counts() {
        let one = "[  5]   0.00-5.00   sec   750 MBytes  1258000 Kbits/sec    0             sender\n\
                   [  5]   0.00-5.04   sec   749 MBytes  1248000 Kbits/sec                  receiver\n\niperf Done.\n";
        assert_eq!(figure(&output(one)).unwrap(), 156e6);
        assert!(figure(&output("iperf3: error - unable to connect")).is_err());
    }
}
