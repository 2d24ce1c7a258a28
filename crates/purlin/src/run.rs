//! `purlin run`: a virtual machine in the foreground.
//!
//! The command has the user's files, signals and terminal. The machine runs in a process of its own, in the sandbox
//! (`inside.rs`), which the command starts, tells what to do, and sees to its end.

mod args;
mod boot;
mod current;
pub mod inside;
mod link;
mod order;
mod panic;
mod process;
mod profile;
mod vsock;

use std::{
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, OnceLock},
    thread,
    time::Instant,
};

use anyhow::{Result, anyhow};
use purlin_api as api;
use purlin_vmm::vsock::HostSocket;
use rustix::{process::Signal as SignalToSend, stdio::stdin};

pub use self::args::RunArgs;
use self::{
    args::Target,
    boot::Boot,
    order::{End, How, Order, Told},
    process::{MachineProcess, Remote},
    profile::Profiling,
};
use crate::{
    console::{self, Command},
    exit::Ended,
    signals::{ONE_REQUEST, Obey, Signal, Signals},
    stop::{Reason, Stop},
    terminal::{self, Modes, Raw},
};

/// Runs the machine until it ends.
pub fn run(args: RunArgs, signals: Signals) -> Result<Ended> {
    if args.guest.is_none() && args.kernel.is_none() {
        return Ok(Ended::WrongUsage(
            "nothing to boot: name an image (debian, or shell), or give --kernel FILE".into(),
        ));
    }
    let hardware = hardware(&args);
    if let Some(wrong) = at_odds(&args, &hardware.network) {
        return Ok(Ended::WrongUsage(wrong.into()));
    }
    // Before any thread is started.
    let signals = signals.with_job_control();
    // Before anything long begins.
    let profiling = args.profile.as_deref().map(Profiling::open).transpose()?;
    let vsock = args.vsock.as_ref().map(vsock::Vsock::open).transpose()?;
    let interactive = args.port_on_stdio().is_some() && terminal::is_interactive();
    let order = order(&args, hardware, interactive, profiling.as_ref())?;
    let started = start(&order, vsock.as_ref());
    let (mut machine, keys) = started.map_err(|e| anyhow!("cannot start the machine's process: {e}"))?;
    let (stop, raw_modes) = (Arc::new(Stop::default()), Arc::new(OnceLock::<Modes>::new()));
    let has_console = interactive && args.console == Target::Stdio;
    watch(signals, &stop, &raw_modes, &machine.remote(), has_console);
    if let Some(end) = machine.opened() {
        return Ok(ended(end.how, &stop));
    }

    let boot = match Boot::prepare(&args, interactive, &stop) {
        Err(_) if stop.reason().is_some() => return Ok(stopped(&stop)),
        Err(error) if is_wrong_image(&error) => return Ok(Ended::WrongUsage(error.to_string())),
        other => other?,
    };
    let raw = interactive.then(Raw::enter).transpose().map_err(|e| anyhow!("cannot make the terminal raw: {e}"))?;
    if let Some(raw) = &raw {
        let _ = raw_modes.set(raw.modes());
    }
    if let Some(keys) = keys {
        pass_keys(keys, &stop, &machine.remote());
    }
    let size = if has_console { terminal::size() } else { None };
    let End { how, in_line, profile } = machine.run(boot.to_order(size));
    terminal::set_in_line(in_line);
    drop(raw);
    let ended = ended(how, &stop);
    Ok(match (profiling, profile, machine.number()) {
        (Some(profiling), Some(profile), Some(process)) => profiling.end(ended, &profile, process),
        _ => ended,
    })
}

/// What the machine's process is to make.
fn order(args: &RunArgs, machine: api::Machine, interactive: bool, profiling: Option<&Profiling>) -> Result<Order> {
    Ok(Order {
        machine,
        name: boot::guest_name(args)?,
        is_image: is_image(args),
        serial: args.serial(),
        console: args.console.clone(),
        input: args.port_on_stdio(),
        interactive,
        cid: args.vsock.as_ref().map(|vsock| vsock.cid),
        on_panic: args.on_panic,
        no_reboot: args.no_reboot,
        profile: profiling.map(Profiling::form),
        command: std::process::id(),
    })
}

/// Starts the machine's process, and gives what leads to the guest's input where that is what is typed.
fn start(order: &Order, vsock: Option<&HostSocket>) -> io::Result<(MachineProcess, Option<io::PipeWriter>)> {
    let vsock = vsock.map(HostSocket::lend).transpose()?;
    let (input, keys): (OwnedFd, _) = match order.input {
        Some(_) if order.interactive => {
            let (input, keys) = io::pipe()?;
            (input.into(), Some(keys))
        }
        Some(_) => (stdin().try_clone_to_owned()?, None),
        None => (File::open("/dev/null")?.into(), None),
    };
    Ok((MachineProcess::start(order, input.as_fd(), vsock.as_ref())?, keys))
}

fn watch(
    signals: Signals,
    stop: &Arc<Stop>,
    raw_modes: &Arc<OnceLock<Modes>>,
    machine: &Arc<Remote>,
    has_console: bool,
) {
    let to_stop = machine.clone();
    stop.on_request(move || to_stop.tell(&Told::Stop));
    let (stop, raw_modes, machine) = (stop.clone(), raw_modes.clone(), machine.clone());
    signals.obey(Signalled { stop, raw_modes, machine, has_console });
}

