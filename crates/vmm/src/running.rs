//! A run, as whoever started it holds it.

use std::{
    io::Write,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, Receiver, Sender},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use purlin_arch::x86_64::state::VcpuState;
use purlin_engine::{
    Kick, SavedCode, Vcpu,
    memory::{self, GuestRam, Layer},
};
use purlin_machine::{
    GuestEvent, GuestInput, InputPort, Machine, MachineError,
    config::{
        self as machine, BalloonHandle, BootConfig, ConsoleSize, HostSide, MachineConfig, MachineType, SavedConfig,
    },
};
use purlin_snapshot::Parent;
use purlin_state::{Saved, SavedState};
use purlin_storage::{Disk, OpenError};

use crate::{
    config::{OnIoError, Outcome, RunConfig},
    lifecycle::{Control, LifecycleError, Message, StartError, Supervisor},
    vcpu::{Gate, VcpuThread},
};

/// Starts runs.
pub struct Vmm;

impl Vmm {
    /// Makes the machine, loads the kernel and starts it. What the guest writes to its serial port goes to
    /// `serial_out`.
    pub fn start(config: RunConfig, serial_out: Box<dyn Write + Send>) -> Result<Running, StartError> {
        let files = Files::open(&config)?;
        Self::start_with(config, files, serial_out)
    }

    /// The same with files that are open already: the process need not be able to open any.
    pub fn start_with(
        config: RunConfig,
        files: Files,
        serial_out: Box<dyn Write + Send>,
    ) -> Result<Running, StartError> {
        let Files { boot, disks } = files;
        let inbox = mpsc::channel();
        let machine_config = MachineConfig {
            machine_type: MachineType::Pc1,
            memory: config.memory,
            cpus: config.cpus,
            cpu_model: config.cpu_model,
            serial: config.serial,
            devices: config.devices.iter().copied().collect(),
            disks,
            networks: config.networks.clone(),
            console: config.console.clone(),
            on_io_error: on_io_error(&config, &inbox.0),
            vsock: config.vsock.clone(),
            balloon: config.balloon,
            boot,
        };
        let (machine, vcpus) = Machine::new(machine_config, &*config.engine, serial_out)?;
        let states = machine.reset()?;
        Running::start(machine, vcpus, states, &config, inbox, false)
    }

    /// Makes the machine that was saved, paused where it was; [`Running::resume`] lets it go on. `load_memory` fills
    /// its memory. The hardware is that of the saved state; `config` says which engine, and what the next reset boots.
    pub fn restore(
        config: RunConfig,
        saved: &SavedState,
        load_memory: impl FnOnce(&GuestRam) -> Result<(), MachineError>,
        serial_out: Box<dyn Write + Send>,
    ) -> Result<Running, StartError> {
        Self::go_on(config, saved, None, None, load_memory, serial_out)
    }

    /// The same with the memory of these layers, one for each slot, which it shares with whoever has them too; and with
    /// `code`, from the same moment, if there is some ([`Frozen::saved_code`](crate::Frozen::saved_code)).
    pub fn restore_from(
        config: RunConfig,
        saved: &SavedState,
        memory: &[Layer],
        code: Option<&SavedCode>,
        serial_out: Box<dyn Write + Send>,
    ) -> Result<Running, StartError> {
        let memory = memory::from_layers(memory).map_err(MachineError::from)?;
        Self::go_on(config, saved, Some(memory), code, |_| Ok(()), serial_out)
    }

