//! The images that instances stand on: overlays on each other, and on those of other instances whose clones they are.
//!
//! An instance's disk goes on with an overlay where it is frozen, for a snapshot or for clones. Its process does that, and
//! may be killed, and the daemon too: so the record has the overlay's name *before* ([`Boot::next_disk`]), and
//! afterwards the truth is found out. If the overlay is there it is right to go on with it, whatever became of the freeze:
//! one that was not used yet has nothing in it.

use std::{
    collections::HashSet,
    fs, io,
    path::{Path, PathBuf},
};

use purlin_api::{ErrorBody, vm};
use purlin_vmm::storage::{Format, NewImage, open_read_only};

use super::{Entry, Instances, conflict, failed, lock};
use crate::record::{Boot, DISK, MEMORY, Record, SnapshotRecord};

/// The most images that a disk may stand on; storage opens a few more.
const MOST_LAYERS: usize = 60;

impl Instances {
    /// Notes that the disk is about to go on with an overlay; its name.
    pub(super) fn begin_overlay(&self, entry: &Entry) -> Result<PathBuf, ErrorBody> {
        let record = entry.record();
        let boot = boot(&record)?;
        if boot.layers.len() >= MOST_LAYERS {
            let name = &record.name;
            return Err(conflict(format!(
                "the disk of '{name}' stands on {MOST_LAYERS} images of snapshots and clones: delete those of no use"
            )));
        }
        if let Some(disk) = record.machine.disks.iter().find(|disk| !disk.read_only) {
            let (name, path) = (&record.name, disk.path.display());
            return Err(conflict(format!(
                "'{name}' can write '{path}', which is not its own: snapshots and clones have only a machine's own disk"
            )));
        }
        let overlay = boot.overlay_name();
        self.change_boot(entry, |boot| {
            boot.next_disk = Some(overlay.clone());
            boot.overlays += 1;
        })?;
        Ok(overlay)
    }

    /// Finds out whether the disk has gone on with the overlay that it was about to.
    pub(super) async fn settle_disk(&self, entry: &Entry) -> Result<(), ErrorBody> {
        let record = entry.record();
        let Some(Boot { next_disk: Some(overlay), .. }) = &record.boot else { return Ok(()) };
        let path = self.dir_of(&record).join(overlay);
        let said = match entry.vm() {
            Some(vm) => vm.ask().await,
            None => None,
        };
        let is_used = match said {
            Some(said) => said.disks.first().is_some_and(|disk| disk == overlay),
            None => open_read_only(&path, Some(Format::Qcow2)).is_ok(),
        };
        self.change_boot(entry, |boot| {
            if is_used {
                boot.go_on_with(overlay.clone());
            } else {
                boot.next_disk = None;
            }
        })?;
        if !is_used {
            return self.sweep();
        }
        self.to_merge.notify_one();
        Ok(())
    }

    /// Freezes the disk of an instance that does not run.
    pub(super) fn freeze_disk(&self, entry: &Entry) -> Result<(), ErrorBody> {
        let overlay = self.begin_overlay(entry)?;
        let record = entry.record();
        let dir = self.dir_of(&record);
        let made = make_overlay(&dir.join(&overlay), &dir.join(&boot(&record)?.disk), Format::Qcow2, None);
        self.change_boot(entry, |boot| match made {
            Ok(()) => boot.go_on_with(overlay),
            Err(_) => boot.next_disk = None,
        })?;
        self.to_merge.notify_one();
        made
    }

    pub(super) fn change_boot(&self, entry: &Entry, change: impl FnOnce(&mut Boot)) -> Result<(), ErrorBody> {
        self.change(entry, |record| {
            if let Some(boot) = &mut record.boot {
                change(boot);
            }
        })
    }

    /// Removes images and snapshots' files that no instance needs, and instances that are deleted, as far as no clone of
    /// theirs stands on their files.
    pub(super) fn sweep(&self) -> Result<(), ErrorBody> {
        let swept = self.sweep_files();
        self.to_merge.notify_one();
        swept
    }

