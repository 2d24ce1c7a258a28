//! `purlin launch`: a machine that is kept.

use anyhow::Result;
use clap::Args;
use purlin_api::{Instance, Machine, Network, NewInstance, check_name};
use purlin_images::{seed::read_user_data, ssh};

use crate::{
    client::Api,
    exit::Ended,
    machine::{MachineArgs, parse_size},
    remote, terminal,
};

/// Make a machine of an image, start it, and keep it
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct LaunchArgs {
    /// The image: 'debian' is built at its first use; others by their names ('purlin image list')
    image: String,

    /// The machine's name: small letters, digits and hyphens [default: the image's, with a number where that is taken]
    name: Option<String>,

    #[command(flatten)]
    machine: MachineArgs,

    /// Its weight against other machines that want the host's processors and disks at the same time, 1 to 10000: twice the
    /// weight is twice the time [default: 100]
    #[arg(long, value_name = "N")]
    cpu_shares: Option<u32>,

    /// The most time of the host's processors, in percent of one: 150 is one and a half
    #[arg(long, value_name = "PERCENT")]
    cpu_cap: Option<u32>,

    /// The most memory of the host's that it may take: the guest's and some more
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    memory_max: Option<u64>,

    /// Words for the kernel's command line, behind those of the image
    #[arg(long, value_name = "TEXT")]
    cmdline: Option<String>,

    /// Make it, and do not start it
    #[arg(long)]
    no_start: bool,
}

const EXAMPLES: &str = "\
Examples:
  purlin launch debian
  purlin launch debian web
  purlin launch debian db --cpus 2 --memory 2G --disk-size 20G --user-data setup.yaml
  purlin launch debian proxy --publish 8080:80
  purlin launch debian batch --cpus 4 --cpu-shares 50 --cpu-cap 200
  purlin exec web -- apt-get update
  purlin shell web

Progress goes to standard error, and ends with the command by which ssh reaches the machine.";

/// Launches it, and waits until its guest runs.
pub fn launch(args: &LaunchArgs) -> Result<Ended> {
    if let Some(Err(error)) = args.name.as_deref().map(check_name) {
        return Ok(Ended::WrongUsage(error.to_string()));
    }
    let user_data = args.machine.user_data.as_deref().map(read_user_data).transpose()?;
    let user_data = user_data.map(String::from_utf8).transpose();
    let Ok(user_data) = user_data else {
        return Ok(Ended::WrongUsage("--user-data of a kept machine is text: gzip it not".into()));
    };
    if remote::chosen().is_some()
        && let Some(disk) = args.machine.disk.iter().find(|disk| disk.path.is_relative())
    {
        let path = disk.path.display();
        return Ok(Ended::WrongUsage(format!(
            "--disk {path}: on another host a disk has an absolute path, of that host"
        )));
    }
    let api = Api::reach()?;
    let name = match &args.name {
        Some(name) => name.clone(),
        None => free_name(&args.image, &api.get::<Vec<Instance>>("/1.0/instances")?),
    };
    let new = NewInstance {
        name: name.clone(),
        image: args.image.clone(),
        machine: Machine {
            cpu_shares: args.cpu_shares,
            cpu_cap: args.cpu_cap,
            memory_max: args.memory_max,
            ..args.machine.hardware(Machine::MEMORY, Network::default())
        },
        disk_size: args.machine.disk_size,
        user_data,
        cmdline: args.cmdline.clone(),
        ssh_keys: Some(ssh::keys_of_user()?.public),
        start: !args.no_start,
    };
    api.follow(api.post("/1.0/instances", &new)?)?;
    say_how_to_reach(&api, &name)
}

/// A name made of the image's that no machine has: `debian`, `debian-2` and so on.
fn free_name(image: &str, instances: &[Instance]) -> String {
    let letters = image.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' });
    let base: String = letters.take(40).collect();
    let base = base.trim_matches('-');
    let base = if base.is_empty() { "machine" } else { base };
    let is_free = |name: &String| instances.iter().all(|instance| instance.name != *name);
    let numbered = (2_u64..).map(|number| format!("{base}-{number}"));
    // There are fewer than that.
    std::iter::once(base.to_owned()).chain(numbered).find(is_free).unwrap_or_default()
}

/// Says what a machine that was made is doing, and how to get there.
pub fn say_how_to_reach(api: &Api, name: &str) -> Result<Ended> {
    let instance: Instance = api.get(&format!("/1.0/instances/{name}"))?;
    let ssh = instance.process.and_then(|process| process.said.ssh);
    let ssh = match ssh {
        Some(ssh) if remote::chosen().is_some() => format!("; its ssh is at {ssh} of its host"),
        Some(ssh) => {
            let identity = ssh::keys_of_user()?.identity;
            let identity = identity.map(|path| format!("-i {} ", path.display())).unwrap_or_default();
            format!("; ssh {identity}-p {} root@{}", ssh.port(), ssh.ip())
        }
        None => String::new(),
    };
    terminal::say(&format!("{name}: {}{ssh}", instance.status.as_str()));
    Ok(Ended::Well)
}
