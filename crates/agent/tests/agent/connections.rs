//! The way to the agent through a machine's vsock socket. What the machine's device does is played here; `cargo xtask
//! image` goes through the real one.

use std::{
    io::{self, BufRead, BufReader, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    thread,
    time::Duration,
};

use purlin_agent::client::{ClientError, connect, connect_when_up, greeting};

use crate::{Agent, PATIENCE};

/// A machine's socket that answers each connection in turn as the functions do.
fn machine(socket: &Path, answers: Vec<Box<dyn FnOnce(UnixStream) + Send>>) {
    let listener = UnixListener::bind(socket).unwrap();
    thread::spawn(move || {
        for answer in answers {
            let (stream, _) = listener.accept().unwrap();
            let mut line = String::new();
            BufReader::with_capacity(1, &stream).read_line(&mut line).unwrap();
            assert_eq!(line, greeting());
            answer(stream);
        }
    });
}

fn ends(_: UnixStream) {}

/// Leads to a true agent.
fn leads_to(agent: &Agent) -> Box<dyn FnOnce(UnixStream) + Send> {
    let mut theirs = agent.stream();
    Box::new(move |mut ours| {
        ours.write_all(b"OK 1073741824\n").unwrap();
        let (mut from, mut to) = (ours.try_clone().unwrap(), theirs.try_clone().unwrap());
        thread::spawn(move || io::copy(&mut from, &mut to));
        thread::spawn(move || io::copy(&mut theirs, &mut ours));
    })
}

#[test]
fn an_agent_behind_a_machines_socket() {
    let agent = Agent::start();
    let socket = agent.path("machine");
    machine(&socket, vec![Box::new(ends), Box::new(ends), leads_to(&agent)]);
    assert!(matches!(connect(&socket, PATIENCE), Err(ClientError::NoAgent)));
    let info = connect_when_up(&socket, PATIENCE).unwrap().info().unwrap();
    assert_eq!(info, purlin_agent::protocol::Info { uptime_ms: info.uptime_ms, ..agent.client().info().unwrap() });
}

#[test]
fn a_socket_that_leads_nowhere() {
    let agent = Agent::start();
    let error = connect(&agent.path("none"), PATIENCE).map(drop).unwrap_err();
    assert!(error.to_string().starts_with("cannot connect to the machine's socket "), "{error}");
    // One that is no machine's, and one of a machine that says nothing.
    let socket = agent.path("other");
    machine(&socket, vec![Box::new(|mut stream| stream.write_all(b"HTTP/1.1 400 Bad Request").unwrap())]);
    assert!(matches!(connect(&socket, PATIENCE), Err(ClientError::Io(_))));
    let _held = UnixListener::bind(agent.path("held")).unwrap();
    let moment = Duration::from_millis(50);
    assert!(matches!(connect(&agent.path("held"), moment), Err(ClientError::NoAgent)));
    assert!(matches!(connect_when_up(&agent.path("held"), moment), Err(ClientError::NoAgent)));
}
