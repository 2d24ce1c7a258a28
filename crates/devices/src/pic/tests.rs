use proptest::prelude::*;

use super::*;
use crate::testing::{Probe, goes_on_after_restore, inb, outb, steps};

struct Bench {
    pic: Pic,
    intr: Probe,
}

/// As a PC's operating system sets the pair up: vectors 0x30 and 0x38, nothing masked.
fn bench() -> Bench {
    bench_with([0x11, 0x01], [0x11, 0x01])
}

/// With other ICW1 and ICW4 for master and slave.
fn bench_with(master: [u8; 2], slave: [u8; 2]) -> Bench {
    let intr = Probe::default();
    let mut bench = Bench { pic: Pic::new(intr.line()), intr };
    for (range, [icw1, icw4], icw2, icw3) in [(0, master, 0x30, 4), (1, slave, 0x38, 2)] {
        bench.write(range, 0, icw1);
        bench.write(range, 1, icw2);
        bench.write(range, 1, icw3);
        bench.write(range, 1, icw4);
    }
    bench
}

impl Bench {
    fn read(&mut self, range: u8, register: u64) -> u8 {
        inb(&mut self.pic, range, register)
    }

    fn write(&mut self, range: u8, register: u64, value: u8) {
        assert_eq!(outb(&mut self.pic, range, register, value), Effect::None);
    }

    fn pulse(&mut self, irq: u8) {
        self.pic.set_irq(irq, true);
        self.pic.set_irq(irq, false);
    }

    fn isr(&mut self, range: u8) -> u8 {
        self.write(range, 0, 0x0b);
        self.read(range, 0)
    }

    fn irr(&mut self, range: u8) -> u8 {
        self.write(range, 0, 0x0a);
        self.read(range, 0)
    }

    /// All that is acknowledged now, each ended by a non-specific EOI where it belongs.
    fn drain(&mut self) -> Vec<u8> {
        let mut vectors = Vec::new();
        while self.intr.is_high() {
            let vector = self.pic.acknowledge();
            vectors.push(vector);
            if vector >= 0x38 {
                self.write(1, 0, 0x20);
            }
            self.write(0, 0, 0x20);
            assert!(vectors.len() <= 100, "no end: {vectors:x?}");
        }
        vectors
    }
}

#[test]
fn nothing_interrupts_before_initialization() {
    let intr = Probe::default();
    let mut pic = Pic::new(intr.line());
    (0..16).for_each(|irq| pic.set_irq(irq, true));
    assert!(!intr.is_high());
}

#[test]
fn each_input_has_its_vector() {
    for irq in (0..16).filter(|&irq| irq != 2) {
        let mut b = bench();
        b.pic.set_irq(irq, true);
        assert!(b.intr.is_high(), "IRQ {irq}");
        assert_eq!(b.pic.acknowledge(), 0x30 + irq);
        assert!(!b.intr.is_high());
        let (master, slave) = if irq < 8 { (1 << irq, 0) } else { (4, 1 << (irq - 8)) };
        assert_eq!((b.isr(0), b.isr(1)), (master, slave), "IRQ {irq}");
        assert_eq!((b.irr(0), b.irr(1)), (0, 0));
    }
}

#[test]
fn priority_is_fixed_and_nested() {
    let mut b = bench();
    for irq in [15, 7, 8, 3, 1] {
        b.pulse(irq);
    }
    assert_eq!(b.drain(), [0x31, 0x38, 0x3f, 0x33, 0x37]);
    // A lower one waits, a higher one interrupts.
    b.pulse(4);
    assert_eq!(b.pic.acknowledge(), 0x34);
    b.pulse(5);
    assert!(!b.intr.is_high());
    b.pulse(4);
    assert!(!b.intr.is_high(), "the same one waits too");
    b.pulse(0);
    assert_eq!(b.pic.acknowledge(), 0x30);
    assert_eq!(b.isr(0), 0x11);
    b.write(0, 0, 0x20);
    assert_eq!(b.isr(0), 0x10, "the highest in service ends");
    b.write(0, 0, 0x20);
    assert_eq!(b.drain(), [0x34, 0x35]);
}

#[test]
fn a_mask_holds_back_but_does_not_forget() {
    let mut b = bench();
    b.write(0, 1, 0xfe);
    assert_eq!(b.read(0, 1), 0xfe);
    b.pulse(3);
    assert!(!b.intr.is_high());
    assert_eq!(b.irr(0), 0x08);
    b.write(0, 1, 0);
    assert_eq!(b.drain(), [0x33]);
}

