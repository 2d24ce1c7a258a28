//! Debian launched, asked, snapshotted, gone back, cloned and deleted, again and again: whether anything is left of it each
//! time. And many machines at once.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::MetadataExt,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

use crate::{figures::median, home::Home, machine};

/// How often, and how many.
#[derive(Args)]
pub struct CyclesArgs {
    /// The image
    #[arg(long, default_value = "debian")]
    image: String,
    /// The machines' memory
    #[arg(long, default_value = "256M")]
    memory: String,
    /// So many cycles
    #[arg(long, default_value_t = 200)]
    cycles: usize,
    /// Then so many clones at once
    #[arg(long, default_value_t = 40)]
    clones: u16,
}

/// Cycles after which nothing more is made that stays: caches, and the like.
const WARM: usize = 3;
/// What goes on by itself behind a cycle is over by then.
const SETTLED: Duration = Duration::from_secs(10);
/// What memory may be more after all cycles, in bytes: of the daemon, and of shared memory on the host.
const MORE_MEMORY: u64 = 32 << 20;

/// Does it all.
pub fn run(args: &CyclesArgs) -> Result<()> {
    machine::build()?;
    let mut home = Home::new()?;
    home.purlin(&["image", "build", &args.image])?;
    cycles(&home, args)?;
    if args.clones > 0 {
        clones(&home, args)?;
    }
    home.end()
}

fn cycles(home: &Home, args: &CyclesArgs) -> Result<()> {
    let mut before = None;
    let begin = Instant::now();
    for number in 1..=args.cycles {
        cycle(home, args, number)?;
        match &before {
            None if number == WARM.min(args.cycles) => {
                thread::sleep(SETTLED);
                before = Some(Left::look(home)?);
            }
            Some(before) => nothing_more(home, before).with_context(|| format!("after cycle {number}"))?,
            None => {}
        }
        println!("cycle {number} of {}: {:.0?} in all", args.cycles, begin.elapsed());
    }
    Ok(())
}

/// Images may still be merged, a connection still be closing: there is no more than before once that is done.
fn nothing_more(home: &Home, before: &Left) -> Result<()> {
    let begin = Instant::now();
    loop {
        match Left::look(home)?.compare(before) {
            Err(_) if begin.elapsed() < SETTLED => thread::sleep(Duration::from_millis(50)),
            result => return result,
        }
    }
}

fn cycle(home: &Home, args: &CyclesArgs, number: usize) -> Result<()> {
    home.purlin(&["launch", &args.image, "a", "--memory", &args.memory])?;
    home.exec("a", &format!("echo {number} > /root/number; sync"))?;
    home.purlin(&["snapshot", "create", "a", "s"])?;
    home.exec("a", "rm /root/number")?;
    home.purlin(&["snapshot", "restore", "a", "s"])?;
    home.purlin(&["clone", "a", "b"])?;
    for name in ["a", "b"] {
        let said = home.exec(name, "cat /root/number")?;
        ensure!(said.trim() == number.to_string(), "{name} says {said:?} in cycle {number}");
    }
    // In turn, for a clone stands on files of its source.
    let (first, then) = if number.is_multiple_of(2) { ("a", "b") } else { ("b", "a") };
    home.purlin(&["delete", "-f", first])?;
    let said = home.exec(then, "cat /root/number")?;
    ensure!(said.trim() == number.to_string(), "{then} says {said:?} without {first}");
    home.purlin(&["delete", "-f", then])?;
    Ok(())
}

/// What there is on the host while no instance is.
#[derive(Clone, Debug)]
struct Left {
    /// Counts that must not grow.
    counts: BTreeMap<&'static str, usize>,
    /// Bytes that must not grow much.
    memory: BTreeMap<&'static str, u64>,
}

impl Left {
    fn look(home: &Home) -> Result<Self> {
        // The processes of the machines have been told to end, and are waited for; their children end by themselves.
        let daemon = daemon(home)?;
        let process = Path::new("/proc").join(daemon.to_string());
        home.wait("all", "processes end", |home| Ok(processes(home)? == 1))?;
        let counts = [
            ("processes", processes(home)?),
            ("files", files(&home.path())?),
            ("mounts", fs::read_to_string("/proc/self/mounts")?.lines().count()),
            ("unix sockets", sockets(home)?),
            ("control groups", control_groups(Path::new("/sys/fs/cgroup"))),
            ("descriptors of the daemon", fs::read_dir(process.join("fd"))?.count()),
            ("threads of the daemon", fs::read_dir(process.join("task"))?.count()),
        ];
        let memory = [
            ("the daemon", field(&process.join("status"), "RssAnon:")?),
            ("shared memory", field(Path::new("/proc/meminfo"), "Shmem:")?),
        ];
        Ok(Self { counts: counts.into(), memory: memory.into() })
    }

