//! Input from outside, which reaches the devices only while the machine runs.
//!
//! What a device does with input ends in an interrupt; sent to a vCPU whose state has been taken already, that
//! interrupt would be lost.

use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use crate::{bus::lock, machine::Machine};

/// How long input waits before it looks for room again: about as long as a line of text takes on the wire.
const RETRY: Duration = Duration::from_millis(5);

/// A port of a machine's that takes input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InputPort {
    /// COM1.
    Serial,
    /// virtio-console.
    Console,
}

/// Where input for one of the guest's ports goes. Clones lead to the same port. It does not keep the machine alive.
#[derive(Clone)]
pub struct GuestInput {
    gate: Arc<InputGate>,
    machine: Weak<Machine>,
    port: InputPort,
}

impl GuestInput {
    pub(crate) fn new(gate: Arc<InputGate>, machine: Weak<Machine>, port: InputPort) -> Self {
        Self { gate, machine, port }
    }

    /// Hands `bytes` to the guest, and waits while its port has no room or the machine stands still: nothing is lost.
    /// `false` once the run is over (or if the machine has no such port): the rest is of no use to anybody.
    pub fn push(&self, mut bytes: &[u8]) -> bool {
        while !bytes.is_empty() {
            let Some(entered) = self.gate.enter() else { return false };
            // The machine is held only inside the gate: at the end of a run nobody is left who does.
            let taken = self.machine.upgrade().and_then(|machine| machine.push_input(self.port, bytes));
            let Some(taken) = taken else { return false };
            bytes = &bytes[taken..];
            if taken == 0 {
                self.gate.wait_for_room(entered, RETRY);
            }
        }
        true
    }
}

/// Lets input through, or holds it.
#[derive(Default)]
pub struct InputGate {
    state: Mutex<Gate>,
    changed: Condvar,
}

#[derive(Clone, Copy, PartialEq, Eq, Default)]
enum Gate {
    #[default]
    Held,
    Open,
    Ended,
}

/// The right to give input to a device, now.
pub struct Entered<'a>(MutexGuard<'a, Gate>);

impl InputGate {
    /// Waits until the gate is open; `None` once the run is over. The gate stays as it is until the guard is dropped.
    pub fn enter(&self) -> Option<Entered<'_>> {
        let held = |gate: &mut Gate| *gate == Gate::Held;
        let state = self.changed.wait_while(lock(&self.state), held).unwrap_or_else(PoisonError::into_inner);
        (*state == Gate::Open).then_some(Entered(state))
    }

    /// Waits for a device to make room: for `most`, or until the gate changes.
    pub fn wait_for_room(&self, entered: Entered<'_>, most: Duration) {
        drop(self.changed.wait_timeout(entered.0, most).unwrap_or_else(PoisonError::into_inner));
    }

    /// Lets input through.
    pub fn open(&self) {
        self.set(Gate::Open);
    }

    /// Holds input. When this returns none is on its way.
    pub fn hold(&self) {
        self.set(Gate::Held);
    }

    /// Turns input away for ever.
    pub fn end(&self) {
        self.set(Gate::Ended);
    }

    fn set(&self, to: Gate) {
        *lock(&self.state) = to;
        self.changed.notify_all();
    }
}
