//! Threads that serve a device's queues, and how they are held for a pause.

use std::{
    io,
    os::fd::OwnedFd,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

use purlin_sandbox::Role;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use super::Running;

/// The most descriptors that a worker can wait for beside its queues.
pub const MOST_OTHERS: usize = 3;

/// What a thread does, from its start to its end: it asks [`Wake::wait`] again and again what to do.
pub type Job = Box<dyn FnOnce(&Wake) + Send>;

/// What a thread is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// There may be something in its queues, or one of its descriptors is ready.
    Work,
    /// To finish the requests under way, tell the driver of them, take no new ones, and wait again.
    Hold,
    /// The same, and to return.
    End,
}

/// What a worker's thread waits by. The seam has no descriptors for notifications; this is the worker's own.
pub struct Wake {
    event: OwnedFd,
    /// The event has been signalled, and the thread has not looked yet.
    rung: AtomicBool,
    /// The thread is told something else than to work.
    interrupted: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    told: Told,
    /// The thread has heard of a hold.
    heard: bool,
    /// The thread does nothing until it is told otherwise.
    stands: bool,
    /// The thread has ended.
    gone: bool,
}

impl Wake {
    fn new() -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let state = Mutex::new(State { told: Told::Hold, heard: false, stands: false, gone: false });
        Ok(Self {
            event,
            rung: AtomicBool::new(false),
            interrupted: AtomicBool::new(true),
            state,
            changed: Condvar::new(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the thread look at its queues. Only the first call since it looked costs a system call.
    pub fn ring(&self) {
        if !self.rung.swap(true, Ordering::SeqCst) {
            // It fails only where the count overflows: then the event is signalled.
            let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
        }
    }

    /// Waits until there is something to do: a queue has been notified, or one of `others` is ready (which, the caller
    /// finds out by trying).
    ///
    /// # Panics
    /// If there are more than [`MOST_OTHERS`] of them: a mistake in the device.
    pub fn wait(&self, others: &[PollFd<'_>]) -> Told {
        assert!(others.len() <= MOST_OTHERS);
        loop {
            if let Some(told) = self.told() {
                return told;
            }
            if self.rung.load(Ordering::SeqCst) {
                self.silence();
                return Told::Work;
            }
            // Behind the others there is the event, as often as there is room.
            let own = PollFd::new(&self.event, PollFlags::IN);
            let mut all: [PollFd<'_>; MOST_OTHERS + 1] =
                std::array::from_fn(|i| others.get(i).cloned().unwrap_or_else(|| own.clone()));
            if poll(&mut all[..=others.len()], None).is_err() {
                // A signal.
                continue;
            }
            let (of_others, own) = all.split_at(others.len());
            if of_others.iter().any(|fd| !fd.revents().is_empty()) {
                return self.told().unwrap_or(Told::Work);
            }
            // Who rings may have been slow, and signalled the event only after a `silence` had heard of it: nobody else
            // would take the signal back.
            if !own[0].revents().is_empty() {
                self.silence();
                return self.told().unwrap_or(Told::Work);
            }
        }
    }

    /// Whether the thread is to end its work and ask [`Wake::wait`] again. A guest that makes buffers available as fast as
    /// they are used must not keep it from hearing that: whoever serves a queue asks this before each chain.
    pub fn is_interrupted(&self) -> bool {
        self.interrupted.load(Ordering::SeqCst)
    }

    /// What is rung after this is heard by the next wait.
    fn silence(&self) {
        self.rung.store(false, Ordering::SeqCst);
        let _ = rustix::io::read(&self.event, &mut [0u8; 8]);
    }

    /// What the thread is told beside its work, having stood still for as long as it is held.
    fn told(&self) -> Option<Told> {
        let mut state = self.lock();
        loop {
            match state.told {
                Told::Work => return None,
                Told::End => return Some(Told::End),
                Told::Hold if !state.heard => {
                    state.heard = true;
                    return Some(Told::Hold);
                }
                Told::Hold => {
                    state.stands = true;
                    self.changed.notify_all();
                    state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    /// Tells the thread.
    fn tell(&self, told: Told) {
        let mut state = self.lock();
        (state.told, state.heard, state.stands) = (told, false, false);
        self.interrupted.store(told != Told::Work, Ordering::SeqCst);
        drop(state);
        self.changed.notify_all();
        self.ring();
    }

    /// Tells the thread to stand still, if it does not.
    fn hold(&self) {
        if self.lock().told == Told::Work {
            self.tell(Told::Hold);
        }
    }

    /// Waits until it does.
    fn wait_until_it_stands(&self) {
        drop(self.changed.wait_while(self.lock(), |s| !s.stands && !s.gone).unwrap_or_else(PoisonError::into_inner));
    }
}

/// While a test writes to it, threads that are started do not get to their work.
#[cfg(test)]
pub static SLOW: std::sync::RwLock<()> = std::sync::RwLock::new(());

/// Marks the thread as gone, be it by a panic: nobody may wait for it any more.
struct Going<'a>(&'a Wake);

impl Drop for Going<'_> {
    fn drop(&mut self) {
        self.0.lock().gone = true;
        self.0.changed.notify_all();
    }
}

/// A device's threads. Their drop ends them.
#[derive(Default)]
pub struct Workers(Vec<Worker>);

struct Worker {
    /// The queues whose notifications are for it.
    queues: Vec<u16>,
    wake: Arc<Wake>,
    thread: Option<JoinHandle<()>>,
}

impl Workers {
    /// Adds a thread that serves `queues`. Linux shows the first 15 bytes of its name. In a sandbox it has a role; without
    /// one here the job takes it, once it has what the role does not allow. Returns what it waits by, for other threads of
    /// the device that have something to tell it.
    pub fn start(&mut self, name: &str, queues: &[u16], role: Option<Role>, job: Job) -> io::Result<Arc<Wake>> {
        let wake = Arc::new(Wake::new()?);
        // A driver has it started, so this is a vCPU's thread: that of the device does not inherit its filter.
        let thread = purlin_sandbox::spawn(name, {
            let wake = wake.clone();
            move || {
                let _going = Going(&wake);
                #[cfg(test)]
                drop(SLOW.read().unwrap_or_else(PoisonError::into_inner));
                match role.map_or(Ok(()), purlin_sandbox::thread) {
                    Ok(()) => job(&wake),
                    Err(error) => tracing::error!("a device is not served: {error}"),
                }
            }
        })?;
        self.0.push(Worker { queues: queues.to_vec(), wake: wake.clone(), thread: Some(thread) });
        Ok(wake)
    }
}

impl Running for Workers {
    fn notify(&self, index: u16) {
        if let Some(worker) = self.0.iter().find(|w| w.queues.contains(&index)) {
            worker.wake.ring();
        }
    }

    fn hold(&self) {
        self.0.iter().for_each(|worker| worker.wake.hold());
        self.0.iter().for_each(|worker| worker.wake.wait_until_it_stands());
    }

    fn open(&self) {
        self.0.iter().for_each(|worker| worker.wake.tell(Told::Work));
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.0.iter().for_each(|worker| worker.wake.tell(Told::End));
        for worker in &mut self.0 {
            if let Some(thread) = worker.thread.take() {
                // A panic has been reported by then.
                let _ = thread.join();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A thread that rings may be held up between saying so and signalling. The other thread, which has heard of it,
    /// must not go round and round for the signal that comes then.
    #[test]
    fn a_late_signal_is_heard_once() {
        let wake = Wake::new().unwrap();
        wake.tell(Told::Work);
        assert_eq!(wake.wait(&[]), Told::Work);
        rustix::io::write(&wake.event, &1u64.to_ne_bytes()).unwrap();
        assert_eq!(wake.wait(&[]), Told::Work);
        let mut event = [PollFd::new(&wake.event, PollFlags::IN)];
        assert_eq!(poll(&mut event, Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(0));
    }
}
