use proptest::prelude::*;

use super::{register::*, *};
// The register, not the length of a second.
use super::register::SECOND;
use crate::testing::{Probe, goes_on_after_restore, inb, outb, steps};

/// 2024-02-29 23:59:50 UTC, a Thursday.
const WALL: i64 = (19_782 * 86_400 + 86_390) * 1_000_000_000;
const NS: u64 = 1_000_000_000;
const MEMORY: MemorySize = MemorySize { below_4g: 3 << 30, above_4g: 5 << 30 };

struct Bench {
    rtc: Rtc,
    irq: Probe,
}

fn bench() -> Bench {
    let irq = Probe::default();
    Bench { rtc: Rtc::new(irq.line(), WALL, MEMORY), irq }
}

impl Bench {
    fn read(&mut self, index: u8) -> u8 {
        assert_eq!(outb(&mut self.rtc, 0, 0, index), Effect::None);
        inb(&mut self.rtc, 0, 1)
    }

    fn write(&mut self, index: u8, value: u8) {
        assert_eq!(outb(&mut self.rtc, 0, 0, index), Effect::None);
        assert_eq!(outb(&mut self.rtc, 0, 1, value), Effect::None);
    }

    /// Century, year, month, day, hour, minute, second.
    fn time(&mut self) -> [u8; 7] {
        [CENTURY, YEAR, MONTH, DAY, HOUR, MINUTE, SECOND].map(|index| self.read(index))
    }

    /// Keeps the deadlines until `end`; returns how often the interrupt came, each answered by reading register C.
    fn run_until(&mut self, end: u64) -> Vec<(u64, u8)> {
        let mut interrupts = Vec::new();
        while let Some(at) = self.rtc.deadline().filter(|&at| at <= end) {
            self.rtc.advance(at);
            assert!(self.irq.is_high(), "for nothing at {at}");
            interrupts.push((at, self.read(C)));
            assert!(!self.irq.is_high());
        }
        self.rtc.advance(end);
        interrupts
    }
}

#[test]
fn the_time_is_the_wall_clocks() {
    let mut b = bench();
    assert_eq!(b.time(), [0x20, 0x24, 0x02, 0x29, 0x23, 0x59, 0x50]);
    assert_eq!(b.read(WEEKDAY), 5);
    b.rtc.advance(10 * NS - 1);
    assert_eq!(b.time(), [0x20, 0x24, 0x02, 0x29, 0x23, 0x59, 0x59]);
    b.rtc.advance(10 * NS);
    assert_eq!(b.time(), [0x20, 0x24, 0x03, 0x01, 0x00, 0x00, 0x00]);
    assert_eq!(b.read(WEEKDAY), 6);
    b.write(B, 0x04);
    assert_eq!(b.time(), [20, 24, 3, 1, 12, 0, 0]);
    b.rtc.set_wall_clock(WALL + 3600 * NS as i64);
    assert_eq!(b.time(), [20, 24, 3, 1, 1, 0, 0]);
}

#[test]
fn registers_after_power_up() {
    let mut b = bench();
    for (index, value) in [(A, 0x26), (B, 0x02), (C, 0x00), (D, 0x80)] {
        assert_eq!(b.read(index), value, "register {index:#x}");
    }
    assert_eq!(inb(&mut b.rtc, 0, 0), 0xff);
    b.write(D, 0);
    b.write(C, 0xff);
    assert_eq!((b.read(C), b.read(D)), (0, 0x80));
    b.write(0x8f, 0x5a);
    assert!(b.rtc.nmi_masked());
    assert_eq!(b.read(0x0f), 0x5a);
    assert!(!b.rtc.nmi_masked());
}

#[test]
fn memory_sizes() {
    let mut b = bench();
    let mut words = |low: u8| u16::from_le_bytes([b.read(low), b.read(low + 1)]);
    assert_eq!((words(0x15), words(0x17), words(0x30)), (640, 0xffff, 0xffff));
    assert_eq!(words(0x34), (((3u64 << 30) - (16 << 20)) >> 16) as u16);
    assert_eq!((words(0x5b), words(0x5c)), (0x4000, 0x0140), "5 GiB are 0x1_4000 units");
    let small = Rtc::new(IrqLine::unconnected(), 0, MemorySize { below_4g: 8 << 20, above_4g: 0 });
    assert_eq!(small.ram[0x17..0x19], (7u16 * 1024).to_le_bytes());
    assert_eq!(small.ram[0x34..0x36], [0, 0]);
}

