//! The port by which a guest says that its kernel has panicked (QEMU, docs/specs/pvpanic).

use bitflags::bitflags;
use purlin_state::{Section, StateError};

use crate::{Device, Effect, GuestEvent, Space, stateless::Nothing};

bitflags! {
    /// What can be said; a load tells that all of it is understood.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Said: u8 {
        /// The kernel has panicked.
        const PANICKED = 1 << 0;
        /// The kernel has panicked, and goes on with a crash kernel.
        const CRASH_LOADED = 1 << 1;
        /// The guest has shut down.
        const SHUT_DOWN = 1 << 2;
    }
}

/// The port. One port range of [`Pvpanic::PORTS`] ports at 0x505.
#[derive(Debug, Default)]
pub struct Pvpanic;

impl Pvpanic {
    /// Length of the port range.
    pub const PORTS: u16 = 1;
}

impl Device for Pvpanic {
    fn name(&self) -> &str {
        "pvpanic"
    }

    fn read(&mut self, _: Space, _: u64, data: &mut [u8]) {
        data.fill(Said::all().bits());
    }

    /// Bits that are not known are ignored; of several, the worst counts.
    fn write(&mut self, _: Space, _: u64, data: &[u8]) -> Effect {
        let said = Said::from_bits_truncate(data.first().copied().unwrap_or(0));
        if said.contains(Said::PANICKED) {
            Effect::Event(GuestEvent::Panicked)
        } else if said.contains(Said::CRASH_LOADED) {
            Effect::Event(GuestEvent::CrashKernel)
        } else if said.contains(Said::SHUT_DOWN) {
            Effect::PowerOff
        } else {
            Effect::None
        }
    }

    fn reset(&mut self) {}

    fn save(&self) -> Section {
        Nothing::section(self.name())
    }

    fn restore(&mut self, saved: &Section) -> Result<(), StateError> {
        Nothing::check(saved)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{inb, outb};

    #[test]
    fn it_says_what_it_understands() {
        assert_eq!(inb(&mut Pvpanic, 0, 0), 7);
    }

    #[test]
    fn each_bit_has_its_effect_and_the_worst_counts() {
        let panicked = Effect::Event(GuestEvent::Panicked);
        let crash_kernel = Effect::Event(GuestEvent::CrashKernel);
        for (value, effect) in [
            (0, Effect::None),
            (1, panicked),
            (2, crash_kernel),
            (3, panicked),
            (4, Effect::PowerOff),
            (6, crash_kernel),
            (0xf8, Effect::None),
            (0xff, panicked),
        ] {
            assert_eq!(outb(&mut Pvpanic, 0, 0, value), effect, "{value:#x}");
        }
    }

    #[test]
    fn it_has_no_state() {
        let saved = Pvpanic.save();
        assert_eq!((saved.name.as_str(), Pvpanic.restore(&saved).is_ok()), ("pvpanic", true));
    }
}
