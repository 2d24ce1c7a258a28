//! The PC's real-time clock and CMOS memory: an MC146818A (Motorola data sheet MC146818A).
//!
//! The time is not counted: it is the machine's clock plus the wall clock's reading when that was 0, plus what the
//! guest has set it forward or back. That sum is also the divider chain, so that all rates keep their phase to the
//! seconds.

mod alarm;
mod calendar;
mod saved;

use bitflags::bitflags;
use purlin_state::{Saved, Section, StateError};

use crate::{Device, Effect, IrqLine, Space, byte_bus};
use alarm::Alarm;
use calendar::TimeRegisters;
use saved::SavedRtc;

/// Registers, by their index. The time and its alarm are 0 to 9.
mod register {
    pub const SECOND: u8 = 0x00;
    pub const SECOND_ALARM: u8 = 0x01;
    pub const MINUTE: u8 = 0x02;
    pub const MINUTE_ALARM: u8 = 0x03;
    pub const HOUR: u8 = 0x04;
    pub const HOUR_ALARM: u8 = 0x05;
    pub const WEEKDAY: u8 = 0x06;
    pub const DAY: u8 = 0x07;
    pub const MONTH: u8 = 0x08;
    pub const YEAR: u8 = 0x09;
    pub const A: u8 = 0x0a;
    pub const B: u8 = 0x0b;
    pub const C: u8 = 0x0c;
    pub const D: u8 = 0x0d;
    /// By a PC's convention (and the FADT's field CENTURY).
    pub const CENTURY: u8 = 0x32;
}

/// Register A: update in progress.
const A_UIP: u8 = 1 << 7;
/// Register A: the divider chain's tap…
const A_DV: u8 = 7 << 4;
/// …for these two values and the one above it it is held in reset.
const A_DV_RESET: u8 = 6 << 4;
/// Register A: the periodic rate.
const A_RS: u8 = 0xf;
/// What firmware leaves in register A: 32,768 Hz, rate 1024 Hz.
const A_INITIAL: u8 = 0x26;
/// Register D: the battery is good.
const D_VRT: u8 = 1 << 7;

bitflags! {
    /// Register B.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct RegisterB: u8 {
        const DAYLIGHT_SAVING = 1 << 0;
        const HOURS_24 = 1 << 1;
        const BINARY = 1 << 2;
        const SQUARE_WAVE = 1 << 3;
        const UPDATE_INTERRUPT = 1 << 4;
        const ALARM_INTERRUPT = 1 << 5;
        const PERIODIC_INTERRUPT = 1 << 6;
        /// Software sets the time: updates stand still.
        const SET = 1 << 7;
    }

    /// Register C. Each flag has the place of its enable bit in register B.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Flags: u8 {
        const UPDATE = 1 << 4;
        const ALARM = 1 << 5;
        const PERIODIC = 1 << 6;
        const IRQF = 1 << 7;
    }
}

/// Nanoseconds in a second.
const SECOND: i128 = 1_000_000_000;
/// Half a second after the divider chain's reset ends comes the first update (data sheet, "Divider Stages").
const FIRST_UPDATE: i128 = SECOND / 2;
/// UIP is set this long before the time changes: an update takes 1984 µs and is announced 244 µs before
/// (data sheet, table 6, at 32,768 Hz).
const UPDATE: i128 = 2_228_000;
/// The crystal, Hz.
const CRYSTAL: i128 = 32_768;

/// Port 0x70: keeps NMIs from the processor.
const NMI_MASK: u8 = 1 << 7;

/// How much memory firmware tells of in CMOS.
#[derive(Clone, Copy, Debug)]
pub struct MemorySize {
    /// Bytes from 0 on below 4 GiB.
    pub below_4g: u64,
    /// Bytes from 4 GiB up.
    pub above_4g: u64,
}