#[test]
fn setting_the_time_as_linux_does() {
    let mut b = bench();
    b.rtc.advance(NS / 4);
    let (a, control) = (b.read(A), b.read(B));
    b.write(B, control | 0x80);
    b.write(A, a | 0x70);
    for (index, value) in
        [(CENTURY, 0x19), (YEAR, 0x99), (MONTH, 0x12), (DAY, 0x31), (HOUR, 0x23), (MINUTE, 0x59), (SECOND, 0x59)]
    {
        b.write(index, value);
    }
    b.rtc.advance(5 * NS);
    assert_eq!(b.time(), [0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x59], "it stands still");
    b.write(B, control);
    b.rtc.advance(6 * NS);
    assert_eq!(b.read(SECOND), 0x59, "so it does while the divider is reset");
    b.write(A, a);
    // The first update comes half a second after the reset.
    b.rtc.advance(6 * NS + NS / 2 - 1);
    assert_eq!(b.time(), [0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x59]);
    b.rtc.advance(6 * NS + NS / 2);
    assert_eq!(b.time(), [0x20, 0x00, 0x01, 0x01, 0x00, 0x00, 0x00]);
    // What the guest set survives a new wall clock.
    b.rtc.set_wall_clock(WALL + 60 * NS as i64);
    assert_eq!(b.time(), [0x20, 0x00, 0x01, 0x01, 0x00, 0x01, 0x00]);
}

#[test]
fn set_alone_keeps_the_phase_of_the_second() {
    let mut b = bench();
    b.rtc.advance(NS / 4);
    b.write(B, 0x92);
    assert_eq!(b.read(B), 0x82, "SET clears the update interrupt's enable");
    b.rtc.advance(3 * NS + NS / 2);
    assert_eq!(b.read(SECOND), 0x50);
    b.write(B, 0x02);
    b.rtc.advance(4 * NS - 1);
    assert_eq!(b.read(SECOND), 0x50);
    b.rtc.advance(4 * NS);
    assert_eq!(b.read(SECOND), 0x51);
    // A single register of a running clock.
    b.write(HOUR, 0x07);
    b.write(WEEKDAY, 0x01);
    assert_eq!(b.time(), [0x20, 0x24, 0x02, 0x29, 0x07, 0x59, 0x51]);
    assert_eq!(b.read(WEEKDAY), 1);
    b.rtc.advance(4 * NS + 86_400 * NS);
    assert_eq!(b.read(WEEKDAY), 2);
}

#[test]
fn update_in_progress_before_each_second() {
    let mut b = bench();
    for (at, uip) in [(NS - 2_228_001, 0), (NS - 2_228_000, 0x80), (NS - 1, 0x80), (NS, 0)] {
        b.rtc.advance(at);
        assert_eq!(b.read(A) & 0x80, uip, "at {at}");
    }
    b.rtc.advance(2 * NS - 1);
    b.write(B, 0x82);
    assert_eq!(b.read(A) & 0x80, 0, "never while the time is being set");
}

#[test]
fn the_update_interrupt_comes_every_second() {
    let mut b = bench();
    assert_eq!(b.rtc.deadline(), None);
    b.rtc.advance(NS / 2);
    b.write(B, 0x12);
    assert_eq!(b.run_until(4 * NS), [1, 2, 3, 4].map(|second| (second * NS, 0xd0)));
    b.write(B, 0x02);
    assert_eq!(b.rtc.deadline(), None);
    b.rtc.advance(6 * NS);
    assert_eq!(b.read(C), 0x50, "flags without interrupt");
    b.rtc.advance(7 * NS);
    b.write(B, 0x12);
    assert!(b.irq.is_high(), "enabling it finds the flag");
    assert_eq!(b.rtc.deadline(), None, "nothing more happens before register C is read");
}

#[test]
fn the_periodic_interrupt_has_the_rates_of_table_5() {
    for (rate, per_second) in [
        (1, 256),
        (2, 128),
        (3, 8192),
        (4, 4096),
        (5, 2048),
        (6, 1024),
        (7, 512),
        (8, 256),
        (9, 128),
        (10, 64),
        (11, 32),
        (12, 16),
        (13, 8),
        (14, 4),
        (15, 2),
    ] {
        let mut b = bench();
        b.write(A, 0x20 | rate);
        b.write(B, 0x42);
        let interrupts = b.run_until(3 * NS);
        assert_eq!(interrupts.len(), 3 * per_second, "rate {rate}");
        for (i, (at, flags)) in (1..).zip(interrupts) {
            assert_eq!(at, (i * NS).div_ceil(per_second as u64), "rate {rate}");
            assert_eq!(flags & 0xc0, 0xc0);
        }
    }
    for a in [0x20, 0x66, 0x76] {
        let mut b = bench();
        b.write(A, a);
        b.write(B, 0x42);
        assert_eq!(b.run_until(3 * NS), [], "register A {a:#x}");
    }
}

