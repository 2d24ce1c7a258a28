//! Boots Debian's kernels: what must be there is there, nothing that QEMU would not warn of, and in what time.

use std::{collections::BTreeSet, time::Duration};

use anyhow::{Context, Result, ensure};
use clap::Args;
use purlin_debian::guest::Guest;

use crate::{
    boot_nested,
    figures::median,
    guests::Kernel,
    machine::{self, BedFailed, Boot, Engine},
};

/// What to boot.
#[derive(Args)]
pub struct BootArgs {
    /// Kernels; all (with KVM those for amd64) if not given
    #[arg(long, value_enum)]
    pub kernel: Vec<Kernel>,
    /// Numbers of CPUs; 1, 2 and 4 (with KVM 1 and 2) if not given
    #[arg(long)]
    pub cpus: Vec<u32>,
    /// Engine; KVM is tried inside emulated AMD-V
    #[arg(long, value_enum, default_value_t = Engine::Translator)]
    pub engine: Engine,
    /// How often each
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub repeat: u32,
    /// Only compare the time to userspace with QEMU's: the cloud kernel with one CPU, in turn, so many times
    #[arg(long, value_name = "ROUNDS")]
    pub timing: Option<usize>,
    /// We are inside the emulated AMD-V already
    #[arg(long, hide = true)]
    pub inside: bool,
}

impl BootArgs {
    /// All that an engine must pass.
    pub fn on(engine: Engine) -> Self {
        Self { kernel: vec![], cpus: vec![], engine, repeat: 1, timing: None, inside: false }
    }

    /// The kernels meant.
    pub fn kernels(&self) -> &[Kernel] {
        match (self.kernel.is_empty(), self.engine) {
            (false, _) => &self.kernel,
            (true, Engine::Translator) => &Kernel::ALL,
            (true, Engine::Kvm) => &[Kernel::Cloud, Kernel::Amd64],
        }
    }

    /// The numbers of CPUs meant. Emulated AMD-V has two to give.
    pub fn cpus(&self) -> &[u32] {
        match (self.cpus.is_empty(), self.engine) {
            (false, _) => &self.cpus,
            (true, Engine::Translator) => &[1, 2, 4],
            (true, Engine::Kvm) => &[1, 2],
        }
    }
}

/// Boots every kernel with every number of CPUs.
pub fn run(args: &BootArgs) -> Result<()> {
    if !args.inside {
        machine::build()?;
        if args.engine == Engine::Kvm {
            return boot_nested::run(args);
        }
    }
    if let Some(rounds) = args.timing {
        return compare_times(args.engine, rounds);
    }
    let mut ratios = Vec::new();
    for kernel in args.kernels() {
        let guest = kernel.guest()?;
        for &cpus in args.cpus() {
            ratios.extend(boot(&guest, *kernel, cpus, args)?);
        }
    }
    say_ratio(args.engine, ratios);
    Ok(())
}

/// Boots one kernel with one number of CPUs as often as asked for. How many times QEMU's time each took to userspace.
fn boot(guest: &Guest, kernel: Kernel, cpus: u32, args: &BootArgs) -> Result<Vec<f64>> {
    let name = format!("{}-{cpus}-{}", kernel.name(), args.engine.name());
    let reference = Boot::run(machine::qemu(guest, cpus, args.engine), &format!("{name}-qemu"))?;
    came_to_its_end(&reference).with_context(|| format!("{name}: QEMU itself does not boot it"))?;
    let mut known = warnings(&reference);
    let mut ratios = Vec::new();
    for number in 1..=args.repeat {
        let boot = Boot::run(machine::purlin(guest, cpus, args.engine), &name)?;
        if !warnings(&boot).is_subset(&known) {
            // Some depend on the host's load: QEMU has a second chance to give them.
            known.extend(warnings(&Boot::run(machine::qemu(guest, cpus, args.engine), &format!("{name}-qemu"))?));
        }
        check(&boot, cpus, &known).with_context(|| format!("{name}; see target/xtask/boot/{name}.log"))?;
        let [ours, theirs] = [&boot, &reference].map(|boot| boot.to_userspace.unwrap_or_default());
        println!("{name} ({number}/{}): {ours:.2?} to userspace, QEMU {theirs:.2?}", args.repeat);
        ratios.push(ours.as_secs_f64() / theirs.as_secs_f64());
    }
    Ok(ratios)
}

/// Whether process 1 did. If it is not known why not, nothing is known of Purlin.
fn came_to_its_end(boot: &Boot) -> Result<()> {
    match boot.says("done").next() {
        Some(_) => Ok(()),
        None => Err(BedFailed(boot.tail()).into()),
    }
}

