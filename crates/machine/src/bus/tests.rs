//! The bus and its deadlines, with a device that records what happens to it.

use std::{
    sync::mpsc::{self, Receiver, Sender},
    thread,
    time::Duration,
};

use purlin_state::Section;

use super::*;
use crate::deadlines::DeadlineThread;

/// Remembers accesses, and tells of each deadline that came.
struct Probe {
    name: &'static str,
    log: Vec<(Space, u64, Vec<u8>)>,
    now: u64,
    deadline: Option<u64>,
    fired: Sender<(u64, u64)>,
}

impl Probe {
    fn new(name: &'static str) -> (Arc<Mutex<Self>>, Receiver<(u64, u64)>) {
        let (fired, receiver) = mpsc::channel();
        (Arc::new(Mutex::new(Self { name, log: Vec::new(), now: 0, deadline: None, fired })), receiver)
    }
}

impl Device for Probe {
    fn name(&self) -> &str {
        self.name
    }

    fn read(&mut self, space: Space, offset: u64, data: &mut [u8]) {
        self.log.push((space, offset, vec![0; data.len()]));
        data.fill(offset as u8);
    }

    fn write(&mut self, space: Space, offset: u64, data: &[u8]) -> Effect {
        self.log.push((space, offset, data.to_vec()));
        match data[0] {
            0xaa => Effect::PowerOff,
            0xbb => Effect::Reset,
            _ => Effect::None,
        }
    }

    fn reset(&mut self) {
        self.log.clear();
    }

    fn save(&self) -> Section {
        Section { name: self.name.into(), version: 1, data: self.now.to_le_bytes().to_vec() }
    }

    fn restore(&mut self, saved: &Section) -> Result<(), StateError> {
        self.deadline = Some(saved.version.into());
        Ok(())
    }

    fn deadline(&self) -> Option<u64> {
        self.deadline
    }

    fn advance(&mut self, now: u64) {
        assert!(now >= self.now, "time went back");
        self.now = now;
        if let Some(deadline) = self.deadline.take_if(|d| *d <= now) {
            self.fired.send((deadline, now)).unwrap();
        }
    }
}

/// Remembers what reaches it; names itself in its section.
#[derive(Default)]
struct Behind {
    log: Mutex<Vec<(Space, u64, Vec<u8>)>>,
}

impl Bridge for Behind {
    fn read(&self, space: Space, offset: u64, data: &mut [u8]) {
        lock(&self.log).push((space, offset, vec![0; data.len()]));
        data.fill(0x42);
    }
    fn write(&self, space: Space, offset: u64, data: &[u8]) -> Effect {
        lock(&self.log).push((space, offset, data.to_vec()));
        Effect::Reset
    }
    fn reset(&self) {
        lock(&self.log).clear();
    }
    fn save(&self, state: &mut SavedState) {
        state.sections.push(Section { name: "behind".into(), version: 1, data: Vec::new() });
    }
    fn restore(&self, state: &SavedState) -> Result<(), StateError> {
        state.section("behind").map(drop)
    }
    fn hold(&self) {
        lock(&self.log).push((RANGE0, 0, b"hold".to_vec()));
    }
    fn open(&self) {
        lock(&self.log).push((RANGE0, 0, b"open".to_vec()));
    }
}

