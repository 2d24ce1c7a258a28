use proptest::prelude::*;

use super::*;
use crate::testing::{Probe, goes_on_after_restore, inb, outb, steps};

mod reference;

use reference::Reference;

const SECOND: u64 = 1_000_000_000;

struct Bench {
    pit: Pit,
    irq: Probe,
}

fn bench() -> Bench {
    let irq = Probe::default();
    Bench { pit: Pit::new(irq.line()), irq }
}

impl Bench {
    fn read(&mut self, register: u64) -> u8 {
        inb(&mut self.pit, 0, register)
    }

    fn write(&mut self, register: u64, value: u8) {
        assert_eq!(outb(&mut self.pit, 0, register, value), Effect::None);
    }

    fn write16(&mut self, register: u64, value: u16) {
        let [low, high] = value.to_le_bytes();
        self.write(register, low);
        self.write(register, high);
    }

    fn port_b(&mut self) -> u8 {
        inb(&mut self.pit, 1, 0)
    }

    fn set_port_b(&mut self, value: u8) {
        assert_eq!(outb(&mut self.pit, 1, 0, value), Effect::None);
    }

    /// Goes to the start of a tick.
    fn go_to(&mut self, tick: u64) {
        self.pit.advance(CLOCK.ns(tick));
    }

    fn latched(&mut self, channel: u8) -> u16 {
        self.write(CONTROL, channel << 6);
        let low = self.read(channel.into());
        u16::from_le_bytes([low, self.read(channel.into())])
    }

    fn status(&mut self, channel: u8) -> u8 {
        self.write(CONTROL, 0xe0 | 2 << channel);
        self.read(channel.into())
    }

    /// Keeps the deadlines until `end`, and returns how many interrupts there were.
    fn run_until(&mut self, end: u64) -> u64 {
        let mut count = 0;
        while let Some(at) = self.pit.deadline().filter(|&at| at <= end) {
            self.pit.advance(at);
            assert!(self.pit.deadline().is_none_or(|next| next > at), "no progress at {at}");
            count += u64::from(self.irq.take_rises());
        }
        self.pit.advance(end);
        count + u64::from(self.irq.take_rises())
    }
}

#[test]
fn the_rate_generator_does_not_drift() {
    for (mode, divisor) in [(2, 11_932), (2, 4773), (3, 11_932), (3, 59_659), (2, 1193)] {
        let mut b = bench();
        b.write(CONTROL, 0x30 | mode << 1);
        b.write16(0, divisor);
        b.irq.take_rises();
        // Loaded at tick 1; rises at 1 + k * divisor.
        let hour = 3600 * CLOCK.0;
        assert_eq!(b.run_until(3600 * SECOND), (hour - 1) / u64::from(divisor), "mode {mode}, {divisor}");
        // After ten years without looking the phase is still exact.
        let years = 3650 * 86_400 * CLOCK.0;
        b.go_to(years);
        let next = years + u64::from(divisor) - (years - 1) % u64::from(divisor);
        assert_eq!(b.pit.deadline(), Some(CLOCK.ns(next)), "mode {mode}, {divisor}");
    }
}

#[test]
fn the_whole_range_of_counts() {
    for (written, count) in [(0, 65_536), (1, 1), (0xffff, 65_535)] {
        let mut b = bench();
        b.write(CONTROL, 0x30);
        b.write16(0, written);
        assert_eq!(b.pit.deadline(), Some(CLOCK.ns(1 + count)));
        assert_eq!(b.run_until(10 * SECOND), 1);
        assert_eq!(b.pit.deadline(), None);
    }
    // BCD.
    let mut b = bench();
    b.write(CONTROL, 0x31);
    b.write16(0, 0);
    b.go_to(2);
    assert_eq!(b.latched(0), 0x9999);
    assert_eq!(b.pit.deadline(), Some(CLOCK.ns(10_001)));
    b.go_to(10_001);
    assert_eq!(b.latched(0), 0);
}

#[test]
fn a_late_wakeup_shows_one_rise() {
    let mut b = bench();
    b.write(CONTROL, 0x34);
    b.write16(0, 1000);
    b.irq.take_rises();
    b.go_to(10_500);
    assert_eq!(b.irq.take_rises(), 1);
    assert!(b.irq.is_high());
    assert_eq!(b.pit.deadline(), Some(CLOCK.ns(11_001)), "and the phase stays");
}