#[test]
fn edges_and_levels() {
    let mut b = bench();
    b.write(2, 0, 0xff);
    b.write(2, 1, 0xff);
    assert_eq!((b.read(2, 0), b.read(2, 1)), (0xf8, 0xde), "some are always edges");
    b.write(2, 0, 0x20);
    b.write(2, 1, 0x02);
    // An edge interrupts once, however long it lasts.
    b.pic.set_irq(4, true);
    assert_eq!(b.drain(), [0x34]);
    b.pic.set_irq(4, true);
    assert!(!b.intr.is_high());
    // A level as long as it lasts.
    for (irq, vector) in [(5, 0x35), (9, 0x39)] {
        b.pic.set_irq(irq, true);
        for _ in 0..3 {
            assert_eq!(b.pic.acknowledge(), vector);
            b.write(1, 0, 0x20);
            b.write(0, 0, 0x20);
            assert!(b.intr.is_high());
        }
        b.pic.set_irq(irq, false);
        assert_eq!(b.irr(0) & 0x20, 0);
        while b.intr.is_high() {
            // The slave's edge on the master is left over.
            assert_eq!(b.pic.acknowledge(), 0x3f);
            assert_eq!(b.isr(1), 0);
            b.write(0, 0, 0x20);
        }
    }
}

#[test]
fn spurious_interrupts() {
    let mut b = bench();
    assert_eq!(b.pic.acknowledge(), 0x37);
    assert_eq!(b.isr(0), 0, "7 is not in service");
    b.write(2, 0, 0x20);
    b.pic.set_irq(5, true);
    b.pic.set_irq(5, false);
    assert_eq!(b.pic.acknowledge(), 0x37);
    // One of the slave: the master has the cascade in service.
    b.pulse(12);
    b.write(1, 1, 0xff);
    assert_eq!(b.pic.acknowledge(), 0x3f);
    assert_eq!((b.isr(0), b.isr(1)), (0x04, 0));
}

#[test]
fn specific_end_of_interrupt() {
    let mut b = bench();
    b.pulse(6);
    b.pic.acknowledge();
    b.pulse(2 + 1);
    b.pic.acknowledge();
    b.write(0, 0, 0x66);
    assert_eq!(b.isr(0), 0x08);
}

#[test]
fn rotation() {
    // Rotate on non-specific EOI: what was served becomes lowest.
    let mut b = bench();
    b.pulse(4);
    b.pic.acknowledge();
    b.write(0, 0, 0xa0);
    for irq in [4, 5, 3] {
        b.pulse(irq);
    }
    assert_eq!(b.drain(), [0x35, 0x33, 0x34]);
    // Set priority: 1 lowest, 2 (the slave) highest.
    let mut b = bench();
    b.write(0, 0, 0xc1);
    for irq in [0, 1, 7, 8] {
        b.pulse(irq);
    }
    assert_eq!(b.drain(), [0x38, 0x37, 0x30, 0x31]);
    // Rotate on specific EOI.
    let mut b = bench();
    b.pulse(6);
    b.pic.acknowledge();
    b.write(0, 0, 0xe6);
    assert_eq!(b.isr(0), 0);
    for irq in [6, 7, 0] {
        b.pulse(irq);
    }
    assert_eq!(b.drain(), [0x37, 0x30, 0x36]);
}

#[test]
fn automatic_end_of_interrupt_with_and_without_rotation() {
    let mut b = bench_with([0x11, 0x03], [0x11, 0x03]);
    b.pulse(0);
    b.pulse(8);
    b.pulse(9);
    let served: Vec<u8> = (0..3).map(|_| b.pic.acknowledge()).collect();
    assert_eq!(served, [0x30, 0x38, 0x39]);
    assert_eq!((b.isr(0), b.isr(1), b.intr.is_high()), (0, 0, false));
    b.write(0, 0, 0x80);
    for irq in [3, 4] {
        b.pulse(irq);
    }
    assert_eq!(b.pic.acknowledge(), 0x33);
    b.pulse(3);
    assert_eq!(b.pic.acknowledge(), 0x34);
    assert_eq!(b.pic.acknowledge(), 0x33);
    b.write(0, 0, 0x00);
    b.pulse(4);
    b.pulse(1);
    assert_eq!(b.pic.acknowledge(), 0x34, "the priority of the last rotation stays");
}

