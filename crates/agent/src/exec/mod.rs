//! Running a command for the host.

mod child;
mod environment;
mod relay;
mod terminal;

use purlin_agent::protocol::{AgentMessage, Exec, Started};

use self::relay::Relay;
use crate::{
    link::{End, Link},
    users,
};

/// Runs the command, and tells the host what it writes and how it ends.
pub fn run(link: &mut Link, exec: &Exec) -> Result<(), End> {
    let user = users::find(&exec.user)?;
    let (child, streams) = child::spawn(exec, &user)?;
    let relay = Relay::new(link, child, streams)?;
    relay
        .link
        .send(AgentMessage::Started(Started { pid: relay.child.pid() }))
        .inspect_err(|_| relay.child.hang_up())?;
    relay.run()
}
