//! The bus as a kernel meets it.

use std::sync::Mutex;

use super::*;
use crate::pci::{BarSpace, ConfigSpace, Decoders, Endpoint, Identity};

const ADDRESS: Space = Space::Port { range: 0 };
const DATA: Space = Space::Port { range: 1 };
const ECAM: Space = Space::Mmio { range: 0 };
const WINDOW: Space = Space::Mmio { range: 1 };
const START: u64 = 0xc000_0000;

/// A function with registers that remember what was written.
struct Probe {
    endpoint: Endpoint,
    log: Mutex<Vec<(u8, u64, Vec<u8>)>>,
}

impl Probe {
    fn new(bars: &[(u8, BarSpace)]) -> Arc<Self> {
        let identity =
            Identity { vendor: 0x1af4, device: 1, revision: 0, class: 0xff_0000, subsystem_vendor: 0, subsystem: 0 };
        let mut space = ConfigSpace::new(&identity);
        bars.iter().for_each(|&(bar, kind)| space.add_bar(bar, kind));
        Arc::new(Self { endpoint: Endpoint::new(space, None), log: Mutex::default() })
    }

    fn take(&self) -> Vec<(u8, u64, Vec<u8>)> {
        std::mem::take(&mut self.log.lock().unwrap())
    }
}

impl PciFunction for Probe {
    fn name(&self) -> &str {
        "probe"
    }
    fn read_config(&self, register: u16, data: &mut [u8]) {
        self.endpoint.read_config(register, data);
    }
    fn write_config(&self, register: u16, data: &[u8]) {
        self.endpoint.write_config(register, data);
    }
    fn configure(&self, act: &mut dyn FnMut(&mut ConfigSpace)) {
        self.endpoint.configure(act);
    }
    fn decoders(&self) -> &Decoders {
        self.endpoint.decoders()
    }
    fn read_bar(&self, bar: u8, offset: u64, data: &mut [u8]) {
        data.fill(bar + offset as u8);
    }
    fn write_bar(&self, bar: u8, offset: u64, data: &[u8]) {
        self.log.lock().unwrap().push((bar, offset, data.to_vec()));
    }
    fn reset(&self) {
        self.endpoint.reset();
    }
    fn save(&self) -> Section {
        Section { name: "probe".into(), version: 1, data: self.endpoint.save().encode_to_vec() }
    }
    fn restore(&self, saved: &Section) -> Result<(), StateError> {
        self.endpoint.restore(&Message::decode(&*saved.data).unwrap())
    }
}

fn root() -> PciRoot {
    PciRoot::new(Window { start: START, length: 0x2000_0000 })
}

fn read<const N: usize>(root: &PciRoot, space: Space, offset: u64) -> [u8; N] {
    let mut data = [0x55; N];
    root.read(space, offset, &mut data);
    data
}

fn write(root: &PciRoot, space: Space, offset: u64, data: &[u8]) {
    assert_eq!(root.write(space, offset, data), Effect::None);
}

fn select(root: &PciRoot, address: u32) {
    write(root, ADDRESS, 0, &address.to_le_bytes());
}

/// The offset of a register in ECAM.
fn ecam(device: u64, register: u64) -> u64 {
    device << 15 | register
}

#[test]
fn a_kernel_finds_the_mechanism_and_the_host_bridge() {
    let root = root();
    // Linux, pci_check_type1: the address register keeps the enable bit…
    select(&root, 0x8000_0000);
    assert_eq!(u32::from_le_bytes(read(&root, ADDRESS, 0)), 0x8000_0000);
    // …and pci_sanity_check finds a host bridge by its class, read as a word at 0x0a.
    select(&root, 0x8000_0008);
    assert_eq!(u16::from_le_bytes(read(&root, DATA, 2)), 0x0600);
    select(&root, 0x8000_0000);
    assert_eq!(read(&root, DATA, 0), [0x36, 0x1b, 0x08, 0x00]);
    assert_eq!(read(&root, ECAM, 0), [0x36, 0x1b, 0x08, 0x00]);
    select(&root, 0x8000_00fc);
    assert_eq!(read(&root, DATA, 0), [0; 4]);
    // No extended capabilities.
    assert_eq!(read(&root, ECAM, 0x100), [0; 4]);
}

#[test]
fn nothing_else_is_there() {
    let root = root();
    for address in [0, 0x8000_0100, 0x8000_0800, 0x8001_0000, 0x0000_0008] {
        select(&root, address);
        assert_eq!(read(&root, DATA, 0), [0xff; 4], "{address:#x}");
    }
    for offset in [0x1000, 0x8000, 0x10_0000, 0x0fff_fffc] {
        assert_eq!(read(&root, ECAM, offset), [0xff; 4], "{offset:#x}");
        write(&root, ECAM, offset, &[0; 4]);
    }
    assert_eq!(read(&root, WINDOW, 0), [0xff; 8]);
    write(&root, WINDOW, 0x1fff_fffc, &[0; 4]);
}

