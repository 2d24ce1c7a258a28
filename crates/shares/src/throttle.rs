//! A cap that a process keeps by itself: where there are no control groups it stops its busy threads for part of the time.
//!
//! Time adds its share to a budget, and what the process has used is taken off it. When it is used up the threads stand
//! still until there is some again. So a cap holds on average, over seconds, and what they do is delayed by some
//! hundredths of a second.

use std::{
    io,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use rustix::time::{ClockId, clock_gettime};

/// How often the time is looked at while the threads run.
const LOOK: Duration = Duration::from_millis(10);

/// Time whose share must be there before threads that stand still go on, or they would go on and stop all the time.
const LEAST: Duration = Duration::from_millis(25);

/// Time whose share can be saved up: on a busy host this thread and the others come late, and are to catch up.
const MOST: Duration = Duration::from_millis(500);

/// The busy threads of this process: vCPUs. What they do for others (interrupts, timers) may be delayed.
pub trait Throttle: Send + Sync {
    /// Stops them, without waiting for long.
    fn pause_vcpus(&self);
    /// Lets them go on.
    fn resume_vcpus(&self);
}

/// Keeps the cap of this process, by a thread of its own, until it is dropped. Then the threads run.
pub struct Governor {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    paused_ns: AtomicU64,
}

struct State {
    cap: Option<u32>,
    ending: bool,
}

impl Governor {
    /// Starts it. `cap` is in percent of one CPU; without one nothing is stopped.
    pub fn start(cap: Option<u32>, throttle: Arc<dyn Throttle>) -> io::Result<Self> {
        let state = Mutex::new(State { cap, ending: false });
        let shared = Arc::new(Shared { state, changed: Condvar::new(), paused_ns: AtomicU64::new(0) });
        let thread = thread::Builder::new().name("governor".into()).spawn({
            let shared = shared.clone();
            move || shared.govern(&*throttle)
        })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Changes the cap.
    pub fn set(&self, cap: Option<u32>) {
        self.shared.lock().cap = cap;
        self.shared.changed.notify_all();
    }

    /// For how many ns the threads have stood still.
    pub fn throttled_ns(&self) -> u64 {
        self.shared.paused_ns.load(Ordering::Relaxed)
    }
}

impl Drop for Governor {
    fn drop(&mut self) {
        self.shared.lock().ending = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // A panic has been reported by then.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The thread.
    fn govern(&self, throttle: &dyn Throttle) {
        let mut account = Account::new();
        let mut paused_at: Option<Instant> = None;
        while let Some(cap) = self.wait_for_turn() {
            match (account.may_go_on(cap), paused_at) {
                (false, None) => {
                    throttle.pause_vcpus();
                    paused_at = Some(Instant::now());
                }
                (true, Some(since)) => {
                    self.go_on(throttle, since);
                    paused_at = None;
                }
                _ => {}
            }
        }
        if let Some(since) = paused_at {
            self.go_on(throttle, since);
        }
    }

    fn go_on(&self, throttle: &dyn Throttle, since: Instant) {
        throttle.resume_vcpus();
        self.paused_ns.fetch_add(since.elapsed().as_nanos() as u64, Ordering::Relaxed);
    }

    /// Waits until it is time to look again, and says for which cap; `None` at the end.
    fn wait_for_turn(&self) -> Option<Option<u32>> {
        let state = self.lock();
        if state.ending {
            return None;
        }
        // Without a cap, until there is one.
        let look = if state.cap.is_some() { LOOK } else { Duration::MAX };
        let (state, _) = self.changed.wait_timeout(state, look).unwrap_or_else(PoisonError::into_inner);
        (!state.ending).then_some(state.cap)
    }
}

/// What this process has used, against its cap.
struct Account {
    cap: Option<u32>,
    looked: Instant,
    used: Duration,
    budget: Budget,
}

impl Account {
    fn new() -> Self {
        Self { cap: None, looked: Instant::now(), used: process_time(), budget: Budget::new() }
    }

    /// Looks at the time. What was used under another cap counts no more.
    fn may_go_on(&mut self, cap: Option<u32>) -> bool {
        if cap != self.cap {
            *self = Self { cap, ..Self::new() };
        }
        let Some(cap) = cap else { return true };
        let (now, used) = (Instant::now(), process_time());
        let goes_on = self.budget.spend(cap, now - self.looked, used.saturating_sub(self.used));
        (self.looked, self.used) = (now, used);
        goes_on
    }
}

/// CPU time of this process.
fn process_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec.cast_unsigned(), time.tv_nsec as u32)
}

/// CPU time that may be used, in ns; negative while some is owed.
struct Budget {
    left: i64,
    stands: bool,
}

impl Budget {
    fn new() -> Self {
        Self { left: 0, stands: false }
    }

    /// Takes off what was used in `elapsed` time, and says whether the threads may go on.
    fn spend(&mut self, cap: u32, elapsed: Duration, used: Duration) -> bool {
        let percent = |time: Duration| i64::try_from(time.as_nanos() * u128::from(cap) / 100).unwrap_or(i64::MAX);
        let used = i64::try_from(used.as_nanos()).unwrap_or(i64::MAX);
        // What is owed is owed in full, however late this thread has come to look: the average is the cap.
        self.left = self.left.saturating_add(percent(elapsed)).saturating_sub(used).min(percent(MOST));
        self.stands = if self.stands { self.left < percent(LEAST) } else { self.left < 0 };
        !self.stands
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One busy thread that does as the budget says, in steps of 10 ms.
    fn simulate(cap: u32, threads: u64, steps: u32) -> f64 {
        let (mut budget, mut used, mut runs) = (Budget::new(), 0u64, true);
        for _ in 0..steps {
            let step = if runs { threads * 10 } else { 0 };
            used += step;
            runs = budget.spend(cap, Duration::from_millis(10), Duration::from_millis(step));
        }
        used as f64 / f64::from(steps) * 10.0
    }

    #[test]
    fn the_average_is_the_cap() {
        for (cap, threads) in [(50, 1), (10, 1), (150, 2), (33, 4), (1, 1)] {
            let percent = simulate(cap, threads, 10_000);
            assert!((percent - f64::from(cap)).abs() < 0.05 * f64::from(cap), "{cap} % of {threads}: {percent}");
        }
        assert_eq!(simulate(100, 1, 1000), 100.0, "not in reach");
    }

    #[test]
    fn an_idle_time_is_not_saved_up() {
        let mut budget = Budget::new();
        assert!(budget.spend(50, Duration::from_secs(1000), Duration::ZERO));
        // The share of half a second, and no more.
        assert!(budget.spend(50, Duration::ZERO, Duration::from_millis(250)));
        assert!(!budget.spend(50, Duration::ZERO, Duration::from_millis(1)));
    }
}
