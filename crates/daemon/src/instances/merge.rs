//! Images that nothing but an image above them needs are merged with that one, so that disks do not stand on more and more.
//!
//! Each snapshot and each freeze leaves an overlay behind, and when the snapshot or the clone is deleted it stays, for
//! others stand on it. What is above and below it is not written either, so the two are made one beside them
//! ([`Merge`]), and that takes the upper one's place by a rename: the content of that name stays the same. Then the
//! records do without the lower one, and it is swept. Whatever is killed in between, each name has the content that it
//! should, and what is left to do is found by looking at the images.
//!
//! A machine that runs goes on with the files that it has open; the names of its own directory lead it to the new ones at
//! its next freeze.

use std::{
    collections::{BTreeMap, HashSet},
    fs::{self, File},
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, atomic::Ordering},
    time::Duration,
};

use purlin_api::ErrorBody;
use purlin_vmm::storage::{Merge, MergeError};

use super::{Entry, Instances, failed, lock};
use crate::record::{MERGED, Record, SnapshotRecord};

/// Disks that stand on so many images are made shorter whatever that costs.
const LONG: usize = 16;
/// In others an image is not copied for one above it that is smaller by more than this factor.
const WORTH: u64 = 4;
/// How long after something has been deleted or frozen it is looked what can be merged: clones that are being made have the processors
/// until then.
const CALM: Duration = Duration::from_secs(1);
/// How soon instances that are busy are looked at again.
const AGAIN: Duration = Duration::from_millis(100);

impl Instances {
    /// Merges what can be merged, now and some time after something has been deleted or frozen.
    pub(super) async fn merge_for_ever(self: Arc<Self>) {
        loop {
            let mut in_vain = HashSet::new();
            while let Some(merge) = self.next_merge(&in_vain) {
                let (instances, wanted) = (self.clone(), merge.clone());
                let made = tokio::task::spawn_blocking(move || instances.make_merged(&wanted)).await.map_err(failed);
                let merged = match made.flatten() {
                    Ok(()) => self.use_merged(&merge).await,
                    Err(error) => Err(error),
                };
                *lock(&self.merging) = None;
                let merged = merged.and_then(|()| self.sweep_files());
                if let Err(error) = merged {
                    tracing::warn!("{error}; the images stay as they are");
                    in_vain.insert(merge);
                }
            }
            self.to_merge.notified().await;
            tokio::time::sleep(CALM).await;
        }
    }

    /// The cheapest pair that is worth it.
    fn next_merge(&self, in_vain: &HashSet<Merge>) -> Option<Merge> {
        let bound = self.bound();
        let _files = lock(&self.files);
        let chains = self.chains();
        let length = |path: &Path| fs::metadata(path).map_or(0, |file| file.len());
        let is_worth = |merge: &Merge| {
            let is_long = chains.iter().any(|chain| chain.images.len() > LONG && chain.images.contains(&merge.upper));
            is_long || length(&merge.lower) <= length(&merge.upper).saturating_mul(WORTH)
        };
        let pairs =
            pairs(&chains).into_iter().filter(|merge| !in_vain.contains(merge) && !bound.contains(&merge.upper));
        pairs.filter(is_worth).min_by_key(|merge| length(&merge.lower) + length(&merge.upper))
    }

    /// Images of other instances' that a machine that runs would not find again, if others took their place: it can reach
    /// them because it was given the files. Where its sandbox has a root of its own they are in there, as they were.
    fn bound(&self) -> HashSet<PathBuf> {
        let mut bound = HashSet::new();
        for entry in self.entries() {
            let may_lack = match entry.vm() {
                Some(vm) => !vm.said().sandbox_lacks.is_empty(),
                // It is being started, or looked for.
                None => entry.is_starting.load(Ordering::SeqCst),
            };
            if may_lack {
                let record = entry.record();
                let dir = self.dir_of(&record);
                let layers = record.boot.iter().flat_map(|boot| &boot.layers).map(|path| dir.join(path));
                bound.extend(layers.filter(|path| !path.starts_with(&dir)));
            }
        }
        bound
    }

