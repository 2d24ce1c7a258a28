//! An 8042 keyboard controller without a keyboard: kernels reset the machine by it, and those that look for a keyboard
//! learn at once that there is none instead of waiting for one.

use prost::Message;
use purlin_state::{Saved, Section, StateError};

use crate::{Device, Effect, IrqLine, Space};

/// Status: there is a byte to read.
const OUTPUT_FULL: u8 = 1 << 0;
/// Status: the self test passed; also a bit of the command byte.
const SYSTEM: u8 = 1 << 2;
/// Status: the last store was a command.
const COMMAND: u8 = 1 << 3;
/// Status: the keyboard is not locked.
const UNLOCKED: u8 = 1 << 4;
/// Status: the device did not answer in time.
const TIMEOUT: u8 = 1 << 6;

/// Command byte: a byte to read interrupts.
const INTERRUPT: u8 = 1 << 0;
/// Command byte: the keyboard's clock is held.
const DISABLED: u8 = 1 << 4;
/// Command byte after power-up: tested, no interrupts, nothing enabled.
const INITIAL: u8 = 0x20 | DISABLED | SYSTEM;

/// Output port: low resets the processor.
const OUTPUT_RESET: u8 = 1 << 0;
/// Output port: address line 20, always on here.
const OUTPUT_A20: u8 = 1 << 1;

/// What a device says to a byte that it did not understand; with [`TIMEOUT`], what the controller says for it.
const RESEND: u8 = 0xfe;

/// Where the next byte stored to the data port goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
enum Target {
    /// To the keyboard, which there is not.
    Device = 0,
    CommandByte = 1,
    OutputPort = 2,
    /// Back, as if the keyboard had sent it.
    OutputBuffer = 3,
    /// Nowhere.
    Nothing = 4,
}

/// The keyboard controller. Two port ranges of one port each: 0x60 (data) and 0x64 (status and commands).
pub struct I8042 {
    irq: IrqLine,
    irq_high: bool,
    command_byte: u8,
    /// The byte to read.
    output: Option<u8>,
    /// The data port's last byte.
    data: u8,
    /// It stands for an answer that did not come.
    timeout: bool,
    last_was_command: bool,
    target: Target,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct SavedI8042 {
    #[prost(uint32, tag = "1")]
    command_byte: u32,
    #[prost(uint32, optional, tag = "2")]
    output: Option<u32>,
    #[prost(uint32, tag = "3")]
    data: u32,
    #[prost(bool, tag = "4")]
    timeout: bool,
    #[prost(bool, tag = "5")]
    last_was_command: bool,
    #[prost(enumeration = "Target", tag = "6")]
    target: i32,
}

impl Saved for SavedI8042 {
    const NAME: &'static str = "i8042";
    const VERSION: u32 = 1;
}

impl I8042 {
    /// Length of each port range.
    pub const PORTS: u16 = 1;

    /// A controller that drives `irq` (IRQ 1).
    pub fn new(irq: IrqLine) -> Self {
        Self {
            irq,
            irq_high: false,
            command_byte: INITIAL,
            output: None,
            data: 0,
            timeout: false,
            last_was_command: false,
            target: Target::Device,
        }
    }

    fn status(&self) -> u8 {
        let bits = [
            (OUTPUT_FULL, self.output.is_some()),
            (COMMAND, self.last_was_command),
            (UNLOCKED, true),
            (TIMEOUT, self.timeout),
        ];
        let set = bits.into_iter().filter(|&(_, on)| on).fold(0, |status, (bit, _)| status | bit);
        set | self.command_byte & SYSTEM
    }

    fn read_data(&mut self) -> u8 {
        if let Some(byte) = self.output.take() {
            self.data = byte;
        }
        self.data
    }

    fn answer(&mut self, byte: u8) {
        self.output = Some(byte);
        self.timeout = false;
    }

