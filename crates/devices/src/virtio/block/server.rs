//! A queue's thread.

use std::path::Path;

use purlin_memory::LogSlice;
use purlin_storage::{Completion, Disk, IoError, Queue, Request};
use rustix::event::{PollFd, PollFlags};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK};

use super::{
    OnIoError,
    request::{Parsed, parse},
    waiting::Waiting,
};
use crate::virtio::{Chain, Malformed, Slices, Told, Virtqueue, Wake, fill};

/// Serves one queue of a disk. `'m` is how long guest memory lives.
pub struct Server<'s, 'm> {
    queue: &'m Virtqueue,
    io: &'s mut Queue<'m>,
    disk: &'s Disk,
    /// A write is answered once it is stable.
    write_through: bool,
    on_io_error: &'s OnIoError,
    /// Requests that have failed, with [`OnIoError::Wait`].
    waiting: &'s Waiting,
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
    /// The first error.
    failed: Option<IoError>,
}

impl<'s, 'm> Server<'s, 'm> {
    pub fn new(
        queue: &'m Virtqueue,
        io: &'s mut Queue<'m>,
        disk: &'s Disk,
        write_through: bool,
        on_io_error: &'s OnIoError,
        waiting: &'s Waiting,
    ) -> Self {
        let size = usize::from(queue.size());
        let under_way = std::iter::repeat_with(|| None).take(size).collect();
        let free = (0..size).rev().collect();
        Self { queue, io, disk, write_through, on_io_error, waiting, under_way, free, news: false, failures: 0 }
    }

    /// The thread's work, from its start to its end.
    pub fn run(mut self, wake: &Wake) {
        // As good as held: requests may wait that came with a saved device, and the hold before the first work may be over
        // before this thread hears of it.
        let mut was_held = true;
        loop {
            let told = wake.wait(&[PollFd::from_borrowed_fd(self.io.event(), PollFlags::IN)]);
            match told {
                Told::Work => {
                    if std::mem::take(&mut was_held) {
                        self.begin_waiting();
                    }
                    self.work(wake);
                }
                Told::Hold => {
                    self.drain();
                    was_held = true;
                }
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
            self.begin_chain(chain);
        }
        any
    }

    /// Makes the requests anew that have failed before the hold. Nothing else is under way, so there is room for them.
    fn begin_waiting(&mut self) {
        for head in self.waiting.take() {
            if let Some(chain) = self.queue.again(head) {
                self.begin_chain(chain);
            }
        }
    }

    fn begin_chain(&mut self, chain: Chain<'m>) {
        match parse(chain, self.disk) {
            Ok(parsed) => self.begin(parsed),
            Err(malformed) => self.queue.notifier().needs_reset(&malformed),
        }
    }

    fn begin(&mut self, parsed: Parsed<'m>) {
        let Parsed { head, status, written, work } = parsed;
        let flush = self.write_through && work.as_ref().is_ok_and(|w| w.iter().any(modifies));
        let parts = work.as_ref().map_or(0, Vec::len);
        let request = UnderWay { head, status, written, parts, flush, failed: None };
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
            request.failed.get_or_insert(error);
        }
        let Some(request) = self.under_way[place].as_mut().filter(|r| r.parts == 0) else { return };
        if request.flush && request.failed.is_none() {
            (request.flush, request.parts) = (false, 1);
            self.io.submit(tag, Request::<LogSlice>::Flush);
        } else if let Some(request) = self.under_way[place].take() {
            self.free.push(place);
            match request.failed {
                None => self.answer(request, VIRTIO_BLK_S_OK as u8),
                Some(error) => self.fail(request, error),
            }
        }
    }

    fn fail(&mut self, request: UnderWay<'m>, error: IoError) {
        match self.on_io_error {
            OnIoError::Wait(tell) if error.is_the_hosts() => {
                if !self.waiting.push(request.head, self.queue.size()) {
                    return self.queue.notifier().needs_reset(&Malformed::Request);
                }
                tell(&self.disk.path(), error);
            }
            _ => {
                self.report(error);
                self.answer(request, VIRTIO_BLK_S_IOERR as u8);
            }
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
            tracing::warn!("{}", failure(&self.disk.path(), error, self.failures));
        }
    }
}

/// For the user. A pause is advised where what the guest has asked for can be done once the host is well again.
fn failure(path: &Path, error: IoError, count: u64) -> String {
    let advice = if error.is_the_hosts() { "; --on-io-error pause would pause it instead" } else { "" };
    format!("'{}': {error}: the guest was given an error ({count} so far){advice}", path.display())
}

fn modifies(request: &Request<'_, LogSlice>) -> bool {
    matches!(request, Request::Write { .. } | Request::Discard { .. } | Request::WriteZeroes { .. })
}

#[cfg(test)]
mod tests {
    use rustix::io::Errno;

    use super::*;

    #[test]
    fn failures_for_the_user() {
        assert_eq!(
            failure(Path::new("/a"), Errno::NOSPC.into(), 4),
            "'/a': No space left on device: the guest was given an error (4 so far); --on-io-error pause would pause it \
             instead"
        );
        assert!(failure(Path::new("/a"), Errno::INVAL.into(), 1).ends_with("(1 so far)"));
    }
}
