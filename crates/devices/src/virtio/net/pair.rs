//! A pair of queues, and whether the driver uses it.

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use purlin_network::Backend;

/// One of the device's pairs.
pub(super) struct Pair {
    /// Where its packets come from and go to.
    pub backend: Arc<Backend>,
    in_use: Mutex<bool>,
}

impl Pair {
    /// The pair of a driver that has said nothing about it: only the first is in use (virtio 1.3, 5.1.6.5.6).
    pub fn new(backend: Arc<Backend>, index: usize) -> Self {
        Self { backend, in_use: Mutex::new(index == 0) }
    }

    /// Whether it is in use. It stays so for as long as the guard lives: whoever moves packets keeps it meanwhile.
    pub fn lock(&self) -> MutexGuard<'_, bool> {
        self.in_use.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says whether it is in use. When this returns, no packet moves any more that should not.
    pub fn set_in_use(&self, in_use: bool) -> io::Result<()> {
        let mut now = self.lock();
        self.backend.set_in_use(in_use)?;
        *now = in_use;
        Ok(())
    }
}

/// Has the first `count` of them in use, at least one, and no others.
pub(super) fn use_pairs(pairs: &[Arc<Pair>], count: u16) -> io::Result<()> {
    let wanted = |index: usize| index < usize::from(count.max(1));
    pairs.iter().enumerate().try_for_each(|(index, pair)| pair.set_in_use(wanted(index)))
}
