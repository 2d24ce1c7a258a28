//! What the sections say: Protocol Buffers, whose fields are only ever added.

use std::{
    fmt,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use prost::Message;
use rustix::rand::{GetRandomFlags, getrandom};

/// What tells snapshots apart: 16 random bytes, shown as 32 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct SnapshotId(pub [u8; 16]);

impl SnapshotId {
    pub(crate) fn random() -> std::io::Result<Self> {
        let mut bytes = [0; 16];
        match getrandom(&mut bytes, GetRandomFlags::empty())? {
            16 => Ok(Self(bytes)),
            _ => Err(std::io::Error::other("the host has no random numbers")),
        }
    }
}

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SnapshotId({self})")
    }
}

/// What a snapshot is of.
#[derive(Clone, PartialEq, Message)]
pub struct Manifest {
    #[prost(bytes = "vec", tag = "1")]
    pub(crate) id: Vec<u8>,
    /// The snapshot that it stands on; none if it has all of memory.
    #[prost(message, optional, tag = "2")]
    pub parent: Option<ParentName>,
    /// Milliseconds since 1970.
    #[prost(uint64, tag = "3")]
    pub(crate) created_ms: u64,
    /// The name of the machine.
    #[prost(string, tag = "4")]
    pub machine: String,
    /// What wrote it, for people.
    #[prost(string, tag = "5")]
    pub program: String,
    /// The images of the machine's disks at that moment, by number.
    #[prost(message, repeated, tag = "6")]
    pub disks: Vec<DiskImage>,
}

impl Manifest {
    /// Which snapshot it is.
    pub fn id(&self) -> SnapshotId {
        // A snapshot is opened only with 16 bytes here.
        SnapshotId(self.id.as_slice().try_into().unwrap_or_default())
    }

    /// When it was taken.
    pub fn created(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_millis(self.created_ms)
    }
}

/// The snapshot that another one stands on.
#[derive(Clone, PartialEq, Message)]
pub struct ParentName {
    #[prost(bytes = "vec", tag = "1")]
    pub(crate) id: Vec<u8>,
    /// See [`crate::header::fingerprint`].
    #[prost(fixed32, tag = "2")]
    pub(crate) fingerprint: u32,
    /// Its file's name, in the same directory.
    #[prost(string, tag = "3")]
    pub file: String,
}

/// A disk's image at the moment of the snapshot.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct DiskImage {
    /// Where it is; empty for a disk that was not frozen, as one that the guest cannot write.
    #[prost(string, tag = "1")]
    pub path: String,
    /// `raw` or `qcow2`.
    #[prost(string, tag = "2")]
    pub format: String,
}

/// Where in the memory section which pages are.
#[derive(Clone, PartialEq, Message)]
pub struct Index {
    #[prost(message, repeated, tag = "1")]
    pub slots: Vec<SlotIndex>,
    /// CRC-32C of each MiB of the memory section.
    #[prost(fixed32, repeated, tag = "2")]
    pub chunks: Vec<u32>,
}

/// The pages of one slot that are not as in the parent, or without a parent not zero.
#[derive(Clone, PartialEq, Message)]
pub struct SlotIndex {
    /// Guest physical address.
    #[prost(uint64, tag = "1")]
    pub start: u64,
    /// Bytes.
    #[prost(uint64, tag = "2")]
    pub length: u64,
    /// Three numbers for each run, in order: its first page in the slot, how many pages, and the number of the first one in
    /// the memory section plus one, or 0 for zeroes.
    #[prost(uint64, repeated, tag = "3")]
    pub runs: Vec<u64>,
}

/// A run of pages, as [`SlotIndex::runs`] has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    pub first: u64,
    pub count: u64,
    /// The first one's number in the memory section, `None` for zeroes.
    pub place: Option<u64>,
}

impl SlotIndex {
    pub fn runs(&self) -> impl Iterator<Item = Run> {
        self.runs.chunks_exact(3).map(|run| Run { first: run[0], count: run[1], place: run[2].checked_sub(1) })
    }

    /// Adds a page behind those that there are.
    pub fn push(&mut self, page: u64, place: Option<u64>) {
        let word = place.map_or(0, |place| place + 1);
        if let Some([first, count, start]) = self.runs.last_chunk_mut()
            && *first + *count == page
            && word == if *start == 0 { 0 } else { *start + *count }
        {
            *count += 1;
            return;
        }
        self.runs.extend([page, 1, word]);
    }
}
