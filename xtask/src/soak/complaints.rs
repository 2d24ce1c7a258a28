//! What a guest's kernel says when something is wrong with it, with its clocks, or with what its programs computed.

/// Parts of such lines.
const SIGNS: [&str; 16] = [
    "BUG:",
    "kernel BUG at",
    "WARNING:",
    "Oops",
    "Kernel panic",
    "lockup",
    "detected stall",
    "self-detected",
    "blocked for more than",
    "Call Trace",
    "general protection",
    "unable to handle",
    // Programs: none of those that run here faults when it computes right.
    "segfault at",
    "traps:",
    // Clocks.
    "clocksource: timekeeping watchdog",
    "TSC unstable",
];

/// The lines of a kernel log that complain.
pub fn of(log: &str) -> Vec<&str> {
    log.lines().filter(|line| SIGNS.iter().any(|sign| line.contains(sign))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_boot_is_no_complaint_and_a_stall_is_one() {
        let boot = "[    0.000000] Linux version 6.1.0\n[    1.2] systemd[1]: Starting Load Kernel Modules...\n\
                    [    0.1] TSC deadline timer available\n[    0.2] smpboot: Total of 2 processors activated\n";
        assert!(of(boot).is_empty());
        let stall = "[   61.0] rcu: INFO: rcu_preempt self-detected stall on CPU";
        let lockup = "[   88.1] watchdog: BUG: soft lockup - CPU#1 stuck for 22s! [cc1:812]";
        let fault = "[   90.1] cc1[77]: segfault at 8 ip 0000555500001234 sp 00007ffd00000000 error 4 in cc1";
        for line in [stall, lockup, fault] {
            assert_eq!(of(&format!("{boot}{line}\n")), [line]);
        }
    }
}
