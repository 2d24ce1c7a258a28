//! The device's thread: pages go back to the host, statistics come from the driver.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use purlin_memory::{GuestRam, discard};
use rustix::event::{PollFd, PollFlags};

use super::{
    super::{Chain, Malformed, Notifier, Told, Virtqueue, Wake},
    BalloonHandle, PAGE,
    statistics::STAT,
};

/// Pages that one request may name; Linux's has 256.
const MOST_PAGES: usize = 16 << 10;
/// Bytes of statistics that a driver may tell at once: several times what there is.
const MOST_STATISTICS: usize = 64 * STAT;

/// What the thread has.
pub struct Server<'q> {
    pub handle: BalloonHandle,
    pub memory: &'q GuestRam,
    pub notifier: &'q Notifier,
    /// What free pages have in them, if it is not to be lost.
    pub poison: Arc<AtomicU32>,
    pub inflate: Option<&'q Virtqueue>,
    pub deflate: Option<&'q Virtqueue>,
    pub statistics: Option<&'q Virtqueue>,
    /// See [`super::REPORTING`].
    pub reporting: Vec<&'q Virtqueue>,
    /// The driver's statistics buffer, which it gets back when it is to fill it again (5.5.6.3).
    pub buffer: Option<u16>,
    /// The buffer to be taken next is one that has been looked at.
    pub is_known: bool,
    /// It is to be given back as soon as it is there.
    pub is_wanted: bool,
}

impl Server<'_> {
    /// The thread's work, from its start to its end.
    pub fn run(mut self, wake: &Wake) {
        let handle = self.handle.clone();
        loop {
            match wake.wait(&[PollFd::from_borrowed_fd(handle.event(), PollFlags::IN)]) {
                Told::Work => self.work(wake),
                Told::Hold => self.put_back(),
                Told::End => return self.put_back(),
            }
        }
    }

    fn work(&mut self, wake: &Wake) {
        let (news, asks) = self.handle.take_wishes();
        if news {
            self.notifier.configuration_changed();
        }
        if let Some(queue) = self.inflate {
            self.serve(queue, wake, |chain| self.inflate(chain));
        }
        if let Some(queue) = self.deflate {
            // Pages are there again as soon as they are used.
            self.serve(queue, wake, |_| Ok(()));
        }
        for queue in &self.reporting {
            self.serve(queue, wake, |chain| self.report(chain));
        }
        self.take_statistics(wake);
        self.is_wanted |= asks;
        if self.is_wanted {
            self.ask();
        }
    }

    fn serve(&self, queue: &Virtqueue, wake: &Wake, serve: impl Fn(Chain<'_>) -> Result<(), Malformed>) {
        queue.serve(wake, |chain| {
            if let Err(malformed) = serve(chain) {
                self.notifier.needs_reset(&malformed);
            }
            // Nothing is written to it.
            0
        });
    }

    /// Takes pages from the guest (5.5.6.1): numbers of pages of 4 KiB. Those that there are not are left out.
    fn inflate(&self, mut chain: Chain<'_>) -> Result<(), Malformed> {
        let count = chain.readable_length() / 4;
        if count > MOST_PAGES {
            return Err(Malformed::Request);
        }
        let mut numbers = vec![0; 4 * count];
        chain.read(&mut numbers)?;
        let number = |bytes: &[u8]| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        let mut pages: Vec<u32> = numbers.chunks_exact(4).map(number).collect();
        // Neighbours go at once: drivers have many of them.
        pages.sort_unstable();
        pages.dedup();
        for run in pages.chunk_by(|a, b| a + 1 == *b) {
            self.discard(u64::from(run[0]) * PAGE, run.len() as u64 * PAGE);
        }
        Ok(())
    }

    /// The guest tells of free pages (5.5.6.7): buffers that the device may write to until they are given back.
    fn report(&self, chain: Chain<'_>) -> Result<(), Malformed> {
        // What is not zero would be lost.
        if self.poison.load(Ordering::SeqCst) == 0 {
            for slice in &chain.writable {
                self.discard(slice.bitmap().address(), slice.len() as u64);
            }
        }
        Ok(())
    }

    fn discard(&self, address: u64, length: u64) {
        if let Err(error) = discard(self.memory, address, length) {
            // The guest may use them all the same.
            tracing::debug!("pages of the guest's cannot be given back to the host: {error}");
        }
    }

    /// Gives the statistics buffer to the driver, to be filled again.
    fn ask(&mut self) {
        if let Some((queue, head)) = self.statistics.zip(self.buffer.take()) {
            self.is_wanted = false;
            queue.push(head, 0);
            queue.notify_driver();
        }
    }

    /// Takes the filled buffer, and keeps it until there is a question.
    fn take_statistics(&mut self, wake: &Wake) {
        let Some(queue) = self.statistics else { return };
        queue.disable_notification();
        while !wake.is_interrupted() {
            let Some(mut chain) = queue.pop() else {
                if queue.enable_notification() {
                    queue.disable_notification();
                    continue;
                }
                return;
            };
            let length = chain.readable_length();
            let mut structures = vec![0; length];
            if length > MOST_STATISTICS || chain.read(&mut structures).is_err() {
                return self.notifier.needs_reset(&Malformed::Request);
            }
            if !std::mem::take(&mut self.is_known) {
                self.handle.lock().update(&structures);
            }
            // There is one buffer; who has more gets the former back.
            let former = self.buffer.replace(chain.head());
            if let Some(head) = former {
                queue.push(head, 0);
                queue.notify_driver();
            }
        }
    }

    /// What has been taken and not used is in the queue again, for whoever goes on.
    fn put_back(&mut self) {
        if let Some((queue, _)) = self.statistics.zip(self.buffer.take()) {
            queue.put_back(1);
            self.is_known = true;
        }
    }
}
