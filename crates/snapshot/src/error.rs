//! Why a snapshot cannot be written or used.

use std::{io, path::PathBuf};

use purlin_memory::MemoryError;

/// Why a snapshot cannot be written or used: one line that names the file and says what to do.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The host refused something.
    #[error("cannot {what} '{}': {source}", path.display())]
    Host {
        /// `open`, `read`, `write` …
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The host's reason.
        source: io::Error,
    },
    /// Something else.
    #[error("'{}' is no snapshot of Purlin's", path.display())]
    NotASnapshot {
        /// The file.
        path: PathBuf,
    },
    /// Written by a later program.
    #[error("'{}' has version {found} of the format, this program knows up to {known}: use a newer one", path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// The newest that is known here.
        known: u32,
    },
    /// Written with something that a reader must know.
    #[error("'{}' has features that this program does not know ({bits:#x}): use a newer one", path.display())]
    Feature {
        /// The file.
        path: PathBuf,
        /// Those that are not known.
        bits: u32,
    },
    /// The file is shorter, or longer, than it says.
    #[error("'{}' is to have {expected} bytes and has {found}: it is cut off, copy it again", path.display())]
    CutOff {
        /// The file.
        path: PathBuf,
        /// Bytes that it should have.
        expected: u64,
        /// Bytes that it has.
        found: u64,
    },
    /// Not what was written.
    #[error("the {section} of '{}' is corrupt: {reason}; copy the file again, or take another snapshot", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// `header`, `manifest`, `state`, `index` or `memory`.
        section: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// A snapshot stands on one that is not there.
    #[error("'{}' stands on '{}', which cannot be opened: {source}; put it back", path.display(), parent.display())]
    ParentMissing {
        /// The snapshot.
        path: PathBuf,
        /// Where its parent should be.
        parent: PathBuf,
        /// The host's reason.
        source: io::Error,
    },
    /// A snapshot stands on another one than the one that is there.
    #[error("'{}' stands on another snapshot than '{}' is now: put that back which was there", path.display(), parent.display())]
    WrongParent {
        /// The snapshot.
        path: PathBuf,
        /// What is in its parent's place.
        parent: PathBuf,
    },
    /// More snapshots on each other than anybody can want.
    #[error("'{}' would be more than {max} snapshots on each other: take one without a parent", path.display())]
    TooDeep {
        /// The snapshot.
        path: PathBuf,
        /// The limit.
        max: usize,
    },
    /// A snapshot is to be written in another directory than its parent.
    #[error("'{}' is to stand on '{}', which is in another directory: write it there", path.display(), parent.display())]
    Elsewhere {
        /// The new snapshot.
        path: PathBuf,
        /// Its parent.
        parent: PathBuf,
    },
    /// The machine's memory is not like its parent's.
    #[error("'{}' is to stand on a snapshot of a machine with other memory: take one without a parent", path.display())]
    OtherMachine {
        /// The new snapshot.
        path: PathBuf,
    },
    /// Memory cannot be made of it.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}
