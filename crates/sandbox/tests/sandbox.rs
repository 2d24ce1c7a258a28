//! What a process can do once it has entered the sandbox, and what it cannot.
//!
//! Every attempt is made inside and outside: one that fails outside too proves nothing. All run as root (the process
//! becomes another user) and as a user without privileges, as far as the tests themselves may.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::TcpListener,
    os::{
        fd::OwnedFd,
        linux::net::SocketAddrExt,
        unix::{
            fs::{PermissionsExt, chown},
            net::{SocketAddr, UnixListener, UnixStream},
            process::{CommandExt, ExitStatusExt},
        },
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::Once,
};

use rustix::{
    process::{Pid, WaitOptions, geteuid, getpid, set_child_subreaper, waitpid},
    pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt},
};
use tempfile::TempDir;

/// Whom a privileged process becomes.
const OWN: u32 = 64_321;
/// A user without privileges.
const NOBODY: u32 = 65_534;

/// Who starts the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Starter {
    Root,
    User,
}

impl Starter {
    /// The user that the process is in the end.
    fn uid(self) -> u32 {
        match self {
            Self::Root => OWN,
            Self::User if is_root() => NOBODY,
            Self::User => geteuid().as_raw(),
        }
    }
}

fn is_root() -> bool {
    geteuid().is_root()
}

fn starters() -> Vec<Starter> {
    if is_root() { vec![Starter::Root, Starter::User] } else { vec![Starter::User] }
}

/// What is outside of the sandbox.
struct Outside {
    directory: TempDir,
    sibling: Child,
    tcp: TcpListener,
    abstract_name: String,
    uid: u32,
    _listeners: [UnixListener; 2],
    /// A copy of the program where every user can execute it.
    program: PathBuf,
}

impl Outside {
    fn new(uid: u32) -> Self {
        static SUBREAPER: Once = Once::new();
        // The process that enters goes on in a child: with this its end is told here.
        SUBREAPER.call_once(|| set_child_subreaper(Some(getpid())).unwrap());
        let directory = tempfile::Builder::new().permissions(fs::Permissions::from_mode(0o755)).tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        fs::create_dir(path("instance")).unwrap();
        fs::create_dir(path("home")).unwrap();
        fs::write(path("instance/disk"), "").unwrap();
        fs::write(path("home/secret"), "secret").unwrap();
        fs::write(path("readonly"), "read me").unwrap();
        for name in ["instance", "instance/disk", "home", "home/secret", "readonly"] {
            give(&path(name), uid);
        }
        let program = path("captive");
        fs::copy(env!("CARGO_BIN_EXE_captive"), &program).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let socket = UnixListener::bind(path("host.socket")).unwrap();
        fs::set_permissions(path("host.socket"), fs::Permissions::from_mode(0o777)).unwrap();
        let abstract_name = format!("purlin-sandbox-{}", path("").display());
        let abstract_socket =
            UnixListener::bind_addr(&SocketAddr::from_abstract_name(&abstract_name).unwrap()).unwrap();
        let sibling = as_user(Command::new("sleep").arg("1000"), uid).spawn().unwrap();
        Self {
            sibling,
            tcp: TcpListener::bind("127.0.0.1:0").unwrap(),
            abstract_name,
            uid,
            _listeners: [socket, abstract_socket],
            program,
            directory,
        }
    }

    /// A command for the process, less who starts it and the attempt.
    fn captive(&self, settings: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        self.arguments(&mut command, settings);
        command
    }

    fn arguments(&self, command: &mut Command, settings: &[&str]) {
        command.arg(format!("directory={}", self.directory.path().display()));
        command.arg(format!("sibling={}", self.sibling.id()));
        command.arg(format!("port={}", self.tcp.local_addr().unwrap().port()));
        command.arg(format!("abstract={}", self.abstract_name));
        command.args(settings).current_dir("/");
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        let _ = self.sibling.kill();
        let _ = self.sibling.wait();
    }
}

fn give(path: &Path, uid: u32) {
    if is_root() {
        chown(path, Some(uid), Some(uid)).unwrap();
    }
}

fn as_user(command: &mut Command, uid: u32) -> &mut Command {
    if is_root() { command.uid(uid).gid(uid) } else { command }
}

