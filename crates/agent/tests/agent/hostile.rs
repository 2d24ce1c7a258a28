//! Hosts that say what they should not, and what comes of it.

use std::io::{Read, Write};

use purlin_agent::{
    client::{Client, ClientError},
    frame::{FrameReader, MAX_MESSAGE, encode},
    protocol::{AgentFrame, AgentMessage, Empty, Failed, FailureKind, HostFrame, HostMessage, Renew, VERSION},
};

use crate::{Agent, exec, kind, wait_until};

/// What the agent says behind its greeting to a host that says this, and then no more.
fn answer(agent: &Agent, said: &[u8]) -> Option<Failed> {
    let mut stream = agent.stream();
    // The agent may have had enough already.
    let _ = stream.write_all(said);
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let mut bytes = Vec::new();
    // What it has not read resets the connection of a Unix socket.
    let _ = stream.read_to_end(&mut bytes);
    let mut frames = FrameReader::<AgentFrame>::new();
    frames.feed(&bytes);
    let mut next = || frames.next_message().unwrap().and_then(|frame| frame.message);
    assert!(matches!(next(), Some(AgentMessage::Hello(hello)) if hello.protocol == VERSION));
    match next() {
        None => None,
        Some(AgentMessage::Failed(failed)) => Some(failed),
        other => panic!("{other:?}"),
    }
}

fn frame(message: HostMessage) -> Vec<u8> {
    encode(&HostFrame::from(message)).unwrap()
}

#[test]
fn frames_that_are_none() {
    let agent = Agent::start();
    let too_long = (MAX_MESSAGE as u32 + 1).to_le_bytes();
    let half = &frame(HostMessage::Exec(exec(&["true"])))[..6];
    let cases: [(&[u8], &str); 7] = [
        (&too_long, "is too long"),
        (&[0xff; 4], "is too long"),
        (&[3, 0, 0, 0, 0xff, 0xff, 0xff], "cannot be understood"),
        (half, "ends amid a message"),
        (&frame(HostMessage::StdinEnd(Empty {})), "begins with a request"),
        (&[0, 0, 0, 0], "does not know"),
        (&[2, 0, 0, 0, 0x7a, 0], "does not know"),
    ];
    for (said, wanted) in cases {
        let failed = answer(&agent, said).unwrap();
        assert_eq!(failed.kind(), FailureKind::Protocol);
        assert!(failed.message.contains(wanted) && !failed.message.contains('\n'), "{failed:?}, not {wanted}");
    }
    assert_eq!(answer(&agent, &[]), None);
    assert_eq!(agent.run(exec(&["echo", "still there"]), b"").stdout, b"still there\n");
}

#[test]
fn frames_that_do_not_belong_to_a_command_end_it() {
    let agent = Agent::start();
    let command = frame(HostMessage::Exec(exec(&["sleep", "1000"])));
    for wrong in [frame(HostMessage::DataEnd(Empty {})), vec![1, 0, 0, 0, 0xff]] {
        let mut stream = agent.stream();
        stream.write_all(&[&command[..], &wrong[..]].concat()).unwrap();
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        let mut frames = FrameReader::<AgentFrame>::new();
        frames.feed(&bytes);
        let said = std::iter::from_fn(|| frames.next_message().unwrap()?.message).last();
        assert!(matches!(said, Some(AgentMessage::Failed(failed)) if failed.kind() == FailureKind::Protocol));
    }
}

#[test]
fn an_identity_that_cannot_be_changes_nothing() {
    let agent = Agent::start();
    let before = agent.client().info().unwrap();
    let bad = [
        Renew { host_name: "a b".into(), ..Renew::default() },
        Renew { machine_id: "x".into(), ..Renew::default() },
        Renew { random_seed: vec![0; 513], ..Renew::default() },
    ];
    for renew in bad {
        assert_eq!(kind(agent.client().renew(renew).map(drop)), FailureKind::Invalid);
    }
    let after = agent.client().info().unwrap();
    assert_eq!((after.host_name, after.machine_id), (before.host_name, before.machine_id));
}

#[test]
fn there_is_a_limit_of_sessions() {
    let agent = Agent::start();
    // They have said nothing yet.
    let mut idle = Vec::new();
    let busy = loop {
        // Before it asks: its own session would be the last that there is room for.
        idle.push(agent.stream());
        match Client::over(agent.stream()).and_then(Client::info) {
            Ok(_) => assert!(idle.len() < 100, "no limit"),
            Err(error) => break error,
        }
    };
    assert!(matches!(busy, ClientError::Failed(failed) if failed.kind() == FailureKind::Busy));
    idle.clear();
    wait_until("there is room again", || agent.client().info().is_ok());
}

#[test]
fn an_agent_of_another_version_is_told() {
    let (ours, mut theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let hello = purlin_agent::protocol::Hello { protocol: VERSION + 1, agent: "9.0".into() };
    theirs.write_all(&encode(&AgentFrame::from(AgentMessage::Hello(hello))).unwrap()).unwrap();
    let error = Client::over(ours).map(drop).unwrap_err();
    assert!(error.to_string().starts_with("the guest's agent 9.0 speaks version 2"), "{error}");
}
