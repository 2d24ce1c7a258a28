//! README's `… | purlin run shell`: the shell gets what is piped in, all of it, on the serial port and on virtio-console,
//! and the run ends well; or, where the guest's kernel panics, it says so.

use std::{
    fs::{self, File},
    process::Command,
};

use anyhow::{Context, Result, ensure};

use crate::{
    machine::{self, Boot},
    shell::target,
};

/// All of it is in the pipe before the guest runs.
const INPUT: &str = "echo $(nproc) processors\ngrep SigIgn /proc/self/status\npoweroff\n";

/// The same on the console; and devices of the platform's are there, without a complaint of the kernel's.
const CONSOLE_INPUT: &str = "\
    tty\necho $(nproc) processors\ngrep SigIgn /proc/self/status\n\
    ls -d /sys/bus/platform/drivers/pvpanic-mmio/QEMU0001:00\n\
    dmesg -r | sed -n 's/^<[0-4]>/complaint: /p'\npoweroff\n";

/// Runs it.
pub fn run() -> Result<()> {
    machine::build()?;
    let serial = shell(&[], INPUT, "piped")?;
    check(&serial).context("what was piped in; see target/xtask/boot/piped.log")?;
    // Not so on the console: Linux has given it up by then.
    ensure!(serial.transcript.contains("reboot: Power down"), "the guest did not power off");
    let console = shell(&["--console", "stdio"], CONSOLE_INPUT, "piped-console")?;
    check_console(&console).context("virtio-console; see target/xtask/boot/piped-console.log")?;
    check_devices()?;
    let more = ["--on-panic", "exit"];
    let exit = shell(&more, PANIC, "panic-exit")?;
    check_panic(&exit).context("--on-panic exit; see target/xtask/boot/panic-exit.log")?;
    let more = ["--no-reboot", "--cmdline", "panic=1"];
    let reset = shell(&more, PANIC, "panic-reset")?;
    check_panic(&reset).context("a reset after a panic; see target/xtask/boot/panic-reset.log")
}

/// What panics Linux (Documentation/admin-guide/sysrq.rst).
const PANIC: &str = "echo c >/proc/sysrq-trigger\n";

/// The guest has drivers for what `purlin run` can give it.
const DEVICES_INPUT: &str = "ls -1d /dev/vda /sys/class/net/eth0 /dev/vsock\necho $(nproc) processors\n\
    grep SigIgn /proc/self/status\npoweroff\n";

fn check_devices() -> Result<()> {
    let (disk, socket) = (target().join("xtask/piped.raw"), target().join("xtask/piped.sock"));
    fs::create_dir_all(target().join("xtask"))?;
    File::create(&disk)?.set_len(1 << 20)?;
    let (disk, socket) = (format!("{},format=raw", disk.display()), socket.display().to_string());
    let boot = shell(&["--disk", &disk, "--net", "user", "--vsock", &socket], DEVICES_INPUT, "piped-devices")?;
    let has = |path: &&str| boot.transcript.lines().any(|line| line.trim_end() == *path);
    let missing: Vec<_> =
        ["/dev/vda", "/sys/class/net/eth0", "/dev/vsock"].into_iter().filter(|path| !has(path)).collect();
    check(&boot)
        .and_then(|()| ensure_none(&missing))
        .context("disk, network and vsock; see target/xtask/boot/piped-devices.log")
}

fn ensure_none(missing: &[&str]) -> Result<()> {
    ensure!(missing.is_empty(), "the guest has no {}", missing.join(", "));
    Ok(())
}

fn shell(more: &[&str], input: &str, name: &str) -> Result<Boot> {
    let mut purlin = Command::new(machine::program());
    purlin.args(["run", "shell", "--cpus", "2"]).args(more).env("PURLIN_HOME", target().join("xtask/home"));
    Boot::run_with(purlin, input, name)
}

fn check_console(boot: &Boot) -> Result<()> {
    check(boot)?;
    ensure!(boot.transcript.contains("/dev/hvc0"), "the shell is not on the console");
    ensure!(
        boot.transcript.lines().any(|line| line.trim_end().ends_with("QEMU0001:00") && line.starts_with("/sys")),
        "no pvpanic"
    );
    let complaints: Vec<_> = boot.transcript.lines().filter(|line| line.starts_with("complaint: ")).collect();
    let ours =
        |line: &&&str| ["virtio", "hvc", "pvpanic", "QEMU0001", "GED", "VGEN"].iter().any(|word| line.contains(word));
    let ours: Vec<_> = complaints.iter().filter(ours).collect();
    ensure!(ours.is_empty(), "the kernel complains: {ours:#?}");
    Ok(())
}

fn check_panic(boot: &Boot) -> Result<()> {
    ensure!(boot.status.code() == Some(4), "{}", boot.status);
    ensure!(boot.messages.contains("the guest's kernel panicked"), "it is not reported: {}", boot.messages.trim());
    ensure!(boot.transcript.contains("Kernel panic - not syncing"), "there is no panic on the console");
    Ok(())
}

fn check(boot: &Boot) -> Result<()> {
    ensure!(boot.transcript.contains("2 processors"), "the shell did not run what was piped in");
    let ignored = boot.transcript.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = ignored.and_then(|set| u64::from_str_radix(set.trim(), 16).ok()).context("no set of signals")?;
    ensure!(ignored & SIGINT == 0, "Ctrl-C would not reach what runs in the shell: it ignores {ignored:#x}");
    ensure!(boot.status.code() == Some(0), "{}", boot.status);
    Ok(())
}

/// Signal 2, in a set of signals as proc(5) shows them.
const SIGINT: u64 = 1 << (2 - 1);
