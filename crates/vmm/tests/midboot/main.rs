//! Debian's boot under the translator, saved and continued in a new machine at random moments of it: the guest must
//! not notice.
//!
//! `cargo xtask midboot` runs it; alone it needs `PURLIN_TEST_KERNEL` and `PURLIN_TEST_INITRD`, the kernel and the
//! initramfs that `purlin run debian` boots. `PURLIN_TEST_SEED` repeats the moments of a run (as far as the guest is
//! in the same place at the same time), `PURLIN_TEST_MOMENTS` says how many there are to be.

mod console;
mod guest;
#[path = "../support/mod.rs"]
mod support;
mod transcript;

use std::{
    collections::BTreeSet,
    env,
    path::PathBuf,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use crate::{guest::Guest, transcript::Transcript};

/// How many moments, if nothing else is said.
const MOMENTS: u32 = 100;
/// How many of them are in one boot.
const PER_BOOT: u32 = 10;

#[test]
#[ignore = "takes a minute, and Debian's kernel, which `cargo xtask midboot` provides"]
fn debian_boots_though_it_is_moved_to_a_new_machine_at_random_moments() {
    let files = Files::from_environment();
    let seed = number("PURLIN_TEST_SEED").unwrap_or_else(time_of_day);
    let moments = number("PURLIN_TEST_MOMENTS").map_or(MOMENTS, |n| n as u32);
    println!("PURLIN_TEST_SEED={seed}");

    let mut random = Random(seed);
    let references = [1, 2].map(|cpus| undisturbed(&files, cpus));
    let known: BTreeSet<String> = references.iter().flat_map(|(_, transcript)| transcript.warnings()).collect();
    let mut done = 0;
    for boot in 0.. {
        if done >= moments {
            break;
        }
        let (length, _) = references[boot % 2];
        let mut times: Vec<Duration> =
            (0..PER_BOOT.min(moments - done)).map(|_| length.mul_f64(random.fraction())).collect();
        times.sort();
        let cpus = boot as u32 % 2 + 1;
        let (moves, transcript) = disturbed(&files, cpus, &times);
        println!("boot {boot} with {cpus} CPU(s): moved {moves} times, {:.2?} of running time", transcript.ran);
        transcript.check(cpus, &known);
        done += moves;
        // A guest that has ended before its last moment leaves it to the next boot, but not always.
        assert!(boot < 3 * (moments / PER_BOOT) as usize + 3, "{done} moments in {boot} boots");
    }
}

/// A boot that nobody disturbs, and how long it takes.
fn undisturbed(files: &Files, cpus: u32) -> (Duration, Transcript) {
    let (_, transcript) = disturbed(files, cpus, &[]);
    println!("undisturbed with {cpus} CPU(s): {:.2?}", transcript.ran);
    transcript.check(cpus, &transcript.warnings());
    (transcript.ran, transcript)
}

/// A boot that is moved after so much running time each; returns how often it was moved before it had ended.
fn disturbed(files: &Files, cpus: u32, times: &[Duration]) -> (u32, Transcript) {
    let mut guest = Guest::start(files, cpus);
    let mut moves = 0;
    for &time in times {
        if !guest.run_until(time) || !guest.move_to_a_new_machine() {
            break;
        }
        moves += 1;
    }
    (moves, guest.finish())
}

/// What is booted.
struct Files {
    kernel: PathBuf,
    initrd: PathBuf,
}

impl Files {
    fn from_environment() -> Self {
        let file = |variable: &str| {
            let path = env::var_os(variable).map(PathBuf::from);
            let path = path.unwrap_or_else(|| panic!("{variable} is not set: run `cargo xtask midboot`"));
            assert!(path.is_file(), "{variable}: there is no file {}", path.display());
            path
        };
        Self { kernel: file("PURLIN_TEST_KERNEL"), initrd: file("PURLIN_TEST_INITRD") }
    }
}

fn number(variable: &str) -> Option<u64> {
    let text = env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable}: '{text}' is no number")))
}

fn time_of_day() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64)
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// 0 to 1.
    fn fraction(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// Waits for a condition; false if it has not come within `patience`.
fn wait_for(patience: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    while !condition() {
        if start.elapsed() > patience {
            return false;
        }
        std::thread::sleep(Duration::from_micros(500));
    }
    true
}
