//! The process of `purlin run`'s machine: what it may, and what becomes of it and of the command when either ends.

mod support;

use std::{
    ffi::OsStr,
    fs,
    io::{BufRead, BufReader, Read, Write},
    os::{
        fd::OwnedFd,
        unix::{ffi::OsStrExt, process::CommandExt},
    },
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use purlin_storage::{Format, NewImage};
use rustix::process::{
    Pid, PidfdFlags, PidfdGetfdFlags, Signal, kill_process, kill_process_group, pidfd_getfd, pidfd_open,
};
use support::{
    Kernel, Killed, assert_one_line, command, kill, machine_of, purlin, status_of, terminal::OnTerminal, wait,
};

/// A run whose guest has said that it is ready, and the machine's process.
struct Run {
    child: Killed,
    machine: u32,
}

impl Run {
    fn start(command: &mut Command) -> Self {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = Killed(command.spawn().unwrap());
        let mut ready = String::new();
        BufReader::new(child.0.stdout.as_mut().unwrap()).read_line(&mut ready).unwrap();
        let machine = machine_of(child.0.id());
        assert_eq!(ready, "ready\n");
        Self { child, machine }
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.child.0)
    }

    /// The status, and what was said but for the line about the engine.
    fn end(mut self) -> (Option<i32>, Vec<String>) {
        let status = wait(&mut self.child.0).code();
        let mut text = String::new();
        self.child.0.stderr.take().unwrap().read_to_string(&mut text).unwrap();
        (status, text.lines().filter(|line| !line.contains("engine: ")).map(str::to_owned).collect())
    }
}

#[track_caller]
fn until(what: &str, is_so: impl Fn() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < Duration::from_secs(60), "{what}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// Whether the host lets this user have namespaces.
fn has_namespaces() -> bool {
    Command::new("unshare").args(["--user", "--mount", "--pid", "true"]).status().is_ok_and(|status| status.success())
}

fn is_gone(process: u32) -> bool {
    status_of(process, "State").is_none_or(|state| state.starts_with('Z'))
}

fn children_of(parent: u32) -> Vec<u32> {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    numbers.filter(|&pid| status_of(pid, "PPid").as_deref() == Some(&parent.to_string())).collect()
}

fn is_called(pid: u32, verb: &str) -> bool {
    fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default().contains(verb)
}

/// The sockets that a process has open.
fn sockets_of(pid: u32) -> Vec<OwnedFd> {
    let process = pidfd_open(Pid::from_raw(pid.cast_signed()).unwrap(), PidfdFlags::empty()).unwrap();
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let is_socket =
        |entry: &fs::DirEntry| fs::read_link(entry.path()).unwrap().to_string_lossy().starts_with("socket:");
    let numbers = descriptors.filter(is_socket).map(|entry| entry.file_name().to_str().unwrap().parse().unwrap());
    numbers.map(|number| pidfd_getfd(&process, number, PidfdGetfdFlags::empty()).unwrap()).collect()
}

fn mounts(pid: u32) -> String {
    fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap()
}

#[test]
fn it_is_in_a_sandbox() {
    let kernel = Kernel::new();
    let run = Run::start(kernel.run().env("SOME_KEY", "secret"));
    let of = |field| status_of(run.machine, field).unwrap();
    assert_eq!((of("NoNewPrivs"), of("Seccomp")), ("1".into(), "2".into()));
    for capabilities in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(of(capabilities), "0000000000000000", "{capabilities}");
    }
    if rustix::process::geteuid().is_root() {
        assert!(!of("Uid").split_whitespace().any(|uid| uid == "0"), "{}", of("Uid"));
        let environment = fs::read(format!("/proc/{}/environ", run.machine)).unwrap();
        assert!(!String::from_utf8_lossy(&environment).contains("secret"));
    }
    if has_namespaces() {
        assert_eq!(of("NSpid").split_whitespace().last(), Some("1"));
        assert_eq!(mounts(run.machine).lines().count(), 1, "{}", mounts(run.machine));
        assert!(mounts(run.machine).contains(" - tmpfs "), "{}", mounts(run.machine));
    }
    // The command is what its user is.
    assert_ne!(mounts(run.child.0.id()).lines().count(), 1);
    kill_process(run.pid(), Signal::TERM).unwrap();
    assert_eq!(run.end().0, Some(143));
}