#[test]
fn a_rate_that_no_guest_can_follow_costs_the_host_no_more() {
    let mut b = bench();
    b.write(CONTROL, 0x14);
    for count in [1, 2, 23] {
        b.write(0, count);
        b.pit.advance(b.pit.now + 1_000_000);
        if let Some(at) = b.pit.deadline() {
            assert!(at - b.pit.now >= 19_000, "count {count}");
        }
    }
}

#[test]
fn accesses_to_the_count_registers() {
    let mut b = bench();
    // Low byte only, high byte only, both.
    b.write(CONTROL, 0x94);
    b.write(2, 0x34);
    assert_eq!(b.pit.channels[2].register, 0x0034);
    b.write(CONTROL, 0xa4);
    b.write(2, 0x12);
    assert_eq!(b.pit.channels[2].register, 0x1200);
    b.write(CONTROL, 0xb4);
    b.write16(2, 0x1234);
    assert_eq!(b.pit.channels[2].register, 0x1234);
    // A latched count stays until it has been read, low byte first.
    b.set_port_b(1);
    b.go_to(10);
    b.write(CONTROL, 0x80);
    b.go_to(20);
    b.write(CONTROL, 0x80);
    let expected = 0x1234 - 9;
    assert_eq!(u16::from_le_bytes([b.read(2), b.read(2)]), expected);
    assert_eq!(u16::from_le_bytes([b.read(2), b.read(2)]), expected - 10, "then it goes on");
    b.write(CONTROL, 0x80);
    b.write(CONTROL, 0xb4);
    b.write16(2, 0x5678);
    b.go_to(21);
    assert_eq!(u16::from_le_bytes([b.read(2), b.read(2)]), 0x5678, "a control word drops what was latched");
    assert_eq!(b.read(CONTROL), 0xff);
}

#[test]
fn read_back_latches_status_and_counts() {
    let mut b = bench();
    b.write(CONTROL, 0x36);
    assert_eq!(b.status(0), 0xf6, "output high, null count");
    b.write16(0, 1000);
    assert_eq!(b.status(0), 0xf6, "not loaded yet");
    b.go_to(1);
    assert_eq!(b.status(0), 0xb6);
    b.go_to(501);
    assert_eq!(b.status(0), 0x36, "the low half");
    b.write16(0, 2000);
    assert_eq!(b.status(0), 0x76, "the new count waits for the end of the half");
    b.go_to(1001);
    assert_eq!(b.status(0), 0xb6);
    // Status and count of two counters at once; the status is read first.
    b.write(CONTROL, 0x74);
    b.write16(1, 500);
    b.go_to(1010);
    b.write(CONTROL, 0xc6);
    assert_eq!([b.read(0), b.read(0), b.read(0)], [0xb6, ((2000 - 18) & 0xff) as u8, (1982 >> 8) as u8]);
    assert_eq!([b.read(1), b.read(1), b.read(1)], [0xb4, (492 & 0xff) as u8, (492 >> 8) as u8]);
}

#[test]
fn channel_2_as_kernels_calibrate_their_clocks_by_it() {
    let mut b = bench();
    // Linux: speaker off, gate on, mode 0, 50 ms.
    b.set_port_b(0x01);
    b.write(CONTROL, 0xb0);
    b.write16(2, 59_659);
    assert_eq!(b.port_b() & 0x20, 0);
    b.go_to(59_659);
    assert_eq!(b.port_b() & 0x21, 0x01);
    b.go_to(59_660);
    assert_eq!(b.port_b() & 0x21, 0x21);
    assert_eq!(b.irq.take_rises(), 0, "channel 2 interrupts nobody");
    assert_eq!(b.pit.deadline(), None);
    // Its high byte alone, as the quick calibration reads it.
    b.write(CONTROL, 0xb0);
    b.write16(2, 0xffff);
    for high in (0xf0..=0xffu64).rev() {
        b.go_to(59_661 + (0xff - high) * 256 + 100);
        assert_eq!(u64::from(u16::from_le_bytes([b.read(2), b.read(2)]) >> 8), high);
    }
}

#[test]
fn port_b() {
    let mut b = bench();
    b.set_port_b(0xff);
    assert_eq!(b.port_b(), 0x0f);
    b.set_port_b(0x02);
    assert_eq!(b.port_b(), 0x02);
    let toggles: Vec<bool> = (0..6).map(|i| (b.go_to(i * 18), b.port_b() & 0x10 != 0).1).collect();
    assert_eq!(toggles, [false, true, false, true, false, true]);
}

