//! ACPI's fixed hardware (ACPI 6.5 4.8): the PM1a event and control registers and the power management timer.
//!
//! There is no SMM and so no legacy mode: SCI_EN is always set.

use bitflags::bitflags;
use prost::Message;
use purlin_state::{Saved, Section, StateError};

use crate::{Device, Effect, IrqLine, Space, byte_bus, frequency::Frequency};

/// The timer's clock (ACPI 6.5 4.8.2.1).
const CLOCK: Frequency = Frequency(3_579_545);

/// A change of the timer's highest bit sets TMR_STS.
const TIMER_HALF: u64 = 1 << 31;

bitflags! {
    /// PM1 status and enable bits (ACPI 6.5 4.8.3.1).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Pm1: u16 {
        const TIMER = 1 << 0;
        const GLOBAL = 1 << 5;
        const POWER_BUTTON = 1 << 8;
        /// The real-time clock's alarm. It wakes nobody here, so its status never comes; but kernels check that the
        /// enable bit is there.
        const CLOCK = 1 << 10;
    }
}

/// PM1 control: the SCI is enabled.
const SCI_EN: u16 = 1 << 0;
/// PM1 control: the sleep type.
const SLP_TYP: u16 = 7 << 10;
/// PM1 control, second byte: the sleep type…
const SLP_TYP_SHIFT: u8 = 2;
/// …and the store that goes to sleep; reads as 0.
const SLP_EN: u8 = 1 << 5;

/// The fixed hardware. One port range of [`AcpiPm::PORTS`] ports, with the register blocks at these offsets.
pub struct AcpiPm {
    sci: IrqLine,
    sci_high: bool,
    /// Machine time, ns.
    now: u64,
    status: Pm1,
    enable: Pm1,
    /// PM1 control's SLP_TYP, in place.
    sleep_type: u16,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct SavedAcpiPm {
    /// Machine time, ns.
    #[prost(uint64, tag = "1")]
    now: u64,
    /// PM1 status.
    #[prost(uint32, tag = "2")]
    status: u32,
    /// PM1 enable.
    #[prost(uint32, tag = "3")]
    enable: u32,
    /// PM1 control.
    #[prost(uint32, tag = "4")]
    control: u32,
}

impl Saved for SavedAcpiPm {
    const NAME: &'static str = "acpi-pm";
    const VERSION: u32 = 1;
}

impl AcpiPm {
    /// Length of the port range.
    pub const PORTS: u16 = 16;
    /// Offset of PM1a_EVT_BLK: status, then enable.
    pub const EVENT: u16 = 0;
    /// Length of PM1a_EVT_BLK.
    pub const EVENT_LENGTH: u8 = 4;
    /// Offset of PM1a_CNT_BLK.
    pub const CONTROL: u16 = 4;
    /// Length of PM1a_CNT_BLK.
    pub const CONTROL_LENGTH: u8 = 2;
    /// Offset of PM_TMR_BLK. The timer has 32 bits (FADT flag TMR_VAL_EXT).
    pub const TIMER: u16 = 8;
    /// Length of PM_TMR_BLK.
    pub const TIMER_LENGTH: u8 = 4;
    /// The sleep type that the DSDT's `_S5` names: power off.
    pub const SLEEP_TYPE_S5: u8 = 5;

    /// Fixed hardware that drives `sci`, a level.
    pub fn new(sci: IrqLine) -> Self {
        Self { sci, sci_high: false, now: 0, status: Pm1::empty(), enable: Pm1::empty(), sleep_type: 0 }
    }

    /// Somebody presses the power button.
    pub fn press_power_button(&mut self) {
        self.status |= Pm1::POWER_BUTTON;
        self.update();
    }

