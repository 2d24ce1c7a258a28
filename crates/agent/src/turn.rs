//! Whose turn it is while the machine is made another one: what wakes up because the clock and the network change can wait.
#![allow(unsafe_code)]

use std::{
    io,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use nix::libc::{SCHED_FIFO, SCHED_OTHER, SCHED_RESET_ON_FORK, c_int, sched_param, sched_setscheduler};
use rustix::process::{Pid, getpriority_process, setpriority_process};

/// A tenth of what others get: on a machine that is busy it is done all the same.
const LATER: i32 = 10;
/// Others get next to nothing beside it.
const NOW: i32 = -20;
/// For so long at most.
const LONGEST: Duration = Duration::from_secs(1);

/// Until when others have much to do.
static STIR: Mutex<Option<Instant>> = Mutex::new(None);

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
    /// From here on this thread, and what it starts, gives way to what the host, which has its answer, asks for next: that is
    /// [`Urgent`] for some time.
    pub fn then_last(self, time: Duration) {
        *STIR.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now() + time.min(LONGEST));
        let _ = set_policy(SCHED_OTHER, 0);
        let _ = setpriority_process(None, LATER);
    }
}

/// What the host asks of a machine that is another one since a moment ago: it runs before what that has woken up.
#[derive(Clone, Copy, Debug)]
pub struct Urgent {
    until: Instant,
}

impl Urgent {
    /// This thread is, and what it starts, if there is need.
    pub fn begin() -> Option<Self> {
        let until = STIR.lock().unwrap_or_else(PoisonError::into_inner).filter(|until| *until > Instant::now())?;
        setpriority_process(None, NOW).ok().map(|()| Self { until })
    }

    /// Called in a process that this thread has started: what it starts itself will not be urgent.
    pub fn hand_down(self) {
        let _ = set_policy(SCHED_OTHER | SCHED_RESET_ON_FORK, 0);
    }

    /// When it is over.
    pub fn until(self) -> Instant {
        self.until
    }

    /// This thread, or another process, is one of many again.
    pub fn end(self, process: Option<Pid>) {
        // A process may have taken another priority.
        if getpriority_process(process) == Ok(NOW) {
            let _ = setpriority_process(process, 0);
        }
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
    use std::{
        io::{BufRead, BufReader, Write},
        os::unix::process::CommandExt,
        process::{Command, Stdio},
    };

    use super::*;

    #[test]
    fn the_policy_is_what_it_was_afterwards() {
        // SAFETY: it has no pointers.
        let policy = || unsafe { nix::libc::sched_getscheduler(0) };
        let before = policy();
        let turn = Turn::first();
        let meanwhile = policy();
        turn.then_last(Duration::ZERO);
        assert_eq!((policy(), getpriority_process(None).unwrap()), (before, LATER));
        assert!(meanwhile == SCHED_FIFO || meanwhile == before);
    }

    #[test]
    fn a_command_is_urgent_and_not_what_it_starts() {
        let urgent = Urgent { until: Instant::now() };
        // What this thread may, others of this user may, too.
        let may = setpriority_process(None, NOW).is_ok();
        let script = "cut -d ' ' -f 19 /proc/$$/stat; nice; read line; cut -d ' ' -f 19 /proc/$$/stat";
        let mut command = Command::new("sh");
        command.args(["-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped());
        // SAFETY: it makes a system call.
        unsafe {
            command.pre_exec(move || {
                urgent.hand_down();
                Ok(())
            })
        };
        let mut child = command.spawn().unwrap();
        urgent.end(None);
        assert_eq!(getpriority_process(None), Ok(0));
        let mut output = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut next = || output.next().unwrap().unwrap();
        assert_eq!([next(), next()], [if may { "-20" } else { "0" }, "0"]);
        urgent.end(Some(Pid::from_child(&child)));
        child.stdin.take().unwrap().write_all(b"\n").unwrap();
        assert_eq!(next(), "0");
        assert!(child.wait().unwrap().success());
    }
}
