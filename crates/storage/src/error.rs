//! Why a disk cannot be opened, and why a request failed.

use std::{io, path::PathBuf};

use rustix::io::Errno;

use crate::spec::Format;

/// Why an image cannot be opened, made or read: one line that names the file and says what to do.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The host refused it.
    #[error("cannot {what} '{}': {source}", path.display())]
    Host {
        /// `open`, `lock` …
        what: &'static str,
        /// The image.
        path: PathBuf,
        /// The host's reason.
        source: io::Error,
    },
    /// It is a directory, a pipe, a terminal.
    #[error("'{}' is no disk image: it is neither a regular file nor a block device", path.display())]
    NoFile {
        /// The image.
        path: PathBuf,
    },
    /// Somebody writes it, or somebody uses it that must not see writes.
    #[error("'{}' is in use by another process: stop what uses it, or {}", path.display(), in_use_advice(*.writable))]
    InUse {
        /// The image.
        path: PathBuf,
        /// Whether it was to be opened for writing.
        writable: bool,
    },
    /// Neither the user nor the file's name says a format.
    #[error(
        "the format of '{}' is not known from its name: say format=raw or format=qcow2 ('purlin image import' converts \
         others)", path.display()
    )]
    UnknownFormat {
        /// The image.
        path: PathBuf,
    },
    /// A raw disk by its name, whose content is a qcow2 image.
    #[error(
        "'{}' is raw by its name but holds a qcow2 image: say format=qcow2, or format=raw if the guest itself wrote \
         that there", path.display()
    )]
    AmbiguousFormat {
        /// The image.
        path: PathBuf,
    },
    /// A serial number that no device can show.
    #[error("the serial number '{serial}' does not fit: it is up to 20 printable ASCII characters without spaces")]
    Serial {
        /// What the user asked for.
        serial: String,
    },
    /// Empty, truncated, corrupt, or with a feature that is not known.
    #[error("'{}' is no usable {format} image: {reason}", path.display())]
    Image {
        /// The image.
        path: PathBuf,
        /// The format that it was opened as.
        format: Format,
        /// What is wrong with it, and what to do.
        reason: String,
    },
    /// An image names a backing file, and was opened with
    /// [`DiskSpec::backing`](crate::DiskSpec::backing) unset.
    #[error(
        "'{}' depends on another file, '{backing}', and such an image is not taken from elsewhere: \
         flatten it with 'qemu-img convert -O qcow2' where it was made", path.display()
    )]
    BackingRefused {
        /// The image.
        path: PathBuf,
        /// What it names.
        backing: String,
    },
    /// The file below an image is not there.
    #[error(
        "'{}', the backing file of '{}', cannot be opened: {source}; put it back, or tell the overlay where it is with \
         'qemu-img rebase -u'", path.display(), overlay.display()
    )]
    BackingMissing {
        /// The backing file.
        path: PathBuf,
        /// The image above it.
        overlay: PathBuf,
        /// The host's reason.
        source: io::Error,
    },
    /// An image names a file below it without its format.
    #[error(
        "'{}' does not say which format its backing file '{backing}' has: \
         say it with 'qemu-img rebase -u -F raw|qcow2 -b {backing} {}'", path.display(), path.display()
    )]
    BackingFormat {
        /// The image.
        path: PathBuf,
        /// What it names.
        backing: String,
    },
    /// Backing files that come back to where they started.
    #[error("'{}' is its own backing file, through a loop: one of the images was rebased wrongly", path.display())]
    BackingLoop {
        /// The image that comes up twice.
        path: PathBuf,
    },
    /// More images above each other than anybody can want.
    #[error(
        "'{}' stands on more than {max} images: flatten some of them with 'qemu-img convert' or 'qemu-img commit'",
        path.display()
    )]
    BackingTooDeep {
        /// The uppermost image.
        path: PathBuf,
        /// The limit.
        max: usize,
    },
}

fn in_use_advice(writable: bool) -> &'static str {
    if writable { "run on an overlay of it" } else { "copy it first" }
}

/// Why a request failed. Everything else on the disk stays as it was; the same request may be made again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", words(*errno))]
pub struct IoError {
    errno: Errno,
}

/// `No space left on device`, without the number, which tells the user nothing.
fn words(errno: Errno) -> String {
    let text = errno.to_string();
    text.split(" (os error").next().unwrap_or_default().to_owned()
}

impl IoError {
    pub(crate) const IO: Self = Self { errno: Errno::IO };
    pub(crate) const INVALID: Self = Self { errno: Errno::INVAL };
    pub(crate) const READ_ONLY: Self = Self { errno: Errno::ROFS };

    /// The host's error number: ENOSPC, EIO …
    pub fn errno(self) -> Errno {
        self.errno
    }

    /// Whether the host ran out of room (ENOSPC, or EDQUOT): a user can make some and try again.
    pub fn is_out_of_space(self) -> bool {
        matches!(self.errno, Errno::NOSPC | Errno::DQUOT)
    }

    /// Whether it is for want of something on the host's side, rather than for what was asked: outside of the disk, or
    /// against its mode.
    pub fn is_the_hosts(self) -> bool {
        !matches!(self.errno, Errno::INVAL | Errno::ROFS)
    }
}

impl From<Errno> for IoError {
    fn from(errno: Errno) -> Self {
        Self { errno }
    }
}

impl From<io::Error> for IoError {
    /// The error number, or the one that the kind stands for where a library has put words round it.
    fn from(error: io::Error) -> Self {
        let errno = Errno::from_io_error(&error).unwrap_or(match error.kind() {
            io::ErrorKind::StorageFull => Errno::NOSPC,
            io::ErrorKind::QuotaExceeded => Errno::DQUOT,
            io::ErrorKind::FileTooLarge => Errno::FBIG,
            io::ErrorKind::ReadOnlyFilesystem => Errno::ROFS,
            io::ErrorKind::OutOfMemory => Errno::NOMEM,
            io::ErrorKind::Unsupported => Errno::OPNOTSUPP,
            _ => Errno::IO,
        });
        Self { errno }
    }
}