    fn go_on(
        config: RunConfig,
        saved: &SavedState,
        memory: Option<GuestRam>,
        code: Option<&SavedCode>,
        load_memory: impl FnOnce(&GuestRam) -> Result<(), MachineError>,
        serial_out: Box<dyn Write + Send>,
    ) -> Result<Running, StartError> {
        let boot = BootConfig::open(&config.kernel, &config.initrds, &config.cmdline)?;
        let hardware: SavedConfig = saved.decode(SavedConfig::NAME).map_err(MachineError::from)?;
        let inbox = mpsc::channel();
        let host = HostSide {
            disks: open_disks(&config)?,
            networks: config.networks.clone(),
            console: config.console.clone(),
            vsock: config.vsock.clone(),
            on_io_error: on_io_error(&config, &inbox.0),
        };
        let machine_config = hardware.config(config.cpu_model, host, boot)?;
        let (machine, vcpus, states) = Machine::restore(machine_config, memory, saved, &*config.engine, serial_out)?;
        load_memory(machine.ram())?;
        if let Some(code) = code {
            machine.restore_code(code);
        }
        Running::start(machine, vcpus, states, &config, inbox, true)
    }
}

/// What the disks are to do: where the machine is to be paused, they ask its supervisor, which waits for them to be held.
fn on_io_error(config: &RunConfig, supervisor: &Sender<Message>) -> machine::OnIoError {
    let OnIoError::Pause(tell) = &config.on_io_error else { return machine::OnIoError::Report };
    let (tell, supervisor) = (tell.clone(), supervisor.clone());
    machine::OnIoError::Wait(Arc::new(move |path, error| {
        // Nobody waits for the answer; if nobody listens the run is over.
        let _ = supervisor.send(Message::Control(Control::Pause(mpsc::channel().0)));
        tell(path, error);
    }))
}

/// The files of a machine, open: its disks are locked.
pub struct Files {
    boot: BootConfig,
    disks: Vec<Arc<Disk>>,
}

impl Files {
    /// Opens what `config` names.
    pub fn open(config: &RunConfig) -> Result<Self, StartError> {
        let boot = BootConfig::open(&config.kernel, &config.initrds, &config.cmdline)?;
        Ok(Self { boot, disks: open_disks(config)? })
    }
}

/// Opens the disks; as the kernel's file, before anything else is made.
fn open_disks(config: &RunConfig) -> Result<Vec<Arc<Disk>>, OpenError> {
    config.disks.iter().map(Disk::open).collect()
}

/// A run under way (or over). Dropping it ends it.
pub struct Running {
    machine: Weak<Machine>,
    serial: GuestInput,
    console: GuestInput,
    balloon: Option<BalloonHandle>,
    control: Sender<Message>,
    is_paused: Arc<AtomicBool>,
    end: Arc<End>,
    supervisor: Option<JoinHandle<()>>,
    /// The snapshot that the next one can stand on.
    last_snapshot: Mutex<Option<Parent>>,
    brake: Brake,
}

/// Stops the vCPUs of a machine for a while, and lets them go on, without its being paused.
#[derive(Clone)]
pub struct Brake {
    gate: Arc<Gate>,
    kicks: Vec<Weak<dyn Kick>>,
}

impl Brake {
    /// Stops them, soon.
    pub fn stop(&self) {
        self.gate.set_closed(true);
        self.kicks.iter().filter_map(Weak::upgrade).for_each(|kick| kick.kick());
    }

    /// Lets them go on.
    pub fn release(&self) {
        self.gate.set_closed(false);
    }
}

/// What a guest has of memory, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestMemory {
    /// All that the machine has.
    pub most: u64,
    /// What the guest is to make do with.
    pub wanted: u64,
    /// What it has, by what it says that it has given back: never believe it more than that.
    pub now: u64,
}

/// How the run ended, once it has.
#[derive(Default)]
struct End {
    outcome: Mutex<Option<Outcome>>,
    known: Condvar,
}

impl End {
    /// Tells everybody who waits; the first outcome counts.
    fn set(&self, outcome: Outcome) {
        self.outcome.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(outcome);
        self.known.notify_all();
    }
}

/// Makes the end of the supervisor known to everybody who waits, be it by a panic.
struct Ending(Arc<End>);

impl Drop for Ending {
    fn drop(&mut self) {
        let message = "the supervisor panicked; this is a defect of purlin".into();
        self.0.set(Outcome::Crashed { vcpu: 0, rip: 0, message });
    }
}

