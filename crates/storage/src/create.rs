//! New images, and larger ones.

use std::{
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::OpenOptionsExt,
    path::{self, Path, PathBuf},
};

use imago::{
    FormatAccess, FormatCreateBuilder,
    format::PreallocateMode,
    qcow2::{Qcow2, Qcow2CreateBuilder},
};

use crate::{
    block_on::block_on,
    disk::Disk,
    error::OpenError,
    host_file::HostFile,
    lock::LockedFile,
    open::{SECTOR, host},
    spec::{DiskSpec, Format},
};

/// An image to be made. It takes no room but for its tables until something is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewImage {
    /// Where; nothing must be there yet.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// The disk's size in bytes, a multiple of 512. Without one, that of the image below.
    pub size: Option<u64>,
    /// The image that it is an overlay of, and that image's format. Needs [`Format::Qcow2`]. The new image names it by its
    /// absolute path.
    pub backing: Option<(PathBuf, Format)>,
}

impl NewImage {
    /// An empty disk of `size` bytes.
    pub fn empty(path: impl Into<PathBuf>, format: Format, size: u64) -> Self {
        Self { path: path.into(), format, size: Some(size), backing: None }
    }

    /// A thin qcow2 overlay of the image `backing`, as large as it.
    pub fn overlay(path: impl Into<PathBuf>, backing: impl Into<PathBuf>, backing_format: Format) -> Self {
        Self { path: path.into(), format: Format::Qcow2, size: None, backing: Some((backing.into(), backing_format)) }
    }

    /// Of this size, in bytes.
    pub fn size(self, size: u64) -> Self {
        Self { size: Some(size), ..self }
    }

    /// Makes the image; it is on the host's disk when this returns. What was begun is removed after an error.
    pub fn create(&self) -> Result<(), OpenError> {
        let invalid = |reason: String| OpenError::Image { path: self.path.clone(), format: self.format, reason };
        if self.backing.is_some() && self.format == Format::Raw {
            return Err(invalid("a raw image cannot be an overlay: make it qcow2".into()));
        }
        let (size, backing) = self.size_and_backing()?;
        if size == 0 || !size.is_multiple_of(SECTOR) {
            return Err(invalid(format!("its size, {size} bytes, is to be a multiple of {SECTOR} and not 0")));
        }
        self.make(size, backing)
    }

    /// The same for an overlay as large as the qcow2 image below, which may be in use: that is not looked at, but for the size
    /// that its header says. Who uses it may have written anything there; 64 TiB are the most.
    pub fn create_over_used(&self) -> Result<(), OpenError> {
        let below = self.backing.iter().filter(|(_, format)| *format == Format::Qcow2).map(|(path, _)| path).next();
        let size = below.map(|path| size_in_header(path).map_err(|source| host("read", path, source))).transpose()?;
        let good = |size: &u64| *size > 0 && *size <= MOST_OVER_USED && size.is_multiple_of(SECTOR);
        let size = size.filter(good).ok_or_else(|| OpenError::Image {
            path: self.path.clone(),
            format: self.format,
            reason: "what it is to stand on does not say its size as a qcow2 image".into(),
        })?;
        self.create_over_open(size)
    }

    /// Makes an overlay of an image that is open, whose size is given: it is not looked at.
    pub(crate) fn create_over_open(&self, size: u64) -> Result<(), OpenError> {
        let backing = self.backing.as_ref().map(|(path, format)| self.backing_name(path, *format)).transpose()?;
        self.make(size, backing)
    }

    fn size_and_backing(&self) -> Result<(u64, Option<(String, Format)>), OpenError> {
        let Some((path, format)) = &self.backing else { return Ok((self.size.unwrap_or(0), None)) };
        let below = Disk::open(&DiskSpec::new(path).format(*format).read_only())?;
        Ok((self.size.unwrap_or(below.size()), Some(self.backing_name(path, *format)?)))
    }

    fn backing_name(&self, path: &Path, format: Format) -> Result<(String, Format), OpenError> {
        let absolute = path::absolute(path).map_err(|source| host("open", path, source))?;
        let name = absolute.into_os_string().into_string().map_err(|name| OpenError::Image {
            path: self.path.clone(),
            format: self.format,
            reason: format!("the name of its backing file, {name:?}, is not UTF-8: rename that"),
        })?;
        Ok((name, format))
    }

    fn make(&self, size: u64, backing: Option<(String, Format)>) -> Result<(), OpenError> {
        let failed = |source| host("create", &self.path, source);
        let file = File::options().read(true).write(true).create_new(true).open(&self.path).map_err(failed)?;
        self.fill(file, size, backing).map_err(|error| {
            let _ = fs::remove_file(&self.path);
            failed(error)
        })
    }

    fn fill(&self, file: File, size: u64, backing: Option<(String, Format)>) -> io::Result<()> {
        let synced = file.try_clone()?;
        // Nobody else can have it locked yet, and if somebody is as quick as that, it is theirs.
        let file = LockedFile::lock(file, true)?.ok_or(io::ErrorKind::ResourceBusy)?;
        match self.format {
            Format::Raw => file.set_len(size)?,
            Format::Qcow2 => {
                let file = HostFile::new(file, &self.path)?;
                let builder: Qcow2CreateBuilder<HostFile, FormatAccess<HostFile>> = Qcow2::create_builder(file);
                let builder = match backing {
                    Some((name, format)) => builder.backing(name, format.to_string()),
                    None => builder,
                };
                block_on(builder.size(size).create())?;
            }
        }
        synced.sync_all()
    }
}

/// The size of the largest disk below an overlay that is made without a look at it: the tables of a larger one take their
/// time.
const MOST_OVER_USED: u64 = 64 << 40;

/// The disk's size in bytes, as the header of a qcow2 image says it (QEMU's docs/interop/qcow2.rst).
fn size_in_header(path: &Path) -> io::Result<u64> {
    let mut header = [0; 32];
    // Whoever may have put something else there is not followed, nor waited for.
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    File::options().read(true).custom_flags(flags).open(path)?.read_exact(&mut header)?;
    match (&header[..4], header[24..].try_into()) {
        (b"QFI\xfb", Ok(size)) => Ok(u64::from_be_bytes(size)),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "it is no qcow2 image")),
    }
}

/// Makes the image at `path` larger; what is new reads as zeroes. `size` is in bytes, a multiple of 512 and not less than
/// it is now: making it smaller would cut a guest's data off.
pub fn grow(path: &Path, format: Format, size: u64) -> Result<(), OpenError> {
    let disk = Disk::open(&DiskSpec::new(path).format(format))?;
    if size < disk.size() || !size.is_multiple_of(SECTOR) {
        let reason = format!(
            "its size can only grow, to a multiple of {SECTOR} bytes: it is {} and was to be {size}",
            disk.size()
        );
        return Err(OpenError::Image { path: path.to_owned(), format, reason });
    }
    block_on(disk.grow(size)).map_err(|source| host("enlarge", path, source))
}

/// The mode for [`Disk::grow`]: nothing is allocated.
pub(crate) const THIN: PreallocateMode = PreallocateMode::None;