/// Where there are no user namespaces, as in a container, and no capability: filters and Landlock are what is left.
#[test]
fn without_namespaces_it_has_what_is_left() {
    if !has_namespaces() {
        return;
    }
    let kernel = Kernel::new();
    let purlin = kernel.run();
    let script = "echo 0 > /proc/sys/user/max_user_namespaces && \
                  exec setpriv --bounding-set=-all --inh-caps=-all -- \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-current-user", "--keep-caps", "sh", "-ec", script, "sh"]);
    command.arg(purlin.get_program()).args(purlin.get_args());
    let mut run = Run::start(&mut command);
    let of = |field| status_of(run.machine, field).unwrap();
    assert_eq!((of("NoNewPrivs"), of("CapEff")), ("1".into(), "0000000000000000".into()));
    assert!(!of("NSpid").trim().contains('\t'), "{}", of("NSpid"));
    run.child.0.stdin.as_mut().unwrap().write_all(&[command::EXIT]).unwrap();
    assert_eq!(run.end(), (Some(33), vec![]));

    let run = Run::start(&mut command);
    kill(run.machine);
    assert_eq!(run.end().0, Some(4));
}

#[test]
fn it_ends_with_the_command() {
    for signal in [Signal::KILL, Signal::ABORT] {
        let kernel = Kernel::new();
        let mut run = Run::start(kernel.run().args(["--net", "user"]));
        kill_process(run.pid(), signal).unwrap();
        assert_eq!(wait(&mut run.child.0).code(), None);
        // Nobody may be there to wait for it.
        until("the machine goes on", || is_gone(run.machine));
    }
}

/// One that does not see that the command is gone: somebody holds that end of its socket.
#[test]
fn it_ends_with_the_command_whatever_it_does() {
    let kernel = Kernel::new();
    for is_stopped in [false, true] {
        let mut run = Run::start(&mut kernel.run());
        let held = sockets_of(run.child.0.id());
        assert!(!held.is_empty());
        if is_stopped {
            kill_process(Pid::from_raw(run.machine.cast_signed()).unwrap(), Signal::STOP).unwrap();
        }
        kill_process(run.pid(), Signal::KILL).unwrap();
        assert_eq!(wait(&mut run.child.0).code(), None);
        until("the machine goes on", || is_gone(run.machine));
        drop(held);
    }
}

#[test]
fn its_end_is_told() {
    let kernel = Kernel::new();
    let run = Run::start(&mut kernel.run());
    kill(run.machine);
    let line = "purlin: the machine's process was ended by SIGKILL".to_owned();
    assert_eq!(run.end(), (Some(4), vec![line]));
}

#[test]
fn the_terminal_is_given_back_when_it_is_killed() {
    let kernel = Kernel::new();
    let mut run = OnTerminal::start(&mut kernel.run());
    run.expect("ready\n");
    assert!(run.is_raw());
    kill(machine_of(run.child.0.id()));
    run.expect("purlin: the machine's process was ended by SIGKILL\r\n");
    assert_eq!(run.end().code(), Some(4));
}

/// One that does not obey: a stopped one cannot.
#[test]
fn who_asks_twice_need_not_wait_for_it() {
    let kernel = Kernel::new();
    let stop = |machine: u32| kill_process(Pid::from_raw(machine.cast_signed()).unwrap(), Signal::STOP).unwrap();

    let socket = kernel.path("vsock");
    let mut run = Run::start(kernel.run().arg("--vsock").arg(&socket));
    stop(run.machine);
    kill_process(run.pid(), Signal::TERM).unwrap();
    thread::sleep(Duration::from_millis(1100));
    assert!(run.child.0.try_wait().unwrap().is_none());
    kill_process(run.pid(), Signal::TERM).unwrap();
    assert_eq!(wait(&mut run.child.0).code(), Some(143));
    until("the machine goes on", || is_gone(run.machine));
    assert!(!socket.exists());

    let mut run = OnTerminal::start(&mut kernel.run());
    run.expect("ready\n");
    stop(machine_of(run.child.0.id()));
    run.type_keys(b"\x01x");
    thread::sleep(Duration::from_millis(1100));
    assert!(run.child.0.try_wait().unwrap().is_none());
    run.type_keys(b"\x01x");
    assert_eq!(run.end().code(), Some(0));
}

/// Nobody reads what the guest would write: the process waits in open(2), with the NAT started.
#[test]
fn who_asks_twice_need_not_wait_for_its_files() {
    let kernel = Kernel::new();
    let (fifo, socket) = (kernel.path("fifo"), kernel.path("vsock"));
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let serial = format!("file:{}", fifo.display());
    let mut command = kernel.run();
    command.args(["--net", "user", "--publish", "127.0.0.1:0:22", "--serial", &serial, "--vsock"]).arg(&socket);
    let mut run = Killed(command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap());
    let pid = Pid::from_child(&run.0);
    let child_of = |parent, verb: &str| children_of(parent).into_iter().find(|&child| is_called(child, verb));
    let nat_of = || child_of(run.0.id(), "__run").and_then(|machine| child_of(machine, "__nat"));
    until("there is no NAT", || nat_of().is_some());
    let (machine, nat) = (child_of(run.0.id(), "__run").unwrap(), nat_of().unwrap());
    kill_process(pid, Signal::TERM).unwrap();
    thread::sleep(Duration::from_millis(1100));
    assert!(run.0.try_wait().unwrap().is_none());
    kill_process(pid, Signal::TERM).unwrap();
    assert_eq!(wait(&mut run.0).code(), Some(143));
    until("the machine's process goes on", || is_gone(machine));
    until("the NAT goes on", || is_gone(nat));
    assert!(!socket.exists());
}

