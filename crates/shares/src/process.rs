//! Without control groups: the nice values of a process's threads.

use std::{fs, io, path::Path};

use rustix::process::{Pid, getpriority_process, setpriority_process};

use crate::{GroupError, Shares, Usage};

/// The nice value of a weight: each step is a quarter more or less (the kernel's sched_prio_to_weight).
pub fn nice(weight: u32) -> i32 {
    let ratio = f64::from(weight) / f64::from(Shares::DEFAULT_WEIGHT);
    (-ratio.ln() / 1.25f64.ln()).round().clamp(-20.0, 19.0) as i32
}

/// Gives all threads of a process the nice value of a weight; threads that they start have it too. Without privileges a
/// weight above everybody's is not to be had, and none can be raised again: then they keep what they have.
pub fn set(pid: u32, shares: &Shares) -> Result<(), GroupError> {
    let failed = |error: io::Error| GroupError::Priority { pid, error };
    let wanted = nice(shares.cpu_weight);
    for thread in threads(pid).map_err(failed)? {
        let id = i32::try_from(thread).ok().and_then(Pid::from_raw);
        match setpriority_process(id, wanted) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(error @ (rustix::io::Errno::ACCESS | rustix::io::Errno::PERM)) => {
                if getpriority_process(id).is_ok_and(|now| now <= wanted) {
                    return Err(failed(error.into()));
                }
                tracing::debug!("thread {thread} keeps its priority: {error}");
            }
            Err(error) => return Err(failed(error.into())),
        }
    }
    Ok(())
}

fn threads(pid: u32) -> io::Result<Vec<u32>> {
    let tasks = fs::read_dir(Path::new("/proc").join(pid.to_string()).join("task"))?;
    Ok(tasks.filter_map(|task| task.ok()?.file_name().to_str()?.parse().ok()).collect())
}

/// Whether this thread is all there is of the process.
pub fn has_one_thread() -> bool {
    threads(std::process::id()).is_ok_and(|threads| threads.len() == 1)
}

/// What a process has taken; nothing if it is gone.
pub fn usage(pid: u32) -> Usage {
    let directory = Path::new("/proc").join(pid.to_string());
    // Its own line counts the threads that have ended too, in ticks of 10 ms.
    let stat = fs::read_to_string(directory.join("stat")).unwrap_or_default();
    let pages = fs::read_to_string(directory.join("statm")).unwrap_or_default();
    let resident = pages.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok()).unwrap_or(0);
    Usage { cpu_ns: cpu_ns(&stat), memory: resident * rustix::param::page_size() as u64, throttled_ns: 0 }
}

/// utime and stime (proc_pid_stat(5), fields 14 and 15).
fn cpu_ns(stat: &str) -> u64 {
    // The name of the program may have blanks and parentheses.
    let Some((_, behind)) = stat.rsplit_once(')') else { return 0 };
    let ticks: u64 = behind.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
    ticks * (1_000_000_000 / rustix::param::clock_ticks_per_second())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nice_value_is_a_quarter() {
        let expected = [(100, 0), (80, 1), (125, -1), (50, 3), (200, -3), (1, 19), (10_000, -20), (1000, -10)];
        for (weight, value) in expected {
            assert_eq!(nice(weight), value, "{weight}");
        }
    }

    #[test]
    fn cpu_time_is_found_behind_any_name() {
        let stat = "7 (a) b (c)) S 1 7 7 0 -1 4194304 100 0 0 0 250 50 0 0 20 0 1 0 100 1000 10";
        assert_eq!(cpu_ns(stat), 3_000_000_000);
        assert_eq!(cpu_ns(""), 0);
    }

    #[test]
    fn this_process_has_taken_something() {
        let usage = usage(std::process::id());
        assert!(usage.memory > 0, "{usage:?}");
    }
}