/// The real-time clock. One port range of [`Rtc::PORTS`] ports at 0x70.
pub struct Rtc {
    irq: IrqLine,
    irq_high: bool,
    memory: MemorySize,
    /// Machine time, ns.
    now: u64,
    /// The wall clock (Unix time, ns) when the machine's clock was 0.
    wall: i128,
    /// What the guest has set the clock forward, ns.
    set_forward: i128,
    index: u8,
    nmi_masked: bool,
    /// Registers A (without UIP), B and C (without IRQF).
    a: u8,
    b: RegisterB,
    flags: Flags,
    alarm: Alarm,
    /// How far the guest's weekday is from the calendar's.
    weekday_shift: u8,
    /// The time registers while they stand still.
    held: Option<TimeRegisters>,
    ram: [u8; 128],
}

impl Rtc {
    /// Length of the port range.
    pub const PORTS: u16 = 2;
    /// The register that holds the century, for the FADT.
    pub const CENTURY: u8 = register::CENTURY;

    /// A clock that drives `irq` (IRQ 8). `wall_at_zero` is the wall clock (Unix time, ns) when the machine's clock
    /// reads 0; the guest gets it as UTC.
    pub fn new(irq: IrqLine, wall_at_zero: i64, memory: MemorySize) -> Self {
        let mut rtc = Self {
            irq,
            irq_high: false,
            memory,
            now: 0,
            wall: wall_at_zero.into(),
            set_forward: 0,
            index: 0,
            nmi_masked: false,
            a: A_INITIAL,
            b: RegisterB::HOURS_24,
            flags: Flags::empty(),
            alarm: Alarm::default(),
            weekday_shift: 0,
            held: None,
            ram: [0; 128],
        };
        rtc.write_memory_size();
        rtc
    }

    /// Sets the wall clock anew (Unix time in ns at 0 of the machine's clock), as after a restore: the machine's clock
    /// stood still in the meantime. What the guest has set its clock forward stays.
    pub fn set_wall_clock(&mut self, wall_at_zero: i64) {
        self.wall = wall_at_zero.into();
    }

    /// Whether the guest keeps NMIs from the processor (bit 7 of port 0x70).
    pub fn nmi_masked(&self) -> bool {
        self.nmi_masked
    }

    /// The bytes in which a PC's firmware leaves the size of memory.
    fn write_memory_size(&mut self) {
        const KIB: u64 = 1 << 10;
        const MIB: u64 = 1 << 20;
        let MemorySize { below_4g, above_4g } = self.memory;
        let above = |start: u64, unit: u64| (below_4g.saturating_sub(start) / unit).min(0xffff) as u16;
        let words = [
            (0x15, (below_4g / KIB).min(640) as u16),
            (0x17, above(MIB, KIB)),
            (0x30, above(MIB, KIB)),
            (0x34, above(16 * MIB, 64 * KIB)),
        ];
        for (index, word) in words {
            self.ram[index..index + 2].copy_from_slice(&word.to_le_bytes());
        }
        let high = (above_4g / (64 * KIB)).min(0xff_ffff) as u32;
        self.ram[0x5b..0x5e].copy_from_slice(&high.to_le_bytes()[..3]);
    }

    /// The clock's time at `now`: Unix time in ns, as far as the guest has set it right.
    fn time(&self, now: u64) -> i128 {
        i128::from(now) + self.wall + self.set_forward
    }

    /// The time in whole seconds.
    fn seconds(&self, now: u64) -> i64 {
        self.time(now).div_euclid(SECOND) as i64
    }

    fn divider_stopped(&self) -> bool {
        self.a & A_DV_RESET == A_DV_RESET
    }

    /// Whether the time goes on.
    fn is_running(&self) -> bool {
        !self.b.contains(RegisterB::SET) && !self.divider_stopped()
    }

    /// The periodic interrupt's period in ticks of the crystal, if there is one.
    fn period(&self) -> Option<i128> {
        match self.a & A_RS {
            _ if self.divider_stopped() => None,
            0 => None,
            // The two lowest are those of 256 and 128 Hz (data sheet, table 5).
            rate @ 1..=2 => Some(1 << (rate + 6)),
            rate => Some(1 << (rate - 1)),
        }
    }

