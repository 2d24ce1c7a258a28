//! Debian's image as a machine, under Purlin or under QEMU: started, listened to, and asked through ssh.

use std::{
    fs,
    io::{Read, Write},
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc::{self, Receiver, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use purlin_images::{
    prepare::{Prepared, Request, prepare_run},
    seed::read_user_data,
    store::Store,
};

use crate::{
    footprint::{self, GuestMemory, beyond_guest},
    guests::Printed,
    machine,
    shell::target,
};

/// A guest that boots or shuts down says something more often than that, and lets ssh in sooner, also on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(300);
/// The guest's name.
pub const HOST_NAME: &str = "purlin-test";
/// The shell's, once somebody is logged in.
pub const PROMPT: &str = "root@purlin-test:~# ";
/// The guest's memory, in MiB.
const MEMORY: u64 = 1024;
/// The port of ssh.
const SSH: u16 = 22;

/// A machine of the image, with a disk of its own that has not booted yet.
pub fn prepare(image: &str, user_data: Option<&Path>) -> Result<Prepared> {
    let disk_size = Some(13 << 30);
    let user_data = user_data.map(read_user_data).transpose()?;
    let user_data = user_data.as_deref();
    let request = Request { image, host_name: Some(HOST_NAME), user_data, disk_size, ..Request::default() };
    Ok(prepare_run(&Store::of_user()?, &request, &Printed("image"))?)
}

/// How a machine is connected, and how it is reached.
pub struct Connection {
    /// What `purlin run --net` takes. QEMU knows the user-mode network only.
    pub net: String,
    /// Ports of the host's loopback that lead to ports of the guest's.
    pub ports: Vec<(u16, u16)>,
    /// Where its ssh is.
    ssh: (String, u16),
    /// The network namespace that all of it is in, if it is not the host's own.
    pub namespace: Option<String>,
}

impl Connection {
    /// The user-mode network with a way to ssh.
    pub fn user() -> Result<Self> {
        Self::user_with("user", &[])
    }

    /// The same with these settings, and with ways to these ports of the guest's.
    pub fn user_with(net: &str, ports: &[u16]) -> Result<Self> {
        let lead = |&port: &u16| anyhow::Ok((free_port()?, port));
        let ports = [SSH].iter().chain(ports).map(lead).collect::<Result<Vec<_>>>()?;
        Ok(Self { net: net.into(), ssh: ("127.0.0.1".into(), ports[0].0), ports, namespace: None })
    }

    /// A TAP interface in a network namespace of the host's, in which the guest has this address.
    pub fn tap(net: &str, address: &str, namespace: &str) -> Self {
        let ssh = (address.to_owned(), SSH);
        Self { net: net.into(), ports: Vec::new(), ssh, namespace: Some(namespace.into()) }
    }

    /// Where the host finds this port of the guest's.
    pub fn address_of(&self, port: u16) -> Result<(String, u16)> {
        let (address, _) = &self.ssh;
        if self.namespace.is_some() {
            return Ok((address.clone(), port));
        }
        let (host, _) =
            self.ports.iter().find(|(_, guest)| *guest == port).with_context(|| format!("nothing leads to {port}"))?;
        Ok((address.clone(), *host))
    }

    /// The command, in the namespace if there is one.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let Some(namespace) = &self.namespace else { return Command::new(program) };
        let mut command = Command::new("ip");
        command.args(["netns", "exec", namespace]).arg(program);
        command
    }
}

/// One that nobody has now.
pub fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// The command that runs a machine.
pub type Runner = fn(&Prepared, &Connection) -> Command;

/// The guest, running.
pub struct Debian<'a> {
    name: String,
    child: Child,
    start: Instant,
    console: Receiver<Vec<u8>>,
    transcript: Vec<u8>,
    prepared: &'a Prepared,
    /// How it is connected.
    pub connection: Connection,
}

impl<'a> Debian<'a> {
    /// Starts it. What it says goes to a log of this name, too.
    pub fn start(name: &str, prepared: &'a Prepared, runner: Runner, connection: Connection) -> Result<Self> {
        Self::start_command(name, prepared, runner(prepared, &connection), connection)
    }

    /// The same with a command of one's own.
    pub fn start_command(
        name: &str,
        prepared: &'a Prepared,
        mut command: Command,
        connection: Connection,
    ) -> Result<Self> {
        let start = Instant::now();
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
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
        Ok(Self { name: name.to_owned(), child, start, console, transcript: vec![], prepared, connection })
    }

    /// Where what it says is kept.
    pub fn log(&self) -> PathBuf {
        target().join("xtask").join(format!("{}.log", self.name))
    }

    /// When the guest has said `text` on its console.
    pub fn wait_for(&mut self, text: &str) -> Result<Duration> {
        while !String::from_utf8_lossy(&self.transcript).contains(text) {
            self.listen().with_context(|| format!("waiting for {text:?}; see {}", self.log().display()))?;
        }
        Ok(self.start.elapsed())
    }

    fn listen(&mut self) -> Result<()> {
        match self.console.recv_timeout(PATIENCE) {
            Ok(said) => self.transcript.extend(said),
            Err(RecvTimeoutError::Timeout) => bail!("it has been silent for {PATIENCE:?}"),
            Err(RecvTimeoutError::Disconnected) => bail!("the guest has ended"),
        }
        self.write_log()
    }

    fn write_log(&self) -> Result<()> {
        let log = self.log();
        fs::create_dir_all(log.parent().unwrap_or(Path::new(".")))?;
        Ok(fs::write(log, &self.transcript)?)
    }

