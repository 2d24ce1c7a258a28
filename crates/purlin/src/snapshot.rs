//! `purlin snapshot` and `purlin clone`: moments of machines that are kept, and machines made of one.

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use purlin_api::{NewClones, NewSnapshot, Snapshot, check_name};

use crate::{
    client::Api,
    exit::Ended,
    launch::say_how_to_reach,
    list::age,
    table::{columns, in_units, print},
    terminal,
};

/// Keep moments of machines, and go back to them
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct SnapshotArgs {
    #[command(subcommand)]
    what: Do,
}

#[derive(Subcommand)]
enum Do {
    /// Take a snapshot: memory, devices and disk of a machine that runs; the disk of one that does not
    Create {
        /// The machine
        name: String,
        /// The snapshot's name [default: the first of snap0, snap1 and so on that there is not]
        snapshot: Option<String>,
    },
    /// List the snapshots of a machine
    List {
        /// The machine
        name: String,
        /// Print JSON: an array, as the API has it
        #[arg(long)]
        json: bool,
    },
    /// Go back to a snapshot: what has happened since is gone
    ///
    /// It goes on under the engine that the machine has now, which need not be the one that it ran under then: 'purlin set
    /// NAME engine=kvm' before.
    Restore(Named),
    /// Delete a snapshot
    Delete(Named),
}

/// A snapshot of a machine.
#[derive(Args)]
struct Named {
    /// The machine
    name: String,
    /// The snapshot
    snapshot: String,
}

const EXAMPLES: &str = "\
Examples:
  purlin snapshot create web before-upgrade
  purlin snapshot list web
  purlin snapshot restore web before-upgrade
  purlin snapshot delete web before-upgrade";

/// Make a machine that goes on from where another one is, with an identity of its own
#[derive(Args)]
#[command(after_help = CLONE_EXAMPLES)]
pub struct CloneArgs {
    /// The machine
    name: String,

    /// The new one's name
    new: String,

    /// Make so many, called NEW-1, NEW-2 and so on
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    count: Option<u16>,
}

const CLONE_EXAMPLES: &str = "\
Examples:
  purlin clone web web2
  purlin clone worker job --count 50

The clone of a machine that runs goes on at once, from the same memory and disk; both are shared until either writes. It has
a name, machine ID, network address, ssh host keys and randomness of its own. That of one that does not run is not started.";

/// Does what the user asks for.
pub fn snapshot(args: &SnapshotArgs) -> Result<Ended> {
    match &args.what {
        Do::Create { name, snapshot } => create(name, snapshot.as_deref()),
        Do::List { name, json } => list(name, *json),
        Do::Restore(Named { name, snapshot }) => {
            let api = Api::reach()?;
            api.follow(api.post(&format!("/1.0/instances/{name}/snapshots/{snapshot}/restore"), &())?)?;
            Ok(Ended::Well)
        }
        Do::Delete(Named { name, snapshot }) => {
            let _: Vec<Snapshot> = Api::reach()?.delete(&format!("/1.0/instances/{name}/snapshots/{snapshot}"))?;
            Ok(Ended::Well)
        }
    }
}

fn create(name: &str, snapshot: Option<&str>) -> Result<Ended> {
    let api = Api::reach()?;
    let path = format!("/1.0/instances/{name}/snapshots");
    let new = match snapshot {
        Some(snapshot) => NewSnapshot { name: snapshot.to_owned() },
        None => NewSnapshot { name: free_name(&api.get::<Vec<Snapshot>>(&path)?) },
    };
    api.follow(api.post(&path, &new)?)?;
    if snapshot.is_none() {
        terminal::say(&format!("{name}: snapshot {}", new.name));
    }
    Ok(Ended::Well)
}

/// The first of `snap0`, `snap1` and so on that there is not.
fn free_name(snapshots: &[Snapshot]) -> String {
    let is_free = |name: &String| snapshots.iter().all(|snapshot| snapshot.name != *name);
    // There are fewer than that.
    (0_u64..).map(|number| format!("snap{number}")).find(is_free).unwrap_or_default()
}

fn list(name: &str, json: bool) -> Result<Ended> {
    let snapshots: Vec<Snapshot> = Api::reach()?.get(&format!("/1.0/instances/{name}/snapshots"))?;
    if json {
        print(&serde_json::to_string(&snapshots).context("cannot write JSON")?);
        return Ok(Ended::Well);
    }
    let rows = snapshots.iter().map(|snapshot| {
        let (memory, pause) = match snapshot.running {
            true => (in_units(snapshot.bytes), format!("{:.1} ms", snapshot.pause_us as f64 / 1000.0)),
            false => ("-".into(), "-".into()),
        };
        [snapshot.name.clone(), age(std::time::Duration::from_secs(snapshot.created)), memory, pause]
    });
    print(&columns(["NAME", "AGE", "MEMORY", "PAUSE"], rows));
    Ok(Ended::Well)
}

/// Makes clones.
pub fn clone(args: &CloneArgs) -> Result<Ended> {
    let names: Vec<String> = match args.count {
        None => vec![args.new.clone()],
        Some(count) => (1..=count).map(|number| format!("{}-{number}", args.new)).collect(),
    };
    if let Some(Err(error)) = names.iter().map(|name| check_name(name)).find(Result::is_err) {
        return Ok(Ended::WrongUsage(error.to_string()));
    }
    let api = Api::reach()?;
    let new = NewClones { names: names.clone() };
    api.follow(api.post(&format!("/1.0/instances/{}/clone", args.name), &new)?)?;
    match names.as_slice() {
        [name] => say_how_to_reach(&api, name),
        _ => Ok(Ended::Well),
    }
}
