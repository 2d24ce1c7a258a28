//! `purlin list` and `purlin info`.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use clap::Args;
use purlin_api::{Instance, Network, vm::GuestMemory};

use crate::{
    client::Api,
    exit::Ended,
    table::{columns, in_units, print},
};

/// List the machines that are kept
#[derive(Args)]
pub struct ListArgs {
    /// Print JSON: an array, as the API has it
    #[arg(long)]
    json: bool,
}

/// Show all that is known of a machine
#[derive(Args)]
pub struct InfoArgs {
    /// The machine
    name: String,

    /// Print JSON, as the API has it
    #[arg(long)]
    json: bool,
}

/// Lists them.
pub fn list(args: &ListArgs) -> Result<Ended> {
    let instances: Vec<Instance> = Api::reach()?.get("/1.0/instances")?;
    if args.json {
        print(&serde_json::to_string(&instances).context("cannot write JSON")?);
    } else {
        print(&columns(["NAME", "STATUS", "IMAGE", "CPUS", "MEMORY", "SSH"], instances.iter().map(row)));
    }
    Ok(Ended::Well)
}

fn row(instance: &Instance) -> [String; 6] {
    let ssh = instance.process.as_ref().and_then(|process| process.said.ssh);
    [
        instance.name.clone(),
        instance.status.as_str().to_owned(),
        instance.image.clone(),
        instance.machine.cpus().to_string(),
        memory_in_short(instance),
        ssh.map_or("-".into(), |ssh| ssh.to_string()),
    ]
}

/// `384 MiB (now 400 MiB)`
fn memory_in_short(instance: &Instance) -> String {
    let size = in_units(instance.machine.memory());
    match instance.process.as_ref().and_then(|process| process.said.memory) {
        Some(guest) if guest.now != instance.machine.memory_left() => format!("{size} (now {})", in_units(guest.now)),
        _ => size,
    }
}

/// Shows one.
pub fn info(args: &InfoArgs) -> Result<Ended> {
    let instance: Instance = Api::reach()?.get(&format!("/1.0/instances/{}", args.name))?;
    if args.json {
        print(&serde_json::to_string(&instance).context("cannot write JSON")?);
        return Ok(Ended::Well);
    }
    let lines = lines(&instance);
    print(&lines.iter().map(|(name, value)| format!("{name:10} {value}\n")).collect::<String>());
    Ok(Ended::Well)
}

fn lines(instance: &Instance) -> Vec<(&'static str, String)> {
    let machine = &instance.machine;
    let mut lines = vec![
        ("name", instance.name.clone()),
        ("status", instance.status.as_str().to_owned()),
        ("image", instance.image.clone()),
        ("id", instance.id.clone()),
        ("age", age(Duration::from_secs(instance.created))),
        ("cpus", machine.cpus().to_string()),
        ("memory", memory(instance)),
        ("network", network(&machine.network)),
    ];
    lines.extend(machine.cpu_shares.iter().map(|weight| ("cpu shares", weight.to_string())));
    lines.extend(machine.cpu_cap.iter().map(|cap| ("cpu cap", format!("{cap} %"))));
    lines.extend(machine.memory_max.iter().map(|most| ("memory max", in_units(*most))));
    lines.extend(machine.disks.iter().map(|disk| ("disk", disk.path.display().to_string())));
    if let Some(process) = &instance.process {
        let (said, usage) = (&process.said, &process.usage);
        lines.push(("process", process.pid.to_string()));
        lines.push(("up", age(Duration::from_millis(said.started))));
        lines.push(("engine", said.engine.clone()));
        lines.push(("shares", said.shares.clone()));
        lines.extend(said.sandbox_lacks.iter().map(|lacks| ("sandbox", lacks.clone())));
        lines.extend(said.ssh.iter().map(|ssh| ("ssh", ssh.to_string())));
        lines.extend(said.published.iter().map(|published| ("published", published.clone())));
        lines.push((
            "used",
            format!("{:.1} s of CPU, {} of memory", usage.cpu_ms as f64 / 1000.0, in_units(usage.memory)),
        ));
    }
    lines.extend(
        instance
            .last_end
            .iter()
            .map(|end| ("last end", format!("{} ago: {}", age(Duration::from_millis(end.time)), end.message))),
    );
    lines
}

/// `384 MiB; the guest has 400 MiB now, of 512 MiB that it was started with`
fn memory(instance: &Instance) -> String {
    let size = in_units(instance.machine.memory());
    match instance.process.as_ref().and_then(|process| process.said.memory) {
        Some(GuestMemory { most, now, .. })
            if most != instance.machine.memory() || now != instance.machine.memory_left() =>
        {
            let (now, most) = (in_units(now), in_units(most));
            format!("{size}; the guest has {now} now, of {most} that it was started with")
        }
        _ => size,
    }
}

fn network(network: &Network) -> String {
    match network {
        Network::User { .. } => "user".into(),
        Network::Tap { name, .. } => format!("tap {name}"),
        Network::None => "none".into(),
    }
}

/// How long ago that was, counted from 1970: `3 d 4 h`, `5 min`, `12 s`.
pub fn age(since: Duration) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = now.saturating_sub(since).as_secs();
    match (seconds / 86400, seconds / 3600 % 24, seconds / 60 % 60) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, minutes) => format!("{minutes} min"),
        (0, hours, minutes) => format!("{hours} h {minutes} min"),
        (days, hours, _) => format!("{days} d {hours} h"),
    }
}
