//! From a [`DiskSpec`] to opened and locked files, one above the other.

use std::{
    collections::HashSet,
    fs::{self, File},
    io,
    os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, qcow2::Qcow2, raw::Raw};

use crate::{
    block_on::block_on,
    error::OpenError,
    fence::{Panicked, fence},
    host_file::{self, HostFile},
    lock::LockedFile,
    qcow2_header::{self, Backing, Header},
    qcow2_tables,
    spec::{DiskSpec, Format, MAX_SERIAL},
};

/// The most images that may be above each other.
pub(crate) const MAX_DEPTH: usize = 64;

/// The unit in which guests see a disk (virtio 1.3, 5.2.5), in bytes.
pub(crate) const SECTOR: u64 = 512;

/// An opened image.
pub(crate) enum Image {
    /// A raw image needs nobody in between.
    Raw(HostFile),
    /// Others are imago's.
    Mapped(FormatAccess<HostFile>),
}

impl Image {
    /// Bytes.
    pub(crate) fn size(&self) -> u64 {
        match self {
            Self::Raw(file) => file.length(),
            Self::Mapped(image) => image.size(),
        }
    }
}

/// The image that a disk's requests go to.
pub(crate) struct Active {
    pub path: PathBuf,
    pub format: Format,
    pub image: Image,
    /// The image's file and its lock.
    pub file: Arc<LockedFile>,
}

/// Opens what `spec` says, and what that stands on.
pub(crate) fn open(spec: &DiskSpec) -> Result<Active, OpenError> {
    check_serial(spec)?;
    let mut chain = Chain { seen: HashSet::new(), top: &spec.path, backing_allowed: spec.backing };
    chain.add(&spec.path)?;
    let file = Arc::new(open_file(&spec.path, !spec.read_only)?);
    let format = format(spec, &file)?;
    let image = match format {
        Format::Raw => Image::Raw(raw_file(file.clone(), &spec.path)?),
        Format::Qcow2 => Image::Mapped(chain.open_qcow2(file.clone(), &spec.path, !spec.read_only)?),
    };
    check_size(&image, &spec.path, format)?;
    Ok(Active { path: spec.path.clone(), format, image, file })
}

/// A qcow2 image that is opened without what it stands on: what it has nothing of reads as zeroes.
pub(crate) struct Alone {
    pub header: Header,
    pub active: Active,
}

/// Opens such an image. A link is none.
pub(crate) fn open_alone(path: &Path, writable: bool) -> Result<Alone, OpenError> {
    let file = Arc::new(open_file_by(path, writable, libc::O_NOFOLLOW)?);
    let header = qcow2_header(&file, path, writable)?;
    let image = Image::Mapped(qcow2(file.clone(), path, &header, writable, None)?);
    check_size(&image, path, Format::Qcow2)?;
    Ok(Alone { header, active: Active { path: path.to_owned(), format: Format::Qcow2, image, file } })
}

/// The format of a disk: what the user says, or what the file's name means.
fn format(spec: &DiskSpec, file: &File) -> Result<Format, OpenError> {
    if let Some(format) = spec.format {
        return Ok(format);
    }
    let path = || spec.path.clone();
    let format = Format::of_name(&spec.path).ok_or_else(|| OpenError::UnknownFormat { path: path() })?;
    let holds_qcow2 = qcow2_header::is_qcow2(file).map_err(|source| host("read", &spec.path, source))?;
    if format == Format::Raw && holds_qcow2 {
        return Err(OpenError::AmbiguousFormat { path: path() });
    }
    Ok(format)
}

fn check_serial(spec: &DiskSpec) -> Result<(), OpenError> {
    match &spec.serial {
        Some(serial) if serial.len() > MAX_SERIAL || !serial.bytes().all(|b| b.is_ascii_graphic()) => {
            Err(OpenError::Serial { serial: serial.escape_debug().to_string() })
        }
        _ => Ok(()),
    }
}

fn check_size(image: &Image, path: &Path, format: Format) -> Result<(), OpenError> {
    let reason = match image.size() {
        0 => "it is empty".to_owned(),
        size if !size.is_multiple_of(SECTOR) => format!(
            "its size, {size} bytes, is no multiple of {SECTOR}: it is cut off, or needs 'truncate -s %{SECTOR}' first"
        ),
        _ => return Ok(()),
    };
    Err(OpenError::Image { path: path.to_owned(), format, reason })
}

/// How long an image may stay in use by a process that is just going: the kernel holds a killed one's files until its
/// io_uring is gone.
const LEAVING: Duration = Duration::from_millis(300);

/// Opens and locks one file.
pub(crate) fn open_file(path: &Path, writable: bool) -> Result<LockedFile, OpenError> {
    open_file_by(path, writable, 0)
}

fn open_file_by(path: &Path, writable: bool, flags: i32) -> Result<LockedFile, OpenError> {
    // Non-blocking, so that a pipe in an image's place does not hang us; for files and disks it means nothing.
    let options = File::options().read(true).write(writable).custom_flags(libc::O_NONBLOCK | flags).open(path);
    let file = options.map_err(|source| host("open", path, source))?;
    let kind = file.metadata().map_err(|source| host("open", path, source))?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(OpenError::NoFile { path: path.to_owned() });
    }
    let start = Instant::now();
    loop {
        let copy = file.try_clone().map_err(|source| host("open", path, source))?;
        match LockedFile::lock(copy, writable) {
            Ok(Some(file)) => return Ok(file),
            Ok(None) if start.elapsed() < LEAVING => thread::sleep(Duration::from_millis(10)),
            Ok(None) => return Err(OpenError::InUse { path: path.to_owned(), writable }),
            Err(source) => return Err(host("lock", path, source)),
        }
    }
}

