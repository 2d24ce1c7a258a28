//! The futures of one queue's requests, and who of them wants to be polled.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, Wake, Waker},
};

use crate::{error::IoError, event::EventWaker, queue::Completion};

/// What a request is.
pub(crate) type Future<'m> = Pin<Box<dyn std::future::Future<Output = Result<(), IoError>> + 'm>>;

/// Requests that are begun and not done.
pub(crate) struct Tasks<'m> {
    slots: Vec<Slot<'m>>,
    free: Vec<usize>,
    woken: Arc<Woken>,
}

/// A place for a request. Its waker is used again: one wake-up too many does no harm.
struct Slot<'m> {
    task: Option<(u64, Future<'m>)>,
    waker: Waker,
}

/// Places that want to be polled. Wakers of other threads (who held a lock of the same image) come here, too.
struct Woken {
    list: Mutex<Vec<usize>>,
    event: EventWaker,
}

struct SlotWaker {
    slot: usize,
    woken: Arc<Woken>,
}

impl Wake for SlotWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.woken.list.lock().unwrap_or_else(PoisonError::into_inner).push(self.slot);
        self.woken.event.wake();
    }
}

impl<'m> Tasks<'m> {
    pub fn new(event: EventWaker) -> Self {
        Self { slots: Vec::new(), free: Vec::new(), woken: Arc::new(Woken { list: Mutex::default(), event }) }
    }

    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes a request up and polls it for the first time.
    pub fn begin(&mut self, tag: u64, future: Future<'m>) -> Option<Completion> {
        let slot = self.free.pop().unwrap_or_else(|| {
            let slot = self.slots.len();
            let waker = Waker::from(Arc::new(SlotWaker { slot, woken: self.woken.clone() }));
            self.slots.push(Slot { task: None, waker });
            slot
        });
        self.slots[slot].task = Some((tag, future));
        self.poll(slot)
    }

    /// The places that want to be polled.
    pub fn take_woken(&self) -> Vec<usize> {
        std::mem::take(&mut self.woken.list.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Polls the request in a place, if there is one still.
    pub fn poll(&mut self, slot: usize) -> Option<Completion> {
        let place = self.slots.get_mut(slot)?;
        let (tag, future) = place.task.as_mut()?;
        let Poll::Ready(result) = future.as_mut().poll(&mut Context::from_waker(&place.waker)) else { return None };
        let completion = Completion { tag: *tag, result };
        place.task = None;
        self.free.push(slot);
        Some(completion)
    }
}