#[test]
fn missed_periods_are_one() {
    let mut b = bench();
    b.write(B, 0x42);
    b.rtc.advance(NS / 2);
    assert_eq!(b.irq.take_rises(), 1);
    assert_eq!(b.read(C), 0xc0);
    assert!(!b.irq.is_high());
    assert_eq!(b.rtc.deadline(), Some((513 * NS).div_ceil(1024)));
}

#[test]
fn the_alarm_goes_off_at_its_time() {
    let mut b = bench();
    for (index, value) in [(HOUR_ALARM, 0x00), (MINUTE_ALARM, 0x00), (SECOND_ALARM, 0x05)] {
        b.write(index, value);
        assert_eq!(b.read(index), value);
    }
    b.write(B, 0x22);
    let day = 86_400 * NS;
    let expected = [15 * NS, 15 * NS + day, 15 * NS + 2 * day].map(|at| (at, 0xf0));
    let alarms = b.run_until(3 * day);
    assert_eq!(alarms.iter().map(|&(at, flags)| (at, flags & 0xb0 | 0x40)).collect::<Vec<_>>(), expected);
    // Every minute.
    for index in [HOUR_ALARM, MINUTE_ALARM] {
        b.write(index, 0xc0);
    }
    assert_eq!(b.run_until(3 * day + 600 * NS).len(), 10);
    // Passed over in one step.
    let mut b = bench();
    b.write(SECOND_ALARM, 0x55);
    b.write(MINUTE_ALARM, 0xff);
    b.write(HOUR_ALARM, 0xff);
    b.rtc.advance(4 * NS);
    assert_eq!(b.read(C) & 0x20, 0);
    b.rtc.advance(60 * NS);
    assert_eq!(b.read(C) & 0x20, 0x20);
}

#[test]
fn reset_keeps_the_time_and_ends_interrupts() {
    let mut b = bench();
    b.write(0x40, 0x77);
    b.write(HOUR, 0x05);
    b.write(B, 0x72);
    b.rtc.advance(2 * NS);
    assert!(b.irq.is_high());
    b.rtc.reset();
    assert!(!b.irq.is_high());
    assert_eq!((b.read(B), b.read(C), b.read(HOUR), b.read(0x40)), (0x02, 0, 0x05, 0x77));
    // In the middle of being set, in binary.
    b.write(B, 0x86);
    for (index, value) in [(HOUR, 5), (MINUTE, 33), (SECOND, 20)] {
        b.write(index, value);
    }
    b.rtc.reset();
    assert_eq!((b.read(MINUTE), b.read(B)), (0x33, 0x02));
}

#[test]
fn a_corrupt_state_is_refused() {
    let mut b = bench();
    let good = b.rtc.save();
    assert!(b.rtc.restore(&good).is_ok());
    // The fields' places are in `saved`; a section cut short lacks the memory.
    let cut = Section { data: good.data[..good.data.len() - 130].to_vec(), ..good };
    assert!(matches!(b.rtc.restore(&cut), Err(StateError::Corrupt { .. })));
}

proptest! {
    #[test]
    fn any_state_can_be_saved_and_goes_on(before in steps(), after in steps()) {
        let make = || Rtc::new(IrqLine::unconnected(), WALL, MEMORY);
        goes_on_after_restore(make, &[(Space::Port { range: 0 }, 2)], |_, _| {}, &before, &after);
    }

    #[test]
    fn every_deadline_interrupts_and_none_comes_late(a in 0u8..0x30, b_register: u8, alarm: [u8; 3]) {
        let mut b = bench();
        b.write(SECOND_ALARM, alarm[0]);
        b.write(MINUTE_ALARM, alarm[1] | 0xc0);
        b.write(HOUR_ALARM, alarm[2] | 0xc0);
        b.write(A, a);
        b.write(B, b_register & 0x7f);
        for _ in 0..20 {
            let Some(at) = b.rtc.deadline() else { break };
            b.rtc.advance(at - 1);
            prop_assert!(!b.irq.is_high());
            b.rtc.advance(at);
            prop_assert!(b.irq.is_high());
            b.read(C);
        }
    }
}
