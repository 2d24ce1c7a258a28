//! A descriptor chain, checked once and in full: whoever works on it has slices of guest memory, not the guest's word.

use purlin_memory::{GuestRam, LogSlice};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, VolatileSlice};

/// Slices of guest memory, in order. Whoever writes to them through raw pointers marks them dirty afterwards.
pub type Slices<'m> = Vec<VolatileSlice<'m, LogSlice>>;

/// A request as the driver laid it out: first what the device reads, then what it writes (virtio 1.3, 2.7.4.2).
pub struct Chain<'m> {
    head: u16,
    /// What the device reads.
    pub readable: Slices<'m>,
    /// What the device writes.
    pub writable: Slices<'m>,
}

/// What is wrong with a chain. No driver makes such; the device needs a reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// The chain loops, or leads out of its table or of memory; or its indirect table is none.
    #[error("a descriptor chain has no end")]
    Endless,
    /// There is nothing in it.
    #[error("a descriptor chain is empty")]
    Empty,
    /// A buffer is not in guest memory.
    #[error("a buffer is not in guest memory")]
    Outside,
    /// A buffer that the device reads comes after one that it writes.
    #[error("a descriptor chain has its buffers in the wrong order")]
    Order,
    /// The device type has no such request.
    #[error("a request is malformed")]
    Request,
}

/// The most descriptors of a chain. Drivers are told to make none longer than the queue (virtio 1.3, 2.7.5.3.1), and
/// the transport offers none above this.
const MOST_DESCRIPTORS: usize = 1024;

impl<'m> Chain<'m> {
    /// Reads the descriptors of the chain `head` of a queue's `table`, which has `size`.
    pub(super) fn parse(memory: &'m GuestRam, table: GuestAddress, size: u16, head: u16) -> Result<Self, Malformed> {
        let mut parsed = Self { head, readable: Vec::new(), writable: Vec::new() };
        let (mut last, mut writes) = (None, false);
        let descriptors = Descriptors { memory, table, size: size.into(), next: Some(head), is_indirect: false };
        for descriptor in descriptors.take(MOST_DESCRIPTORS) {
            if writes && !descriptor.is_write_only() {
                return Err(Malformed::Order);
            }
            writes = descriptor.is_write_only();
            let to = if writes { &mut parsed.writable } else { &mut parsed.readable };
            append(to, memory, descriptor.addr(), descriptor.len())?;
            last = Some(descriptor);
        }
        // The iterator ends at a descriptor without a successor, but also at one that it cannot get.
        match last {
            None => Err(Malformed::Empty),
            Some(last) if last.has_next() => Err(Malformed::Endless),
            Some(_) => Ok(parsed),
        }
    }

    /// The chain's number, by which it is given back.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Bytes that the device can read. (A chain has less than 4 GiB.)
    pub fn readable_length(&self) -> usize {
        self.readable.iter().map(VolatileSlice::len).sum()
    }

    /// Bytes that the device can write.
    pub fn writable_length(&self) -> usize {
        self.writable.iter().map(VolatileSlice::len).sum()
    }

    /// Takes the first `data.len()` bytes from [`Chain::readable`].
    pub fn read(&mut self, data: &mut [u8]) -> Result<(), Malformed> {
        let head = take_front(&mut self.readable, data.len()).ok_or(Malformed::Request)?;
        let mut done = 0;
        for slice in head {
            done += slice.copy_to(&mut data[done..]);
        }
        Ok(())
    }

    /// Takes the last `length` bytes off [`Chain::writable`]: where requests have their status.
    pub fn split_writable_end(&mut self, length: usize) -> Result<Slices<'m>, Malformed> {
        let rest = self.writable_length().checked_sub(length).ok_or(Malformed::Request)?;
        let front = take_front(&mut self.writable, rest).ok_or(Malformed::Request)?;
        Ok(std::mem::replace(&mut self.writable, front))
    }
}

/// The descriptors of a chain, up to the first that has no successor or cannot be got.
struct Descriptors<'m> {
    memory: &'m GuestRam,
    table: GuestAddress,
    /// How many the table has.
    size: u32,
    next: Option<u16>,
    /// The table is an indirect one: there is but one level of those (virtio 1.3, 2.7.5.3.1).
    is_indirect: bool,
}

impl Iterator for Descriptors<'_> {
    type Item = Descriptor;

    fn next(&mut self) -> Option<Descriptor> {
        let mut descriptor = self.at(self.next?)?;
        if descriptor.refers_to_indirect_table() {
            if std::mem::replace(&mut self.is_indirect, true) || !descriptor.len().is_multiple_of(DESCRIPTOR) {
                return None;
            }
            (self.table, self.size) = (descriptor.addr(), descriptor.len() / DESCRIPTOR);
            descriptor = self.at(0).filter(|first| !first.refers_to_indirect_table())?;
        }
        self.next = descriptor.has_next().then(|| descriptor.next());
        Some(descriptor)
    }
}

/// Bytes of a descriptor.
const DESCRIPTOR: u32 = size_of::<Descriptor>() as u32;

impl Descriptors<'_> {
    fn at(&self, index: u16) -> Option<Descriptor> {
        let inside = u32::from(index) < self.size;
        let address = inside.then(|| self.table.0.checked_add(u64::from(index) * u64::from(DESCRIPTOR)))??;
        self.memory.read_obj(GuestAddress(address)).ok()
    }
}

/// Copies as much of `data` as fits into `slices`; returns how much.
pub fn fill(slices: &[VolatileSlice<'_, LogSlice>], data: &[u8]) -> usize {
    let mut done = 0;
    for slice in slices {
        let count = slice.len().min(data.len() - done);
        slice.copy_from(&data[done..][..count]);
        done += count;
    }
    done
}

/// Cuts `length` bytes off the front; `None` if there are not so many.
fn take_front<'m>(slices: &mut Slices<'m>, length: usize) -> Option<Slices<'m>> {
    let (mut front, mut missing) = (Vec::new(), length);
    while missing > 0 {
        let first = slices.first()?;
        if first.len() <= missing {
            missing -= first.len();
            front.push(slices.remove(0));
        } else {
            let (head, tail) = first.split_at(missing).ok()?;
            slices[0] = tail;
            front.push(head);
            missing = 0;
        }
    }
    Some(front)
}

/// A buffer may lie across memory slots.
fn append<'m>(to: &mut Slices<'m>, memory: &'m GuestRam, address: GuestAddress, length: u32) -> Result<(), Malformed> {
    for slice in GuestMemoryBackend::get_slices(memory, address, length as usize) {
        to.push(slice.map_err(|_| Malformed::Outside)?);
    }
    Ok(())
}
