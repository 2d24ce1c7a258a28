//! A timer that signals the vCPU's own thread when its local APIC's timer is due.
//!
//! The signal's handler only leaves a request in the mailbox; it costs the guest a microsecond and needs no other
//! thread.
#![allow(unsafe_code)]

use std::sync::Once;

use crate::mailbox::{Mailbox, request};

/// The timer of one vCPU. It exists while the vCPU runs.
#[derive(Default)]
pub struct WakeTimer {
    timer: Option<libc::timer_t>,
    /// What it is set to: CLOCK_MONOTONIC, ns.
    armed: Option<u64>,
    wanted: bool,
}

fn signal() -> i32 {
    libc::SIGRTMIN() + 3
}

extern "C" fn handler(_signal: i32, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the value is the mailbox that the timer was created with; timers are deleted before their mailboxes.
    unsafe {
        if (*info).si_code == libc::SI_TIMER {
            let mailbox = (*info).si_value().sival_ptr.cast::<Mailbox>();
            (*mailbox).request_from_signal(request::TIMER);
        }
    }
}

fn install() {
    static ONCE: Once = Once::new();
    // SAFETY: the action is fully initialised; the handler only touches atomics.
    ONCE.call_once(|| unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
        libc::sigemptyset(&mut action.sa_mask);
        libc::sigaction(signal(), &action, std::ptr::null_mut());
    });
}

impl WakeTimer {
    /// The vCPU begins to run on this thread.
    pub fn start(&mut self) {
        install();
        self.wanted = true;
    }

    /// Sets it to `deadline` (CLOCK_MONOTONIC, ns), or off.
    pub fn arm(&mut self, deadline: Option<u64>, mailbox: *const Mailbox) {
        if deadline == self.armed || !self.wanted {
            return;
        }
        let Some(timer) = self.timer.or_else(|| self.create(mailbox)) else { return };
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

    fn create(&mut self, mailbox: *const Mailbox) -> Option<libc::timer_t> {
        // SAFETY: the event is fully initialised; the thread is this one, which outlives the timer (see `stop`).
        unsafe {
            let mut event: libc::sigevent = std::mem::zeroed();
            event.sigev_notify = libc::SIGEV_THREAD_ID;
            event.sigev_signo = signal();
            event.sigev_value.sival_ptr = mailbox.cast_mut().cast();
            event.sigev_notify_thread_id = libc::gettid();
            let mut timer: libc::timer_t = std::mem::zeroed();
            if libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, &mut timer) != 0 {
                return None;
            }
            self.timer = Some(timer);
            Some(timer)
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