    fn write_data(&mut self, value: u8) -> Effect {
        self.last_was_command = false;
        match std::mem::replace(&mut self.target, Target::Device) {
            Target::CommandByte => self.command_byte = value,
            Target::OutputPort if value & OUTPUT_RESET == 0 => return Effect::Reset,
            Target::OutputBuffer => self.answer(value),
            Target::OutputPort | Target::Nothing => {}
            Target::Device => {
                self.answer(RESEND);
                self.timeout = true;
            }
        }
        Effect::None
    }

    fn command(&mut self, command: u8) -> Effect {
        self.last_was_command = true;
        self.target = Target::Device;
        match command {
            0x20 => self.answer(self.command_byte),
            0x60 => self.target = Target::CommandByte,
            // No port for a mouse: its test fails (clock stuck low), and its echo comes back as a keyboard's.
            0xa9 => self.answer(0x01),
            0xd3 => self.target = Target::OutputBuffer,
            0xd4 => self.target = Target::Device,
            0xaa => {
                self.command_byte |= SYSTEM;
                self.answer(0x55);
            }
            // The keyboard's lines are as they should be.
            0xab => self.answer(0x00),
            0xad => self.command_byte |= DISABLED,
            0xae => self.command_byte &= !DISABLED,
            // Input port: not inhibited.
            0xc0 => self.answer(0x80),
            0xd0 => self.answer(OUTPUT_RESET | OUTPUT_A20),
            0xd1 => self.target = Target::OutputPort,
            0xd2 => self.target = Target::OutputBuffer,
            // Other cells of the controller's memory.
            0x61..=0x7f => self.target = Target::Nothing,
            0x21..=0x3f => self.answer(0),
            // Pulses those lines of the output port whose bit is 0.
            0xf0..=0xff if command & OUTPUT_RESET == 0 => return Effect::Reset,
            _ => {}
        }
        Effect::None
    }

    fn update(&mut self) {
        let high = self.output.is_some() && self.command_byte & INTERRUPT != 0;
        if high != self.irq_high {
            self.irq_high = high;
            self.irq.set(high);
        }
    }
}

impl Device for I8042 {
    fn name(&self) -> &str {
        SavedI8042::NAME
    }

    fn read(&mut self, space: Space, _: u64, data: &mut [u8]) {
        let byte = if space == (Space::Port { range: 0 }) { self.read_data() } else { self.status() };
        data.fill(byte);
        self.update();
    }

    fn write(&mut self, space: Space, _: u64, data: &[u8]) -> Effect {
        let Some(&value) = data.first() else { return Effect::None };
        let is_data = space == Space::Port { range: 0 };
        let effect = if is_data { self.write_data(value) } else { self.command(value) };
        self.update();
        effect
    }

    fn reset(&mut self) {
        self.command_byte = INITIAL;
        (self.output, self.data, self.timeout) = (None, 0, false);
        (self.last_was_command, self.target) = (false, Target::Device);
        self.update();
    }

    fn save(&self) -> Section {
        Section::new(&SavedI8042 {
            command_byte: self.command_byte.into(),
            output: self.output.map(u32::from),
            data: self.data.into(),
            timeout: self.timeout,
            last_was_command: self.last_was_command,
            target: self.target.into(),
        })
    }

