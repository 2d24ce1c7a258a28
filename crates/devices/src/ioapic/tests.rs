use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::*;
use crate::testing::{goes_on_after_restore, steps};

const MMIO: Space = Space::Mmio { range: 0 };

#[derive(Clone, Default)]
struct Messages {
    sent: Arc<Mutex<Vec<(u64, u32)>>>,
    routes: Arc<Mutex<Vec<(u8, u64, u32)>>>,
}

impl MessageSink for Messages {
    fn send(&self, message: InterruptMessage) {
        self.sent.lock().unwrap().push((message.address, message.data));
    }

    fn route_changed(&self, pin: u8, message: InterruptMessage) {
        self.routes.lock().unwrap().push((pin, message.address, message.data));
    }
}

struct Bench {
    ioapic: IoApic,
    messages: Messages,
}

fn bench() -> Bench {
    let messages = Messages::default();
    Bench { ioapic: IoApic::new(Box::new(messages.clone())), messages }
}

impl Bench {
    fn read(&mut self, register: u8) -> u32 {
        let _ = self.ioapic.write(MMIO, IOREGSEL, &u32::from(register).to_le_bytes());
        let mut data = [0; 4];
        self.ioapic.read(MMIO, IOWIN, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&mut self, register: u8, value: u32) {
        let _ = self.ioapic.write(MMIO, IOREGSEL, &u32::from(register).to_le_bytes());
        assert_eq!(self.ioapic.write(MMIO, IOWIN, &value.to_le_bytes()), Effect::None);
    }

    /// Destination first, as drivers do.
    fn route(&mut self, pin: u8, entry: u64) {
        self.write(IOREDTBL + 2 * pin + 1, (entry >> 32) as u32);
        self.write(IOREDTBL + 2 * pin, entry as u32);
    }

    fn entry(&mut self, pin: u8) -> u64 {
        u64::from(self.read(IOREDTBL + 2 * pin + 1)) << 32 | u64::from(self.read(IOREDTBL + 2 * pin))
    }

    fn sent(&self) -> Vec<(u64, u32)> {
        std::mem::take(&mut self.messages.sent.lock().unwrap())
    }

    fn eoi_register(&mut self, vector: u8) {
        let _ = self.ioapic.write(MMIO, EOIR, &u32::from(vector).to_le_bytes());
    }
}

#[test]
fn registers() {
    let mut b = bench();
    assert_eq!(b.read(IOAPICVER), 0x0017_0020);
    b.write(IOAPICID, 0xffff_ffff);
    assert_eq!((b.read(IOAPICID), b.read(IOAPICARB)), (0x0f00_0000, 0x0f00_0000));
    b.write(IOAPICVER, 0);
    assert_eq!(b.read(IOAPICVER), 0x0017_0020);
    for pin in 0..24 {
        assert_eq!(b.entry(pin), 0x1_0000, "pin {pin} is masked");
        b.route(pin, !0);
        assert_eq!(b.entry(pin), 0xff00_0000_0001_afff, "status, remote IRR and reserved bits stay 0");
    }
    assert_eq!((b.read(0x0f), b.read(0x40), b.read(0xff)), (0, 0, 0));
    // Byte and quadword accesses.
    let _ = b.ioapic.write(MMIO, IOREGSEL, &[IOAPICVER]);
    let mut data = [0xaa; 8];
    b.ioapic.read(MMIO, IOWIN, &mut data);
    assert_eq!(data, [0x20, 0, 0x17, 0, 0, 0, 0, 0]);
    b.ioapic.read(MMIO, IOWIN + 2, &mut data[..1]);
    assert_eq!(data[0], 0x17);
}

#[test]
fn an_entry_becomes_a_message() {
    for (entry, address, data) in [
        (0x0000_0000_0000_0030, 0xfee0_0000, 0x0030),
        // Physical destination 5; logical destination 0x81, lowest priority.
        (0x0500_0000_0000_0031, 0xfee0_5000, 0x0031),
        (0x8100_0000_0000_0941, 0xfee8_1004, 0x0141),
        // Level triggered, active low.
        (0x0100_0000_0000_a050, 0xfee0_1000, 0xc050),
        // SMI, NMI, INIT and ExtINT are edges.
        (0x0000_0000_0000_8200, 0xfee0_0000, 0x0200),
        (0xff00_0000_0000_0400, 0xfeef_f000, 0x0400),
        (0x0000_0000_0000_8500, 0xfee0_0000, 0x0500),
        (0x0000_0000_0000_0700, 0xfee0_0000, 0x0700),
    ] {
        let mut b = bench();
        b.route(7, entry);
        b.ioapic.set_irq(7, true);
        assert_eq!(b.sent(), [(address, data)], "entry {entry:#x}");
        assert_eq!(b.messages.routes.lock().unwrap().last(), Some(&(7, address, data)), "entry {entry:#x}");
    }
}

#[test]
fn an_edge_is_sent_once_and_lost_while_masked() {
    let mut b = bench();
    b.route(4, 0x34);
    b.ioapic.set_irq(4, true);
    b.ioapic.set_irq(4, true);
    assert_eq!(b.sent().len(), 1);
    b.ioapic.set_irq(4, false);
    b.ioapic.set_irq(4, true);
    assert_eq!(b.sent().len(), 1);
    b.route(4, 0x1_0034);
    b.ioapic.set_irq(4, false);
    b.ioapic.set_irq(4, true);
    b.route(4, 0x34);
    b.ioapic.end_of_interrupt(0x34);
    assert_eq!(b.sent(), []);
    b.ioapic.set_irq(24, true);
    b.ioapic.set_irq(255, true);
    assert_eq!(b.sent(), []);
}

#[test]
fn a_level_is_sent_again_after_the_end_of_interrupt_while_it_lasts() {
    let mut b = bench();
    b.route(9, 0x8039);
    b.ioapic.set_irq(9, true);
    b.ioapic.set_irq(9, false);
    b.ioapic.set_irq(9, true);
    assert_eq!(b.sent(), [(0xfee0_0000, 0xc039)], "once until it ends");
    assert_eq!(b.entry(9), 0xc039, "remote IRR");
    b.ioapic.end_of_interrupt(0x38);
    assert_eq!(b.sent(), []);
    b.ioapic.end_of_interrupt(0x39);
    assert_eq!(b.sent().len(), 1);
    b.ioapic.set_irq(9, false);
    b.eoi_register(0x39);
    assert_eq!((b.sent().len(), b.entry(9)), (0, 0x8039));
    b.ioapic.end_of_interrupt(0x39);
    assert_eq!(b.sent(), []);
}

#[test]
fn a_masked_level_is_delivered_when_unmasked() {
    let mut b = bench();
    b.route(10, 0x1_8040);
    b.ioapic.set_irq(10, true);
    assert_eq!(b.sent(), []);
    b.route(10, 0x8040);
    assert_eq!(b.sent().len(), 1);
    // Linux masks, ends and unmasks.
    b.route(10, 0x1_8040);
    assert_eq!(b.entry(10), 0x1_c040, "still waiting for the end");
    b.ioapic.end_of_interrupt(0x40);
    assert_eq!(b.sent(), []);
    b.route(10, 0x8040);
    assert_eq!(b.sent().len(), 1);
    b.ioapic.set_irq(10, false);
    // From level to edge and back: remote IRR is cleared.
    b.route(10, 0x1_0040);
    b.route(10, 0x8040);
    assert_eq!((b.entry(10), b.sent().len()), (0x8040, 0));
}

#[test]
fn pins_that_share_a_vector_end_together() {
    let mut b = bench();
    b.route(16, 0x8050);
    b.route(17, 0x0100_0000_0000_8050);
    b.ioapic.set_irq(16, true);
    b.ioapic.set_irq(17, true);
    b.ioapic.set_irq(16, false);
    assert_eq!(b.sent().len(), 2);
    b.ioapic.end_of_interrupt(0x50);
    assert_eq!(b.sent(), [(0xfee0_1000, 0xc050)]);
}

#[test]
fn routes_are_told_after_reset_and_restore() {
    let mut b = bench();
    b.route(1, 0x0200_0000_0000_8031);
    b.ioapic.set_irq(1, true);
    let saved = b.ioapic.save();
    let mut c = bench();
    c.ioapic.restore(&saved).unwrap();
    assert!(c.messages.routes.lock().unwrap().contains(&(1, 0xfee0_2000, 0xc031)));
    assert_eq!(c.sent(), [], "it was sent before");
    c.ioapic.set_irq(1, true);
    c.ioapic.end_of_interrupt(0x31);
    assert_eq!(c.sent().len(), 1);
    c.ioapic.reset();
    assert!(c.messages.routes.lock().unwrap().ends_with(&[(23, 0xfee0_0000, 0)]));
    c.ioapic.end_of_interrupt(0x31);
    assert_eq!(c.sent(), []);

    let short = SavedIoApic { entries: vec![0; 23], ..SavedIoApic::default() };
    assert!(matches!(c.ioapic.restore(&Section::new(&short)), Err(StateError::Corrupt { .. })));
}

proptest! {
    #[test]
    fn any_state_can_be_saved_and_goes_on(before in steps(), after in steps()) {
        let poke = |ioapic: &mut IoApic, value: u64| match value % 3 {
            0 => ioapic.end_of_interrupt((value >> 8) as u8),
            level => ioapic.set_irq((value >> 8) as u8 & 31, level == 1),
        };
        let make = || IoApic::new(Box::new(Messages::default()));
        goes_on_after_restore(make, &[(MMIO, 0x44)], poke, &before, &after);
    }
}