#[test]
fn special_mask_mode_lets_lower_ones_in() {
    let mut b = bench();
    b.pulse(3);
    b.pic.acknowledge();
    b.pulse(6);
    b.write(0, 1, 0x08);
    assert!(!b.intr.is_high());
    b.write(0, 0, 0x68);
    assert!(b.intr.is_high());
    assert_eq!(b.pic.acknowledge(), 0x36);
    b.write(0, 0, 0x20);
    assert_eq!(b.isr(0), 0x08, "a non-specific EOI passes over what is masked");
    b.pulse(6);
    assert!(b.intr.is_high());
    b.write(0, 0, 0x48);
    assert!(!b.intr.is_high());
    // OCW3 without ESMM changes nothing.
    b.write(0, 0, 0x28);
    assert!(!b.intr.is_high());
}

#[test]
fn special_fully_nested_mode_lets_the_slave_interrupt_itself() {
    for (icw4, nested) in [(0x01, false), (0x11, true)] {
        let mut b = bench_with([0x11, icw4], [0x11, 0x01]);
        b.pulse(12);
        assert_eq!(b.pic.acknowledge(), 0x3c);
        b.pulse(14);
        assert!(!b.intr.is_high(), "lower on the slave");
        b.pulse(9);
        assert_eq!(b.intr.is_high(), nested);
        b.pulse(3);
        assert_eq!(b.intr.is_high(), nested);
        if nested {
            assert_eq!(b.pic.acknowledge(), 0x39);
            assert!(!b.intr.is_high(), "IRQ 3 is below the slave");
        }
    }
}

#[test]
fn poll_acknowledges() {
    let mut b = bench();
    b.write(0, 0, 0x0c);
    assert_eq!(b.read(0, 0), 0);
    b.pulse(3);
    b.pulse(5);
    b.write(0, 0, 0x0c);
    assert_eq!(b.read(0, 0), 0x83);
    assert_eq!(b.isr(0), 0x08);
    assert!(!b.intr.is_high());
    assert_eq!(b.read(0, 0), 0x08, "only the next load is a poll");
    b.pulse(10);
    b.write(1, 0, 0x0c);
    assert_eq!(b.read(1, 1), 0x82);
    assert_eq!(b.isr(1), 0x04);
}

#[test]
fn initialization_resets_the_chip() {
    let mut b = bench();
    b.write(0, 0, 0xc3);
    b.write(0, 1, 0x55);
    b.write(0, 0, 0x0b);
    b.pic.set_irq(0, true);
    // Single, no ICW4: ICW2 is the only other.
    b.write(0, 0, 0x12);
    assert_eq!(b.read(0, 1), 0, "nothing is masked");
    b.write(0, 1, 0x47);
    b.write(0, 1, 0xf0);
    assert_eq!(b.read(0, 1), 0xf0, "OCW1");
    assert_eq!(b.read(0, 0), 0, "IRR: the input needs a new edge");
    b.pic.set_irq(0, false);
    b.pic.set_irq(0, true);
    assert_eq!(b.pic.acknowledge(), 0x40);
}

#[test]
fn level_triggered_mode_of_icw1() {
    let mut b = bench_with([0x19, 0x01], [0x11, 0x01]);
    b.pic.set_irq(0, true);
    assert_eq!(b.pic.acknowledge(), 0x30);
    b.write(0, 0, 0x20);
    assert!(b.intr.is_high());
    b.pic.set_irq(0, false);
    assert!(!b.intr.is_high());
}

#[test]
fn restored_in_mid_interrupt() {
    let mut b = bench();
    b.pulse(4);
    b.pic.acknowledge();
    b.pulse(12);
    b.pic.set_irq(5, true);
    let saved = b.pic.save();
    let intr = Probe::default();
    let mut c = Bench { pic: Pic::new(intr.line()), intr };
    c.pic.restore(&saved).unwrap();
    assert!(c.intr.is_high());
    c.pic.set_irq(5, true);
    assert_eq!(c.drain(), [0x3c], "4 is in service");
    c.write(0, 0, 0x20);
    assert_eq!(c.drain(), [0x35]);
    assert!(matches!(c.pic.restore(&Section { data: vec![1], ..saved }), Err(StateError::Corrupt { .. })));
}

proptest! {
    #[test]
    fn any_state_can_be_saved_and_goes_on(before in steps(), after in steps()) {
        let ranges = [0, 1, 2].map(|range| (Space::Port { range }, 2));
        let poke = |pic: &mut Pic, value: u64| match value % 3 {
            0 => drop(pic.acknowledge()),
            level => pic.set_irq((value >> 8) as u8 & 31, level == 1),
        };
        goes_on_after_restore(|| Pic::new(IrqLine::unconnected()), &ranges, poke, &before, &after);
    }
}
