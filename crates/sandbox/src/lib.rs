//! The sandbox of a process that runs hostile code, such as a virtual machine's.
//!
//! [`enter`] takes a [`Plan`] of all that the process is to reach and gives everything else up, for good: other files
//! (a root of its own), other processes, the network, privileges, and system calls that it has no use for. It is called
//! while the process has one thread, and goes on, maybe in a child, with a [`Report`]. Afterwards:
//! - [`seal`] forbids new executable memory, once a translator has made its own;
//! - each thread calls [`thread()`] with its [`Role`], or is started by [`spawn`], which does that: fewer system calls still.
//!
//! Threads share memory: who has taken one over can make another one do what it may. So the process-wide filter is the
//! wall, and the threads' own make a first mistake less useful.
//!
//! A host may lack some of it (a container without user namespaces, an old kernel). What is missing is in the report, in
//! words, and nothing fails for it unless [`Plan::require`] says so. Without a root of its own, the process can ask for
//! the metadata of any file that its user may see, and cannot connect to any Unix socket, be it its own.

mod descriptors;
mod error;
mod files;
pub mod filter;
mod fork;
mod limits;
mod namespaces;
mod plan;
mod privileges;
mod probe;
mod process;
mod report;
mod root;
mod threads;

pub use descriptors::close_inherited;
pub use error::SandboxError;
pub use files::deny as deny_files;
pub use plan::{Access, Filters, Identity, Layer, Limits, Plan, Reachable};
pub use privileges::give_up as give_up_privileges;
pub use probe::probe;
pub use report::{Missing, Report};
pub use threads::{Role, seal, spawn, thread};

use crate::process::Proc;

/// Enters the sandbox, for good. The process must have one thread.
///
/// Where there is to be a PID namespace, this returns in a *child* of the process that called it, which is process 1 of
/// that namespace; the process that called it exits with status 0, without running destructors, as soon as the child
/// lives. So whoever started it sees it end, and knows the sandboxed process by [`Report::pid`]. If it is a child
/// subreaper (`PR_SET_CHILD_SUBREAPER`), the sandboxed process becomes its child. Other children of the process that
/// called this are no longer anybody's here: their numbers mean nothing in the new namespace.
///
/// For process 1 of a namespace, signals that it has no handler for do nothing, except a fault of its own, a forbidden
/// system call, and SIGKILL and SIGSTOP from outside. A parent's death signal (`PR_SET_PDEATHSIG`) is not set in it;
/// the filters let it be set to SIGKILL, once the process that called this has been waited for: its exit would count.
///
/// After an error the process is in no state to go on: it may have lost part of what it had. The error comes out in the
/// child if there is one.
pub fn enter(plan: &Plan) -> Result<Report, SandboxError> {
    enter_after(plan, || {})
}

/// As [`enter`]; `last` is called in the process that goes on, while it still has the old root: for what it is to open there
/// of itself, such as a file of /proc/self, which is another process's before.
pub fn enter_after(plan: &Plan, last: impl FnOnce()) -> Result<Report, SandboxError> {
    plan.check()?;
    process::check_single_threaded()?;
    descriptors::check(&plan.directories)?;
    let mut report = Report::new();
    // rustix looks at the auxiliary vector when it first needs something of it, such as where the vDSO is for the time: by a
    // call that the filters do not have, or in /proc.
    let _ = rustix::param::page_size();

    let privileged = privileges::may_administer();
    if !privileged {
        privileges::take_identity(plan, &mut report)?;
        namespaces::unshare_user(&mut report);
    }
    namespaces::unshare_others(&mut report);
    report.pid = if report.has(Layer::PidNamespace) { fork::go_on_in_child()? } else { std::process::id() };
    let proc = Proc::open();
    last();
    root::change(plan, &mut report)?;
    if privileged {
        privileges::take_identity(plan, &mut report)?;
        // The last one: what the process has a namespace of is not its own by this, but the host's root's.
        namespaces::unshare_user_in(&proc, &mut report);
    }

    limits::set(&plan.limits)?;
    privileges::give_up()?;
    files::restrict(plan, &mut report)?;
    threads::enter(plan.filters, &mut report)?;
    report.check(&plan.require)?;
    Ok(report)
}
