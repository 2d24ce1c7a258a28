//! Debian as a machine that is kept: launched, asked, snapshotted, gone back and cloned, by the command as users have it; and
//! how long that takes.

use std::{
    fs,
    io::Write,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use clap::Args;

use crate::{figures::median, home::Home, machine};

/// What to do with it.
#[derive(Args)]
pub struct KeptArgs {
    /// The image
    #[arg(long, default_value = "debian")]
    image: String,
    /// The machine's memory
    #[arg(long, default_value = "512M")]
    memory: String,
    /// So many clones at once
    #[arg(long, default_value_t = 3)]
    clones: u16,
    /// Measure the clone of one so many times
    #[arg(long, default_value_t = 3)]
    rounds: usize,
}

impl Default for KeptArgs {
    fn default() -> Self {
        Self { image: "debian".into(), memory: "512M".into(), clones: 3, rounds: 3 }
    }
}

/// Counts, so that one sees that the guest has gone on and not begun anew.
const COUNTER: &str = "systemd-run -q sh -c 'i=0; while :; do i=$((i+1)); echo $i > /run/count; sleep 0.05; done'";

/// Does it all.
pub fn run(args: &KeptArgs) -> Result<()> {
    machine::build()?;
    let mut home = Home::new()?;
    home.purlin(&["image", "build", &args.image])?;
    check_launch(&home, args)?;
    check_commands(&home)?;
    check_snapshots(&home)?;
    check_memory(&home, &args.memory)?;
    measure_clone(&home, args.rounds)?;
    check_clones(&home, args.clones)?;
    check_killed(&home)?;
    home.end()
}

/// The time in ns, for how many seconds the guest's kernel has run, and when it started its agent, in µs.
const AGENT_STARTED: &str = "date +%s%N; cut -d ' ' -f 1 /proc/uptime; \
     systemctl show --value -p ExecMainStartTimestampMonotonic purlin-agent";

/// From the start of a machine's process to that of its guest's agent.
fn boot(home: &Home, name: &str) -> Result<Duration> {
    let said = home.exec(name, AGENT_STARTED)?;
    let [now, uptime, agent] =
        said.lines().map(str::parse).collect::<Result<Vec<f64>, _>>()?.try_into().map_err(|_| anyhow!("{said:?}"))?;
    let process = home.info(name)?["process"]["started"].as_f64().context("it does not run")? / 1e3;
    Ok(Duration::try_from_secs_f64(now / 1e9 - (uptime - agent / 1e6) - process)?)
}

fn check_launch(home: &Home, args: &KeptArgs) -> Result<()> {
    let begin = Instant::now();
    home.purlin(&["launch", &args.image, "a", "--memory", &args.memory])?;
    home.exec("a", "true")?;
    let took = begin.elapsed();
    let boot = boot(home, "a")?;
    println!(
        "launch to the first exec: {took:.2?}; the boot itself, as far as to the agent: {boot:.2?}, {:.2} times",
        took.as_secs_f64() / boot.as_secs_f64()
    );
    let state = home.exec("a", "systemctl is-system-running --wait")?;
    ensure!(state.trim() == "running", "the guest is {state:?}");
    println!("launch to systemd's 'running': {:.1?}", begin.elapsed());
    Ok(())
}

/// What a command says, takes and ends with; files.
fn check_commands(home: &Home) -> Result<()> {
    ensure!(home.exec("a", "hostname; id -u")?.trim() == "a\n0");
    let ended = home.command(&["exec", "a", "--", "sh", "-c", "exit 3"]).status()?;
    ensure!(ended.code() == Some(3), "exit 3 became {ended}");
    let data: Vec<u8> = (0..1 << 20).map(|i: u32| (i.wrapping_mul(2654435761) >> 24) as u8).collect();
    let mut cat = home.command(&["exec", "a", "--", "cat"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut stdin = cat.stdin.take().context("no stdin")?;
    let input = data.clone();
    let writer = thread::spawn(move || stdin.write_all(&input));
    let output = cat.wait_with_output()?;
    writer.join().expect("it does not panic")?;
    ensure!(output.stdout == data, "1 MiB through cat is another");
    let (there, back) = (home.path().join("there"), home.path().join("back"));
    fs::write(&there, &data)?;
    home.purlin(&["file", "push", "-p", &there.to_string_lossy(), "a/var/tmp/x/data"])?;
    home.purlin(&["file", "pull", "a/var/tmp/x/data", &back.to_string_lossy()])?;
    ensure!(fs::read(&back)? == data, "1 MiB there and back is another");
    Ok(())
}

fn check_snapshots(home: &Home) -> Result<()> {
    home.exec("a", COUNTER)?;
    home.exec("a", "echo before > /root/file; sync")?;
    home.purlin(&["snapshot", "create", "a", "s1"])?;
    let counted = count(home, "a")?;
    home.exec("a", "echo after > /root/file; rm /etc/hostname; sync")?;
    thread::sleep(Duration::from_secs(3));
    home.purlin(&["snapshot", "create", "a", "s2"])?;
    let begin = Instant::now();
    home.purlin(&["snapshot", "restore", "a", "s1"])?;
    let said = home.exec("a", "cat /root/file /etc/hostname")?;
    println!("restore to the first exec: {:.2?}", begin.elapsed());
    ensure!(said == "before\na\n", "it is not as it was: {said:?}");
    let now = count(home, "a")?;
    ensure!(now < counted + 60, "{counted} became {now}: it has not gone back");
    home.wait("a", "it counts on", |home| Ok(count(home, "a")? > now + 20))?;
    // Its clock is set right.
    home.wait("a", "the time is right", |home| {
        let guest: i64 = home.exec("a", "date +%s")?.trim().parse()?;
        let host = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs() as i64;
        Ok((guest - host).abs() <= 1)
    })?;
    println!("{}", home.purlin(&["snapshot", "list", "a"])?.trim_end());
    home.purlin(&["snapshot", "delete", "a", "s1"])?;
    home.purlin(&["snapshot", "delete", "a", "s2"])?;
    Ok(())
}

/// A guest makes do with less memory while it runs, goes back to that with a snapshot, and has all of it again.
fn check_memory(home: &Home, all: &str) -> Result<()> {
    let guest = |field: &str| -> Result<u64> {
        home.info("a")?["process"]["memory"][field].as_u64().with_context(|| format!("it says no {field}"))
    };
    let total = || -> Result<u64> { Ok(home.exec("a", "awk '/MemTotal/ {print $2}' /proc/meminfo")?.trim().parse()?) };
    let (most, before) = (guest("most")?, total()?);
    // A guest that has just booted can do without a quarter.
    let less = most / 4 * 3;
    let setting = format!("memory={}K", less >> 10);
    home.purlin(&["set", "a", &setting])?;
    let begin = Instant::now();
    home.wait("a", "it has given memory back", |_| Ok(guest("now")? == less))?;
    println!("{} MiB given back: {:.1?}", (most - less) >> 20, begin.elapsed());
    let missing = (before - total()?) << 10;
    ensure!(missing.abs_diff(most - less) < most / 64, "the guest misses {missing} bytes, not {}", most - less);
    home.purlin(&["snapshot", "create", "a", "less"])?;
    home.purlin(&["set", "a", &format!("memory={all}")])?;
    home.wait("a", "it has all of it again", |_| Ok(guest("now")? == most && total()? == before))?;
    home.purlin(&["snapshot", "restore", "a", "less"])?;
    ensure!((guest("wanted")?, guest("now")?) == (less, less), "it does not go on with what it had");
    home.purlin(&["set", "a", &format!("memory={all}")])?;
    home.wait("a", "it has all of it again", |_| Ok(guest("now")? == most && total()? == before))?;
    home.purlin(&["snapshot", "delete", "a", "less"])?;
    Ok(())
}

/// A process that is killed while a snapshot is being taken has lost nothing that its guest has written for good.
fn check_killed(home: &Home) -> Result<()> {
    let mut snapshot = home.command(&["snapshot", "create", "a", "killed"]).stderr(Stdio::null()).spawn()?;
    thread::sleep(Duration::from_millis(150));
    let _ = home.exec("a", "echo synced > /root/file; sync");
    let written = home.exec("a", "cat /root/file").is_ok_and(|said| said == "synced\n");
    let pid = home.info("a")?["process"]["pid"].as_i64().context("it does not run")?;
    ensure!(Command::new("kill").args(["-9", &pid.to_string()]).status()?.success(), "it cannot be killed");
    snapshot.wait()?;
    home.purlin(&["wait", "a"])?;
    home.purlin(&["start", "a"])?;
    let said = home.exec("a", "cat /root/file")?;
    ensure!(!written || said == "synced\n", "what the guest had synced is lost: {said:?}");
    Ok(())
}

fn count(home: &Home, name: &str) -> Result<u64> {
    Ok(home.exec(name, "cat /run/count")?.trim().parse()?)
}

fn measure_clone(home: &Home, rounds: usize) -> Result<()> {
    // By then the guest has been through it (the agent's rehearsal.rs), however busy it is.
    home.wait("a", "it has run for a while", |home| {
        Ok(home.exec("a", "cut -d . -f 1 /proc/uptime")?.trim().parse::<u64>()? >= 75)
    })?;
    let mut times = Vec::new();
    for _ in 0..rounds {
        let begin = Instant::now();
        home.purlin(&["clone", "a", "b"])?;
        let name = home.exec("b", "hostname")?;
        times.push(begin.elapsed());
        ensure!(name.trim() == "b", "it is called {name:?}");
        home.purlin(&["delete", "-f", "b"])?;
    }
    if !times.is_empty() {
        println!("clone to the first exec: median of {rounds}: {:.0?}", median(times));
    }
    Ok(())
}

/// Each has an identity of its own, goes on from where the other one was, and has a network, by which its sshd shows new keys.
fn check_clones(home: &Home, clones: u16) -> Result<()> {
    const WHO: &str = "cat /etc/machine-id /sys/class/net/eth0/address; hostname; head -c 16 /dev/urandom | base64";
    // The source's sshd runs, and knows its keys.
    let mut seen = std::collections::HashSet::from([offered_key(home, "a")?]);
    let begin = Instant::now();
    home.purlin(&["clone", "a", "c", "--count", &clones.to_string()])?;
    println!("{clones} clones: {:.2?}", begin.elapsed());
    let begin = Instant::now();
    let listed = home.purlin(&["list"])?;
    println!("list with {} machines: {:.0?}", listed.lines().count() - 1, begin.elapsed());
    let names: Vec<String> = (1..=clones).map(|number| format!("c-{number}")).chain(["a".to_owned()]).collect();
    for name in &names {
        let said = home.exec(name, WHO)?;
        ensure!(said.lines().nth(2) == Some(name), "{name}: {said:?}");
        ensure!(said.lines().all(|line| seen.insert(line.to_owned())), "{name} has something of another's: {said:?}");
    }
    for name in names.iter().filter(|name| *name != "a") {
        let keys = home.exec(name, "ls /etc/ssh | grep ssh_host_ || true")?;
        ensure!(keys.is_empty(), "{name} has keys before anybody has connected: {keys:?}");
    }
    for name in &names {
        let before = count(home, name)?;
        home.wait(name, "it counts on", |home| Ok(count(home, name)? > before))?;
        home.wait(name, "its lease is its own", |home| {
            let said = home.exec(name, "cat /run/systemd/netif/leases/*; tr -d : < /sys/class/net/eth0/address")?;
            let lease: Vec<&str> = said.lines().collect();
            let client = format!("CLIENTID=01{}", lease.last().context("it says nothing")?);
            Ok(lease.contains(&client.as_str()) && lease.contains(&"ADDRESS=10.0.2.15"))
        })?;
        home.wait(name, "it has an address", |home| {
            Ok(home.exec(name, "ip -4 -br addr show eth0")?.contains("10.0.2.15"))
        })?;
        ensure!(name == "a" || seen.insert(offered_key(home, name)?), "{name} has the host keys of another");
        let journal =
            "logger -t kept it goes on; journalctl --sync; journalctl -q -t kept; journalctl -q -n 1 -u ssh.socket";
        let said = home.exec(name, journal)?;
        ensure!(said.contains("it goes on") && said.lines().count() >= 2, "{name}: the journal says {said:?}");
        let failed = home.exec(name, "systemctl --failed --no-legend --plain")?;
        ensure!(failed.is_empty(), "{name}: units have failed: {failed}");
    }
    Ok(())
}

/// The key that a guest's sshd shows to who comes by the network.
fn offered_key(home: &Home, name: &str) -> Result<String> {
    let info = home.info(name)?;
    let address = info["process"]["ssh"].as_str().context("ssh does not lead to it")?;
    let (host, port) = address.rsplit_once(':').context("that is no address")?;
    let scan = || -> Result<Option<String>> {
        let output = Command::new("ssh-keyscan").args(["-T", "60", "-t", "ed25519", "-p", port, host]).output()?;
        let said = String::from_utf8(output.stdout)?;
        let line = said.lines().find(|line| !line.starts_with('#'));
        Ok(line.and_then(|line| Some(line.split_once(' ')?.1.to_owned())))
    };
    home.wait(name, "sshd shows its key", |_| Ok(scan()?.is_some()))?;
    scan()?.context("sshd shows no key")
}
