//! From a machine's directory to a machine that runs.

use std::{
    env, fs,
    io::Write,
    os::{fd::OwnedFd, unix::net::UnixListener},
    path::Path,
    sync::Arc,
};

use purlin_api::{ErrorBody, Reason, vm};
use purlin_engine::Engine;
use purlin_network::nat::Publish;
use purlin_shares::throttle::Governor;
use rustix::{
    fs::{FlockOperation, Mode, OFlags, flock, open},
    io::Errno,
};

use super::{
    console::Console,
    control::About,
    freezer::{self, Freezer, Given},
    now, sandbox, shares,
};
use crate::{
    BalloonConfig, OnIoError, OptionalDevice, Pages, RunConfig, Running, Vmm, engines, setup,
    setup::{Connected, Guest},
    vsock::{HostSocket, VsockConfig},
};

/// The guest's context ID: each VM has a vsock of its own, so they need not differ.
const CID: u32 = 3;

/// The balloon of a machine that was not given one: through it the guest can be told while it runs to make do with less
/// memory. What it has given back by that it cannot take back, as little as memory that was never there.
const BALLOON: BalloonConfig = BalloonConfig { size: 0, deflate_on_oom: false, free_page_reporting: false };

/// A machine that runs, and what belongs to it.
pub struct Started {
    /// It.
    pub running: Running,
    /// Its serial port.
    pub console: Arc<Console>,
    /// The control socket.
    pub control: UnixListener,
    /// What clones can be made of.
    pub freezer: Arc<Freezer>,
    /// What keeps its cap, if the process does that itself.
    pub governor: Option<Arc<Governor>>,
    /// Its network lives as long as this.
    pub network: Connected,
    /// What it says of itself.
    pub about: About,
}

/// Something that the host could not do, or the machine cannot be.
pub fn failed(message: impl std::fmt::Display) -> ErrorBody {
    ErrorBody::new(Reason::Failed, message)
}

/// Takes the lock on the machine in `dir`, which is the working directory from then on: paths of sockets stay short.
pub fn enter(dir: &Path) -> Result<OwnedFd, ErrorBody> {
    // The terminal of whoever started the daemon, and what is typed there, is no business of the machine's.
    let _ = rustix::process::setsid();
    env::set_current_dir(dir).map_err(|e| failed(format!("cannot enter {}: {e}", dir.display())))?;
    lock(&vm::lock_of(dir))
}

/// Starts the machine in `dir`, the working directory. Called while the process has one thread, this returns in a child
/// where the host has PID namespaces: what is before the sandbox is what a VM's process must not be able to do.
pub fn start(dir: &Path) -> Result<Started, ErrorBody> {
    let spec = read_spec(dir)?;
    let _ = fs::remove_file(vm::END);
    let how = shares::enter(dir, &spec.machine)?;
    // The NAT starts beside what follows.
    let publish = spec.machine.publish.iter().map(|p| p.parse::<Publish>()).collect::<Result<Vec<_>, _>>();
    let publish = publish.map_err(|e| ErrorBody::new(Reason::BadRequest, e))?;
    let guest = Guest { name: &spec.name, mac: spec.mac, cpus: spec.machine.cpus(), ssh: spec.ssh };
    let network = setup::connect(&spec.machine.network, &publish, &guest).map_err(failed)?;
    let vsock = HostSocket::bind(Path::new(vm::VSOCK)).map_err(failed)?;
    let given = match &spec.origin {
        vm::Origin::Clone { socket, freeze } => Some(freezer::fetch(socket, freeze)?),
        vm::Origin::Boot | vm::Origin::Snapshot { .. } => None,
    };
    let chosen = match &given {
        // A clone goes on as what it is a copy of does, and what was found out of the host is true still.
        Some(Given { engine: (name, tsc_khz), .. }) => engines::again(name, *tsc_khz),
        None => engines::choose(setup::engine(spec.machine.engine)),
    };
    let chosen = chosen.map_err(failed)?;

    let report = sandbox::enter(dir, &spec)?;
    // From here on only what the plan names is there, and threads can be started.
    network.wait_until_ready().map_err(failed)?;
    let control = listen()?;
    let log = Path::new(vm::CONSOLE_LOG);
    let console = Arc::new(Console::open(log).map_err(|e| failed(format!("{}: {e}", log.display())))?);
    let about = About {
        started: now(),
        engine: chosen.why.trim_start_matches("engine: ").to_owned(),
        shares: how.to_string(),
        sandbox_lacks: report.missing.iter().map(ToString::to_string).collect(),
        ssh: network.ssh,
        published: published(&publish, &network),
    };
    let config = RunConfig {
        networks: network.networks.clone(),
        vsock: Some(VsockConfig { guest_cid: CID, socket: Arc::new(vsock) }),
        ..config(&spec, chosen.engine.clone())
    };
    let running = begin(config, &spec.origin, given, Box::new(console.writer()))?;
    crate::sandbox::seal().map_err(failed)?;
    console.connect(running.serial_input());
    let governor = shares::govern(&running, &spec.machine, how)?;
    let freezer = Freezer::open(chosen.engine).map_err(|e| failed(format!("cannot listen at {}: {e}", vm::FROZEN)))?;
    Ok(Started { running, console, control, freezer, governor, network, about })
}