    /// All disks and what they stand on.
    fn chains(&self) -> Vec<Chain> {
        let of_held = |entry: &Arc<Entry>| {
            let dir = self.dir_of(&entry.record());
            lock(&entry.held).iter().map(|snapshot| Chain::of_snapshot(snapshot, &dir)).collect::<Vec<_>>()
        };
        let of = |entry: &Arc<Entry>| {
            let record = entry.record();
            let own = chains(&record, &self.dir_of(&record));
            own.into_iter().chain(of_held(entry))
        };
        self.entries().iter().flat_map(of).collect()
    }

    /// Makes the image of two, unless it is in the upper one's place already.
    fn make_merged(&self, merge: &Merge) -> Result<(), ErrorBody> {
        if merge.is_done().map_err(failed)? {
            return Ok(());
        }
        let target = merged(&merge.upper);
        *lock(&self.merging) = Some(target.clone());
        // An earlier attempt of a daemon that was killed.
        let _ = fs::remove_file(&target);
        let is_wanted = || merge.upper.exists() && merge.lower.exists();
        match merge.run(&target, &is_wanted) {
            Err(MergeError::GivenUp) | Ok(()) => Ok(()),
            Err(error) => Err(failed(error)),
        }
    }

    /// Puts the merged image in the upper one's place, when nobody is busy with a disk that stands on it.
    async fn use_merged(&self, merge: &Merge) -> Result<(), ErrorBody> {
        loop {
            if self.bound().contains(&merge.upper) {
                let upper = merge.upper.display();
                return Err(failed(format!("a machine that runs could not find what takes the place of {upper}")));
            }
            let concerned = self.concerned(merge);
            let Some((first, others)) = concerned.split_first() else {
                return self.replace(merge, &[]);
            };
            // In its turn, for one that is frozen again and again is busy nearly always. Of the others none is waited for: who
            // makes clones has one turn, and waits for others.
            let turn = first.busy.lock().await;
            let turns: Result<Vec<_>, _> = others.iter().map(|entry| entry.busy.try_lock()).collect();
            let is_known = |entry: &Arc<Entry>| concerned.iter().any(|known| Arc::ptr_eq(known, entry));
            if turns.is_ok() && self.concerned(merge).iter().all(is_known) {
                return self.replace(merge, &concerned);
            }
            drop((turns, turn));
            tokio::time::sleep(AGAIN).await;
        }
    }

    /// The instances whose disks stand on the lower image.
    fn concerned(&self, merge: &Merge) -> Vec<Arc<Entry>> {
        let mut entries = self.entries();
        entries.retain(|entry| {
            let record = entry.record();
            chains(&record, &self.dir_of(&record)).iter().any(|chain| chain.images.contains(&merge.lower))
        });
        entries
    }

    fn replace(&self, merge: &Merge, concerned: &[Arc<Entry>]) -> Result<(), ErrorBody> {
        // Nobody looks for superfluous files meanwhile, nor makes others.
        let _files = lock(&self.files);
        let new = merged(&merge.upper);
        if !pairs(&self.chains()).contains(merge) {
            // Somebody needs the lower one by now, or nobody needs either.
            let _ = fs::remove_file(new);
            return Ok(());
        }
        if !merge.is_done().map_err(failed)? {
            let dir = merge.upper.parent().unwrap_or(Path::new("/"));
            let renamed = fs::rename(&new, &merge.upper).and_then(|()| File::open(dir)?.sync_all());
            renamed.map_err(|e| failed(format!("cannot rename {}: {e}", new.display())))?;
        }
        for entry in concerned {
            let dir = self.dir_of(&entry.record());
            self.change(entry, |record| forget(record, &dir, merge))?;
        }
        Ok(())
    }

