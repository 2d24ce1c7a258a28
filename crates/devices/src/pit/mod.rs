//! The PC's 8254 interval timer, with system control port B (0x61), which gates its channel 2 and shows its output.
//!
//! Channel 0 is the interrupt. The line is told of every rise of its output; of a fall only when something else
//! happens, for nobody looks at the low level: the inputs that it leads to are edge triggered.

mod channel;
mod saved;

use purlin_state::{Saved, Section, StateError};

use crate::{Device, Effect, IrqLine, Space, byte_bus, frequency::Frequency};
use channel::Channel;
use saved::SavedPit;

/// The 8254's clock on a PC.
const CLOCK: Frequency = Frequency(1_193_182);

/// Offset of the control word register.
const CONTROL: u64 = 3;

/// Port 0x61: gate of channel 2.
const GATE2: u8 = 1 << 0;
/// Port 0x61: speaker, and the two parity checks; they are kept.
const KEPT: u8 = 0x0e;
/// Port 0x61: toggles with every refresh of memory.
const REFRESH: u8 = 1 << 4;
/// Port 0x61: output of channel 2.
const OUT2: u8 = 1 << 5;
/// Ticks between two refreshes: channel 1 is set up for 15 µs by every BIOS.
const REFRESH_TICKS: u64 = 18;

/// The least time between two deadlines, in ticks (20 µs): faster rates than a guest can use cost the host no more.
const LEAST_TICKS: u64 = 24;

/// The 8254. Two port ranges: [`Pit::PORTS`] ports at 0x40, and port 0x61.
pub struct Pit {
    irq: IrqLine,
    irq_high: bool,
    /// Machine time, ns.
    now: u64,
    channels: [Channel; 3],
    /// The bits of port 0x61 that are kept.
    port_b: u8,
}

impl Pit {
    /// Length of the first port range.
    pub const PORTS: u16 = 4;

    /// A timer whose channel 0 drives `irq` (IRQ 0).
    pub fn new(irq: IrqLine) -> Self {
        let channels = [Channel::new(true), Channel::new(true), Channel::new(false)];
        Self { irq, irq_high: false, now: 0, channels, port_b: 0 }
    }

    fn tick(&self) -> u64 {
        CLOCK.ticks(self.now)
    }

    fn read_register(&mut self, register: u64) -> u8 {
        let tick = self.tick();
        match self.channels.get_mut(register as usize) {
            Some(channel) => channel.read(tick),
            // The control word cannot be read.
            None => 0xff,
        }
    }

    fn write_register(&mut self, register: u64, value: u8) {
        let tick = self.tick();
        match self.channels.get_mut(register as usize) {
            Some(channel) => channel.write(tick, value),
            None if register == CONTROL => self.write_control(tick, value),
            None => {}
        }
        self.update();
    }

    fn write_control(&mut self, tick: u64, value: u8) {
        let access = value >> 4 & 3;
        match (self.channels.get_mut(usize::from(value >> 6)), access) {
            (None, _) => self.read_back(tick, value),
            (Some(channel), 0) => channel.latch_count(tick),
            (Some(channel), _) => channel.set_control(value),
        }
    }

    /// The read-back command; its bits 5 and 4 are active low.
    fn read_back(&mut self, tick: u64, command: u8) {
        for (index, channel) in self.channels.iter_mut().enumerate() {
            if command & 2 << index == 0 {
                continue;
            }
            if command & 0x20 == 0 {
                channel.latch_count(tick);
            }
            if command & 0x10 == 0 {
                channel.latch_status(tick);
            }
        }
    }

    fn read_port_b(&self) -> u8 {
        let tick = self.tick();
        let refresh = if (tick / REFRESH_TICKS).is_multiple_of(2) { 0 } else { REFRESH };
        let output = if self.channels[2].output(tick) { OUT2 } else { 0 };
        let gate = if self.channels[2].gate { GATE2 } else { 0 };
        self.port_b | gate | refresh | output
    }

    fn write_port_b(&mut self, value: u8) {
        self.port_b = value & KEPT;
        let tick = self.tick();
        self.channels[2].set_gate(tick, value & GATE2 != 0);
    }

    /// Drives the line to channel 0's level.
    fn update(&mut self) {
        let high = self.channels[0].output(self.tick());
        if high != self.irq_high {
            self.irq_high = high;
            self.irq.set(high);
        }
    }

    /// Shows the line a rise, wherever it stands.
    fn pulse(&mut self) {
        if self.irq_high {
            self.irq.set(false);
        }
        self.irq_high = true;
        self.irq.set(true);
    }
}

impl Device for Pit {
    fn name(&self) -> &str {
        SavedPit::NAME
    }

    fn read(&mut self, space: Space, offset: u64, data: &mut [u8]) {
        match space {
            Space::Port { range: 0 } => byte_bus::read(offset, data, |register| self.read_register(register)),
            _ => data.fill(self.read_port_b()),
        }
    }

    fn write(&mut self, space: Space, offset: u64, data: &[u8]) -> Effect {
        match (space, data) {
            (Space::Port { range: 0 }, _) => byte_bus::write(offset, data, |register, value| {
                self.write_register(register, value);
                Effect::None
            }),
            (_, &[value, ..]) => {
                self.write_port_b(value);
                Effect::None
            }
            _ => Effect::None,
        }
    }

    fn reset(&mut self) {
        self.channels = [Channel::new(true), Channel::new(true), Channel::new(false)];
        self.port_b = 0;
        self.update();
    }

    fn save(&self) -> Section {
        Section::new(&SavedPit::of(self))
    }

    fn restore(&mut self, saved: &Section) -> Result<(), StateError> {
        saved.decode::<SavedPit>()?.apply(self)?;
        self.irq.set(self.irq_high);
        Ok(())
    }

    fn deadline(&self) -> Option<u64> {
        let tick = self.tick();
        let next = self.channels[0].next_rise(tick)?;
        let later = self.channels[0].next_rise(next);
        // Rises that come too fast are told one for many.
        match later {
            Some(later) if later - next < LEAST_TICKS => Some(CLOCK.ns(next.max(tick + LEAST_TICKS))),
            _ => Some(CLOCK.ns(next)),
        }
    }

    fn advance(&mut self, now: u64) {
        let before = self.tick();
        self.now = self.now.max(now);
        let tick = self.tick();
        let rose = self.channels[0].next_rise(before).is_some_and(|rise| rise <= tick);
        for channel in &mut self.channels {
            channel.settle(tick);
        }
        if rose {
            self.pulse();
        }
        self.update();
    }
}

#[cfg(test)]
mod tests;
