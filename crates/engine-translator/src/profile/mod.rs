//! Where the time of vCPUs goes, and what the translator did.
//!
//! The samples are those by which the translator finds what is hot (`timer.rs`). The signal handler adds each to its
//! place; what it found in translated code the run loop then looks up in the code cache, as it does in any case.

mod exits;
mod phase;
mod report;
mod vcpu;

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicU64, Ordering},
};

use rustc_hash::FxHashMap as HashMap;

pub use self::{
    phase::{Phase, Place},
    report::{Emulated, Hot, Report, Translation},
    vcpu::VcpuProfile,
};
use crate::translate::{CodeCache, Ends};
pub use crate::translate::{Content, ExitKind, GuestPlace, Piece};

/// Places in the guest that are told apart at most; samples of others are counted all the same.
const MAX_PLACES: usize = 1 << 18;

/// A profile of the VMs of an engine (see `TranslatorEngine::with_profile`).
#[derive(Debug, Default)]
pub struct Profile {
    vcpus: Mutex<Vec<Arc<VcpuProfile>>>,
    /// Samples in translated code.
    hot: Mutex<HashMap<GuestPlace, u64>>,
    blocks: AtomicU64,
    hot_blocks: AtomicU64,
    bytes: AtomicU64,
    caches: Mutex<Caches>,
}

/// What was left in code caches when they were given up.
#[derive(Debug, Default)]
struct Caches {
    pieces: Vec<Piece>,
    ends: Ends,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Profile {
    /// The counts of one more vCPU.
    pub(crate) fn vcpu(&self, code: &CodeCache) -> Arc<VcpuProfile> {
        let vcpu = Arc::new(VcpuProfile::new(code));
        lock(&self.vcpus).push(vcpu.clone());
        vcpu
    }

    /// A sample was taken in the translation of what is at `place`.
    pub(crate) fn sampled(&self, place: GuestPlace) {
        let mut hot = lock(&self.hot);
        if hot.len() < MAX_PLACES || hot.contains_key(&place) {
            *hot.entry(place).or_default() += 1;
        }
    }

    /// A block was made.
    pub(crate) fn translated(&self, hot: bool, bytes: usize) {
        let blocks = if hot { &self.hot_blocks } else { &self.blocks };
        blocks.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// A code cache is given up.
    pub(crate) fn ended(&self, code: &CodeCache) {
        let (pieces, ends) = (code.pieces(), code.ends());
        let mut caches = lock(&self.caches);
        caches.pieces.extend(pieces);
        caches.ends.stored += ends.stored;
        caches.ends.heated += ends.heated;
        caches.ends.cleared += ends.cleared;
    }

    /// What was in the code caches when their VMs were gone, by address.
    pub fn pieces(&self) -> Vec<Piece> {
        let mut pieces = lock(&self.caches).pieces.clone();
        pieces.sort_by_key(|piece| piece.addresses.start);
        pieces
    }
}
