//! The `purlin` command: one file for each verb.
#![forbid(unsafe_code)]

mod agent;
mod attach;
mod client;
mod completions;
mod console;
mod daemon;
mod doctor;
mod exec;
mod exit;
mod file;
mod image;
mod launch;
mod list;
mod machine;
mod man;
mod monitor;
mod port_forward;
mod progress;
mod prompt;
mod remote;
mod run;
mod set;
mod signals;
mod snapshot;
mod state;
mod stop;
mod table;
mod terminal;
mod token;
mod top;
mod usage;

use std::{env, path::Path, process::ExitCode};

use anyhow::Result;
use clap::{Parser, Subcommand};
use purlin_api::ChangeState;
use purlin_vmm::{network::nat, process};

use crate::{exit::Ended, signals::Signals};

/// Virtual machines on any Linux host, with hardware virtualisation or without.
#[derive(Parser)]
#[command(name = "purlin", version, disable_help_subcommand = true, max_term_width = 120, after_help = EXAMPLES)]
struct Cli {
    /// Ask the daemon of another host about machines that are kept, and not the one here
    #[arg(long, value_name = "https://HOST:PORT", value_parser = remote::parse, long_help = remote::HELP)]
    host: Option<String>,

    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    Run(Box<run::RunArgs>),
    Launch(Box<launch::LaunchArgs>),
    #[command(alias = "ls")]
    List(list::ListArgs),
    Info(list::InfoArgs),
    /// Start machines that are kept
    Start(state::NamesArgs),
    /// Have the guests of machines shut down
    Stop(state::StopArgs),
    /// Stop machines and start them again
    Restart(state::StopArgs),
    /// Have machines stand still
    Pause(state::NamesArgs),
    /// Have machines go on that stand still
    Resume(state::NamesArgs),
    Exec(exec::ExecArgs),
    Shell(exec::ShellArgs),
    File(file::FileArgs),
    Console(attach::ConsoleArgs),
    PortForward(port_forward::PortForwardArgs),
    Snapshot(snapshot::SnapshotArgs),
    Clone(snapshot::CloneArgs),
    Set(set::SetArgs),
    /// Give a machine another name
    Rename(state::RenameArgs),
    /// Delete machines, with their disks
    #[command(alias = "rm")]
    Delete(state::DeleteArgs),
    /// Wait until a machine is stopped, or as you want it
    Wait(state::WaitArgs),
    Top(top::TopArgs),
    Monitor(monitor::MonitorArgs),
    Image(image::ImageArgs),
    Daemon(daemon::DaemonArgs),
    Token(token::TokenArgs),
    Doctor(doctor::DoctorArgs),
    Completions(completions::CompletionsArgs),
    Man(man::ManArgs),
}

const EXAMPLES: &str = "\
Examples:
  purlin launch debian web          a Debian 12 server that is kept, called web
  purlin shell web                  a shell in it; purlin exec web -- COMMAND runs a command
  purlin clone web web2             another one, from where that one is
  purlin run debian                 a Debian 12 server in the foreground, gone when it ends
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
        Some(verb) if verb == run::inside::VERB => {
            terminal::log_to_stderr();
            return run::inside::main();
        }
        Some(verb) if verb == process::VERB => {
            terminal::log_to_stderr();
            let dir = env::args_os().nth(2).unwrap_or_default();
            return process::main(Path::new(&dir));
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
    if cli.host.is_some() && is_of_this_host(&cli.verb) {
        return Ended::WrongUsage("--host is for machines that are kept, and images; this is done on this host".into())
            .report();
    }
    remote::choose(cli.host);
    let ended = match cli.verb {
        Verb::Run(args) => run::run(*args, signals),
        Verb::Image(args) => image::image(&args, signals),
        Verb::Doctor(args) => doctor::doctor(&args),
        Verb::Daemon(args) => daemon::daemon(&args, signals),
        Verb::Completions(args) => completions::completions(&args),
        Verb::Man(args) => man::man(&args),
        Verb::Exec(args) => client::ended(exec::exec(&args, signals)),
        Verb::Shell(args) => client::ended(exec::shell(&args, signals)),
        Verb::Top(args) => client::ended(top::top(&args, signals)),
        verb if is_an_operation(&verb) => {
            signals.watch(client::leave, || {}, || {});
            client::ended(ask(verb))
        }
        verb => {
            signals.unblock();
            client::ended(ask(verb))
        }
    };
    ended.unwrap_or_else(Ended::from).report()
}

/// Whether it is not what another host's daemon could do.
fn is_of_this_host(verb: &Verb) -> bool {
    use Verb::{Completions, Daemon, Doctor, Image, Man, Run, Token};
    match verb {
        Run(_) | Daemon(_) | Token(_) | Doctor(_) | Completions(_) | Man(_) => true,
        Image(args) => args.is_of_this_host(),
        _ => false,
    }
}

/// Whether the daemon goes on with it though nobody waits.
fn is_an_operation(verb: &Verb) -> bool {
    use Verb::{Clone, Delete, Launch, Restart, Snapshot, Start, Stop};
    matches!(verb, Launch(_) | Start(_) | Stop(_) | Restart(_) | Snapshot(_) | Clone(_) | Delete(_))
}

/// What the daemon does.
fn ask(verb: Verb) -> Result<Ended> {
    match verb {
        Verb::Launch(args) => launch::launch(&args),
        Verb::List(args) => list::list(&args),
        Verb::Info(args) => list::info(&args),
        Verb::Start(args) => state::change(&args, &ChangeState::Start),
        Verb::Stop(args) => state::stop(&args, false),
        Verb::Restart(args) => state::stop(&args, true),
        Verb::Pause(args) => state::change(&args, &ChangeState::Pause),
        Verb::Resume(args) => state::change(&args, &ChangeState::Resume),
        Verb::Console(args) => attach::attach(&args),
        Verb::Snapshot(args) => snapshot::snapshot(&args),
        Verb::Clone(args) => snapshot::clone(&args),
        Verb::Set(args) => set::set(&args),
        Verb::Rename(args) => state::rename(&args),
        Verb::Delete(args) => state::delete(&args),
        Verb::Wait(args) => state::wait(&args),
        Verb::Monitor(args) => monitor::monitor(&args),
        Verb::File(args) => file::file(&args),
        Verb::PortForward(args) => port_forward::port_forward(&args),
        Verb::Token(args) => token::token(&args),
        // These are no business of the daemon's, or need signals.
        Verb::Run(_) | Verb::Image(_) | Verb::Daemon(_) | Verb::Doctor(_) | Verb::Exec(_) | Verb::Shell(_) => {
            Ok(Ended::Well)
        }
        Verb::Top(_) | Verb::Completions(_) | Verb::Man(_) => Ok(Ended::Well),
    }
}