    fn registers(&self) -> TimeRegisters {
        self.held.unwrap_or_else(|| {
            let mut registers = TimeRegisters::at(self.seconds(self.now), self.b);
            registers.weekday = (registers.weekday - 1 + self.weekday_shift) % 7 + 1;
            registers
        })
    }

    fn set_registers(&mut self, registers: TimeRegisters) {
        if self.held.is_some() {
            self.held = Some(registers);
            return;
        }
        let seconds = registers.seconds(self.b);
        self.set_forward += i128::from(seconds - self.seconds(self.now)) * SECOND;
        let calendar = TimeRegisters::at(seconds, self.b).weekday;
        self.weekday_shift = (i16::from(registers.weekday) - i16::from(calendar)).rem_euclid(7) as u8;
    }

    /// Stops or restarts the time after registers A or B have changed.
    fn hold_or_release(&mut self, before: TimeRegisters) {
        match (self.is_running(), self.held) {
            (false, None) => self.held = Some(before),
            (true, Some(registers)) => {
                self.held = None;
                self.set_registers(registers);
            }
            _ => {}
        }
    }

    fn read_indexed(&mut self) -> u8 {
        let time = self.registers();
        match self.index {
            register::SECOND => time.second,
            register::SECOND_ALARM => self.alarm.second,
            register::MINUTE => time.minute,
            register::MINUTE_ALARM => self.alarm.minute,
            register::HOUR => time.hour,
            register::HOUR_ALARM => self.alarm.hour,
            register::WEEKDAY => time.weekday,
            register::DAY => time.day,
            register::MONTH => time.month,
            register::YEAR => time.year,
            register::CENTURY => time.century,
            register::A => self.a | if self.update_in_progress() { A_UIP } else { 0 },
            register::B => self.b.bits(),
            register::C => self.take_flags(),
            register::D => D_VRT,
            index => self.ram[usize::from(index)],
        }
    }

    fn write_indexed(&mut self, value: u8) {
        let mut time = self.registers();
        match self.index {
            register::SECOND_ALARM => self.alarm.second = value,
            register::MINUTE_ALARM => self.alarm.minute = value,
            register::HOUR_ALARM => self.alarm.hour = value,
            register::A => return self.write_a(value),
            register::B => return self.write_b(value),
            register::C | register::D => {}
            register::SECOND => time.second = value,
            register::MINUTE => time.minute = value,
            register::HOUR => time.hour = value,
            register::WEEKDAY => time.weekday = value,
            register::DAY => time.day = value,
            register::MONTH => time.month = value,
            register::YEAR => time.year = value,
            register::CENTURY => time.century = value,
            index => self.ram[usize::from(index)] = value,
        }
        if time != self.registers() {
            self.set_registers(time);
        }
    }

    fn write_a(&mut self, value: u8) {
        let before = self.registers();
        let was_stopped = self.divider_stopped();
        self.a = value & (A_DV | A_RS);
        if was_stopped && !self.divider_stopped() {
            // The chain starts: half a second is left of the present one.
            let phase = self.time(self.now).rem_euclid(SECOND);
            self.set_forward += SECOND - FIRST_UPDATE - phase;
        }
        self.hold_or_release(before);
    }

    fn write_b(&mut self, value: u8) {
        let before = self.registers();
        let mut b = RegisterB::from_bits_retain(value);
        if b.contains(RegisterB::SET) {
            b.remove(RegisterB::UPDATE_INTERRUPT);
        }
        self.b = b;
        self.hold_or_release(before);
        self.update();
    }

    /// Reading register C clears it, and with it the interrupt.
    fn take_flags(&mut self) -> u8 {
        let mut flags = std::mem::replace(&mut self.flags, Flags::empty());
        flags.set(Flags::IRQF, self.irq_high);
        self.update();
        flags.bits()
    }

