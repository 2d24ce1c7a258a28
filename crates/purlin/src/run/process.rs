//! The process of the machine, as the command sees it: started, told things, and seen to its end.

use std::{
    env, io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::{net::UnixStream, process::CommandExt},
    },
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use rustix::{
    fs::{Mode, OFlags},
    io::retry_on_intr,
    process::{
        Pid, PidfdFlags, Signal, WaitOptions, WaitStatus, getpid, kill_process, pidfd_open, pidfd_send_signal,
        set_child_subreaper, waitpid,
    },
    stdio::{stderr, stdout},
    termios::isatty,
};

use super::{
    inside,
    link::{self, Hearer, Teller},
    order::{Boot, End, How, Order, Said, Told},
};
use crate::terminal;

/// The machine's process. Dropping it ends it.
pub struct MachineProcess {
    /// It goes on in a child where the host has PID namespaces.
    first: Child,
    remote: Arc<Remote>,
    hearer: Hearer,
    /// Once it is in its sandbox.
    number: Option<u32>,
    /// The NAT's process, which it has started.
    network: Option<u32>,
}

/// Steers the machine's process, from any thread. If that is gone the run is over, and nothing happens.
pub struct Remote {
    teller: Teller,
    target: Mutex<Target>,
}

/// Whom signals go to.
struct Target {
    /// The process that was started, then the one that goes on in the sandbox.
    process: OwnedFd,
    /// The user did not want to wait for it.
    ended: bool,
}

impl Remote {
    /// Tells it something.
    pub fn tell(&self, told: &Told) {
        let _ = self.teller.tell(told);
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        let _ = pidfd_send_signal(&self.target().process, signal);
    }

    /// Ends it, whatever it is doing. Its NAT ends with it.
    pub fn end_at_once(&self) {
        let mut target = self.target();
        target.ended = true;
        let _ = pidfd_send_signal(&target.process, Signal::KILL);
        drop(target);
        // Copies that it has made of itself may keep its end open: nobody waits for those.
        self.teller.hang_up();
    }

    /// The one that was started goes on as this one.
    fn is_now(&self, process: OwnedFd) {
        let mut target = self.target();
        target.process = process;
        if target.ended {
            let _ = pidfd_send_signal(&target.process, Signal::KILL);
        }
    }

    fn was_ended(&self) -> bool {
        self.target().ended
    }

    fn target(&self) -> MutexGuard<'_, Target> {
        self.target.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl MachineProcess {
    /// Starts it. Its standard input will be `input`, output and errors are this process's; `vsock` is of the socket that
    /// it is lent. The thread that calls this is to live as long as the process does, which is killed when its parent ends.
    pub fn start(order: &Order, input: BorrowedFd<'_>, vsock: Option<&[OwnedFd; 2]>) -> io::Result<Self> {
        // What goes on in a child of the process that is started becomes this one's own.
        set_child_subreaper(Some(getpid()))?;
        let (ours, theirs) = UnixStream::pair()?;
        let mut command = Command::new("/proc/self/exe");
        command.arg0("purlin").arg(inside::VERB).stdin(OwnedFd::from(theirs));
        // The user's environment has keys and passwords in it, and the guest may come to read this process's memory.
        command.env_clear().envs(env::vars_os().filter(|(name, _)| ENVIRONMENT.iter().any(|needed| name == needed)));
        let first = command.stdout(output(stdout())).stderr(output(stderr())).spawn()?;
        drop(command);
        // A child that has not been waited for has its number for itself.
        let target = Target { process: pidfd_open(Pid::from_child(&first), PidfdFlags::empty())?, ended: false };
        let descriptors: Vec<_> = [input].into_iter().chain(vsock.into_iter().flatten().map(AsFd::as_fd)).collect();
        link::send_descriptors(&ours, &descriptors)?;
        let (teller, hearer) = link::open(ours)?;
        teller.tell(order)?;
        let remote = Arc::new(Remote { teller, target: Mutex::new(target) });
        Ok(Self { first, remote, hearer, number: None, network: None })
    }

    /// What steers it.
    pub fn remote(&self) -> Arc<Remote> {
        self.remote.clone()
    }

    /// Its number on the host, once it is in its sandbox.
    pub fn number(&self) -> Option<u32> {
        self.number
    }

    /// Waits until it has opened all that its order names; how it ended if it could not.
    pub fn opened(&mut self) -> Option<End> {
        match self.hearer.hear() {
            Some(Said::Opened(network)) => {
                self.network = network;
                None
            }
            Some(Said::Ended(end)) => Some(end),
            _ => Some(self.died()),
        }
    }

    /// Has it start the machine, and waits for the end of the run.
    pub fn run(&mut self, boot: Boot) -> End {
        match self.remote.teller.tell(&Told::Boot(boot)) {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                let how = How::Failed(format!("cannot tell the machine's process what to boot: {error}"));
                return End { how, in_line: false, profile: None };
            }
            // If it is gone it says why, or did not.
            _ => {}
        }
        let end = match self.hearer.hear() {
            Some(Said::Entered(number)) => {
                self.entered(number);
                self.hearer.hear()
            }
            said => said,
        };
        // It is believed nothing but how it ended: the guest may have taken it over.
        match end {
            Some(Said::Ended(end)) => {
                self.reap();
                end
            }
            _ => self.died(),
        }
    }

