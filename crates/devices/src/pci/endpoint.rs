//! What every function has: a configuration space, decoders that follow it, and MSI-X if it interrupts.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use prost::Message;
use purlin_state::StateError;

use super::{
    config_space::ConfigSpace,
    decoders::Decoders,
    msix::{self, Msix, MsixPlace, SavedMsix},
};

/// The part of a function that is the same for all kinds.
///
/// The lock of the configuration space comes before that of [`Msix`].
pub struct Endpoint {
    space: Mutex<ConfigSpace>,
    decoders: Decoders,
    msix: Option<(Arc<Msix>, MsixPlace)>,
    /// Offset of the MSI-X capability's message control.
    msix_control: u16,
}

/// The saved state.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct SavedEndpoint {
    /// The first 256 bytes of the configuration space.
    #[prost(bytes = "vec", tag = "1")]
    pub config: Vec<u8>,
    /// MSI-X, of a function that has it.
    #[prost(message, optional, tag = "2")]
    pub msix: Option<SavedMsix>,
}

impl Endpoint {
    /// A function with this configuration space, to which the MSI-X capability is added.
    pub fn new(mut space: ConfigSpace, msix: Option<(Arc<Msix>, MsixPlace)>) -> Self {
        let msix_control = msix.as_ref().map_or(0, |(msix, place)| {
            let (body, writable) = msix.capability(*place);
            space.add_capability(msix::CAPABILITY, &body, &writable) + 2
        });
        let decoders = Decoders::new(&space);
        Self { space: Mutex::new(space), decoders, msix, msix_control }
    }

    fn lock(&self) -> MutexGuard<'_, ConfigSpace> {
        self.space.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the registers are.
    pub fn decoders(&self) -> &Decoders {
        &self.decoders
    }

    /// A load from configuration space.
    pub fn read_config(&self, register: u16, data: &mut [u8]) {
        self.lock().read(register, data);
    }

    /// A store to configuration space.
    pub fn write_config(&self, register: u16, data: &[u8]) {
        let mut space = self.lock();
        space.write(register, data);
        self.follow(&space);
    }

    /// Changes the configuration space as firmware would.
    pub fn configure<R>(&self, act: impl FnOnce(&mut ConfigSpace) -> R) -> R {
        let mut space = self.lock();
        let result = act(&mut space);
        self.follow(&space);
        result
    }

    fn follow(&self, space: &ConfigSpace) {
        self.decoders.update(space);
        if let Some((msix, _)) = &self.msix {
            msix.set_control(space.word(self.msix_control));
        }
    }

    /// A load from the memory behind `bar`, if MSI-X is what is there.
    pub fn read_msix(&self, bar: u8, offset: u64, data: &mut [u8]) -> bool {
        match self.msix_range(bar, offset) {
            Some((msix, MsixRange::Table(at))) => msix.read_table(at, data),
            Some((msix, MsixRange::Pending(at))) => msix.read_pending(at, data),
            None => return false,
        }
        true
    }

    /// A store to the memory behind `bar`, if MSI-X is what is there.
    pub fn write_msix(&self, bar: u8, offset: u64, data: &[u8]) -> bool {
        match self.msix_range(bar, offset) {
            Some((msix, MsixRange::Table(at))) => msix.write_table(at, data),
            // The pending bits are not written (PCI Local Bus 3.0, 6.8.2.10).
            Some((_, MsixRange::Pending(_))) => {}
            None => return false,
        }
        true
    }

    fn msix_range(&self, bar: u8, offset: u64) -> Option<(&Msix, MsixRange)> {
        let (msix, place) = self.msix.as_ref()?;
        let count = u64::from(msix.count());
        let inside = |start: u32, length: u64| offset.checked_sub(start.into()).filter(|at| *at < length);
        if bar != place.bar {
            return None;
        }
        let table = inside(place.table, count * 16).map(MsixRange::Table);
        let range = table.or_else(|| inside(place.pending, count.div_ceil(64) * 8).map(MsixRange::Pending))?;
        Some((msix, range))
    }

    /// As after power-up.
    pub fn reset(&self) {
        self.configure(ConfigSpace::reset);
        if let Some((msix, _)) = &self.msix {
            msix.reset();
        }
    }

    /// The state.
    pub fn save(&self) -> SavedEndpoint {
        SavedEndpoint { config: self.lock().content(), msix: self.msix.as_ref().map(|(msix, _)| msix.save()) }
    }

    /// Takes over a saved state.
    pub fn restore(&self, saved: &SavedEndpoint) -> Result<(), StateError> {
        let mut space = self.lock();
        space.set_content(&saved.config);
        self.decoders.update(&space);
        match (&self.msix, &saved.msix) {
            (Some((msix, _)), Some(saved)) => msix.restore(saved),
            (None, None) => Ok(()),
            _ => Err(StateError::corrupt("pci", "a function has MSI-X, the other one has not")),
        }
    }
}

enum MsixRange {
    Table(u64),
    Pending(u64),
}
