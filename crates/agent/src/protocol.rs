//! What the host and the agent say to each other. One connection is one session.
//!
//! 1. The agent speaks first: [`Hello`].
//! 2. The host's first message is its request; those that are none follow it ([`HostMessage`]).
//! 3. The agent answers ([`AgentMessage`]) and ends the connection. [`Failed`] can come at any time, and is the last.
//!
//! | request | the host goes on with | the agent answers |
//! |---|---|---|
//! | `Info` | | `Info` |
//! | `Exec` | `Stdin`, `StdinEnd`, `Resize`, `Signal` | `Started`, then `Stdout`, `Stderr`, `StdinTaken`, and `Exited` |
//! | `Push` | once it is told `Ready`: `Data`, `DataEnd` | `Ready`, `Stored` |
//! | `Pull` | | `File`, `Data`, `DataEnd` |
//! | `Renew` | | `Renewed`, then `RenewEnded` |
//! | `Dial` | once it is told `Dialed`: `Data`, `DataEnd` | `Dialed`, then `Data`, `DataEnd` |
//!
//! The stream's own flow control is the only one that is needed. A host that wants its signals to arrive while a command
//! does not read its input sends no more input than [`STDIN_WINDOW`] bytes that the agent has not called taken.
//!
//! A host that ends the connection, or only its own direction, ends the session: a command gets SIGHUP. `DataEnd` is how
//! one direction of a `Dial` ends and the other goes on.
//!
//! Fields and messages are only ever added. An agent that does not know a request answers so; [`VERSION`] is raised when
//! what there is changes its meaning.

use prost::{Enumeration, Message, Oneof};

/// The protocol's version, in [`Hello`].
pub const VERSION: u32 = 1;

/// So many bytes of a command's input the agent keeps, and still looks at what comes behind.
pub const STDIN_WINDOW: usize = 256 << 10;

/// What is in a frame of the host's.
#[derive(Clone, PartialEq, Message)]
pub struct HostFrame {
    /// `None` is a message of another version.
    #[prost(oneof = "HostMessage", tags = "1, 2, 3, 4, 5, 6, 16, 17, 18, 19, 20, 21")]
    pub message: Option<HostMessage>,
}

/// What the host says: a request first.
#[derive(Clone, PartialEq, Oneof)]
pub enum HostMessage {
    /// Asks what the guest is.
    #[prost(message, tag = "1")]
    Info(InfoRequest),
    /// Runs a command.
    #[prost(message, tag = "2")]
    Exec(Exec),
    /// Writes a file.
    #[prost(message, tag = "3")]
    Push(Push),
    /// Reads a file.
    #[prost(message, tag = "4")]
    Pull(Pull),
    /// Makes a copied machine one of its own.
    #[prost(message, tag = "5")]
    Renew(Renew),
    /// Connects to a port.
    #[prost(message, tag = "6")]
    Dial(Dial),

    /// Bytes for the command's standard input.
    #[prost(bytes = "vec", tag = "16")]
    Stdin(Vec<u8>),
    /// The end of it. A terminal gets its end-of-file character.
    #[prost(message, tag = "17")]
    StdinEnd(Empty),
    /// The terminal has another size.
    #[prost(message, tag = "18")]
    Resize(Size),
    /// A signal's number (Linux's of x86-64: 2 is SIGINT), for the terminal's foreground processes or, without a
    /// terminal, the command's process group.
    #[prost(int32, tag = "19")]
    Signal(i32),
    /// Bytes of the file that is pushed, or for whoever was dialed.
    #[prost(bytes = "vec", tag = "20")]
    Data(Vec<u8>),
    /// That was all of it.
    #[prost(message, tag = "21")]
    DataEnd(Empty),
}

/// What is in a frame of the agent's.
#[derive(Clone, PartialEq, Message)]
pub struct AgentFrame {
    /// `None` is a message of another version.
    #[prost(oneof = "AgentMessage", tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16")]
    pub message: Option<AgentMessage>,
}

