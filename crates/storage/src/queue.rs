//! A queue of requests to a disk, served by the thread that owns it.
//!
//! There is no other thread and no lock between a request and the kernel: [`Queue::submit`] begins it,
//! [`Queue::completed`] tells the kernel of all that was begun and takes what is done. In between, the thread may sleep
//! until [`Queue::event`] is readable. Each request is a future; what it waits for is in the queue's io_uring.

use std::{
    collections::VecDeque,
    os::fd::{AsFd, BorrowedFd},
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use vm_memory::bitmap::BitmapSlice;

use crate::{
    disk::{Disk, Request},
    error::IoError,
    event::Event,
    ring::{self, Ring},
    tasks::{Future, Tasks},
};

/// A request that is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// As it was given to [`Queue::submit`].
    pub tag: u64,
    /// What became of it.
    pub result: Result<(), IoError>,
}

/// A queue of requests, inside [`Queue::scope`].
///
/// A thread that has requests in flight must come back to [`Queue::completed`] whenever [`Queue::event`] is readable:
/// requests of other queues of the same disk may wait for them.
pub struct Queue<'m> {
    disk: Arc<Disk>,
    /// Dropped before the ring, and waits for what is in flight.
    tasks: Tasks<'m>,
    ring: Option<Rc<Ring>>,
    event: Event,
    /// What the limits hold back, with the bytes that each will be charged for.
    held: VecDeque<(u64, u64, Future<'m>)>,
    done: VecDeque<Completion>,
}

impl<'m> Queue<'m> {
    /// Runs `serve` with a new queue for `disk`, and waits at its end for all requests that are in flight.
    ///
    /// A queue is only lent, because the kernel writes to guest memory (which lives for `'m`) until they are done: one
    /// that could be forgotten could not be waited for.
    pub fn scope<R>(disk: &Arc<Disk>, serve: impl FnOnce(&mut Queue<'m>) -> R) -> std::io::Result<R> {
        let ring = Ring::new();
        let event = Event::new(ring.as_deref())?;
        let tasks = Tasks::new(event.waker());
        let mut queue = Queue { disk: disk.clone(), tasks, ring, event, held: VecDeque::new(), done: VecDeque::new() };
        let result = serve(&mut queue);
        queue.held.clear();
        queue.drain();
        Ok(result)
    }

    /// The disk that it serves.
    pub fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }

    /// Begins `request`. Its [`Completion`] has this `tag`; order is that of completion, not of submission.
    pub fn submit<B: BitmapSlice + 'm>(&mut self, tag: u64, request: Request<'m, B>) {
        let bytes = request.transferred();
        // A flush moves nothing, and slowing it down would only make guests wait that flush often.
        let limited = !matches!(request, Request::Flush);
        let disk = self.disk.clone();
        let future: Future<'m> = Box::pin(async move { disk.perform(request).await });
        if limited && (!self.held.is_empty() || !admitted(&self.disk, bytes)) {
            self.held.push_back((tag, bytes, future));
        } else {
            self.begin(tag, future);
        }
    }

    /// The next request that is done, without waiting. Begun ones make progress in here.
    pub fn completed(&mut self) -> Option<Completion> {
        if self.done.is_empty() {
            self.progress();
        }
        self.done.pop_front()
    }

    /// The next request that is done; waits for it, `None` if nothing is in flight.
    pub fn wait(&mut self) -> Option<Completion> {
        loop {
            if let Some(completion) = self.completed() {
                return Some(completion);
            }
            if self.in_flight() == 0 {
                return None;
            }
            self.event.wait();
        }
    }

    /// Waits until all requests are done, those too that the limits hold back (their cost is charged, so that the rate
    /// holds later). Their completions are still to be taken. For a pause of the machine.
    pub fn drain(&mut self) {
        while let Some((tag, bytes, future)) = self.held.pop_front() {
            if let Some(mut limiter) = self.disk.limiter() {
                limiter.charge(bytes, Instant::now());
            }
            self.begin(tag, future);
        }
        self.progress();
        while !self.tasks.is_empty() {
            self.event.wait();
            self.progress();
        }
    }

    /// Readable when [`Queue::completed`] has something to do. Ask it until it returns `None`, then sleep.
    pub fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    /// How many requests are submitted and not yet returned by [`Queue::completed`].
    pub fn in_flight(&self) -> usize {
        self.tasks.len() + self.held.len() + self.done.len()
    }

    fn begin(&mut self, tag: u64, future: Future<'m>) {
        let done = ring::enter(self.ring.as_ref(), || self.tasks.begin(tag, future));
        self.done.extend(done);
    }

    /// Does what can be done without waiting.
    fn progress(&mut self) {
        self.event.clear();
        self.release_held();
        loop {
            if let Some(ring) = &self.ring {
                ring.submit();
                ring.reap();
            }
            let woken = self.tasks.take_woken();
            if woken.is_empty() {
                break;
            }
            for task in woken {
                let done = ring::enter(self.ring.as_ref(), || self.tasks.poll(task));
                self.done.extend(done);
            }
        }
    }

    /// Begins what the limits held back until now.
    fn release_held(&mut self) {
        while let Some((_, bytes, _)) = self.held.front() {
            if !admitted(&self.disk, *bytes) {
                let now = Instant::now();
                let ready = self.disk.limiter().and_then(|limiter| limiter.ready_at(now));
                self.event.set_timer(ready.map_or(Duration::ZERO, |ready| ready - now));
                return;
            }
            if let Some((tag, _, future)) = self.held.pop_front() {
                self.begin(tag, future);
            }
        }
    }
}

/// Charges a request of `bytes` to the disk's limits, if they let it go now.
fn admitted(disk: &Disk, bytes: u64) -> bool {
    let Some(mut limiter) = disk.limiter() else { return true };
    let now = Instant::now();
    let admitted = limiter.ready_at(now).is_none();
    if admitted {
        limiter.charge(bytes, now);
    }
    admitted
}
