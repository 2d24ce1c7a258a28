//! The lifecycle: one thread, the supervisor, is the only one that starts and stops a machine.
//!
//! ```text
//! created ──► running ◄──► paused
//!                │            │
//!                └──► stopped ◄┘
//! ```
//!
//! *Stopping the machine* (to pause, reset, or end it) goes in this order:
//! 1. the devices' outside is held: no deadline is served, no input is taken, and their threads, with all that they
//!    took from the guest's queues done, leave its memory alone;
//! 2. every vCPU is stopped between two instructions;
//! 3. the clocks stop, and the devices do what was due by then;
//! 4. only now the vCPUs' states are taken: nobody is left who could send an interrupt to one already saved.
//!
//! *Starting it* goes the other way:
//! 1. the clocks run (devices have their state already);
//! 2. each vCPU takes over its state;
//! 3. when all have, and nobody can send an interrupt to one that would forget it, deadlines, input and queues are served;
//! 4. the vCPUs run.
//!
//! A start is the same after a pause, a reset and a restore.

use std::{
    collections::VecDeque,
    ops::ControlFlow,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, Sender},
    },
    time::{Duration, Instant},
};

use purlin_arch::x86_64::state::VcpuState;
use purlin_engine::EngineError;
use purlin_machine::{Machine, MachineError, Request, processor::align_tsc};
use purlin_state::SavedState;
use purlin_storage::OpenError;

use crate::{
    config::Outcome,
    vcpu::{Reason, Report, VcpuThread},
};

/// What reaches the supervisor.
pub(crate) enum Message {
    /// From a vCPU's thread.
    Vcpu(u32, Report),
    /// From whoever holds the run.
    Control(Control),
}

/// What can be asked of a run. Each answer is sent when it is done.
pub(crate) enum Control {
    Pause(Sender<()>),
    Resume(Sender<()>),
    Save(Sender<Result<SavedState, LifecycleError>>),
    PressPowerButton(Sender<Result<(), LifecycleError>>),
    RenewGeneration(Sender<Result<(), MachineError>>),
    /// To be done while the machine stands still, with its state; one that ran goes on. The answer is for how long it
    /// stood, nothing if it did already.
    WhileStill(Still, Sender<Duration>),
    Stop,
}

/// Work on a machine that stands still.
pub(crate) type Still = Box<dyn FnOnce(&Machine, SavedState) + Send>;

/// Why something cannot be done with a run.
#[derive(Debug, thiserror::Error)]
pub enum LifecycleError {
    /// The run is over.
    #[error("the machine has stopped")]
    Stopped,
    /// A state can be saved only of a paused machine.
    #[error("the machine is running: pause it first")]
    NotPaused,
    /// A guest that stands still cannot answer.
    #[error("the machine is paused: resume it first")]
    Paused,
    /// The machine cannot do it.
    #[error(transparent)]
    Machine(#[from] MachineError),
}

/// The states of all vCPUs, by number.
type States = Vec<VcpuState>;

/// Drives one machine from its first start to its end.
pub(crate) struct Supervisor {
    machine: Arc<Machine>,
    vcpus: Vec<VcpuThread>,
    no_reboot: bool,
    inbox: Receiver<Message>,
    /// What came while vCPUs were being waited for.
    backlog: VecDeque<Control>,
    /// Which vCPUs run.
    running: Vec<bool>,
    /// Why vCPUs stopped without being told to, in order.
    reasons: VecDeque<(u32, Reason)>,
    /// Whether the machine is paused, for others to see.
    is_paused: Arc<AtomicBool>,
}

impl Supervisor {
    pub fn new(machine: Arc<Machine>, vcpus: Vec<VcpuThread>, no_reboot: bool, inbox: Receiver<Message>) -> Self {
        let running = vec![false; vcpus.len()];
        let (backlog, reasons, is_paused) = Default::default();
        Self { machine, vcpus, no_reboot, inbox, backlog, running, reasons, is_paused }
    }

    /// Whether the machine is paused, as it will be known while it runs.
    pub fn is_paused(&self) -> Arc<AtomicBool> {
        self.is_paused.clone()
    }

