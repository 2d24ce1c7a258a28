//! Guest physical memory: slots at host addresses that stay put, who has written to them, and their content at one
//! moment, for clones and snapshots.
//!
//! [`GuestRam`] is what vm-memory calls a guest memory; its bitmap type [`PageLog`] is called for every write that
//! devices and boot methods make, so that an engine that has translated code from a page hears of it. (A write by the
//! engine's own guest code is the engine's affair.)
//!
//! | file | subject |
//! |---|---|
//! | `mapping.rs` | where a slot lies in this process, and what is mapped there |
//! | `log.rs` | who has written to a slot |
//! | `layer.rs` | a slot's content at one moment |
//! | `freeze.rs` | how memory becomes layers while the machine goes on |
//! | `copy.rs` | the pages that a freeze copies, by a child process where they are many |
//! | `restore.rs` | memory made of nothing, and of layers |
//! | `pagemap.rs` | which pages a machine with layers has written |
//! | `discard.rs` | memory that goes back to the host |

mod copy;
mod discard;
mod freeze;
mod layer;
mod log;
mod mapping;
mod pagemap;
mod restore;

pub use discard::discard;
pub use freeze::{Freeze, FrozenMemory, data, usage};
pub use layer::{Layer, LayersMessage, receive, send};
pub use log::{LogSlice, PageLog, WriteObserver};
pub use pagemap::prepare;
pub use restore::{create, from_layers};
use vm_memory::{GuestMemoryMmap, MmapRegion};

/// Guest physical memory.
pub type GuestRam = GuestMemoryMmap<PageLog>;

/// The mapping type of a slot.
pub type Slot = MmapRegion<PageLog>;

/// Size of the page that the log counts in: 4 KiB.
pub const PAGE_SIZE: u64 = 4096;

/// Why guest memory could not be made or frozen.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host refused it.
    #[error("cannot allocate guest memory: {0}")]
    Host(rustix::io::Errno),
    /// The slots make no sense, or do not fit the host's address space.
    #[error("cannot map guest memory: {0}")]
    Layout(String),
    /// The content of a slot cannot be read or copied.
    #[error("cannot copy guest memory: {0}")]
    Copy(#[from] std::io::Error),
    /// A layer that is received is not one.
    #[error("cannot use a layer of guest memory: {0}")]
    Layer(String),
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

    use super::{mapping::HUGE_PAGE_SIZE, *};

    #[derive(Default)]
    struct Heard(Mutex<Vec<(u64, u64)>>);

    impl WriteObserver for Heard {
        fn written(&self, address: u64, length: u64) {
            self.0.lock().unwrap().push((address, length));
        }
    }

    const SLOT: u64 = 16 * PAGE_SIZE;

    /// Bytes that the host has given for it.
    fn taken(ram: &GuestRam) -> u64 {
        usage(ram).unwrap()
    }

    #[test]
    fn a_slot_lies_in_huge_pages_as_in_the_guest() {
        let starts = [0, 0xc_0000, HUGE_PAGE_SIZE + PAGE_SIZE];
        let ram = create(&starts.map(|start| (start, SLOT))).unwrap();
        for (slot, start) in ram.iter().zip(starts) {
            assert_eq!(slot.as_ptr() as u64 % HUGE_PAGE_SIZE, start % HUGE_PAGE_SIZE);
        }
        ram.write_obj(7u8, GuestAddress(0xc_0000 + SLOT - 1)).unwrap();
        assert_eq!(taken(&ram), PAGE_SIZE);
    }

    #[test]
    fn what_is_discarded_is_the_hosts_again_and_zero() {
        // Two slots with a hole between them.
        let ram = create(&[(0, SLOT), (2 * SLOT, SLOT)]).unwrap();
        let fill = || {
            for start in [0, 2 * SLOT] {
                ram.write_slice(&vec![0xaa; SLOT as usize], GuestAddress(start)).unwrap();
            }
        };
        let read = |address| ram.read_obj::<u8>(GuestAddress(address)).unwrap();
        fill();
        assert_eq!(taken(&ram), 2 * SLOT);
        // From the midst of a page to the midst of another: the whole ones between them.
        discard(&ram, PAGE_SIZE - 1, 2 * PAGE_SIZE + 2).unwrap();
        assert_eq!(taken(&ram), 2 * SLOT - 2 * PAGE_SIZE);
        let at = [0, PAGE_SIZE - 1, PAGE_SIZE, 3 * PAGE_SIZE - 1, 3 * PAGE_SIZE].map(read);
        assert_eq!(at, [0xaa, 0xaa, 0, 0, 0xaa]);
        // It can be used again.
        ram.write_obj(7u8, GuestAddress(PAGE_SIZE)).unwrap();
        assert_eq!((read(PAGE_SIZE), read(PAGE_SIZE + 1)), (7, 0));
        // Nothing, nowhere, everywhere.
        fill();
        for (address, length) in [(5, 0), (SLOT, SLOT), (3 * SLOT, u64::MAX), (u64::MAX, 1), (100, 200)] {
            discard(&ram, address, length).unwrap();
            assert_eq!(taken(&ram), 2 * SLOT, "{address:#x} {length:#x}");
        }
        discard(&ram, SLOT - PAGE_SIZE, SLOT + 2 * PAGE_SIZE).unwrap();
        assert_eq!(taken(&ram), 2 * SLOT - 2 * PAGE_SIZE);
        discard(&ram, 0, u64::MAX).unwrap();
        assert_eq!(taken(&ram), 0);
    }

    #[test]
    fn who_watches_a_page_hears_that_it_is_discarded() {
        let ram = create(&[(0, SLOT), (SLOT, SLOT)]).unwrap();
        let heard = Arc::new(Heard::default());
        for slot in ram.iter() {
            (**slot).bitmap().set_observer(heard.clone());
        }
        let second = ram.iter().nth(1).unwrap();
        (**second).bitmap().watch(3, true);
        discard(&ram, SLOT, 3 * PAGE_SIZE).unwrap();
        assert_eq!(*heard.0.lock().unwrap(), []);
        discard(&ram, 0, SLOT + 4 * PAGE_SIZE).unwrap();
        assert_eq!(*heard.0.lock().unwrap(), [(SLOT, 4 * PAGE_SIZE)]);
    }
}
