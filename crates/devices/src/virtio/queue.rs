//! A virtqueue in use: a split ring (virtio 1.3, 2.7) in guest memory.
//!
//! The crate that walks the rings reports what is wrong with them through `log`, which nobody collects: a guest could
//! make any number of such reports. The device's own one, of being out of service, is made once.

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicU16, Ordering, fence},
};

use purlin_memory::GuestRam;
use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Error, Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::{Chain, Notifier, Wake};

/// A queue that the driver has enabled. A device takes chains from it, works on them in any order, and gives each
/// back once.
pub struct Virtqueue {
    index: u16,
    memory: Arc<GuestRam>,
    notifier: Arc<Notifier>,
    queue: Mutex<Queue>,
    /// The used index up to which the driver has been told, or need not be.
    told: AtomicU16,
}

impl Virtqueue {
    /// Takes over a queue that the driver has set up. `None` if its rings are not in guest memory, or not aligned.
    pub(super) fn new(
        index: u16,
        state: QueueState,
        memory: Arc<GuestRam>,
        notifier: Arc<Notifier>,
    ) -> Option<Arc<Self>> {
        let queue = Queue::try_from(state).ok()?;
        let told = AtomicU16::new(queue.next_used());
        let queue = queue.is_valid(&*memory).then(|| Mutex::new(queue))?;
        Some(Arc::new(Self { index, memory, notifier, queue, told }))
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its number.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// How to tell the driver that the device needs a reset.
    pub fn notifier(&self) -> &Notifier {
        &self.notifier
    }

    /// Its size: as many chains at most are available or in the device's hands at a time.
    pub fn size(&self) -> u16 {
        self.lock().size()
    }

    /// Takes the next available chain. What no driver would make puts the device out of service.
    pub fn pop(&self) -> Option<Chain<'_>> {
        if self.notifier.is_out_of_service() {
            return None;
        }
        let head = match self.lock().iter(&*self.memory) {
            Ok(mut available) => available.next()?.head_index(),
            Err(error) => {
                self.notifier.needs_reset(&error);
                return None;
            }
        };
        self.chain(head)
    }

    /// The chain `head`, which has been taken and not given back: to begin it anew.
    pub fn again(&self, head: u16) -> Option<Chain<'_>> {
        if self.notifier.is_out_of_service() { None } else { self.chain(head) }
    }

    fn chain(&self, head: u16) -> Option<Chain<'_>> {
        let (table, size) = {
            let queue = self.lock();
            (GuestAddress(queue.desc_table()), queue.size())
        };
        let chain = Chain::parse(&self.memory, table, size, head);
        chain.inspect_err(|malformed| self.notifier.needs_reset(malformed)).ok()
    }

    /// Gives the chain `head` back, of which `written` bytes have been written. The driver learns of it by
    /// [`Virtqueue::notify_driver`].
    pub fn push(&self, head: u16, written: u32) {
        if self.notifier.is_out_of_service() {
            return;
        }
        if let Err(error) = self.lock().add_used(&*self.memory, head, written) {
            self.notifier.needs_reset(&error);
        }
    }

    /// Puts back the last `count` chains taken, as if they never had been.
    pub fn put_back(&self, count: u16) {
        let mut queue = self.lock();
        let next = queue.next_avail().wrapping_sub(count);
        queue.set_next_avail(next);
    }

    /// Gives several chains back at once: the driver sees all of them or none (virtio 1.3, 5.1.6.4: the buffers of one
    /// packet). They are at most [`Virtqueue::size`].
    pub fn push_all(&self, used: &[(u16, u32)]) {
        if self.notifier.is_out_of_service() {
            return;
        }
        if let Err(error) = self.try_push_all(used) {
            self.notifier.needs_reset(&error);
        }
    }

    fn try_push_all(&self, used: &[(u16, u32)]) -> Result<(), Error> {
        let Some((&(last, written), others)) = used.split_last() else { return Ok(()) };
        let mut queue = self.lock();
        let (first, size) = (queue.next_used(), queue.size());
        for (at, &(head, written)) in (0u16..).zip(others) {
            if head >= size {
                return Err(Error::InvalidDescriptorIndex);
            }
            let slot = u64::from(first.wrapping_add(at) % size);
            let element = [u32::from(head).to_le(), written.to_le()];
            let address = GuestAddress(queue.used_ring() + 4 + 8 * slot);
            self.memory.write_obj(element, address).map_err(Error::GuestMemory)?;
        }
        // The index goes on by all of them at once.
        queue.set_next_used(first.wrapping_add(others.len() as u16));
        queue.add_used(&*self.memory, last, written)
    }

    /// Tells the driver that chains have been given back, if it wants to hear of it.
    pub fn notify_driver(&self) {
        let wanted = {
            let mut queue = self.lock();
            self.wants_notification(&mut queue)
        };
        if wanted && !self.notifier.is_out_of_service() {
            self.notifier.used_buffers(self.index);
        }
    }

    fn wants_notification(&self, queue: &mut Queue) -> bool {
        // What was pushed is there before the driver's wishes are read.
        fence(Ordering::SeqCst);
        let ring = queue.avail_ring();
        let load = |offset| self.memory.load::<u16>(GuestAddress(ring + offset), Ordering::Relaxed).map(u16::from_le);
        if queue.event_idx_enabled() {
            // virtio 1.3, 2.7.7.2: whether the index has gone past the driver's `used_event` since.
            let new = queue.next_used();
            let old = self.told.swap(new, Ordering::Relaxed);
            let event = load(4 + 2 * u64::from(queue.size()));
            return event.is_ok_and(|event| new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old));
        }
        load(0).is_ok_and(|flags| flags & VRING_AVAIL_F_NO_INTERRUPT as u16 == 0)
    }

    /// The device is at work: the driver need not notify it of further chains.
    pub fn disable_notification(&self) {
        // It fails only for rings outside memory, which were refused.
        let _ = self.lock().disable_notification(&*self.memory);
    }

    /// The device is about to sleep: the driver is to notify it of further chains. `true` if some came meanwhile.
    pub fn enable_notification(&self) -> bool {
        !self.notifier.is_out_of_service() && self.lock().enable_notification(&*self.memory).unwrap_or(false)
    }

    /// Serves every available chain with `serve`, which returns how many bytes it wrote, and tells the driver: all of
    /// what a worker does that never waits for anything else. It ends early when the worker is told something.
    pub fn serve(&self, wake: &Wake, mut serve: impl FnMut(Chain<'_>) -> u32) {
        loop {
            self.disable_notification();
            let mut served = false;
            while !wake.is_interrupted()
                && let Some(chain) = self.pop()
            {
                let head = chain.head();
                let written = serve(chain);
                self.push(head, written);
                served = true;
            }
            if served {
                self.notify_driver();
            }
            if wake.is_interrupted() || !self.enable_notification() {
                return;
            }
        }
    }

    /// Where the driver and the device are in the rings. Nobody works on the queue.
    pub(super) fn state(&self) -> QueueState {
        self.lock().state()
    }
}
