//! Boots the image that `purlin image build debian` makes as `purlin run debian` does: it is set up by cloud-init, lets
//! ssh in, runs without a failed unit, has an agent that does what it is asked, and leaves a clean disk behind. And how
//! long it takes, against QEMU.

use std::{
    fs,
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    process::{Command, Stdio},
    thread,
};

use anyhow::{Context, Result, ensure};
use clap::Args;
use purlin_images::prepare::Prepared;

use crate::{
    agent,
    debian::{Connection, Debian, HOST_NAME, PROMPT, Runner, prepare, purlin, qemu},
    figures::median,
    image_nested, machine, shell,
};

/// What to boot.
#[derive(Args)]
pub struct ImageArgs {
    /// An image of the store; it is built if it is not there yet
    #[arg(long, default_value = "debian")]
    image: String,
    /// Also install a package in the guest, from its own mirror
    #[arg(long)]
    apt: bool,
    /// Boot it under the KVM engine inside emulated AMD-V instead
    #[arg(long, conflicts_with_all = ["qemu", "timing", "apt"])]
    kvm: bool,
    /// Boot it under QEMU's TCG instead
    #[arg(long)]
    qemu: bool,
    /// Only measure the time to the shell on the console, under both in turn, so many times
    #[arg(long, value_name = "ROUNDS")]
    timing: Option<usize>,
}

impl Default for ImageArgs {
    fn default() -> Self {
        Self { image: "debian".into(), apt: false, kvm: false, qemu: false, timing: None }
    }
}

/// Commands for the guest, and what each must say.
const CHECKS: [(&str, &str); 7] = [
    ("systemctl is-system-running --wait", "running"),
    ("systemctl --failed --no-legend --plain", ""),
    ("cloud-init status --wait | tail -n 1", "status: done"),
    ("hostname", HOST_NAME),
    // None is renamed: see 80-ethernet.network in the image.
    ("echo $(ls /sys/class/net)", "eth0 lo"),
    ("cat /root/from-user-data", "it was read"),
    ("df --output=size --block-size=1G / | tail -n 1 | tr -d ' '", "13"),
];

const USER_DATA: &str = "#cloud-config\nwrite_files:\n- {path: /root/from-user-data, content: it was read}\n";

/// Boots, looks and powers off.
pub fn run(args: &ImageArgs) -> Result<()> {
    machine::build()?;
    match args.timing {
        _ if args.kvm => image_nested::run(&args.image),
        Some(rounds) => compare_times(args, rounds),
        None => check(args),
    }
}

/// In turn, so that a change of the host's load meets both; medians.
fn compare_times(args: &ImageArgs, rounds: usize) -> Result<()> {
    ensure!(rounds > 0, "--timing 0 measures nothing");
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        for (command, times) in [(purlin as Runner, &mut ours), (qemu, &mut theirs)] {
            let prepared = prepare(&args.image, None)?;
            times.push(Debian::start("image", &prepared, command, Connection::user()?)?.wait_for(PROMPT)?);
        }
    }
    let (ours, theirs) = (median(ours), median(theirs));
    let ratio = ours.as_secs_f64() / theirs.as_secs_f64();
    println!("start to the shell, medians of {rounds}: purlin {ours:.2?}, QEMU {theirs:.2?}: {ratio:.2} times");
    Ok(())
}

fn check(args: &ImageArgs) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let user_data = dir.path().join("user-data");
    fs::write(&user_data, USER_DATA)?;
    let prepared = prepare(&args.image, Some(&user_data))?;
    let runner = if args.qemu { qemu } else { purlin_with_more };
    let mut guest = Debian::start("image", &prepared, runner, Connection::user()?)?;
    let login = guest.wait_for(PROMPT)?;
    for (command, wanted) in CHECKS {
        let said = guest.ssh(command)?;
        ensure!(said.trim() == wanted, "{command}: {said:?} instead of {wanted:?}; see {}", guest.log().display());
    }
    if !args.qemu {
        check_vsock(&guest)?;
    }
    if args.apt {
        let said = guest.ssh("apt-get -qq update && apt-get -qq -y install hello >/dev/null && hello")?;
        ensure!(said.contains("Hello, world!"), "no package could be installed: {said}");
    }
    if !args.qemu {
        agent::check(&guest)?;
    }
    println!("{}", guest.ssh("systemd-analyze; systemd-analyze blame --no-pager | head -n 12")?.trim());
    guest.ssh("systemctl poweroff")?;
    guest.wait_for_end()?;
    check_disk(&prepared.disk, dir.path())?;
    println!("{login:.1?} from the start to the shell on the console");
    Ok(())
}

/// The port of the host's that the guest connects to.
const VSOCK_PORT: u32 = 5000;

/// Sends to the host, which sends it back, and says what it got.
const VSOCK_CLIENT: &str = "python3 -c 'import socket; s = socket.socket(socket.AF_VSOCK); s.connect((2, 5000)); \
                            s.sendall(b\"to and fro\" * 100000); s.shutdown(1); \
                            print(sum(map(len, iter(lambda: s.recv(65536), b\"\"))))'";

/// Data goes from the guest to a program of the host's and back, by virtio-vsock.
fn check_vsock(guest: &Debian<'_>) -> Result<()> {
    let path = format!("{}_{VSOCK_PORT}", agent::socket(&guest.connection).display());
    let listener = UnixListener::bind(&path).with_context(|| format!("cannot listen at {path}"))?;
    let host = thread::spawn(move || -> std::io::Result<()> {
        let (mut stream, _) = listener.accept()?;
        let mut data = Vec::new();
        stream.read_to_end(&mut data)?;
        stream.write_all(&data)
    });
    let said = guest.ssh(VSOCK_CLIENT);
    // Nobody may wait for a guest that never came.
    drop(UnixStream::connect(&path));
    let echoed = host.join().ok().context("the host's program panicked")?;
    fs::remove_file(&path)?;
    echoed.context("the host's program")?;
    let said = said?;
    ensure!(
        said.trim() == "1000000",
        "by vsock the guest got {said:?} of 1000000 bytes; see {}",
        guest.log().display()
    );
    Ok(())
}

/// e2fsck is the judge of the file system.
fn check_disk(disk: &Path, dir: &Path) -> Result<()> {
    let raw = dir.join("disk.raw");
    shell::run(Command::new("qemu-img").arg("check").arg("-q").arg(disk))?;
    shell::run(Command::new("qemu-img").args(["convert", "-O", "raw"]).arg(disk).arg(&raw))?;
    check_file_system(&raw)
}

/// The same of a raw image.
pub fn check_file_system(raw: &Path) -> Result<()> {
    shell::run(Command::new("e2fsck").arg("-fn").arg(raw).stdout(Stdio::null()))
}

/// With the devices that QEMU's machine has not.
fn purlin_with_more(prepared: &Prepared, connection: &Connection) -> Command {
    let mut command = purlin(prepared, connection);
    command.arg("--vsock").arg(agent::socket(connection)).args(["--balloon", "size=64M"]);
    command
}
