//! The command's process: how it begins, how it is signalled, how it ends.
#![allow(unsafe_code)]

use std::{
    ffi::{CString, OsStr, OsString},
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{ffi::OsStrExt, process::CommandExt},
    },
    path::Path,
    process::{Command, ExitStatus, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
};

use nix::libc::{SIG_DFL, SIGRTMAX};
use purlin_agent::protocol::{Exec, Failed, FailureKind};
use rustix::{
    io::Errno,
    process::{Pid, Signal, WaitId, WaitIdOptions, chdir, ioctl_tiocsctty, kill_process_group, setsid, waitid},
    thread::{Gid, Uid, set_thread_gid, set_thread_groups, set_thread_uid},
};

use super::{environment::environment, terminal::Terminal};
use crate::users::User;

/// A process that has been started, and is waited for by a thread.
#[derive(Debug)]
pub struct Child {
    pid: Pid,
    state: Arc<Mutex<State>>,
    /// It hangs up when the process has ended.
    end: OwnedFd,
}

#[derive(Debug)]
enum State {
    Running(std::process::Child),
    Ended(ExitStatus),
}

/// The agent's ends of what the command reads and writes.
#[derive(Debug)]
pub struct Streams {
    /// To its standard input.
    pub input: Option<OwnedFd>,
    /// From its standard output, or its terminal.
    pub output: OwnedFd,
    /// From its standard error, if it has no terminal.
    pub error: Option<OwnedFd>,
    /// Its terminal.
    pub terminal: Option<Terminal>,
}

/// Starts the command as `user`.
pub fn spawn(exec: &Exec, user: &User) -> Result<(Child, Streams), Failed> {
    let what = exec.argv.first().map_or(user.shell.as_bytes(), Vec::as_slice);
    let what = String::from_utf8_lossy(what).into_owned();
    let variables = environment(exec, user)?;
    let steps = Steps::new(exec, user)?;
    let mut command = command(exec, user);
    command.env_clear().envs(variables);
    let terminal = stdio(&mut command, exec, user).map_err(|error| not_started(&what, exec, user, &error))?;
    // SAFETY: between fork and exec `take` makes system calls only; it neither allocates nor takes a lock.
    unsafe { command.pre_exec(move || steps.take()) };
    let child = command.spawn().map_err(|error| not_started(&what, exec, user, &error))?;
    // The command's end of a terminal must be nobody else's.
    drop(command);
    follow(child, terminal).map_err(|error| not_started(&what, exec, user, &error))
}

/// The program and its arguments. A login shell is told by a dash that it is one.
fn command(exec: &Exec, user: &User) -> Command {
    let text = |bytes: &Vec<u8>| OsStr::from_bytes(bytes).to_owned();
    let Some((program, arguments)) = exec.argv.split_first() else {
        let mut command = Command::new(&user.shell);
        let mut name = OsString::from("-");
        name.push(Path::new(&user.shell).file_name().unwrap_or_default());
        command.arg0(name);
        return command;
    };
    let mut command = Command::new(text(program));
    command.args(arguments.iter().map(text));
    command
}

fn stdio(command: &mut Command, exec: &Exec, user: &User) -> io::Result<Option<Terminal>> {
    let Some(tty) = &exec.tty else {
        command.stdin(if exec.with_stdin { Stdio::piped() } else { Stdio::null() });
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        return Ok(None);
    };
    let (terminal, slave) = Terminal::open(tty, user.uid)?;
    command.stdin(slave.try_clone()?).stdout(slave.try_clone()?).stderr(slave);
    Ok(Some(terminal))
}

/// What the new process does before it becomes the command.
struct Steps {
    has_terminal: bool,
    /// The user to become, if that is another one than the agent's.
    user: Option<(Uid, Gid, Vec<Gid>)>,
    directory: CString,
    /// Where there is no such directory `/` does.
    or_root: bool,
}

/// Which step has failed: it is told to the parent above the error's own number, for that is all that it is told.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    Session = 1,
    User = 2,
    Directory = 3,
}

/// Above all error numbers (`MAX_ERRNO` is 4095).
const STEP_SHIFT: u32 = 16;

impl Steps {
    fn new(exec: &Exec, user: &User) -> Result<Self, Failed> {
        let or_root = exec.cwd.is_empty();
        let directory = if or_root { user.home.clone().into_bytes() } else { exec.cwd.clone() };
        let directory = CString::new(directory)
            .map_err(|_| Failed::new(FailureKind::Invalid, "a directory's name has no zero byte in it"))?;
        let own = rustix::process::geteuid();
        let is_own = !own.is_root() && own.as_raw() == user.uid;
        let groups = user.groups.iter().map(|group| Gid::from_raw(*group)).collect();
        let user = (!is_own).then(|| (Uid::from_raw(user.uid), Gid::from_raw(user.gid), groups));
        Ok(Self { has_terminal: exec.tty.is_some(), user, directory, or_root })
    }

    fn take(&self) -> io::Result<()> {
        act_as_usual();
        self.session().map_err(Step::Session.failed())?;
        self.become_user().map_err(Step::User.failed())?;
        self.enter_directory().map_err(Step::Directory.failed())
    }

    fn session(&self) -> Result<(), Errno> {
        setsid()?;
        // SAFETY: the command's standard input is open.
        let input = unsafe { BorrowedFd::borrow_raw(0) };
        if self.has_terminal { ioctl_tiocsctty(input) } else { Ok(()) }
    }

    fn become_user(&self) -> Result<(), Errno> {
        let Some((uid, gid, groups)) = &self.user else { return Ok(()) };
        // The process has this thread only.
        set_thread_groups(groups)?;
        set_thread_gid(*gid)?;
        set_thread_uid(*uid)
    }

