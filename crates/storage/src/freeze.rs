//! A disk frozen at one moment: its image stays as it is, and the disk goes on with an overlay of it.
//!
//! What takes long comes before or after the moment. The overlay is made, and synced, beforehand ([`Disk::overlay`]). At
//! the moment itself ([`Disk::switch`]) what is in memory of the image's tables is written, its lock becomes a reader's, and
//! the overlay is opened. The image is brought onto the host's disk later ([`Disk::sync_frozen`]), at the latest by the
//! guest's next flush: that promises it of all that was written, also before the freeze.

use std::{
    fs,
    os::fd::AsFd,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use rustix::{fs::fdatasync, io::Errno};

use crate::{
    block_on::block_on,
    create::NewImage,
    disk::Disk,
    error::{IoError, OpenError},
    fence::{Panicked, fence},
    lock::LockedFile,
    open::{self, Active, Image, host},
    spec::{DiskSpec, Format},
};

/// An overlay that is made and not in use. Its drop removes it.
#[derive(Debug)]
pub struct Overlay {
    path: PathBuf,
    used: bool,
}

impl Drop for Overlay {
    fn drop(&mut self) {
        if !self.used {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// An image that does not change any more: it may be opened for reading, and be the backing file of others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FrozenDisk {
    /// Where it is.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
}

/// A disk that is about to go on with an overlay. Dropped, it goes on as it was.
pub struct Switch<'d> {
    disk: &'d Disk,
    old: Arc<Active>,
    /// `None` once it is in use.
    new: Option<(Active, Overlay)>,
}

impl Disk {
    /// Makes an overlay for the disk to go on with at `path`, where nothing must be yet. The machine may run.
    pub fn overlay(&self, path: &Path) -> Result<Overlay, OpenError> {
        if self.read_only() {
            let reason = "it is read-only, and stays as it is anyway".to_owned();
            return Err(OpenError::Image { path: self.path(), format: self.format(), reason });
        }
        NewImage::overlay(path, self.path(), self.format()).create_over_open(self.size())?;
        Ok(Overlay { path: path.to_owned(), used: false })
    }

    /// Begins a freeze: the image stays as it is from here on. The machine stands still, and no queue has anything in
    /// flight, until the switch is made or dropped.
    pub fn switch(&self, overlay: Overlay) -> Result<Switch<'_>, OpenError> {
        let old = self.active.load_full();
        let failed = |source| host("write", &old.path, source);
        self.write_tables(&old).map_err(failed)?;
        old.file.stop_writing().map_err(|source| host("lock", &old.path, source))?;
        // From here on a drop takes the lock again.
        let mut switch = Switch { disk: self, old, new: None };
        let spec = DiskSpec::new(&overlay.path).format(Format::Qcow2);
        switch.new = Some((open::open(&spec)?, overlay));
        Ok(switch)
    }

    /// Brings images that were frozen onto the host's disk. The machine may run.
    pub fn sync_frozen(&self) -> Result<(), IoError> {
        Ok(self.frozen.sync()?)
    }

    fn write_tables(&self, active: &Active) -> std::io::Result<()> {
        let Image::Mapped(image) = &active.image else { return Ok(()) };
        let flushed = block_on(async {
            let _nobody = self.mappings.write().await;
            fence(image.flush()).await
        });
        flushed.unwrap_or_else(|Panicked| {
            self.fail();
            Err(Errno::IO.into())
        })
    }
}

impl Switch<'_> {
    /// The disk goes on with the overlay. Returns what it was.
    pub fn make(mut self) -> FrozenDisk {
        if let Some((active, mut overlay)) = self.new.take() {
            overlay.used = true;
            self.disk.frozen.add(self.old.file.clone());
            self.disk.active.store(Arc::new(active));
        }
        FrozenDisk { path: self.old.path.clone(), format: self.old.format }
    }
}

impl Drop for Switch<'_> {
    fn drop(&mut self) {
        if !Arc::ptr_eq(&self.old, &self.disk.active.load()) {
            return;
        }
        // The overlay's lock on the image goes first.
        self.new = None;
        if !self.old.file.write_again().is_ok_and(|locked| locked) {
            tracing::error!("'{}' was opened by another process in between", self.old.path.display());
            self.disk.fail();
        }
    }
}

/// Files with content that the host's disk may not have yet.
#[derive(Default)]
pub(crate) struct Unsynced {
    any: AtomicBool,
    files: Mutex<Files>,
}

#[derive(Default)]
struct Files {
    waiting: Vec<Arc<LockedFile>>,
    /// After a failed fdatasync the next one would say that all is well (see `HostFile`): it is never asked again.
    failed: Option<Errno>,
}

impl Unsynced {
    fn add(&self, file: Arc<LockedFile>) {
        self.files.lock().unwrap_or_else(PoisonError::into_inner).waiting.push(file);
        self.any.store(true, Ordering::Release);
    }

    /// When this returns the host's disk has all of them.
    pub fn sync(&self) -> Result<(), Errno> {
        if !self.any.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        while files.failed.is_none()
            && let Some(file) = files.waiting.pop()
        {
            files.failed = rustix::io::retry_on_intr(|| fdatasync(file.as_fd())).err();
        }
        match files.failed {
            Some(errno) => Err(errno),
            None => {
                self.any.store(false, Ordering::Release);
                Ok(())
            }
        }
    }
}
