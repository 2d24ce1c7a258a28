//! `purlin launch`: a machine that is kept.

use anyhow::Result;
use clap::Args;
use purlin_api::{Instance, Machine, Network, NewInstance, check_name};
use purlin_images::{seed::read_user_data, ssh};

use crate::{
    client::Api,
    exit::Ended,
    machine::{MachineArgs, parse_size},
    terminal,
};

/// Make a machine of an image, start it, and keep it
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct LaunchArgs {
    /// The image: 'debian' is built at its first use; others by their names ('purlin image list')
    image: String,

    /// The machine's name: small letters, digits and hyphens
    name: String,

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
  purlin launch debian web
  purlin launch debian db --cpus 2 --memory 2G --disk-size 20G --user-data setup.yaml
  purlin launch debian proxy --publish 8080:80
  purlin launch debian batch --cpus 4 --cpu-shares 50 --cpu-cap 200
  purlin exec web -- apt-get update
  purlin shell web";

/// Launches it, and waits until its guest runs.
pub fn launch(args: &LaunchArgs) -> Result<Ended> {
    if let Err(error) = check_name(&args.name) {
        return Ok(Ended::WrongUsage(error.to_string()));
    }
    let user_data = args.machine.user_data.as_deref().map(read_user_data).transpose()?;
    let user_data = user_data.map(String::from_utf8).transpose();
    let Ok(user_data) = user_data else {
        return Ok(Ended::WrongUsage("--user-data of a kept machine is text: gzip it not".into()));
    };
    let new = NewInstance {
        name: args.name.clone(),
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
    let api = Api::reach()?;
    api.follow(api.post("/1.0/instances", &new)?)?;
    let instance: Instance = api.get(&format!("/1.0/instances/{}", args.name))?;
    let reach = match instance.process.and_then(|process| process.said.ssh) {
        Some(ssh) => format!("; ssh: port {} of {}", ssh.port(), ssh.ip()),
        None => String::new(),
    };
    terminal::say(&format!("{}: {}{reach}", args.name, instance.status.as_str()));
    Ok(Ended::Well)
}
