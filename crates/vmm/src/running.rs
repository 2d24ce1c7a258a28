//! A run, as whoever started it holds it.

use std::{
    io::Write,
    sync::{
        Arc, Condvar, Mutex, PoisonError, Weak,
        mpsc::{self, Receiver, Sender},
    },
    thread::{self, JoinHandle},
};

use purlin_arch::x86_64::state::VcpuState;
use purlin_engine::{Vcpu, memory::GuestRam};
use purlin_machine::{
    Machine, MachineError, SerialInput,
    config::{BalloonHandle, BootConfig, MachineConfig, MachineType, SavedConfig},
};
use purlin_state::{Saved, SavedState};
use purlin_storage::{Disk, OpenError};

use crate::{
    config::{Outcome, RunConfig},
    lifecycle::{Control, LifecycleError, Message, StartError, Supervisor},
    vcpu::VcpuThread,
};

/// Starts runs.
pub struct Vmm;

impl Vmm {
    /// Makes the machine, loads the kernel and starts it. What the guest writes to its serial port goes to
    /// `serial_out`.
    pub fn start(config: RunConfig, serial_out: Box<dyn Write + Send>) -> Result<Running, StartError> {
        let boot = BootConfig::open(&config.kernel, &config.initrds, &config.cmdline)?;
        let machine_config = MachineConfig {
            machine_type: MachineType::Pc1,
            memory: config.memory,
            cpus: config.cpus,
            cpu_model: config.cpu_model,
            serial: config.serial,
            devices: config.devices.iter().copied().collect(),
            disks: open_disks(&config)?,
            networks: config.networks.clone(),
            vsock: config.vsock.clone(),
            balloon: config.balloon,
            boot,
        };
        let (machine, vcpus) = Machine::new(machine_config, &*config.engine, serial_out)?;
        let states = machine.reset()?;
        Running::start(machine, vcpus, states, &config, false)
    }

    /// Makes the machine that was saved, paused where it was; [`Running::resume`] lets it go on. `load_memory` fills
    /// its memory. The hardware is that of the saved state; `config` says which engine, and what the next reset boots.
    pub fn restore(
        config: RunConfig,
        saved: &SavedState,
        load_memory: impl FnOnce(&GuestRam) -> Result<(), MachineError>,
        serial_out: Box<dyn Write + Send>,
    ) -> Result<Running, StartError> {
        let boot = BootConfig::open(&config.kernel, &config.initrds, &config.cmdline)?;
        let hardware: SavedConfig = saved.decode(SavedConfig::NAME).map_err(MachineError::from)?;
        let (disks, networks) = (open_disks(&config)?, config.networks.clone());
        let machine_config = hardware.config(config.cpu_model, disks, networks, config.vsock.clone(), boot)?;
        let (machine, vcpus, states) = Machine::restore(machine_config, saved, &*config.engine, serial_out)?;
        load_memory(machine.ram())?;
        Running::start(machine, vcpus, states, &config, true)
    }
}

/// Opens the disks; as the kernel's file, before anything else is made.
fn open_disks(config: &RunConfig) -> Result<Vec<Arc<Disk>>, OpenError> {
    config.disks.iter().map(Disk::open).collect()
}

/// A run under way (or over). Dropping it ends it.
pub struct Running {
    machine: Weak<Machine>,
    input: SerialInput,
    balloon: Option<BalloonHandle>,
    control: Sender<Message>,
    end: Arc<End>,
    supervisor: Option<JoinHandle<()>>,
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
        paused: bool,
    ) -> Result<Self, StartError> {
        let machine = Arc::new(machine);
        let (control, inbox) = mpsc::channel();
        let threads = (0..).zip(vcpus).map(|(index, vcpu)| {
            VcpuThread::start(index, vcpu, machine.clone(), control.clone()).map_err(StartError::Thread)
        });
        let threads = threads.collect::<Result<Vec<_>, _>>()?;
        let (weak, input, balloon) = (Arc::downgrade(&machine), machine.serial_input(), machine.balloon().cloned());
        let supervisor = Supervisor::new(machine, threads, config.no_reboot, inbox);
        let end = Arc::new(End::default());
        let thread = thread::Builder::new().name("supervisor".into()).spawn({
            let ending = Ending(end.clone());
            move || {
                // When this returns the machine is gone: all of the guest's output is written, its memory freed.
                let outcome = supervisor.run(states, paused);
                ending.0.set(outcome);
            }
        });
        let supervisor = Some(thread.map_err(StartError::Thread)?);
        Ok(Self { machine: weak, input, balloon, control, end, supervisor })
    }

    /// Where input for the guest's serial port goes.
    pub fn serial_input(&self) -> SerialInput {
        self.input.clone()
    }

    /// What steers the guest's memory balloon, if it has one.
    pub fn balloon(&self) -> Option<&BalloonHandle> {
        self.balloon.as_ref()
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

    /// The state of a paused machine, without its memory.
    pub fn save(&self) -> Result<SavedState, LifecycleError> {
        self.ask(Control::Save)?
    }

    /// Presses the power button of a running machine: a guest that listens shuts down and powers off.
    pub fn press_power_button(&self) -> Result<(), LifecycleError> {
        self.ask(Control::PressPowerButton)?
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