impl Running {
    fn start(
        machine: Machine,
        vcpus: Vec<Box<dyn Vcpu>>,
        states: Vec<VcpuState>,
        config: &RunConfig,
        (control, inbox): (Sender<Message>, Receiver<Message>),
        paused: bool,
    ) -> Result<Self, StartError> {
        // For freezes, in case a sandbox closes /proc. Without it they say so.
        let _ = memory::prepare();
        let (machine, gate) = (Arc::new(machine), Arc::new(Gate::default()));
        let threads = (0..).zip(vcpus).map(|(index, vcpu)| {
            VcpuThread::start(index, vcpu, machine.clone(), gate.clone(), control.clone()).map_err(StartError::Thread)
        });
        let threads = threads.collect::<Result<Vec<_>, _>>()?;
        let brake = Brake { gate, kicks: threads.iter().map(VcpuThread::kicker).collect() };
        let (weak, balloon) = (Arc::downgrade(&machine), machine.balloon().cloned());
        let [serial, console] = [InputPort::Serial, InputPort::Console].map(|port| machine.input(port));
        let supervisor = Supervisor::new(machine, threads, config.no_reboot, inbox);
        let (is_paused, end) = (supervisor.is_paused(), Arc::new(End::default()));
        let thread = thread::Builder::new().name("supervisor".into()).spawn({
            let ending = Ending(end.clone());
            move || {
                // It has no role: a freeze opens overlays and makes files of memory on this thread.
                // When this returns the machine is gone: all of the guest's output is written, its memory freed.
                let outcome = supervisor.run(states, paused);
                ending.0.set(outcome);
            }
        });
        let supervisor = Some(thread.map_err(StartError::Thread)?);
        let last_snapshot = Mutex::default();
        Ok(Self { machine: weak, serial, console, balloon, control, is_paused, end, supervisor, last_snapshot, brake })
    }

    /// Where input for the guest's serial port goes.
    pub fn serial_input(&self) -> GuestInput {
        self.serial.clone()
    }

    /// Where input for the guest's console (virtio-console) goes.
    pub fn console_input(&self) -> GuestInput {
        self.console.clone()
    }

    /// The terminal at the guest's console (virtio-console) has another size; the guest learns of it while it runs.
    pub fn resize_console(&self, size: ConsoleSize) {
        if let Some(machine) = self.machine.upgrade() {
            machine.resize_console(size);
        }
    }

    /// What steers the guest's memory balloon, if it has one.
    pub fn balloon(&self) -> Option<&BalloonHandle> {
        self.balloon.as_ref()
    }

    /// What the guest has of memory; nothing of a run that is over.
    pub fn guest_memory(&self) -> Option<GuestMemory> {
        let most = self.machine().ok()?.memory();
        let left = |given_back: u64| most.saturating_sub(given_back);
        let balloon = self.balloon.as_ref();
        let (wanted, now) = balloon.map_or((most, most), |b| (left(b.target()), left(b.actual())));
        Some(GuestMemory { most, wanted, now })
    }

    /// Asks the guest to make do with this much memory, by its balloon, if it has one. It cannot have more than all.
    pub fn set_guest_memory(&self, bytes: u64) {
        if let (Some(balloon), Ok(machine)) = (&self.balloon, self.machine()) {
            balloon.set_target(machine.memory().saturating_sub(bytes));
        }
    }

    /// The machine's memory; to be read or written only while it is paused.
    pub fn memory(&self) -> Result<Arc<GuestRam>, LifecycleError> {
        self.machine.upgrade().map(|machine| machine.ram().clone()).ok_or(LifecycleError::Stopped)
    }

    /// Stops the vCPUs and clocks. When this returns all of them stand still.
    pub fn pause(&self) -> Result<(), LifecycleError> {
        self.ask(Control::Pause)
    }

