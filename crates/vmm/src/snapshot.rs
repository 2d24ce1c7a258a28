//! Snapshots of a run as files, and runs that go on from them.

use std::{
    io::Write,
    path::{Path, PathBuf},
    time::Duration,
};

use purlin_engine::Engine;
use purlin_machine::check_processors;
use purlin_snapshot::{Chain, Contents, DiskImage, SnapshotError, SnapshotId, Written};
use purlin_storage::{FrozenDisk, IoError};

use crate::{
    config::RunConfig,
    fork::{FreezeError, FreezeSpec, Frozen},
    lifecycle::{LifecycleError, StartError},
    running::{Running, Vmm},
};

/// What snapshot is to be taken.
#[derive(Clone, Debug)]
pub struct SnapshotSpec {
    /// The file to write; nothing must be there yet.
    pub path: PathBuf,
    /// The name of the machine, for people.
    pub machine: String,
    /// How the disks are to go on.
    pub disks: FreezeSpec,
    /// Only what has changed since the snapshot that was taken last of this run, or that it goes on from, if there is one
    /// still. It stands on that then, and must be in the same directory.
    pub incremental: bool,
}

/// A snapshot that was taken. The machine goes on.
#[derive(Clone, Debug)]
pub struct Snapshotted {
    /// Which one it is.
    pub id: SnapshotId,
    /// The snapshot that it stands on.
    pub parent: Option<PathBuf>,
    /// For how long the machine stood still; 0 if it was paused.
    pub pause: Duration,
    /// Pages of memory in it.
    pub pages: u64,
    /// Pages that have become zeroes since the parent.
    pub zero_pages: u64,
    /// The file's bytes.
    pub bytes: u64,
    /// The images of its disks, which are frozen.
    pub disks: Vec<Option<FrozenDisk>>,
}

/// Why a snapshot could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum TakeError {
    /// The file cannot be there. Nothing has happened to the machine.
    #[error(transparent)]
    Refused(SnapshotError),
    /// The machine cannot be frozen. It is as it was.
    #[error(transparent)]
    Freeze(#[from] FreezeError),
    /// The snapshot cannot be written. There is none, and the machine goes on; its disks do with their overlays.
    #[error(transparent)]
    Write(SnapshotError),
    /// A frozen image cannot be written to the host's disk; the rest as above.
    #[error("cannot write all of a disk's image: {0}; there is no snapshot, the machine goes on")]
    Disk(IoError),
}

/// How a machine has the pages of a snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pages {
    /// Checked, and mapped from the files, which must stay as they are as long as it runs: it begins after they were read
    /// once, and takes memory only for pages that it writes.
    #[default]
    Mapped,
    /// Checked and copied: the files may change.
    Copied,
    /// Mapped without a check: it begins at once. Damage shows in the guest only.
    Unchecked,
}

/// Why a machine cannot go on from a snapshot. There is none then.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The files are not what they should be.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The machine cannot be made.
    #[error(transparent)]
    Start(#[from] StartError),
}

impl Running {
    /// Takes a snapshot. The machine stands still for its state to be taken, its memory and disks to be frozen; the file
    /// is written while it goes on, and on the host's disk when this returns, with the images of the disks.
    pub fn snapshot(&self, spec: &SnapshotSpec) -> Result<Snapshotted, TakeError> {
        // One after another: each stands on the one before.
        let mut last = self.last_snapshot();
        let parent = last.clone().filter(|_| spec.incremental);
        purlin_snapshot::check(&spec.path, parent.as_ref()).map_err(TakeError::Refused)?;
        let frozen = self.fork(&spec.disks)?;
        self.sync_disks()?;
        let disks: Vec<_> = frozen.disks.iter().map(image).collect();
        let contents = Contents {
            machine: &spec.machine,
            state: &frozen.state,
            memory: &frozen.memory,
            disks: &disks,
            parent: parent.as_ref(),
        };
        let written = purlin_snapshot::write(&spec.path, &contents).map_err(TakeError::Write)?;
        let parent = parent.map(|parent| parent.path().to_owned());
        let Frozen { memory, disks, pause, .. } = frozen;
        let Written { id, pages, zero_pages, bytes, .. } = written;
        *last = Some(written.into_parent(memory));
        Ok(Snapshotted { id, parent, pause, pages, zero_pages, bytes, disks })
    }

    /// Brings frozen images onto the host's disk, as the snapshot that names them is.
    fn sync_disks(&self) -> Result<(), TakeError> {
        let disks = match self.machine() {
            Ok(machine) => machine.disks().to_vec(),
            Err(LifecycleError::Stopped) => return Ok(()), // a disk that is closed is synced
            Err(error) => return Err(FreezeError::from(error).into()),
        };
        disks.iter().try_for_each(|disk| disk.sync_frozen()).map_err(TakeError::Disk)
    }
}

fn image(disk: &Option<FrozenDisk>) -> DiskImage {
    match disk {
        Some(FrozenDisk { path, format }) => {
            let path = std::path::absolute(path).unwrap_or_else(|_| path.clone());
            DiskImage { path: path.to_string_lossy().into_owned(), format: format.to_string() }
        }
        None => DiskImage::default(),
    }
}

/// Whether the machine of a snapshot can go on under this engine on this host: before anything is given up for it.
pub fn check_engine(chain: &Chain, engine: &dyn Engine) -> Result<(), RestoreError> {
    Ok(check_processors(chain.state(), engine).map_err(StartError::from)?)
}

impl Vmm {
    /// Makes the machine of a snapshot, paused where it was. Everything is checked before any of it is made. Its disks, of
    /// `config`, are to have the content that they had then: overlays of the images that the manifest names.
    pub fn restore_snapshot(
        config: RunConfig,
        path: &Path,
        pages: Pages,
        serial_out: Box<dyn Write + Send>,
    ) -> Result<Running, RestoreError> {
        let chain = Chain::open(path)?;
        if pages != Pages::Unchecked {
            chain.verify()?;
        }
        let memory = if pages == Pages::Copied { chain.load()? } else { chain.layers()? };
        let running = Self::restore_from(config, chain.state(), &memory, None, serial_out)?;
        *running.last_snapshot() = chain.into_parent(memory);
        Ok(running)
    }
}