    fn read_register(&self, offset: u64) -> u8 {
        let [status, enable] = [self.status, self.enable].map(|register| register.bits().to_le_bytes());
        let control = (SCI_EN | self.sleep_type).to_le_bytes();
        let timer = (CLOCK.ticks(self.now) as u32).to_le_bytes();
        let ports = [status, enable, control, [0; 2], [timer[0], timer[1]], [timer[2], timer[3]]];
        ports.as_flattened().get(offset as usize).copied().unwrap_or(0)
    }

    fn write_register(&mut self, offset: u64, value: u8) -> Effect {
        let half = u16::from(value) << (8 * (offset & 1));
        match offset {
            // A status bit is cleared by storing a one.
            0 | 1 => self.status &= !Pm1::from_bits_truncate(half),
            2 | 3 => {
                let other = self.enable.bits() & if offset == 2 { 0xff00 } else { 0x00ff };
                self.enable = Pm1::from_bits_truncate(other | half);
            }
            5 => return self.control_sleep(value),
            _ => {}
        }
        self.update();
        Effect::None
    }

    /// The second byte of PM1 control. Sleep types other than S5 are not offered, and do nothing.
    fn control_sleep(&mut self, value: u8) -> Effect {
        self.sleep_type = u16::from(value) << 8 & SLP_TYP;
        let asked = value >> SLP_TYP_SHIFT & 7;
        match (value & SLP_EN != 0, asked) {
            (true, Self::SLEEP_TYPE_S5) => Effect::PowerOff,
            (true, _) => {
                tracing::warn!("the guest asks for sleep type {asked}, which there is not");
                Effect::None
            }
            (false, _) => Effect::None,
        }
    }

    fn update(&mut self) {
        let high = self.status.intersects(self.enable);
        if high != self.sci_high {
            self.sci_high = high;
            self.sci.set(high);
        }
    }
}

impl Device for AcpiPm {
    fn name(&self) -> &str {
        SavedAcpiPm::NAME
    }

    fn read(&mut self, _: Space, offset: u64, data: &mut [u8]) {
        byte_bus::read(offset, data, |register| self.read_register(register));
    }

    fn write(&mut self, _: Space, offset: u64, data: &[u8]) -> Effect {
        byte_bus::write(offset, data, |register, value| self.write_register(register, value))
    }

    fn reset(&mut self) {
        self.status = Pm1::empty();
        self.enable = Pm1::empty();
        self.sleep_type = 0;
        self.update();
    }

    fn save(&self) -> Section {
        Section::new(&SavedAcpiPm {
            now: self.now,
            status: self.status.bits().into(),
            enable: self.enable.bits().into(),
            control: self.sleep_type.into(),
        })
    }

    fn restore(&mut self, saved: &Section) -> Result<(), StateError> {
        let saved: SavedAcpiPm = saved.decode()?;
        self.now = saved.now;
        self.status = Pm1::from_bits_truncate(saved.status as u16);
        self.enable = Pm1::from_bits_truncate(saved.enable as u16);
        self.sleep_type = saved.control as u16 & SLP_TYP;
        self.sci_high = self.status.intersects(self.enable);
        self.sci.set(self.sci_high);
        Ok(())
    }

    fn deadline(&self) -> Option<u64> {
        let awaited = self.enable.contains(Pm1::TIMER) && !self.status.contains(Pm1::TIMER);
        awaited.then(|| CLOCK.ns((CLOCK.ticks(self.now) / TIMER_HALF + 1) * TIMER_HALF))
    }

