//! What a user says of a disk, and which format that means.

use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
};

use crate::limit::Limits;

/// The longest serial number that a virtio block device can show (virtio 1.3, 5.2.6.1: VIRTIO_BLK_T_GET_ID), in bytes.
pub const MAX_SERIAL: usize = 20;

/// A disk as the user asks for it. [`Disk::open`](crate::Disk::open) makes it an opened one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskSpec {
    /// The image: a regular file or a block device.
    pub path: PathBuf,
    /// The image's format. Without one, the file name's extension decides (see [`Format::of_name`]).
    pub format: Option<Format>,
    /// The guest cannot write, and the image may be open for reading elsewhere at the same time.
    pub read_only: bool,
    /// What the guest sees as the disk's serial number: up to [`MAX_SERIAL`] printable ASCII characters.
    pub serial: Option<String>,
    /// How fast the guest may go.
    pub limits: Limits,
    /// Whether a qcow2 image may name a backing file. An image from a stranger must not: the name could be any of the
    /// host's files.
    pub backing: bool,
}

impl DiskSpec {
    /// The writable disk at `path`, without limits.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            format: None,
            read_only: false,
            serial: None,
            limits: Limits::default(),
            backing: true,
        }
    }

    /// With this format.
    pub fn format(self, format: Format) -> Self {
        Self { format: Some(format), ..self }
    }

    /// For reading only.
    pub fn read_only(self) -> Self {
        Self { read_only: true, ..self }
    }

    /// Without a backing file: an image that names one is refused.
    pub fn standalone(self) -> Self {
        Self { backing: false, ..self }
    }
}

/// A format that a guest's disk can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The disk's bytes, one to one; holes are zeroes.
    Raw,
    /// QEMU's copy-on-write format, version 2 or 3.
    Qcow2,
}

impl Format {
    /// The format that a file name means: `.qcow2` is qcow2; `.raw`, `.img` and `.iso` are raw, and so is a block device's
    /// name (in /dev). Others mean nothing, and content is never asked: a guest writes it.
    pub fn of_name(path: &Path) -> Option<Self> {
        match path.extension().and_then(|e| e.to_str()).map(str::to_ascii_lowercase).as_deref() {
            Some("qcow2") => Some(Self::Qcow2),
            Some("raw" | "img" | "iso") => Some(Self::Raw),
            _ => path.starts_with("/dev").then_some(Self::Raw),
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        })
    }
}

impl FromStr for Format {
    type Err = UnknownFormat;

    fn from_str(name: &str) -> Result<Self, UnknownFormat> {
        match name {
            "raw" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Qcow2),
            _ => Err(UnknownFormat),
        }
    }
}

/// A name that is no format's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it is raw or qcow2; 'purlin image import' converts others")]
pub struct UnknownFormat;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_mean_a_format() {
        let of = |name: &str| Format::of_name(Path::new(name));
        assert_eq!(of("a.qcow2"), Some(Format::Qcow2));
        assert_eq!(of("a.QCOW2"), Some(Format::Qcow2));
        assert_eq!(of("b/a.img"), Some(Format::Raw));
        assert_eq!(of("a.qcow2.raw"), Some(Format::Raw));
        assert_eq!(of("/dev/vdb"), Some(Format::Raw));
        assert_eq!(of("a.vmdk"), None);
        assert_eq!(of("disk"), None);
    }
}
