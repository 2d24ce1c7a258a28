//! A queue's thread.

use purlin_memory::LogSlice;
use purlin_storage::{Completion, Disk, IoError, Queue, Request};
use rustix::event::{PollFd, PollFlags};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK};

use super::request::{Parsed, parse};
use crate::virtio::{Slices, Told, Virtqueue, Wake, fill};

/// Serves one queue of a disk. `'m` is how long guest memory lives.
pub struct Server<'s, 'm> {
    queue: &'m Virtqueue,
    io: &'s mut Queue<'m>,
    disk: &'s Disk,
    /// A write is answered once it is stable.
    write_through: bool,
    /// Requests under way, by the tag that they have at the disk: never more than the queue's size.
    under_way: Vec<Option<UnderWay<'m>>>,
    /// Free places in `under_way`.
    free: Vec<usize>,
    /// Chains have been given back since the driver was told.
    news: bool,
    /// How many requests have failed.
    failures: u64,
}

/// A request that the disk is working on.
struct UnderWay<'m> {
    head: u16,
    status: Slices<'m>,
    written: u32,
    /// How many of its parts are not done.
    parts: usize,
    /// A flush is to follow.
    flush: bool,
    failed: bool,
}

impl<'s, 'm> Server<'s, 'm> {
    pub fn new(queue: &'m Virtqueue, io: &'s mut Queue<'m>, disk: &'s Disk, write_through: bool) -> Self {
        let size = usize::from(queue.size());
        let under_way = std::iter::repeat_with(|| None).take(size).collect();
        Self { queue, io, disk, write_through, under_way, free: (0..size).rev().collect(), news: false, failures: 0 }
    }

    /// The thread's work, from its start to its end.
    pub fn run(mut self, wake: &Wake) {
        loop {
            let told = wake.wait(&[PollFd::from_borrowed_fd(self.io.event(), PollFlags::IN)]);
            match told {
                Told::Work => self.work(wake),
                Told::Hold => self.drain(),
                Told::End => return self.drain(),
            }
        }
    }

    /// Begins and completes what there is, until there is nothing to do but to wait, or the thread is told something.
    fn work(&mut self, wake: &Wake) {
        loop {
            self.queue.disable_notification();
            while !wake.is_interrupted() && (self.begin_available(wake) | self.complete_done()) {}
            self.tell_driver();
            // With as many under way as the queue has room for, the next completion is what is waited for.
            if wake.is_interrupted() || self.free.is_empty() || !self.queue.enable_notification() {
                return;
            }
        }
    }

    /// Waits for the disk to be done with all that is under way.
    fn drain(&mut self) {
        while self.io.in_flight() > 0 {
            self.io.drain();
            self.complete_done();
        }
        self.tell_driver();
    }

    fn tell_driver(&mut self) {
        if std::mem::take(&mut self.news) {
            self.queue.notify_driver();
        }
    }

    /// Begins requests as long as there are some and places for them. Whether there were.
    fn begin_available(&mut self, wake: &Wake) -> bool {
        let mut any = false;
        while !wake.is_interrupted()
            && !self.free.is_empty()
            && let Some(chain) = self.queue.pop()
        {
            any = true;
            match parse(chain, self.disk) {
                Ok(parsed) => self.begin(parsed),
                Err(malformed) => self.queue.notifier().needs_reset(&malformed),
            }
        }
        any
    }

    fn begin(&mut self, parsed: Parsed<'m>) {
        let Parsed { head, status, written, work } = parsed;
        let flush = self.write_through && work.as_ref().is_ok_and(|w| w.iter().any(modifies));
        let parts = work.as_ref().map_or(0, Vec::len);
        let request = UnderWay { head, status, written, parts, flush, failed: false };
        match work {
            Ok(work) if !work.is_empty() => {
                let Some(place) = self.free.pop() else { return };
                self.under_way[place] = Some(request);
                work.into_iter().for_each(|part| self.io.submit(place as u64, part));
            }
            Ok(_) => self.answer(request, VIRTIO_BLK_S_OK as u8),
            Err(status) => self.answer(request, status),
        }
    }

    /// Takes what the disk has done. Whether there was something.
    fn complete_done(&mut self) -> bool {
        let mut any = false;
        while let Some(completion) = self.io.completed() {
            any = true;
            self.complete(completion);
        }
        any
    }

    fn complete(&mut self, Completion { tag, result }: Completion) {
        let place = tag as usize;
        let Some(request) = self.under_way.get_mut(place).and_then(Option::as_mut) else { return };
        request.parts -= 1;
        if let Err(error) = result {
            request.failed = true;
            self.report(error);
        }
        let Some(request) = self.under_way[place].as_mut().filter(|r| r.parts == 0) else { return };
        if request.flush && !request.failed {
            (request.flush, request.parts) = (false, 1);
            self.io.submit(tag, Request::<LogSlice>::Flush);
        } else if let Some(request) = self.under_way[place].take() {
            self.free.push(place);
            let status = if request.failed { VIRTIO_BLK_S_IOERR } else { VIRTIO_BLK_S_OK };
            self.answer(request, status as u8);
        }
    }

    fn answer(&mut self, request: UnderWay<'m>, status: u8) {
        fill(&request.status, &[status]);
        self.queue.push(request.head, request.written);
        self.news = true;
    }

    /// Tells the user of the first failure, the second, the fourth, and so on: a guest can make as many as it likes.
    fn report(&mut self, error: IoError) {
        self.failures += 1;
        if self.failures.is_power_of_two() {
            let path = self.disk.path().display();
            tracing::warn!("a request to '{path}' failed: {error} ({} so far on this queue)", self.failures);
        }
    }
}

fn modifies(request: &Request<'_, LogSlice>) -> bool {
    matches!(request, Request::Write { .. } | Request::Discard { .. } | Request::WriteZeroes { .. })
}
