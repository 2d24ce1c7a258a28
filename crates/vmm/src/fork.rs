//! A machine frozen at one moment, to make clones of, while it goes on itself.

use std::{path::PathBuf, sync::Arc, time::Duration};

use purlin_engine::{
    Code, SavedCode,
    memory::{Freeze, FrozenMemory, Layer, MemoryError},
};
use purlin_machine::Machine;
use purlin_state::SavedState;
use purlin_storage::{Disk, FrozenDisk, OpenError, Overlay};

use crate::{lifecycle::LifecycleError, running::Running};

/// How a machine is to go on after a freeze.
#[derive(Clone, Debug, Default)]
pub struct FreezeSpec {
    /// For each disk the overlay that it goes on with: a path where nothing is yet, in a directory that is. None for a disk
    /// that the guest cannot write.
    pub overlays: Vec<Option<PathBuf>>,
}

/// A machine at one moment. [`Vmm::restore_from`](crate::Vmm::restore_from) makes any number of others of it; each needs
/// disks of its own, for example overlays of the frozen images, and is to hear that it is a copy
/// ([`Running::renew_generation`]).
#[derive(Debug)]
pub struct Frozen {
    /// Everything but memory and disks.
    pub state: SavedState,
    /// Memory, a layer for each slot. ([`memory::send`](purlin_engine::memory::send) gets it to another process.)
    pub memory: Vec<Layer>,
    /// What the engine has made of the guest's code, if there is such a thing.
    pub code: Option<Arc<dyn Code>>,
    /// The images of the disks that have gone on with overlays. They do not change any more, but a host that crashes may
    /// lose some of them until the guest's next flush, or [`Disk::sync_frozen`].
    pub disks: Vec<Option<FrozenDisk>>,
    /// For how long the machine stood still; 0 if it was paused.
    pub pause: Duration,
}

impl Frozen {
    /// [`Self::code`] for a clone, which goes on as well without.
    pub fn saved_code(&self) -> Option<SavedCode> {
        let saved = self.code.as_ref()?.save();
        saved.unwrap_or_else(|error| {
            tracing::warn!("clones begin without translated code: {error}");
            None
        })
    }
}

/// Why a machine could not be frozen. It goes on as it was.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    /// The run is over.
    #[error(transparent)]
    Lifecycle(#[from] LifecycleError),
    /// Its memory cannot be frozen.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Its memory was not copied to the end. Its disks have gone on with their overlays.
    #[error("{0}; the machine goes on with the overlays of its disks")]
    Copy(#[source] MemoryError),
    /// An overlay cannot be made, or the disk not go on with it.
    #[error(transparent)]
    Disk(#[from] OpenError),
    /// There is not one overlay for each disk that the guest can write.
    #[error(
        "the machine has {disks} disks and is given {given} overlays: each disk that the guest can write needs one"
    )]
    Overlays {
        /// The machine's disks.
        disks: usize,
        /// What was given.
        given: usize,
    },
}

/// What is taken while the machine stands still.
struct Taken {
    state: SavedState,
    memory: FrozenMemory,
    code: Option<Arc<dyn Code>>,
    disks: Vec<Option<FrozenDisk>>,
}

impl Running {
    /// Freezes the machine at one moment, for clones. It stands still for as short as possible and goes on: with private
    /// memory above layers that it shares with them, and overlays of its disks. One that is paused stays so.
    pub fn fork(&self, spec: &FreezeSpec) -> Result<Frozen, FreezeError> {
        let (ram, disks) = {
            // Not held any longer: nobody is to wait for this at the machine's end.
            let machine = self.machine()?;
            (machine.ram().clone(), machine.disks().to_vec())
        };
        let overlays = make_overlays(&disks, &spec.overlays)?;
        let freeze = Freeze::begin(&ram)?;
        let work = move |machine: &Machine, state| freeze_all(machine, overlays, freeze, state);
        let (taken, pause) = self.while_still(work)?;
        let Taken { state, memory, code, disks } = taken?;
        Ok(Frozen { state, memory: memory.into_layers().map_err(FreezeError::Copy)?, code, disks, pause })
    }
}

fn make_overlays(disks: &[Arc<Disk>], paths: &[Option<PathBuf>]) -> Result<Vec<Option<Overlay>>, FreezeError> {
    let given = paths.iter().flatten().count();
    let fits = disks.len() == paths.len() && disks.iter().zip(paths).all(|(disk, p)| p.is_some() || disk.read_only());
    if !fits {
        return Err(FreezeError::Overlays { disks: disks.len(), given });
    }
    let overlays = disks.iter().zip(paths).map(|(disk, path)| path.as_ref().map(|path| disk.overlay(path)).transpose());
    Ok(overlays.collect::<Result<_, _>>()?)
}

/// Freezes a machine that stands still; after an error everything is as before.
fn freeze_all(
    machine: &Machine,
    overlays: Vec<Option<Overlay>>,
    freeze: Freeze,
    state: SavedState,
) -> Result<Taken, FreezeError> {
    let switches =
        machine.disks().iter().zip(overlays).map(|(disk, overlay)| overlay.map(|o| disk.switch(o)).transpose());
    let switches = switches.collect::<Result<Vec<_>, _>>()?;
    let memory = freeze.finish()?;
    let code = machine.code();
    // What comes now cannot fail.
    let disks = switches.into_iter().map(|switch| switch.map(|switch| switch.make())).collect();
    Ok(Taken { state, memory, code, disks })
}
