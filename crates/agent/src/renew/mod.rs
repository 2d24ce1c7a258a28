//! Making a copied machine one of its own. What the host waits for is done first: the name, the machine ID, randomness;
//! the old keys and addresses are out of use. What takes long follows.

mod clock;
mod identity;
mod interface;
mod journal;
mod network;
mod random;
mod ssh;

use std::{thread, time::Duration};

use purlin_agent::protocol::{AgentMessage, Renew, RenewEnded, Renewed};
use rustix::rand::{GetRandomFlags, getrandom};

use crate::{
    info::machine_id,
    link::{End, Link},
    turn::{Turn, Urgent},
};

/// For how long others stand back at most once the machine is another one.
const URGENT: Duration = Duration::from_secs(1);

/// What could not be done, a line for each.
type Problems = Vec<String>;

/// Renews the machine.
pub fn run(link: &mut Link, renew: &Renew) -> Result<(), End> {
    identity::check(renew)?;
    network::check(&renew.cards)?;
    random::check(&renew.random_seed)?;
    let mut problems = Problems::new();
    let first = Turn::first();
    // First, for what is made below is made of it.
    note(&mut problems, "the random numbers", random::add(&renew.random_seed));
    let cards = network::take_down(&renew.cards, &mut problems);
    let keys = renew.remake_ssh_host_keys.then(|| ssh::take_down(&mut problems));
    if renew.time_ns > 0 {
        note(&mut problems, "the clock", clock::set(renew.time_ns));
    }
    let old_id = machine_id();
    let machine_id = identity::renew(renew, &mut problems);
    // In place when the host, which has its answer then, asks for something.
    let urgent = Urgent::begin();
    let answered = link.send(AgentMessage::Renewed(Renewed { machine_id: machine_id.clone(), problems }));
    first.then_last();
    let put_off = Duration::from_millis(renew.put_off_ms.into());
    thread::sleep(put_off.min(URGENT));
    drop(urgent);
    thread::sleep(put_off.saturating_sub(URGENT));

    // The host may have what it wants, and be gone: the machine needs the rest all the same.
    let mut problems = Problems::new();
    network::bring_up(cards, &mut problems);
    if let Some(keys) = keys {
        keys.bring_up(&mut problems);
    }
    journal::follow(&old_id, &machine_id, &mut problems);
    answered?;
    link.send(AgentMessage::RenewEnded(RenewEnded { problems }))
}

fn note<E: std::fmt::Display>(problems: &mut Problems, what: &str, result: Result<(), E>) {
    if let Err(error) = result {
        problems.push(format!("{what}: {error}"));
    }
}

/// Goes through as much of it as changes nothing, in a thread that ends with it.
pub fn rehearse() {
    let first = Turn::first();
    let mut seed = [0; 64];
    if getrandom(&mut seed, GetRandomFlags::empty()).is_ok() {
        let _ = random::add(&seed);
    }
    identity::rehearse();
    network::rehearse();
    drop(Urgent::begin());
    first.then_last();
}

/// Runs a program; what it says goes into the error.
fn run_program(program: &str, arguments: &[&str], input: &str) -> Result<String, String> {
    use std::{
        io::Write,
        process::{Command, Stdio},
    };
    let mut command = Command::new(program);
    command.args(arguments).env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|error| format!("{program}: {error}"))?;
    if let Some(mut pipe) = child.stdin.take() {
        // Who does not read it says more by how it ends.
        let _ = pipe.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().map_err(|error| format!("{program}: {error}"))?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => {
            let said = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ");
            Err(format!("{program} {}: {} {said}", arguments.join(" "), output.status))
        }
    }
}