    fn enter_directory(&self) -> Result<(), Errno> {
        match chdir(&*self.directory) {
            Err(_) if self.or_root => chdir(c"/"),
            entered => entered,
        }
    }
}

/// Each signal does what it does by itself, whatever the agent was started with.
fn act_as_usual() {
    for signal in 1..=SIGRTMAX() {
        // SAFETY: there is no handler; of those that cannot be changed that is said, and no more.
        unsafe { nix::libc::signal(signal, SIG_DFL) };
    }
}

impl Step {
    fn failed(self) -> impl Fn(Errno) -> io::Error {
        move |error| io::Error::from_raw_os_error(((self as i32) << STEP_SHIFT) | error.raw_os_error())
    }
}

/// What to tell the host of a command that could not be started.
fn not_started(what: &str, exec: &Exec, user: &User, error: &io::Error) -> Failed {
    let number = error.raw_os_error().unwrap_or_default();
    let step =
        [Step::Session, Step::User, Step::Directory].into_iter().find(|step| *step as i32 == number >> STEP_SHIFT);
    let error = if step.is_some() { &io::Error::from_raw_os_error(number & ((1 << STEP_SHIFT) - 1)) } else { error };
    let failed = |kind, action: &str| Failed::new(kind, format!("{action}: {}", reason(error)));
    use io::ErrorKind as Kind;
    match (step, error.kind()) {
        (Some(Step::Directory), kind) => {
            let kind = match kind {
                Kind::NotFound => FailureKind::NoSuchDirectory,
                Kind::NotADirectory => FailureKind::NotADirectory,
                Kind::PermissionDenied => FailureKind::Permission,
                _ => FailureKind::Other,
            };
            failed(kind, &format!("cannot enter '{}' in the guest", exec.cwd.escape_ascii()))
        }
        (Some(Step::User), Kind::PermissionDenied) => {
            failed(FailureKind::Permission, &format!("the agent cannot become the user '{}'", user.name))
        }
        (None, kind) => {
            let kind = match kind {
                Kind::NotFound | Kind::NotADirectory => FailureKind::NoSuchCommand,
                Kind::PermissionDenied | Kind::IsADirectory => FailureKind::NotExecutable,
                Kind::InvalidInput | Kind::ArgumentListTooLong => FailureKind::Invalid,
                _ if number == Errno::NOEXEC.raw_os_error() => FailureKind::NotExecutable,
                _ => FailureKind::Other,
            };
            failed(kind, &format!("cannot run '{}' in the guest", what.escape_debug()))
        }
        (Some(_), _) => failed(FailureKind::Other, "cannot make a session in the guest"),
    }
}

/// The system's word for it, without its number.
fn reason(error: &io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or(&text).to_owned()
}

/// Has a thread wait for the process.
fn follow(mut child: std::process::Child, terminal: Option<Terminal>) -> io::Result<(Child, Streams)> {
    let streams = streams(&mut child, terminal);
    let pid = Pid::from_child(&child);
    let (end, ending) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    let state = Arc::new(Mutex::new(State::Running(child)));
    let child = Child { pid, state: Arc::clone(&state), end };
    let waiter = thread::Builder::new().name("wait".into()).spawn(move || {
        wait(pid, &state);
        drop(ending);
    });
    // Nobody would ever know of its end.
    let streams = waiter.and(streams).inspect_err(|_| child.hang_up())?;
    Ok((child, streams))
}

/// The process is a zombie until it is reaped, and until then its number is nobody else's: so a signal never meets
/// another process.
fn wait(pid: Pid, state: &Mutex<State>) {
    while let Err(Errno::INTR) = waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT) {}
    let mut state = lock(state);
    if let State::Running(child) = &mut *state {
        let status = child.wait().unwrap_or_default();
        *state = State::Ended(status);
    }
}

fn streams(child: &mut std::process::Child, terminal: Option<Terminal>) -> io::Result<Streams> {
    let streams = match terminal {
        Some(terminal) => {
            let (input, output) = (Some(terminal.stream()?), terminal.stream()?);
            Streams { input, output, error: None, terminal: Some(terminal) }
        }
        None => {
            let output = child.stdout.take().ok_or_else(|| io::Error::other("there is no output"))?.into();
            let (input, error) = (child.stdin.take().map(OwnedFd::from), child.stderr.take().map(OwnedFd::from));
            Streams { input, output, error, terminal: None }
        }
    };
    for stream in streams.input.iter().chain([&streams.output]).chain(&streams.error) {
        rustix::io::ioctl_fionbio(stream, true)?;
    }
    Ok(streams)
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Child {
    /// Its process, and the group of all that it starts and that does not leave.
    pub fn pid(&self) -> u32 {
        self.pid.as_raw_nonzero().get() as u32
    }

    /// What hangs up when it has ended.
    pub fn end(&self) -> BorrowedFd<'_> {
        self.end.as_fd()
    }

    /// How it has ended, if it has.
    pub fn status(&self) -> Option<ExitStatus> {
        match &*lock(&self.state) {
            State::Running(_) => None,
            State::Ended(status) => Some(*status),
        }
    }

    /// Signals its group.
    pub fn signal(&self, signal: Signal) {
        if let State::Running(_) = &*lock(&self.state) {
            // Its processes may all have become zombies just now.
            let _ = kill_process_group(self.pid, signal);
        }
    }

    /// Ends it, as far as it does not mind.
    pub fn hang_up(&self) {
        self.signal(Signal::HUP);
        // Who is stopped would not notice.
        self.signal(Signal::CONT);
    }
}
