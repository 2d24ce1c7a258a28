//! Commands without a terminal.

use std::{fs, os::unix::fs::DirBuilderExt, thread};

use purlin_agent::{
    client::{ClientError, Command, Event},
    protocol::{Exec, Exited, FailureKind, STDIN_WINDOW},
};

use crate::{Agent, PROGRAM, exec, failure, is_root, kind, noise, sh, wait_until};

const SIGTERM: i32 = 15;
const SIGKILL: i32 = 9;

#[test]
fn statuses_signals_and_both_outputs() {
    let agent = Agent::start();
    let finished = agent.run(sh("echo out; echo err >&2; exit 3"), b"");
    assert_eq!(finished.exited, Exited { status: 3, signal: 0 });
    assert_eq!((&*finished.stdout, &*finished.stderr), (&b"out\n"[..], &b"err\n"[..]));
    assert_eq!(agent.run(exec(&["true"]), b"").exited.exit_status(), 0);
    assert_eq!(agent.run(sh("kill -KILL $$"), b"").exited, Exited { status: 0, signal: SIGKILL });
}

#[test]
fn commands_that_are_none() {
    let agent = Agent::start();
    let missing = failure(agent.client().exec(exec(&["no-such-command"])));
    assert_eq!((missing.kind(), missing.exit_status()), (FailureKind::NoSuchCommand, 127));
    assert_eq!(missing.message, "cannot run 'no-such-command' in the guest: No such file or directory");
    let file = agent.path("plain");
    fs::write(&file, "#!/bin/sh\n").unwrap();
    for path in [file.to_str().unwrap(), "/"] {
        let failed = failure(agent.client().exec(exec(&[path])));
        assert_eq!((failed.kind(), failed.exit_status()), (FailureKind::NotExecutable, 126), "{path}");
    }
    for (argv, wanted) in [("", FailureKind::NoSuchCommand), ("a\0b", FailureKind::Invalid)] {
        assert_eq!(kind(agent.client().exec(exec(&[argv]))), wanted);
    }
    let env = Exec { env: vec![b"novalue".to_vec()], ..exec(&["true"]) };
    assert_eq!(kind(agent.client().exec(env)), FailureKind::Invalid);
}

#[test]
fn users_and_directories() {
    let agent = Agent::start();
    let of = |user: &str| Exec { user: user.into(), ..exec(&["true"]) };
    let failed = failure(agent.client().exec(of("nosuchuser")));
    assert_eq!(
        (failed.kind(), &*failed.message),
        (FailureKind::NoSuchUser, "there is no user 'nosuchuser' in the guest")
    );
    let at = |cwd: &str| Exec { cwd: cwd.into(), ..exec(&["pwd"]) };
    assert_eq!(agent.run(at("/usr"), b"").stdout, b"/usr\n");
    assert_eq!(kind(agent.client().exec(at("/nosuch"))), FailureKind::NoSuchDirectory);
    assert_eq!(kind(agent.client().exec(at("/etc/passwd"))), FailureKind::NotADirectory);
    if !is_root() {
        assert_eq!(kind(agent.client().exec(of("root"))), FailureKind::Permission);
        return;
    }
    let nobody = |script: &str| Exec { user: "nobody".into(), ..sh(script) };
    let ids = agent.run(nobody("id -u; id -g; id -G; echo $HOME $USER $LOGNAME; pwd"), b"");
    let wanted = std::process::Command::new("sh")
        .args(["-c", "id -u nobody; id -g nobody; id -G nobody; echo $(getent passwd nobody | cut -d: -f6) nobody nobody; echo /"])
        .output()
        .unwrap();
    assert_eq!(String::from_utf8(ids.stdout), String::from_utf8(wanted.stdout));
    // What root may enter, others may not.
    let shut = agent.path("shut");
    fs::DirBuilder::new().mode(0o700).create(&shut).unwrap();
    let exec = Exec { cwd: shut.to_str().unwrap().into(), user: "nobody".into(), ..exec(&["true"]) };
    assert_eq!(kind(agent.client().exec(exec)), FailureKind::Permission);
}

#[test]
fn the_environment_is_a_logins_and_nothing_of_the_agents() {
    let agent = Agent::start();
    let exec = Exec { env: vec![b"A=b c".to_vec(), b"SHELL=/bin/x".to_vec()], ..exec(&["env"]) };
    let said = String::from_utf8(agent.run(exec, b"").stdout).unwrap();
    let has = |line: &str| said.lines().any(|said| said == line);
    assert!(has("A=b c") && has("SHELL=/bin/x") && said.contains("\nPATH=") && said.contains("HOME=/"), "{said}");
    // Cargo's is about the tests, and the agent's own.
    assert!(!said.contains("CARGO"), "{said}");
}