pub(crate) fn host(what: &'static str, path: &Path, source: io::Error) -> OpenError {
    OpenError::Host { what, path: path.to_owned(), source }
}

fn raw_file(file: Arc<LockedFile>, path: &Path) -> Result<HostFile, OpenError> {
    HostFile::new(file, path).map_err(|source| host("open", path, source))
}

/// The images that have been opened for one disk.
struct Chain<'a> {
    /// Device and inode.
    seen: HashSet<(u64, u64)>,
    top: &'a Path,
    backing_allowed: bool,
}

impl Chain<'_> {
    /// Notes an image; to be done before it is locked, since who is in a loop would wait for itself.
    fn add(&mut self, path: &Path) -> Result<(), OpenError> {
        let metadata = fs::metadata(path).map_err(|source| host("open", path, source))?;
        if !self.seen.insert((metadata.dev(), metadata.ino())) {
            return Err(OpenError::BackingLoop { path: path.to_owned() });
        }
        if self.seen.len() > MAX_DEPTH {
            return Err(OpenError::BackingTooDeep { path: self.top.to_owned(), max: MAX_DEPTH });
        }
        Ok(())
    }

    fn open_qcow2(
        &mut self,
        file: Arc<LockedFile>,
        path: &Path,
        writable: bool,
    ) -> Result<FormatAccess<HostFile>, OpenError> {
        let header = qcow2_header(&file, path, writable)?;
        let backing = header.backing.as_ref().map(|backing| self.open_backing(path, backing)).transpose()?;
        qcow2(file, path, &header, writable, backing)
    }

    fn open_backing(&mut self, overlay: &Path, backing: &Backing) -> Result<FormatAccess<HostFile>, OpenError> {
        let name = || backing.name.clone();
        if !self.backing_allowed {
            return Err(OpenError::BackingRefused { path: overlay.to_owned(), backing: name() });
        }
        let missing_format = || OpenError::BackingFormat { path: overlay.to_owned(), backing: name() };
        let format = backing.format.as_deref().ok_or_else(missing_format)?;
        let format = format.parse::<Format>().map_err(|_| OpenError::Image {
            path: overlay.to_owned(),
            format: Format::Qcow2,
            reason: format!("its backing file '{}' has the format '{format}', which is not supported", backing.name),
        })?;
        let path = backing_path(overlay, &backing.name)?;
        let file =
            self.add(&path).and_then(|()| open_file(&path, false)).map(Arc::new).map_err(|error| match error {
                OpenError::Host { what: "open", path, source } => {
                    OpenError::BackingMissing { path, overlay: overlay.to_owned(), source }
                }
                other => other,
            })?;
        match format {
            Format::Qcow2 => self.open_qcow2(file, &path, false),
            Format::Raw => {
                let raw = block_on(Raw::open_image(raw_file(file, &path)?, false));
                raw.map(FormatAccess::new).map_err(|source| host("open", &path, source))
            }
        }
    }
}

fn broken(path: &Path) -> impl Fn(String) -> OpenError {
    move |reason| OpenError::Image { path: path.to_owned(), format: Format::Qcow2, reason }
}

/// What a qcow2 image says of itself, with its tables checked.
fn qcow2_header(file: &LockedFile, path: &Path, writable: bool) -> Result<Header, OpenError> {
    let length = host_file::length(file).map_err(|source| host("read", path, source))?;
    if length == 0 {
        return Err(broken(path)("it is empty".to_owned()));
    }
    let header = Header::read(file, length).map_err(broken(path))?;
    qcow2_tables::check(&header, file, length, writable).map_err(broken(path))?;
    Ok(header)
}

/// Opens a qcow2 image on what it is to stand on.
fn qcow2(
    file: Arc<LockedFile>,
    path: &Path,
    header: &Header,
    writable: bool,
    backing: Option<FormatAccess<HostFile>>,
) -> Result<FormatAccess<HostFile>, OpenError> {
    let file = raw_file(file, path)?.for_qcow2(header, writable);
    let builder = Qcow2::<HostFile>::builder(file).write(writable).backing(backing).data_file(None);
    match block_on(fence(builder.open(DenyImplicitOpenGate::default()))) {
        Ok(image) => image.map(FormatAccess::new).map_err(|e| broken(path)(e.to_string())),
        Err(Panicked) => Err(broken(path)("it is corrupt: repair it with 'qemu-img check -r all'".to_owned())),
    }
}

/// Where a backing file is: its name is relative to the directory of the image that names it.
pub(crate) fn backing_path(overlay: &Path, name: &str) -> Result<PathBuf, OpenError> {
    // QEMU takes 'json:{…}' and 'protocol:…' too, where the colon comes before any slash.
    let protocol = name.split('/').next().is_some_and(|first| first.contains(':'));
    if protocol || name.contains('\0') {
        return Err(OpenError::Image {
            path: overlay.to_owned(),
            format: Format::Qcow2,
            reason: format!("its backing file '{}' is no file's name", name.escape_debug()),
        });
    }
    Ok(overlay.parent().unwrap_or(Path::new("")).join(name))
}
