//! `purlin run`: a virtual machine in the foreground.

mod args;
mod boot;
mod current;
mod panic;
mod profile;
mod vsock;

use std::{
    fs::File,
    io::Write,
    net::SocketAddr,
    path::Path,
    sync::{Arc, OnceLock},
};

use anyhow::{Result, anyhow};
use purlin_api as api;
use purlin_machine::{MachineError, processor::default_model};
use purlin_vmm::{
    ConsolePort, ConsoleSize, OnIoError, OptionalDevice, Outcome, RunConfig, Running, StartError, Vmm, engines,
    network::nat::Publish,
    setup::{self, Connected},
    storage::Disk,
};

pub use self::args::RunArgs;
use self::{
    args::{Port, Target},
    boot::Boot,
    current::Current,
    panic::Panicked,
    profile::Profiling,
};
use crate::{
    console::{self, LogFile, Output},
    exit::Ended,
    prompt::{Prompt, Watched},
    signals::Signals,
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
    // Before anything long begins.
    let profiling = args.profile.as_deref().map(Profiling::open).transpose()?;
    let mut chosen = engines::choose(setup::engine(hardware.engine))?;
    if let Some(profiling) = &profiling {
        let Some(profiled) = profiling.of(chosen)? else {
            return Ok(Ended::WrongUsage(profile::NOT_OF_KVM.into()));
        };
        chosen = profiled;
    }
    for disk in &args.machine.disk {
        Disk::open(&setup::disk(disk))?;
    }
    let stop = Arc::new(Stop::default());
    let raw_modes = Arc::new(OnceLock::<Modes>::new());
    let current = Arc::new(Current::default());
    watch(signals, &stop, &raw_modes, &current, args.console == Target::Stdio);

    let interactive = args.port_on_stdio().is_some() && terminal::is_interactive();
    // A server flushes its line until somebody is logged in.
    let prompt = (is_image(&args) && !interactive).then(|| Arc::new(Prompt::default()));
    let network = connect_network(&args, &hardware)?;
    let vsock = args.vsock.as_ref().map(vsock::Vsock::open).transpose()?;
    let output = open_output(&args.serial(), "--serial", &stop, prompt.as_ref())?;
    let console = open_console(&args.console, interactive, &stop, prompt.as_ref())?;
    let boot = match Boot::prepare(&args, interactive, &stop) {
        Err(_) if stop.reason().is_some() => return Ok(stopped(&stop)),
        Err(error) if is_wrong_image(&error) => return Ok(Ended::WrongUsage(error.to_string())),
        other => other?,
    };
    let raw = interactive.then(Raw::enter).transpose().map_err(|e| anyhow!("cannot make the terminal raw: {e}"))?;
    if let Some(raw) = &raw {
        let _ = raw_modes.set(raw.modes());
    }
    let config = RunConfig {
        on_io_error: match hardware.on_io_error {
            api::OnIoError::Report => OnIoError::Report,
            api::OnIoError::Pause => current.pause_on_io_error(),
        },
        console,
        vsock,
        ..config(&args, &hardware, &boot, &network, chosen.engine)
    };
    let running = match Vmm::start(config, output) {
        Ok(running) => Arc::new(running),
        Err(error) if is_wrong_usage(&error) => return Ok(Ended::WrongUsage(error.to_string())),
        Err(error) => return Err(error.into()),
    };
    if hardware.engine == api::Engine::Auto {
        terminal::say(&chosen.why);
    }
    say_ssh(&boot, &network);
    current.set(&running);
    if interactive && args.console == Target::Stdio {
        // It may have changed since the console was made.
        running.resize_console(terminal_size());
    }
    let panicked = panic::watch(&running, args.on_panic, &stop);
    connect(&args, &current, &running, &stop, interactive, prompt);
    let outcome = running.wait();
    drop(raw);
    let ended = ended(outcome, &stop, &panicked);
    Ok(match profiling {
        Some(profiling) => profiling.end(ended),
        None => ended,
    })
}

