use std::{
    io::{self, Write},
    sync::{Arc, Mutex},
};

use proptest::prelude::*;

use super::*;
use crate::testing::{Probe, goes_on_after_restore, inb, outb, steps};

const CHARACTER: u64 = 86_805;

struct Bench {
    serial: Serial,
    irq: Probe,
}

fn bench() -> Bench {
    let irq = Probe::default();
    let mut serial = Serial::new("serial0", irq.line(), Output::discard());
    // 115200 8N1.
    for (register, value) in [(LCR, 0x83), (RBR_THR_DLL, 1), (IER_DLM, 0), (LCR, 3)] {
        let _ = outb(&mut serial, 0, register, value);
    }
    Bench { serial, irq }
}

impl Bench {
    fn read(&mut self, register: u64) -> u8 {
        inb(&mut self.serial, 0, register)
    }

    fn write(&mut self, register: u64, value: u8) {
        assert_eq!(outb(&mut self.serial, 0, register, value), Effect::None);
    }

    fn wait(&mut self, ns: u64) {
        self.serial.advance(self.serial.now + ns);
    }

    /// FIFOs with a trigger level, receiver interrupt, modem lines up.
    fn listen(&mut self, trigger: u8) {
        self.write(IIR_FCR, trigger << 6 | 0x07);
        self.write(IER_DLM, 0x01);
        self.write(MCR, 0x0b);
    }
}

#[test]
fn registers_keep_what_they_have_bits_for() {
    let mut b = bench();
    for (register, written, read) in
        [(SCR, 0x5a, 0x5a), (IER_DLM, 0xff, 0x0f), (MCR, 0xef, 0x0f), (LCR, 0x7f, 0x7f), (LSR, 0, 0x60)]
    {
        b.write(register, written);
        assert_eq!(b.read(register), read, "register {register}");
    }
    b.write(LCR, 0x80);
    b.write(RBR_THR_DLL, 0x34);
    b.write(IER_DLM, 0x12);
    assert_eq!((b.read(RBR_THR_DLL), b.read(IER_DLM)), (0x34, 0x12));
    b.write(LCR, 0);
    assert_eq!(b.read(IER_DLM), 0x0f);
}

#[test]
fn after_reset_the_registers_are_as_in_table_iii() {
    let mut b = bench();
    b.listen(2);
    b.write(SCR, 1);
    b.serial.reset();
    for (register, value) in [(IER_DLM, 0), (IIR_FCR, 0x01), (LCR, 0), (MCR, 0), (LSR, 0x60), (MSR, 0xb0)] {
        assert_eq!(b.read(register), value, "register {register}");
    }
    assert!(!b.irq.is_high());
}

#[test]
fn iir_shows_fifos_of_a_16550a() {
    let mut b = bench();
    b.write(IIR_FCR, 0x01);
    assert_eq!(b.read(IIR_FCR), 0xc1);
    b.write(IIR_FCR, 0xc0);
    assert_eq!(b.read(IIR_FCR), 0x01, "without FIFOs the rest of FCR is not taken");
}

#[test]
fn the_transmitter_interrupts_when_enabled_and_when_it_runs_empty() {
    let mut b = bench();
    b.write(MCR, 0x08);
    b.write(IER_DLM, 0x02);
    assert!(b.irq.is_high());
    assert_eq!(b.read(IIR_FCR), 0x02);
    assert!(!b.irq.is_high(), "reading IIR resets it");
    assert_eq!(b.read(IIR_FCR), 0x01);
    b.write(IER_DLM, 0x02);
    assert_eq!(b.read(IIR_FCR), 0x01, "it was enabled already");
    // What Linux's driver tests: off and on again interrupts again.
    b.write(IER_DLM, 0x00);
    b.write(IER_DLM, 0x02);
    assert_eq!(b.read(IIR_FCR), 0x02);
    b.irq.take_rises();
    b.write(RBR_THR_DLL, b'x');
    assert_eq!(b.irq.take_rises(), 1);
    assert_eq!(b.read(IIR_FCR), 0x02);
}

#[test]
fn out2_lets_the_interrupt_through() {
    let mut b = bench();
    b.write(IER_DLM, 0x02);
    assert!(!b.irq.is_high());
    b.write(MCR, 0x08);
    assert!(b.irq.is_high());
    b.write(MCR, 0x18);
    assert!(!b.irq.is_high(), "not in loopback");
}

