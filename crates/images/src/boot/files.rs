//! Files of a guest's file system: ext2, ext3 and ext4.

use std::{
    error::Error as StdError,
    fmt,
    io::{self, Read},
    sync::Arc,
};

use ext4_view::{Ext4, Ext4Read};
use purlin_storage::Disk;

use super::partitions::Volume;

/// The most bytes of a configuration file.
const MAX_TEXT: u64 = 1 << 20;
/// The most entries of a directory that are looked at.
const MAX_ENTRIES: usize = 4096;

/// A file system, for reading.
pub struct FileSystem(Ext4);

impl FileSystem {
    /// Opens that on `volume`. The error says what is there instead, `None` if it is nothing that a root could be on.
    pub fn open(disk: &Arc<Disk>, volume: &Volume) -> Result<Self, Option<String>> {
        let reader = VolumeReader { disk: disk.clone(), volume: volume.clone() };
        match (kind(&reader), Ext4::load(Box::new(reader))) {
            (Some("ext4"), Ok(system)) => Ok(Self(system)),
            (Some("ext4"), Err(error)) => {
                Err(Some(format!("{volume} has an ext4 file system that is damaged: {error}")))
            }
            (Some(other), _) => Err(Some(format!("{volume} has {other}, which Purlin does not read"))),
            (None, _) => Err(None),
        }
    }

    /// As `root=UUID=` wants it.
    pub fn uuid(&self) -> String {
        self.0.uuid().to_string()
    }

    /// Whether there is something at `path`, links followed.
    pub fn exists(&self, path: &str) -> bool {
        self.0.exists(path).unwrap_or(false)
    }

    /// A file of at most `most` bytes, for reading, and its size.
    pub fn file(&self, path: &str, most: u64) -> Result<(impl Read, u64), String> {
        let file = self.0.open(path).map_err(|error| cannot_read(path, &error))?;
        match file.metadata().len() {
            size if size > most => Err(format!("{path} is too large: {size} bytes of at most {most}")),
            size => Ok((file, size)),
        }
    }

    /// A configuration file, if it is there and sane.
    pub fn text(&self, path: &str) -> Option<String> {
        let (mut file, _) = self.file(path, MAX_TEXT).ok()?;
        let mut text = String::new();
        file.read_to_string(&mut text).ok()?;
        Some(text)
    }

    /// The names in a directory; none if there is no such.
    pub fn names(&self, path: &str) -> Vec<String> {
        let entries = self.0.read_dir(path).into_iter().flatten().take(MAX_ENTRIES).map_while(Result::ok);
        entries.filter_map(|entry| entry.file_name().as_str().ok().map(str::to_owned)).collect()
    }
}

/// Why a file is of no use.
pub fn cannot_read(path: &str, error: &dyn fmt::Display) -> String {
    format!("{path} cannot be read: {error}")
}

/// What is on a volume by its signature.
fn kind(reader: &VolumeReader) -> Option<&'static str> {
    const SIGNATURES: [(&str, u64, &[u8]); 6] = [
        ("ext4", 1024 + 56, &[0x53, 0xef]),
        ("an XFS file system", 0, b"XFSB"),
        ("a Btrfs file system", 0x1_0040, b"_BHRfS_M"),
        ("an F2FS file system", 1024, &[0x10, 0x20, 0xf5, 0xf2]),
        ("an LVM volume", 512 + 24, b"LVM2 001"),
        ("a LUKS encrypted volume", 0, b"LUKS\xba\xbe"),
    ];
    let has = |at: u64, signature: &[u8]| {
        let mut found = vec![0; signature.len()];
        reader.read_at(at, &mut found).is_ok() && found == signature
    };
    SIGNATURES.iter().find(|(_, at, signature)| has(*at, signature)).map(|(name, ..)| *name)
}

struct VolumeReader {
    disk: Arc<Disk>,
    volume: Volume,
}

impl VolumeReader {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(buffer.len() as u64);
        if end.is_none_or(|end| end > self.volume.length) {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "beyond the partition's end"));
        }
        self.disk.read_at(buffer, self.volume.start + offset).map_err(io::Error::other)
    }
}

impl Ext4Read for VolumeReader {
    fn read(&mut self, start_byte: u64, dst: &mut [u8]) -> Result<(), Box<dyn StdError + Send + Sync + 'static>> {
        Ok(self.read_at(start_byte, dst)?)
    }
}