fn watch(
    signals: Signals,
    stop: &Arc<Stop>,
    raw_modes: &Arc<OnceLock<Modes>>,
    current: &Arc<Current>,
    console_on_terminal: bool,
) {
    let (stop, raw_modes) = (stop.clone(), raw_modes.clone());
    let (to_resume, to_resize) = (current.clone(), current.clone());
    let on_end = move |signal| stop.request(Reason::Signal(signal));
    let on_continue = move || {
        raw_modes.get().into_iter().for_each(Modes::again);
        to_resume.go_on();
    };
    let on_resize = move || {
        if console_on_terminal && let Some(running) = to_resize.get() {
            running.resize_console(terminal_size());
        }
    };
    signals.watch(on_end, on_continue, on_resize);
}

fn terminal_size() -> ConsoleSize {
    terminal::size().map_or_else(ConsoleSize::default, |(columns, rows)| ConsoleSize { columns, rows })
}

/// What the guest's console is connected to, if it has one.
fn open_console(
    target: &Target,
    interactive: bool,
    stop: &Arc<Stop>,
    prompt: Option<&Arc<Prompt>>,
) -> Result<Option<Arc<ConsolePort>>> {
    if *target == Target::None {
        return Ok(None);
    }
    let output = open_output(target, "--console", stop, prompt)?;
    let size = if interactive && *target == Target::Stdio { terminal_size() } else { ConsoleSize::default() };
    let port = ConsolePort::new(output, size).map_err(|e| anyhow!("cannot start a thread for --console: {e}"))?;
    Ok(Some(port))
}

