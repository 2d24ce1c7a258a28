//! The NAT as a process of its own, in the host's network namespace and its own sandbox.
//!
//! It is the same program once more, with the packet socket as its standard input. The first message on that is the
//! configuration, and the sockets of published ports with it; the answer is one zero byte once the sandbox stands, or
//! an error in words. From then on there are packets. The process ends when the other end is closed.

use std::{
    env, io,
    io::{IoSlice, IoSliceMut},
    mem::MaybeUninit,
    net::SocketAddr,
    os::{
        fd::{AsFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::{Child, Command, ExitCode, Stdio},
};

use prost::Message;
use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
        SendFlags, SocketFlags, SocketType, recv, recvmsg, send, sendmsg, socketpair, sockopt,
    },
    process::{Resource, Rlimit, getrlimit, setrlimit},
};

use super::{
    MAX_CONNECTIONS, Nat,
    config::{NatConfig, Wire},
    datagrams,
    published::{ListenError, Listener},
    sandbox,
};
use crate::Backend;

/// The hidden verb by which the program becomes a NAT: it then calls [`main`].
pub const VERB: &str = "__nat";

/// Ports that can be published: as many as a message carries descriptors (SCM_MAX_FD).
const MAX_PUBLISHED: usize = 253;
/// The configuration's longest encoding, in bytes.
const MAX_CONFIG: usize = 64 << 10;
/// What the packet socket is to hold, in bytes; without privilege it is what `net.core.wmem_max` allows.
const SOCKET_BUFFER: usize = 4 << 20;
/// Descriptors that are no flow's: the standard ones, the packet socket, epoll, resolv.conf, and some in reserve.
const OTHER_DESCRIPTORS: usize = 32;

/// Why there is no NAT.
#[derive(Debug, thiserror::Error)]
pub enum NatError {
    /// A port cannot be published.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// Too many ports.
    #[error("{0} ports to publish are too many: at most {MAX_PUBLISHED}")]
    TooMany(usize),
    /// The process cannot be started.
    #[error("cannot start the network process: {0}")]
    Start(io::Error),
    /// It ended at once.
    #[error("the network process ended before it was ready ({0})")]
    Ended(String),
    /// It says why it cannot go on.
    #[error("the network process failed: {0}")]
    Failed(String),
}

/// A NAT's process. Dropping it ends the process.
#[derive(Debug)]
pub struct NatProcess {
    child: Child,
    published: Vec<SocketAddr>,
}

impl NatProcess {
    /// Where the host listens, in the order of [`NatConfig::publish`].
    pub fn published(&self) -> &[SocketAddr] {
        &self.published
    }