    fn restore(&mut self, saved: &Section) -> Result<(), StateError> {
        let saved: SavedI8042 = saved.decode()?;
        self.target = Target::try_from(saved.target)
            .map_err(|_| StateError::corrupt(SavedI8042::NAME, format!("no target {}", saved.target)))?;
        self.command_byte = saved.command_byte as u8;
        self.output = saved.output.map(|byte| byte as u8);
        self.data = saved.data as u8;
        self.timeout = saved.timeout;
        self.last_was_command = saved.last_was_command;
        self.irq_high = self.output.is_some() && self.command_byte & INTERRUPT != 0;
        self.irq.set(self.irq_high);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::{Probe, goes_on_after_restore, inb, outb, steps};

    fn controller() -> (I8042, Probe) {
        let irq = Probe::default();
        (I8042::new(irq.line()), irq)
    }

    /// A command with parameters, and what it answers.
    fn command(i8042: &mut I8042, command: u8, parameters: &[u8]) -> Option<u8> {
        assert_eq!(outb(i8042, 1, 0, command), Effect::None);
        for &byte in parameters {
            assert_eq!(outb(i8042, 0, 0, byte), Effect::None);
        }
        (inb(i8042, 1, 0) & OUTPUT_FULL != 0).then(|| inb(i8042, 0, 0))
    }

    #[test]
    fn the_ways_to_reset() {
        let (mut i8042, _) = controller();
        for value in 0xf0..=0xff {
            let expected = if value & 1 == 0 { Effect::Reset } else { Effect::None };
            assert_eq!(outb(&mut i8042, 1, 0, value), expected, "{value:#x}");
        }
        assert_eq!(command(&mut i8042, 0xd1, &[0xdf]), None);
        assert_eq!(outb(&mut i8042, 1, 0, 0xd1), Effect::None);
        assert_eq!(outb(&mut i8042, 0, 0, 0xde), Effect::Reset);
    }

    #[test]
    fn software_never_waits_for_the_input_buffer() {
        let (mut i8042, _) = controller();
        assert_eq!(inb(&mut i8042, 1, 0), 0x14);
        assert_eq!(outb(&mut i8042, 1, 0, 0xae), Effect::None);
        assert_eq!(inb(&mut i8042, 1, 0), 0x1c);
    }

    #[test]
    fn commands_answer() {
        let (mut i8042, _) = controller();
        for (code, parameters, answer) in [
            (0x20, &[][..], Some(0x34)),
            (0xaa, &[], Some(0x55)),
            (0xab, &[], Some(0x00)),
            (0xa9, &[], Some(0x01)),
            (0xd0, &[], Some(0x03)),
            (0xae, &[], None),
            (0x20, &[], Some(0x24)),
            (0xad, &[], None),
            (0x20, &[], Some(0x34)),
            (0x60, &[0x65], None),
            (0x20, &[], Some(0x65)),
            (0x65, &[0xff], None),
            (0xd2, &[0x1c], Some(0x1c)),
            (0xd3, &[0x5a], Some(0x5a)),
        ] {
            assert_eq!(command(&mut i8042, code, parameters), answer, "command {code:#x}");
        }
    }

    #[test]
    fn no_keyboard_answers_and_the_controller_says_so_at_once() {
        let (mut i8042, irq) = controller();
        command(&mut i8042, 0x60, &[0x25]);
        assert_eq!(outb(&mut i8042, 0, 0, 0xff), Effect::None);
        assert!(irq.is_high());
        assert_eq!(inb(&mut i8042, 1, 0) & (TIMEOUT | OUTPUT_FULL), TIMEOUT | OUTPUT_FULL);
        assert_eq!(inb(&mut i8042, 0, 0), RESEND);
        assert!(!irq.is_high());
        assert_eq!(inb(&mut i8042, 1, 0) & OUTPUT_FULL, 0);
        assert_eq!(command(&mut i8042, 0xaa, &[]), Some(0x55));
        assert_eq!(inb(&mut i8042, 1, 0) & TIMEOUT, 0);
    }

    #[test]
    fn a_corrupt_state_is_refused() {
        let (mut i8042, _) = controller();
        let bad = Section::new(&SavedI8042 { target: 9, ..SavedI8042::default() });
        assert!(matches!(i8042.restore(&bad), Err(StateError::Corrupt { .. })));
    }

    proptest! {
        #[test]
        fn any_state_can_be_saved_and_goes_on(before in steps(), after in steps()) {
            let ranges = [(Space::Port { range: 0 }, 1), (Space::Port { range: 1 }, 1)];
            goes_on_after_restore(|| I8042::new(IrqLine::unconnected()), &ranges, |_, _| {}, &before, &after);
        }
    }
}