/// What the agent says.
#[derive(Clone, PartialEq, Oneof)]
pub enum AgentMessage {
    /// The first message of every connection.
    #[prost(message, tag = "1")]
    Hello(Hello),
    /// It could not be done; nothing follows.
    #[prost(message, tag = "2")]
    Failed(Failed),
    /// The answer to a request of this name.
    #[prost(message, tag = "3")]
    Info(Info),
    /// The command runs.
    #[prost(message, tag = "4")]
    Started(Started),
    /// Bytes of the command's standard output, or of its terminal.
    #[prost(bytes = "vec", tag = "5")]
    Stdout(Vec<u8>),
    /// Bytes of its standard error.
    #[prost(bytes = "vec", tag = "6")]
    Stderr(Vec<u8>),
    /// So many more bytes of its input have been taken (or dropped, if it has closed its input).
    #[prost(uint64, tag = "7")]
    StdinTaken(u64),
    /// The command has ended, and all that it wrote has been sent.
    #[prost(message, tag = "8")]
    Exited(Exited),
    /// The file to be pushed can be: its data may come.
    #[prost(message, tag = "9")]
    Ready(Empty),
    /// The pushed file is in its place; so many bytes.
    #[prost(uint64, tag = "10")]
    Stored(u64),
    /// The file that is asked for; its data follows.
    #[prost(message, tag = "11")]
    File(File),
    /// Bytes of it, or from whoever was dialed.
    #[prost(bytes = "vec", tag = "12")]
    Data(Vec<u8>),
    /// That was all of it.
    #[prost(message, tag = "13")]
    DataEnd(Empty),
    /// The machine is another one, but for what takes long.
    #[prost(message, tag = "14")]
    Renewed(Renewed),
    /// That is done, too.
    #[prost(message, tag = "15")]
    RenewEnded(RenewEnded),
    /// Somebody listens at the port, and is connected.
    #[prost(message, tag = "16")]
    Dialed(Empty),
}

impl From<HostMessage> for HostFrame {
    fn from(message: HostMessage) -> Self {
        Self { message: Some(message) }
    }
}

impl From<AgentMessage> for AgentFrame {
    fn from(message: AgentMessage) -> Self {
        Self { message: Some(message) }
    }
}

/// Nothing to say beyond the message's name.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Empty {}

/// Who speaks.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Hello {
    /// [`VERSION`].
    #[prost(uint32, tag = "1")]
    pub protocol: u32,
    /// The version of the agent's program: `0.1.0`.
    #[prost(string, tag = "2")]
    pub agent: String,
}

/// Why something could not be done.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Failed {
    /// For programs.
    #[prost(enumeration = "FailureKind", tag = "1")]
    pub kind: i32,
    /// For people, one line.
    #[prost(string, tag = "2")]
    pub message: String,
}

/// Kinds of failures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Enumeration)]
#[repr(i32)]
pub enum FailureKind {
    /// None of the others.
    Other = 0,
    /// What the host said is not the protocol, or not to be understood by this agent.
    Protocol = 1,
    /// There are too many sessions.
    Busy = 2,
    /// A value of the request cannot be.
    Invalid = 3,
    /// There is no such user or group.
    NoSuchUser = 4,
    /// There is no such command: a shell's 127.
    NoSuchCommand = 5,
    /// The command cannot be run: a shell's 126.
    NotExecutable = 6,
    /// There is no such file.
    NoSuchFile = 7,
    /// There is no such directory, of a new file or to work in.
    NoSuchDirectory = 8,
    /// A part of the path is a file.
    NotADirectory = 9,
    /// It is a directory where a file should be.
    IsADirectory = 10,
    /// It is not allowed.
    Permission = 11,
    /// There is no room.
    NoSpace = 12,
    /// Nobody listens there.
    Refused = 13,
    /// There is no way there, or no answer.
    Unreachable = 14,
}

impl Failed {
    /// A failure.
    pub fn new(kind: FailureKind, message: impl Into<String>) -> Self {
        Self { kind: kind.into(), message: message.into() }
    }

    /// What a command that fails so ends with, as in a shell.
    pub fn exit_status(&self) -> u8 {
        match self.kind() {
            FailureKind::NoSuchCommand => 127,
            FailureKind::NotExecutable => 126,
            _ => 125,
        }
    }
}

/// Asks what the guest is.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct InfoRequest {}