    /// Lets a paused machine go on.
    pub fn resume(&self) -> Result<(), LifecycleError> {
        self.ask(Control::Resume)
    }

    /// The images of its disks, as they are now: a freeze changes them.
    pub fn disk_paths(&self) -> Vec<std::path::PathBuf> {
        self.machine().map(|machine| machine.disks().iter().map(|disk| disk.path()).collect()).unwrap_or_default()
    }

    /// What stops its vCPUs where they use too much of the host's time.
    pub fn brake(&self) -> Brake {
        self.brake.clone()
    }

    /// Whether the machine is paused, by whomever.
    pub fn is_paused(&self) -> bool {
        self.is_paused.load(Ordering::SeqCst)
    }

    /// The state of a paused machine, without its memory.
    pub fn save(&self) -> Result<SavedState, LifecycleError> {
        self.ask(Control::Save)?
    }

    /// Presses the power button of a running machine: a guest that listens shuts down and powers off.
    pub fn press_power_button(&self) -> Result<(), LifecycleError> {
        self.ask(Control::PressPowerButton)?
    }

    /// The machine is a copy from here on, not the one whose state it goes on from: its generation ID (VMGenID) is a new
    /// one, and the guest, told of it as soon as it runs, makes new randomness. A machine that was moved stays the same.
    pub fn renew_generation(&self) -> Result<(), LifecycleError> {
        Ok(self.ask(Control::RenewGeneration)??)
    }

    /// Says who is to hear what the guest says has happened to it; of what came before there was anybody, at once.
    /// `listener` is called on the thread of a vCPU, and must not wait for anything.
    pub fn on_guest_event(&self, listener: impl Fn(GuestEvent) + Send + 'static) {
        if let Some(machine) = self.machine.upgrade() {
            machine.listen(Box::new(listener));
        }
    }

    /// Ends the run; [`Running::wait`] then gives [`Outcome::Quit`].
    pub fn stop(&self) {
        // If nobody listens the run is over already.
        let _ = self.control.send(Message::Control(Control::Stop));
    }

    /// Waits for the end of the run. By then all that the guest has written is written.
    pub fn wait(&self) -> Outcome {
        let outcome = self.end.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        let outcome = self.end.known.wait_while(outcome, |o| o.is_none()).unwrap_or_else(PoisonError::into_inner);
        outcome.clone().unwrap_or(Outcome::Quit)
    }

    /// Whether the run is over: [`Running::wait`] returns at once.
    pub fn has_ended(&self) -> bool {
        self.end.outcome.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Has `work` done while the machine stands still. Returns what comes of it, and for how long it stood; one that was
    /// paused stays so.
    pub(crate) fn while_still<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Machine, SavedState) -> T + Send + 'static,
    ) -> Result<(T, Duration), LifecycleError> {
        let (sender, result) = mpsc::channel();
        let work = Box::new(move |machine: &Machine, state| {
            // Nobody waits any more where the run has ended.
            let _ = sender.send(work(machine, state));
        });
        let stood = self.ask(|done| Control::WhileStill(work, done))?;
        Ok((result.recv().map_err(|_| LifecycleError::Stopped)?, stood))
    }

    pub(crate) fn last_snapshot(&self) -> MutexGuard<'_, Option<Parent>> {
        self.last_snapshot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn machine(&self) -> Result<Arc<Machine>, LifecycleError> {
        self.machine.upgrade().ok_or(LifecycleError::Stopped)
    }

    fn ask<T>(&self, control: impl FnOnce(Sender<T>) -> Control) -> Result<T, LifecycleError> {
        let (sender, answer): (_, Receiver<T>) = mpsc::channel();
        self.control.send(Message::Control(control(sender))).map_err(|_| LifecycleError::Stopped)?;
        answer.recv().map_err(|_| LifecycleError::Stopped)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop();
        if let Some(supervisor) = self.supervisor.take() {
            let _ = supervisor.join();
        }
    }
}
