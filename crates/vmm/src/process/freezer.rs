//! Snapshots of the machine, and freezes that its clones are made of.
//!
//! A clone's process comes to the socket [`vm::FROZEN`], says which freeze it wants in [`ID`] bytes, and is given
//! the lengths of two messages with the descriptors of memory, then the messages: the layers of memory, and the state.

use std::{
    collections::HashMap,
    fs,
    io::{self, IoSlice, IoSliceMut, Read, Write},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use prost::Message;
use purlin_api::{
    ErrorBody, Reason,
    unix::Address,
    vm::{self, Freeze, SnapshotTaken, TakeSnapshot},
};
use purlin_engine::memory::{self, Layer, LayersMessage};
use purlin_state::SavedState;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};

use super::start::failed;
use crate::{FreezeSpec, Frozen, Running, SnapshotSpec, TakeError};

/// Bytes of a freeze's name: a UUID's text.
const ID: usize = 36;
/// The most files of memory: as many descriptors as go with a message (SCM_MAX_FD).
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
    let taken = match running.snapshot(&spec(true, &wanted.overlay)?) {
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
#[derive(Default)]
pub struct Freezer {
    freezes: Mutex<HashMap<String, Arc<Frozen>>>,
}

impl Freezer {
    /// One whose socket is there; a thread serves clones.
    pub fn open() -> io::Result<Arc<Self>> {
        let _ = fs::remove_file(vm::FROZEN);
        let listener = UnixListener::bind(vm::FROZEN)?;
        let freezer = Arc::new(Self::default());
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
        let frozen = running.fork(&overlays(running, &wanted.overlay)?).map_err(failed)?;
        let pause_us = frozen.pause.as_micros() as u64;
        self.freezes.lock().unwrap_or_else(PoisonError::into_inner).insert(wanted.freeze, Arc::new(frozen));
        Ok(vm::Frozen { pause_us })
    }

    /// Forgets a freeze.
    pub fn thaw(&self, freeze: &str) {
        self.freezes.lock().unwrap_or_else(PoisonError::into_inner).remove(freeze);
    }

    /// Gives a clone's process what it wants.
    fn give(&self, mut stream: &UnixStream) -> io::Result<()> {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut id = [0; ID];
        stream.read_exact(&mut id)?;
        let id = String::from_utf8_lossy(&id).into_owned();
        let frozen = self.freezes.lock().unwrap_or_else(PoisonError::into_inner).get(&id).cloned();
        let frozen = frozen.ok_or(io::ErrorKind::NotFound)?;
        let (layers, files) = memory::send(&frozen.memory);
        let (layers, state) = (layers.encode_to_vec(), frozen.state.encode_to_vec());
        let lengths = [layers.len() as u64, state.len() as u64].map(u64::to_le_bytes).concat();
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FILES))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !control.push(SendAncillaryMessage::ScmRights(&files)) {
            return Err(io::Error::other("memory has too many layers"));
        }
        sendmsg(stream, &[IoSlice::new(&lengths)], &mut control, SendFlags::NOSIGNAL)?;
        stream.write_all(&layers)?;
        stream.write_all(&state)
    }
}

/// What a clone goes on from.
pub struct Given {
    /// Everything but memory and disks.
    pub state: SavedState,
    /// Memory.
    pub memory: Vec<Layer>,
}

/// Fetches what the clone is to go on from; the machine at the other end is not trusted with more than the clone itself.
pub fn fetch(socket: &Path, freeze: &str) -> Result<Given, ErrorBody> {
    let wrong = |e: &dyn std::fmt::Display| failed(format!("cannot get the machine to clone: {e}"));
    let receive = || -> io::Result<_> {
        let mut stream = UnixStream::connect(Address::of(socket)?.path())?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(freeze.as_bytes())?;
        let (lengths, files) = receive_lengths(&stream)?;
        let read = |length: u64| {
            let mut message = Vec::new();
            (&stream).take(length.min(MAX_MESSAGE)).read_to_end(&mut message).map(|_| message)
        };
        Ok((read(lengths[0])?, read(lengths[1])?, files))
    };
    let (layers, state, files) = receive().map_err(|e| wrong(&e))?;
    let layers = LayersMessage::decode(layers.as_slice()).map_err(|e| wrong(&e))?;
    let state = <SavedState as Message>::decode(state.as_slice()).map_err(|e| wrong(&e))?;
    let memory = memory::receive(&layers, files).map_err(|e| wrong(&e))?;
    Ok(Given { state, memory })
}

fn receive_lengths(stream: &UnixStream) -> io::Result<([u64; 2], Vec<OwnedFd>)> {
    let mut lengths = [0; 16];
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FILES))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::WAITALL;
    let received = recvmsg(stream.as_fd(), &mut [IoSliceMut::new(&mut lengths)], &mut control, flags)?;
    if received.bytes != lengths.len() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let files = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(files) => Some(files),
        _ => None,
    });
    let files = files.flatten().collect();
    let number = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| lengths[at + i]));
    Ok(([number(0), number(8)], files))
}