/// Where a port's output goes (and with the serial port's debugcon's, which works without a serial port too).
fn open_output(
    target: &Target,
    option: &str,
    stop: &Arc<Stop>,
    prompt: Option<&Arc<Prompt>>,
) -> Result<Box<dyn Write + Send>> {
    let Target::File(path) = target else {
        let output = Output::new(stop.clone());
        return Ok(match prompt {
            Some(prompt) => Box::new(Watched(output, prompt.clone())),
            None => Box::new(output),
        });
    };
    let file = File::create(path).map_err(|e| anyhow!("cannot create {} for {option}: {e}", path.display()))?;
    Ok(Box::new(LogFile::new(file, path.display().to_string())))
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

/// Tells how to reach the guest.
fn say_ssh(boot: &Boot, network: &Connected) {
    let (Some(machine), Some(ssh)) = (&boot.machine, network.ssh) else { return };
    terminal::say(&format!("the guest's ssh: {}", ssh_command(machine.identity.as_deref(), ssh)));
}

/// A command that works in each run: the guest makes its host keys anew, and the port is often that of the run before,
/// so ssh is not to remember or compare them. There is nothing to compare: a port of this host's own that leads to a
/// machine of one run.
fn ssh_command(identity: Option<&Path>, address: SocketAddr) -> String {
    let identity = identity.map(|path| format!(" -i {}", path.display())).unwrap_or_default();
    let options = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null";
    format!("ssh{identity} {options} -p {} root@{}", address.port(), address.ip())
}

/// The hardware: an image is a server to be reached, and larger than a kernel of the user's.
fn hardware(args: &RunArgs) -> api::Machine {
    if is_image(args) {
        args.machine.hardware(api::Machine::MEMORY, api::Network::default())
    } else {
        args.machine.hardware(api::Machine::MEMORY / 2, api::Network::None)
    }
}

fn connect_network(args: &RunArgs, hardware: &api::Machine) -> Result<Connected> {
    let publish = hardware.publish.iter().map(|text| text.parse()).collect::<Result<Vec<Publish>, _>>()?;
    let name = boot::guest_name(args)?;
    let guest = setup::Guest { name: &name, mac: setup::random_mac(), cpus: hardware.cpus(), ssh: is_image(args) };
    let network = setup::connect(&hardware.network, &publish, &guest)?;
    network.wait_until_ready()?;
    Ok(network)
}

fn config(
    args: &RunArgs,
    hardware: &api::Machine,
    boot: &Boot,
    network: &Connected,
    engine: Arc<dyn purlin_engine::Engine>,
) -> RunConfig {
    let disks = hardware.disks.iter().map(setup::disk);
    RunConfig {
        kernel: boot.kernel.clone(),
        initrds: boot.initrds.clone(),
        cmdline: boot.cmdline.clone(),
        memory: hardware.memory(),
        cpus: hardware.cpus(),
        engine,
        cpu_model: hardware.cpu.map_or_else(default_model, setup::cpu_model),
        serial: args.serial() != Target::None,
        devices: devices(hardware, boot),
        disks: boot.disks.iter().cloned().chain(disks).collect(),
        networks: network.networks.clone(),
        console: None,
        on_io_error: OnIoError::default(),
        vsock: None,
        balloon: hardware.balloon.map(setup::balloon),
        no_reboot: args.no_reboot,
    }
}

/// A server wants randomness before it has had time to gather any.
fn devices(hardware: &api::Machine, boot: &Boot) -> Vec<OptionalDevice> {
    let of_image = boot.machine.is_some().then_some(OptionalDevice::Rng);
    hardware.devices.iter().copied().map(setup::device).chain(of_image).collect()
}

/// Whether there is no such image, or none that could be as the command line wants it.
fn is_wrong_image(error: &anyhow::Error) -> bool {
    use purlin_images::Error::{DiskSize, Name, NoImage, UnknownBuild};
    matches!(error.downcast_ref(), Some(Name(_) | NoImage(_) | UnknownBuild(_) | DiskSize { .. }))
}

/// Whether no machine could be as the command line wants it.
fn is_wrong_usage(error: &StartError) -> bool {
    use MachineError::{
        BalloonTooLarge, CpuCount, CpuModel, MemoryTooLarge, MemoryTooSmall, MemoryUnaligned, TooManyDisks,
    };
    let StartError::Machine(error) = error else { return false };
    matches!(
        error,
        TooManyDisks { .. }
            | BalloonTooLarge { .. }
            | MemoryTooSmall { .. }
            | MemoryUnaligned { .. }
            | MemoryTooLarge { .. }
            | CpuCount { .. }
            | CpuModel { .. }
    )
}

/// Connects the running machine with what can stop it and with standard input.
fn connect(
    args: &RunArgs,
    current: &Arc<Current>,
    running: &Arc<Running>,
    stop: &Arc<Stop>,
    interactive: bool,
    prompt: Option<Arc<Prompt>>,
) {
    let machine = running.clone();
    stop.on_request(move || machine.stop());
    let input = match args.port_on_stdio() {
        Some(Port::Serial) => running.serial_input(),
        Some(Port::Console) => running.console_input(),
        None => return,
    };
    if interactive {
        let current = current.clone();
        console::pass_terminal(input, stop.clone(), move || current.go_on());
    } else {
        console::pass_pipe(input, prompt);
    }
}

fn ended(outcome: Outcome, stop: &Stop, panicked: &Panicked) -> Ended {
    match outcome {
        // A kernel that resets after its panic (panic=1 on its command line), with --no-reboot.
        Outcome::Reset if panicked.has_happened() => Ended::Crashed(PANICKED.into()),
        Outcome::PowerOff | Outcome::Reset => Ended::Well,
        Outcome::Exit(status) => Ended::WithStatus(status),
        Outcome::Quit => stopped(stop),
        crashed @ Outcome::Crashed { .. } => Ended::Crashed(crashed.to_string()),
    }
}

const PANICKED: &str = "the guest's kernel panicked; its console shows why";

/// How a run ends that was asked to.
fn stopped(stop: &Stop) -> Ended {
    match stop.reason() {
        Some(Reason::Signal(signal)) => Ended::Signalled(*signal),
        Some(Reason::OutputLost(error)) => {
            Ended::Failed(anyhow!("standard output is lost ({error}): the guest was stopped"))
        }
        Some(Reason::GuestPanicked) => Ended::Crashed(PANICKED.into()),
        Some(Reason::Quit) | None => Ended::Well,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ssh_command_does_not_remember_host_keys() {
        let address = "127.0.0.1:2222".parse().unwrap();
        let options = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -p 2222 root@127.0.0.1";
        assert_eq!(ssh_command(None, address), format!("ssh {options}"));
        assert_eq!(ssh_command(Some(Path::new("/k")), address), format!("ssh -i /k {options}"));
    }
}
