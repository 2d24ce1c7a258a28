//! Snapshots of the machine, and freezes that its clones are made of.
//!
//! A clone's process comes to the socket [`vm::FROZEN`], says which freeze it wants in [`ID`] bytes, and is given
//! the length of a message, with descriptors of files, then the message.

use std::{
    fs::{self, File},
    io::{self, IoSlice, IoSliceMut, Read, Write},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::Path,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use prost::Message;
use purlin_api::{
    ErrorBody, Reason,
    unix::Address,
    vm::{self, Freeze, SnapshotTaken, TakeSnapshot},
};
use purlin_engine::{
    CodeChanges, Engine, SavedCode,
    memory::{self, Layer, LayersMessage},
};
use purlin_state::SavedState;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};

use super::{freezes::Freezes, start::failed};
use crate::{FreezeSpec, Frozen, Running, SnapshotSpec, TakeError};

/// Bytes of a freeze's name: a UUID's text.
const ID: usize = 36;
/// The most files: as many descriptors as go with a message (SCM_MAX_FD).
const MAX_FILES: usize = 253;
/// Bytes of the longest message that is taken.
const MAX_MESSAGE: u64 = 256 << 20;
/// How long a clone's process may take to say what it wants, and to take it.
const PATIENCE: Duration = Duration::from_secs(10);

/// Takes a snapshot; the machine's own disk, the first, goes on with an overlay, and there is no other that can be written.
pub fn snapshot(running: &Running, wanted: &TakeSnapshot) -> Result<SnapshotTaken, ErrorBody> {
    check_name(&wanted.file)?;
    let spec = |incremental, overlay: &Path| {
        let spec = SnapshotSpec {
            path: wanted.file.clone(),
            machine: String::new(),
            disks: overlays(running, overlay)?,
            incremental,
        };
        Ok::<_, ErrorBody>(spec)
    };
    let taken = match running.snapshot(&spec(!wanted.whole, &wanted.overlay)?) {
        // What it would stand on is not there any more.
        Err(TakeError::Refused(_)) => running.snapshot(&spec(false, &wanted.overlay)?),
        other => other,
    };
    let taken = taken.map_err(failed)?;
    let pause_us = taken.pause.as_micros() as u64;
    Ok(SnapshotTaken { parent: taken.parent, pause_us, pages: taken.pages, bytes: taken.bytes })
}

/// The overlay for the machine's own disk. What others have given it is not frozen with it.
fn overlays(running: &Running, overlay: &Path) -> Result<FreezeSpec, ErrorBody> {
    check_name(overlay)?;
    let disks = running.disk_paths().len();
    let overlays = (0..disks).map(|number| (number == 0).then(|| overlay.to_owned())).collect();
    Ok(FreezeSpec { overlays })
}

/// Names in the directory, as the sandbox has it too.
fn check_name(path: &Path) -> Result<(), ErrorBody> {
    let is_name = path.file_name().is_some_and(|name| name == path.as_os_str());
    if is_name { Ok(()) } else { Err(ErrorBody::new(Reason::BadRequest, "it is a name in the machine's directory")) }
}

/// Freezes of the machine, for clones.
pub struct Freezer {
    engine: Arc<dyn Engine>,
    freezes: Freezes<Arc<Frozen>>,
}

impl Freezer {
    /// One of a machine that this engine runs, whose socket is there; a thread serves clones.
    pub fn open(engine: Arc<dyn Engine>) -> io::Result<Arc<Self>> {
        let _ = fs::remove_file(vm::FROZEN);
        let listener = UnixListener::bind(vm::FROZEN)?;
        let freezer = Arc::new(Self { engine, freezes: Freezes::default() });
        let served = freezer.clone();
        thread::Builder::new().name("freezer".into()).spawn(move || {
            for stream in listener.incoming().flatten() {
                // It is the clone that lacks what it does not get.
                let _ = served.give(&stream);
            }
        })?;
        Ok(freezer)
    }

    /// Freezes the machine, which goes on.
    pub fn freeze(&self, running: &Running, wanted: Freeze) -> Result<vm::Frozen, ErrorBody> {
        if wanted.freeze.len() != ID {
            return Err(ErrorBody::new(Reason::BadRequest, "a freeze is called by a UUID"));
        }
        let begun = self.freezes.begin(&wanted.freeze);
        let overlays = overlays(running, &wanted.overlay)?;
        let frozen = running.fork(&overlays).map_err(failed)?;
        let (pause_us, frozen) = (frozen.pause.as_micros() as u64, Arc::new(frozen));
        begun.done(frozen.clone());
        // So that it is there when the clones' processes are; without the thread they wait for it.
        let _ = thread::Builder::new().name("code".into()).spawn(move || drop(frozen.saved_code()));
        Ok(vm::Frozen { pause_us })
    }

    /// Forgets a freeze.
    pub fn thaw(&self, freeze: &str) {
        let Some(forgotten) = self.freezes.forget(freeze) else { return };
        let refresh = move || forgotten.code.as_ref()?.refresh().err();
        let told = move || refresh().into_iter().for_each(|error| tracing::debug!("translated code: {error}"));
        // Without the thread the next clones find what these have found.
        let _ = thread::Builder::new().name("code".into()).spawn(told);
    }