/// What became of an attempt.
#[derive(Debug)]
struct Answer {
    lines: Vec<String>,
    /// Of the process that made the attempt.
    end: ExitStatus,
}

impl Answer {
    /// Starts the process, and waits for its end; in between, `talk` has the other end of its standard input.
    fn of(mut command: Command, talk: impl FnOnce(UnixStream)) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        command.stdin(OwnedFd::from(theirs));
        Self::on_input_of(command, || talk(ours))
    }

    /// The same with the standard input that `command` has.
    fn on_input_of(mut command: Command, meanwhile: impl FnOnce()) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn().unwrap();
        drop(command);
        meanwhile();
        let output = BufReader::new(child.stdout.take().unwrap());
        let lines: Vec<String> = output.lines().map(Result::unwrap).collect();
        let end = child.wait().unwrap();
        let pid = lines.iter().find_map(|line| line.strip_prefix("pid ")?.parse::<i32>().ok());
        // The sandboxed process is another one where there is a PID namespace: it comes to this one, a subreaper.
        let end = match pid.filter(|pid| pid.cast_unsigned() != child.id()) {
            Some(pid) => {
                assert!(end.success(), "who starts the sandboxed process ended with {end}");
                let status = waitpid(Pid::from_raw(pid), WaitOptions::empty()).unwrap().unwrap().1;
                ExitStatus::from_raw(status.as_raw())
            }
            None => end,
        };
        Self { lines, end }
    }

    fn worked(&self) -> bool {
        self.end.success() && self.lines.last().is_some_and(|line| line == "ok")
    }

    /// Refused with an error, and nothing else.
    fn was_refused(&self) -> bool {
        self.end.success() && self.lines.last().is_some_and(|line| line.starts_with("failed "))
    }

    fn was_killed(&self) -> bool {
        self.end.signal() == Some(libc::SIGSYS)
    }

    fn has(&self, line: &str) -> bool {
        self.lines.iter().any(|l| l == line)
    }
}

fn attempt(outside: &Outside, starter: Starter, settings: &[&str], name: &str) -> Answer {
    let mut command = outside.captive(settings);
    match starter {
        Starter::Root => drop(command.arg(format!("uid={OWN}"))),
        Starter::User => drop(as_user(&mut command, starter.uid())),
    }
    command.arg(name);
    Answer::of(command, |mut socket| {
        if name == "descriptor" {
            socket.write_all(b"ping").unwrap();
            let mut answer = [0; 4];
            socket.read_exact(&mut answer).unwrap();
            assert_eq!(&answer, b"pong");
        }
    })
}

/// The same with a new terminal as standard input, the controlling one unless that is what is tried.
fn attempt_on_terminal(outside: &Outside, starter: Starter, sandbox: &str, name: &str) -> Answer {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let terminal = ioctl_tiocgptpeer(&master, flags).unwrap();
    let takes_it = if name == "take-terminal" { vec![] } else { vec!["--ctty"] };
    let mut command = Command::new("setsid");
    command.args(takes_it).arg(&outside.program).stdin(terminal);
    outside.arguments(&mut command, &[sandbox]);
    match starter {
        Starter::Root => drop(command.arg(format!("uid={OWN}"))),
        Starter::User => drop(as_user(&mut command, starter.uid())),
    }
    command.arg(name);
    Answer::on_input_of(command, || ())
}

/// Does not need privileges outside.
const ORDINARY: &[&str] = &[
    "passwd",
    "proc",
    "home",
    "list-root",
    "unix",
    "abstract",
    "tcp",
    "kill",
    "ptrace",
    "read-memory",
    "unshare",
    "personality",
    "execve",
    "fork",
    "new-code",
    "code-after-seal",
    "symlink",
    "raise-limit",
];
/// Does.
const PRIVILEGED: &[&str] = &["write-readonly", "write-root", "mount", "setuid", "bpf", "handle"];
/// Are about a terminal, which standard input is.
const ON_TERMINAL: &[&str] = &["type", "set-modes", "take-terminal"];
/// May be missing in a kernel.
const OPTIONAL: &[&str] = &["keyctl", "userfaultfd", "perf"];

