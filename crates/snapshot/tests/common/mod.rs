//! What several tests need: memory to be written, and states that can be told apart.
#![allow(dead_code, reason = "each test uses some of it")]

use std::{path::Path, sync::Arc};

use purlin_memory::{Freeze, GuestRam, Layer, PAGE_SIZE, create};
use purlin_snapshot::{Contents, Parent, Written, write};
use purlin_state::{SavedState, Section};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

/// Two slots with a hole between them.
pub const SLOTS: [(u64, u64); 2] = [(0, 40 * PAGE_SIZE), (50 * PAGE_SIZE, 300 * PAGE_SIZE)];
/// The first page behind the last slot.
pub const PAGES: u64 = 350;

pub fn memory() -> Arc<GuestRam> {
    Arc::new(create(&SLOTS).unwrap())
}

/// Fills a page with `value`, and its number.
pub fn put(ram: &GuestRam, page: u64, value: u8) {
    let mut bytes = [value; PAGE_SIZE as usize];
    if value != 0 {
        bytes[..8].copy_from_slice(&page.to_le_bytes());
    }
    // There may be no memory.
    let _ = ram.write_slice(&bytes, GuestAddress(page * PAGE_SIZE));
}

pub fn freeze(ram: &Arc<GuestRam>) -> Vec<Layer> {
    Freeze::begin(ram).unwrap().finish().unwrap().into_layers().unwrap()
}

/// All that is in memory.
pub fn content(ram: &GuestRam) -> Vec<u8> {
    let mut all = Vec::new();
    for (start, length) in SLOTS {
        let mut bytes = vec![0; length as usize];
        ram.read_slice(&mut bytes, GuestAddress(start)).unwrap();
        all.extend(bytes);
    }
    all
}

pub fn content_of(layers: &[Layer]) -> Vec<u8> {
    let ram = purlin_memory::from_layers(layers).unwrap();
    assert_eq!(ram.iter().count(), SLOTS.len());
    content(&ram)
}

pub fn state(number: u32) -> SavedState {
    let section = |name: &str| Section { name: name.into(), version: number, data: vec![number as u8; 50] };
    SavedState { sections: vec![section("vcpu0"), section("pit")] }
}

pub fn take(
    path: &Path,
    number: u32,
    memory: &[Layer],
    parent: Option<&Parent>,
) -> Result<Written, purlin_snapshot::SnapshotError> {
    let state = state(number);
    write(path, &Contents { machine: "web-1", state: &state, memory, disks: &[], parent })
}