    fn advance(&mut self, now: u64) {
        let halves = |ns| CLOCK.ticks(ns) / TIMER_HALF;
        if halves(now) > halves(self.now) {
            self.status |= Pm1::TIMER;
        }
        self.now = self.now.max(now);
        self.update();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::{Probe, goes_on_after_restore, steps};

    const PORT: Space = Space::Port { range: 0 };

    fn pm() -> (AcpiPm, Probe) {
        let sci = Probe::default();
        (AcpiPm::new(sci.line()), sci)
    }

    fn read<const N: usize>(pm: &mut AcpiPm, offset: u16) -> [u8; N] {
        let mut data = [0; N];
        pm.read(PORT, offset.into(), &mut data);
        data
    }

    fn write16(pm: &mut AcpiPm, offset: u16, value: u16) -> Effect {
        pm.write(PORT, offset.into(), &value.to_le_bytes())
    }

    #[test]
    fn only_sleep_type_5_with_slp_en_powers_off() {
        for sleep_type in 0..8u16 {
            let (mut pm, _) = pm();
            assert_eq!(write16(&mut pm, AcpiPm::CONTROL, sleep_type << 10), Effect::None);
            let expected = if sleep_type == 5 { Effect::PowerOff } else { Effect::None };
            assert_eq!(write16(&mut pm, AcpiPm::CONTROL, 1 << 13 | sleep_type << 10), expected);
            let control = u16::from_le_bytes(read(&mut pm, AcpiPm::CONTROL));
            assert_eq!(control, 1 | sleep_type << 10, "SCI_EN is set, SLP_EN reads as 0");
        }
        let (mut pm, _) = pm();
        assert_eq!(pm.write(PORT, 5, &[0x34]), Effect::PowerOff, "as a byte");
    }

    #[test]
    fn the_timer_counts_at_its_frequency() {
        let (mut pm, _) = pm();
        for (ns, ticks) in [(0, 0), (1_000_000_000, 3_579_545), (280, 1), (279, 0), (1 << 60, 0xcb5a_5bec_u32)] {
            pm.now = ns;
            assert_eq!(u32::from_le_bytes(read(&mut pm, AcpiPm::TIMER)), ticks, "at {ns}");
        }
        pm.now = 1_000_000_000;
        let _ = pm.write(PORT, AcpiPm::TIMER.into(), &[0xff; 4]);
        assert_eq!(u32::from_le_bytes(read(&mut pm, AcpiPm::TIMER)), 3_579_545);
    }

    #[test]
    fn the_timers_highest_bit_interrupts_if_enabled() {
        let (mut pm, sci) = pm();
        assert_eq!(pm.deadline(), None);
        let _ = write16(&mut pm, 2, 1);
        let change = 599_932_015_941;
        assert_eq!(pm.deadline(), Some(change));
        pm.advance(change - 1);
        assert!(!sci.is_high());
        pm.advance(pm.deadline().unwrap());
        assert!(sci.is_high());
        assert_eq!(u32::from_le_bytes(read(&mut pm, AcpiPm::TIMER)), 1 << 31);
        assert_eq!((pm.deadline(), read(&mut pm, AcpiPm::EVENT)), (None, [1, 0]));
        let _ = write16(&mut pm, 0, 0);
        assert!(sci.is_high(), "only a one clears");
        let _ = write16(&mut pm, 0, 1);
        assert!(!sci.is_high());
        assert!(pm.deadline().is_some());
    }

    #[test]
    fn the_power_button_interrupts_if_enabled() {
        let (mut pm, sci) = pm();
        pm.press_power_button();
        assert!(!sci.is_high());
        assert_eq!(read(&mut pm, AcpiPm::EVENT), [0, 1]);
        let _ = write16(&mut pm, 2, 0xffff);
        assert_eq!(read(&mut pm, 2), [0x21, 0x05]);
        assert!(sci.is_high());
        let _ = pm.write(PORT, 1, &[0x01]);
        assert!(!sci.is_high());
        let _ = pm.write(PORT, 3, &[0]);
        assert_eq!(read(&mut pm, 2), [0x21, 0x00], "a byte leaves the other");
    }

    proptest! {
        #[test]
        fn any_state_can_be_saved_and_goes_on(before in steps(), after in steps()) {
            let press = |pm: &mut AcpiPm, _| pm.press_power_button();
            goes_on_after_restore(|| AcpiPm::new(IrqLine::unconnected()), &[(PORT, 16)], press, &before, &after);
        }
    }
}
