//! A profile for people.

use std::fmt::Write;

use purlin_vmm::profile::{Place, Report};

/// Addresses that are listed.
pub const HOTTEST: usize = 30;
/// Emulated instructions that are listed.
const EMULATED: usize = 20;

/// The report.
pub fn report(report: &Report) -> String {
    let mut text = String::new();
    head(&mut text, report);
    places(&mut text, report);
    hottest(&mut text, report);
    emulated(&mut text, report);
    let rows = |text: &mut String, title, rows: &[(&str, u64)]| {
        let _ = writeln!(text, "\n{title}");
        for (label, count) in rows {
            let _ = writeln!(text, "  {label:<42}{count:>12}");
        }
    };
    let exits: Vec<_> = report.exits.iter().map(|(kind, count)| (kind.label(), *count)).collect();
    rows(&mut text, "How often translated code was left", &exits);
    let made = &report.translation;
    let translation = [
        ("blocks for the first executions", made.cold),
        ("blocks for speed, of what is hot", made.hot),
        ("bytes of translated code", made.bytes),
        ("blocks that made way for one for speed", made.replaced),
        ("blocks whose source was stored to", made.killed),
        ("times that the code cache was emptied", made.cleared),
    ];
    rows(&mut text, "What was translated", &translation);
    text
}

fn head(text: &mut String, report: &Report) {
    let (vcpus, samples) = (report.vcpus, report.samples());
    let plural = if vcpus == 1 { "" } else { "s" };
    let _ = writeln!(
        text,
        "{vcpus} vCPU{plural} took {:.2} s of the host's processors; {samples} samples",
        seconds(report.cpu_ns)
    );
}

fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}

/// `part` of all samples, in percent.
pub fn percent(part: u64, report: &Report) -> f64 {
    100.0 * part as f64 / report.samples().max(1) as f64
}

fn places(text: &mut String, report: &Report) {
    text.push_str("\nWhere the time goes                            share    seconds     samples\n");
    for &(place, samples) in &report.places {
        let share = percent(samples, report);
        let seconds = seconds(report.cpu_ns) * share / 100.0;
        let _ = writeln!(text, "  {:<42}{share:>6.1} %{seconds:>11.2}{samples:>12}", place.label());
    }
}

fn hottest(text: &mut String, report: &Report) {
    let found: u64 = report.hottest.iter().map(|hot| hot.samples).sum();
    let code = |(place, _): &&(Place, u64)| matches!(place, Place::User | Place::Kernel);
    let all: u64 = report.places.iter().filter(code).map(|(_, samples)| samples).sum();
    let shown = report.hottest.len().min(HOTTEST);
    let _ = writeln!(
        text,
        "\nHottest blocks of translated code ({shown} of {}; {found} of its {all} samples could be placed)\n   \
         share     samples  mode    guest address       physical address",
        report.hottest.len()
    );
    for hot in report.hottest.iter().take(HOTTEST) {
        let (share, mode) = (percent(hot.samples, report), if hot.place.user { "user" } else { "kernel" });
        let linear = hot.place.linear.map_or("several".into(), |linear| format!("{linear:#018x}"));
        let physical = hot.place.physical;
        let _ = writeln!(text, "{share:>6.1} %{:>12}  {mode:<6}  {linear:<18}  {physical:#014x}", hot.samples);
    }
}

fn emulated(text: &mut String, report: &Report) {
    let shown = report.emulated.len().min(EMULATED);
    let _ = writeln!(
        text,
        "\nEmulated instructions ({shown} of {})\n   share     samples       times  instruction",
        report.emulated.len()
    );
    for row in report.emulated.iter().take(EMULATED) {
        let share = percent(row.samples, report);
        let _ = writeln!(text, "{share:>6.1} %{:>12}{:>12}  {}", row.samples, row.count, row.name);
    }
}

#[cfg(test)]
pub mod tests {
    use purlin_vmm::profile::{Emulated, ExitKind, GuestPlace, Hot, Translation};

    use super::*;

    /// A report with something in each section.
    pub fn example() -> Report {
        let samples = |place| match place {
            Place::User => 500,
            Place::Kernel => 300,
            Place::Emulation => 200,
            _ => 0,
        };
        let hot = |linear, user, samples| Hot {
            place: GuestPlace { linear: Some(linear), physical: 0x1234_5000, user },
            samples,
        };
        Report {
            vcpus: 2,
            cpu_ns: 4_000_000_000,
            places: Place::ALL.map(|place| (place, samples(place))).to_vec(),
            hottest: vec![hot(0x40_1234, true, 499), hot(0xffff_ffff_8100_0000, false, 300)],
            emulated: vec![Emulated { name: "rdtsc".into(), samples: 200, count: 123_456 }],
            exits: vec![(ExitKind::Miss, 7), (ExitKind::Emulate, 123_456)],
            translation: Translation { cold: 10, hot: 2, bytes: 4096, replaced: 2, killed: 1, cleared: 0 },
        }
    }

    #[test]
    fn a_report() {
        let expected = "\
2 vCPUs took 4.00 s of the host's processors; 1000 samples

Where the time goes                            share    seconds     samples
  translated code, user mode                  50.0 %       2.00         500
  translated code, kernel mode                30.0 %       1.20         300
  entering and leaving translated code         0.0 %       0.00           0
  helpers: TLB refills, slow accesses          0.0 %       0.00           0
  misses: finding the next block               0.0 %       0.00           0
  translation                                  0.0 %       0.00           0
  emulated instructions                       20.0 %       0.80         200
  delivery of interrupts and exceptions        0.0 %       0.00           0
  devices, as far as a vCPU waits for them     0.0 %       0.00           0
  waiting for other vCPUs                      0.0 %       0.00           0
  the run loop, going to sleep                 0.0 %       0.00           0

Hottest blocks of translated code (2 of 2; 799 of its 800 samples could be placed)
   share     samples  mode    guest address       physical address
  49.9 %         499  user    0x0000000000401234  0x000012345000
  30.0 %         300  kernel  0xffffffff81000000  0x000012345000

Emulated instructions (1 of 1)
   share     samples       times  instruction
  20.0 %         200      123456  rdtsc

How often translated code was left
  misses: jumps to what no table knew                  7
  instructions to be emulated                     123456

What was translated
  blocks for the first executions                     10
  blocks for speed, of what is hot                     2
  bytes of translated code                          4096
  blocks that made way for one for speed               2
  blocks whose source was stored to                    1
  times that the code cache was emptied                0
";
        assert_eq!(report(&example()), expected);
    }

    #[test]
    fn a_guest_that_never_ran() {
        let text = report(&Report { vcpus: 1, ..Report::default() });
        assert!(text.starts_with("1 vCPU took 0.00 s of the host's processors; 0 samples\n"), "{text}");
    }
}
