//! The guest's agent, asked as `purlin exec` and its like ask it: through virtio-vsock, by the library.

use std::{
    fs,
    io::Read,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, ensure};
use purlin_agent::{
    client::{Client, Finished, connect_when_up},
    protocol::{Card, Exec, Push, Renew, Tty},
};

use crate::debian::{Connection, Debian, HOST_NAME};

/// Longer than a loaded machine's guest takes for anything here.
const PATIENCE: Duration = Duration::from_secs(300);

/// The vsock socket of a guest that is connected so: no other has its ports.
pub fn socket(connection: &Connection) -> PathBuf {
    let port = connection.ports.first().map_or(0, |(host, _)| *host);
    std::env::temp_dir().join(format!("purlin-xtask-{port}.vsock"))
}

/// The agent of a guest.
pub struct Agent {
    socket: PathBuf,
}

impl Agent {
    /// Of a guest whose vsock socket is [`socket`]'s.
    pub fn of(guest: &Debian<'_>) -> Self {
        Self { socket: socket(&guest.connection) }
    }

    fn client(&self) -> Result<Client<UnixStream, UnixStream>> {
        Ok(connect_when_up(&self.socket, PATIENCE)?)
    }

    fn run(&self, exec: Exec, stdin: &[u8]) -> Result<Finished> {
        Ok(self.client()?.run(exec, stdin)?)
    }

    /// What a shell's command says, which must succeed.
    pub fn sh(&self, script: &str) -> Result<String> {
        let finished = self.run(exec(&["sh", "-c", script]), b"")?;
        let said = String::from_utf8(finished.stdout)?;
        let errors = String::from_utf8_lossy(&finished.stderr);
        ensure!(finished.exited.exit_status() == 0, "{script}: {:?}, {said}{errors}", finished.exited);
        Ok(said.trim().to_owned())
    }
}

fn exec(argv: &[&str]) -> Exec {
    Exec { argv: argv.iter().map(|word| word.as_bytes().to_vec()).collect(), ..Exec::default() }
}

/// All that it can do. The machine has another name and address afterwards.
pub fn check(guest: &Debian<'_>) -> Result<()> {
    let agent = Agent::of(guest);
    check_info(&agent)?;
    check_commands(&agent).context("the agent's commands")?;
    check_files(&agent).context("the agent's files")?;
    check_peers(&agent)?;
    check_renewal(&agent, guest).context("the renewal by the agent")
}

/// What the guest is, as it says itself.
pub fn check_info(agent: &Agent) -> Result<()> {
    let info = agent.client()?.info()?;
    ensure!(info.host_name == HOST_NAME && info.os.starts_with("Debian GNU/Linux"), "the agent says {info:?}");
    ensure!(info.machine_id == agent.sh("cat /etc/machine-id")?, "the agent says {info:?}");
    ensure!(info.boot_id == agent.sh("cat /proc/sys/kernel/random/boot_id")?, "the agent says {info:?}");
    ensure!(info.kernel == agent.sh("uname -r")?, "the agent says {info:?}");
    Ok(())
}

fn check_commands(agent: &Agent) -> Result<()> {
    ensure!(agent.sh("id -u; id -G; pwd")? == "0\n0\n/root");
    ensure!(agent.run(exec(&["sh", "-c", "exit 3"]), b"")?.exited.exit_status() == 3);
    let data = noise(1 << 20);
    ensure!(agent.run(exec(&["cat"]), &data)?.stdout == data, "cat gives something else back");
    let nobody = Exec { user: "nobody".into(), ..exec(&["id", "-un"]) };
    ensure!(agent.run(nobody, b"")?.stdout == b"nobody\n");
    let missing = agent.client()?.exec(exec(&["no-such-command"])).map(|command| command.pid);
    ensure!(missing.is_err_and(|error| error.to_string().contains("cannot run 'no-such-command'")));

    let tty = Some(Tty { columns: 101, rows: 31, term: String::new() });
    let mut shell = agent.client()?.exec(Exec { tty, ..Exec::default() })?;
    shell.input.write(b"stty size; tty; exit 4\n")?;
    let finished = shell.output.finish()?;
    let said = String::from_utf8_lossy(&finished.stdout);
    ensure!(said.contains("31 101") && said.contains("/dev/pts/"), "the shell says {said:?}");
    ensure!(finished.exited.exit_status() == 4, "the shell ended with {:?}", finished.exited);
    Ok(())
}

fn check_files(agent: &Agent) -> Result<()> {
    let (path, data) = ("/var/lib/purlin-test/file", noise(1 << 20));
    let user = "nobody".into();
    let push = Push { path: path.into(), mode: Some(0o640), user, make_dirs: true, ..Push::default() };
    let size = agent.client()?.push(push, &data[..])?;
    ensure!(size == data.len() as u64);
    ensure!(agent.sh(&format!("stat -c '%s %a %U' {path}"))? == format!("{size} 640 nobody"));
    let mut pulled = agent.client()?.pull(path.as_bytes())?;
    let mut got = Vec::new();
    pulled.read_to_end(&mut got)?;
    ensure!(got == data && pulled.file.mode == 0o640, "another file comes back: {:?}", pulled.file);
    let missing = agent.client()?.pull(b"/no/such").map(|pulled| pulled.file);
    ensure!(missing.is_err_and(|error| error.to_string().contains("No such file")));
    Ok(())
}

