//! Whose turn it is while the machine is made another one: what wakes up because the clock and the network change can wait.
#![allow(unsafe_code)]

use std::io;

use nix::libc::{SCHED_FIFO, SCHED_OTHER, c_int, sched_param, sched_setscheduler};
use rustix::process::setpriority_process;

/// A tenth of what others get: on a machine that is busy it is done all the same.
const NICE: i32 = 10;

/// This thread, where it may, runs before all that is not urgent for the kernel itself.
pub struct Turn(());

impl Turn {
    /// From here on.
    pub fn first() -> Self {
        // Without it, it takes longer.
        let _ = set_policy(SCHED_FIFO, 1);
        Self(())
    }
}

impl Turn {
    /// From here on this thread, and what it starts, gives way to what the host, which has its answer, asks for next.
    pub fn then_last(self) {
        let _ = set_policy(SCHED_OTHER, 0);
        let _ = setpriority_process(None, NICE);
    }
}

/// Of this thread.
fn set_policy(policy: c_int, priority: c_int) -> io::Result<()> {
    let param = sched_param { sched_priority: priority };
    // SAFETY: the kernel reads the parameter; 0 is the calling thread.
    if unsafe { sched_setscheduler(0, policy, &raw const param) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use rustix::process::getpriority_process;

    use super::*;

    #[test]
    fn the_policy_is_what_it_was_afterwards() {
        // SAFETY: it has no pointers.
        let policy = || unsafe { nix::libc::sched_getscheduler(0) };
        let before = policy();
        let turn = Turn::first();
        let meanwhile = policy();
        turn.then_last();
        assert_eq!((policy(), getpriority_process(None).unwrap()), (before, NICE));
        assert!(meanwhile == SCHED_FIFO || meanwhile == before);
    }
}
