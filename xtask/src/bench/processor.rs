//! Processor time that processes have taken.

use std::time::Duration;

use nix::{time::clock_getcpuclockid, unistd::Pid};

/// All its threads', those that have ended too, to the nanosecond. (What proc(5) says of a running thread is as old as
/// the last tick.) None of one that is no more.
pub fn time(processes: &[u32]) -> Duration {
    let of = |process: &u32| {
        let pid = Pid::from_raw(process.cast_signed());
        clock_getcpuclockid(pid).and_then(|clock| clock.now()).map_or(Duration::ZERO, Duration::from)
    };
    processes.iter().map(of).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_grows_with_work() {
        let before = time(&[std::process::id()]);
        assert!(before > Duration::ZERO);
        while time(&[std::process::id()]) < before + Duration::from_millis(5) {}
    }

    #[test]
    fn another_process_has_its_own() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        // It may have had none yet.
        let taken = std::iter::repeat_with(|| time(&[child.id()])).find(|taken| *taken > Duration::ZERO).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(taken < Duration::from_secs(1), "{taken:?}");
        assert_eq!(time(&[child.id()]), Duration::ZERO);
    }
}