    fn compare(&self, before: &Self) -> Result<()> {
        for (what, now) in &self.counts {
            // A runtime has threads that come and go.
            let more = if what.starts_with("threads") { 8 } else { 0 };
            ensure!(*now <= before.counts[what] + more, "{} {what} became {now}", before.counts[what]);
        }
        for (what, now) in &self.memory {
            let then = before.memory[what];
            ensure!(*now <= then + MORE_MEMORY, "{what} has {} MiB, and had {}", now >> 20, then >> 20);
        }
        Ok(())
    }
}

/// Processes of this home: its daemon, and those of machines.
fn processes(home: &Home) -> Result<usize> {
    Ok(all_processes(home)?.len())
}

fn daemon(home: &Home) -> Result<u32> {
    match all_processes(home)?.iter().find(|(_, line)| line.contains("daemon")) {
        Some((pid, _)) => Ok(*pid),
        None => bail!("there is no daemon"),
    }
}

/// Numbers and command lines. Processes of machines name a directory of it, the daemon has it in its environment; a NAT has
/// neither, and is a child of a machine's process or nobody's.
fn all_processes(home: &Home) -> Result<Vec<(u32, String)>> {
    let (path, program) = (home.path(), machine::program());
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let read = |name: &str| fs::read(entry.path().join(name)).unwrap_or_default();
        let line = String::from_utf8_lossy(&read("cmdline")).replace('\0', " ");
        let is_program = fs::read_link(entry.path().join("exe")).is_ok_and(|exe| exe == program);
        let environment = String::from_utf8_lossy(&read("environ")).into_owned();
        let is_ours = [&line, &environment].iter().any(|text| text.contains(&*path.to_string_lossy()));
        let is_nat = line.contains("__nat") && fs::metadata(entry.path()).is_ok_and(|m| m.uid() == 0);
        if is_program && (is_ours || is_nat) {
            found.push((pid, line));
        }
    }
    Ok(found)
}

fn files(directory: &Path) -> Result<usize> {
    let mut count = 0;
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        count += 1;
        // (The images are a link, and others'.)
        if entry.file_type()?.is_dir() {
            count += files(&entry.path())?;
        }
    }
    Ok(count)
}

fn sockets(home: &Home) -> Result<usize> {
    let path = home.path();
    let sockets = fs::read_to_string("/proc/net/unix")?;
    Ok(sockets.lines().filter(|line| line.contains(&*path.to_string_lossy())).count())
}

/// Those of machines, below a directory of the kernel's.
fn control_groups(directory: &Path) -> usize {
    let Ok(entries) = fs::read_dir(directory) else { return 0 };
    let below = entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| {
        let is_machine = entry.file_name().to_string_lossy().starts_with("purlin-");
        usize::from(is_machine) + control_groups(&entry.path())
    });
    below.sum()
}

/// Bytes of a line such as `RssAnon:    1234 kB`.
fn field(file: &Path, name: &str) -> Result<u64> {
    let text = fs::read_to_string(file)?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)).with_context(|| format!("no {name}"))?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? << 10)
}

/// Many machines at once: all answer, and the list is quick.
fn clones(home: &Home, args: &CyclesArgs) -> Result<()> {
    home.purlin(&["launch", &args.image, "a", "--memory", &args.memory])?;
    home.exec("a", "systemctl is-system-running --wait; sync")?;
    let begin = Instant::now();
    home.purlin(&["clone", "a", "c", "--count", &args.clones.to_string()])?;
    println!("{} clones of {}: {:.2?}", args.clones, args.memory, begin.elapsed());
    let names: Vec<String> = (1..=args.clones).map(|number| format!("c-{number}")).collect();
    for name in &names {
        let said = home.exec(name, "hostname")?;
        ensure!(said.trim() == *name, "{name} says that it is {said:?}");
    }
    println!("all have answered: {:.2?}", begin.elapsed());
    let list = || -> Result<Duration> {
        let begin = Instant::now();
        let listed = home.purlin(&["list"])?;
        ensure!(listed.lines().count() == usize::from(args.clones) + 2, "{listed}");
        Ok(begin.elapsed())
    };
    let times = (0..9).map(|_| list()).collect::<Result<Vec<_>>>()?;
    println!("list with {} machines: median {:.1?}", args.clones + 1, median(times));
    let private = names.iter().map(|name| private(home, name)).collect::<Result<Vec<_>>>()?;
    println!("private memory of a clone: median {} MiB", median(private) >> 20);
    for name in names.iter().map(String::as_str).chain(["a"]) {
        home.purlin(&["delete", "-f", name])?;
    }
    Ok(())
}

/// Bytes that are only this machine's process's.
fn private(home: &Home, name: &str) -> Result<u64> {
    let pid = home.info(name)?["process"]["pid"].as_i64().context("it does not run")?;
    field(&Path::new("/proc").join(pid.to_string()).join("smaps_rollup"), "Private_Dirty:")
}