    /// Gives a clone's process what it wants.
    fn give(&self, mut stream: &UnixStream) -> io::Result<()> {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut id = [0; ID];
        stream.read_exact(&mut id)?;
        let id = String::from_utf8_lossy(&id).into_owned();
        let frozen = self.freezes.wait_for(&id).ok_or(io::ErrorKind::NotFound)?;
        let (layers, mut files) = memory::send(&frozen.memory);
        let code = frozen.saved_code();
        files.extend(code.as_ref().map(|code| code.file.as_fd()));
        let message = FrozenMessage {
            layers: Some(layers),
            state: Some(frozen.state.clone()),
            engine: self.engine.name().into(),
            tsc_khz: self.engine.tsc_khz(),
            code: code.as_ref().map(|code| CodeMessage::from(&code.changes)),
        };
        let message = message.encode_to_vec();
        let length = (message.len() as u64).to_le_bytes();
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FILES))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !control.push(SendAncillaryMessage::ScmRights(&files)) {
            return Err(io::Error::other("memory has too many layers"));
        }
        sendmsg(stream, &[IoSlice::new(&length)], &mut control, SendFlags::NOSIGNAL)?;
        stream.write_all(&message)
    }
}

/// A machine that is frozen, but for its disks. Its files go beside it: those of the layers, then that of the code.
#[derive(Clone, PartialEq, Message)]
struct FrozenMessage {
    #[prost(message, optional, tag = "1")]
    layers: Option<LayersMessage>,
    #[prost(message, optional, tag = "2")]
    state: Option<SavedState>,
    #[prost(string, tag = "3")]
    engine: String,
    #[prost(uint32, tag = "4")]
    tsc_khz: u32,
    #[prost(message, optional, tag = "5")]
    code: Option<CodeMessage>,
}

/// [`CodeChanges`].
#[derive(Clone, PartialEq, Message)]
struct CodeMessage {
    #[prost(uint32, tag = "1")]
    blocks: u32,
    #[prost(uint32, repeated, tag = "2")]
    died: Vec<u32>,
}

impl From<&CodeChanges> for CodeMessage {
    fn from(changes: &CodeChanges) -> Self {
        Self { blocks: changes.blocks, died: changes.died.clone() }
    }
}

/// What a clone goes on from.
pub struct Given {
    /// Everything but memory and disks.
    pub state: SavedState,
    /// Memory.
    pub memory: Vec<Layer>,
    /// The name of the engine that ran it, and the frequency of its TSC.
    pub engine: (String, u32),
    /// What the engine has made of the guest's code.
    pub code: Option<SavedCode>,
}

/// Fetches what the clone is to go on from. The machine at the other end is trusted with the clone, whose code it may have
/// translated, and with nothing else.
pub fn fetch(socket: &Path, freeze: &str) -> Result<Given, ErrorBody> {
    let wrong = |e: &dyn std::fmt::Display| failed(format!("cannot get the machine to clone: {e}"));
    let receive = || -> io::Result<_> {
        let mut stream = UnixStream::connect(Address::of(socket)?.path())?;
        stream.write_all(freeze.as_bytes())?;
        // The machine may still be about to be frozen. If its process is gone, so is this.
        let (length, files) = receive_length(&stream)?;
        let message = read_within(PATIENCE, &mut stream, length.min(MAX_MESSAGE))?;
        Ok((FrozenMessage::decode(message.as_slice())?, files))
    };
    let (message, mut files) = receive().map_err(|e| wrong(&e))?;
    let (layers, state) = (message.layers.unwrap_or_default(), message.state.unwrap_or_default());
    let code = message.code.and_then(|CodeMessage { blocks, died }| {
        let file = Arc::new(File::from(files.pop()?));
        Some(SavedCode { file, changes: CodeChanges { blocks, died } })
    });
    let memory = memory::receive(&layers, files).map_err(|e| wrong(&e))?;
    Ok(Given { state, memory, engine: (message.engine, message.tsc_khz), code })
}

/// Reads so many bytes, in no longer than that in all.
fn read_within(most: Duration, stream: &mut UnixStream, length: u64) -> io::Result<Vec<u8>> {
    const PIECE: u64 = 1 << 20;
    let (begun, mut message) = (Instant::now(), Vec::new());
    while (message.len() as u64) < length {
        let rest = most.checked_sub(begun.elapsed()).filter(|rest| !rest.is_zero()).ok_or(io::ErrorKind::TimedOut)?;
        stream.set_read_timeout(Some(rest))?;
        let mut piece = vec![0; PIECE.min(length - message.len() as u64) as usize];
        let read = stream.read(&mut piece)?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        message.extend_from_slice(&piece[..read]);
    }
    Ok(message)
}

fn receive_length(stream: &UnixStream) -> io::Result<(u64, Vec<OwnedFd>)> {
    let mut length = [0; 8];
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FILES))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::WAITALL;
    let received = recvmsg(stream.as_fd(), &mut [IoSliceMut::new(&mut length)], &mut control, flags)?;
    if received.bytes != length.len() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let files = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(files) => Some(files),
        _ => None,
    });
    let files = files.flatten().collect();
    Ok((u64::from_le_bytes(length), files))
}