/// What a copy of the process would do, where there is no PID namespace that ends with it.
#[test]
fn who_holds_its_socket_does_not_hold_the_command() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let kernel = Kernel::new();
    let mut run = OnTerminal::start(&mut kernel.run());
    run.expect("ready\n");
    let machine = machine_of(run.child.0.id());
    let held = sockets_of(machine);
    assert!(!held.is_empty());
    kill_process(Pid::from_raw(machine.cast_signed()).unwrap(), Signal::STOP).unwrap();
    run.type_keys(b"\x01x");
    thread::sleep(Duration::from_millis(1100));
    run.type_keys(b"\x01x");
    assert_eq!(run.end().code(), Some(0));
    drop(held);
}

/// As a terminal does at Ctrl-C, where the guest does not have it.
#[test]
fn a_signal_to_the_group_is_one_request() {
    let kernel = Kernel::new();
    let run = Run::start(kernel.run().process_group(0));
    kill_process_group(run.pid(), Signal::INT).unwrap();
    assert_eq!(run.end(), (Some(130), vec!["purlin: ended by SIGINT".to_owned()]));
}

/// At Ctrl-Z, and in the shell's fg.
#[test]
fn both_stand_still_and_go_on() {
    let kernel = Kernel::new();
    let mut run = Run::start(kernel.run().process_group(0));
    let is_stopped = |pid| status_of(pid, "State").is_some_and(|state| state.starts_with('T'));
    kill_process_group(run.pid(), Signal::TSTP).unwrap();
    until("both stop", || is_stopped(run.machine) && is_stopped(run.child.0.id()));
    kill_process(run.pid(), Signal::CONT).unwrap();
    until("both go on", || !is_stopped(run.machine) && !is_stopped(run.child.0.id()));
    run.child.0.stdin.as_mut().unwrap().write_all(&[command::EXIT]).unwrap();
    assert_eq!(run.end().0, Some(33));
}

/// A disk's images are opened before the sandbox: it does not matter where they are.
#[test]
fn disks_may_be_anywhere() {
    let kernel = Kernel::new();
    let path = |name: &str| kernel.path(name);
    fs::create_dir_all(path("a/b")).unwrap();
    fs::create_dir(path("c")).unwrap();
    std::os::unix::fs::symlink(path("a/b"), path("link")).unwrap();
    fs::write(path("a/base.img"), vec![0; 1 << 20]).unwrap();
    NewImage::overlay(path("a/b/middle.qcow2"), path("a/b/../base.img"), Format::Raw).create().unwrap();
    NewImage::overlay(path("c/top.qcow2"), path("link/middle.qcow2"), Format::Qcow2).create().unwrap();
    fs::write(path("readonly.img"), vec![0; 1 << 20]).unwrap();
    let disks = ["--disk", "c/top.qcow2", "--disk", "readonly.img,readonly"];
    let mut run = Run::start(kernel.run().args(disks).current_dir(path("")));
    run.child.0.stdin.as_mut().unwrap().write_all(&[command::EXIT]).unwrap();
    assert_eq!(run.end(), (Some(33), vec![]));
}

/// What is handed to the process is text.
#[test]
fn a_path_that_is_no_text_is_refused() {
    let kernel = Kernel::new();
    let path = kernel.path("").join(OsStr::from_bytes(b"k\xff"));
    fs::copy(kernel.path("kernel"), &path).unwrap();
    let output = purlin().args(["run", "--engine", "translator", "--kernel"]).arg(&path).output().unwrap();
    assert_one_line(&output, 1, &["what to boot", "UTF-8"]);
}

#[test]
fn its_sockets_go_with_it() {
    let kernel = Kernel::new();
    let socket = kernel.path("vsock");
    let mut run = Run::start(kernel.run().arg("--vsock").arg(&socket));
    assert!(Path::new(&socket).exists());
    run.child.0.stdin.as_mut().unwrap().write_all(&[command::EXIT]).unwrap();
    assert_eq!(run.end().0, Some(33));
    assert!(!socket.exists());
}
