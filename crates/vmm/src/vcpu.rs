//! The thread of one vCPU: runs it, and lets go of it between two instructions when it is told to.

use std::{
    sync::{
        Arc, Condvar, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, Receiver, Sender},
    },
    thread::{self, JoinHandle},
};

use purlin_arch::x86_64::state::VcpuState;
use purlin_engine::{EngineError, Exit, Kick, Vcpu};
use purlin_machine::{Machine, Request};
use purlin_sandbox::Role;

use crate::lifecycle::Message;

/// What the thread is told.
enum Command {
    /// Take over this state. Sent while every vCPU is stopped: what another one sends before that would be lost.
    Restore(Box<VcpuState>),
    /// Run.
    Run,
    /// Report the state. Sent while every vCPU is stopped: until then another one may still send interrupts.
    Save,
}

/// What the thread reports.
pub(crate) enum Report {
    /// The vCPU no longer runs.
    Stopped(Reason),
    /// It has taken over a state, or cannot.
    Restored(Result<(), EngineError>),
    /// Its state.
    Saved(Result<Box<VcpuState>, EngineError>),
}

/// Why a vCPU no longer runs.
pub(crate) enum Reason {
    /// It was told to stop.
    Told,
    /// The guest asks something of the machine.
    Request(Request),
    /// A triple fault.
    Shutdown {
        /// Where.
        rip: u64,
    },
    /// The engine failed.
    Failed(EngineError),
    /// The thread ended by a panic: a defect of this program, reported on stderr by then.
    Panicked,
}

/// A vCPU's thread. It ends when this is dropped, which must be while the vCPU is stopped.
pub(crate) struct VcpuThread {
    gate: Arc<Gate>,
    /// `None` while it is being dropped.
    commands: Option<Sender<Command>>,
    thread: Option<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
    kick: Arc<dyn Kick>,
}

impl VcpuThread {
    /// Starts the thread; the vCPU is stopped.
    pub fn start(
        index: u32,
        vcpu: Box<dyn Vcpu>,
        machine: Arc<Machine>,
        gate: Arc<Gate>,
        reports: Sender<Message>,
    ) -> std::io::Result<Self> {
        let (commands, inbox) = mpsc::channel();
        let stop = Arc::new(AtomicBool::new(false));
        let kick = machine.vm().kicker(index);
        let body =
            Body { vcpu, machine, gate: gate.clone(), stop: stop.clone(), reports: Reports { index, to: reports } };
        let thread = thread::Builder::new().name(format!("vcpu{index}")).spawn(move || {
            take_role(Role::Vcpu);
            body.serve(&inbox);
        })?;
        Ok(Self { gate, commands: Some(commands), thread: Some(thread), stop, kick })
    }

    /// Has a stopped vCPU take over a state; [`Report::Restored`] follows.
    pub fn restore(&self, state: Box<VcpuState>) {
        self.send(Command::Restore(state));
    }

    /// Runs.
    pub fn run(&self) {
        self.stop.store(false, Ordering::Release);
        self.send(Command::Run);
    }

    /// Asks the vCPU to stop; [`Report::Stopped`] follows, unless it has stopped already.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.kick.kick();
        self.gate.look_again();
    }

    /// Makes it leave the guest, which it enters again if nobody wants anything. It does not keep the machine.
    pub fn kicker(&self) -> Weak<dyn Kick> {
        Arc::downgrade(&self.kick)
    }

    /// Asks a stopped vCPU for its state; [`Report::Saved`] follows.
    pub fn save(&self) {
        self.send(Command::Save);
    }

    fn send(&self, command: Command) {
        if let Some(commands) = &self.commands {
            // It fails only if the thread has panicked, which has been reported by then.
            let _ = commands.send(command);
        }
    }
}

impl Drop for VcpuThread {
    fn drop(&mut self) {
        self.commands = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Gives the calling thread its role. Outside of a sandbox that is nothing, and inside its filter is known to work: should
/// it not, the process's own filter still holds.
fn take_role(role: Role) {
    if let Err(error) = purlin_sandbox::thread(role) {
        tracing::warn!("a thread has no filter of system calls of its own: {error}");
    }
}

/// Where vCPUs stand that are to use less of the host's time. Closed, it lets none enter its guest; the machine is not
/// paused by that, and can be.
#[derive(Default)]
pub(crate) struct Gate {
    closed: Mutex<bool>,
    changed: Condvar,
}

impl Gate {
    /// Opens or closes it.
    pub fn set_closed(&self, closed: bool) {
        *self.closed.lock().unwrap_or_else(PoisonError::into_inner) = closed;
        self.changed.notify_all();
    }

    /// Waits until it is open, or the vCPU is told to stop.
    fn wait(&self, stop: &AtomicBool) {
        let closed = self.closed.lock().unwrap_or_else(PoisonError::into_inner);
        let wait = |closed: &mut bool| *closed && !stop.load(Ordering::Acquire);
        drop(self.changed.wait_while(closed, wait).unwrap_or_else(PoisonError::into_inner));
    }

    /// A vCPU has been told to stop.
    fn look_again(&self) {
        // Whoever has seen the old value waits by the time the lock is free.
        drop(self.closed.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
    }
}

struct Body {
    vcpu: Box<dyn Vcpu>,
    machine: Arc<Machine>,
    gate: Arc<Gate>,
    stop: Arc<AtomicBool>,
    reports: Reports,
}

impl Body {
    fn serve(mut self, inbox: &Receiver<Command>) {
        while let Ok(command) = inbox.recv() {
            let report = match command {
                Command::Restore(state) => Report::Restored(self.vcpu.restore(&state)),
                Command::Run => Report::Stopped(self.run()),
                Command::Save => Report::Saved(self.vcpu.save().map(Box::new)),
            };
            self.reports.send(report);
        }
    }

    fn run(&mut self) -> Reason {
        loop {
            self.gate.wait(&self.stop);
            if self.stop.load(Ordering::Acquire) {
                return Reason::Told;
            }
            match self.vcpu.run(self.machine.bus()) {
                Ok(Exit::Kicked) => {}
                Ok(Exit::Shutdown { rip }) => return Reason::Shutdown { rip },
                Err(e) => return Reason::Failed(e),
            }
            if let Some(request) = self.machine.request() {
                return Reason::Request(request);
            }
        }
    }
}

/// The way to the supervisor. A panic goes it too, so that nobody waits for this thread in vain.
struct Reports {
    index: u32,
    to: Sender<Message>,
}

impl Reports {
    fn send(&self, report: Report) {
        // Nobody listens only when the run is over.
        let _ = self.to.send(Message::Vcpu(self.index, report));
    }
}

impl Drop for Reports {
    fn drop(&mut self) {
        if thread::panicking() {
            self.send(Report::Stopped(Reason::Panicked));
        }
    }
}
