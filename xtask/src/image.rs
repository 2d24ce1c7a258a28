//! Boots the image that `purlin image build debian` makes as `purlin run debian` does: it is set up by cloud-init, lets
//! ssh in, runs without a failed unit, and leaves a clean disk behind. And how long it takes, against QEMU.

use std::{
    fs,
    io::{Read, Write},
    net::TcpListener,
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc::{self, Receiver, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use purlin_images::{
    prepare::{Prepared, Request, prepare_run},
    store::Store,
};

use crate::{
    boot::median,
    guests::Printed,
    machine,
    shell::{self, target},
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
    /// Boot it under QEMU's TCG instead
    #[arg(long)]
    qemu: bool,
    /// Only measure the time to the shell on the console, under both in turn, so many times
    #[arg(long, value_name = "ROUNDS")]
    timing: Option<usize>,
}

impl Default for ImageArgs {
    fn default() -> Self {
        Self { image: "debian".into(), apt: false, qemu: false, timing: None }
    }
}

/// Far more than a boot takes, also on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(300);
const HOST_NAME: &str = "purlin-test";
/// The shell's, once somebody is logged in.
const PROMPT: &str = "root@purlin-test:~# ";

/// Commands for the guest, and what each must say.
const CHECKS: [(&str, &str); 6] = [
    ("systemctl is-system-running --wait", "running"),
    ("systemctl --failed --no-legend --plain", ""),
    ("cloud-init status --wait | tail -n 1", "status: done"),
    ("hostname", HOST_NAME),
    ("cat /root/from-user-data", "it was read"),
    ("df --output=size --block-size=1G / | tail -n 1 | tr -d ' '", "13"),
];

const USER_DATA: &str = "#cloud-config\nwrite_files:\n- {path: /root/from-user-data, content: it was read}\n";

/// Boots, looks and powers off.
pub fn run(args: &ImageArgs) -> Result<()> {
    machine::build()?;
    match args.timing {
        Some(rounds) => compare_times(args, rounds),
        None => check(args),
    }
}

/// A machine of the image, with a disk of its own that has not booted yet.
fn prepare(image: &str, user_data: Option<&Path>) -> Result<Prepared> {
    let disk_size = Some(13 << 30);
    let request = Request { image, host_name: Some(HOST_NAME), user_data, disk_size, arguments: None };
    Ok(prepare_run(&Store::of_user()?, &request, &Printed("image"))?)
}

/// In turn, so that a change of the host's load meets both; medians.
fn compare_times(args: &ImageArgs, rounds: usize) -> Result<()> {
    ensure!(rounds > 0, "--timing 0 measures nothing");
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        for (command, times) in [(purlin as Runner, &mut ours), (qemu, &mut theirs)] {
            let prepared = prepare(&args.image, None)?;
            times.push(Guest::start(&prepared, command)?.wait_for(PROMPT)?);
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
    let mut guest = Guest::start(&prepared, if args.qemu { qemu } else { purlin_with_more })?;
    let login = guest.wait_for(PROMPT)?;
    for (command, wanted) in CHECKS {
        let said = guest.ssh(command)?;
        ensure!(said.trim() == wanted, "{command}: {said:?} instead of {wanted:?}; see {}", log().display());
    }
    if !args.qemu {
        check_vsock(&guest)?;
    }
    if args.apt {
        let said = guest.ssh("apt-get -qq update && apt-get -qq -y install hello >/dev/null && hello")?;
        ensure!(said.contains("Hello, world!"), "no package could be installed: {said}");
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
fn check_vsock(guest: &Guest<'_>) -> Result<()> {
    let path = format!("{}_{VSOCK_PORT}", vsock_path(guest.port).display());
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
    ensure!(said.trim() == "1000000", "by vsock the guest got {said:?} of 1000000 bytes; see {}", log().display());
    Ok(())
}

/// The socket of a guest with this port.
fn vsock_path(port: u16) -> PathBuf {
    std::env::temp_dir().join(format!("purlin-xtask-{port}.vsock"))
}

/// e2fsck is the judge of the file system.
fn check_disk(disk: &Path, dir: &Path) -> Result<()> {
    let raw = dir.join("disk.raw");
    shell::run(Command::new("qemu-img").arg("check").arg("-q").arg(disk))?;
    shell::run(Command::new("qemu-img").args(["convert", "-O", "raw"]).arg(disk).arg(&raw))?;
    shell::run(Command::new("e2fsck").arg("-fn").arg(&raw).stdout(Stdio::null()))
}

/// The command that runs a machine, with the host's port that leads to its ssh.
type Runner = fn(&Prepared, u16) -> Command;

/// The guest, running.
struct Guest<'a> {
    child: Child,
    start: Instant,
    console: Receiver<Vec<u8>>,
    transcript: Vec<u8>,
    port: u16,
    prepared: &'a Prepared,
}

impl<'a> Guest<'a> {
    fn start(prepared: &'a Prepared, runner: Runner) -> Result<Self> {
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let start = Instant::now();
        let mut child = runner(prepared, port).stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let (sender, console) = mpsc::channel();
        let mut pipe = child.stdout.take().context("no output")?;
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = pipe.read(&mut buffer) {
                if sender.send(buffer[..count].to_vec()).is_err() {
                    break;
                }
            }
        });
        Ok(Self { child, start, console, transcript: vec![], port, prepared })
    }

    /// When the guest has said `text` on its console.
    fn wait_for(&mut self, text: &str) -> Result<Duration> {
        while !String::from_utf8_lossy(&self.transcript).contains(text) {
            self.listen().with_context(|| format!("waiting for {text:?}; see {}", log().display()))?;
        }
        Ok(self.start.elapsed())
    }

    fn listen(&mut self) -> Result<()> {
        let left = PATIENCE.saturating_sub(self.start.elapsed());
        match self.console.recv_timeout(left) {
            Ok(said) => self.transcript.extend(said),
            Err(RecvTimeoutError::Timeout) => bail!("not within {PATIENCE:?}"),
            Err(RecvTimeoutError::Disconnected) => bail!("the guest has ended"),
        }
        fs::create_dir_all(log().parent().unwrap_or(Path::new(".")))?;
        Ok(fs::write(log(), &self.transcript)?)
    }

    fn wait_for_end(&mut self) -> Result<()> {
        while self.listen().is_ok() {}
        let status = self.child.wait()?;
        ensure!(status.success(), "the run ended with {status}");
        let said = String::from_utf8_lossy(&self.transcript);
        ensure!(said.contains("reboot: Power down"), "the guest did not power off; see {}", log().display());
        Ok(())
    }

    /// What a command says in the guest. sshd may not be up yet when the console is.
    fn ssh(&self, command: &str) -> Result<String> {
        loop {
            let mut ssh = Command::new("ssh");
            ssh.args(["-q", "-p", &self.port.to_string(), "-o", "BatchMode=yes", "-o", "ConnectTimeout=10"]);
            ssh.args(["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]);
            if let Some(identity) = &self.prepared.identity {
                ssh.arg("-i").arg(identity);
            }
            let output = ssh.args(["root@127.0.0.1", command]).stdin(Stdio::null()).output().context("ssh")?;
            // ssh's own status where there is no connection.
            if output.status.code() != Some(255) || command.contains("poweroff") {
                std::io::stderr().write_all(&output.stderr)?;
                return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
            }
            ensure!(self.start.elapsed() < PATIENCE, "ssh gets no connection; see {}", log().display());
            thread::sleep(Duration::from_millis(500));
        }
    }
}

impl Drop for Guest<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn purlin(prepared: &Prepared, port: u16) -> Command {
    let mut command = Command::new(machine::program());
    command.args(["run", "--memory", "1G", "--cpus", "2", "--device", "rng", "--net", "user"]);
    command.arg("--kernel").arg(&prepared.kernel).arg("--cmdline").arg(&prepared.cmdline);
    command.args(prepared.initrds.iter().flat_map(|initrd| ["--initrd".into(), initrd.clone()]));
    let disk = |path: &PathBuf, options: &str| format!("{},{options}", path.display());
    command.args(["--disk", &disk(&prepared.disk, "format=qcow2")]);
    command.args(["--disk", &disk(&prepared.seed, "format=raw,readonly")]);
    command.arg("--publish").arg(format!("127.0.0.1:{port}:22"));
    command
}

/// With the devices that QEMU's machine has not.
fn purlin_with_more(prepared: &Prepared, port: u16) -> Command {
    let mut command = purlin(prepared, port);
    command.arg("--vsock").arg(vsock_path(port)).args(["--balloon", "size=64M"]);
    command
}

fn qemu(prepared: &Prepared, port: u16) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-accel", "tcg", "-cpu", "max", "-m", "1024", "-smp", "2"]);
    command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio"]);
    command.arg("-kernel").arg(&prepared.kernel).arg("-append").arg(&prepared.cmdline);
    // QEMU takes one only; so does the image that Purlin builds.
    command.args(prepared.initrds.first().map(|initrd| ["-initrd".into(), initrd.clone()]).into_iter().flatten());
    let drive = |path: &PathBuf, format: &str| format!("if=virtio,format={format},file={}", path.display());
    command.arg("-drive").arg(drive(&prepared.disk, "qcow2"));
    command.arg("-drive").arg(drive(&prepared.seed, "raw") + ",readonly=on");
    command.arg("-netdev").arg(format!("user,id=net,hostfwd=tcp:127.0.0.1:{port}-:22"));
    command.args(["-device", "virtio-net-pci,netdev=net", "-device", "virtio-rng-pci"]);
    command
}

fn log() -> PathBuf {
    target().join("xtask/image.log")
}
