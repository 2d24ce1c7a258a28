//! `purlin set NAME KEY=VALUE...`: the hardware of a machine that is kept.

use anyhow::Result;
use clap::Args;
use purlin_api::{Instance, Status};
use serde_json::{Map, Value, json};

use crate::{client::Api, exit::Ended, machine, terminal};

/// Change what a machine is made of, from its next start on, or what it may take of the host, at once
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct SetArgs {
    /// The machine
    name: String,

    /// memory=SIZE, cpus=N, engine=auto|kvm|translator, cpu=MODEL, net=KIND; cpu-shares=N, cpu-cap=PERCENT, memory-max=SIZE
    /// (or none) at once; as the options of 'purlin launch'
    #[arg(required = true, value_name = "KEY=VALUE", value_parser = parse)]
    settings: Vec<Setting>,
}

const EXAMPLES: &str = "\
Examples:
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
    let at_once = |Setting(key, _): &Setting| ["cpu_shares", "cpu_cap", "memory_max"].contains(key);
    if matches!(instance.status, Status::Running | Status::Paused) && !args.settings.iter().all(at_once) {
        terminal::say(&format!("it is so from the next start of '{0}' on: purlin restart {0}", args.name));
    }
    Ok(Ended::Well)
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
