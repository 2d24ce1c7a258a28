//! The `purlin` command: one file for each verb.
#![forbid(unsafe_code)]

mod console;
mod doctor;
mod exit;
mod image;
mod progress;
mod prompt;
mod run;
mod signals;
mod stop;
mod terminal;
mod usage;

use std::{env, process::ExitCode};

use clap::{Parser, Subcommand};
use purlin_vmm::network::nat;

use crate::{exit::Ended, signals::Signals};

/// Virtual machines on any Linux host, with hardware virtualisation or without.
#[derive(Parser)]
#[command(name = "purlin", version, disable_help_subcommand = true, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    Run(Box<run::RunArgs>),
    Image(image::ImageArgs),
    Doctor(doctor::DoctorArgs),
}

const EXAMPLES: &str = "\
Examples:
  purlin run debian                 a Debian 12 server, to which your ssh key lets you in
  purlin run shell                  Debian's kernel with a shell in memory, within seconds
  purlin run --kernel bzImage --initrd initrd.img --cmdline console=ttyS0
  purlin image list                 the images that machines can be made of
  purlin doctor                     what this host offers to virtual machines";

fn main() -> ExitCode {
    // Processes of a run: this program once more, each with a job of its own.
    match env::args_os().nth(1) {
        Some(verb) if verb == terminal::KEEPER_VERB => return terminal::keep(),
        Some(verb) if verb == nat::VERB => {
            terminal::log_to_stderr();
            return nat::main();
        }
        _ => {}
    }
    // Before any thread is started, which would inherit that they are not blocked.
    let signals = Signals::block();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage::report(&error),
    };
    terminal::log_to_stderr();
    let ended = match cli.verb {
        Verb::Run(args) => run::run(*args, signals),
        Verb::Image(args) => image::image(&args, signals),
        Verb::Doctor(args) => doctor::doctor(&args),
    };
    ended.unwrap_or_else(Ended::from).report()
}