#[test]
fn a_bridge_answers_saves_and_is_held_as_devices_are() {
    let (mut bus, _) = bus();
    let behind = Arc::new(Behind::default());
    let window = Addresses::Mmio(0xc000_0000..=0xc000_0fff);
    bus.add_bridge(behind.clone(), &[Addresses::Dword(0xcf8), Addresses::Ports(0xcfc..=0xcff), window]);
    let log = || std::mem::take(&mut *lock(&behind.log));
    assert_eq!(read(&bus, 0xcfe, 2), [0x42; 2]);
    assert_eq!(bus.write_ports(0xcf8, &[1, 2, 3, 4]), Effect::Reset);
    assert_eq!(bus.write_mmio(0xc000_0ff8, &[5; 8]), Effect::Reset);
    // Half inside: the bus splits.
    let mut data = [0; 2];
    bus.read_mmio(0xc000_0fff, &mut data);
    assert_eq!(data, [0x42, 0xff]);
    let mmio = Space::Mmio { range: 0 };
    let seen =
        [(RANGE1, 2, vec![0; 2]), (RANGE0, 0, vec![1, 2, 3, 4]), (mmio, 0xff8, vec![5; 8]), (mmio, 0xfff, vec![0])];
    assert_eq!(log(), seen);

    bus.hold();
    bus.open();
    assert_eq!(log(), [(RANGE0, 0, b"hold".to_vec()), (RANGE0, 0, b"open".to_vec())]);
    let mut state = SavedState::default();
    bus.save(&mut state);
    bus.restore(&state).unwrap();
    state.sections.pop();
    assert!(matches!(bus.restore(&state), Err(StateError::Missing { name }) if name == "behind"));
    assert_eq!(read(&bus, 0xcfc, 1), [0x42]);
    bus.reset();
    assert_eq!(log(), []);
}

const RANGE0: Space = Space::Port { range: 0 };
const RANGE1: Space = Space::Port { range: 1 };

/// A device at ports 0x40 to 0x43 and 0x61, another at 0x44, one at 0xfec0_0000.
fn bus() -> (DeviceBus, [Handle<Probe>; 3]) {
    let mut bus = DeviceBus::new(Arc::default());
    let a = bus.add(Probe::new("a").0, &[Addresses::Ports(0x40..=0x43), Addresses::Ports(0x61..=0x61)]);
    let b = bus.add(Probe::new("b").0, &[Addresses::Ports(0x44..=0x44)]);
    let c = bus.add(Probe::new("c").0, &[Addresses::Mmio(0xfec0_0000..=0xfec0_0fff)]);
    (bus, [a, b, c])
}

fn log(handle: &Handle<Probe>) -> Vec<(Space, u64, Vec<u8>)> {
    std::mem::take(&mut lock(&handle.device).log)
}

fn read(bus: &DeviceBus, port: u16, length: usize) -> Vec<u8> {
    let mut data = vec![0x55; length];
    bus.read_ports(port, &mut data);
    data
}

#[test]
fn an_access_reaches_its_device_by_range_and_offset() {
    let (bus, [a, b, c]) = bus();
    assert_eq!(bus.write_ports(0x42, &[1, 2]), Effect::None);
    assert_eq!(bus.write_ports(0x61, &[3]), Effect::None);
    assert_eq!(log(&a), [(RANGE0, 2, vec![1, 2]), (RANGE1, 0, vec![3])]);
    assert_eq!(bus.write_mmio(0xfec0_0010, &[4; 4]), Effect::None);
    assert_eq!(log(&c), [(Space::Mmio { range: 0 }, 0x10, vec![4; 4])]);
    assert!(log(&b).is_empty());
}

#[test]
fn nobody_answers_with_ones() {
    let (bus, _) = bus();
    for (port, length) in [(0x3f, 1), (0x45, 4), (0x62, 1), (0xffff, 4), (0, 1)] {
        assert_eq!(read(&bus, port, length), vec![0xff; length], "{port:#x}");
    }
    let mut data = [0; 8];
    for address in [0, 0xfebf_fff8, 0xfec0_1000, u64::MAX - 3] {
        bus.read_mmio(address, &mut data);
        assert_eq!(data, [0xff; 8], "{address:#x}");
        assert_eq!(bus.write_mmio(address, &data), Effect::None);
        data.fill(0);
    }
}

#[test]
fn an_access_across_devices_is_split_into_bytes() {
    let (bus, [a, b, _]) = bus();
    assert_eq!(read(&bus, 0x43, 4), [3, 0, 0xff, 0xff]);
    assert_eq!((log(&a), log(&b)), (vec![(RANGE0, 3, vec![0])], vec![(RANGE0, 0, vec![0])]));
    // Of several effects the first one counts.
    assert_eq!(bus.write_ports(0x43, &[0xaa, 0xbb]), Effect::PowerOff);
    assert_eq!(read(&bus, 0x3f, 2), [0xff, 0]);
}