/// What the layers below the filters prevent by themselves.
const WITHOUT_FILTERS: &[&str] = &[
    "passwd",
    "proc",
    "home",
    "list-root",
    "unix",
    "abstract",
    "tcp",
    "kill",
    "ptrace",
    "read-memory",
    "execve",
    "symlink",
    "write-readonly",
    "write-root",
    "mount",
    "setuid",
    "bpf",
    "handle",
];

#[test]
fn what_it_needs_works() {
    for starter in starters() {
        for settings in [&["sandbox=on"][..], &["sandbox=on", "filters=off"], &["sandbox=off"]] {
            let outside = Outside::new(starter.uid());
            let attempts =
                ["own-files", "descriptor", "device", "own-socket", "threads", "ring", "emitted-code", "guest-memory"];
            for name in attempts {
                let answer = attempt(&outside, starter, settings, name);
                assert!(answer.worked(), "{name} as {starter:?} with {settings:?}: {answer:#?}");
            }
        }
    }
}

#[test]
fn what_it_does_not_need_fails() {
    for starter in starters() {
        let outside = Outside::new(starter.uid());
        for name in [ORDINARY, PRIVILEGED, OPTIONAL].concat() {
            let answer = attempt(&outside, starter, &["sandbox=on"], name);
            assert!(answer.was_refused() || answer.was_killed(), "{name} as {starter:?}: {answer:#?}");
        }
    }
}

/// A process that has its user's terminal open types nothing there: that would be the shell's, when it has ended.
#[test]
fn nothing_is_typed_at_a_terminal_and_its_modes_stay() {
    for starter in starters() {
        let outside = Outside::new(starter.uid());
        for name in ON_TERMINAL {
            let free = attempt_on_terminal(&outside, starter, "sandbox=off", name);
            // TIOCSTI may be turned off (dev.tty.legacy_tiocsti).
            assert!(free.worked() || *name == "type" && free.was_refused(), "{name}: {free:#?}");
            let answer = attempt_on_terminal(&outside, starter, "sandbox=on", name);
            assert!(answer.was_killed(), "{name} as {starter:?}: {answer:#?}");
        }
    }
}

#[test]
fn the_layers_below_the_filters_hold_by_themselves() {
    for starter in starters() {
        let outside = Outside::new(starter.uid());
        for name in WITHOUT_FILTERS {
            let answer = attempt(&outside, starter, &["sandbox=on", "filters=off"], name);
            assert!(answer.was_refused(), "{name} as {starter:?}: {answer:#?}");
        }
    }
}

#[test]
fn outside_of_the_sandbox_the_same_works() {
    let outside = Outside::new(Starter::User.uid());
    for name in ORDINARY {
        let answer = attempt(&outside, Starter::User, &["sandbox=off"], name);
        assert!(answer.worked(), "{name}: {answer:#?}");
    }
    if is_root() {
        // The sandbox is off: the process stays root. What it mounts goes with its mount namespace.
        for name in PRIVILEGED {
            let mut command = Command::new("unshare");
            command.arg("--mount").arg(&outside.program);
            outside.arguments(&mut command, &["sandbox=off"]);
            command.arg(name);
            let answer = Answer::of(command, drop);
            assert!(answer.worked(), "{name}: {answer:#?}");
        }
        let _ = fs::remove_file("/mark");
    }
    for name in OPTIONAL {
        let answer = attempt(&outside, if is_root() { Starter::Root } else { Starter::User }, &["sandbox=off"], name);
        assert!(
            answer.worked() || answer.has("failed 38 Function not implemented (os error 38)"),
            "{name}: {answer:#?}"
        );
    }
}

#[test]
fn a_role_forbids_what_the_process_may() {
    let roles = ["vcpu", "device", "disk", "vsock", "supervisor", "control"];
    let allowed: &[(&str, &[&str])] = &[
        ("open", &["control"]),
        ("new-socket", &["vsock", "control"]),
        ("new-ring", &[]),
        ("new-thread", &["control"]),
        ("emitted-code", &[]),
    ];
    for starter in starters() {
        let outside = Outside::new(starter.uid());
        for (name, those) in allowed {
            assert!(attempt(&outside, starter, &["sandbox=on"], name).worked(), "{name} without a role");
            for role in roles {
                let answer = attempt(&outside, starter, &["sandbox=on", &format!("role={role}")], name);
                let forbidden = answer.was_killed() || *name == "open" && answer.was_refused();
                let expected = if those.contains(&role) { answer.worked() } else { forbidden };
                assert!(expected, "{name} as {role}, {starter:?}: {answer:#?}");
            }
        }
    }
}