    /// Runs the machine from `states` to its end; paused at first if `paused`. When it returns the machine is gone.
    pub fn run(mut self, states: States, paused: bool) -> Outcome {
        let outcome = self.run_to_end(states, paused);
        self.machine.end();
        outcome
    }

    fn run_to_end(&mut self, mut states: States, paused: bool) -> Outcome {
        let mut next = if paused { self.paused(states) } else { ControlFlow::Continue(states) };
        loop {
            match next {
                ControlFlow::Break(outcome) => return outcome,
                ControlFlow::Continue(s) => states = s,
            }
            next = match self.start(states) {
                ControlFlow::Break(outcome) => ControlFlow::Break(outcome),
                ControlFlow::Continue(()) => self.running(),
            };
        }
    }

    /// Running, until the machine has stopped for a reason that a new start from the returned states deals with.
    fn running(&mut self) -> ControlFlow<Outcome, States> {
        loop {
            match self.next_message() {
                Message::Vcpu(index, report) => {
                    self.note(index, report);
                    self.stop();
                    return self.settle();
                }
                Message::Control(Control::Pause(done)) => {
                    self.stop();
                    let states = self.settle()?;
                    self.is_paused.store(true, Ordering::SeqCst);
                    let _ = done.send(());
                    return self.paused(states);
                }
                Message::Control(Control::Resume(done)) => {
                    let _ = done.send(());
                }
                Message::Control(Control::Save(answer)) => {
                    let _ = answer.send(Err(LifecycleError::NotPaused));
                }
                Message::Control(Control::PressPowerButton(answer)) => {
                    self.machine.press_power_button();
                    let _ = answer.send(Ok(()));
                }
                Message::Control(Control::RenewGeneration(answer)) => {
                    let _ = answer.send(self.machine.renew_generation());
                }
                Message::Control(Control::WhileStill(work, done)) => {
                    let begin = Instant::now();
                    self.stop();
                    let states = self.settle()?;
                    work(&self.machine, self.machine.save(&states));
                    self.start(states)?;
                    let _ = done.send(begin.elapsed());
                }
                Message::Control(Control::Stop) => {
                    self.stop();
                    return ControlFlow::Break(Outcome::Quit);
                }
            }
        }
    }

    /// Paused, until it is to go on from the returned states.
    fn paused(&mut self, states: States) -> ControlFlow<Outcome, States> {
        self.is_paused.store(true, Ordering::SeqCst);
        loop {
            match self.next_message() {
                Message::Control(Control::Pause(done)) => {
                    let _ = done.send(());
                }
                Message::Control(Control::Resume(done)) => {
                    self.is_paused.store(false, Ordering::SeqCst);
                    let _ = done.send(());
                    return ControlFlow::Continue(states);
                }
                Message::Control(Control::Save(answer)) => {
                    let _ = answer.send(Ok(self.machine.save(&states)));
                }
                Message::Control(Control::PressPowerButton(answer)) => {
                    let _ = answer.send(Err(LifecycleError::Paused));
                }
                Message::Control(Control::RenewGeneration(answer)) => {
                    let _ = answer.send(self.machine.renew_generation());
                }
                Message::Control(Control::WhileStill(work, done)) => {
                    work(&self.machine, self.machine.save(&states));
                    let _ = done.send(Duration::ZERO);
                }
                Message::Control(Control::Stop) => return ControlFlow::Break(Outcome::Quit),
                Message::Vcpu(index, report) => self.note(index, report),
            }
        }
    }

    /// Steps of a start, in the order given above.
    fn start(&mut self, states: States) -> ControlFlow<Outcome> {
        self.machine.start_clocks();
        for (vcpu, state) in self.vcpus.iter().zip(states) {
            vcpu.restore(Box::new(state));
        }
        for _ in 0..self.vcpus.len() {
            match self.next_report() {
                Some((_, Report::Restored(Ok(())))) => {}
                Some((index, Report::Restored(Err(error)))) => return ControlFlow::Break(crash(index, &error)),
                // Stopped without having run: there is but one way.
                _ => return ControlFlow::Break(panicked(self.reasons.pop_front().map_or(0, |(index, _)| index))),
            }
        }
        self.machine.open();
        self.running.fill(true);
        self.vcpus.iter().for_each(VcpuThread::run);
        ControlFlow::Continue(())
    }