#[test]
fn the_bridge_cannot_be_written_nor_reserved_address_bits_set() {
    let root = root();
    select(&root, 0xffff_ffff);
    assert_eq!(u32::from_le_bytes(read(&root, ADDRESS, 0)), 0x80ff_fffc);
    select(&root, 0x8000_0004);
    write(&root, DATA, 0, &[0xff; 4]);
    assert_eq!(read(&root, DATA, 0), [0; 4]);
}

#[test]
fn both_mechanisms_reach_the_same_registers() {
    let mut root = root();
    root.add(Devfn::of_device(3), Probe::new(&[(0, BarSpace::Memory32(0x1000))]));
    write(&root, ECAM, ecam(3, 0x10), &0xd000_0000u32.to_le_bytes());
    select(&root, 0x8000_1810);
    assert_eq!(read(&root, DATA, 0), 0xd000_0000u32.to_le_bytes());
    write(&root, DATA, 2, &[0x12, 0xd0]);
    // Eight bytes are two registers; a byte is a byte.
    assert_eq!(read(&root, ECAM, ecam(3, 0x0c)), [0, 0, 0, 0, 0, 0, 0x12, 0xd0]);
    assert_eq!(read(&root, ECAM, ecam(3, 0x12)), [0x12]);
    // Across two registers, and at the very end.
    assert_eq!(read(&root, ECAM, ecam(3, 0x0e)), [0, 0, 0, 0]);
    assert_eq!(read::<8>(&root, ECAM, ecam(3, 0xffe)), [0; 8]);
}

#[test]
fn firmware_gives_addresses_largest_first_and_registers_answer_there() {
    let mut root = root();
    let (one, two) = (
        Probe::new(&[(0, BarSpace::Memory32(0x1000)), (1, BarSpace::Memory32(0x4000))]),
        Probe::new(&[(2, BarSpace::Memory64(0x8000))]),
    );
    root.add(Devfn::of_device(1), one.clone());
    root.add(Devfn::of_device(2), two.clone());
    root.assign_addresses();
    assert_eq!(read(&root, ECAM, ecam(2, 0x18)), 0xc000_0004u32.to_le_bytes());
    assert_eq!(read(&root, ECAM, ecam(1, 0x14)), 0xc000_8000u32.to_le_bytes());
    assert_eq!(read(&root, ECAM, ecam(1, 0x10)), 0xc000_c000u32.to_le_bytes());
    write(&root, WINDOW, 0xc004, &[1, 2]);
    write(&root, WINDOW, 0x7fff, &[3]);
    // Half of this one is another's: nobody's.
    write(&root, WINDOW, 0x7ffe, &[0; 4]);
    assert_eq!((one.take(), two.take()), (vec![(0, 4, vec![1, 2])], vec![(2, 0x7fff, vec![3])]));

    // The guest moves one, and switches the other off.
    write(&root, ECAM, ecam(1, 0x10), &0xc100_0000u32.to_le_bytes());
    write(&root, ECAM, ecam(2, 0x04), &[0, 0]);
    assert_eq!(read::<2>(&root, WINDOW, 0x100_0003), [3, 3]);
    assert_eq!(read::<2>(&root, WINDOW, 0xc000), [0xff, 0xff]);
    assert_eq!(read::<2>(&root, WINDOW, 0), [0xff, 0xff]);
}

#[test]
fn what_does_not_fit_stays_off() {
    let mut root = PciRoot::new(Window { start: START, length: 0x1000 });
    let probe = Probe::new(&[(0, BarSpace::Memory32(0x2000)), (1, BarSpace::Memory32(0x1000))]);
    root.add(Devfn::of_device(1), probe.clone());
    root.assign_addresses();
    write(&root, WINDOW, 0, &[1]);
    assert_eq!(probe.take(), [(1, 0, vec![1])]);
}

#[test]
fn the_bus_is_saved_with_its_functions() {
    let make = || {
        let mut root = root();
        root.add(Devfn::of_device(1), Probe::new(&[(0, BarSpace::Memory32(0x1000))]));
        root
    };
    let (first, second) = (make(), make());
    first.assign_addresses();
    select(&first, 0x8000_0810);
    let mut state = SavedState::default();
    first.save(&mut state);
    second.restore(&state).unwrap();
    assert_eq!(read::<4>(&second, DATA, 0), 0xc000_0000u32.to_le_bytes());
    assert_eq!(read::<1>(&second, WINDOW, 7), [7]);
    second.reset();
    assert_eq!(read::<4>(&second, ADDRESS, 0), [0; 4]);
    assert_eq!(read::<1>(&second, WINDOW, 7), [0xff]);
    state.sections.pop();
    assert!(matches!(second.restore(&state), Err(StateError::Missing { name }) if name == "probe"));
}

#[test]
#[should_panic(expected = "two functions")]
fn two_functions_cannot_share_a_number() {
    root().add(Devfn::of_device(0), Probe::new(&[]));
}
