//! Getting a vCPU out of KVM_RUN from another thread.
//!
//! A kick sets `immediate_exit` first and signals the thread then. If the thread is about to call KVM_RUN, the flag
//! makes that return; if it is within, the signal does. Either way the vCPU's thread finds `kicked` set: no kick is
//! lost, wherever it falls.

use std::sync::{
    Arc, Once,
    atomic::{AtomicBool, AtomicI32, Ordering},
};

use purlin_engine::Kick;
use rustix::thread::gettid;

use crate::run_page::RunPage;

/// The signal that interrupts KVM_RUN. (glibc keeps the first real-time signals for itself; SIGRTMIN tells which are
/// left.)
fn kick_signal() -> i32 {
    libc::SIGRTMIN() + 4
}

/// Sees to it that the signal reaches this thread and does nothing else to it. A system call that it interrupts in
/// a device's code is restarted; KVM_RUN never is.
fn accept_kicks() {
    extern "C" fn interrupted(_: libc::c_int) {}
    static HANDLER: Once = Once::new();
    HANDLER.call_once(|| {
        // SAFETY: an all-zero sigaction is a valid one; the handler does nothing, so it is safe at any moment.
        let result = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = interrupted as *const () as usize;
            action.sa_flags = libc::SA_RESTART | libc::SA_ONSTACK;
            libc::sigaction(kick_signal(), &action, std::ptr::null_mut())
        };
        assert_eq!(result, 0, "sigaction fails for invalid signals only");
    });
    mask_kicks(libc::SIG_UNBLOCK);
}

/// Blocks or unblocks the signal for this thread.
fn mask_kicks(how: libc::c_int) {
    // SAFETY: the set is valid; only this thread's mask changes.
    unsafe { libc::pthread_sigmask(how, &kick_signals(), std::ptr::null_mut()) };
}

/// The set of the one signal.
fn kick_signals() -> libc::sigset_t {
    // SAFETY: an all-zero set is storage enough for sigemptyset to make an empty one of.
    unsafe {
        let mut signals: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut signals);
        libc::sigaddset(&mut signals, kick_signal());
        signals
    }
}

/// While this lives the signal is blocked for the thread, and pending.
#[derive(Debug)]
pub(crate) struct PendingKick(());

impl PendingKick {
    pub(crate) fn new() -> Self {
        mask_kicks(libc::SIG_BLOCK);
        signal_thread(gettid().as_raw_nonzero().get());
        Self(())
    }

    /// The signal.
    pub(crate) fn signal(&self) -> i32 {
        kick_signal()
    }
}

impl Drop for PendingKick {
    fn drop(&mut self) {
        let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: all pointers are to live values, or null where that is allowed. Ends when none is pending.
        while unsafe { libc::sigtimedwait(&kick_signals(), std::ptr::null_mut(), &now) } > 0 {}
        mask_kicks(libc::SIG_UNBLOCK);
    }
}

fn signal_thread(thread: i32) {
    // SAFETY: sends a signal whose handler does nothing. Should the thread just have left KVM_RUN, or even ended, that
    // is all that happens to it or to the thread of this process that bears its number now.
    unsafe { libc::syscall(libc::SYS_tgkill, std::process::id(), thread, kick_signal()) };
}

/// What a vCPU and those who kick it share.
#[derive(Debug)]
pub(crate) struct Kicker {
    page: RunPage,
    kicked: AtomicBool,
    /// The thread within [`Kicker::enter`] and [`Kicker::leave`], 0 if there is none.
    thread: AtomicI32,
}

impl Kicker {
    pub(crate) fn new(page: RunPage) -> Arc<Self> {
        Arc::new(Self { page, kicked: AtomicBool::new(false), thread: AtomicI32::new(0) })
    }

    /// The vCPU's shared page.
    pub(crate) fn page(&self) -> &RunPage {
        &self.page
    }

    /// This thread is going to call KVM_RUN; from now on it can be interrupted.
    pub(crate) fn enter(&self) {
        accept_kicks();
        self.thread.store(gettid().as_raw_nonzero().get(), Ordering::SeqCst);
    }

    /// This thread has done with KVM_RUN.
    pub(crate) fn leave(&self) {
        self.thread.store(0, Ordering::SeqCst);
    }

    /// KVM_RUN returned EINTR: whether somebody kicked the vCPU. Each kick is told once.
    pub(crate) fn take(&self) -> bool {
        // In this order: a kick that comes between the two is told now, one that comes after has set the flag again.
        self.page.take_immediate_exit();
        self.kicked.swap(false, Ordering::SeqCst)
    }

    /// Gets the vCPU out of the guest, to look again at what it has to do; [`purlin_engine::Vcpu::run`] goes on.
    pub(crate) fn nudge(&self) {
        self.page.set_immediate_exit();
        let thread = self.thread.load(Ordering::SeqCst);
        if thread != 0 {
            signal_thread(thread);
        }
    }
}

impl Kick for Kicker {
    fn kick(&self) {
        self.kicked.store(true, Ordering::SeqCst);
        self.nudge();
    }
}
