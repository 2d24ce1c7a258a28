//! The PC's two 8259A interrupt controllers: the slave is on input 2 of the master.

mod chip;
mod saved;

use purlin_state::{Saved, Section, StateError};

use crate::{Device, Effect, IrqLine, Space, byte_bus};
use chip::Chip;
use saved::SavedPic;

/// The master's input that the slave is on.
const CASCADE: u8 = 2;

/// Inputs that are always edge triggered (ELCR of Intel's PIIX: the timer, keyboard and cascade; clock and coprocessor).
const EDGE_ONLY: [u8; 2] = [0x07, 0x21];

/// The pair of 8259As. Three port ranges of [`Pic::PORTS`] ports each, in this order: 0x20 (master), 0xa0 (slave),
/// 0x4d0 (the edge/level control registers of both).
pub struct Pic {
    master: Chip,
    slave: Chip,
    intr: IrqLine,
    intr_high: bool,
}

impl Pic {
    /// Length of each port range.
    pub const PORTS: u16 = 2;

    /// A pair whose INTR output is `intr`.
    pub fn new(intr: IrqLine) -> Self {
        Self { master: Chip::new(1 << CASCADE), slave: Chip::new(0), intr, intr_high: false }
    }

    /// Drives the input `irq`, 0 to 15 except 2, which the slave has.
    pub fn set_irq(&mut self, irq: u8, high: bool) {
        match irq {
            CASCADE => return,
            0..=7 => self.master.set_line(irq, high),
            8..=15 => self.slave.set_line(irq - 8, high),
            _ => return,
        }
        self.update();
    }

    /// The processor's interrupt-acknowledge cycle: the vector to deliver. If the request is gone it is that of
    /// input 7, with nothing in service for it (data sheet, "Edge and level triggered modes").
    pub fn acknowledge(&mut self) -> u8 {
        let vector = match self.master.pending() {
            None => self.master.base | 7,
            Some(CASCADE) => {
                self.master.acknowledge(CASCADE);
                self.acknowledge_slave()
            }
            Some(input) => {
                self.master.acknowledge(input);
                self.master.base | input
            }
        };
        self.update();
        vector
    }

    fn acknowledge_slave(&mut self) -> u8 {
        let input = self.slave.pending();
        if let Some(input) = input {
            self.slave.acknowledge(input);
        }
        self.lower_slave();
        self.slave.base | input.unwrap_or(7)
    }

    /// An acknowledge resets the slave's INT for a moment: if it has more to say, that is a new edge for the master.
    fn lower_slave(&mut self) {
        self.master.set_line(CASCADE, false);
    }

    fn chip(&mut self, range: u8) -> &mut Chip {
        if range == 0 { &mut self.master } else { &mut self.slave }
    }

    fn read_register(&mut self, range: u8, register: u64) -> u8 {
        let a0 = register & 1 != 0;
        if range == 2 {
            return self.chip(register as u8 & 1).elcr;
        }
        let polled = self.chip(range).poll;
        let value = self.chip(range).read(a0);
        if polled && range == 1 {
            self.lower_slave();
        }
        value
    }

    fn write_register(&mut self, range: u8, register: u64, value: u8) {
        if range == 2 {
            let index = register as u8 & 1;
            self.chip(index).elcr = value & !EDGE_ONLY[usize::from(index)];
        } else {
            self.chip(range).write(register & 1 != 0, value);
        }
    }

    /// Carries the slave's INT to the master and the master's out.
    fn update(&mut self) {
        self.master.set_line(CASCADE, self.slave.pending().is_some());
        let high = self.master.pending().is_some();
        if high != self.intr_high {
            self.intr_high = high;
            self.intr.set(high);
        }
    }
}

impl Device for Pic {
    fn name(&self) -> &str {
        SavedPic::NAME
    }

    fn read(&mut self, space: Space, offset: u64, data: &mut [u8]) {
        let Space::Port { range } = space else { return data.fill(0xff) };
        byte_bus::read(offset, data, |register| self.read_register(range, register));
        self.update();
    }

    fn write(&mut self, space: Space, offset: u64, data: &[u8]) -> Effect {
        let Space::Port { range } = space else { return Effect::None };
        byte_bus::write(offset, data, |register, value| {
            self.write_register(range, register, value);
            self.update();
            Effect::None
        })
    }

    /// The inputs keep the levels that are driven.
    fn reset(&mut self) {
        self.master = Chip { lines: self.master.lines, ..Chip::new(1 << CASCADE) };
        self.slave = Chip { lines: self.slave.lines, ..Chip::new(0) };
        self.update();
    }

    fn save(&self) -> Section {
        Section::new(&SavedPic::of(self))
    }

    fn restore(&mut self, saved: &Section) -> Result<(), StateError> {
        saved.decode::<SavedPic>()?.apply(self)?;
        self.intr_high = self.master.pending().is_some();
        self.intr.set(self.intr_high);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
