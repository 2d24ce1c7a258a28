//! Snapshots of instances: taken, gone back to, and deleted.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use purlin_api::{
    Engine, ErrorBody, Machine, NewSnapshot, Operation, Reason, Snapshot, check_name,
    vm::{self, TakeSnapshot},
};
use purlin_vmm::{check_engine, engines, setup, snapshots::Chain, storage::Format};

use super::{
    Entry, Instances, conflict,
    disks::{boot, make_overlay},
    failed, lock, ready,
};
use crate::{
    events::now_ms,
    record::{MEMORY, Record, SnapshotRecord},
};

/// The disk that a machine is about to go back to.
const NEW_DISK: &str = "new.qcow2";
/// So many files of deleted snapshots' memory may be needed by a new one; where there are more, it stands on none, so that
/// they can go with those that stand on them.
const MOST_DEAD: usize = 8;

impl Instances {
    /// The snapshots of an instance, in the order in which they were taken.
    pub fn snapshots(&self, name: &str) -> Result<Vec<Snapshot>, ErrorBody> {
        Ok(self.get(name)?.record().snapshots.into_iter().map(|snapshot| snapshot.shown).collect())
    }

    /// Begins to take a snapshot.
    pub fn take_snapshot(self: &Arc<Self>, name: &str, new: NewSnapshot) -> Result<Operation, ErrorBody> {
        check_name(&new.name).map_err(|e| ErrorBody::new(Reason::BadRequest, e))?;
        let entry = self.get(name)?;
        check_free(&entry.record(), &new.name)?;
        let instances = self.clone();
        Ok(self.operations.begin(format!("snapshot {name}"), name, |_| async move {
            let _busy = entry.busy.lock().await;
            check_free(&entry.record(), &new.name)?;
            // It may stand on any of them.
            let held = instances.hold(&entry, |record| Ok(record.snapshots.clone()))?;
            let taken = instances.take(&entry, new.name).await;
            drop(held);
            instances.sweep().and(taken)
        }))
    }

    /// Keeps the files of snapshots until the value is dropped. Its instance is busy.
    fn hold<'a>(
        &self,
        entry: &'a Entry,
        which: impl FnOnce(&Record) -> Result<Vec<SnapshotRecord>, ErrorBody>,
    ) -> Result<Held<'a>, ErrorBody> {
        // Who has deleted one since has not looked for superfluous files yet.
        let _files = lock(&self.files);
        *lock(&entry.held) = which(&entry.record())?;
        Ok(Held(entry))
    }

    async fn take(&self, entry: &Entry, name: String) -> Result<(), ErrorBody> {
        let before = entry.record();
        let shown = Snapshot { name, created: now_ms() / 1000, running: false, bytes: 0, pause_us: 0 };
        let (shown, memory) = if entry.vm().is_some() {
            self.take_running(entry, shown).await?
        } else {
            self.freeze_disk(entry)?;
            (shown, Vec::new())
        };
        let now = entry.record();
        // What was on top is what is below now.
        let [disk, layers @ ..] = boot(&now)?.layers.as_slice() else { return Err(failed("the disk was not frozen")) };
        let snapshot =
            SnapshotRecord { shown, disk: disk.clone(), layers: layers.to_vec(), memory, machine: before.machine };
        self.change(entry, |record| {
            record.next_memory = None;
            record.snapshots.push(snapshot);
        })
    }

    async fn take_running(&self, entry: &Entry, shown: Snapshot) -> Result<(Snapshot, Vec<PathBuf>), ErrorBody> {
        let vm = entry.running_vm()?;
        let file = PathBuf::from(format!("{MEMORY}-{}.snapshot", uuid::Uuid::new_v4()));
        self.change(entry, |record| record.next_memory = Some(file.clone()))?;
        let overlay = self.begin_overlay(entry)?;
        let whole = dead_files(&entry.record().snapshots) > MOST_DEAD;
        let taken = vm.take_snapshot(&TakeSnapshot { file: file.clone(), overlay, whole }).await;
        self.settle_disk(entry).await?;
        let taken = match taken {
            Ok(taken) => taken,
            Err(error) => {
                self.change(entry, |record| record.next_memory = None)?;
                self.sweep()?;
                return Err(error);
            }
        };
        let record = entry.record();
        // By what the files say: a snapshot that was finished while there was no daemon is in no record.
        let path = self.dir_of(&record).join(&file);
        let chain = tokio::task::spawn_blocking(move || Chain::open(&path)).await.map_err(failed)?.map_err(failed)?;
        let names = chain.snapshots().iter().filter_map(|snapshot| snapshot.path().file_name()).map(PathBuf::from);
        let memory = files_of(file, names);
        Ok((Snapshot { running: true, bytes: taken.bytes, pause_us: taken.pause_us, ..shown }, memory))
    }

    /// Begins to go back to a snapshot: what has happened since is gone.
    pub fn restore_snapshot(self: &Arc<Self>, name: &str, snapshot: &str) -> Result<Operation, ErrorBody> {
        let entry = self.get(name)?;
        ready(&entry.record())?;
        find(&entry.record(), snapshot)?;
        let (instances, snapshot) = (self.clone(), snapshot.to_owned());
        Ok(self.operations.begin(format!("restore {name}"), name, |_| async move {
            let _busy = entry.busy.lock().await;
            let held = instances.hold(&entry, |record| Ok(vec![find(record, &snapshot)?]))?;
            let snapshot = lock(&entry.held)[0].clone();
            let restored = instances.restore(&entry, &snapshot).await;
            drop(held);
            instances.sweep().and(restored)
        }))
    }

    async fn restore(self: &Arc<Self>, entry: &Arc<Entry>, snapshot: &SnapshotRecord) -> Result<(), ErrorBody> {
        let record = entry.record();
        let dir = self.dir_of(&record);
        let memory = snapshot.memory.first().map(|file| dir.join(file));
        if let Some(file) = memory.clone() {
            // Before anything is given up.
            let engine = record.machine.engine;
            tokio::task::spawn_blocking(move || check(&file, engine)).await.map_err(failed)??;
        }
        self.settle_disk(entry).await?;
        // Without room for it, nothing is given up either.
        let new = dir.join(NEW_DISK);
        let _ = std::fs::remove_file(&new);
        make_overlay(&new, &dir.join(&snapshot.disk), Format::Qcow2, None)?;
        self.stop(entry, true, None).await?;
        self.go_back(entry, snapshot, &new)?;
        self.sweep()?;
        match memory {
            Some(file) => {
                self.start(entry, vm::Origin::Snapshot { file }).await?;
                self.bring_to_the_present(entry);
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// The disk is the image `new` from now on, an overlay of the snapshot's.
    fn go_back(&self, entry: &Entry, snapshot: &SnapshotRecord, new: &Path) -> Result<(), ErrorBody> {
        // Nobody is to find it superfluous before the record has it.
        let _files = lock(&self.files);
        let overlay = boot(&entry.record())?.overlay_name();
        let path = new.with_file_name(&overlay);
        std::fs::rename(new, &path).map_err(|e| failed(format!("cannot rename {}: {e}", new.display())))?;
        self.change(entry, |record| {
            // What executes the guest is no part of it: it may be another one now, and is another one on another host.
            record.machine = Machine { engine: record.machine.engine, ..snapshot.machine.clone() };
            if let Some(boot) = &mut record.boot {
                boot.disk = overlay;
                boot.layers = [snapshot.disk.clone()].into_iter().chain(snapshot.layers.clone()).collect();
                boot.overlays += 1;
            }
        })
    }

    /// Deletes a snapshot, whoever is busy with the instance. Files of it that others stand on stay as long as those, and what
    /// is needed just now until it is not.
    pub fn delete_snapshot(&self, name: &str, snapshot: &str) -> Result<(), ErrorBody> {
        let entry = self.get(name)?;
        ready(&entry.record())?;
        find(&entry.record(), snapshot)?;
        self.change(&entry, |record| record.snapshots.retain(|s| s.shown.name != snapshot))?;
        self.sweep()
    }
}

/// Snapshots whose files stay ([`Instances::hold`]).
struct Held<'a>(&'a Entry);

impl Drop for Held<'_> {
    fn drop(&mut self) {
        lock(&self.0.held).clear();
    }
}

