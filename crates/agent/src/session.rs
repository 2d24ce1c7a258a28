//! A session: a greeting, a request, its answer.

use std::{net::Shutdown, os::unix::net::UnixStream, time::Duration};

use purlin_agent::protocol::{AgentMessage, Failed, FailureKind, Hello, HostMessage, VERSION};

use crate::{
    dial, exec, files, info,
    link::{End, Link},
    renew,
};

/// Who has said nothing for so long does not keep a session from others.
const PATIENCE: Duration = Duration::from_secs(30);

/// Serves a connection to its end.
pub fn serve(stream: UnixStream) {
    let mut link = Link::new(stream);
    if let Err(End::Failed(failed)) = answer(&mut link) {
        // The host may have gone meanwhile.
        let _ = link.send(AgentMessage::Failed(failed));
    }
    let _ = link.stream.shutdown(Shutdown::Both);
}

/// Tells a host that it has too many connections.
pub fn refuse(stream: UnixStream, most: usize) {
    let _ = stream.set_write_timeout(Some(Duration::from_secs(1)));
    let mut link = Link::new(stream);
    let busy = format!("the guest's agent has {most} sessions already: end some of them, or try again later");
    let _ = greet(&mut link).and_then(|()| link.send(AgentMessage::Failed(Failed::new(FailureKind::Busy, busy))));
}

fn greet(link: &mut Link) -> Result<(), End> {
    link.send(AgentMessage::Hello(Hello { protocol: VERSION, agent: env!("CARGO_PKG_VERSION").into() }))
}

fn answer(link: &mut Link) -> Result<(), End> {
    greet(link)?;
    link.stream.set_read_timeout(Some(PATIENCE)).map_err(|_| End::Gone)?;
    let request = link.receive()?;
    link.stream.set_read_timeout(None).map_err(|_| End::Gone)?;
    match request {
        HostMessage::Info(_) => link.send(AgentMessage::Info(info::info())),
        HostMessage::Exec(exec) => exec::run(link, &exec),
        HostMessage::Push(push) => files::push(link, &push),
        HostMessage::Pull(pull) => files::pull(link, &pull),
        HostMessage::Renew(renew) => renew::run(link, &renew),
        HostMessage::Dial(dial) => dial::run(link, &dial),
        _ => Err(End::protocol("a session begins with a request")),
    }
}