#[test]
fn a_character_interrupts_at_the_trigger_level_or_after_four_character_times() {
    for (trigger, level) in [(0, 1), (1, 4), (2, 8), (3, 14)] {
        let mut b = bench();
        b.listen(trigger);
        assert_eq!(b.serial.push_input(&[b'a'; 14]), 14);
        assert_eq!(b.irq.is_high(), level == 1);
        b.wait((level - 1) * CHARACTER - u64::from(level > 1));
        assert_eq!(b.irq.is_high(), level == 1, "before the level of {level}");
        b.wait(1);
        assert!(b.irq.is_high(), "at the level of {level}");
        assert_eq!(b.read(IIR_FCR), 0xc4);
    }
    let mut b = bench();
    b.listen(3);
    b.serial.push_input(b"ab");
    assert_eq!(b.serial.deadline(), Some(CHARACTER), "the last character");
    b.wait(CHARACTER);
    assert_eq!(b.serial.deadline(), Some(5 * CHARACTER));
    b.wait(4 * CHARACTER - 1);
    assert_eq!(b.read(IIR_FCR), 0xc1);
    b.wait(1);
    assert!(b.irq.is_high());
    assert_eq!(b.read(IIR_FCR), 0xcc);
    assert_eq!(b.read(IIR_FCR), 0xcc, "only reading a character resets it");
    assert_eq!(b.read(RBR_THR_DLL), b'a');
    assert_eq!(b.read(IIR_FCR), 0xc1);
    b.wait(4 * CHARACTER);
    assert_eq!(b.read(IIR_FCR), 0xcc);
    assert_eq!(b.read(RBR_THR_DLL), b'b');
    assert_eq!(b.serial.deadline(), None);
    assert!(!b.irq.is_high());
}

#[test]
fn without_fifos_each_character_waits_to_be_read() {
    let mut b = bench();
    b.write(MCR, 0x0b);
    b.write(IER_DLM, 1);
    b.serial.push_input(b"xy");
    b.wait(100 * CHARACTER);
    assert_eq!((b.read(LSR), b.read(IIR_FCR), b.read(RBR_THR_DLL)), (0x61, 0x04, b'x'));
    // The next one was held up and follows at once.
    assert_eq!((b.read(LSR), b.read(RBR_THR_DLL), b.read(LSR)), (0x61, b'y', 0x60));
}

#[test]
fn nothing_is_lost_with_a_slow_reader_and_no_room() {
    let mut b = bench();
    b.listen(2);
    let sent: Vec<u8> = (0..20_000u32).map(|i| (i * 7 / 8) as u8).collect();
    let mut rest = &sent[..];
    let mut received = Vec::new();
    let (mut asked, mut refusals) = (0, 0);
    while received.len() < sent.len() {
        if b.serial.input_room() > 0 && !rest.is_empty() {
            let taken = b.serial.push_input(rest);
            refusals += u32::from(taken < rest.len());
            rest = &rest[taken..];
        }
        b.wait(20 * CHARACTER);
        for _ in 0..7 {
            if b.read(LSR) & 1 != 0 {
                received.push(b.read(RBR_THR_DLL));
            }
        }
        asked += 1;
        assert!(asked < 100_000);
    }
    assert!(received == sent);
    assert!(refusals > 0, "there is an end to what is taken");
}

#[test]
fn input_waits_until_the_guest_has_set_up_its_port() {
    let mut b = bench();
    b.serial.push_input(b"echo hello\n");
    // As Linux probes and starts the port.
    for (register, value) in [(IIR_FCR, 1), (IIR_FCR, 7), (MCR, 0x1a), (MCR, 0), (IIR_FCR, 0), (IIR_FCR, 1)] {
        b.write(register, value);
        b.wait(CHARACTER);
        b.read(RBR_THR_DLL);
        b.read(LSR);
    }
    b.listen(2);
    b.wait(20 * CHARACTER);
    // And clears the FIFO once more.
    b.write(IIR_FCR, 0x87);
    b.wait(20 * CHARACTER);
    let text: Vec<u8> = (0..11).map(|_| b.read(RBR_THR_DLL)).collect();
    assert_eq!(text, b"echo hello\n");
}

#[test]
fn rts_stops_the_far_end() {
    let mut b = bench();
    b.listen(0);
    b.write(MCR, 0x09);
    b.serial.push_input(b"q");
    b.wait(100 * CHARACTER);
    assert_eq!(b.read(LSR), 0x60);
    b.write(MCR, 0x0b);
    assert_eq!(b.read(LSR), 0x61);
}

#[test]
fn a_guest_that_polls_is_sent_to() {
    let mut b = bench();
    b.serial.push_input(b"q");
    let polls = (0..100).take_while(|_| b.read(LSR) & 1 == 0).count();
    assert_eq!(polls, usize::from(POLLS));
    assert_eq!(b.read(RBR_THR_DLL), b'q');

    // Waiting for the transmitter before each character is not polling.
    let mut b = bench();
    b.serial.push_input(b"q");
    for _ in 0..100 {
        assert_eq!(b.read(LSR), 0x60);
        b.write(RBR_THR_DLL, b'.');
    }
}

#[test]
fn loopback_leads_each_output_to_its_input() {
    let mut b = bench();
    assert_eq!(b.read(MSR), 0xb0);
    for (mcr, lines) in [(0x10, 0x00), (0x11, 0x20), (0x12, 0x10), (0x14, 0x40), (0x18, 0x80), (0x1a, 0x90)] {
        b.write(MCR, mcr);
        assert_eq!(b.read(MSR) & 0xf0, lines, "MCR {mcr:#x}");
    }
    b.write(MCR, 0x10);
    b.read(MSR);
    // Each change shows once; the ring only when it ends.
    for (mcr, msr) in [(0x12, 0x11), (0x10, 0x01), (0x11, 0x22), (0x10, 0x02), (0x14, 0x40), (0x10, 0x04), (0x18, 0x88)]
    {
        b.write(IER_DLM, 0x08);
        b.write(MCR, mcr);
        assert_eq!(b.read(IIR_FCR), if msr & 0xf == 0 { 0x01 } else { 0x00 }, "MCR {mcr:#x}");
        assert_eq!(b.read(MSR), msr, "MCR {mcr:#x}");
        assert_eq!(b.read(MSR), msr & 0xf0);
        assert_eq!(b.read(IIR_FCR), 0x01);
    }
}