/// The guest's own programs reach the agent's port by the loopback, and by the guest's own address.
const PEER: &str = "modprobe -q vsock_loopback; python3 -c '
import socket
for cid in (1, socket.VMADDR_CID_LOCAL if hasattr(socket, \"VMADDR_CID_LOCAL\") else 3, 3):
    try:
        s = socket.socket(socket.AF_VSOCK); s.connect((cid, 20565))
        print(\"served\" if s.recv(1) else \"not served\")
    except OSError:
        print(\"not served\")
'";

/// Only the host is served: any user's program could become root otherwise.
fn check_peers(agent: &Agent) -> Result<()> {
    let said = agent.sh(PEER)?;
    ensure!(said.lines().all(|line| line == "not served"), "the agent serves the guest's own programs: {said}");
    Ok(())
}

fn check_renewal(agent: &Agent, guest: &Debian<'_>) -> Result<()> {
    const NAME: &str = "purlin-renewed";
    const OTHER_ADDRESS: &str = "02:70:75:72:6c:01";
    let old_id = agent.client()?.info()?.machine_id;
    let key_file = "cut -d' ' -f1,2 /etc/ssh/ssh_host_ed25519_key.pub";
    let old_key = agent.sh(key_file)?;
    ensure!(offered_key(guest)? == old_key, "sshd offers another key than its own");
    let address = agent.sh("cat /sys/class/net/eth0/address")?;

    let mut random_seed = vec![0; 64];
    fs::File::open("/dev/urandom")?.read_exact(&mut random_seed)?;
    let renew = Renew {
        host_name: NAME.into(),
        random_seed,
        remake_ssh_host_keys: true,
        cards: vec![Card { old: address.clone(), new: OTHER_ADDRESS.into() }],
        time_ns: SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos() as u64,
        ..Renew::default()
    };
    let id = renew_by(agent, renew)?;

    let info = agent.client()?.info()?;
    ensure!(info.host_name == NAME && info.machine_id == id && id != old_id, "{info:?}");
    ensure!(agent.sh("cat /etc/hostname; grep ^127.0.1.1 /etc/hosts")? == format!("{NAME}\n127.0.1.1\t{NAME}"));
    ensure!(agent.sh("cat /etc/machine-id")? == id);
    ensure!(agent.sh("cat /sys/class/net/eth0/address")? == OTHER_ADDRESS);
    // It asks until sshd is there, so the network is, too.
    ensure!(guest.ssh("hostname")?.trim() == NAME);
    let new_key = agent.sh(key_file)?;
    ensure!(new_key != old_key && offered_key(guest)? == new_key, "sshd does not offer its new key");
    ensure!(
        agent
            .sh("logger -t purlin-test it goes on; journalctl --sync; journalctl -q -t purlin-test")?
            .contains("it goes on")
    );
    ensure!(agent.sh("systemctl --failed --no-legend --plain")?.is_empty(), "units have failed");
    Ok(())
}

/// Has it done to its end, without a problem; returns the machine ID.
fn renew_by(agent: &Agent, renew: Renew) -> Result<String> {
    let client = agent.client()?;
    let begin = Instant::now();
    let (renewed, rest) = client.renew(renew)?;
    let answered = begin.elapsed();
    ensure!(renewed.problems.is_empty(), "{:?}", renewed.problems);
    let ended = rest.wait()?;
    ensure!(ended.problems.is_empty(), "{:?}", ended.problems);
    println!("a renewed identity after {answered:.2?}, with keys and network after {:.2?}", begin.elapsed());
    Ok(renewed.machine_id)
}

/// What sshd shows to who connects.
fn offered_key(guest: &Debian<'_>) -> Result<String> {
    let (address, port) = guest.connection.address_of(22)?;
    let mut scan = Command::new("ssh-keyscan");
    let output = scan.args(["-T", "60", "-t", "ed25519", "-p", &port.to_string(), &address]).output()?;
    let said = String::from_utf8(output.stdout)?;
    let line = said.lines().find(|line| !line.starts_with('#')).context("sshd offers no key")?;
    Ok(line.split_once(' ').context("ssh-keyscan says no key")?.1.to_owned())
}

/// Bytes that have no short period.
fn noise(length: usize) -> Vec<u8> {
    (0..length as u32).map(|number| (number.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

/// Whether a guest whose image had no agent has got it from its seed.
pub fn check_installed(socket: &Path) -> Result<()> {
    let agent = Agent { socket: socket.to_owned() };
    check_info(&agent)?;
    ensure!(agent.sh("systemctl is-enabled purlin-agent.service")? == "enabled");
    check_commands(&agent)
}
