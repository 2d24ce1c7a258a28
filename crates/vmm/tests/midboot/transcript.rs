//! What a guest said, and whether anything in it shows that it was moved.

use std::{
    collections::BTreeSet,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// What the shell says when it takes commands.
pub const PROMPT: &str = "root@purlin:~# ";

/// What is typed then: one line, since what is typed ahead is echoed into the output.
pub const SCRIPT: &str = "\
    for i in $(seq 500); do echo \"line: $i\"; done; \
    dmesg -r | sed 's/^/dmesg: /'; \
    echo \"cpus: $(nproc)\"; \
    echo \"clocksource: $(cat /sys/devices/system/clocksource/*/current_clocksource)\"; \
    echo \"rtc: $(cat /sys/class/rtc/rtc0/since_epoch)\"; \
    echo \"uptime: $(cat /proc/uptime)\"; \
    poweroff\n";

/// From here on the kernel's time is that of a clock; before it counts ticks, those that it sees. In front of it is
/// what it counts at this moment.
pub const CLOCK_START: &str = "] clocksource: Switched to clocksource kvm-clock\n";
/// The start of what [`SCRIPT`] answers when it asks for the time.
pub const CLOCK_END: &str = "\nuptime: ";

/// A whole run of a guest.
pub struct Transcript {
    /// What it wrote to its console.
    pub text: String,
    /// For how long it ran in all, without the pauses.
    pub ran: Duration,
    /// For how long between [`CLOCK_START`] and [`CLOCK_END`].
    pub measured: Option<Duration>,
}

/// What guests take for their clock on this host: its TSC where that never changes its pace.
fn clocksource() -> &'static str {
    const INVARIANT: u32 = 1 << 8;
    let power = std::arch::x86_64::__cpuid(0x8000_0007).edx;
    if power & INVARIANT != 0 { "tsc" } else { "kvm-clock" }
}

impl Transcript {
    /// Panics, with the transcript, unless the guest did all it was to do and noticed nothing. `known` are warnings
    /// that undisturbed guests get too.
    pub fn check(&self, cpus: u32, known: &BTreeSet<String>) {
        let found = [
            self.is_whole(),
            self.log_is_whole(),
            self.one(&cpus.to_string(), "cpus: "),
            self.one(clocksource(), "clocksource: "),
            self.clocks_are_right(),
            self.no_new_warnings(known),
        ];
        let wrong: Vec<String> = found.into_iter().filter_map(Result::err).collect();
        assert!(wrong.is_empty(), "{}\n-- of this console:\n{}", wrong.join("\n"), self.text);
    }

    /// The kernel's warnings without what differs from boot to boot.
    pub fn warnings(&self) -> BTreeSet<String> {
        // Levels 0 (emergency) to 4 (warning).
        self.log().filter(|entry| entry.level <= 4).map(|entry| without_numbers(entry.text)).collect()
    }

    fn is_whole(&self) -> Result<(), String> {
        let mut rest = self.text.as_str();
        for number in 1..=500 {
            let line = format!("\nline: {number}\n");
            let at = rest.find(&line).ok_or_else(|| format!("the console lacks 'line: {number}'"))?;
            // The next one begins with the line feed that ends this one.
            rest = &rest[at + line.len() - 1..];
        }
        let end = "reboot: Power down";
        if rest.contains(end) { Ok(()) } else { Err(format!("the console lacks '{end}'")) }
    }

    /// All that the kernel's log buffer holds was on the console too, and its times do not go back.
    fn log_is_whole(&self) -> Result<(), String> {
        // Later the log itself is on the console.
        let boot = self.text.split("\nline: 1\n").next().unwrap_or_default();
        let mut latest = 0.0f64;
        for entry in self.log() {
            // Level 7 (debug) does not go to the console.
            if entry.level < 7 && !boot.contains(&format!("{}\n", entry.line)) {
                return Err(format!("the console lacks '{}'", entry.line));
            }
            // Processors take the time of a message before they queue for the log.
            if entry.seconds < latest - 0.1 {
                return Err(format!("time went back from {latest} to '{}'", entry.line));
            }
            latest = latest.max(entry.seconds);
        }
        if latest > 0.0 { Ok(()) } else { Err("there is no kernel log".into()) }
    }

    /// The guest's own time is that for which it ran, its real-time clock is ours.
    fn clocks_are_right(&self) -> Result<(), String> {
        let start = self.text.split(CLOCK_START).next().and_then(|before| before.rsplit('[').next());
        let end = self.value("uptime: ").and_then(|value| value.split(' ').next());
        let seconds = |text: Option<&str>| text.and_then(|text| text.trim().parse::<f64>().ok());
        let (Some(start), Some(end), Some(measured)) = (seconds(start), seconds(end), self.measured) else {
            return Err("the guest does not tell the time".into());
        };
        let fast = end - start - measured.as_secs_f64();
        // From asking for the time to its being on the console a loaded host may take a while.
        if !(-0.5..0.1).contains(&fast) {
            return Err(format!("in {measured:.2?} the guest counts from {start} to {end} s"));
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
        let rtc: u64 = self.value("rtc: ").and_then(|v| v.parse().ok()).unwrap_or(0);
        if rtc.abs_diff(now) <= 3 { Ok(()) } else { Err(format!("the real-time clock shows {rtc} at {now}")) }
    }

    fn no_new_warnings(&self, known: &BTreeSet<String>) -> Result<(), String> {
        let new: Vec<String> = self.warnings().difference(known).cloned().collect();
        if new.is_empty() { Ok(()) } else { Err(format!("new warnings: {new:#?}")) }
    }

    fn one(&self, expected: &str, name: &str) -> Result<(), String> {
        let found = self.value(name);
        if found == Some(expected) { Ok(()) } else { Err(format!("{name}{found:?} instead of {expected}")) }
    }

    /// What follows `name` in the line that begins with it.
    fn value(&self, name: &str) -> Option<&str> {
        self.text.lines().find_map(|line| line.strip_prefix(name))
    }

    fn log(&self) -> impl Iterator<Item = Entry<'_>> {
        self.text.lines().filter_map(|line| Entry::parse(line.strip_prefix("dmesg: ")?))
    }
}

/// A line of the kernel's log.
struct Entry<'a> {
    level: u32,
    seconds: f64,
    /// As on the console: with its time.
    line: &'a str,
    /// Without.
    text: &'a str,
}

impl<'a> Entry<'a> {
    /// `<6>[    0.123456] text`
    fn parse(raw: &'a str) -> Option<Self> {
        let (priority, line) = raw.strip_prefix('<')?.split_once('>')?;
        let (seconds, text) = line.strip_prefix('[')?.split_once("] ")?;
        // The upper bits are syslog's facility.
        Some(Self { level: priority.parse::<u32>().ok()? & 7, seconds: seconds.trim().parse().ok()?, line, text })
    }
}

/// Digits and hexadecimal numbers as `#`.
fn without_numbers(text: &str) -> String {
    let word = |word: &str| {
        let number = word.contains(|c: char| c.is_ascii_digit());
        let hexadecimal = number && word.trim_start_matches("0x").bytes().all(|b| b.is_ascii_hexdigit());
        if hexadecimal { "#".to_owned() } else { word.replace(|c: char| c.is_ascii_digit(), "#") }
    };
    text.split(|c: char| !c.is_ascii_alphanumeric()).map(word).collect::<Vec<_>>().join(" ")
}
