//! Shares of real busy processes, in groups as this host has them.
//!
//! What measures for tens of seconds is left out unless it is asked for:
//! `cargo test -p purlin-shares -- --ignored --test-threads 1`, as root.

use std::{
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use purlin_shares::{
    Group, GroupError, Means, Shares, names,
    throttle::{Governor, Throttle},
};

/// How long the enforcement is looked at.
const LONG: Duration = Duration::from_secs(12);
/// Of so many measurements the median counts.
const MEASUREMENTS: usize = 3;

/// A process that does nothing but use time, on one CPU. It is ended at the end, and its group removed.
struct Busy {
    child: Child,
    group: Option<Group>,
}

impl Busy {
    /// On the CPU of that number.
    fn start(name: &str, shares: &Shares, cpu: &str) -> Self {
        let name = format!("test-{}-{name}", std::process::id());
        let (mut group, how) = Group::create(&name, shares).unwrap();
        assert_ne!(how.cpu, Means::Nothing);
        let script = "while :; do :; done";
        let child = Command::new("taskset").args(["-c", cpu, "sh", "-c", script]).stdin(Stdio::null()).spawn().unwrap();
        group.add(child.id()).unwrap();
        Self { child, group: Some(group) }
    }

    fn group(&mut self) -> &mut Group {
        self.group.as_mut().unwrap()
    }

    fn used(&self) -> u64 {
        self.group.as_ref().unwrap().usage().unwrap().cpu_ns
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let removed = self.group.take().unwrap().remove();
        if !thread::panicking() {
            removed.unwrap();
        }
    }
}

/// Whether this host has control groups for this user; else a test has nothing to test.
fn has_groups() -> bool {
    let (group, how) = Group::create(&format!("test-{}-try", std::process::id()), &Shares::default()).unwrap();
    group.remove().unwrap();
    matches!(how.cpu, Means::CgroupV1 | Means::CgroupV2)
}

fn with_weight(cpu_weight: u32) -> Shares {
    Shares { cpu_weight, ..Shares::default() }
}

fn with_cap(percent: u32) -> Shares {
    Shares { cpu_cap: Some(percent), ..Shares::default() }
}

fn median(mut measure: impl FnMut() -> f64) -> f64 {
    let mut values: Vec<_> = (0..MEASUREMENTS).map(|_| measure()).collect();
    values.sort_by(f64::total_cmp);
    println!("{values:?}");
    values[MEASUREMENTS / 2]
}

#[track_caller]
fn assert_within_5_percent(value: f64, expected: f64) {
    assert!((value / expected - 1.0).abs() < 0.05, "{value} instead of {expected}");
}

/// How many ns of CPU time in each second of the next [`LONG`] it takes, in percent.
fn percent(busy: &Busy) -> f64 {
    let (before, start) = (busy.used(), Instant::now());
    thread::sleep(LONG);
    (busy.used() - before) as f64 / start.elapsed().as_nanos() as f64 * 100.0
}

#[test]
fn a_group_is_found_again_and_removed() {
    if !has_groups() {
        eprintln!("skipped: this user can make no control groups here");
        return;
    }
    let mut busy = Busy::start("found", &with_weight(300), "0");
    let name = busy.group().name().to_owned();
    assert!(names().contains(&name), "{:?}", names());
    let found = Group::find(&name).unwrap().unwrap();
    assert_eq!(found.how(), busy.group().how());
    assert!(!found.is_empty());
    assert!(found.remove().is_err(), "a group in use is removed");
    // Made again it is the same one.
    let (again, _) = Group::create(&name, &with_weight(100)).unwrap();
    assert!(!again.is_empty());
    while busy.used() < 10_000_000 {
        thread::sleep(Duration::from_millis(10));
    }
    drop(busy);
    assert!(Group::find(&name).unwrap().is_none());
    assert!(!names().contains(&name));
}

#[test]
fn leftovers_are_removed_by_name() {
    if !has_groups() {
        return;
    }
    let name = format!("test-{}-left", std::process::id());
    drop(Group::create(&name, &Shares::default()).unwrap());
    assert!(names().contains(&name));
    let left = Group::find(&name).unwrap().unwrap();
    assert!(left.is_empty());
    left.remove().unwrap();
    assert!(!names().contains(&name));
}

#[test]
fn names_and_shares_that_do_not_do_are_refused() {
    for name in ["", "a/b", "..", ".hidden", "ä", &"x".repeat(65)] {
        assert!(matches!(Group::create(name, &Shares::default()), Err(GroupError::Name(_))), "{name}");
    }
    assert!(matches!(Group::create("test-weight", &with_weight(0)), Err(GroupError::Weight(0))));
    assert!(Group::find("test-weight").unwrap().is_none());
}

/// The process that is to hold more memory than it may is killed, and nobody else.
#[test]
fn memory_is_limited() {
    let shares = Shares { memory_max: Some(64 << 20), ..Shares::default() };
    let name = format!("test-{}-memory", std::process::id());
    let (mut group, how) = match Group::create(&name, &shares) {
        Err(GroupError::NoMemoryLimit) => return eprintln!("skipped: memory cannot be limited here"),
        other => other.unwrap(),
    };
    assert_ne!(how.memory, Means::Nothing);
    let hold = |bytes: u64| {
        // It waits for the end of its input, so that it is in the group before it takes anything.
        let script = format!("read line; x=$(head -c {bytes} /dev/zero | tr '\\0' x); echo ${{#x}}");
        Command::new("sh").args(["-c", &script]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap()
    };
    let mut holds = |bytes: u64| {
        let child = hold(bytes);
        group.add(child.id()).unwrap();
        let output = child.wait_with_output().unwrap();
        String::from_utf8_lossy(&output.stdout).trim() == bytes.to_string()
    };
    let held = [holds(8 << 20), holds(256 << 20)];
    group.remove().unwrap();
    assert_eq!(held, [true, false]);
}

#[test]
#[ignore = "measures for a minute"]
fn twice_the_weight_is_twice_the_time() {
    assert!(has_groups(), "this user can make no control groups here");
    let (one, two) = (Busy::start("one", &with_weight(100), "0"), Busy::start("two", &with_weight(200), "0"));
    let ratio = median(|| {
        let before = (one.used(), two.used());
        thread::sleep(LONG);
        (two.used() - before.1) as f64 / (one.used() - before.0) as f64
    });
    assert_within_5_percent(ratio, 2.0);
}

#[test]
#[ignore = "measures for two minutes"]
fn a_cap_holds_and_can_be_changed() {
    assert!(has_groups(), "this user can make no control groups here");
    let mut busy = Busy::start("capped", &with_cap(30), "1");
    assert_within_5_percent(median(|| percent(&busy)), 30.0);
    assert!(busy.group().usage().unwrap().throttled_ns > 0);
    busy.group().set(&with_cap(15)).unwrap();
    assert_within_5_percent(median(|| percent(&busy)), 15.0);
    busy.group().set(&Shares::default()).unwrap();
    assert!(percent(&busy) > 20.0, "the cap is still there");
}

/// Threads that use time while they may.
struct Spinning {
    runs: AtomicBool,
    ends: AtomicBool,
}

impl Throttle for Spinning {
    fn pause_vcpus(&self) {
        self.runs.store(false, Ordering::Relaxed);
    }

    fn resume_vcpus(&self) {
        self.runs.store(true, Ordering::Relaxed);
    }
}

/// While it lives this process has its time before all others, where there are control groups: a cap is what it gets at
/// most, and on a busy host it would get less.
struct First(Option<Group>);

impl First {
    fn new() -> Self {
        if !has_groups() {
            return Self(None);
        }
        let name = format!("test-{}-first", std::process::id());
        let (mut group, _) = Group::create(&name, &with_weight(Shares::MAX_WEIGHT)).unwrap();
        group.add(std::process::id()).unwrap();
        Self(Some(group))
    }
}

impl Drop for First {
    fn drop(&mut self) {
        let Some(group) = self.0.take() else { return };
        // Back to where other processes of this host are, or the group could not be removed.
        for hierarchy in ["cpu", "cpuacct", "cpu,cpuacct", "memory", "blkio", "."] {
            let _ = std::fs::write(format!("/sys/fs/cgroup/{hierarchy}/cgroup.procs"), std::process::id().to_string());
        }
        let _ = group.remove();
    }
}

#[test]
#[ignore = "measures for a minute"]
fn a_process_keeps_its_cap_itself() {
    let _first = First::new();
    let spinning = Arc::new(Spinning { runs: AtomicBool::new(true), ends: AtomicBool::new(false) });
    let threads: Vec<_> = (0..2)
        .map(|_| {
            let spinning = spinning.clone();
            thread::spawn(move || {
                while !spinning.ends.load(Ordering::Relaxed) {
                    if !spinning.runs.load(Ordering::Relaxed) {
                        thread::sleep(Duration::from_millis(1));
                    }
                }
            })
        })
        .collect();
    let governor = Governor::start(Some(40), spinning.clone()).unwrap();
    let used = || rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    let measure = || {
        let (before, start) = (used(), Instant::now());
        thread::sleep(LONG);
        let after = used();
        let ns = (after.tv_sec - before.tv_sec) * 1_000_000_000 + after.tv_nsec - before.tv_nsec;
        ns as f64 / start.elapsed().as_nanos() as f64 * 100.0
    };
    assert_within_5_percent(median(measure), 40.0);
    assert!(governor.throttled_ns() > 0);
    governor.set(None);
    assert!(median(measure) > 60.0, "the cap is still there");
    drop(governor);
    assert!(spinning.runs.load(Ordering::Relaxed));
    spinning.ends.store(true, Ordering::Relaxed);
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}