    /// Steps 1 to 3 of a stop.
    fn stop(&mut self) {
        self.machine.hold();
        for vcpu in &self.vcpus {
            vcpu.stop();
        }
        while self.running.contains(&true) {
            self.next_report();
        }
        self.machine.stop_clocks();
    }

    /// Step 4 of a stop, or what the guest asked for instead.
    fn settle(&mut self) -> ControlFlow<Outcome, States> {
        let Some((vcpu, reason)) = self.reasons.pop_front() else { return self.take_states() };
        self.reasons.clear();
        match reason {
            Reason::Told => self.take_states(),
            Reason::Request(Request::PowerOff) => ControlFlow::Break(Outcome::PowerOff),
            Reason::Request(Request::Exit(status)) => ControlFlow::Break(Outcome::Exit(status)),
            Reason::Request(Request::Reset) if self.no_reboot => ControlFlow::Break(Outcome::Reset),
            Reason::Shutdown { rip } if self.no_reboot => {
                ControlFlow::Break(Outcome::Crashed { vcpu, rip, message: "triple fault".into() })
            }
            Reason::Request(Request::Reset) | Reason::Shutdown { .. } => self.reset(),
            Reason::Failed(error) => ControlFlow::Break(crash(vcpu, &error)),
            Reason::Panicked => ControlFlow::Break(panicked(vcpu)),
        }
    }

    fn reset(&mut self) -> ControlFlow<Outcome, States> {
        match self.machine.reset() {
            Ok(states) => ControlFlow::Continue(states),
            Err(error) => {
                let message = format!("cannot start the guest again: {error}");
                ControlFlow::Break(Outcome::Crashed { vcpu: 0, rip: 0, message })
            }
        }
    }

    fn take_states(&mut self) -> ControlFlow<Outcome, States> {
        let mut states = States::new();
        for index in 0..self.vcpus.len() {
            self.vcpus[index].save();
            match self.next_report() {
                Some((_, Report::Saved(Ok(state)))) => states.push(*state),
                Some((index, Report::Saved(Err(error)))) => return ControlFlow::Break(crash(index, &error)),
                _ => return self.settle(),
            }
        }
        align_tsc(&mut states);
        ControlFlow::Continue(states)
    }

    /// Waits for the next report of a vCPU; `None` if it is that it stopped, which is noted.
    fn next_report(&mut self) -> Option<(u32, Report)> {
        loop {
            match self.inbox.recv() {
                Ok(Message::Vcpu(index, report @ Report::Stopped(_))) => {
                    self.note(index, report);
                    return None;
                }
                Ok(Message::Vcpu(index, report)) => return Some((index, report)),
                Ok(Message::Control(control)) => self.backlog.push_back(control),
                // The vCPU threads hold the other end.
                Err(_) => return None,
            }
        }
    }

    fn next_message(&mut self) -> Message {
        if let Some(control) = self.backlog.pop_front() {
            return Message::Control(control);
        }
        // Without anybody to hear from there is nothing to go on for.
        self.inbox.recv().unwrap_or(Message::Control(Control::Stop))
    }

    fn note(&mut self, index: u32, report: Report) {
        if let Report::Stopped(reason) = report {
            self.running[index as usize] = false;
            if !matches!(reason, Reason::Told) {
                self.reasons.push_back((index, reason));
            }
        }
    }
}

fn crash(vcpu: u32, error: &EngineError) -> Outcome {
    let rip = match error {
        EngineError::Failed { rip, .. } => *rip,
        _ => 0,
    };
    let message = match error {
        EngineError::Failed { engine, reason, .. } => format!("the {engine} engine failed: {reason}"),
        other => other.to_string(),
    };
    Outcome::Crashed { vcpu, rip, message }
}

fn panicked(vcpu: u32) -> Outcome {
    Outcome::Crashed { vcpu, rip: 0, message: "its thread panicked; this is a defect of purlin".into() }
}

/// Why a run could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The machine could not be made or booted.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// A disk could not be opened.
    #[error(transparent)]
    Disk(#[from] OpenError),
    /// No thread for it.
    #[error("cannot start a thread: {0}")]
    Thread(std::io::Error),
}