/// What the guest is. Texts are empty where it does not say.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Info {
    /// The version of the agent's program.
    #[prost(string, tag = "1")]
    pub agent: String,
    /// Its host name.
    #[prost(string, tag = "2")]
    pub host_name: String,
    /// 32 hexadecimal digits (machine-id(5)).
    #[prost(string, tag = "3")]
    pub machine_id: String,
    /// A UUID, another one after each boot.
    #[prost(string, tag = "4")]
    pub boot_id: String,
    /// Since its boot, in milliseconds; while it is suspended, too.
    #[prost(uint64, tag = "5")]
    pub uptime_ms: u64,
    /// `PRETTY_NAME` of os-release(5).
    #[prost(string, tag = "6")]
    pub os: String,
    /// The kernel's release, as `uname -r` says it.
    #[prost(string, tag = "7")]
    pub kernel: String,
}

/// Runs a command, in a session (setsid(2)) of its own.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Exec {
    /// The program, found by the user's PATH, and its arguments. If there is none: the user's login shell.
    #[prost(bytes = "vec", repeated, tag = "1")]
    pub argv: Vec<Vec<u8>>,
    /// `NAME=value` for each variable beyond, or instead of, those of a login (login(1), pam_env(8)).
    #[prost(bytes = "vec", repeated, tag = "2")]
    pub env: Vec<Vec<u8>>,
    /// Where it is to work; if empty, at the user's home, or at `/` if there is none.
    #[prost(bytes = "vec", tag = "3")]
    pub cwd: Vec<u8>,
    /// A user's name or number; root if empty.
    #[prost(string, tag = "4")]
    pub user: String,
    /// It has a terminal: standard input, output and error are that.
    #[prost(message, optional, tag = "5")]
    pub tty: Option<Tty>,
    /// There will be input. Without, and without a terminal, it is /dev/null.
    #[prost(bool, tag = "6")]
    pub with_stdin: bool,
}

/// A terminal.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Tty {
    /// How wide, in characters.
    #[prost(uint32, tag = "1")]
    pub columns: u32,
    /// How high.
    #[prost(uint32, tag = "2")]
    pub rows: u32,
    /// `TERM`; `xterm` if empty.
    #[prost(string, tag = "3")]
    pub term: String,
}

/// A terminal's size, in characters.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Size {
    /// How wide.
    #[prost(uint32, tag = "1")]
    pub columns: u32,
    /// How high.
    #[prost(uint32, tag = "2")]
    pub rows: u32,
}

/// A command runs.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Started {
    /// Its process, and process group, in the guest.
    #[prost(uint32, tag = "1")]
    pub pid: u32,
}

/// How a command has ended.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Exited {
    /// What it gave to exit(2), if no signal ended it.
    #[prost(int32, tag = "1")]
    pub status: i32,
    /// The signal's number; 0 if none.
    #[prost(int32, tag = "2")]
    pub signal: i32,
}

impl Exited {
    /// As a shell's `$?`: of a signal 128 and its number.
    pub fn exit_status(&self) -> u8 {
        if self.signal == 0 { self.status as u8 } else { (128 + self.signal) as u8 }
    }
}

/// Writes a file. It is in its place once it is complete, or not at all; where there is one, that is replaced, and a
/// symbolic link followed. A device is written to.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Push {
    /// Absolute.
    #[prost(bytes = "vec", tag = "1")]
    pub path: Vec<u8>,
    /// chmod(2)'s; if not said, that of the file that there is, or else 0644.
    #[prost(uint32, optional, tag = "2")]
    pub mode: Option<u32>,
    /// A user's name or number; if empty, the owner of the file that there is, or else root.
    #[prost(string, tag = "3")]
    pub user: String,
    /// A group's name or number; if empty, that of the file that there is, else of the `user`.
    #[prost(string, tag = "4")]
    pub group: String,
    /// Missing directories are made, as root's, with mode 0755.
    #[prost(bool, tag = "5")]
    pub make_dirs: bool,
}

/// Reads a regular file.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Pull {
    /// Absolute.
    #[prost(bytes = "vec", tag = "1")]
    pub path: Vec<u8>,
}

/// A file that is pulled.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct File {
    /// Its size in bytes, as stat(2) says it: those of /proc say 0, and others change while they are read.
    #[prost(uint64, tag = "1")]
    pub size: u64,
    /// Permission bits, as for chmod(2).
    #[prost(uint32, tag = "2")]
    pub mode: u32,
    /// The owner's number.
    #[prost(uint32, tag = "3")]
    pub uid: u32,
    /// The group's number.
    #[prost(uint32, tag = "4")]
    pub gid: u32,
    /// When it was last written: seconds since 1970.
    #[prost(int64, tag = "5")]
    pub modified: i64,
}

