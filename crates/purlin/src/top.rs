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

    /// Print it once, as JSON: an array of name, status, cpu_percent, memory (bytes), memory_size and up_ms
    #[arg(long)]
    json: bool,
}

const HELP: &str = "\
CPU is in percent of one CPU of the host: a guest with two CPUs can use 200. MEMORY is what the machine has of the host's
memory now, OF what its guest believes to have. On a terminal it is shown anew every 2 s, until q or Ctrl-C.";

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
    /// Bytes.
    memory: Option<u64>,
    /// The guest's, in bytes.
    memory_size: u64,
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
        let process = instance.process.as_ref();
        let now = since_1970().as_millis() as u64;
        Row {
            name: instance.name.clone(),
            status: instance.status,
            cpu_percent: before.and_then(|before| self.cpu_percent(instance, before)),
            memory: process.map(|process| process.usage.memory),
            memory_size: instance.machine.memory(),
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
            or_none(row.memory.map(in_units)),
            in_units(row.memory_size),
            or_none(row.up_ms.map(|ms| age(since(ms)))),
        ]
    };
    columns(["NAME", "STATUS", "CPU", "MEMORY", "OF", "UP"], rows.iter().map(cells))
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
            usage: Usage { cpu_ms, memory: 1 << 20 },
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
        assert!(table.lines().nth(1).unwrap().starts_with("busy   running  150.6 %  1 MiB"), "{table}");
        assert!(table.lines().last().unwrap().starts_with("off    stopped  -        -"), "{table}");
    }
}