/// Whether a snapshot's files are what they should be, and its machine can go on under this engine.
fn check(file: &Path, engine: Engine) -> Result<(), ErrorBody> {
    let chain = Chain::open(file).map_err(failed)?;
    chain.verify().map_err(failed)?;
    let chosen = engines::choose(setup::engine(engine)).map_err(failed)?;
    check_engine(&chain, &*chosen.engine).map_err(failed)
}

fn find(record: &Record, snapshot: &str) -> Result<SnapshotRecord, ErrorBody> {
    let found = record.snapshots.iter().find(|s| s.shown.name == snapshot).cloned();
    found.ok_or_else(|| {
        let (name, snapshot) = (&record.name, snapshot.chars().take(80).collect::<String>());
        let message = format!("'{name}' has no snapshot '{}': 'purlin snapshot list {name}'", snapshot.escape_debug());
        ErrorBody::new(Reason::NotFound, message)
    })
}

fn check_free(record: &Record, snapshot: &str) -> Result<(), ErrorBody> {
    ready(record)?;
    if record.snapshots.iter().any(|s| s.shown.name == snapshot) {
        return Err(conflict(format!("'{}' has a snapshot '{snapshot}' already", record.name)));
    }
    Ok(())
}

/// Files of memory that are there only because the last snapshot stands on them. They cannot be merged: each says by a
/// checksum which it stands on.
fn dead_files(snapshots: &[SnapshotRecord]) -> usize {
    let last = snapshots.iter().rev().find(|snapshot| !snapshot.memory.is_empty());
    let is_alive = |file: &&PathBuf| snapshots.iter().any(|snapshot| snapshot.memory.first() == Some(file));
    last.map_or(0, |last| last.memory.iter().filter(|file| !is_alive(file)).count())
}

/// A snapshot's file first, then those that it stands on.
fn files_of(file: PathBuf, chain: impl Iterator<Item = PathBuf>) -> Vec<PathBuf> {
    let below: Vec<PathBuf> = chain.filter(|name| *name != file).collect();
    [file].into_iter().chain(below).collect()
}
