//! stress-ng with --verify: each stressor compares what it computes with what must come out.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::job;
use crate::debian::Debian;

/// Two workers of each for two vCPUs, so that they are always more than there are processors.
const STRESSORS: [&str; 6] = ["--cpu 2", "--vm 2 --vm-bytes 64M", "--fork 2", "--switch 2", "--signal 2", "--timer 2"];
/// What the workers need to end, on a loaded machine.
const MARGIN: Duration = Duration::from_secs(300);

/// Stresses the guest for so many minutes.
pub fn run(guest: &mut Debian<'_>, minutes: u32) -> Result<()> {
    let script = format!("exec stress-ng --verify --metrics-brief --timeout {minutes}m {}", STRESSORS.join(" "));
    let limit = Duration::from_secs(u64::from(minutes) * 60) + MARGIN;
    let log = job::run(guest, "stress", &script, limit)?;
    let failures: Vec<_> = log.lines().filter(|line| is_failure(line)).collect();
    ensure!(failures.is_empty(), "stress-ng says:\n{}", failures.join("\n"));
    for line in log.lines().filter(|line| line.contains("metrc:") || line.contains("successful run")) {
        println!("{line}");
    }
    Ok(())
}

/// A line of a stressor whose result was wrong, or that did not get as far as that.
fn is_failure(line: &str) -> bool {
    line.contains("] fail:") || line.contains(": fail:") || line.contains("unsuccessful run")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_told_from_what_else_is_said() {
        assert!(is_failure(
            "stress-ng: fail:  [1234] stress-ng-cpu: ackermann error detected, ackermann(3,7) miscalculated"
        ));
        assert!(is_failure("stress-ng: info:  [1200] unsuccessful run completed in 60.04s"));
        assert!(!is_failure("stress-ng: info:  [1200] successful run completed in 60.04s (1 min, 0.04 secs)"));
        assert!(!is_failure("stress-ng: info:  [1200] failed: 0"));
    }
}
