//! What an image is, for people and for import.

use std::{
    fmt,
    fs::File,
    io,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    str::FromStr,
};

use crate::{
    disk::Disk,
    error::OpenError,
    host_file,
    open::{self, host},
    qcow2_header::{self, Header},
    spec::{DiskSpec, Format},
};

/// What `info` knows of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageInfo {
    /// Its format.
    pub format: Format,
    /// What a guest sees, in bytes.
    pub virtual_size: u64,
    /// What the image itself takes of the host's disk (without those below it), in bytes.
    pub allocated: u64,
    /// The image below.
    pub backing: Option<BackingInfo>,
}

/// The image below another one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingInfo {
    /// Where it is.
    pub path: PathBuf,
    /// Its format as the image above says it.
    pub format: Option<String>,
}

/// Looks at the image at `path`, whatever is below it. Without a format, the content decides, for nothing is written.
pub fn info(path: &Path, format: Option<Format>) -> Result<ImageInfo, OpenError> {
    let read = |source| host("read", path, source);
    let file = File::open(path).map_err(|source| host("open", path, source))?;
    let length = host_file::length(&file).map_err(read)?;
    let allocated = file.metadata().map_err(read)?.blocks() * 512;
    let holds_qcow2 = qcow2_header::is_qcow2(&file).map_err(read)?;
    let format = format.unwrap_or(if holds_qcow2 { Format::Qcow2 } else { Format::Raw });
    if format == Format::Raw {
        return Ok(ImageInfo { format, virtual_size: length, allocated, backing: None });
    }
    let broken = |reason| OpenError::Image { path: path.to_owned(), format, reason };
    let header = Header::read(&file, length).map_err(broken)?;
    let backing = match header.backing {
        Some(backing) => Some(BackingInfo { path: open::backing_path(path, &backing.name)?, format: backing.format }),
        None => None,
    };
    Ok(ImageInfo { format, virtual_size: header.virtual_size, allocated, backing })
}

/// A format that images come in from elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceFormat {
    /// One that disks can have.
    Disk(Format),
    /// VMware's.
    Vmdk,
    /// Microsoft's older one, of Virtual PC and Azure.
    Vhd,
    /// Hyper-V's.
    Vhdx,
    /// VirtualBox's.
    Vdi,
}

impl SourceFormat {
    /// The format that the content at `path` has. Only for images that are read once and become a new one: a guest that
    /// could write it could make it anything.
    pub fn of_content(path: &Path) -> Result<Self, OpenError> {
        let file = open::open_file(path, false)?;
        Self::probe(&file).map_err(|source| host("read", path, source))
    }

    fn probe(file: &File) -> io::Result<Self> {
        let mut start = [0; 512];
        // Shorter than that it is raw, or broken, as the opener will say.
        let length = host_file::length(file)?;
        file.read_exact_at(&mut start[..length.min(512) as usize], 0)?;
        let mut end = [0; 8];
        if length >= 512 {
            file.read_exact_at(&mut end, length - 512)?; // a fixed VHD has a footer only
        }
        Ok(match &start {
            s if s.starts_with(&qcow2_header::MAGIC) => Self::Disk(Format::Qcow2),
            s if s.starts_with(b"KDMV") || s.starts_with(VMDK_TEXT) => Self::Vmdk,
            s if s.starts_with(b"vhdxfile") => Self::Vhdx,
            s if s[64..68] == [0x7f, 0x10, 0xda, 0xbe] => Self::Vdi,
            s if s.starts_with(b"conectix") || end == *b"conectix" => Self::Vhd,
            _ => Self::Disk(Format::Raw),
        })
    }

    /// qemu-img's name for it.
    pub(crate) fn qemu_name(self) -> &'static str {
        match self {
            Self::Disk(Format::Raw) => "raw",
            Self::Disk(Format::Qcow2) => "qcow2",
            Self::Vmdk => "vmdk",
            Self::Vhd => "vpc",
            Self::Vhdx => "vhdx",
            Self::Vdi => "vdi",
        }
    }
}

/// How a VMDK begins whose data is in other files.
const VMDK_TEXT: &[u8] = b"# Disk DescriptorFile";

/// Whether the file is a VMDK that only names other files.
pub(crate) fn is_vmdk_descriptor(path: &Path) -> io::Result<bool> {
    let mut start = [0; VMDK_TEXT.len()];
    match File::open(path)?.read_exact_at(&mut start, 0) {
        Ok(()) => Ok(start == VMDK_TEXT),
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(e) => Err(e),
    }
}

impl fmt::Display for SourceFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Vhd => "vhd",
            other => other.qemu_name(),
        })
    }
}

impl FromStr for SourceFormat {
    type Err = UnknownSourceFormat;

    fn from_str(name: &str) -> Result<Self, UnknownSourceFormat> {
        let all = [Self::Disk(Format::Raw), Self::Disk(Format::Qcow2), Self::Vmdk, Self::Vhd, Self::Vhdx, Self::Vdi];
        all.into_iter().find(|format| format.to_string() == name).ok_or(UnknownSourceFormat)
    }
}

/// A name that is no format's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it is one of raw, qcow2, vmdk, vhd, vhdx, vdi")]
pub struct UnknownSourceFormat;

/// Opens an image to read from it on the host. `format` as for [`DiskSpec::format`].
pub fn open_read_only(path: &Path, format: Option<Format>) -> Result<std::sync::Arc<Disk>, OpenError> {
    Disk::open(&DiskSpec { format, ..DiskSpec::new(path).read_only() })
}
