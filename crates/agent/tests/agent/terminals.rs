//! Commands with a terminal, and shells.

use purlin_agent::{
    client::{Client, Command, Event},
    protocol::{Exec, Tty},
};
use std::{fs, os::unix::net::UnixStream};

use crate::{Agent, commands::is_running, exec, own_user, sh, wait_until};

const SIGINT: i32 = 2;
const SIGHUP: i32 = 1;

fn tty() -> Option<Tty> {
    Some(Tty { columns: 132, rows: 43, term: "vt100".into() })
}

/// A command at a terminal, and what has been on its screen.
struct Screen {
    command: Command<UnixStream, UnixStream>,
    shown: String,
}

impl Screen {
    fn of(client: Client<UnixStream, UnixStream>, exec: Exec) -> Self {
        Self { command: client.exec(Exec { tty: tty(), ..exec }).unwrap(), shown: String::new() }
    }

    fn wait_for(&mut self, text: &str) {
        while !self.shown.contains(text) {
            match self.command.output.next_event().unwrap() {
                Event::Stdout(data) => self.shown += &String::from_utf8(data).unwrap(),
                other => panic!("{other:?} before {text:?}, after {:?}", self.shown),
            }
        }
    }

    fn type_in(&mut self, text: &str) {
        self.command.input.write(text.as_bytes()).unwrap();
    }
}

#[test]
fn a_terminal_with_a_size_and_a_name() {
    let agent = Agent::start();
    let exec =
        Exec { tty: tty(), ..sh("test -t 0 && test -t 1 && test -t 2 && tty && stty size && echo $TERM >&2; exit 5") };
    let finished = agent.client().exec(exec).unwrap().output.finish().unwrap();
    let said = String::from_utf8(finished.stdout).unwrap();
    assert!(said.starts_with("/dev/pts/") && said.ends_with("\r\n43 132\r\nvt100\r\n"), "{said:?}");
    assert_eq!(finished.exited.exit_status(), 5);
}

#[test]
fn another_size_is_a_signal() {
    let agent = Agent::start();
    let mut screen =
        Screen::of(agent.client(), sh("trap 'stty size; exit' WINCH; echo ready; while :; do sleep 0.05; done"));
    screen.wait_for("ready");
    screen.command.input.resize(100, 30).unwrap();
    screen.wait_for("30 100");
}

#[test]
fn control_c_interrupts_the_foreground() {
    let agent = Agent::start();
    let mut screen = Screen::of(agent.client(), sh("echo ready; exec sleep 1000"));
    screen.wait_for("ready");
    screen.type_in("\x03");
    assert_eq!(screen.command.output.finish().unwrap().exited.signal, SIGINT);
}

#[test]
fn a_signal_goes_to_the_foreground() {
    let agent = Agent::start();
    // An interactive shell has each job in a group of its own.
    let mut screen = Screen::of(agent.client(), Exec { env: vec![b"PS1=$ ".to_vec()], ..exec(&["sh", "-i"]) });
    screen.type_in("sh -c 'echo rea\"\"dy; exec sleep 1000'\n");
    screen.wait_for("ready");
    screen.command.input.signal(SIGINT).unwrap();
    screen.type_in("echo sta\"\"tus $?\n");
    screen.wait_for("status 130");
    screen.type_in("exit 6\n");
    assert_eq!(screen.command.output.finish().unwrap().exited.status, 6);
}

#[test]
fn an_end_of_input_is_the_terminals() {
    let agent = Agent::start();
    let mut screen = Screen::of(agent.client(), exec(&["cat"]));
    screen.type_in("hello\n");
    screen.command.input.end().unwrap();
    let finished = screen.command.output.finish().unwrap();
    assert_eq!(finished.stdout, b"hello\r\nhello\r\n");
    assert_eq!(finished.exited.exit_status(), 0);
}

#[test]
fn all_that_was_on_the_screen_comes() {
    let agent = Agent::start();
    let exec = Exec { tty: tty(), ..sh("i=0; while [ $i -lt 20000 ]; do echo line; i=$((i+1)); done; echo end") };
    let finished = agent.client().exec(exec).unwrap().output.finish().unwrap();
    assert_eq!(finished.stdout.len(), 20_000 * 6 + 5);
    assert!(finished.stdout.ends_with(b"end\r\n"));
}

#[test]
fn a_host_that_goes_hangs_the_terminal_up() {
    let agent = Agent::start();
    let marker = agent.path("hung-up");
    let script = format!("trap 'echo $1 > {}; exit' HUP; echo ready; while :; do sleep 0.05; done", marker.display());
    let mut screen = Screen::of(agent.client(), sh(&script));
    screen.wait_for("ready");
    let pid = screen.command.pid;
    drop(screen);
    wait_until("it is told", || fs::exists(&marker).unwrap());
    wait_until("it ends", || !is_running(pid));
    let mut plain = Screen::of(agent.client(), sh("echo ready; exec sleep 1000"));
    plain.wait_for("ready");
    plain.command.input.signal(SIGHUP).unwrap();
    assert_eq!(plain.command.output.finish().unwrap().exited.signal, SIGHUP);
}

#[test]
fn without_a_command_it_is_a_login_shell() {
    let agent = Agent::start();
    let shell = |script: &str| {
        agent.run(Exec { user: own_user(), ..Exec::default() }, format!("{script}\nexit 7\n").as_bytes())
    };
    let finished = shell("echo $0");
    let name = String::from_utf8(finished.stdout).unwrap();
    assert!(name.trim().starts_with('-') && !name.contains('/'), "{name}");
    assert_eq!(finished.exited.status, 7);
}
