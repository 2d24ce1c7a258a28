//! `--profile`: what is written, whichever way a run ends.

mod support;

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    path::PathBuf,
    process::{Command, Stdio},
};

use rustix::process::{Pid, Signal, kill_process};
use support::{Kernel, Killed, command, machine_of, wait};

/// Runs the guest until `end` ends it. Returns the exit status, standard error and the perf map.
fn run(mut command: Command, end: impl FnOnce(&mut Killed)) -> (Option<i32>, String, String) {
    command.args(["--engine", "translator"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = Killed(command.spawn().unwrap());
    let mut ready = String::new();
    BufReader::new(child.0.stdout.take().unwrap()).read_line(&mut ready).unwrap();
    assert_eq!(ready, "ready\n");
    let machine = machine_of(child.0.id());
    end(&mut child);
    let status = wait(&mut child.0).code();
    let mut said = String::new();
    child.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    let map = PathBuf::from(format!("/tmp/perf-{machine}.map"));
    let text = fs::read_to_string(&map).unwrap_or_else(|e| panic!("{}: {e}: {said}", map.display()));
    fs::remove_file(map).unwrap();
    (status, said, text)
}

/// What ends a run.
type End = Box<dyn FnOnce(&mut Killed)>;

fn send(byte: u8) -> impl FnOnce(&mut Killed) {
    move |child| child.0.stdin.as_mut().unwrap().write_all(&[byte]).unwrap()
}

#[test]
fn every_end_writes_the_report_and_the_map() {
    let signal = |child: &mut Killed| kill_process(Pid::from_child(&child.0), Signal::INT).unwrap();
    let ends: [(i32, End); 4] = [
        (33, Box::new(send(command::EXIT))),
        (130, Box::new(signal)),
        (0, Box::new(send(command::RESET))),
        (4, Box::new(send(command::TRIPLE_FAULT))),
    ];
    for (status, end) in ends {
        let kernel = Kernel::new();
        let path = kernel.path("profile.txt");
        fs::write(&path, "of the run before").unwrap();
        let mut command = kernel.run();
        command.arg("--no-reboot").arg("--profile").arg(&path);
        let (ended, said, map) = run(command, end);
        assert_eq!(ended, Some(status), "{said}");
        assert!(said.contains(&format!("the profile is in '{}'", path.display())), "{said}");
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("1 vCPU took "), "{text}");
        for section in ["Where the time goes", "Hottest blocks", "Emulated instructions", "How often", "What was"] {
            assert!(text.contains(&format!("\n{section}")), "no '{section}' in: {text}");
        }
        // Its loop reads and writes the serial port.
        for instruction in ["  in\n", "  out\n"] {
            assert!(text.contains(instruction), "{text}");
        }
        assert!(map.lines().next().is_some_and(|line| line.ends_with(" purlin-stub-enter")), "{map}");
        assert!(map.contains(" guest-kernel 0x100020\n"), "the kernel's entry: {map}");
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 2, "the kernel and the profile");
    }
}

#[test]
fn a_name_that_ends_in_json_asks_for_json() {
    let kernel = Kernel::new();
    let path = kernel.path("profile.json");
    let mut command = kernel.run();
    command.arg("--profile").arg(&path);
    assert_eq!(run(command, send(command::EXIT)).0, Some(33));
    let value: serde_json::Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    assert_eq!(value["vcpus"], 1);
    assert!(value["cpu_seconds"].as_f64().unwrap() > 0.0);
    assert!(value["exits"]["emulate"].as_u64().unwrap() > 6, "{value:#}");
    assert!(value["translation"]["cold_blocks"].as_u64().unwrap() > 0);
}
