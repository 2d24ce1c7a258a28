//! The reset control register of Intel's south bridges, which the FADT names as the reset register (ACPI 6.5 4.8.3.6).

use prost::Message;
use purlin_state::{Saved, Section, StateError};

use crate::{Device, Effect, Space};

/// Which reset: soft (INIT) or hard. Here both reset the machine.
const SYSTEM: u8 = 1 << 1;
/// A rise resets.
const RESET: u8 = 1 << 2;
/// With a power cycle.
const FULL: u8 = 1 << 3;

/// Port 0xcf9. One port range of one port.
#[derive(Debug, Default)]
pub struct ResetControl {
    value: u8,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct SavedResetControl {
    #[prost(uint32, tag = "1")]
    value: u32,
}

impl Saved for SavedResetControl {
    const NAME: &'static str = "reset-control";
    const VERSION: u32 = 1;
}

impl ResetControl {
    /// Length of the port range.
    pub const PORTS: u16 = 1;
    /// What the FADT gives as RESET_VALUE.
    pub const RESET_VALUE: u8 = SYSTEM | RESET;
}

impl Device for ResetControl {
    fn name(&self) -> &str {
        SavedResetControl::NAME
    }

    fn read(&mut self, _: Space, _: u64, data: &mut [u8]) {
        data.fill(self.value);
    }

    /// The register never keeps the reset bit, so that a single store of [`ResetControl::RESET_VALUE`] always resets.
    fn write(&mut self, _: Space, _: u64, data: &[u8]) -> Effect {
        let Some(&value) = data.first() else { return Effect::None };
        self.value = value & (SYSTEM | FULL);
        if value & RESET != 0 { Effect::Reset } else { Effect::None }
    }

    fn reset(&mut self) {
        *self = Self::default();
    }

    fn save(&self) -> Section {
        Section::new(&SavedResetControl { value: self.value.into() })
    }

    fn restore(&mut self, saved: &Section) -> Result<(), StateError> {
        self.value = saved.decode::<SavedResetControl>()?.value as u8 & (SYSTEM | FULL);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::{goes_on_after_restore, inb, outb, steps};

    #[test]
    fn bit_2_resets() {
        let mut register = ResetControl::default();
        assert_eq!(outb(&mut register, 0, 0, ResetControl::RESET_VALUE), Effect::Reset);
        register.reset();
        // As Linux does it: the kind first, then the reset.
        assert_eq!(outb(&mut register, 0, 0, 0x02), Effect::None);
        assert_eq!(inb(&mut register, 0, 0), 0x02);
        assert_eq!(outb(&mut register, 0, 0, 0x0e), Effect::Reset);
        assert_eq!(outb(&mut register, 0, 0, 0x0e), Effect::Reset);
    }

    proptest! {
        #[test]
        fn any_state_can_be_saved_and_goes_on(before in steps(), after in steps()) {
            let make = ResetControl::default;
            goes_on_after_restore(make, &[(Space::Port { range: 0 }, 1)], |_, _| {}, &before, &after);
        }
    }
}
