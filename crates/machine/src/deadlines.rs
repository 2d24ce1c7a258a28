//! The thread that wakes devices when their deadlines come.

use std::{
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use purlin_sandbox::Role;

use crate::bus::{DeviceBus, lock};

/// What the bus and the thread tell each other.
#[derive(Default)]
pub struct Deadlines {
    /// What the thread waits for: an earlier deadline is news to it. While it looks for the earliest, every one is.
    awaited: AtomicU64,
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Default)]
struct State {
    mode: Mode,
    /// The thread is among the devices at this moment.
    advancing: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Default)]
enum Mode {
    /// The clock stands still: there is nothing to wait for.
    #[default]
    Paused,
    Running,
    Ended,
}

impl Deadlines {
    /// A device's deadline is now this; called with the device locked.
    pub fn changed(&self, deadline: u64) {
        // Either this load sees what the thread has begun to wait for, or the thread, which reads the devices'
        // deadlines after it has stored to `awaited`, sees the new one (all of it sequentially consistent).
        if deadline < self.awaited.load(Ordering::SeqCst) {
            drop(lock(&self.state));
            self.wake.notify_all();
        }
    }

    fn set(&self, mode: Mode) {
        lock(&self.state).mode = mode;
        self.wake.notify_all();
    }
}

/// The thread. It ends when this is dropped.
pub struct DeadlineThread {
    bus: Arc<DeviceBus>,
    thread: Option<JoinHandle<()>>,
}

impl DeadlineThread {
    /// Starts it, waiting for [`DeadlineThread::resume`].
    pub fn start(bus: Arc<DeviceBus>) -> std::io::Result<Self> {
        let thread = purlin_sandbox::spawn("deadlines", {
            let bus = bus.clone();
            move || match purlin_sandbox::thread(Role::Device) {
                Ok(()) => run(&bus),
                Err(error) => tracing::error!("no timer of a device comes due: {error}"),
            }
        })?;
        Ok(Self { bus, thread: Some(thread) })
    }

    /// The clock runs.
    pub fn resume(&self) {
        self.bus.deadlines().set(Mode::Running);
    }

    /// The clock is about to stop. When this returns the thread has left the devices alone.
    pub fn pause(&self) {
        let deadlines = self.bus.deadlines();
        deadlines.set(Mode::Paused);
        let state = lock(&deadlines.state);
        drop(deadlines.wake.wait_while(state, |s| s.advancing).unwrap_or_else(PoisonError::into_inner));
    }
}

impl Drop for DeadlineThread {
    fn drop(&mut self) {
        self.bus.deadlines().set(Mode::Ended);
        if let Some(thread) = self.thread.take() {
            // It only ends in error by a device's panic, which has been reported by then.
            let _ = thread.join();
        }
    }
}

fn run(bus: &DeviceBus) {
    let deadlines = bus.deadlines();
    let mut state = lock(&deadlines.state);
    loop {
        match state.mode {
            Mode::Ended => return,
            Mode::Paused => state = deadlines.wake.wait(state).unwrap_or_else(PoisonError::into_inner),
            Mode::Running => {
                deadlines.awaited.store(u64::MAX, Ordering::SeqCst);
                let next = bus.earliest_deadline();
                deadlines.awaited.store(next, Ordering::SeqCst);
                let now = bus.clock().now();
                if next <= now {
                    // Devices are locked before this lock, never after it.
                    state.advancing = true;
                    drop(state);
                    bus.advance_due();
                    state = lock(&deadlines.state);
                    state.advancing = false;
                    deadlines.wake.notify_all();
                } else {
                    let wait = Duration::from_nanos(next - now);
                    let woken = deadlines.wake.wait_timeout(state, wait);
                    state = woken.unwrap_or_else(PoisonError::into_inner).0;
                }
            }
        }
    }
}
