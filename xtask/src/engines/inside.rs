//! What happens inside the outer guest.

use std::{
    fs,
    ops::RangeInclusive,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

use super::{IMAGE, work::Steps};
use crate::{home::Home, machine::Engine};

/// Steps of the guest's work that are waited for before it is believed to go on.
const GOES_ON: usize = 5;

/// Longer than anything takes there.
const LIMIT: Duration = Duration::from_secs(300);

/// Does it all; the machine is launched under the engine `first`.
pub fn run(first: Engine) -> Result<()> {
    let mut home = Home::on_test_bed(LIMIT)?;
    check(&home, first).inspect_err(|_| say_more(&home))?;
    home.end()?;
    check_kernel_log()
}

fn check(home: &Home, first: Engine) -> Result<()> {
    let begin = Instant::now();
    let say = |what: &str| println!("{:6.1} s: {what}", begin.elapsed().as_secs_f64());
    write_key(home)?;
    home.purlin(&["image", "import", "--name", "work", IMAGE])?;
    launch(home, first)?;
    say(&format!("launched and asked under {}", first.name()));
    if first == Engine::Translator {
        let moment = snapshot(home, "a", "s0")?;
        home.purlin(&["set", "a", "engine=kvm"])?;
        go_back(home, "a", "s0", "kvm", moment)?;
        say("gone on under KVM");
    }
    check_kvm(home, &say)?;
    check_other_engine(home, &say)?;

    home.purlin(&["stop", "a"])?;
    let info = home.info("a")?;
    ensure!(info["status"] == "stopped" && info["last_end"]["crashed"] == false, "it ended so: {info}");
    say("shut down by its power button");
    Ok(())
}

/// What the machines' processes and the kernel say of a failure.
fn say_more(home: &Home) {
    let directories = fs::read_dir(home.path().join("data/instances")).into_iter().flatten().flatten();
    for log in directories.flat_map(|directory| ["process.log", "console.log"].map(|name| directory.path().join(name)))
    {
        let text = fs::read_to_string(&log).unwrap_or_default();
        println!("{}: ...{}", log.display(), tail(&text, 1500));
    }
    println!("dmesg: ...{}", tail(&kernel_log().unwrap_or_default(), 1500));
}

fn tail(text: &str, most: usize) -> &str {
    text.get(text.len().saturating_sub(most)..).unwrap_or(text)
}

/// A key that nobody logs in with: there is no ssh-keygen here.
fn write_key(home: &Home) -> Result<()> {
    let directory = home.path().join("data/ssh");
    fs::create_dir_all(&directory)?;
    fs::write(directory.join("id_ed25519"), "")?;
    Ok(fs::write(directory.join("id_ed25519.pub"), "ssh-ed25519 nobody")?)
}

/// What has to do with KVM only.
fn check_kvm(home: &Home, say: &dyn Fn(&str)) -> Result<()> {
    home.purlin(&["pause", "a"])?;
    let paused = console(home, "a")?;
    thread::sleep(Duration::from_secs(1));
    ensure!(console(home, "a")? == paused, "it goes on though it is paused");
    home.purlin(&["resume", "a"])?;
    let last_step = Steps::of(&paused).last();
    // What was said in part is whole by then.
    goes_on(home, "a", paused.len(), last_step + 1..=last_step + 2)?;
    let moment = snapshot(home, "a", "s1")?;
    go_back(home, "a", "s1", "kvm", moment)?;
    say("paused, and gone back to a snapshot");

    let before = last(home, "a")?;
    home.purlin(&["clone", "a", "b"])?;
    check_process(home, "b", "kvm")?;
    goes_on(home, "b", 0, before..=last(home, "a")? + 1)?;
    ensure!(home.exec("b", "hostname")?.trim() == "b");
    check_content(home, "b")?;
    home.purlin(&["delete", "-f", "b"])?;
    say("cloned");

    Ok(())
}

/// From KVM to the translator and back: each time it is the other one's snapshot that is gone on from, and the second one
/// stands on the first.
fn check_other_engine(home: &Home, say: &dyn Fn(&str)) -> Result<()> {
    let of_kvm = snapshot(home, "a", "s2")?;
    home.purlin(&["set", "a", "engine=translator"])?;
    go_back(home, "a", "s2", "translator", of_kvm)?;
    say("gone on under the translator");
    let of_translator = snapshot(home, "a", "s3")?;
    home.purlin(&["set", "a", "engine=kvm"])?;
    go_back(home, "a", "s3", "kvm", of_translator)?;
    say("gone on under KVM");
    Ok(())
}

/// Launches a machine that works, and can be asked; its processor is one that both engines can be on any host.
fn launch(home: &Home, engine: Engine) -> Result<()> {
    let machine = ["--engine", engine.name(), "--cpu", "x86-64-v2", "--cpus", "2", "--memory", "128M", "--net", "none"];
    home.purlin(&[&["launch", "work", "a"], &machine[..]].concat())?;
    check_process(home, "a", engine.name())?;
    goes_on(home, "a", 0, 1..=1)?;
    check_content(home, "a")?;
    ensure!(home.exec("a", "nproc")?.trim() == "2");
    let status = home.command(&["exec", "a", "--", "sh", "-c", "exit 3"]).status()?;
    ensure!(status.code() == Some(3), "exit 3 became {status}");
    Ok(())
}

/// Takes a snapshot; which step may be the first behind it.
fn snapshot(home: &Home, name: &str, snapshot: &str) -> Result<RangeInclusive<usize>> {
    let before = last(home, name)?;
    home.purlin(&["snapshot", "create", name, snapshot])?;
    Ok(before + 1..=last(home, name)? + 2)
}

/// Goes back to a snapshot, under this engine: the work goes on where it was, and all that it was done with is there.
fn go_back(home: &Home, name: &str, snapshot: &str, engine: &str, first: RangeInclusive<usize>) -> Result<()> {
    home.purlin(&["pause", name])?;
    let log = console(home, name)?.len();
    home.purlin(&["snapshot", "restore", name, snapshot])?;
    check_process(home, name, engine)?;
    let checked = goes_on(home, name, log, first).and_then(|()| check_content(home, name));
    checked.with_context(|| format!("{name} from {snapshot} on, under {engine}"))
}

/// What it says behind the first `skip` bytes of its log is the work, from one of `first` on.
fn goes_on(home: &Home, name: &str, skip: usize, first: RangeInclusive<usize>) -> Result<()> {
    let steps = |home: &Home| anyhow::Ok(Steps::of(console(home, name)?.get(skip..).unwrap_or_default()));
    home.wait(name, "it goes on with its work", |home| Ok(steps(home)?.len() >= GOES_ON))?;
    steps(home)?.check(first)
}

/// The guest's memory is what it was, and its disk has all steps.
fn check_content(home: &Home, name: &str) -> Result<()> {
    home.exec(name, "sha256sum -c /tmp/sum")?;
    let written = home.exec(name, "sync; echo 3 >/proc/sys/vm/drop_caches; cat /disk/work")?;
    let steps = Steps::of(&written);
    ensure!(steps.last() == written.lines().count() && steps.len() == steps.last(), "steps are missing on the disk");
    steps.check(1..=1).context("on the disk")
}

fn console(home: &Home, name: &str) -> Result<String> {
    home.purlin(&["console", "--log", name])
}

fn last(home: &Home, name: &str) -> Result<usize> {
    Ok(Steps::of(&console(home, name)?).last())
}

/// Its process runs it under this engine and has a whole sandbox, as the kernel says too.
fn check_process(home: &Home, name: &str, engine: &str) -> Result<()> {
    let info = home.info(name)?;
    let process = &info["process"];
    let said = process["engine"].as_str().with_context(|| format!("it does not run: {info}"))?;
    // "KVM (...)", "translator (...)"
    ensure!(said.to_lowercase().starts_with(engine), "it runs under {said}");
    ensure!(process["sandbox_lacks"].is_null(), "the sandbox lacks {}", process["sandbox_lacks"]);
    let proc = format!("/proc/{}", process["pid"]);
    let seen = format!("{proc}/root{IMAGE}");
    ensure!(fs::exists(IMAGE)? && !fs::exists(&seen)?, "its process sees {IMAGE}");
    let status = fs::read_to_string(format!("{proc}/status"))?;
    for (field, wanted) in [("CapEff", "0000000000000000"), ("NoNewPrivs", "1"), ("Seccomp", "2")] {
        let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(":\t"));
        ensure!(line == Some(wanted), "{field} of its process is {line:?}");
    }
    Ok(())
}

/// No system call was made that a filter does not allow (audit's type 1326).
fn check_kernel_log() -> Result<()> {
    let log = kernel_log()?;
    let forbidden: Vec<&str> = log.lines().filter(|line| line.contains("type=1326")).collect();
    ensure!(forbidden.is_empty(), "forbidden system calls:\n{}", forbidden.join("\n"));
    Ok(())
}

fn kernel_log() -> Result<String> {
    let said = Command::new("dmesg").output().context("dmesg")?.stdout;
    Ok(String::from_utf8_lossy(&said).into_owned())
}