/// Begins the run; one that goes on from somewhere is a copy of what was there, and is told so.
fn begin(
    config: RunConfig,
    origin: &vm::Origin,
    given: Option<Given>,
    output: Box<dyn Write + Send>,
) -> Result<Running, ErrorBody> {
    let running = match (origin, given) {
        (vm::Origin::Snapshot { file }, _) => {
            Vmm::restore_snapshot(config, file, Pages::Mapped, output).map_err(failed)?
        }
        (_, Some(Given { state, memory, code, .. })) => {
            Vmm::restore_from(config, &state, &memory, code.as_ref(), output).map_err(failed)?
        }
        (_, None) => return Vmm::start(config, output).map_err(failed),
    };
    running.renew_generation().and_then(|()| running.resume()).map_err(failed)?;
    Ok(running)
}

/// The ports of the host's that lead to the guest's, for people.
fn published(publish: &[Publish], network: &Connected) -> Vec<String> {
    let ports = publish.iter().zip(&network.published);
    let text = |(p, host): (&Publish, _)| format!("{host}:{}/{}", p.guest_port, p.protocol.to_string().to_lowercase());
    ports.map(text).collect()
}

/// A machine runs once, whoever asks for it.
fn lock(path: &Path) -> Result<OwnedFd, ErrorBody> {
    let cannot = |e: Errno| failed(format!("cannot lock {}: {e}", path.display()));
    let flags = OFlags::CREATE | OFlags::RDWR | OFlags::CLOEXEC;
    let lock = open(path, flags, Mode::RUSR | Mode::WUSR).map_err(cannot)?;
    match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => Err(ErrorBody::new(Reason::Conflict, "the machine runs already")),
        other => other.map_err(cannot).map(|()| lock),
    }
}

fn read_spec(dir: &Path) -> Result<vm::Spec, ErrorBody> {
    let path = vm::spec_of(dir);
    let wrong = |e: &dyn std::fmt::Display| failed(format!("{}: {e}", path.display()));
    let text = fs::read(&path).map_err(|e| wrong(&e))?;
    serde_json::from_slice(&text).map_err(|e| wrong(&e))
}

/// The control socket. One that is there is of a process that was killed: this one has the lock.
fn listen() -> Result<UnixListener, ErrorBody> {
    let _ = fs::remove_file(vm::CONTROL);
    let listen = || {
        let listener = UnixListener::bind(vm::CONTROL)?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    };
    listen().map_err(|e: std::io::Error| failed(format!("cannot listen at {}: {e}", vm::CONTROL)))
}

fn config(spec: &vm::Spec, engine: Arc<dyn Engine>) -> RunConfig {
    let machine = &spec.machine;
    let disks = spec.own_disks.iter().chain(&machine.disks).map(setup::disk).collect();
    let devices = machine.devices.iter().copied().map(setup::device);
    RunConfig {
        kernel: spec.kernel.clone(),
        initrds: spec.initrds.clone(),
        cmdline: spec.cmdline.clone(),
        memory: machine.memory(),
        cpus: machine.cpus(),
        engine,
        cpu_model: machine.cpu.map_or_else(purlin_machine::processor::default_model, setup::cpu_model),
        serial: true,
        // A server wants randomness before it has had time to gather any.
        devices: devices.chain([OptionalDevice::Rng]).collect(),
        disks,
        networks: Vec::new(),
        console: None,
        on_io_error: on_io_error(machine.on_io_error),
        vsock: None,
        balloon: Some(machine.balloon.map_or(BALLOON, setup::balloon)),
        no_reboot: false,
    }
}

fn on_io_error(choice: purlin_api::OnIoError) -> OnIoError {
    match choice {
        purlin_api::OnIoError::Report => OnIoError::Report,
        purlin_api::OnIoError::Pause => OnIoError::Pause(Arc::new(|path, error| {
            tracing::warn!("'{}': {error}: the guest is paused, and nothing is lost", path.display());
        })),
    }
}
