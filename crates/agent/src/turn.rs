//! Whose turn it is while the machine is made another one: what wakes up because the clock and the network change can wait.
#![allow(unsafe_code)]

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

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

    /// From here on this thread, and what it starts, gives way to what the host, which has its answer, asks for next.
    pub fn then_last(self) {
        let _ = set_policy(SCHED_OTHER, 0);
        let _ = setpriority_process(None, NICE);
    }
}

/// The most that cgroup v2 knows (cpu.weight): a hundred times what others have.
const MOST: &str = "10000";

/// While this is there, the agent and what it has started have the processor before all other services: it is their control
/// group that has. (The unit sees to it that the agent has one beside all of those.)
pub struct Urgent {
    file: PathBuf,
    before: String,
}

/// Whether there is one.
static IS_URGENT: AtomicBool = AtomicBool::new(false);

impl Urgent {
    /// From here on; `None` where there is no such thing, or it is so already.
    pub fn begin() -> Option<Self> {
        let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
        Self::begin_in(&weight_file(&groups)?)
    }

    fn begin_in(file: &Path) -> Option<Self> {
        let before = fs::read_to_string(file).ok()?;
        if IS_URGENT.swap(true, Ordering::SeqCst) {
            return None;
        }
        let urgent = Self { file: file.to_owned(), before };
        // Where it fails, that it is put back does no harm.
        let _ = fs::write(file, MOST);
        Some(urgent)
    }
}

impl Drop for Urgent {
    fn drop(&mut self) {
        let _ = fs::write(&self.file, &self.before);
        IS_URGENT.store(false, Ordering::SeqCst);
    }
}

/// Where the weight is of the group of version 2 that a process is in by its /proc/PID/cgroup.
fn weight_file(groups: &str) -> Option<PathBuf> {
    let group = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(Path::new("/sys/fs/cgroup").join(group).join("cpu.weight"))
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

    #[test]
    fn the_weight_is_what_it_was_afterwards() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("cpu.weight");
        assert!(Urgent::begin_in(&file).is_none());
        fs::write(&file, "200\n").unwrap();
        let read = || fs::read_to_string(&file).unwrap();
        for _ in 0..2 {
            let urgent = Urgent::begin_in(&file).unwrap();
            // What it was is known to the first only.
            assert!(Urgent::begin_in(&file).is_none());
            assert_eq!(read(), MOST);
            drop(urgent);
            assert_eq!(read(), "200\n");
        }
    }

    #[test]
    fn a_group_of_version_2_is_known_among_others() {
        let groups = "4:memory:/x\n1:cpu:/\n0::/system.slice/purlin-agent.service\n";
        let file = Path::new("/sys/fs/cgroup/system.slice/purlin-agent.service/cpu.weight");
        assert_eq!(weight_file(groups).unwrap(), file);
        assert_eq!(weight_file("1:cpu:/\n"), None);
    }
}
