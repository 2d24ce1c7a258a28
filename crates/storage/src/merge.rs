//! Two overlays, one on the other, made one: a new image with the content of both, on what the lower one stands on.
//!
//! Neither is written, so whoever reads them goes on. The new image may take the upper one's place: a disk that stands on
//! that is the same with it.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::{
    create::NewImage,
    disk::{Disk, Own},
    error::{IoError, OpenError},
    open::{self, Alone, host},
    spec::Format,
};

/// How much is copied at a time, in bytes.
const CHUNK: u64 = 1 << 20;

/// Why two images cannot be made one.
#[derive(Debug, thiserror::Error)]
pub enum MergeError {
    /// One of them cannot be opened, or the new one not be made.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A read or a write failed.
    #[error("cannot merge '{}': {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// The host's reason.
        source: IoError,
    },
    /// An image does not stand on what it should.
    #[error("'{}' does not stand on '{}'", path.display(), below.display())]
    Other {
        /// The image.
        path: PathBuf,
        /// What it should stand on.
        below: PathBuf,
    },
    /// They are of different kinds.
    #[error("'{}' and '{}' have different sizes or clusters", .0.display(), .1.display())]
    Unlike(PathBuf, PathBuf),
    /// Nobody wants it any more.
    #[error("the merge was given up")]
    GivenUp,
}

/// Two overlays to be made one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Merge {
    /// The overlay on the other one.
    pub upper: PathBuf,
    /// The other one.
    pub lower: PathBuf,
    /// What that stands on.
    pub below: PathBuf,
}

impl Merge {
    /// Makes the image of both at `target`, where nothing must be yet; it is on the host's disk when this returns. What was
    /// begun is removed after an error. `is_wanted` is asked as it goes on.
    ///
    /// What the images say that they stand on is compared, and nothing else is opened by it: whoever can write them cannot
    /// have other files read.
    pub fn run(&self, target: &Path, is_wanted: &dyn Fn() -> bool) -> Result<(), MergeError> {
        let upper = open::open_alone(&self.upper, false)?;
        check_below(&self.upper, &upper, &self.lower)?;
        let lower = open::open_alone(&self.lower, false)?;
        let format = check_below(&self.lower, &lower, &self.below)?;
        let shape = |image: &Alone| (image.header.virtual_size, image.header.cluster_size);
        if shape(&upper) != shape(&lower) {
            return Err(MergeError::Unlike(self.upper.clone(), self.lower.clone()));
        }
        let size = upper.header.virtual_size;
        NewImage::overlay(target, &self.below, format).create_over_open(size)?;
        let filled = open::open_alone(target, true).map_err(MergeError::from).and_then(|new| {
            if shape(&new) != shape(&upper) {
                return Err(MergeError::Unlike(target.to_owned(), self.upper.clone()));
            }
            let [new, upper, lower] = [new, upper, lower].map(|image| Disk::of(image.active, false));
            Copy { new: &new, path: target, is_wanted }.all(&upper, &lower)
        });
        filled.inspect_err(|_| {
            let _ = fs::remove_file(target);
        })
    }

    /// Whether the upper image stands on what the lower one did: somebody has put a merged one in its place.
    pub fn is_done(&self) -> Result<bool, MergeError> {
        let upper = open::open_alone(&self.upper, false)?;
        match check_below(&self.upper, &upper, &self.below) {
            Ok(_) => Ok(true),
            Err(MergeError::Other { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// That an image stands on `below`; the format of that, as the image has it.
fn check_below(path: &Path, image: &Alone, below: &Path) -> Result<Format, MergeError> {
    let other = || MergeError::Other { path: path.to_owned(), below: below.to_owned() };
    let backing = image.header.backing.as_ref().ok_or_else(other)?;
    let named = open::backing_path(path, &backing.name)?;
    // Directories may have several names; files' own names are compared, not what they lead to.
    let place = |path: &Path| -> Result<_, MergeError> {
        let dir = path.parent().unwrap_or(Path::new("/"));
        let dir = dir.canonicalize().map_err(|source| host("open", dir, source))?;
        Ok((dir, path.file_name().map(ToOwned::to_owned)))
    };
    if place(&named)? != place(below)? {
        return Err(other());
    }
    backing.format.as_deref().and_then(|format| format.parse().ok()).ok_or_else(other)
}

/// The new image, and what it is made of.
struct Copy<'a> {
    new: &'a Disk,
    path: &'a Path,
    is_wanted: &'a dyn Fn() -> bool,
}

impl Copy<'_> {
    fn all(&self, upper: &Disk, lower: &Disk) -> Result<(), MergeError> {
        self.range(&[upper, lower], 0, self.new.size())?;
        self.new.request::<()>(crate::Request::Flush).map_err(self.failed())
    }

    /// What the first of the images has; what it has nothing of, the next one may.
    fn range(&self, images: &[&Disk], mut offset: u64, end: u64) -> Result<(), MergeError> {
        let [image, rest @ ..] = images else { return Ok(()) };
        while offset < end {
            if !(self.is_wanted)() {
                return Err(MergeError::GivenUp);
            }
            let (own, length) = image.own(offset, end - offset).map_err(self.failed())?;
            match own {
                Own::Nothing => self.range(rest, offset, offset + length)?,
                Own::Zeroes => {
                    let zeroes = crate::Request::WriteZeroes { offset, length, unmap: false };
                    self.new.request::<()>(zeroes).map_err(self.failed())?;
                }
                Own::Data => self.data(image, offset, offset + length)?,
            }
            offset += length;
        }
        Ok(())
    }

    fn data(&self, image: &Disk, mut offset: u64, end: u64) -> Result<(), MergeError> {
        let mut buffer = vec![0; CHUNK.min(end - offset) as usize];
        while offset < end {
            let buffer = &mut buffer[..CHUNK.min(end - offset) as usize];
            let copied = image.read_at(buffer, offset).and_then(|()| self.new.write_at(buffer, offset));
            copied.map_err(self.failed())?;
            offset += buffer.len() as u64;
        }
        Ok(())
    }

    fn failed(&self) -> impl Fn(IoError) -> MergeError {
        let path = self.path.to_owned();
        move |source| MergeError::Io { path: path.clone(), source }
    }
}
