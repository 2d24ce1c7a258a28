//! Host signals in emitted code: what the copied instruction would have raised, or the poll of the mailbox.
//!
//! The handler only notes what happened and sends the thread to a stub, which leaves emitted code as any other exit
//! does; all decisions are made in Rust, outside of the handler.
#![allow(unsafe_code)]

use std::sync::{
    Once, OnceLock,
    atomic::{AtomicU64, Ordering},
};

use super::{
    layout::{EmittedState, signal_place},
    returns::{emptied, renew},
};

/// Code caches: start and end addresses, and the signal stub. More than this many VMs in one process have to wait.
const CACHES: usize = 64;

struct Range {
    start: AtomicU64,
    end: AtomicU64,
    stub: AtomicU64,
}

static RANGES: [Range; CACHES] =
    [const { Range { start: AtomicU64::new(0), end: AtomicU64::new(0), stub: AtomicU64::new(0) } }; CACHES];

/// Signals that copied instructions raise.
const SIGNALS: [i32; 5] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP];

/// What was done with them before.
static PREVIOUS: [OnceLock<libc::sigaction>; SIGNALS.len()] = [const { OnceLock::new() }; SIGNALS.len()];

/// Takes note of a code cache.
pub fn register(start: u64, len: u64, stub: u64) {
    install();
    for range in &RANGES {
        if range.start.compare_exchange(0, start, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
            range.stub.store(stub, Ordering::SeqCst);
            range.end.store(start + len, Ordering::SeqCst);
            return;
        }
    }
    panic!("more than {CACHES} machines with the translator in one process");
}

/// Forgets a code cache.
pub fn unregister(start: u64) {
    for range in &RANGES {
        if range.start.load(Ordering::SeqCst) == start {
            range.end.store(0, Ordering::SeqCst);
            range.start.store(0, Ordering::SeqCst);
        }
    }
}

/// Whether `address` is in a code cache. For signal handlers.
pub fn in_emitted_code(address: u64) -> bool {
    range_of(address).is_some()
}

fn range_of(address: u64) -> Option<&'static Range> {
    RANGES.iter().find(|r| address >= r.start.load(Ordering::Relaxed) && address < r.end.load(Ordering::Relaxed))
}

fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        for (i, &signal) in SIGNALS.iter().enumerate() {
            // SAFETY: both actions are valid structures; the handler keeps to what a handler may do.
            unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = handler as *const () as usize;
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
                // One at a time: two frames may be more than the signal stack holds.
                libc::sigfillset(&mut action.sa_mask);
                // Known before the handler can run.
                let mut previous: libc::sigaction = std::mem::zeroed();
                libc::sigaction(signal, std::ptr::null(), &mut previous);
                let _ = PREVIOUS[i].set(previous);
                libc::sigaction(signal, &action, std::ptr::null_mut());
            }
        }
    });
}

extern "C" fn handler(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes valid pointers. Inside a registered range GS points at the vCPU's block, which belongs
    // to this thread.
    unsafe {
        let context = &mut *context.cast::<libc::ucontext_t>();
        let rip = context.uc_mcontext.gregs[libc::REG_RIP as usize] as u64;
        let Some(range) = range_of(rip) else { return pass_on(signal, info, context) };
        let emitted: *mut EmittedState = signal_place();
        if signal == libc::SIGSEGV
            && let Some(pointer) = emptied((*emitted).returns_base, (*info).si_addr() as u64)
        {
            // The push comes again.
            renew(pointer);
            context.uc_mcontext.gregs[libc::REG_RSP as usize] = pointer as i64;
            return;
        }
        let trap = context.uc_mcontext.gregs[libc::REG_TRAPNO as usize] as i32;
        (*emitted).signal = (signal as u32, trap, rip, (*info).si_addr() as u64);
        // Single-step and alignment flags are never the host's own in emitted code, but a debugger's may be.
        context.uc_mcontext.gregs[libc::REG_RIP as usize] = range.stub.load(Ordering::Relaxed) as i64;
    }
}

/// Not ours: as if this handler were not there.
unsafe fn pass_on(signal: i32, info: *mut libc::siginfo_t, context: &mut libc::ucontext_t) {
    let index = SIGNALS.iter().position(|&s| s == signal);
    let Some(previous) = index.and_then(|i| PREVIOUS[i].get()) else { return };
    // SAFETY: the previous handler has the type that its flags say.
    unsafe {
        match previous.sa_sigaction {
            libc::SIG_DFL | libc::SIG_IGN => {
                libc::signal(signal, libc::SIG_DFL);
                // A fault happens again on return, and is then fatal; a signal that was sent has to be sent again.
                if (*info).si_code <= 0 {
                    libc::raise(signal);
                }
            }
            handler if previous.sa_flags & libc::SA_SIGINFO != 0 => {
                let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) = std::mem::transmute(handler);
                handler(signal, info, std::ptr::from_mut(context).cast());
            }
            handler => {
                let handler: extern "C" fn(i32) = std::mem::transmute(handler);
                handler(signal);
            }
        }
    }
}
