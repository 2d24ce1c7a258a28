//! The debug-exit port, for people who write kernels and run their tests in a virtual machine.

use purlin_state::{Section, StateError};

use crate::{Device, Effect, Space, stateless::Nothing};

/// A port that ends the run: a store of `value` gives the exit status `(value << 1) | 1`, cut to 8 bits, which is never
/// 0. One port range of [`DebugExit::PORTS`] ports at 0xf4. A load reads 0.
#[derive(Debug, Default)]
pub struct DebugExit;

impl DebugExit {
    /// Length of the port range.
    pub const PORTS: u16 = 4;
}

impl Device for DebugExit {
    fn name(&self) -> &str {
        "debug-exit"
    }

    fn read(&mut self, _: Space, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, _: Space, _: u64, data: &[u8]) -> Effect {
        Effect::Exit(data.first().map_or(1, |value| value << 1 | 1))
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
    fn a_store_exits_with_an_odd_status() {
        for (value, status) in [(0, 1), (1, 3), (0x10, 0x21), (0x7f, 0xff), (0x80, 1)] {
            assert_eq!(outb(&mut DebugExit, 0, 0, value), Effect::Exit(status));
        }
        let wide = DebugExit.write(Space::Port { range: 0 }, 0, &0x1234_5605u32.to_le_bytes());
        assert_eq!(wide, Effect::Exit(11));
        assert_eq!(inb(&mut DebugExit, 0, 0), 0);
    }
}