/// Who obeys signals for the machine's process, too.
struct Signalled {
    stop: Arc<Stop>,
    raw_modes: Arc<OnceLock<Modes>>,
    machine: Arc<Remote>,
    /// The guest's console has the terminal.
    has_console: bool,
}

impl Obey for Signalled {
    fn end(&self, signal: Signal) {
        self.stop.request(Reason::Signal(signal));
    }

    fn end_at_once(&self) {
        self.machine.end_at_once();
        // The main thread sees that and ends, and removes what the run has made. It need not be waited for long.
        thread::sleep(ONE_REQUEST);
    }

    fn stand_still(&self) {
        self.machine.signal(SignalToSend::STOP);
    }

    fn go_on(&self) {
        self.machine.signal(SignalToSend::CONT);
        self.raw_modes.get().into_iter().for_each(Modes::again);
        self.machine.tell(&Told::GoOn);
    }

    fn resize(&self) {
        if let Some((columns, rows)) = terminal::size().filter(|_| self.has_console) {
            self.machine.tell(&Told::Resize(columns, rows));
        }
    }
}

/// Passes what is typed to the guest; what is typed behind Ctrl-A is not for it.
fn pass_keys(keys: io::PipeWriter, stop: &Arc<Stop>, machine: &Arc<Remote>) {
    let (stop, machine, to_tell) = (stop.clone(), machine.clone(), machine.clone());
    let mut asked: Option<Instant> = None;
    let obey = move |command| match command {
        Command::Quit => match asked {
            // As for signals: it does not end, so it is ended.
            Some(first) if first.elapsed() >= ONE_REQUEST => machine.end_at_once(),
            _ => {
                asked.get_or_insert_with(Instant::now);
                stop.request(Reason::Quit);
            }
        },
        Command::GoOn => machine.tell(&Told::GoOn),
        Command::Help => {}
    };
    console::pass_terminal(keys, obey, move |line| to_tell.tell(&Told::Say(line.into())));
}

/// An image is a server to be reached; a kernel of the user's, or the shell, gets a network only if it is asked for.
fn is_image(args: &RunArgs) -> bool {
    args.guest.as_deref().is_some_and(|guest| guest != boot::SHELL)
}

/// What the command line says that does not go together.
fn at_odds(args: &RunArgs, network: &api::Network) -> Option<&'static str> {
    let machine = &args.machine;
    let of_images = args.hostname.is_some() || machine.user_data.is_some() || machine.disk_size.is_some();
    if of_images && !is_image(args) {
        return Some(
            "--hostname, --user-data and --disk-size are for images: name one, such as debian, or leave them out",
        );
    }
    if args.serial == Some(Target::Stdio) && args.console == Target::Stdio {
        return Some("--serial and --console cannot both have stdio: give one of them file:PATH or none");
    }
    if args.profile.is_some() && machine.engine == api::Engine::Kvm {
        return Some(profile::NOT_OF_KVM);
    }
    if !machine.publish.is_empty() && !matches!(network, api::Network::User { .. }) {
        return Some("--publish leads through the user network: add --net user, or leave --publish out");
    }
    None
}

/// The hardware: an image is a server to be reached, and larger than a kernel of the user's.
fn hardware(args: &RunArgs) -> api::Machine {
    if is_image(args) {
        args.machine.hardware(api::Machine::MEMORY, api::Network::default())
    } else {
        args.machine.hardware(api::Machine::MEMORY / 2, api::Network::None)
    }
}

/// Whether there is no such image, or none that could be as the command line wants it.
fn is_wrong_image(error: &anyhow::Error) -> bool {
    use purlin_images::Error::{DiskSize, Name, NoImage, UnknownBuild};
    matches!(error.downcast_ref(), Some(Name(_) | NoImage(_) | UnknownBuild(_) | DiskSize { .. }))
}

fn ended(how: How, stop: &Stop) -> Ended {
    match how {
        How::Well => Ended::Well,
        How::Stopped => stopped(stop),
        // Whether the thread that receives signals has had its turn or not.
        How::Signalled(signal) if stop.reason().is_none() => Ended::Signalled(signal),
        How::Signalled(_) => stopped(stop),
        How::WithStatus(status) => Ended::WithStatus(status),
        How::Failed(why) => Ended::Failed(anyhow!(why)),
        How::WrongUsage(why) => Ended::WrongUsage(why),
        How::Crashed(why) => Ended::Crashed(why),
    }
}

/// How a run ends that was asked to.
fn stopped(stop: &Stop) -> Ended {
    match stop.reason() {
        Some(Reason::Signal(signal)) => Ended::Signalled(*signal),
        _ => Ended::Well,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_counts_that_has_not_been_received_yet() {
        let stop = Stop::default();
        let end = || ended(How::Signalled(Signal::SIGINT), &stop);
        assert!(matches!(end(), Ended::Signalled(Signal::SIGINT)));
        stop.request(Reason::Signal(Signal::SIGTERM));
        assert!(matches!(end(), Ended::Signalled(Signal::SIGTERM)));
    }
}
