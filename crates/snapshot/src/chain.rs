//! A snapshot with its parents, and the layers that they make.

use std::{
    fs::File,
    path::{Path, PathBuf},
};

use purlin_memory::{Layer, PAGE_SIZE};
use purlin_state::SavedState;

use crate::{
    MAX_DEPTH,
    error::SnapshotError,
    messages::{Manifest, ParentName},
    open::Snapshot,
    write::Parent,
};

/// A snapshot and those that it stands on.
#[derive(Debug)]
pub struct Chain {
    /// From the one without a parent up.
    snapshots: Vec<Snapshot>,
}

impl Chain {
    /// Opens the snapshot at `path` and its parents, which are in the same directory. All but pages is checked.
    pub fn open(path: &Path) -> Result<Self, SnapshotError> {
        let mut snapshots = vec![Snapshot::open(path)?];
        while let Some((child, parent)) =
            snapshots.last().and_then(|last| Some((last, last.manifest().parent.as_ref()?)))
        {
            if snapshots.len() == MAX_DEPTH {
                return Err(SnapshotError::TooDeep { path: path.to_owned(), max: MAX_DEPTH });
            }
            let parent = open_parent(child, parent)?;
            snapshots.push(parent);
        }
        snapshots.reverse();
        Ok(Self { snapshots })
    }

    /// The snapshots, from the one without a parent up.
    pub fn snapshots(&self) -> &[Snapshot] {
        &self.snapshots
    }

    /// What it is of.
    pub fn manifest(&self) -> &Manifest {
        self.top().manifest()
    }

    /// The machine's state, without memory.
    pub fn state(&self) -> &SavedState {
        self.top().state()
    }

    /// Reads all pages of all snapshots and compares their checksums.
    pub fn verify(&self) -> Result<(), SnapshotError> {
        self.snapshots.iter().try_for_each(Snapshot::verify)
    }

    /// The machine's memory, in these files: they must stay as they are for as long as anybody has the layers, or machines
    /// made of them. (To remove them does no harm.)
    pub fn layers(&self) -> Result<Vec<Layer>, SnapshotError> {
        let slots = &self.top().index.slots;
        let mut layers: Vec<_> = slots.iter().map(|slot| Layer::empty(slot.start, slot.length)).collect();
        for snapshot in &self.snapshots {
            for (slot, layer) in snapshot.index.slots.iter().zip(&mut layers) {
                for run in slot.runs() {
                    let pages = run.first..run.first + run.count;
                    match run.place {
                        None => layer.clear(pages),
                        Some(place) => {
                            let offset = snapshot.header.memory.offset + place * PAGE_SIZE;
                            layer.put(pages, snapshot.file.clone(), offset)?;
                        }
                    }
                }
            }
        }
        Ok(layers)
    }

    /// The machine's memory, copied: after this the files may change. To be verified before.
    pub fn load(&self) -> Result<Vec<Layer>, SnapshotError> {
        Ok(self.layers()?.iter().map(Layer::copied).collect::<Result<_, _>>()?)
    }

    /// As what others can stand on; `memory` is what [`Chain::layers`] or [`Chain::load`] has returned.
    pub fn into_parent(mut self, memory: Vec<Layer>) -> Option<Parent> {
        let depth = self.snapshots.len();
        let top = self.snapshots.pop()?;
        Some(Parent { depth, path: top.path.clone(), id: top.manifest().id(), fingerprint: top.fingerprint, memory })
    }

    fn top(&self) -> &Snapshot {
        // There is one at least.
        &self.snapshots[self.snapshots.len() - 1]
    }
}

fn open_parent(child: &Snapshot, name: &ParentName) -> Result<Snapshot, SnapshotError> {
    let wrong = |parent: &Path| SnapshotError::WrongParent { path: child.path.clone(), parent: parent.to_owned() };
    let file_name = Path::new(&name.file).file_name().map(PathBuf::from);
    let Some(file_name) = file_name.filter(|file| file.as_os_str() == name.file.as_str()) else {
        return Err(wrong(Path::new(&name.file)));
    };
    let path = child.path.with_file_name(file_name);
    let file = File::open(&path).map_err(|source| SnapshotError::ParentMissing {
        path: child.path.clone(),
        parent: path.clone(),
        source,
    })?;
    let parent = Snapshot::of_file(file, &path)?;
    let slots = |snapshot: &Snapshot| snapshot.index.slots.iter().map(|s| (s.start, s.length)).collect::<Vec<_>>();
    if parent.manifest().id().0[..] != name.id[..]
        || parent.fingerprint != name.fingerprint
        || slots(&parent) != slots(child)
    {
        return Err(wrong(&path));
    }
    Ok(parent)
}
