//! Processor time that a process has taken.

use std::{fs, time::Duration};

/// All its threads' (the first number of schedstat, Documentation/scheduler/sched-stats.rst). Threads that have ended are
/// not in it: no machine here has such that did work.
pub fn time(process: u32) -> Duration {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    let of = |task: fs::DirEntry| {
        let text = fs::read_to_string(task.path().join("schedstat")).ok()?;
        text.split_whitespace().next()?.parse::<u64>().ok()
    };
    Duration::from_nanos(tasks.filter_map(of).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_grows_with_work() {
        let before = time(std::process::id());
        assert!(before > Duration::ZERO);
        while time(std::process::id()) < before + Duration::from_millis(5) {}
    }
}