#[test]
fn a_closed_gate_stops_the_count() {
    let mut b = bench();
    b.set_port_b(0x01);
    b.write(CONTROL, 0xb0);
    b.write16(2, 100);
    b.go_to(41);
    b.set_port_b(0x00);
    b.go_to(1000);
    assert_eq!(b.latched(2), 60);
    b.set_port_b(0x01);
    b.go_to(1059);
    assert_eq!(b.port_b() & 0x20, 0);
    b.go_to(1060);
    assert_eq!(b.port_b() & 0x20, 0x20);
}

#[derive(Clone, Copy, Debug)]
enum Action {
    Write(u8),
    Gate(bool),
    Wait(u8),
}

fn to_bcd(value: u32) -> u32 {
    [1000, 100, 10, 1].iter().fold(0, |bcd, place| (bcd << 4) | (value / place % 10))
}

fn actions() -> impl Strategy<Value = Vec<Action>> {
    // A count of 1 is illegal in modes 2 and 3.
    let count = prop_oneof![2u8..14, Just(0)];
    let action = prop_oneof![
        1 => count.prop_map(Action::Write),
        1 => any::<bool>().prop_map(Action::Gate),
        4 => (0u8..40).prop_map(Action::Wait),
    ];
    prop::collection::vec(action, 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn all_modes_are_those_of_a_counter_that_counts(mode in 0u8..6, bcd: bool, actions in actions()) {
        let mut b = bench();
        b.write(CONTROL, 0x90 | mode << 1 | u8::from(bcd));
        let mut reference = Reference::new(mode, bcd, false);
        let mut tick = 0;
        let mut written = false;
        for action in actions {
            match action {
                Action::Write(count) => {
                    b.write(2, if bcd { to_bcd(count.into()) as u8 } else { count });
                    reference.write(count.into());
                    written = true;
                }
                // A trigger without a count is nobody's case.
                Action::Gate(open) if written || mode == 0 => {
                    b.set_port_b(open.into());
                    reference.set_gate(open);
                }
                Action::Gate(_) => {}
                Action::Wait(ticks) => for _ in 0..ticks {
                    tick += 1;
                    b.go_to(tick);
                    reference.tick();
                    let channel = &b.pit.channels[2];
                    prop_assert_eq!(channel.output(tick), reference.output, "output at {}", tick);
                    if let Some(element) = reference.element.filter(|_| !reference.load_pending) {
                        let element = element % if bcd { 10_000 } else { 0x1_0000 };
                        let shown = if bcd { to_bcd(element) } else { element };
                        b.write(CONTROL, 0x80);
                        prop_assert_eq!(u32::from(b.read(2)), shown & 0xff, "count at {}", tick);
                    }
                },
            }
        }
    }

    #[test]
    fn every_rise_is_a_deadline(mode in 0u8..6, actions in actions()) {
        let mut b = bench();
        b.write(CONTROL, 0x10 | mode << 1);
        let channel = |b: &Bench| b.pit.channels[0].clone();
        let mut tick = 0;
        for action in actions {
            match action {
                Action::Write(count) => b.write(0, count),
                Action::Gate(open) => {
                    b.pit.channels[0].set_gate(tick, open);
                    b.pit.update();
                }
                Action::Wait(ticks) => for _ in 0..ticks {
                    let expected = channel(&b).next_rise(tick);
                    prop_assert!(expected.is_none_or(|at| at > tick));
                    let was_high = channel(&b).output(tick);
                    b.irq.take_rises();
                    tick += 1;
                    b.go_to(tick);
                    let rises = !was_high && channel(&b).output(tick);
                    prop_assert_eq!(expected == Some(tick), rises, "at {}", tick);
                    prop_assert_eq!(b.irq.take_rises(), u32::from(rises));
                },
            }
        }
    }
}

proptest! {
    #[test]
    fn any_state_can_be_saved_and_goes_on(before in steps(), after in steps()) {
        let ranges = [(Space::Port { range: 0 }, 4), (Space::Port { range: 1 }, 1)];
        goes_on_after_restore(|| Pit::new(IrqLine::unconnected()), &ranges, |_, _| {}, &before, &after);
    }
}
