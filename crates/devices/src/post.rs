//! The port for power-on self test codes. Firmware shows its progress there; kernels store to it to wait a moment.

use purlin_state::{Section, StateError};

use crate::{Device, Effect, Space, stateless::Nothing};

/// Port 0x80: takes stores and does nothing with them. One port range of one port.
#[derive(Debug, Default)]
pub struct PostPort;

impl PostPort {
    /// Length of the port range.
    pub const PORTS: u16 = 1;
}

impl Device for PostPort {
    fn name(&self) -> &str {
        "post"
    }

    fn read(&mut self, _: Space, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&mut self, _: Space, _: u64, data: &[u8]) -> Effect {
        tracing::trace!("POST code {data:02x?}");
        Effect::None
    }

    fn reset(&mut self) {}

    fn save(&self) -> Section {
        Nothing::section(self.name())
    }

    fn restore(&mut self, saved: &Section) -> Result<(), StateError> {
        Nothing::check(saved)
    }
}