    fn entered(&mut self, number: u32) {
        self.number = Some(number);
        let first = Pid::from_child(&self.first);
        if pid(number) != Some(first) {
            // It has nothing more to do.
            wait(first);
        }
        let process = pid(number).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        process.into_iter().for_each(|process| self.remote.is_now(process));
        // By now it is a child of this process.
        self.remote.tell(&Told::Adopted);
    }

    /// The end of a process that has said nothing of it.
    fn died(&mut self) -> End {
        let signal = self.reap().and_then(|status| status.terminating_signal()).and_then(Signal::from_named_raw);
        let how = match signal {
            _ if self.remote.was_ended() => How::Stopped,
            // It was not so far that it leaves these to the command, which has got the same, or is about to hear of it.
            Some(signal @ (Signal::HUP | Signal::INT | Signal::TERM)) if self.number.is_none() => {
                crate::signals::Signal::try_from(signal.as_raw()).map_or(How::Stopped, How::Signalled)
            }
            signal => How::Crashed(cause(signal)),
        };
        // Where the guest has left the cursor nobody knows.
        End { how, in_line: terminal::is_shared(), profile: None }
    }

    /// Sees to its end, which is due, and to that of its network.
    fn reap(&mut self) -> Option<WaitStatus> {
        self.remote.teller.hang_up();
        let first = Pid::from_child(&self.first);
        let status = match self.number.and_then(pid) {
            // No guest has run: it ends by itself.
            None => wait(first),
            Some(own) => end(own),
        };
        self.network.take().and_then(pid).map(end);
        status
    }
}

impl Drop for MachineProcess {
    fn drop(&mut self) {
        // It may have been reaped, which does no harm.
        self.reap();
    }
}

/// What of the environment the process has a use for.
const ENVIRONMENT: [&str; 4] = ["PURLIN_LOG", "PURLIN_SANDBOX", "PURLIN_IO_URING", "RUST_BACKTRACE"];

/// One of this process's outputs for another one. Of a terminal that is to be written to only: what is typed there is read
/// here.
fn output(ours: BorrowedFd<'_>) -> Stdio {
    if !isatty(ours) {
        return Stdio::inherit();
    }
    let path = format!("/proc/self/fd/{}", ours.as_raw_fd());
    let flags = OFlags::WRONLY | OFlags::NOCTTY | OFlags::CLOEXEC;
    // After su(1) it may be another user's.
    rustix::fs::open(path, flags, Mode::empty()).map_or(Stdio::inherit(), Stdio::from)
}

/// Why the process ended that has not said so itself.
fn cause(signal: Option<Signal>) -> String {
    let Some(signal) = signal else { return "the machine's process ended and did not say why".into() };
    let name = crate::signals::Signal::try_from(signal.as_raw());
    let name = name.map_or_else(|_| format!("signal {}", signal.as_raw()), |signal| signal.as_str().to_owned());
    let why = match signal {
        Signal::SYS => {
            ": it has tried what its sandbox forbids, which is a defect of purlin, or the guest has taken it over"
        }
        _ => "",
    };
    format!("the machine's process was ended by {name}{why}")
}

fn pid(number: u32) -> Option<Pid> {
    Pid::from_raw(number.cast_signed())
}

/// Ends a child of this process, if it has not ended.
fn end(child: Pid) -> Option<WaitStatus> {
    match waitpid(Some(child), WaitOptions::NOHANG) {
        Ok(Some((_, status))) => Some(status),
        Ok(None) => {
            // A child's number is nobody else's until it is waited for.
            let _ = kill_process(child, Signal::KILL);
            wait(child)
        }
        Err(_) => None,
    }
}

fn wait(child: Pid) -> Option<WaitStatus> {
    let ended = retry_on_intr(|| waitpid(Some(child), WaitOptions::empty()));
    ended.ok().flatten().map(|(_, status)| status)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_that_the_sandbox_forbids_is_told_as_such() {
        assert_eq!(cause(Some(Signal::SEGV)), "the machine's process was ended by SIGSEGV");
        let forbidden = cause(Some(Signal::SYS));
        assert!(forbidden.contains("by SIGSYS: it has tried what its sandbox forbids"), "{forbidden}");
    }
}
