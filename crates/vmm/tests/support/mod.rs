//! What several tests need.

use purlin_engine::memory::GuestRam;
use rustix::fs::{SeekFrom, seek};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

/// Copies what there is; a page that was never touched stays so.
pub fn copy_memory(from: &GuestRam, to: &GuestRam) {
    for region in from.iter() {
        let (file, first) = region.file_offset().map(|offset| (offset.file(), offset.start())).unwrap();
        let mut at = first;
        while let Ok(start) = seek(file, SeekFrom::Data(at)) {
            let end = seek(file, SeekFrom::Hole(start)).unwrap();
            let mut bytes = vec![0; (end - start) as usize];
            let address = GuestAddress(region.start_addr().0 + start - first);
            from.read_slice(&mut bytes, address).unwrap();
            to.write_slice(&bytes, address).unwrap();
            at = end;
        }
    }
}
