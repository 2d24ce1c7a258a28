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

use purlin_api::ErrorBody;
use purlin_vmm::storage::{Format, NewImage, open_read_only};

use super::{Entry, Instances, failed, lock};
use crate::record::{Boot, DISK, MEMORY, Record};

impl Instances {
    /// Notes that the disk is about to go on with an overlay; its name.
    pub(super) fn begin_overlay(&self, entry: &Entry) -> Result<PathBuf, ErrorBody> {
        let overlay = boot(&entry.record())?.overlay_name();
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
        let is_used = match entry.vm() {
            Some(vm) => vm.look().await.disks.first().is_some_and(|disk| disk == overlay),
            None => open_read_only(&path, Some(Format::Qcow2)).is_ok(),
        };
        self.change_boot(entry, |boot| {
            if is_used {
                boot.go_on_with(overlay.clone());
            } else {
                boot.next_disk = None;
            }
        })?;
        if is_used { Ok(()) } else { self.sweep() }
    }

    /// Freezes the disk of an instance that does not run.
    pub(super) fn freeze_disk(&self, entry: &Entry) -> Result<(), ErrorBody> {
        let overlay = self.begin_overlay(entry)?;
        let record = entry.record();
        let dir = self.dir_of(&record);
        let made = make_overlay(&dir.join(&overlay), &dir.join(&boot(&record)?.disk), None);
        self.change_boot(entry, |boot| match made {
            Ok(()) => boot.go_on_with(overlay),
            Err(_) => boot.next_disk = None,
        })?;
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
        let there: Vec<Record> = self.entries().iter().map(|entry| entry.record()).collect();
        let needed: HashSet<PathBuf> = there.iter().flat_map(|record| record.files(&self.dir_of(record))).collect();
        for record in there.iter().filter(|record| record.boot.is_some()) {
            sweep_dir(&self.dir_of(record), &needed, |name| name.starts_with(DISK) || name.starts_with(MEMORY))?;
        }
        let mut deleted = lock(&self.deleted);
        let mut stay = Vec::new();
        for record in deleted.drain(..) {
            let dir = self.dir_of(&record);
            if needed.iter().any(|path| path.starts_with(&dir)) {
                sweep_dir(&dir, &needed, |_| true)?;
                stay.push(record);
                continue;
            }
            match fs::remove_dir_all(&dir) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!("cannot remove {}: {error}", dir.display());
                    stay.push(record);
                }
                _ => self.database.remove_instance(&record.id).map_err(failed)?,
            }
        }
        *deleted = stay;
        Ok(())
    }
}

/// What an instance boots; one that is ready has it.
pub(super) fn boot(record: &Record) -> Result<&Boot, ErrorBody> {
    record.boot.as_ref().ok_or_else(|| failed(format!("'{}' has no disk", record.name)))
}

/// A thin image on another one.
pub(super) fn make_overlay(path: &Path, backing: &Path, size: Option<u64>) -> Result<(), ErrorBody> {
    let overlay = NewImage::overlay(path, backing.to_owned(), Format::Qcow2);
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