/// The promises of a boot.
fn check(boot: &Boot, cpus: u32, known_warnings: &BTreeSet<String>) -> Result<()> {
    ensure!(boot.to_userspace.is_some(), "it did not reach userspace: {}", boot.tail());
    let seen = boot.says("cpus").next();
    ensure!(seen == Some(&cpus.to_string()), "the guest sees {seen:?} CPUs of {cpus}");
    ensure!(boot.says("done").next().is_some(), "process 1 did not come to its end: {}", boot.tail());
    let new: Vec<_> = warnings(boot).difference(known_warnings).cloned().collect();
    ensure!(new.is_empty(), "warnings that QEMU does not give: {new:#?}");
    ensure!(boot.transcript.contains("reboot: Power down"), "the guest did not power off");
    ensure!(boot.status.code() == Some(0), "{}: {}", boot.status, boot.messages.trim());
    Ok(())
}

/// The kernel's warnings, without what differs from boot to boot.
fn warnings(boot: &Boot) -> BTreeSet<String> {
    let slow_host = |text: &String| SLOW_HOST.iter().any(|said| text.contains(said));
    boot.says("warning").map(without_numbers).filter(|text| !slow_host(text)).collect()
}

/// What kernels say on a host so busy that a virtual processor stood still for long: a timer's interrupt came when the
/// next was due (kernel/time/hrtimer.c), two clocks were read too far apart (kernel/time/clocksource.c).
const SLOW_HOST: [&str; 3] =
    ["hrtimer: interrupt took", "clocksource: ", "Marking TSC unstable due to clocksource watchdog"];

/// `[    0.123456] CPU1: 0x1f` → `CPU#: #`.
fn without_numbers(line: &str) -> String {
    let text = line.split_once("] ").map_or(line, |(_, text)| text);
    // The bytes around an instruction have the addresses in them to which the kernel was moved.
    if text.starts_with("Code: ") {
        return "Code: #".into();
    }
    let mut out = String::new();
    for part in text.split_inclusive(|c: char| !c.is_ascii_alphanumeric()) {
        let word = part.trim_end_matches(|c: char| !c.is_ascii_alphanumeric());
        let hexadecimal = word.bytes().all(|b| b.is_ascii_hexdigit() || b == b'x');
        if hexadecimal && word.contains(|c: char| c.is_ascii_digit()) {
            out.push('#');
        } else {
            out.extend(word.chars().map(|c| if c.is_ascii_digit() { '#' } else { c }));
        }
        out.push_str(&part[word.len()..]);
    }
    out
}

/// How many times QEMU's time a boot may take.
fn most(engine: Engine) -> f64 {
    match engine {
        Engine::Translator => 2.0,
        Engine::Kvm => 1.3,
    }
}

/// Boots the cloud kernel under both in turn, so that a change of the host's load meets both, and compares medians.
fn compare_times(engine: Engine, rounds: usize) -> Result<()> {
    ensure!(rounds > 0, "--timing 0 measures nothing");
    let guest = Kernel::Cloud.guest()?;
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        ours.push(time(Boot::run(machine::purlin(&guest, 1, engine), "time-purlin")?)?);
        theirs.push(time(Boot::run(machine::qemu(&guest, 1, engine), "time-qemu")?)?);
    }
    let (ours, theirs) = (median(ours), median(theirs));
    println!("start to userspace, medians of {rounds}: purlin {ours:.2?}, QEMU {theirs:.2?}");
    say_ratio(engine, vec![ours.as_secs_f64() / theirs.as_secs_f64()]);
    Ok(())
}

/// Says the median. A figure, not a verdict: timing fails no test.
fn say_ratio(engine: Engine, ratios: Vec<f64>) {
    let (ratio, most) = (median(ratios), most(engine));
    println!("start to userspace: {ratio:.2} times QEMU's");
    if ratio > most {
        println!("MORE than the {most} times that SPECIFICATION.md promises");
    }
}

fn time(boot: Boot) -> Result<Duration> {
    boot.to_userspace.ok_or_else(|| BedFailed(boot.tail()).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_do_not_make_a_warning_new() {
        for (one, other) in [
            ("[    0.1] TSC: 2399.9 MHz", "[   12.3] TSC: 3100.0 MHz"),
            ("[    0.1] CPU1: bad 0x1f", "[    0.2] CPU3: bad 0xab12"),
            ("[    0.1] at ffffffff81000000+", "[    0.1] at ffffffff82345678+"),
            ("[    0.1] Code: 48 c7 c7 ba fe <0f> 0b", "[    0.1] Code: 48 c7 c7 12 34 <0f> 0b"),
        ] {
            assert_eq!(without_numbers(one), without_numbers(other));
        }
        assert_ne!(without_numbers("[    0.1] no TSC"), without_numbers("[    0.1] no HPET"));
        assert_ne!(without_numbers("[    0.1] x2apic off"), without_numbers("[    0.1] apic off"));
    }
}