#[test]
fn signals_do_what_they_do_by_themselves_whatever_the_agent_ignores() {
    let ignoring = ["-c", r#"trap "" HUP INT QUIT TERM USR1; exec "$@""#, "sh", PROGRAM];
    let agent = Agent::start_by(std::process::Command::new("sh").args(ignoring));
    for signal in [1, 2, 3, SIGTERM, 10] {
        let finished = agent.run(sh(&format!("kill -{signal} $$; echo it lives")), b"");
        assert_eq!((finished.exited, &*finished.stdout), (Exited { status: 0, signal }, &b""[..]));
    }
}

#[test]
fn input_to_its_end() {
    let agent = Agent::start();
    assert_eq!(agent.run(exec(&["cat"]), b"to and fro").stdout, b"to and fro");
    assert_eq!(agent.run(exec(&["wc", "-c"]), b"").stdout, b"0\n");
    // Without input there is /dev/null.
    let finished = agent.client().exec(exec(&["cat"])).unwrap().output.finish().unwrap();
    assert_eq!(finished.exited.exit_status(), 0);
}

#[test]
fn ten_mebibytes_both_ways() {
    let agent = Agent::start();
    let data = noise(10 << 20);
    let finished = agent.run(exec(&["cat"]), &data);
    assert!(finished.stdout == data, "{} bytes came back", finished.stdout.len());
    assert_eq!(finished.exited.exit_status(), 0);
}

#[test]
fn input_that_nobody_wants_is_no_obstacle() {
    let agent = Agent::start();
    let data = noise(4 << 20);
    // One that ends, and one that only closes its input.
    assert_eq!(agent.run(exec(&["head", "-c", "5"]), &data).stdout, &data[..5]);
    let finished = agent.run(sh("exec 0<&-; echo go; while [ ! -e /proc/self ]; do :; done; exit 4"), &data);
    assert_eq!((finished.exited.status, &*finished.stdout), (4, &b"go\n"[..]));
}

#[test]
fn signals_reach_a_command_that_does_not_read() {
    let agent = Agent::start();
    let Command { input, mut output, .. } =
        agent.client().exec(Exec { with_stdin: true, ..exec(&["sleep", "1000"]) }).unwrap();
    // More than its pipe holds, and all that the agent keeps.
    input.write(&vec![0; STDIN_WINDOW]).unwrap();
    input.signal(SIGTERM).unwrap();
    assert_eq!(output.finish().unwrap().exited, Exited { status: 0, signal: SIGTERM });
    // Who writes on is told.
    let more = thread::spawn(move || input.write(&vec![0; 2 * STDIN_WINDOW]));
    assert!(matches!(more.join().unwrap(), Err(ClientError::Ended)));
}

#[test]
fn a_signal_is_for_the_whole_group() {
    let agent = Agent::start();
    let mut command = agent.client().exec(sh("sleep 1000 & echo $!; wait")).unwrap();
    let Event::Stdout(pid) = command.output.next_event().unwrap() else { panic!("no output") };
    command.input.signal(SIGTERM).unwrap();
    assert_eq!(command.output.finish().unwrap().exited.signal, SIGTERM);
    let pid = String::from_utf8(pid).unwrap();
    wait_until("its child ends", || !is_running(pid.trim().parse().unwrap()));
}

#[test]
fn a_signal_that_is_none_ends_the_session() {
    let agent = Agent::start();
    let mut command = agent.client().exec(exec(&["sleep", "1000"])).unwrap();
    command.input.signal(1234).unwrap();
    assert_eq!(kind(command.output.finish()), FailureKind::Protocol);
    wait_until("the command ends", || !is_running(command.pid));
}

#[test]
fn a_host_that_goes_ends_its_command() {
    let agent = Agent::start();
    let command = agent.client().exec(sh("sleep 1000 & wait")).unwrap();
    assert!(is_running(command.pid));
    let pid = command.pid;
    drop(command);
    wait_until("the command ends", || !is_running(pid));
}

#[test]
fn a_host_that_goes_ends_a_command_that_does_not_read() {
    let agent = Agent::start();
    let command = agent.client().exec(Exec { with_stdin: true, ..exec(&["sleep", "1000"]) }).unwrap();
    command.input.write(&vec![0; STDIN_WINDOW]).unwrap();
    let pid = command.pid;
    drop(command);
    wait_until("the command ends", || !is_running(pid));
}

#[test]
fn a_host_that_goes_ends_a_command_that_it_did_not_listen_to() {
    let agent = Agent::start();
    let command = agent.client().exec(exec(&["yes"])).unwrap();
    let pid = command.pid;
    drop(command);
    wait_until("the command ends", || !is_running(pid));
}

#[test]
fn the_output_is_complete_and_a_process_left_behind_does_not_hold_the_end_up() {
    let agent = Agent::start();
    let marker = agent.path("go");
    let script =
        format!("(while [ ! -e {} ]; do sleep 0.1; done) & head -c 3000000 /dev/zero; echo end", marker.display());
    let finished = agent.run(sh(&script), b"");
    assert_eq!(finished.exited.exit_status(), 0);
    assert_eq!(finished.stdout.len(), 3_000_004);
    assert!(finished.stdout.ends_with(b"end\n"));
    fs::write(marker, "").unwrap();
}

#[test]
fn many_at_once() {
    let agent = Agent::start();
    let data = noise(1 << 20);
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| assert!(agent.run(exec(&["cat"]), &data).stdout == data));
        }
    });
}

/// Whether the process is there, and no zombie.
pub fn is_running(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with(" Z"))
}