    /// The same, with nothing to be merged that could not be before.
    pub(super) fn sweep_files(&self) -> Result<(), ErrorBody> {
        let _files = lock(&self.files);
        let entries = self.entries();
        let there: Vec<Record> = entries.iter().map(|entry| entry.record()).collect();
        let needed = there.iter().flat_map(|record| record.files(&self.dir_of(record)));
        let held = entries.iter().zip(&there).flat_map(|(entry, record)| held_files(entry, &self.dir_of(record)));
        let needed: HashSet<PathBuf> = needed.chain(held).collect();
        // What is being made is no reason for a deleted instance to stay.
        let kept: HashSet<PathBuf> = needed.iter().cloned().chain(self.merging()).collect();
        for record in there.iter().filter(|record| record.boot.is_some()) {
            sweep_dir(&self.dir_of(record), &kept, |name| name.starts_with(DISK) || name.starts_with(MEMORY))?;
        }
        self.sweep_bases(&needed)?;
        let mut deleted = lock(&self.deleted);
        let mut stay = Vec::new();
        for record in deleted.drain(..) {
            let dir = self.dir_of(&record);
            if needed.iter().any(|path| path.starts_with(&dir)) {
                sweep_dir(&dir, &kept, |_| true)?;
                stay.push(record);
                continue;
            }
            match fs::remove_dir_all(&dir) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!("cannot remove {}: {error}", dir.display());
                    stay.push(record);
                }
                _ => {
                    for file in [vm::spec_of(&dir), vm::lock_of(&dir)] {
                        // It has never been started, or an earlier attempt came as far as this.
                        let _ = fs::remove_file(file);
                    }
                    self.database.remove::<Record>(&record.id).map_err(failed)?;
                }
            }
        }
        *deleted = stay;
        Ok(())
    }

    /// An image of the store's may be deleted or made anew while instances stand on it: they have names of their own for what
    /// it was, where their processes can only read it.
    pub(super) fn keep_base(&self, image: &Path, id: &str) -> Result<PathBuf, ErrorBody> {
        let base = self.bases.join(format!("{id}.{}", image.extension().unwrap_or_default().to_string_lossy()));
        fs::create_dir_all(&self.bases).map_err(|e| failed(format!("cannot create {}: {e}", self.bases.display())))?;
        match fs::hard_link(image, &base) {
            Ok(()) => Ok(base),
            // Images on another file system than instances: then it must stay.
            Err(error) if error.kind() == io::ErrorKind::CrossesDevices => Ok(image.to_owned()),
            Err(error) => Err(failed(format!("cannot link {} to {}: {error}", image.display(), base.display()))),
        }
    }

    fn sweep_bases(&self, needed: &HashSet<PathBuf>) -> Result<(), ErrorBody> {
        // One of an instance that is being made is in no record yet.
        let being_made: Vec<String> =
            self.entries().iter().map(|e| e.record()).filter(|r| r.boot.is_none()).map(|r| r.id).collect();
        sweep_dir(&self.bases, needed, |name| !being_made.iter().any(|id| name.starts_with(id)))
    }
}

/// Files of snapshots that may be deleted by now.
fn held_files(entry: &Entry, dir: &Path) -> Vec<PathBuf> {
    lock(&entry.held).iter().flat_map(SnapshotRecord::files).map(|path| dir.join(path)).collect()
}

/// What an instance boots; one that is ready has it.
pub(super) fn boot(record: &Record) -> Result<&Boot, ErrorBody> {
    record.boot.as_ref().ok_or_else(|| failed(format!("'{}' has no disk", record.name)))
}

/// A thin image on another one.
pub(super) fn make_overlay(path: &Path, backing: &Path, format: Format, size: Option<u64>) -> Result<(), ErrorBody> {
    let overlay = NewImage::overlay(path, backing.to_owned(), format);
    size.into_iter().fold(overlay, NewImage::size).create().map_err(failed)
}

/// Removes the files of a directory that nobody needs and whose names are such.
fn sweep_dir(dir: &Path, needed: &HashSet<PathBuf>, is_ours: impl Fn(&str) -> bool) -> Result<(), ErrorBody> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(|e| failed(format!("cannot read {}: {e}", dir.display())))?,
    };
    for entry in entries.flatten() {
        let is_ours = entry.file_name().to_str().is_some_and(&is_ours);
        if is_ours && !needed.contains(&entry.path()) {
            fs::remove_file(entry.path())
                .map_err(|e| failed(format!("cannot remove {}: {e}", entry.path().display())))?;
        }
    }
    Ok(())
}
