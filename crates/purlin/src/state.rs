//! `purlin start`, `stop`, `restart`, `pause`, `resume`, `delete`, `rename` and `wait`: what a machine is to do.

use std::time::Duration;

use anyhow::{Result, anyhow};
use clap::{
    Args,
    builder::{PossibleValuesParser, TypedValueParser},
};
use purlin_api::{ChangeState, Instance, Operation, Rename, Status};

use crate::{client::Api, exit::Ended};

/// Machines to do something with.
#[derive(Args)]
pub struct NamesArgs {
    /// The machines
    #[arg(required = true, value_name = "NAME")]
    names: Vec<String>,
}

/// Machines to stop.
#[derive(Args)]
pub struct StopArgs {
    #[command(flatten)]
    names: NamesArgs,

    /// End them at once, as if their power failed
    #[arg(long, short)]
    force: bool,

    /// How long their guests may take to shut down
    #[arg(long, value_name = "SECONDS", conflicts_with = "force")]
    timeout: Option<u32>,
}

/// Machines to delete.
#[derive(Args)]
pub struct DeleteArgs {
    #[command(flatten)]
    names: NamesArgs,

    /// Stop those that run first
    #[arg(long, short)]
    force: bool,
}

/// Another name.
#[derive(Args)]
pub struct RenameArgs {
    /// The machine
    name: String,
    /// Its new name; its guest's host name stays
    to: String,
}

/// What to wait for.
#[derive(Args)]
pub struct WaitArgs {
    /// The machine
    name: String,

    /// Until it is so: running, paused, stopped (or crashed) or gone
    #[arg(long = "for", value_name = "STATUS", default_value = "stopped", value_parser = goal_parser())]
    goal: Goal,

    /// Fail after so many seconds
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
}

/// What can be waited for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Goal {
    Running,
    Paused,
    Stopped,
    Gone,
}

fn goal_parser() -> impl TypedValueParser<Value = Goal> {
    PossibleValuesParser::new(["running", "paused", "stopped", "gone"]).map(|name| match name.as_str() {
        "running" => Goal::Running,
        "paused" => Goal::Paused,
        "gone" => Goal::Gone,
        _ => Goal::Stopped,
    })
}

/// Has machines do something else.
pub fn change(args: &NamesArgs, change: &ChangeState) -> Result<Ended> {
    let api = Api::reach()?;
    each(&api, &args.names, |name| api.put(&format!("/1.0/instances/{name}/state"), change))
}

/// Stops machines.
pub fn stop(args: &StopArgs, restart: bool) -> Result<Ended> {
    let (force, timeout) = (args.force, args.timeout);
    let to = if restart { ChangeState::Restart { force, timeout } } else { ChangeState::Stop { force, timeout } };
    change(&args.names, &to)
}

/// Deletes machines.
pub fn delete(args: &DeleteArgs) -> Result<Ended> {
    let api = Api::reach()?;
    each(&api, &args.names.names, |name| api.delete(&format!("/1.0/instances/{name}?force={}", args.force)))
}

/// Begins something with each, then waits for all; the first that fails is told.
fn each(api: &Api, names: &[String], begin: impl Fn(&str) -> Result<Operation>) -> Result<Ended> {
    let begun: Vec<_> = names.iter().map(|name| begin(name)).collect();
    let done: Vec<_> = begun.into_iter().map(|operation| api.follow(operation?)).collect();
    done.into_iter().collect::<Result<Vec<()>>>()?;
    Ok(Ended::Well)
}

/// Renames a machine.
pub fn rename(args: &RenameArgs) -> Result<Ended> {
    let to = Rename { name: args.to.clone() };
    let _: Instance = Api::reach()?.post(&format!("/1.0/instances/{}/rename", args.name), &to)?;
    Ok(Ended::Well)
}

/// Waits until a machine is as it is wanted.
pub fn wait(args: &WaitArgs) -> Result<Ended> {
    const LOOK: Duration = Duration::from_millis(100);
    let api = Api::reach()?;
    let end = args.timeout.map(|seconds| std::time::Instant::now() + Duration::from_secs(seconds));
    let mut known = false;
    loop {
        let all: Vec<Instance> = api.get("/1.0/instances")?;
        let status = all.iter().find(|instance| instance.name == args.name).map(|instance| instance.status);
        let reached = match (args.goal, status) {
            (Goal::Gone, None) => true,
            (_, None) if known => return Err(anyhow!("'{}' was deleted", args.name)),
            (_, None) => {
                let _: Instance = api.get(&format!("/1.0/instances/{}", args.name))?;
                false
            }
            (Goal::Running, Some(status)) => status == Status::Running,
            (Goal::Paused, Some(status)) => status == Status::Paused,
            (Goal::Stopped, Some(status)) => matches!(status, Status::Stopped | Status::Crashed),
            (Goal::Gone, Some(_)) => false,
        };
        if reached {
            return Ok(Ended::Well);
        }
        known |= status.is_some();
        if end.is_some_and(|end| std::time::Instant::now() >= end) {
            let now = status.map_or("gone", Status::as_str);
            return Err(anyhow!("'{}' is {now} after {} s", args.name, args.timeout.unwrap_or_default()));
        }
        std::thread::sleep(LOOK);
    }
}
