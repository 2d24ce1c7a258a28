//! Timers that signal the vCPU's own thread: when its local APIC's timer is due, and for samples of what it executes.
//!
//! The signals' handlers only leave requests in the mailbox, and count for a profile; they cost the guest a microsecond
//! and need no other thread.
#![allow(unsafe_code)]

use std::sync::{Once, atomic::Ordering};

use crate::{
    mailbox::{Mailbox, request},
    translate::in_emitted_code,
};

/// Time between two samples, in ns: not one that guests' ticks are a multiple of, or all samples would be of these. (The
/// clock of the thread's own time is looked at in the host's ticks only, so it has the same flaw.)
const SAMPLE_PERIOD: i64 = 2_900_000;

/// The timer of one vCPU. It exists while the vCPU runs.
#[derive(Default)]
pub struct WakeTimer {
    timer: Option<libc::timer_t>,
    /// What it is set to: CLOCK_MONOTONIC, ns.
    armed: Option<u64>,
    wanted: bool,
}

/// The signal of [`WakeTimer`].
fn wake_signal() -> i32 {
    libc::SIGRTMIN() + 3
}

/// The signal of [`SampleTimer`].
fn sample_signal() -> i32 {
    libc::SIGRTMIN() + 4
}

extern "C" fn wake(_signal: i32, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the value is the mailbox that the timer was created with; timers are deleted before their mailboxes.
    unsafe {
        if (*info).si_code == libc::SI_TIMER {
            let mailbox = (*info).si_value().sival_ptr.cast::<Mailbox>();
            (*mailbox).request_from_signal(request::TIMER);
        }
    }
}

extern "C" fn sample(_signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: as in `wake`; the context is the interrupted thread's.
    unsafe {
        let rip = (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs[libc::REG_RIP as usize] as u64;
        if (*info).si_code != libc::SI_TIMER {
            return;
        }
        let mailbox = (*info).si_value().sival_ptr.cast::<Mailbox>();
        if let Some(profile) = (*mailbox).profile.get() {
            profile.sampled(rip, &(*mailbox).phase);
        }
        if in_emitted_code(rip) {
            (*mailbox).sample.store(rip, Ordering::Relaxed);
            (*mailbox).request_from_signal(request::SAMPLE);
        }
    }
}

fn install() {
    static ONCE: Once = Once::new();
    type Handler = extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void);
    let handle = |signal: i32, handler: Handler| {
        // SAFETY: the action is fully initialised; the handlers only touch atomics.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
            // One at a time: two frames may be more than the signal stack holds.
            libc::sigfillset(&mut action.sa_mask);
            libc::sigaction(signal, &action, std::ptr::null_mut());
        }
    };
    ONCE.call_once(|| {
        handle(wake_signal(), wake);
        handle(sample_signal(), sample);
    });
}

/// A timer of `clock` that sends `signal` to this thread, which outlives it.
fn create(clock: libc::clockid_t, signal: i32, mailbox: *const Mailbox) -> Option<libc::timer_t> {
    // SAFETY: the event is fully initialised.
    unsafe {
        let mut event: libc::sigevent = std::mem::zeroed();
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = signal;
        event.sigev_value.sival_ptr = mailbox.cast_mut().cast();
        event.sigev_notify_thread_id = libc::gettid();
        let mut timer: libc::timer_t = std::mem::zeroed();
        (libc::timer_create(clock, &mut event, &mut timer) == 0).then_some(timer)
    }
}

impl WakeTimer {
    /// The vCPU begins to run on this thread.
    pub fn start(&mut self) {
        install();
        self.wanted = true;
    }

    /// What it is set to.
    pub fn armed(&self) -> Option<u64> {
        self.armed
    }

    /// Sets it to `deadline` (CLOCK_MONOTONIC, ns), or off.
    pub fn arm(&mut self, deadline: Option<u64>, mailbox: *const Mailbox) {
        if deadline == self.armed || !self.wanted {
            return;
        }
        if self.timer.is_none() {
            self.timer = create(libc::CLOCK_MONOTONIC, wake_signal(), mailbox);
        }
        let Some(timer) = self.timer else { return };
        self.armed = deadline;
        // A deadline of zero would turn it off.
        let ns = deadline.map_or(0, |d| d.max(1));
        // SAFETY: `timer` exists; the specification is a valid structure.
        unsafe {
            let mut spec: libc::itimerspec = std::mem::zeroed();
            spec.it_value.tv_sec = (ns / 1_000_000_000) as i64;
            spec.it_value.tv_nsec = (ns % 1_000_000_000) as i64;
            libc::timer_settime(timer, libc::TIMER_ABSTIME, &spec, std::ptr::null_mut());
        }
    }

    /// The vCPU does not run any more, or not on this thread.
    pub fn stop(&mut self) {
        self.wanted = false;
        self.armed = None;
        if let Some(timer) = self.timer.take() {
            // SAFETY: it exists, and is forgotten here.
            unsafe {
                libc::timer_delete(timer);
            }
        }
    }
}

impl Drop for WakeTimer {
    fn drop(&mut self) {
        self.stop();
    }
}

// SAFETY: a timer id may be used by any thread of the process.
unsafe impl Send for WakeTimer {}

/// Has samples taken of what one vCPU executes, while it does.
#[derive(Default)]
pub struct SampleTimer(Option<libc::timer_t>);

impl SampleTimer {
    /// The vCPU begins to run on this thread.
    pub fn start(&mut self, mailbox: *const Mailbox) {
        install();
        self.stop();
        self.0 = create(libc::CLOCK_MONOTONIC, sample_signal(), mailbox);
        self.set(SAMPLE_PERIOD);
    }

    /// The vCPU sleeps: it is left alone.
    pub fn pause(&self) {
        self.set(0);
    }

    /// It goes on.
    pub fn go_on(&self) {
        self.set(SAMPLE_PERIOD);
    }

    /// Sets the time between two samples, or none.
    fn set(&self, ns: i64) {
        let Some(timer) = self.0 else { return };
        let period = libc::timespec { tv_sec: 0, tv_nsec: ns };
        let spec = libc::itimerspec { it_interval: period, it_value: period };
        // SAFETY: `timer` exists; the specification is a valid structure.
        unsafe {
            libc::timer_settime(timer, 0, &spec, std::ptr::null_mut());
        }
    }

    /// The vCPU does not run any more, or not on this thread.
    pub fn stop(&mut self) {
        if let Some(timer) = self.0.take() {
            // SAFETY: it exists, and is forgotten here.
            unsafe {
                libc::timer_delete(timer);
            }
        }
    }
}

impl Drop for SampleTimer {
    fn drop(&mut self) {
        self.stop();
    }
}

// SAFETY: a timer id may be used by any thread of the process.
unsafe impl Send for SampleTimer {}
