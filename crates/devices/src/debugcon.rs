//! The debug console: a port to print on that needs no setting up.

use purlin_state::{Section, StateError};

use crate::{Device, Effect, Space, output::Output, stateless::Nothing};

/// Port 0xe9: what is stored there is printed, and a load reads 0xe9, by which software knows that the console is
/// there. One port range of one port.
pub struct Debugcon {
    output: Output,
}

impl Debugcon {
    /// Length of the port range.
    pub const PORTS: u16 = 1;

    /// A debug console that prints on `output`.
    pub fn new(output: Output) -> Self {
        Self { output }
    }
}

impl Device for Debugcon {
    fn name(&self) -> &str {
        "debugcon"
    }

    fn read(&mut self, _: Space, _: u64, data: &mut [u8]) {
        data.fill(0xe9);
    }

    /// There is no flow control: what the output has no room for is lost.
    fn write(&mut self, _: Space, _: u64, data: &[u8]) -> Effect {
        self.output.push(data);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Collect, inb, outb};

    #[test]
    fn it_prints_and_tells_that_it_is_there() {
        let printed = Collect::default();
        let mut debugcon = Debugcon::new(Output::new(Box::new(printed.clone())).unwrap());
        for &byte in b"hello" {
            assert_eq!(outb(&mut debugcon, 0, 0, byte), Effect::None);
        }
        assert_eq!(inb(&mut debugcon, 0, 0), 0xe9);
        drop(debugcon);
        assert_eq!(printed.bytes(), b"hello");
    }
}