#[test]
fn a_dword_register_shares_its_ports_with_narrower_ones() {
    let mut bus = DeviceBus::new(Arc::default());
    let a = bus.add(Probe::new("a").0, &[Addresses::Dword(0xcf8), Addresses::Ports(0xcfc..=0xcff)]);
    let b = bus.add(Probe::new("b").0, &[Addresses::Ports(0xcf9..=0xcf9)]);
    for (port, data) in [(0xcf8, &[0xaa, 0xbb, 0, 0][..]), (0xcf9, &[0xbb]), (0xcf8, &[0xaa]), (0xcfc, &[1; 4])] {
        let effect = bus.write_ports(port, data);
        assert_eq!(effect == Effect::Reset, port == 0xcf9, "{port:#x}");
    }
    assert_eq!(log(&a), [(RANGE0, 0, vec![0xaa, 0xbb, 0, 0]), (RANGE1, 0, vec![1; 4])]);
    assert_eq!(log(&b), [(RANGE0, 0, vec![0xbb])]);
}

#[test]
#[should_panic(expected = "two devices")]
fn two_devices_cannot_share_an_address() {
    let (mut bus, _) = bus();
    bus.add(Probe::new("d").0, &[Addresses::Ports(0x3f..=0x40)]);
}

#[test]
fn devices_are_told_the_time_before_an_access_and_when_their_deadline_comes() {
    let clock = Arc::new(Clock::default());
    let mut bus = DeviceBus::new(clock.clone());
    let (probe, fired) = Probe::new("a");
    let probe = bus.add(probe, &[Addresses::Ports(0..=0)]);
    let bus = Arc::new(bus);
    let thread = DeadlineThread::start(bus.clone()).unwrap();
    let now = |bus: &DeviceBus| bus.with(&probe, |p| p.now);
    let set = |ms: u64| {
        bus.with(&probe, |p| {
            p.deadline = Some(p.now + ms * 1_000_000);
            p.now + ms * 1_000_000
        })
    };

    // While the clock stands, a deadline does not come.
    set(1);
    thread::sleep(Duration::from_millis(10));
    assert!(fired.try_recv().is_err());
    assert_eq!(now(&bus), 0);

    clock.start();
    thread.resume();
    let (deadline, at) = fired.recv_timeout(Duration::from_secs(10)).unwrap();
    assert!(at >= deadline);

    // An earlier deadline than the one that is waited for is served first; a later one too.
    set(60_000);
    thread::sleep(Duration::from_millis(5));
    let expected = set(2);
    let (deadline, at) = fired.recv_timeout(Duration::from_secs(10)).unwrap();
    assert_eq!(deadline, expected);
    assert!(at >= deadline);

    // After a pause nothing comes any more.
    set(5);
    thread.pause();
    clock.stop();
    let stopped = clock.now();
    thread::sleep(Duration::from_millis(20));
    assert!(fired.try_recv().is_err());
    assert_eq!(now(&bus), stopped);
    clock.start();
    thread.resume();
    fired.recv_timeout(Duration::from_secs(10)).unwrap();
}

#[test]
fn saved_devices_are_found_by_name_and_their_deadlines_are_known_at_once() {
    let (bus, [a, ..]) = bus();
    let mut state = SavedState::default();
    bus.save(&mut state);
    assert_eq!(state.sections.iter().map(|s| s.name.as_str()).collect::<Vec<_>>(), ["a", "b", "c"]);
    assert_eq!(bus.earliest_deadline(), u64::MAX);
    state.sections.reverse();
    bus.restore(&state).unwrap();
    assert_eq!(bus.earliest_deadline(), 1);
    state.sections.pop();
    assert!(matches!(bus.restore(&state), Err(StateError::Missing { name }) if name == "a"));
    assert_eq!(bus.write_ports(0x40, &[1]), Effect::None);
    bus.reset();
    assert!(log(&a).is_empty());
}