#[test]
fn the_report_tells_what_there_is() {
    for starter in starters() {
        let outside = Outside::new(starter.uid());
        let answer = attempt(&outside, starter, &["sandbox=on"], "device");
        let mut all = vec![
            "user namespace",
            "own root",
            "PID namespace",
            "network namespace",
            "IPC namespace",
            "UTS namespace",
            "Landlock",
            "seccomp",
        ];
        match starter {
            Starter::Root => all.push("own user"),
            Starter::User => {
                assert!(answer.lines.iter().any(|line| line.starts_with("missing The sandbox has no own user: ")))
            }
        }
        for layer in &all {
            assert!(answer.has(&format!("layer {layer}")), "{layer} as {starter:?}: {answer:#?}");
        }
        let probed = attempt(&outside, starter, &["sandbox=off"], "probe");
        assert!(probed.worked(), "{probed:#?}");
        for layer in all {
            assert!(probed.has(&format!("layer {layer}")), "{layer} as {starter:?}: {probed:#?}");
        }
        assert_eq!(outside.uid, starter.uid());
    }
}

/// As in a container: no capabilities, and user namespaces are not allowed.
fn in_container(outside: &Outside, settings: &[&str], name: &str) -> Answer {
    let no_more = "echo 0 > /proc/sys/user/max_user_namespaces";
    let script = format!("{no_more} && exec setpriv --bounding-set=-all --inh-caps=-all -- \"$@\"");
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-current-user", "--keep-caps", "sh", "-ec", &script, "sh"]).arg(&outside.program);
    outside.arguments(&mut command, settings);
    as_user(&mut command, Starter::User.uid()).arg(name);
    Answer::of(command, drop)
}

#[test]
fn without_namespaces_there_is_what_is_left() {
    let outside = Outside::new(Starter::User.uid());
    let run = |name| in_container(&outside, &["sandbox=on"], name);
    let answer = run("own-files");
    assert!(answer.worked(), "{answer:#?}");
    assert!(answer.has("layer Landlock") && answer.has("layer seccomp"), "{answer:#?}");
    for layer in ["user namespace", "own root", "PID namespace", "network namespace"] {
        let sentence = format!("missing The sandbox has no {layer}: ");
        assert!(answer.lines.iter().any(|line| line.starts_with(&sentence)), "{answer:#?}");
    }
    let forbidden =
        ["passwd", "proc", "home", "list-root", "unix", "abstract", "tcp", "kill", "ptrace", "mount", "execve"];
    for name in forbidden {
        let answer = run(name);
        assert!(answer.was_refused() || answer.was_killed(), "{name}: {answer:#?}");
    }
}

#[test]
fn what_would_not_be_a_sandbox_is_an_error() {
    let outside = Outside::new(Starter::User.uid());
    let error = |answer: &Answer, words: &str| {
        answer.lines.iter().any(|line| line.starts_with("error ") && line.contains(words)) && !answer.worked()
    };
    let missing = in_container(&outside, &["sandbox=on", "require=root"], "device");
    assert!(error(&missing, "the sandbox would lack its own root, which is required"), "{missing:#?}");
    let required = attempt(&outside, Starter::User, &["sandbox=on", "require=root"], "device");
    assert!(required.worked(), "{required:#?}");
    let threads = attempt(&outside, Starter::User, &["sandbox=on", "threads=on"], "device");
    assert!(error(&threads, "the process has 2 threads already"), "{threads:#?}");
    let directory = outside.captive(&["sandbox=on", "device"]).stdin(fs::File::open("/").unwrap()).output().unwrap();
    let said = String::from_utf8(directory.stdout).unwrap();
    assert!(said.contains("descriptor 0 is open on the directory /"), "{said}");
}
