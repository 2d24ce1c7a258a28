//! Going through what the host asks of a copy of this machine first, without effect. What has been done once takes less time: the
//! programs' pages are in memory, and an engine that translates code has translated it, for copies as well.

use std::{fs, os::unix::net::UnixStream, thread, time::Duration};

use purlin_agent::{client::Client, protocol::Exec};
use rustix::{param::clock_ticks_per_second, process::setpriority_process};

use crate::{renew, session};

/// How often it is looked at what the guest does, until it has booted.
const LOOK: Duration = Duration::from_secs(5);
/// After so many looks a guest that is never calm goes through it all the same.
const LOOKS: u32 = 12;
/// How often later.
const LOOK_AGAIN: Duration = Duration::from_secs(60);
/// A guest that is busy for less than a fifth of the time has nothing more urgent to do.
const CALM: u64 = 5;
/// What an engine has translated it may have forgotten after so many seconds of other work.
const FORGOTTEN: u64 = 60;
const LEAST: i32 = 19;

/// Begins with it: when the guest has booted, and again when it has done much else.
pub fn begin() {
    let repeat = || {
        let mut last = None;
        loop {
            last = Some(wait_until_worth_it(last));
            // What it changes of a thread ends with it.
            if let Ok(thread) = thread::Builder::new().name("rehearsal".into()).spawn(rehearse) {
                let _ = thread.join();
            }
        }
    };
    // Without it, copies take longer.
    let _ = thread::Builder::new().name("calm".into()).spawn(repeat);
}

fn rehearse() {
    let _ = setpriority_process(None, LEAST);
    run_command();
    renew::rehearse();
}

/// Returns the time that the guest has been busy.
fn wait_until_worth_it(last: Option<u64>) -> u64 {
    let (mut before, mut looks) = (Times::now(), 0_u32);
    loop {
        thread::sleep(last.map_or(LOOK, |_| LOOK_AGAIN));
        let now = Times::now();
        looks = looks.saturating_add(1);
        if (now.are_calm_since(&before) || looks >= LOOKS)
            && last.is_none_or(|last| now.busy >= last + FORGOTTEN * clock_ticks_per_second())
        {
            return now.busy;
        }
        before = now;
    }
}

/// What all processors have done so far, in ticks.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
struct Times {
    busy: u64,
    idle: u64,
}

impl Times {
    fn now() -> Self {
        fs::read_to_string("/proc/stat").ok().and_then(|stat| Self::parse(&stat)).unwrap_or_default()
    }

    /// The first line of proc_stat(5): user, nice, system, idle, iowait, irq, softirq, steal; then what is in user already.
    fn parse(stat: &str) -> Option<Self> {
        let words = stat.lines().next()?.strip_prefix("cpu ")?.split_whitespace();
        let ticks: Vec<u64> = words.take(8).map(str::parse).collect::<Result<_, _>>().ok()?;
        let idle = ticks.get(3)? + ticks.get(4)?;
        Some(Self { busy: ticks.iter().sum::<u64>() - idle, idle })
    }

    fn are_calm_since(&self, before: &Self) -> bool {
        let (busy, idle) = (self.busy.saturating_sub(before.busy), self.idle.saturating_sub(before.idle));
        busy * CALM <= busy + idle
    }
}

fn run_command() {
    let Ok((ours, theirs)) = UnixStream::pair() else { return };
    let session = thread::Builder::new().spawn(move || session::serve(theirs));
    // What one asks a copy first is who it is, by way of a shell or not.
    let argv = ["sh", "-c", "hostname; cat /etc/machine-id"].map(|word| word.as_bytes().to_vec()).into();
    let exec = Exec { argv, with_stdin: true, ..Exec::default() };
    if let (Ok(_), Ok(client)) = (session, Client::over(ours)) {
        let _ = client.run(exec, b"");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_is_calm_that_is_idle_for_most_of_the_time() {
        let stat = "cpu  100 20 30 4000 50 6 7 8 90 10\ncpu0 1 1 1 1 1 1 1 1 1 1\n";
        let before = Times::parse(stat).unwrap();
        assert_eq!(before, Times { busy: 171, idle: 4050 });
        assert!(Times { busy: 271, idle: 4450 }.are_calm_since(&before));
        assert!(!Times { busy: 272, idle: 4450 }.are_calm_since(&before));
        assert_eq!([Times::parse(""), Times::parse("cpu  1 2 3"), Times::parse("cpu  a b")], [None; 3]);
        // This kernel's own, wherever the test runs.
        assert!(Times::now().busy > 0);
    }
}
