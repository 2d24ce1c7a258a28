//! Long work in the guest: a service of its own, asked for every now and then. So a connection that breaks ends
//! nothing, and a guest that stands still is noticed.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};

use crate::{debian::Debian, shell::target};

/// Far more than a step takes, also on a loaded machine.
pub const LIMIT: Duration = Duration::from_secs(2 * 3600);
/// Between two questions.
const PAUSE: Duration = Duration::from_secs(5);
/// Between two lines of progress.
const PROGRESS: Duration = Duration::from_secs(30);
/// Lines of a log for a message.
const TAIL: usize = 20;

/// Runs a shell script in the guest as root, in its home directory; returns what it wrote. It is an error if it fails,
/// or takes longer than `limit`.
pub fn run(guest: &mut Debian<'_>, name: &str, script: &str, limit: Duration) -> Result<String> {
    let start = Instant::now();
    guest.ssh_with(&format!("cat > {name}.sh"), script.as_bytes())?;
    let said = guest.ssh(&format!(
        "systemd-run --quiet --unit=soak-{name} --working-directory=/root --setenv=HOME=/root \
         sh -c 'sh {name}.sh > {name}.log 2>&1; echo $? > {name}.status' 2>&1 || echo failed"
    ))?;
    ensure!(said.is_empty(), "{name} cannot be started in the guest: {said}");
    let status = wait(guest, name, start, limit)?;
    let log = guest.ssh(&format!("cat {name}.log"))?;
    let kept = target().join("xtask").join(format!("soak-{name}.log"));
    fs::write(&kept, &log)?;
    ensure!(status == "0", "{name}: status {status} in the guest; see {}\n{}", kept.display(), tail(&log));
    Ok(log)
}

/// Its exit status, once it has ended.
fn wait(guest: &mut Debian<'_>, name: &str, start: Instant, limit: Duration) -> Result<String> {
    let mut told = start;
    loop {
        thread::sleep(PAUSE);
        guest.catch_up()?;
        let said = guest
            .ssh(&format!("cat {name}.status 2> /dev/null; cut -d ' ' -f 1 /proc/loadavg; tail -qn 1 {name}.log"))?;
        // The status is there or not; the load average has a point.
        let mut lines = said.lines();
        let first = lines.next().unwrap_or_default();
        if !first.is_empty() && !first.contains('.') {
            println!("soak: {name}: ended after {:.0?}", start.elapsed());
            return Ok(first.to_owned());
        }
        ensure!(
            start.elapsed() < limit,
            "{name} has not ended after {:.0?}; see {}",
            start.elapsed(),
            guest.log().display()
        );
        if told.elapsed() >= PROGRESS {
            told = Instant::now();
            let last: String = lines.next().unwrap_or_default().chars().take(90).collect();
            println!("soak: {name}: {:.0?}, load {first}: {last}", start.elapsed());
        }
    }
}

fn tail(log: &str) -> String {
    let lines: Vec<_> = log.lines().collect();
    lines[lines.len().saturating_sub(TAIL)..].join("\n")
}
