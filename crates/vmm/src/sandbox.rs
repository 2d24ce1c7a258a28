//! The sandbox of a process that is about to make a machine: what all such processes do, whatever they are to reach.

use std::env;

use purlin_sandbox::Filters;
pub use purlin_sandbox::{Access, Identity, Limits, Plan, Reachable, Report, SandboxError, close_inherited};

/// Users that nobody has: each machine that root has made is run by one of its own.
const FIRST_USER: u32 = 0x7000_0000;
/// So many are there.
const USERS: u32 = 0x0fff_0000;

/// Threads and copies of a machine's process: vCPUs, devices, and what serves the control socket.
const MOST_THREADS: u64 = 2048;

/// A user for the machine of this name, if this process is root and so can become one.
pub fn own_user(name: &[u8]) -> Option<Identity> {
    // FNV-1a.
    let hash = name.iter().fold(0x811c_9dc5_u32, |hash, &byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    let user = FIRST_USER + hash % USERS;
    rustix::process::geteuid().is_root().then_some(Identity { uid: user, gid: user })
}

/// A plan that has nothing in it yet, for a process that is this user from then on.
pub fn plan(own: Option<Identity>) -> Plan {
    // Of a user that nobody else is.
    let limits = Limits { threads: own.map(|_| MOST_THREADS), ..Limits::default() };
    Plan { identity: own, limits, filters: filters(), ..Plan::default() }
}

/// Gives everything up but what the plan names, for good. Called while the process has one thread, it returns in a child
/// where the host has PID namespaces ([`purlin_sandbox::enter`]).
pub fn enter(plan: &Plan) -> Result<Report, SandboxError> {
    purlin_sandbox::enter_after(plan, || {
        // Without it, a freeze says so.
        let _ = purlin_engine::memory::prepare();
    })
}

/// Emitted code has its memory by now; there is to be no other that can be executed.
pub fn seal() -> Result<(), SandboxError> {
    purlin_sandbox::seal().map(drop)
}

/// `PURLIN_SANDBOX=log` has what the filters do not allow told to the kernel's log, and done: for who adds a device.
fn filters() -> Filters {
    match env::var("PURLIN_SANDBOX").as_deref() {
        Ok("log") => Filters::Log,
        _ => Filters::Enforce,
    }
}
