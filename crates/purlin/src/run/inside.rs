//! The process of the machine, from inside: it opens what its order names, enters the sandbox, and runs the machine there.
//!
//! It is the same program once more, with the socket to the command as its standard input at first. Signals and the
//! terminal's modes are the command's business; what is typed comes by a pipe. It ends when the command does.

use std::{
    fs::File,
    io::{self, Write},
    net::SocketAddr,
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::Path,
    process::{self, ExitCode},
    sync::Arc,
    thread,
};

use anyhow::{Result, anyhow};
use purlin_api as api;
use purlin_machine::{MachineError, processor::default_model};
use purlin_vmm::{
    ConsolePort, ConsoleSize, Files, OnIoError, OptionalDevice, Outcome, RunConfig, Running, StartError, Vmm,
    engines::{self, Chosen},
    network::nat::Publish,
    profile::Profile,
    sandbox,
    setup::{self, Connected},
    storage::Disk,
    vsock::{HostSocket, VsockConfig},
};
use rustix::{
    process::{Signal, set_parent_process_death_signal},
    stdio::{dup2_stdin, stdin},
};

use super::{
    args::{Port, Target},
    current::Current,
    link::{self, Hearer, Teller},
    order::{Boot, End, How, Order, Said, Told},
    panic::{self, Panicked},
    profile::{self, Written},
};
use crate::{
    console::{self, LogFile, Output},
    prompt::{Prompt, Watched},
    signals::Signals,
    stop::{Reason, Stop},
    terminal,
};

/// The hidden verb by which the program becomes a machine's process: it then calls [`main`].
pub const VERB: &str = "__run";