    fn update_in_progress(&self) -> bool {
        self.is_running() && self.time(self.now).rem_euclid(SECOND) >= SECOND - UPDATE
    }

    fn enabled(&self) -> Flags {
        Flags::from_bits_truncate(self.b.bits()) - Flags::IRQF
    }

    fn update(&mut self) {
        let high = self.flags.intersects(self.enabled());
        if high != self.irq_high {
            self.irq_high = high;
            self.irq.set(high);
        }
    }

    /// What happens after `before` and until `now`. A flag that is set already stays one: periods that nobody has
    /// asked for by reading register C are not counted.
    fn events(&self, before: u64, now: u64) -> Flags {
        let mut flags = Flags::empty();
        let crystal = |ns| self.time(ns) * CRYSTAL;
        if let Some(period) = self.period() {
            let length = period * SECOND;
            flags.set(Flags::PERIODIC, crystal(before).div_euclid(length) != crystal(now).div_euclid(length));
        }
        let (from, to) = (self.seconds(before), self.seconds(now));
        if self.is_running() && from != to {
            flags |= Flags::UPDATE;
            flags.set(Flags::ALARM, self.alarm.seconds_until(from, self.b).is_some_and(|seconds| seconds <= to - from));
        }
        flags
    }

    /// When `flag` is next set, in the clock's time.
    fn next(&self, flag: Flags) -> Option<i128> {
        if flag == Flags::PERIODIC {
            let length = self.period()? * SECOND;
            let next = ((self.time(self.now) * CRYSTAL).div_euclid(length) + 1) * length;
            return Some((next + CRYSTAL - 1).div_euclid(CRYSTAL));
        }
        if !self.is_running() {
            return None;
        }
        let seconds = self.seconds(self.now);
        let until = if flag == Flags::ALARM { self.alarm.seconds_until(seconds, self.b)? } else { 1 };
        Some(i128::from(seconds + until) * SECOND)
    }
}

impl Device for Rtc {
    fn name(&self) -> &str {
        SavedRtc::NAME
    }

    fn read(&mut self, _: Space, offset: u64, data: &mut [u8]) {
        // The index cannot be read.
        byte_bus::read(offset, data, |port| if port == 1 { self.read_indexed() } else { 0xff });
    }

    fn write(&mut self, _: Space, offset: u64, data: &[u8]) -> Effect {
        byte_bus::write(offset, data, |port, value| {
            match port {
                0 => (self.index, self.nmi_masked) = (value & !NMI_MASK, value & NMI_MASK != 0),
                1 => self.write_indexed(value),
                _ => {}
            }
            Effect::None
        })
    }

    /// The battery keeps time, alarm and memory. Firmware sets the rest up again.
    fn reset(&mut self) {
        let before = self.registers();
        (self.index, self.nmi_masked) = (0, false);
        self.flags = Flags::empty();
        // Whatever was being set is taken in the format that it was written in.
        let format = self.b & (RegisterB::BINARY | RegisterB::HOURS_24);
        (self.a, self.b) = (A_INITIAL, format);
        self.hold_or_release(before);
        self.b = RegisterB::HOURS_24;
        self.write_memory_size();
        self.update();
    }

    fn save(&self) -> Section {
        Section::new(&SavedRtc::of(self))
    }

    fn restore(&mut self, saved: &Section) -> Result<(), StateError> {
        saved.decode::<SavedRtc>()?.apply(self)?;
        self.irq_high = self.flags.intersects(self.enabled());
        self.irq.set(self.irq_high);
        Ok(())
    }

    fn deadline(&self) -> Option<u64> {
        if self.irq_high {
            return None;
        }
        let next = self.enabled().iter().filter_map(|flag| self.next(flag)).min()?;
        u64::try_from(next - self.wall - self.set_forward).ok()
    }

    fn advance(&mut self, now: u64) {
        let before = self.now;
        self.now = before.max(now);
        if before != self.now {
            self.flags |= self.events(before, self.now);
            self.update();
        }
    }
}

#[cfg(test)]
mod tests;
