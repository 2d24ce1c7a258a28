//! `purlin set NAME KEY=VALUE...`: the hardware of a machine that is kept.

use anyhow::Result;
use clap::Args;
use purlin_api::{Instance, Status, vm::GuestMemory};
use serde_json::{Map, Value, json};

use crate::{client::Api, exit::Ended, machine, table::in_units, terminal};

/// Change what a machine is made of, from its next start on, or how much memory its guest has and what it may take of the
/// host, at once
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct SetArgs {
    /// The machine
    name: String,

    /// memory=SIZE, cpus=N, engine=auto|kvm|translator, cpu=MODEL, net=KIND; cpu-shares=N, cpu-cap=PERCENT, memory-max=SIZE
    /// (or none) at once; as the options of 'purlin launch'. Memory of a machine that runs, too: its guest gives back what it
    /// was started with and is not to have, and can have it again; more than that it has from the next start on
    #[arg(required = true, value_name = "KEY=VALUE", value_parser = parse)]
    settings: Vec<Setting>,
}

const EXAMPLES: &str = "\
Examples:
  purlin set web memory=512M
  purlin set web memory=2G cpus=2
  purlin set web net=none
  purlin set web cpu-cap=50 cpu-shares=200";

/// One of them, as the API has it.
#[derive(Clone, Debug, PartialEq)]
struct Setting(&'static str, Value);

fn parse(text: &str) -> Result<Setting, String> {
    let (key, value) = text.split_once('=').ok_or("it is KEY=VALUE")?;
    match key {
        "memory" => Ok(Setting("memory", machine::parse_size(value)?.into())),
        "cpus" => value.parse::<u32>().map(|n| Setting("cpus", n.into())).map_err(|_| "cpus is a number".into()),
        "engine" => Ok(Setting("engine", value.into())),
        "cpu" => Ok(Setting("cpu", value.into())),
        "net" => Ok(Setting("network", json!(machine::parse_network(value)?))),
        "cpu-shares" => number("cpu_shares", value),
        "cpu-cap" => number("cpu_cap", value),
        "memory-max" if value == "none" => Ok(Setting("memory_max", Value::Null)),
        "memory-max" => Ok(Setting("memory_max", machine::parse_size(value)?.into())),
        _ => Err(format!("'{key}' is none of memory, cpus, engine, cpu, net, cpu-shares, cpu-cap, memory-max")),
    }
}

/// A number, or `none`.
fn number(key: &'static str, value: &str) -> Result<Setting, String> {
    match value {
        "none" => Ok(Setting(key, Value::Null)),
        _ => value.parse::<u32>().map(|n| Setting(key, n.into())).map_err(|_| "it is a number, or none".into()),
    }
}

/// Changes it.
pub fn set(args: &SetArgs) -> Result<Ended> {
    let patch: Map<String, Value> =
        args.settings.iter().map(|Setting(key, value)| ((*key).into(), value.clone())).collect();
    let instance: Instance = Api::reach()?.patch(&format!("/1.0/instances/{}", args.name), &patch)?;
    if matches!(instance.status, Status::Running | Status::Paused) {
        say_what_waits(args, &instance);
    }
    Ok(Ended::Well)
}

/// Says what a machine that runs will be like only when it is started again.
fn say_what_waits(args: &SetArgs, instance: &Instance) {
    let (name, wanted) = (&args.name, instance.machine.memory_left());
    let guest = instance.process.as_ref().and_then(|process| process.said.memory);
    let is_set = |names: &[&str]| args.settings.iter().any(|Setting(key, _)| names.contains(key));
    let memory_waits = is_set(&["memory"]) && guest.is_none_or(|guest| guest.wanted != wanted);
    match guest {
        Some(GuestMemory { most, .. }) if memory_waits && most < wanted => terminal::say(&format!(
            "'{name}' was started with {} of memory, and has more from its next start on: purlin restart {name}",
            in_units(most)
        )),
        _ if memory_waits || is_set(&["cpus", "engine", "cpu", "network"]) => {
            terminal::say(&format!("it is so from the next start of '{name}' on: purlin restart {name}"));
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings() {
        assert_eq!(parse("memory=2G"), Ok(Setting("memory", json!(2_u64 << 30))));
        assert_eq!(parse("net=none"), Ok(Setting("network", json!({"kind": "none"}))));
        for wrong in ["memory", "memory=", "cpus=x", "disk=a", "net=bridge"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
