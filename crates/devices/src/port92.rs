//! System control port A of the PS/2: A20 and the fast reset.

use prost::Message;
use purlin_state::{Saved, Section, StateError};

use crate::{Device, Effect, Space};

const FAST_RESET: u8 = 1 << 0;
const A20: u8 = 1 << 1;

/// Port 0x92. One port range of one port.
///
/// Address line 20 is never masked, as on today's processors: the bit keeps what is stored and does nothing more.
#[derive(Debug)]
pub struct Port92 {
    value: u8,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct SavedPort92 {
    #[prost(uint32, tag = "1")]
    value: u32,
}

impl Saved for SavedPort92 {
    const NAME: &'static str = "port92";
    const VERSION: u32 = 1;
}

impl Port92 {
    /// Length of the port range.
    pub const PORTS: u16 = 1;
}

impl Default for Port92 {
    fn default() -> Self {
        Self { value: A20 }
    }
}

impl Device for Port92 {
    fn name(&self) -> &str {
        SavedPort92::NAME
    }

    fn read(&mut self, _: Space, _: u64, data: &mut [u8]) {
        data.fill(self.value);
    }

    fn write(&mut self, _: Space, _: u64, data: &[u8]) -> Effect {
        let Some(&value) = data.first() else { return Effect::None };
        let resets = value & !self.value & FAST_RESET != 0;
        self.value = value & (FAST_RESET | A20);
        if resets { Effect::Reset } else { Effect::None }
    }

    fn reset(&mut self) {
        *self = Self::default();
    }

    fn save(&self) -> Section {
        Section::new(&SavedPort92 { value: self.value.into() })
    }

    fn restore(&mut self, saved: &Section) -> Result<(), StateError> {
        self.value = saved.decode::<SavedPort92>()?.value as u8 & (FAST_RESET | A20);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::{goes_on_after_restore, inb, outb, steps};

    #[test]
    fn only_the_rise_of_bit_0_resets() {
        let mut port = Port92::default();
        assert_eq!(inb(&mut port, 0, 0), 0x02);
        assert_eq!(outb(&mut port, 0, 0, 0x00), Effect::None);
        assert_eq!(inb(&mut port, 0, 0), 0x00);
        assert_eq!(outb(&mut port, 0, 0, 0x03), Effect::Reset);
        assert_eq!(outb(&mut port, 0, 0, 0x03), Effect::None);
        port.reset();
        assert_eq!(outb(&mut port, 0, 0, 0xff), Effect::Reset);
    }

    proptest! {
        #[test]
        fn any_state_can_be_saved_and_goes_on(before in steps(), after in steps()) {
            goes_on_after_restore(Port92::default, &[(Space::Port { range: 0 }, 1)], |_, _| {}, &before, &after);
        }
    }
}
