//! An opened disk and what can be asked of it.

use std::{
    fmt, io,
    ops::Range,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use arc_swap::ArcSwap;
use imago::{
    FormatAccess, Mapping,
    io_buffers::{IoVector, IoVectorMut},
};
use tokio::sync::RwLock;
use vm_memory::{VolatileSlice, bitmap::BitmapSlice};

use crate::{
    block_on::block_on,
    create::THIN,
    error::{IoError, OpenError},
    fence::{Panicked, fence},
    freeze::Unsynced,
    host_file::HostFile,
    limit::Limiter,
    open::{self, Active, Image, SECTOR},
    spec::{DiskSpec, Format},
};

/// The most bytes of one zeroing that are written at a time where an image cannot note zeroes.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// An opened, locked disk. Requests go through a [`Queue`](crate::Queue); there may be several, on threads of their own.
pub struct Disk {
    serial: String,
    size: u64,
    read_only: bool,
    /// Another one after a freeze.
    pub(crate) active: ArcSwap<Active>,
    /// Held for reading by requests that may have looked up where a cluster is, for writing by those that move or free
    /// clusters. Raw images have none.
    pub(crate) mappings: RwLock<()>,
    limiter: Option<Mutex<Limiter>>,
    /// Set when the image's tables in memory may be in any state: nothing is read or written any more.
    failed: AtomicBool,
    /// Images that were frozen, and are not on the host's disk yet.
    pub(crate) frozen: Unsynced,
}

/// One request. Offsets and lengths are in bytes, and what is outside the disk is refused with EINVAL.
///
/// `'m` is how long guest memory lives; buffers are used in place.
#[derive(Debug)]
pub enum Request<'m, B: BitmapSlice = ()> {
    /// Fills the buffers, in order. When it is done, well or not, all of them are marked dirty.
    Read {
        /// Where on the disk.
        offset: u64,
        /// Where to.
        buffers: Vec<VolatileSlice<'m, B>>,
    },
    /// Writes the buffers, in order. It is stable after the next [`Request::Flush`] only.
    Write {
        /// Where on the disk.
        offset: u64,
        /// Where from.
        buffers: Vec<VolatileSlice<'m, B>>,
    },
    /// What was written by requests that are done is on the host's disk when this is done.
    Flush,
    /// The guest has no use for the range any more. It reads as zeroes or as before; the host gets room back where it
    /// can.
    Discard {
        /// Where on the disk.
        offset: u64,
        /// Bytes.
        length: u64,
    },
    /// The range reads as zeroes.
    WriteZeroes {
        /// Where on the disk.
        offset: u64,
        /// Bytes.
        length: u64,
        /// Whether the host may take the room back, so that a later write can fail for want of it.
        unmap: bool,
    },
}

impl<B: BitmapSlice> Request<'_, B> {
    /// Bytes that are moved.
    pub(crate) fn transferred(&self) -> u64 {
        match self {
            Self::Read { buffers, .. } | Self::Write { buffers, .. } => buffers.iter().map(|b| b.len() as u64).sum(),
            _ => 0,
        }
    }

    /// Offset and length of what is touched.
    fn range(&self) -> (u64, u64) {
        match self {
            Self::Read { offset, .. } | Self::Write { offset, .. } => (*offset, self.transferred()),
            Self::Flush => (0, 0),
            Self::Discard { offset, length } | Self::WriteZeroes { offset, length, .. } => (*offset, *length),
        }
    }

    fn modifies(&self) -> bool {
        matches!(self, Self::Write { .. } | Self::Discard { .. } | Self::WriteZeroes { .. })
    }
}

/// What an image itself has of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Own {
    /// Content.
    Data,
    /// The word that it reads as zeroes.
    Zeroes,
    /// Nothing: it reads as what is below.
    Nothing,
}

impl Disk {
    /// Opens the disk and locks its image and those below it, until the last handle is gone.
    pub fn open(spec: &DiskSpec) -> Result<Arc<Self>, OpenError> {
        let active = open::open(spec)?;
        let limiter = (!spec.limits.is_unlimited()).then(|| Mutex::new(Limiter::new(spec.limits, Instant::now())));
        let mut disk = Self::of(active, spec.read_only);
        (disk.serial, disk.limiter) = (spec.serial.clone().unwrap_or_default(), limiter);
        Ok(Arc::new(disk))
    }

    /// The disk of an image that is open.
    pub(crate) fn of(active: Active, read_only: bool) -> Self {
        Self {
            serial: String::new(),
            size: active.image.size(),
            read_only,
            active: ArcSwap::from_pointee(active),
            mappings: RwLock::new(()),
            limiter: None,
            failed: AtomicBool::new(false),
            frozen: Unsynced::default(),
        }
    }

