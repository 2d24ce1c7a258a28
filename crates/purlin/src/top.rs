//! `purlin top`: what machines use, as it changes.

mod watch;

use std::{
    cmp::Ordering,
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result};
use clap::Args;
use purlin_api::{Instance, Status};
use serde::Serialize;

use crate::{
    client::Api,
    exit::Ended,
    list::age,
    signals::Signals,
    table::{columns, in_units, print},
    terminal,
};

/// Between the two first readings: processors' time is counted in steps of 10 ms.
const FIRST: Duration = Duration::from_secs(1);

/// Show what machines use of this host, the busiest first
#[derive(Args)]
#[command(after_help = HELP)]
pub struct TopArgs {
    /// Print it once, and leave; so it is where standard output is no terminal
    #[arg(long)]
    once: bool,

    /// Print it once, as JSON: an array of name, status, cpu_percent, cpu_cap, cpu_shares, memory (bytes), memory_size,
    /// memory_max, memory_max_used and up_ms
    #[arg(long)]
    json: bool,
}

const HELP: &str = "\
CPU is in percent of one CPU of the host: a guest with two CPUs can use 200. CAP is the most of that, and how much of the
most is used; SHARES are the weight against others. MEMORY is what the machine has of the host's memory now, OF what its
guest believes to have; MAX is the most, and how much of the most is used (the host's cache of its disks counts, too). On a
terminal it is shown anew every 2 s, until q or Ctrl-C.";

/// Shows it.
pub fn top(args: &TopArgs, signals: Signals) -> Result<Ended> {
    let api = Api::reach()?;
    if !(args.once || args.json) && terminal::is_interactive() && terminal::is_shown() {
        return watch::watch(&api, signals);
    }
    signals.unblock();
    let before = Reading::take(&api)?;
    thread::sleep(FIRST);
    let rows = Reading::take(&api)?.since(Some(&before));
    match args.json {
        true => print(&serde_json::to_string(&rows).context("cannot write JSON")?),
        false => print(&table(&rows)),
    }
    Ok(Ended::Well)
}

/// What the daemon says at a moment.
struct Reading {
    at: Instant,
    instances: Vec<Instance>,
}

/// What a machine uses; what is of its process is left out where it has none.
#[derive(Debug, PartialEq, Serialize)]
struct Row {
    name: String,
    status: Status,
    /// Of one CPU of the host's; unknown too for a process that was not there before.
    cpu_percent: Option<f64>,
    /// The most that may be.
    cpu_cap: Option<u32>,
    /// Its weight.
    cpu_shares: u32,
    /// Bytes.
    memory: Option<u64>,
    /// The guest's, in bytes.
    memory_size: u64,
    /// The most, in bytes.
    memory_max: Option<u64>,
    /// What counts against that.
    memory_max_used: Option<u64>,
    up_ms: Option<u64>,
}

impl Reading {
    fn take(api: &Api) -> Result<Self> {
        let instances = api.get("/1.0/instances")?;
        Ok(Self { at: Instant::now(), instances })
    }

    /// What was used since another reading, the busiest first.
    fn since(&self, before: Option<&Self>) -> Vec<Row> {
        let mut rows: Vec<_> = self.instances.iter().map(|instance| self.row(instance, before)).collect();
        let busier = |a: &Row, b: &Row| b.cpu_percent.partial_cmp(&a.cpu_percent).unwrap_or(Ordering::Equal);
        rows.sort_by(|a, b| busier(a, b).then_with(|| a.name.cmp(&b.name)));
        rows
    }

    fn row(&self, instance: &Instance, before: Option<&Self>) -> Row {
        let (machine, process) = (&instance.machine, instance.process.as_ref());
        let guest = process.and_then(|process| process.said.memory);
        let now = since_1970().as_millis() as u64;
        Row {
            name: instance.name.clone(),
            status: instance.status,
            cpu_percent: before.and_then(|before| self.cpu_percent(instance, before)),
            cpu_cap: machine.cpu_cap,
            cpu_shares: machine.cpu_shares(),
            memory: process.map(|process| process.usage.memory),
            memory_size: guest.map_or(machine.memory(), |guest| guest.now),
            memory_max: machine.memory_max,
            memory_max_used: process.and_then(|process| process.usage.memory_limited),
            up_ms: process.map(|process| now.saturating_sub(process.said.started)),
        }
    }

    /// Of the same process, whatever its machine was called then.
    fn cpu_percent(&self, instance: &Instance, before: &Self) -> Option<f64> {
        let now = instance.process.as_ref()?;
        let mut then = before.instances.iter().filter(|other| other.id == instance.id);
        let then = then.find_map(|other| other.process.as_ref()).filter(|then| then.pid == now.pid)?;
        let used = now.usage.cpu_ms.saturating_sub(then.usage.cpu_ms) as f64 / 1000.0;
        let percent = 100.0 * used / self.at.saturating_duration_since(before.at).as_secs_f64();
        // More digits would say nothing.
        percent.is_finite().then(|| (percent * 10.0).round() / 10.0)
    }
}

fn since_1970() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

fn table(rows: &[Row]) -> String {
    let or_none = |text: Option<String>| text.unwrap_or_else(|| "-".into());
    let since = |ms| since_1970().saturating_sub(Duration::from_millis(ms));
    let cells = |row: &Row| {
        [
            row.name.clone(),
            row.status.as_str().to_owned(),
            or_none(row.cpu_percent.map(|percent| format!("{percent:.1} %"))),
            or_none(row.cpu_cap.map(|cap| of(format!("{cap} %"), row.cpu_percent, cap.into()))),
            row.cpu_shares.to_string(),
            or_none(row.memory.map(in_units)),
            in_units(row.memory_size),
            or_none(row.memory_max.map(|most| of(in_units(most), row.memory_max_used.map(|b| b as f64), most as f64))),
            or_none(row.up_ms.map(|ms| age(since(ms)))),
        ]
    };
    columns(["NAME", "STATUS", "CPU", "CAP", "SHARES", "MEMORY", "OF", "MAX", "UP"], rows.iter().map(cells))
}

/// `50 % (98 %)`: a limit, and how much of it is used, where that is known.
fn of(limit: String, used: Option<f64>, most: f64) -> String {
    used.map_or(limit.clone(), |used| format!("{limit} ({:.0} %)", 100.0 * used / most))
}

#[cfg(test)]
mod tests {
    use purlin_api::{InstanceProcess, Machine, Usage, vm};

    use super::*;

    fn instance(name: &str, process: Option<(u32, u64)>) -> Instance {
        let said = vm::Process {
            started: 0,
            state: vm::State::Running,
            engine: String::new(),
            disks: Vec::new(),
            memory: None,
            shares: String::new(),
            sandbox_lacks: Vec::new(),
            ssh: None,
            published: Vec::new(),
        };
        let process = process.map(|(pid, cpu_ms)| InstanceProcess {
            pid,
            said: said.clone(),
            usage: Usage { cpu_ms, memory: 1 << 20, memory_limited: Some(3 << 29) },
        });
        Instance {
            name: name.into(),
            id: format!("id of {name}"),
            image: String::new(),
            status: if process.is_some() { Status::Running } else { Status::Stopped },
            created: 0,
            machine: Machine::default(),
            process,
            last_end: None,
        }
    }

    #[test]
    fn the_busiest_are_first_and_what_is_not_known_is_not_told() {
        let at = Instant::now();
        let before = Reading {
            at,
            instances: vec![
                instance("idle", Some((1, 500))),
                instance("busy", Some((2, 1000))),
                instance("off", None),
                instance("again", Some((3, 9000))),
            ],
        };
        let now = Reading {
            at: at + Duration::from_secs(2),
            instances: vec![
                instance("again", Some((4, 100))),
                instance("busy", Some((2, 4011))),
                instance("idle", Some((1, 510))),
                instance("new", Some((5, 100))),
                instance("off", None),
            ],
        };
        let rows = now.since(Some(&before));
        let said: Vec<_> = rows.iter().map(|row| (row.name.as_str(), row.cpu_percent)).collect();
        let known = [("busy", Some(150.6)), ("idle", Some(0.5)), ("again", None), ("new", None), ("off", None)];
        assert_eq!(said, known);
        assert!(now.since(None).iter().all(|row| row.cpu_percent.is_none()));
        // No time has passed.
        assert!(now.since(Some(&now)).iter().all(|row| row.cpu_percent.is_none()));
        let table = table(&rows);
        assert!(table.lines().nth(1).unwrap().starts_with("busy   running  150.6 %  -    100     1 MiB"), "{table}");
        assert!(table.lines().last().unwrap().starts_with("off    stopped  -        -    100     -"), "{table}");
    }

    #[test]
    fn limits_are_shown_with_what_is_used_of_them() {
        let (before, mut now) = (instance("a", Some((1, 0))), instance("a", Some((1, 450))));
        now.machine = Machine { cpu_cap: Some(50), cpu_shares: Some(200), memory_max: Some(2 << 30), ..now.machine };
        let at = Instant::now();
        let before = Reading { at, instances: vec![before] };
        let now = Reading { at: at + Duration::from_secs(1), instances: vec![now] };
        let first = table(&now.since(None));
        assert!(first.contains("-    50 %  200     1 MiB   1 GiB  2 GiB (75 %)"), "{first}");
        let table = table(&now.since(Some(&before)));
        assert!(table.contains("45.0 %  50 % (90 %)  200     1 MiB   1 GiB  2 GiB (75 %)"), "{table}");
    }
}
