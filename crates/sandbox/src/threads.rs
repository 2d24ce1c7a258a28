//! Roles of threads, and the filters that go with them.

use std::{
    io,
    sync::{
        OnceLock,
        mpsc::{self, Sender},
    },
    thread::{self, JoinHandle},
};

use rustix::io::Errno;

use crate::{Filters, Layer, Report, SandboxError, error::host, filter::calls};

/// What a thread is there for; it may make the system calls of that only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Runs a vCPU, under KVM or the translator. Devices' registers are served on it too.
    Vcpu,
    /// Serves a device's queues, timers or output by descriptors that are open: network, console, entropy, balloon.
    Device,
    /// Serves a disk's queue, with an io_uring that is there by then.
    Disk,
    /// Serves the vsock device: Unix sockets below the plan's directories.
    Vsock,
    /// Starts and stops the machine.
    Supervisor,
    /// Serves the control socket, and all that is asked by it: files below the plan's paths, new threads.
    Control,
}

/// How strict the filters are; unset outside of a sandbox.
static FILTERS: OnceLock<Filters> = OnceLock::new();

/// The thread that starts threads for those whose filters do not let them, or would be passed on.
static NURSERY: OnceLock<Sender<Birth>> = OnceLock::new();

/// A thread to be started.
struct Birth {
    name: String,
    job: Box<dyn FnOnce() + Send>,
    answer: Sender<io::Result<JoinHandle<()>>>,
}

/// Installs the process's own filter; from now on threads have roles.
pub(crate) fn enter(filters: Filters, report: &mut Report) -> Result<(), SandboxError> {
    // Landlock tells Unix sockets apart by their paths from this ABI on; until then only a root of its own hides them.
    const RESOLVE_UNIX: u32 = 9;
    let sockets_in_sight = !report.has(Layer::Root) && report.landlock_abi < RESOLVE_UNIX;
    let filter = calls::process();
    let filter = if sockets_in_sight { filter.refuse(&[libc::SYS_connect], libc::EACCES) } else { filter };
    match filter.install(filters) {
        Ok(()) if filters == Filters::Enforce => report.add(Layer::Seccomp),
        Ok(()) => report.lacks(Layer::Seccomp, "its filters are turned off or only tell"),
        Err(error) if error.is_unsupported() => {
            report.lacks(Layer::Seccomp, format!("the kernel has no filters of system calls ({error})"));
        }
        Err(error) => return Err(error.into()),
    }
    let in_force = if report.has(Layer::Seccomp) || filters == Filters::Log { filters } else { Filters::Off };
    let _ = FILTERS.set(in_force);
    if in_force != Filters::Off {
        let _ = NURSERY.set(start_nursery().map_err(|error| os_error("start a thread", &error))?);
    }
    Ok(())
}

/// Gives the calling thread its role, for good. Outside of a sandbox this does nothing.
///
/// A thread that it starts from then on has the same role at most, and most roles cannot start any: see [`spawn`]. A
/// thread that needs something at its beginning only (an io_uring) makes that before it takes its role.
pub fn thread(role: Role) -> Result<(), SandboxError> {
    Ok(calls::thread(role).install(*FILTERS.get().unwrap_or(&Filters::Off))?)
}

/// Starts a thread, which is to call [`thread()`] itself: in a sandbox another thread does it, so that the new one does
/// not inherit the role of the calling one. Outside of a sandbox this is [`std::thread::Builder::spawn`]. Linux shows the
/// first 15 bytes of a name.
pub fn spawn(name: &str, job: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    let Some(nursery) = NURSERY.get() else { return thread::Builder::new().name(name.to_owned()).spawn(job) };
    let (answer, result) = mpsc::channel();
    let gone = || io::Error::other("the thread that starts threads is gone");
    nursery.send(Birth { name: name.to_owned(), job: Box::new(job), answer }).map_err(|_| gone())?;
    result.recv().map_err(|_| gone())?
}

fn start_nursery() -> io::Result<Sender<Birth>> {
    let (births, inbox) = mpsc::channel::<Birth>();
    thread::Builder::new().name("threads".into()).spawn(move || {
        for Birth { name, job, answer } in inbox {
            // Nobody waits for it only if that thread has panicked.
            let _ = answer.send(thread::Builder::new().name(name).spawn(job));
        }
    })?;
    Ok(births)
}

/// Forbids new executable memory, for all threads and for good, once what emits code has what it needs: memory that is
/// executable can be made neither writable nor anew. Returns whether the kernel has this (Linux 6.3); each thread's role
/// forbids it in any case.
pub fn seal() -> Result<bool, SandboxError> {
    let (flags, zero): (libc::c_ulong, libc::c_ulong) = (libc::PR_MDWE_REFUSE_EXEC_GAIN.into(), 0);
    // SAFETY: takes numbers only; what it forbids is an error of later calls.
    #[allow(unsafe_code)]
    let result = unsafe { libc::prctl(libc::PR_SET_MDWE, flags, zero, zero, zero) };
    match io::Error::last_os_error() {
        _ if result == 0 => Ok(true),
        error if error.raw_os_error() == Some(libc::EINVAL) => Ok(false),
        error => Err(os_error("forbid new executable memory", &error)),
    }
}

fn os_error(what: &'static str, error: &io::Error) -> SandboxError {
    host(what)(Errno::from_io_error(error).unwrap_or(Errno::PERM))
}