#[test]
fn loopback_receives_what_is_sent_and_overruns() {
    let mut b = bench();
    b.write(MCR, 0x10);
    b.write(IER_DLM, 0x04);
    b.write(RBR_THR_DLL, b'a');
    assert_eq!((b.read(LSR), b.read(IIR_FCR)), (0x61, 0x01));
    b.write(RBR_THR_DLL, b'b');
    assert_eq!(b.read(IIR_FCR), 0x06);
    assert_eq!((b.read(LSR), b.read(LSR)), (0x63, 0x61), "reading LSR clears the overrun");
    assert_eq!((b.read(IIR_FCR), b.read(RBR_THR_DLL)), (0x01, b'b'), "the register was overwritten");

    b.write(IIR_FCR, 0x07);
    for byte in 0..17 {
        b.write(RBR_THR_DLL, byte);
    }
    assert_eq!(b.read(LSR), 0x63);
    let read: Vec<u8> = (0..16).map(|_| b.read(RBR_THR_DLL)).collect();
    assert_eq!(read, (0..16).collect::<Vec<u8>>(), "the FIFO keeps what it has");
    assert_eq!(b.read(LSR), 0x60);
    // Five-bit words.
    b.write(LCR, 0x00);
    b.write(RBR_THR_DLL, 0xff);
    assert_eq!(b.read(RBR_THR_DLL), 0x1f);
}

#[test]
fn interrupts_have_the_priority_of_table_iv() {
    let mut b = bench();
    b.write(IIR_FCR, 0x01);
    b.write(MCR, 0x12);
    b.write(IER_DLM, 0x0f);
    for byte in 0..17 {
        b.write(RBR_THR_DLL, byte);
    }
    assert_eq!(b.read(IIR_FCR), 0xc6);
    b.read(LSR);
    assert_eq!(b.read(IIR_FCR), 0xc4);
    (0..16).for_each(|_| {
        b.read(RBR_THR_DLL);
    });
    assert_eq!(b.read(IIR_FCR), 0xc2);
    assert_eq!(b.read(IIR_FCR), 0xc0);
    b.read(MSR);
    assert_eq!(b.read(IIR_FCR), 0xc1);
}

/// A sink that is never done.
struct Stuck(std::sync::mpsc::Receiver<()>, Arc<Mutex<Vec<u8>>>);

impl Write for Stuck {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let _ = self.0.recv();
        self.1.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn an_output_that_takes_nothing_keeps_the_transmitter_full() {
    let (go, gate) = std::sync::mpsc::channel();
    let written = Arc::new(Mutex::new(Vec::new()));
    let output = Output::new(Box::new(Stuck(gate, written.clone()))).unwrap();
    let mut b = bench();
    b.serial.output = output.clone();
    b.write(IIR_FCR, 0x07);
    b.write(MCR, 0x08);
    b.write(IER_DLM, 0x02);
    let mut sent = 0u64;
    while b.read(LSR) & 0x20 != 0 {
        b.write(RBR_THR_DLL, sent as u8);
        sent += 1;
        assert!(sent < 1 << 20, "the output is bounded");
    }
    b.irq.take_rises();
    assert_eq!(b.read(IIR_FCR), 0xc1);
    assert_eq!(b.serial.deadline(), Some(b.serial.now + RETRY));
    drop(go);
    for _ in 0..10_000 {
        b.wait(RETRY);
        if b.irq.is_high() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    assert_eq!(b.read(IIR_FCR), 0xc2);
    assert_eq!(b.serial.deadline(), None);
    drop((b, output));
    assert_eq!(*written.lock().unwrap(), (0..sent).map(|i| i as u8).collect::<Vec<u8>>());
}

#[test]
fn a_corrupt_state_is_refused() {
    let mut b = bench();
    let state = SavedSerial::of(&b.serial);
    let mut section = Section::named("serial0", &state);
    section.version = 2;
    assert!(matches!(b.serial.restore(&section), Err(StateError::Newer { .. })));
    section.version = 1;
    section.data = vec![0xff; 3];
    assert!(matches!(b.serial.restore(&section), Err(StateError::Corrupt { .. })));
}

proptest! {
    #[test]
    fn any_state_can_be_saved_and_goes_on(before in steps(), after in steps()) {
        let make = || Serial::new("serial0", IrqLine::unconnected(), Output::discard());
        let push = |serial: &mut Serial, value: u64| {
            serial.push_input(&value.to_le_bytes()[..(value % 9) as usize]);
        };
        goes_on_after_restore(make, &[(Space::Port { range: 0 }, 8)], push, &before, &after);
    }
}