    /// Puts into the log what it has said meanwhile. It is an error if it has ended.
    pub fn catch_up(&mut self) -> Result<()> {
        self.transcript.extend(self.console.try_iter().flatten());
        self.write_log()?;
        let ended = self.child.try_wait()?;
        ensure!(ended.is_none(), "the guest has ended; see {}", self.log().display());
        Ok(())
    }

    /// Waits until the guest has powered off, and the run has ended well.
    pub fn wait_for_end(&mut self) -> Result<()> {
        while self.listen().is_ok() {}
        let status = self.child.wait()?;
        ensure!(status.success(), "the run ended with {status}");
        let said = String::from_utf8_lossy(&self.transcript);
        ensure!(said.contains("reboot: Power down"), "the guest did not power off; see {}", self.log().display());
        Ok(())
    }

    /// MiB of the host's memory that the machine takes beyond the guest's.
    pub fn beyond_guest(&self, guest: GuestMemory) -> Result<f64> {
        Ok(beyond_guest(self.child.id(), guest)? as f64 / 1024.0)
    }

    /// What a command says in the guest. sshd may not be up yet when the console is.
    pub fn ssh(&self, command: &str) -> Result<String> {
        self.ssh_with(command, &[])
    }

    /// The same with something on the command's standard input.
    pub fn ssh_with(&self, command: &str, input: &[u8]) -> Result<String> {
        let asked = Instant::now();
        loop {
            let mut child = self.ssh_command(command).spawn().context("ssh")?;
            let mut pipe = child.stdin.take().context("no input")?;
            // Where there is no connection yet, nobody takes it.
            let written = pipe.write_all(input);
            drop(pipe);
            let output = child.wait_with_output()?;
            // ssh's own status where there is no connection.
            if output.status.code() != Some(255) || command.contains("poweroff") {
                written?;
                std::io::stderr().write_all(&output.stderr)?;
                return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
            }
            ensure!(asked.elapsed() < PATIENCE, "ssh gets no connection; see {}", self.log().display());
            thread::sleep(Duration::from_millis(500));
        }
    }

    fn ssh_command(&self, command: &str) -> Command {
        let (address, port) = &self.connection.ssh;
        let mut ssh = self.connection.command("ssh");
        ssh.args(["-q", "-p", &port.to_string(), "-o", "BatchMode=yes", "-o", "ConnectTimeout=10"]);
        ssh.args(["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]);
        if let Some(identity) = &self.prepared.identity {
            ssh.arg("-i").arg(identity);
        }
        ssh.args([&format!("root@{address}"), command]);
        ssh.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        ssh
    }
}

impl Drop for Debian<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `purlin run` as it runs an image, under the engine that it chooses.
pub fn purlin(prepared: &Prepared, connection: &Connection) -> Command {
    let mut command = connection.command(machine::program());
    command.args(["run", "--cpus", "2", "--device", "rng", "--net", &connection.net]);
    command.arg("--memory").arg(format!("{MEMORY}M"));
    command.arg("--kernel").arg(&prepared.kernel).arg("--cmdline").arg(&prepared.cmdline);
    command.args(prepared.initrds.iter().flat_map(|initrd| ["--initrd".into(), initrd.clone()]));
    let disk = |path: &PathBuf, options: &str| format!("{},{options}", path.display());
    command.args(["--disk", &disk(&prepared.disk, "format=qcow2")]);
    command.args(["--disk", &disk(&prepared.seed, "format=raw,readonly")]);
    for (host, guest) in &connection.ports {
        command.arg("--publish").arg(format!("127.0.0.1:{host}:{guest}"));
    }
    command
}

/// The same under the translator.
pub fn purlin_translator(prepared: &Prepared, connection: &Connection) -> Command {
    let mut command = purlin(prepared, connection);
    command.args(["--engine", "translator"]);
    command
}

/// QEMU's TCG with the same machine.
pub fn qemu(prepared: &Prepared, connection: &Connection) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-accel", "tcg", "-cpu", "max", "-m", &MEMORY.to_string(), "-smp", "2"]);
    command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio"]);
    command.arg("-kernel").arg(&prepared.kernel).arg("-append").arg(&prepared.cmdline);
    // QEMU takes one only; so does the image that Purlin builds.
    command.args(prepared.initrds.first().map(|initrd| ["-initrd".into(), initrd.clone()]).into_iter().flatten());
    let drive = |path: &PathBuf, format: &str| format!("if=virtio,format={format},file={}", path.display());
    command.arg("-drive").arg(drive(&prepared.disk, "qcow2"));
    command.arg("-drive").arg(drive(&prepared.seed, "raw") + ",readonly=on");
    let ports = connection.ports.iter().map(|(host, guest)| format!(",hostfwd=tcp:127.0.0.1:{host}-:{guest}"));
    command.arg("-netdev").arg(["user,id=net".to_owned()].into_iter().chain(ports).collect::<String>());
    command.args(["-device", "virtio-net-pci,netdev=net", "-device", "virtio-rng-pci"]);
    command
}

/// What Purlin's guest and QEMU's take of the host's memory beyond their own, on one line.
pub fn print_beyond_guest(ours: &Debian<'_>, theirs: &Debian<'_>) -> Result<()> {
    let ours = ours.beyond_guest(footprint::PURLIN)?;
    let theirs = theirs.beyond_guest(GuestMemory::Sized(MEMORY << 10))?;
    println!(
        "host memory beyond the guest's, after that: purlin {ours:.1} MiB, QEMU {theirs:.1} MiB: {:.2} times",
        ours / theirs
    );
    Ok(())
}