    /// The process's id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for NatProcess {
    fn drop(&mut self) {
        // It has nothing to clean up.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts a NAT and returns once it is ready. The program that calls this must call [`main`] when its first argument
/// is [`VERB`].
pub fn start(config: &NatConfig) -> Result<(Backend, NatProcess), NatError> {
    let (backend, process) = begin(config)?;
    wait_until_ready(&backend)?;
    Ok((backend, process))
}

/// The same, but [`wait_until_ready`] is to be called before there are packets.
pub fn begin(config: &NatConfig) -> Result<(Backend, NatProcess), NatError> {
    if config.publish.len() > MAX_PUBLISHED {
        return Err(NatError::TooMany(config.publish.len()));
    }
    let listeners = config.publish.iter().map(Listener::open).collect::<Result<Vec<_>, _>>()?;
    let (ours, theirs) = packet_sockets().map_err(|error| NatError::Start(error.into()))?;
    let mut command = Command::new("/proc/self/exe");
    // Nothing of the environment is needed but how much to log.
    command.arg(VERB).env_clear().envs(env::vars_os().filter(|(name, _)| name == "PURLIN_LOG"));
    command.current_dir("/").stdin(theirs).stdout(Stdio::null());
    // What is typed at the terminal is not for it.
    command.process_group(0);
    let child = command.spawn().map_err(NatError::Start)?;
    drop(command);
    let published = listeners.iter().map(|listener| listener.address).collect();
    let mut process = NatProcess { child, published };
    if send_config(&ours, config, &listeners).is_err() {
        let ended = process.child.wait();
        return Err(NatError::Ended(ended.map_or_else(|error| error.to_string(), |status| status.to_string())));
    }
    let backend = Backend::socket(ours).map_err(NatError::Start)?;
    Ok((backend, process))
}

/// Waits until the NAT at the other end has said that it is ready, from whatever process.
pub fn wait_until_ready(backend: &Backend) -> Result<(), NatError> {
    let silent = || NatError::Ended("it has said nothing".into());
    let mut answer = [0; 1024];
    while let Err(Errno::INTR) = poll(&mut [PollFd::new(backend, PollFlags::IN)], None) {}
    match recv(backend, &mut answer[..], RecvFlags::DONTWAIT) {
        Ok((1, _)) if answer[0] == 0 => Ok(()),
        Ok((0, _)) | Err(_) => Err(silent()),
        Ok((length, _)) => Err(NatError::Failed(String::from_utf8_lossy(&answer[..length]).into_owned())),
    }
}

/// A pair of packet sockets with as much room as the host allows.
pub(crate) fn packet_sockets() -> Result<(OwnedFd, OwnedFd), Errno> {
    let (a, b) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    for socket in [&a, &b] {
        if sockopt::set_socket_send_buffer_size_force(socket, SOCKET_BUFFER).is_err() {
            sockopt::set_socket_send_buffer_size(socket, SOCKET_BUFFER)?;
        }
    }
    Ok((a, b))
}

fn send_config(socket: &OwnedFd, config: &NatConfig, listeners: &[Listener]) -> Result<(), Errno> {
    let message = Wire::new(config).encode_to_vec();
    let descriptors: Vec<_> = listeners.iter().map(|listener| listener.socket.as_fd()).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_PUBLISHED))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(&descriptors));
    }
    sendmsg(socket, &[IoSlice::new(&message)], &mut control, SendFlags::NOSIGNAL).map(drop)
}

fn receive_config(socket: &OwnedFd) -> Result<(NatConfig, Vec<OwnedFd>), String> {
    let mut message = vec![0; MAX_CONFIG];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_PUBLISHED))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(socket, &mut [IoSliceMut::new(&mut message)], &mut control, RecvFlags::CMSG_CLOEXEC)
        .map_err(|error| format!("no configuration: {error}"))?;
    let descriptors = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
        _ => None,
    });
    let listeners: Vec<_> = descriptors.flatten().collect();
    let wire = Wire::decode(&message[..received.bytes]).map_err(|error| format!("bad configuration: {error}"))?;
    let config = wire.config().filter(|config| config.publish.len() == listeners.len());
    config.map(|config| (config, listeners)).ok_or_else(|| "bad configuration".into())
}

/// The NAT's process: serves the guest at the other end of standard input until that is closed.
pub fn main() -> ExitCode {
    let Ok(socket) = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3) else { return ExitCode::FAILURE };
    match prepare(&socket) {
        Ok(mut nat) => {
            if send(&socket, &[0], SendFlags::NOSIGNAL).is_err() {
                return ExitCode::FAILURE;
            }
            match nat.run() {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    tracing::error!("the network process ends: {error}");
                    ExitCode::FAILURE
                }
            }
        }
        Err(reason) => {
            let _ = send(&socket, reason.as_bytes(), SendFlags::NOSIGNAL);
            ExitCode::FAILURE
        }
    }
}

fn prepare(socket: &OwnedFd) -> Result<Nat, String> {
    let (config, listeners) = receive_config(socket)?;
    let own = socket.try_clone().map_err(|error| error.to_string())?;
    let limit = max_connections(raise_descriptor_limit(), listeners.len());
    let nat = Nat::new(own, &config, listeners, limit).map_err(|error| error.to_string())?;
    sandbox::enter().map_err(|error| format!("cannot make its sandbox: {error}"))?;
    Ok(nat)
}

/// Raises the limit of open descriptors as far as it goes, and returns it.
fn raise_descriptor_limit() -> usize {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    let current = if setrlimit(Resource::Nofile, raised).is_ok() { limit.maximum } else { limit.current };
    current.and_then(|n| usize::try_from(n).ok()).unwrap_or(usize::MAX)
}

/// How many connections there may be, so that descriptors last for everything else too.
fn max_connections(descriptors: usize, published: usize) -> usize {
    let others = OTHER_DESCRIPTORS + published + datagrams::LIMIT;
    descriptors.saturating_sub(others).clamp(16, MAX_CONNECTIONS)
}
