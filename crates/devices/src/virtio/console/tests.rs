use std::{
    io::Write,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use proptest::{
    collection,
    prelude::{ProptestConfig, any, proptest},
};

use super::*;
use crate::{
    pci::PciFunction,
    testing::Collect,
    virtio::testing::{Buffer, Driver, EVENT_IDX, INDIRECT, abuse, is_held_in_a_flood_of, page},
};

const RX: usize = 0;
const TX: usize = 1;
const SIZE: u64 = feature(VIRTIO_CONSOLE_F_SIZE);
/// The interrupt of the configuration.
const CONFIGURATION: u32 = 0x40;
const NO_SIZE: Size = Size { columns: 0, rows: 0 };
const VT100: Size = Size { columns: 80, rows: 24 };

/// A driver, and the port of its device.
struct Pair {
    driver: Driver,
    port: Arc<Port>,
    printed: Collect,
}

impl Pair {
    fn new(size: Size, features: u64) -> Self {
        let printed = Collect::default();
        let port = Port::new(Box::new(printed.clone()), size).unwrap();
        let mut driver = Driver::new(console(&port));
        driver.initialize(features);
        Self { driver, port, printed }
    }

    /// Goes on in another process, whose terminal has this size.
    fn moved_to(self, size: Size) -> Self {
        self.driver.function.hold();
        let printed = Collect::default();
        let port = Port::new(Box::new(printed.clone()), size).unwrap();
        let driver = self.driver.moved_to(console(&port));
        driver.function.open();
        Self { driver, port, printed }
    }

    /// The next input that the driver gets.
    fn input(&mut self, length: u32) -> Vec<u8> {
        let buffer = self.driver.writable(length);
        let used = self.driver.request(RX, &[buffer]);
        let mut content = self.driver.content(buffer);
        content.truncate(used.written as usize);
        content
    }

    /// Waits for an interrupt of the configuration.
    fn wait_for_news(&self) {
        until("the driver is told", || self.driver.messages.take().iter().any(|(_, data)| *data == CONFIGURATION));
    }

    /// Whether the driver has been told that the configuration has changed, by the time at which the device has looked
    /// at all that came before.
    fn has_news(&mut self) -> bool {
        until("the driver can hear", || self.port.is_settled());
        let buffer = self.driver.readable(b"x");
        self.driver.request(TX, &[buffer]);
        self.driver.messages.take().iter().any(|(_, data)| *data == CONFIGURATION)
    }

    fn size(&self) -> [u64; 2] {
        [self.driver.read::<2>(page::DEVICE), self.driver.read::<2>(page::DEVICE + 2)]
    }
}

fn console(port: &Arc<Port>) -> Box<dyn VirtioDevice> {
    Box::new(Console::new("console0", port.clone()))
}

fn until(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(60), "{what}: not in a minute");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn what_the_driver_sends_is_printed_in_order() {
    let mut pair = Pair::new(NO_SIZE, 0);
    for text in [&b"hello, "[..], b"", b"world\n"] {
        let parts: Vec<Buffer> = text.chunks(3).map(|part| pair.driver.readable(part)).collect();
        let parts = if parts.is_empty() { vec![pair.driver.readable(b"")] } else { parts };
        assert_eq!(pair.driver.request(TX, &parts).written, 0);
    }
    let Pair { driver, port, printed } = pair;
    drop((driver, port));
    assert_eq!(printed.bytes(), b"hello, world\n");
}

#[test]
fn input_waits_for_buffers_and_none_is_lost() {
    let mut pair = Pair::new(NO_SIZE, EVENT_IDX);
    let typed: Vec<u8> = (0..30_000u32).map(|n| n as u8).collect();
    let mut pushed = 0;
    let mut seen = Vec::new();
    while seen.len() < typed.len() {
        pushed += pair.port.push_input(&typed[pushed..typed.len().min(pushed + 1000)]);
        seen.extend(pair.input(700));
    }
    assert!(seen == typed);
}

#[test]
fn a_buffer_that_waits_gets_what_is_typed_later() {
    let mut pair = Pair::new(NO_SIZE, 0);
    let buffers = [pair.driver.writable(2), pair.driver.writable(10)];
    buffers.iter().for_each(|buffer| _ = pair.driver.offer(RX, &[*buffer]));
    pair.driver.notify(RX);
    assert_eq!(pair.port.push_input(b"abc"), 3);
    assert_eq!([pair.driver.wait_used(RX).written, pair.driver.wait_used(RX).written], [2, 1]);
    assert_eq!(pair.driver.content(buffers[0]), b"ab");
    assert_eq!(pair.driver.content(buffers[1])[..2], *b"c\xee");
}

#[test]
fn there_is_an_end_to_what_waits() {
    let port = Port::new(Box::new(std::io::sink()), NO_SIZE).unwrap();
    let much = vec![b'x'; 1 << 20];
    let taken = port.push_input(&much);
    assert!((4096..much.len()).contains(&taken));
    assert_eq!(port.push_input(&much), 0);
}

#[test]
fn input_outlives_the_driver_and_a_move() {
    let pair = Pair::new(NO_SIZE, 0);
    pair.port.push_input(b"typed ");
    pair.driver.set_status(0);
    pair.port.push_input(b"ahead");
    let mut pair = pair.moved_to(NO_SIZE);
    pair.driver.initialize(0);
    assert_eq!(pair.input(20), b"typed ahead");
}

/// Takes nothing until it is told that it may.
struct Blocked(mpsc::Receiver<()>, Collect);

impl Write for Blocked {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let _ = self.0.recv();
        self.1.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A device whose terminal takes nothing, with a chain in the midst of which it has stopped.
fn stuck(text: &[u8]) -> (Pair, mpsc::Sender<()>) {
    let (go, gate) = mpsc::channel();
    let printed = Collect::default();
    let port = Port::new(Box::new(Blocked(gate, printed.clone())), NO_SIZE).unwrap();
    let mut driver = Driver::new(console(&port));
    driver.initialize(0);
    let parts: Vec<Buffer> = text.chunks(50_001).map(|part| driver.readable(part)).collect();
    driver.offer(TX, &parts);
    driver.notify(TX);
    until("the output is full", || port.save().printed > 0);
    (Pair { driver, port, printed }, go)
}

fn long_text() -> Vec<u8> {
    (0..500_000u32).map(|n| (n / 7) as u8).collect()
}

#[test]
fn a_terminal_that_takes_nothing_delays_the_driver_and_nothing_is_lost() {
    let text = long_text();
    let (mut pair, go) = stuck(&text);
    assert_eq!(pair.driver.take_used(TX), None);
    // The other direction works meanwhile.
    pair.port.push_input(b"typed");
    assert_eq!(pair.input(10), b"typed");
    drop(go);
    assert_eq!(pair.driver.wait_used(TX).written, 0);
    let Pair { driver, port, printed } = pair;
    drop((driver, port));
    assert!(printed.bytes() == text);
}

#[test]
fn in_the_midst_of_a_chain_it_can_be_held_and_goes_on_elsewhere() {
    let text = long_text();
    let (pair, go) = stuck(&text);
    let (first, port) = (pair.printed.clone(), pair.port.clone());
    let mut pair = pair.moved_to(NO_SIZE);
    assert_eq!(pair.driver.wait_used(TX).written, 0);
    drop(go);
    drop(port);
    let Pair { driver, port, printed: second } = pair;
    drop((driver, port));
    assert!(!first.bytes().is_empty() && !second.bytes().is_empty());
    assert!([first.bytes(), second.bytes()].concat() == text);
}

#[test]
fn a_driver_that_resets_in_the_midst_of_a_chain_begins_anew() {
    let (mut pair, go) = stuck(&long_text());
    pair.driver.set_status(0);
    pair.driver.initialize(0);
    drop(go);
    let buffer = pair.driver.readable(b"anew");
    pair.driver.request(TX, &[buffer]);
    let Pair { driver, port, printed } = pair;
    drop((driver, port));
    assert!(printed.bytes().ends_with(b"anew"));
}

#[test]
fn the_driver_is_told_of_the_size_and_of_each_change() {
    let mut pair = Pair::new(VT100, SIZE);
    assert_eq!(pair.size(), [80, 24]);
    pair.wait_for_news();
    assert!(!pair.has_news(), "once is enough");
    pair.port.resize(VT100);
    assert!(!pair.has_news());
    pair.port.resize(Size { columns: 132, rows: 43 });
    pair.wait_for_news();
    assert_eq!(pair.size(), [132, 43]);
}

#[test]
fn no_driver_is_told_of_a_size_that_it_does_not_ask_for_or_that_there_is_not() {
    for (size, features) in [(VT100, 0), (NO_SIZE, SIZE)] {
        let mut pair = Pair::new(size, features);
        assert!(!pair.has_news());
    }
}

#[test]
fn after_a_move_the_driver_is_told_if_the_terminal_is_another() {
    let pair = Pair::new(VT100, SIZE);
    pair.wait_for_news();
    let mut pair = pair.moved_to(VT100);
    assert!(!pair.has_news());
    let pair = pair.moved_to(Size { columns: 100, rows: 30 });
    pair.wait_for_news();
    assert_eq!(pair.size(), [100, 30]);
}

#[test]
fn while_it_is_held_a_new_size_waits() {
    let pair = Pair::new(VT100, SIZE);
    pair.wait_for_news();
    pair.driver.function.hold();
    let saved = pair.driver.function.save();
    pair.port.resize(Size { columns: 1, rows: 1 });
    thread::sleep(Duration::from_millis(20));
    assert_eq!((pair.driver.messages.take(), pair.driver.function.save()), (vec![], saved));
    pair.driver.function.open();
    pair.wait_for_news();
}

/// Linux would throw away what it is told of at once; what is in its buffers by then it finds.
#[test]
fn a_driver_that_has_just_begun_is_not_interrupted_but_told_soon() {
    const INPUT: u32 = 0x41;
    for features in [SIZE, SIZE | EVENT_IDX] {
        let mut pair = Pair::new(VT100, features);
        let buffer = pair.driver.writable(10);
        pair.driver.offer(RX, &[buffer]);
        pair.driver.notify(RX);
        pair.port.push_input(b"typed");
        assert_eq!(pair.driver.wait_used(RX).written, 5);
        let before = pair.driver.messages.take();
        // On a host that stood still for long it is over by now.
        assert!(before.is_empty() || pair.port.is_settled(), "{before:?}");
        // A move makes it wait anew, and it is told of what it was given before.
        let pair = if before.is_empty() { pair.moved_to(VT100) } else { pair };
        let told = std::cell::RefCell::new(before);
        until("the driver is told", || {
            told.borrow_mut().extend(pair.driver.messages.take());
            [CONFIGURATION, INPUT].iter().all(|kind| told.borrow().iter().any(|(_, data)| data == kind))
        });
    }
}

#[test]
fn an_emergency_write_needs_no_driver() {
    let printed = Collect::default();
    let port = Port::new(Box::new(printed.clone()), NO_SIZE).unwrap();
    let driver = Driver::new(console(&port));
    driver.write(page::DEVICE + 8, &u32::from(b'!').to_le_bytes());
    driver.write(page::DEVICE + 4, b"none");
    driver.write(page::DEVICE, b"none");
    drop((driver, port));
    assert_eq!(printed.bytes(), b"!");
}

#[test]
fn a_flood_does_not_keep_it_from_being_held() {
    let Pair { mut driver, port: _port, .. } = Pair::new(NO_SIZE, 0);
    let buffer = driver.readable(b"flood ");
    is_held_in_a_flood_of(driver, TX, &[buffer]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_hostile_driver_breaks_nothing(bytes in collection::vec(any::<u8>(), 0..600)) {
        let make = || {
            let port = Port::new(Box::new(std::io::sink()), VT100).unwrap();
            port.push_input(&[b'y'; 5000]);
            console(&port)
        };
        abuse(make, INDIRECT | SIZE, &bytes);
    }
}