/// Makes a machine that is a copy of another one a machine of its own. What is empty stays as it is, unless it says
/// otherwise. A step that fails does not keep the others from being done.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Renew {
    /// The host name: the kernel's, that in /etc/hostname, and the one in /etc/hosts.
    #[prost(string, tag = "1")]
    pub host_name: String,
    /// 32 hexadecimal digits (machine-id(5)); if empty, the guest makes one at random.
    #[prost(string, tag = "2")]
    pub machine_id: String,
    /// True randomness from the host, for the kernel's generator, which is then seeded anew: at most 512 bytes.
    #[prost(bytes = "vec", tag = "3")]
    pub random_seed: Vec<u8>,
    /// Keys of sshd's of the kinds that there are. When `Renewed` is said the old ones are gone, and sshd accepts nobody;
    /// it is started again, if it was running, with the new ones, before `RenewEnded` is said.
    #[prost(bool, tag = "4")]
    pub remake_ssh_host_keys: bool,
    /// Network cards whose addresses change. They are down when `Renewed` is said.
    #[prost(message, repeated, tag = "5")]
    pub cards: Vec<Card>,
    /// The time now, in nanoseconds since 1970; 0 leaves the guest's clock as it is.
    #[prost(uint64, tag = "6")]
    pub time_ns: u64,
    /// Milliseconds that the rest waits when `Renewed` has been said: what the host asks for next is to be alone.
    #[prost(uint32, tag = "7")]
    pub put_off_ms: u32,
}

/// A network card that gets another address.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Card {
    /// The address that it has, as `52:54:00:12:34:56`.
    #[prost(string, tag = "1")]
    pub old: String,
    /// The address that it gets. It may be the same: then only its lease is renewed.
    #[prost(string, tag = "2")]
    pub new: String,
}

/// The machine has another identity.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Renewed {
    /// Its machine ID.
    #[prost(string, tag = "1")]
    pub machine_id: String,
    /// What could not be done, a line for each.
    #[prost(string, repeated, tag = "2")]
    pub problems: Vec<String>,
}

/// What took long is done: the keys, the network.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct RenewEnded {
    /// What could not be done, a line for each.
    #[prost(string, repeated, tag = "1")]
    pub problems: Vec<String>,
}

/// Connects to a TCP port, as a program in the guest does.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Dial {
    /// An IP address; if empty it is the guest itself: 127.0.0.1 or, if nobody listens there, ::1.
    #[prost(string, tag = "1")]
    pub host: String,
    /// 1 to 65535.
    #[prost(uint32, tag = "2")]
    pub port: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_as_in_a_shell() {
        assert_eq!(Exited { status: 3, signal: 0 }.exit_status(), 3);
        assert_eq!(Exited { status: 0, signal: 15 }.exit_status(), 143);
        assert_eq!(Failed::new(FailureKind::NoSuchCommand, "").exit_status(), 127);
        assert_eq!(Failed::new(FailureKind::NotExecutable, "").exit_status(), 126);
        assert_eq!(Failed { kind: 999, message: String::new() }.exit_status(), 125);
    }

    #[test]
    fn the_bytes_on_the_wire_stay_as_they_are() {
        let exec = Exec { argv: vec![b"id".to_vec()], user: "root".into(), with_stdin: true, ..Exec::default() };
        let frame = HostFrame::from(HostMessage::Exec(exec));
        assert_eq!(frame.encode_to_vec(), b"\x12\x0c\x0a\x02id\x22\x04root\x30\x01");
        let frame = AgentFrame::from(AgentMessage::Exited(Exited { status: 3, signal: 0 }));
        assert_eq!(frame.encode_to_vec(), b"\x42\x02\x08\x03");
        let frame = HostFrame::from(HostMessage::Dial(Dial { host: String::new(), port: 80 }));
        assert_eq!(frame.encode_to_vec(), b"\x32\x02\x10\x50");
        // A request of a later version.
        assert_eq!(HostFrame::decode(&b"\x7a\x00"[..]).unwrap().message, None);
    }
}