    /// The image that is written: the one that was opened, or after a freeze the overlay.
    pub fn path(&self) -> PathBuf {
        self.active.load().path.clone()
    }

    /// The format of the image at [`Disk::path`].
    pub fn format(&self) -> Format {
        self.active.load().format
    }

    /// Bytes, a multiple of [`Disk::block_size`].
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The logical block size in bytes: 512.
    pub fn block_size(&self) -> u64 {
        SECTOR
    }

    /// Whether requests that modify it are refused (with EROFS).
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// The serial number, up to 20 characters; empty if the user gave none.
    pub fn serial(&self) -> &str {
        &self.serial
    }

    /// Fills `buffer` from `offset`, at once, on this thread, whatever the limits.
    ///
    /// This and the other methods that do something at once are for threads that have nothing in flight in a queue of
    /// the same disk: they may wait for what is, and it would wait for them.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), IoError> {
        let buffers = vec![VolatileSlice::from(buffer)];
        block_on(self.perform(Request::Read { offset, buffers }))
    }

    /// Writes `data` at `offset`, at once, on this thread, whatever the limits.
    pub fn write_at(&self, data: &[u8], offset: u64) -> Result<(), IoError> {
        self.check(offset, data.len() as u64, true)?;
        // Not by a request, whose buffers would have to be mutable.
        match block_on(fence(self.write(IoVector::from(data), offset))) {
            Ok(written) => Ok(written?),
            Err(Panicked) => Err(self.fail()),
        }
    }

    /// Does `request` at once, on this thread, whatever the limits.
    pub fn request<B: BitmapSlice>(&self, request: Request<'_, B>) -> Result<(), IoError> {
        block_on(self.perform(request))
    }

    /// The next range from `offset` on that may hold something else than zeroes, `None` if there is none.
    pub fn next_data(&self, offset: u64) -> Result<Option<Range<u64>>, IoError> {
        Ok(match &self.active.load_full().image {
            Image::Raw(file) => file.next_data(offset)?,
            Image::Mapped(image) => block_on(self.next_mapped(image, offset))?,
        })
    }

    async fn next_mapped(&self, image: &FormatAccess<HostFile>, mut offset: u64) -> io::Result<Option<Range<u64>>> {
        let _stay = self.mappings.read().await;
        while offset < self.size {
            let (mapping, length) = image.get_mapping(offset, self.size - offset).await?;
            if length == 0 {
                break;
            }
            if !matches!(mapping, Mapping::Zero { .. } | Mapping::Eof { .. }) {
                return Ok(Some(offset..offset + length));
            }
            offset += length;
        }
        Ok(None)
    }

    /// What an image that was opened without those below it has from `offset` on, and of how many bytes of `length` that is so.
    pub(crate) fn own(&self, offset: u64, length: u64) -> Result<(Own, u64), IoError> {
        let active = self.active.load_full();
        let Image::Mapped(image) = &active.image else { return Ok((Own::Data, length)) };
        let mapping = block_on(fence(image.get_mapping(offset, length))).unwrap_or_else(|Panicked| {
            self.fail();
            Err(io::ErrorKind::InvalidData.into())
        });
        Ok(match mapping? {
            // It would go on for ever.
            (_, 0) => return Err(IoError::IO),
            (Mapping::Zero { explicit: true, .. }, length) => (Own::Zeroes, length),
            (Mapping::Zero { .. }, length) => (Own::Nothing, length),
            (_, length) => (Own::Data, length),
        })
    }

    /// Makes the image larger. The disk's size as others see it stays: it is for tools.
    pub(crate) async fn grow(&self, size: u64) -> io::Result<()> {
        match &self.active.load_full().image {
            Image::Raw(file) => file.file().set_len(size)?,
            Image::Mapped(image) => image.resize_grow(size, THIN).await?,
        }
        self.flush().await
    }

    pub(crate) fn limiter(&self) -> Option<std::sync::MutexGuard<'_, Limiter>> {
        self.limiter.as_ref().map(|limiter| limiter.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) async fn perform<B: BitmapSlice>(&self, request: Request<'_, B>) -> Result<(), IoError> {
        let (offset, length) = request.range();
        self.check(offset, length, request.modifies())?;
        fence(self.perform_checked(request)).await.unwrap_or_else(|Panicked| Err(self.fail()))
    }

    /// Nothing is read or written from here on.
    pub(crate) fn fail(&self) -> IoError {
        tracing::error!("'{}' has failed: its tables are corrupt", self.path().display());
        self.failed.store(true, Ordering::Release);
        IoError::IO
    }

    async fn perform_checked<B: BitmapSlice>(&self, request: Request<'_, B>) -> Result<(), IoError> {
        match request {
            Request::Read { offset, mut buffers } => {
                buffers.retain(|buffer| !buffer.is_empty()); // imago knows no empty ones
                // The guard marks the buffers dirty when it goes, so after the last byte is there.
                let (vector, _mark_dirty) = IoVectorMut::from_volatile_slice(buffers.as_slice());
                self.read(vector, offset).await?;
            }
            Request::Write { offset, mut buffers } => {
                buffers.retain(|buffer| !buffer.is_empty());
                let (vector, _guard) = IoVector::from_volatile_slice(buffers.as_slice());
                self.write(vector, offset).await?;
            }
            Request::Flush => self.flush().await?,
            Request::Discard { offset, length } => self.discard(offset, length).await?,
            Request::WriteZeroes { offset, length, unmap } => self.write_zeroes(offset, length, unmap).await?,
        }
        Ok(())
    }

    fn check(&self, offset: u64, length: u64, modifies: bool) -> Result<(), IoError> {
        if offset.checked_add(length).is_none_or(|end| end > self.size) {
            return Err(IoError::INVALID);
        }
        if modifies && self.read_only {
            return Err(IoError::READ_ONLY);
        }
        if self.failed.load(Ordering::Acquire) {
            return Err(IoError::IO);
        }
        Ok(())
    }

    async fn read(&self, buffers: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        match &self.active.load_full().image {
            Image::Raw(file) => file.read(buffers, offset).await,
            Image::Mapped(image) => {
                let _stay = self.mappings.read().await;
                image.readv(buffers, offset).await
            }
        }
    }

    async fn write(&self, buffers: IoVector<'_>, offset: u64) -> io::Result<()> {
        match &self.active.load_full().image {
            Image::Raw(file) => file.write(buffers, offset).await,
            Image::Mapped(image) => {
                let _stay = self.mappings.read().await;
                image.writev(buffers, offset).await
            }
        }
    }

    async fn flush(&self) -> io::Result<()> {
        if self.read_only {
            return Ok(());
        }
        self.frozen.sync()?;
        match &self.active.load_full().image {
            Image::Raw(file) => file.sync().await,
            Image::Mapped(image) => {
                image.flush().await?; // tables that are in memory only
                image.sync().await
            }
        }
    }

    async fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        let discarded = match &self.active.load_full().image {
            Image::Raw(file) => file.punch_hole(offset, length),
            Image::Mapped(image) => {
                let _move = self.mappings.write().await;
                // SAFETY: nobody else has a mapping: who looks one up holds `mappings`.
                unsafe { image.discard_to_any_unsafe(offset, length) }.await
            }
        };
        // A discard is advice: who cannot follow it does nothing.
        if_unsupported(discarded, || Ok(()))
    }

    async fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> io::Result<()> {
        match &self.active.load_full().image {
            Image::Raw(file) if unmap => match file.punch_hole(offset, length) {
                Err(e) if is_unsupported(&e) => file.zero(offset, length).await,
                other => other,
            },
            Image::Raw(file) => file.zero(offset, length).await,
            Image::Mapped(image) => {
                let zeroed = {
                    let _move = self.mappings.write().await;
                    if unmap {
                        // SAFETY: nobody else has a mapping: who looks one up holds `mappings`.
                        unsafe { image.discard_to_zero_unsafe(offset, length) }.await
                    } else {
                        image.write_zeroes(offset, length).await
                    }
                };
                match zeroed {
                    // qcow2 version 2 cannot note zeroes.
                    Err(e) if is_unsupported(&e) => self.write_out_zeroes(offset, offset + length).await,
                    other => other,
                }
            }
        }
    }

    async fn write_out_zeroes(&self, mut offset: u64, end: u64) -> io::Result<()> {
        while offset < end {
            let length = (end - offset).min(ZEROES.len() as u64);
            self.write(IoVector::from(&ZEROES[..length as usize]), offset).await?;
            offset += length;
        }
        Ok(())
    }
}

fn is_unsupported(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::Unsupported
}

fn if_unsupported(result: io::Result<()>, otherwise: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if is_unsupported(&error) => otherwise(),
        other => other,
    }
}

impl Drop for Disk {
    /// Writes what imago still has in memory.
    fn drop(&mut self) {
        // Not what a failed image has in memory.
        if let Err(error) = self.request::<()>(Request::Flush) {
            tracing::error!("cannot write all of '{}': {error}", self.path().display());
        }
    }
}

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Disk").field("path", &self.path()).field("size", &self.size).finish_non_exhaustive()
    }
}