    /// The merged image that is being made: no record has it yet.
    pub(super) fn merging(&self) -> Option<PathBuf> {
        self.merging.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Where the merged image is made: beside the one whose place it takes.
fn merged(upper: &Path) -> PathBuf {
    upper.with_added_extension(MERGED)
}

/// A disk, by absolute paths.
struct Chain {
    /// The image of a moment, or that which is written; then what it stands on.
    images: Vec<PathBuf>,
    /// Whether the first may be written.
    is_written: bool,
}

impl Chain {
    fn new<'a>(is_written: bool, images: impl Iterator<Item = &'a PathBuf>, dir: &Path) -> Self {
        Self { images: images.map(|path| dir.join(path)).collect(), is_written }
    }

    fn of_snapshot(snapshot: &SnapshotRecord, dir: &Path) -> Self {
        Self::new(false, [&snapshot.disk].into_iter().chain(&snapshot.layers), dir)
    }
}

/// The disks of an instance: its own, that with which it may be about to go on, and those of its snapshots.
fn chains(record: &Record, dir: &Path) -> Vec<Chain> {
    let mut chains: Vec<_> = record.snapshots.iter().map(|snapshot| Chain::of_snapshot(snapshot, dir)).collect();
    if let Some(boot) = &record.boot {
        let disk = || [&boot.disk].into_iter().chain(&boot.layers);
        chains.extend(boot.next_disk.iter().map(|next| Chain::new(true, [next].into_iter().chain(disk()), dir)));
        chains.push(Chain::new(true, disk(), dir));
    }
    chains
}

/// Pairs of images of which the lower one is needed by the upper one only, and neither is written.
fn pairs(chains: &[Chain]) -> Vec<Merge> {
    let mut needed = HashSet::new();
    let mut written = HashSet::new();
    // What stands on an image, and what that stands on.
    let mut around: BTreeMap<&Path, (HashSet<&Path>, HashSet<&Path>)> = BTreeMap::new();
    for Chain { images, is_written } in chains {
        needed.extend(images.first());
        written.extend(images.first().filter(|_| *is_written));
        for [upper, lower, below] in images.array_windows() {
            let (uppers, belows) = around.entry(lower).or_default();
            uppers.insert(upper);
            belows.insert(below);
        }
    }
    let only = |paths: &HashSet<&Path>| match paths.iter().collect::<Vec<_>>()[..] {
        [path] => Some(path.to_path_buf()),
        _ => None,
    };
    let pair = |(lower, (uppers, belows)): (&Path, (HashSet<&Path>, HashSet<&Path>))| {
        let lower = lower.to_owned();
        let (upper, below) = (only(&uppers)?, only(&belows)?);
        (!needed.contains(&lower) && !written.contains(&upper)).then_some(Merge { upper, lower, below })
    };
    around.into_iter().filter_map(pair).collect()
}

/// The record of an instance whose disks stood on both.
fn forget(record: &mut Record, dir: &Path, merge: &Merge) {
    let of_snapshots = record.snapshots.iter_mut().map(|snapshot| &mut snapshot.layers);
    for layers in record.boot.iter_mut().map(|boot| &mut boot.layers).chain(of_snapshots) {
        layers.retain(|path| dir.join(path) != merge.lower);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(is_written: bool, names: &str) -> Chain {
        Chain { images: names.split(' ').map(PathBuf::from).collect(), is_written }
    }

    fn found(chains: &[Chain]) -> Vec<String> {
        let text = |path: &Path| path.display().to_string();
        pairs(chains).iter().map(|m| format!("{}+{}/{}", text(&m.upper), text(&m.lower), text(&m.below))).collect()
    }

    #[test]
    fn what_nobody_else_needs_is_merged() {
        // The disk itself is written, and the last is a base.
        assert!(found(&[chain(true, "c b a")]).is_empty());
        assert!(found(&[chain(true, "b a")]).is_empty());
        assert_eq!(found(&[chain(true, "d c b a")]), ["c+b/a"]);
        // A snapshot's disk stays, and can take in what is below it.
        assert_eq!(found(&[chain(true, "d c b a"), chain(false, "c b a")]), ["c+b/a"]);
        assert!(found(&[chain(true, "d c b a"), chain(false, "b a")]).is_empty());
        // Of a snapshot alone.
        assert_eq!(found(&[chain(true, "x a"), chain(false, "c b a")]), ["c+b/a"]);
        // Two stand on it.
        assert!(found(&[chain(true, "d c b a"), chain(true, "e b a")]).is_empty());
        // They stand on one that is to be merged.
        assert_eq!(found(&[chain(true, "d c b a"), chain(true, "e c b a")]), ["c+b/a"]);
        // The disk may go on with another one.
        assert_eq!(found(&[chain(true, "n d c b a"), chain(true, "d c b a")]), ["c+b/a"]);
    }
}
