//! What the VM's process may take of the host.

use std::{path::Path, sync::Arc};

use purlin_api::{ErrorBody, Machine};
use purlin_shares::{
    Group, How, Means, Shares,
    throttle::{Governor, Throttle},
};

use super::start::failed;
use crate::{Brake, Running};

// What users are told, and what is so.
const _: () = assert!(Machine::CPU_SHARES == Shares::DEFAULT_WEIGHT);

/// The shares of a machine.
pub fn shares(machine: &Machine) -> Shares {
    Shares { cpu_weight: machine.cpu_shares(), cpu_cap: machine.cpu_cap, memory_max: machine.memory_max }
}

/// Puts this process, and what it starts from now on, into a group of its own: called before it takes memory. Who says
/// nothing of shares has those of everybody, and is not refused where the host cannot enforce them.
pub fn enter(dir: &Path, machine: &Machine) -> Result<How, ErrorBody> {
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    let (mut group, how) = Group::create(&name, &shares(machine)).map_err(failed)?;
    group.enter().map_err(failed)?;
    Ok(how)
}

/// Keeps the cap, where the process is to do that itself.
pub fn govern(running: &Running, machine: &Machine, how: How) -> Result<Option<Arc<Governor>>, ErrorBody> {
    if how.cpu != Means::Process {
        return Ok(None);
    }
    let governor = Governor::start(machine.cpu_cap, Arc::new(OfVcpus(running.brake())));
    governor.map(|governor| Some(Arc::new(governor))).map_err(|e| failed(format!("cannot start a thread: {e}")))
}

struct OfVcpus(Brake);

impl Throttle for OfVcpus {
    fn pause_vcpus(&self) {
        self.0.stop();
    }

    fn resume_vcpus(&self) {
        self.0.release();
    }
}