/// Runs the machine that the command at the other end of standard input orders.
pub fn main() -> ExitCode {
    sandbox::close_inherited();
    Signals::leave_to_another();
    let _ = rustix::thread::set_name(c"purlin-vm");
    let Ok((order, vsock, teller, hearer)) = begin() else { return ExitCode::FAILURE };
    let ended = run(&order, vsock, &teller, hearer);
    let end = ended.unwrap_or_else(|how| End { how, in_line: terminal::is_in_line(), profile: None });
    match teller.tell(&Said::Ended(end)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// Hears the order, and makes the guest's input standard input.
fn begin() -> io::Result<(Order, Option<HostSocket>, Teller, Hearer)> {
    let gone = || io::Error::from(io::ErrorKind::UnexpectedEof);
    let stream = UnixStream::from(rustix::io::fcntl_dupfd_cloexec(stdin(), 3)?);
    let mut descriptors = link::receive_descriptors(&stream)?;
    let vsock = descriptors.split_off(1.min(descriptors.len()));
    dup2_stdin(descriptors.first().ok_or_else(gone)?)?;
    let vsock = <[OwnedFd; 2]>::try_from(vsock).ok().map(HostSocket::lent);
    let (teller, mut hearer) = link::open(stream)?;
    Ok((hearer.hear().ok_or_else(gone)?, vsock, teller, hearer))
}

fn run(order: &Order, vsock: Option<HostSocket>, teller: &Teller, mut hearer: Hearer) -> Result<End, How> {
    let stop = Arc::new(Stop::default());
    let opened = Opened::open(order, &stop)?;
    teller.tell(&Said::Opened(opened.network.process()))?;
    let boot = hear_boot(&mut hearer).ok_or(How::Stopped)?;
    let config = config(order, &boot, &opened);
    let files = Files::open(&config).map_err(not_started)?;

    // Nothing is reachable by a name: all of it is open.
    let report = sandbox::enter(&sandbox::plan(sandbox::own_user(&process::id().to_ne_bytes())))?;
    // From here on threads can be started.
    report.missing.iter().for_each(|missing| tracing::info!("{missing}"));
    teller.tell(&Said::Entered(report.pid))?;
    end_with_command(&mut hearer)?;
    let current = Arc::new(Current::default());
    obey(hearer, &stop, &current);
    let Opened { chosen, profile, network, serial, console, prompt } = opened;
    let config = RunConfig {
        on_io_error: match order.machine.on_io_error {
            api::OnIoError::Report => OnIoError::Report,
            api::OnIoError::Pause => current.pause_on_io_error(order.command),
        },
        console: console.map(|output| open_console(output, boot.size)).transpose()?,
        vsock: vsock.zip(order.cid).map(|(s, guest_cid)| VsockConfig { guest_cid, socket: Arc::new(s) }),
        ..config
    };
    let running = Arc::new(Vmm::start_with(config, files, serial).map_err(not_started)?);
    sandbox::seal()?;
    if order.machine.engine == api::Engine::Auto {
        terminal::say(&chosen.why);
    }
    say_ssh(order, &boot, &network);
    current.set(&running);
    let panicked = panic::watch(&running, order.on_panic, &stop);
    connect(order, &running, &stop, prompt);
    let outcome = running.wait();
    let profile = profile.zip(order.profile).map(|(profile, form)| Written::of(&profile, form));
    Ok(End { how: how(outcome, &stop, &panicked), in_line: terminal::is_in_line(), profile })
}

/// What is outside of the sandbox, opened before it is entered.
struct Opened {
    chosen: Chosen,
    profile: Option<Arc<Profile>>,
    network: Connected,
    serial: Box<dyn Write + Send>,
    console: Option<Box<dyn Write + Send>>,
    /// A server flushes its line until somebody is logged in.
    prompt: Option<Arc<Prompt>>,
}

impl Opened {
    /// The user's disks are looked at only: they are opened with the others.
    fn open(order: &Order, stop: &Arc<Stop>) -> Result<Self, How> {
        let profile = order.profile.map(|_| Arc::<Profile>::default());
        let mut chosen = engines::choose(setup::engine(order.machine.engine))?;
        if let Some(profile) = &profile {
            let profiled = chosen.profiled(profile.clone())?;
            chosen = profiled.ok_or_else(|| How::WrongUsage(profile::NOT_OF_KVM.into()))?;
        }
        for disk in &order.machine.disks {
            Disk::open(&setup::disk(disk))?;
        }
        let network = connect_network(order)?;
        let prompt = (order.is_image && !order.interactive).then(|| Arc::new(Prompt::default()));
        let serial = open_output(&order.serial, "--serial", stop, prompt.as_ref())?;
        let console = match &order.console {
            Target::None => None,
            target => Some(open_output(target, "--console", stop, prompt.as_ref())?),
        };
        if order.interactive {
            terminal::is_raw_by_another();
        }
        Ok(Self { chosen, profile, network, serial, console, prompt })
    }
}

fn connect_network(order: &Order) -> Result<Connected> {
    let machine = &order.machine;
    let publish = machine.publish.iter().map(|text| text.parse()).collect::<Result<Vec<Publish>, _>>()?;
    let guest = setup::Guest { name: &order.name, mac: setup::random_mac(), cpus: machine.cpus(), ssh: order.is_image };
    let network = setup::connect(&machine.network, &publish, &guest)?;
    network.wait_until_ready()?;
    Ok(network)
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

/// What is to be booted; `None` if the run is over before.
fn hear_boot(hearer: &mut Hearer) -> Option<Boot> {
    loop {
        match hearer.hear()? {
            Told::Boot(boot) => return Some(boot),
            Told::Stop => return None,
            // There is no machine yet.
            Told::Adopted | Told::GoOn | Told::Resize(..) | Told::Say(_) => {}
        }
    }
}

/// Has the kernel end this process when the command ends, whatever the guest will have made of it. Before it is the
/// command's child that would end it right now: who was its parent is about to exit.
fn end_with_command(hearer: &mut Hearer) -> Result<(), How> {
    loop {
        match hearer.hear().ok_or(How::Stopped)? {
            Told::Adopted => break,
            Told::Stop => return Err(How::Stopped),
            Told::Boot(_) | Told::GoOn | Told::Resize(..) | Told::Say(_) => {}
        }
    }
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // The command may have ended before. No parent's number would tell that: in a PID namespace it is 0.
    if hearer.is_alone() { Err(How::Stopped) } else { Ok(()) }
}

/// Does what the command says, and ends with it.
fn obey(mut hearer: Hearer, stop: &Arc<Stop>, current: &Arc<Current>) {
    let (stop, current) = (stop.clone(), current.clone());
    thread::spawn(move || {
        while let Some(told) = hearer.hear() {
            match told {
                Told::Stop => stop.request(Reason::Quit),
                Told::GoOn => current.go_on(),
                Told::Resize(columns, rows) => current.resize(ConsoleSize { columns, rows }),
                Told::Say(line) => terminal::say(&line),
                // It has been.
                Told::Boot(_) | Told::Adopted => {}
            }
        }
        process::exit(1);
    });
}

fn open_console(output: Box<dyn Write + Send>, size: Option<(u16, u16)>) -> Result<Arc<ConsolePort>> {
    let size = size.map_or_else(ConsoleSize::default, |(columns, rows)| ConsoleSize { columns, rows });
    ConsolePort::new(output, size).map_err(|e| anyhow!("cannot start a thread for --console: {e}"))
}

fn config(order: &Order, boot: &Boot, opened: &Opened) -> RunConfig {
    let machine = &order.machine;
    RunConfig {
        kernel: boot.kernel.clone(),
        initrds: boot.initrds.clone(),
        cmdline: boot.cmdline.clone(),
        memory: machine.memory(),
        cpus: machine.cpus(),
        engine: opened.chosen.engine.clone(),
        cpu_model: machine.cpu.map_or_else(default_model, setup::cpu_model),
        serial: order.serial != Target::None,
        devices: devices(order),
        disks: boot.disks.iter().chain(&machine.disks).map(setup::disk).collect(),
        networks: opened.network.networks.clone(),
        console: None,
        on_io_error: OnIoError::default(),
        vsock: None,
        balloon: machine.balloon.map(setup::balloon),
        no_reboot: order.no_reboot,
    }
}

/// A server wants randomness before it has had time to gather any.
fn devices(order: &Order) -> Vec<OptionalDevice> {
    let of_image = order.is_image.then_some(OptionalDevice::Rng);
    order.machine.devices.iter().copied().map(setup::device).chain(of_image).collect()
}

/// Whether no machine could be as the command line wants it, or this one could not be made.
fn not_started(error: StartError) -> How {
    use MachineError::{
        BalloonTooLarge, CpuCount, CpuModel, MemoryTooLarge, MemoryTooSmall, MemoryUnaligned, TooManyDisks,
    };
    let StartError::Machine(cause) = &error else { return error.into() };
    match cause {
        TooManyDisks { .. }
        | BalloonTooLarge { .. }
        | MemoryTooSmall { .. }
        | MemoryUnaligned { .. }
        | MemoryTooLarge { .. }
        | CpuCount { .. }
        | CpuModel { .. } => How::WrongUsage(error.to_string()),
        _ => error.into(),
    }
}

/// Tells how to reach the guest.
fn say_ssh(order: &Order, boot: &Boot, network: &Connected) {
    if let Some(ssh) = network.ssh.filter(|_| order.is_image) {
        terminal::say(&format!("the guest's ssh: {}", ssh_command(boot.identity.as_deref(), ssh)));
    }
}

/// A command that works in each run: the guest makes its host keys anew, and the port is often that of the run before,
/// so ssh is not to remember or compare them. There is nothing to compare: a port of this host's own that leads to a
/// machine of one run.
fn ssh_command(identity: Option<&Path>, address: SocketAddr) -> String {
    let identity = identity.map(|path| format!(" -i {}", path.display())).unwrap_or_default();
    let options = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null";
    format!("ssh{identity} {options} -p {} root@{}", address.port(), address.ip())
}

/// Connects the running machine with what can stop it and with standard input.
fn connect(order: &Order, running: &Arc<Running>, stop: &Arc<Stop>, prompt: Option<Arc<Prompt>>) {
    let machine = running.clone();
    stop.on_request(move || machine.stop());
    let input = match order.input {
        Some(Port::Serial) => running.serial_input(),
        Some(Port::Console) => running.console_input(),
        None => return,
    };
    console::pass_pipe(input, prompt);
}

const PANICKED: &str = "the guest's kernel panicked; its console shows why";

fn how(outcome: Outcome, stop: &Stop, panicked: &Panicked) -> How {
    match (outcome, stop.reason()) {
        // A kernel that resets after its panic (panic=1 on its command line), with --no-reboot.
        (Outcome::Reset, _) if panicked.has_happened() => How::Crashed(PANICKED.into()),
        (Outcome::PowerOff | Outcome::Reset, _) => How::Well,
        (Outcome::Exit(status), _) => How::WithStatus(status),
        (Outcome::Quit, Some(Reason::OutputLost(error))) => {
            How::Failed(format!("standard output is lost ({error}): the guest was stopped"))
        }
        (Outcome::Quit, Some(Reason::GuestPanicked)) => How::Crashed(PANICKED.into()),
        (Outcome::Quit, _) => How::Stopped,
        (crashed @ Outcome::Crashed { .. }, _) => How::Crashed(crashed.to_string()),
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
