//! What several tests need.
#![allow(dead_code, reason = "each test uses some of it")]

pub mod counting;

use purlin_engine::memory::{GuestRam, data};
use vm_memory::{Bytes, GuestAddress};

/// Copies what there is; a page that was never touched stays so.
pub fn copy_memory(from: &GuestRam, to: &GuestRam) {
    for range in data(from).unwrap() {
        let mut bytes = vec![0; (range.end - range.start) as usize];
        from.read_slice(&mut bytes, GuestAddress(range.start)).unwrap();
        to.write_slice(&bytes, GuestAddress(range.start)).unwrap();
    }
}
