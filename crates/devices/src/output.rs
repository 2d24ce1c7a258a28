//! Where the guest's characters go: a queue with a thread that writes it out, so that no terminal, pipe or disk that
//! is slow to take them ever holds up a vCPU.

use std::{
    collections::VecDeque,
    fmt::Display,
    io::{self, Write},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use purlin_sandbox::Role;

use crate::event::Event;

/// Bytes that may wait to be written.
const CAPACITY: usize = 64 << 10;

/// How long the last handle waits for a sink that takes nothing before the rest of the queue is given up.
const PATIENCE: Duration = Duration::from_secs(2);

/// A handle on an output. Clones lead to the same one; when the last is dropped, what is queued is still written.
#[derive(Clone)]
pub struct Output(Arc<Handle>);

/// What all clones share; its drop is the end of the output.
struct Handle {
    queue: Arc<Queue>,
}

struct Queue {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    bytes: VecDeque<u8>,
    /// How many the writer has in hand.
    in_hand: usize,
    /// How many have been written.
    written: u64,
    /// There will be no more.
    closing: bool,
    /// Nobody takes them: they are dropped.
    discarding: bool,
    /// Who waits for room.
    waiting: Option<Arc<Event>>,
}

impl Output {
    /// An output that a thread of its own writes to `sink`. After an error of the sink (a closed pipe, a full disk),
    /// which is reported once, everything is dropped and the guest goes on.
    pub fn new(sink: Box<dyn Write + Send>) -> io::Result<Self> {
        let queue = Arc::new(Queue::new(false));
        purlin_sandbox::spawn("output", {
            let queue = queue.clone();
            move || match purlin_sandbox::thread(Role::Device) {
                Ok(()) => queue.write_out(sink),
                Err(error) => queue.give_up(&error),
            }
        })?;
        Ok(Self(Arc::new(Handle { queue })))
    }

    /// An output that drops everything.
    pub fn discard() -> Self {
        Self(Arc::new(Handle { queue: Arc::new(Queue::new(true)) }))
    }

    /// Queues as many of `bytes` as there is room for, and says how many. Does not block.
    pub fn push(&self, bytes: &[u8]) -> usize {
        self.0.queue.push(&mut self.0.queue.lock(), bytes)
    }

    /// The same; where there was not room for all of them, `room` is signalled once there is. One waits at a time.
    pub(crate) fn push_or_wait(&self, bytes: &[u8], room: &Arc<Event>) -> usize {
        let mut state = self.0.queue.lock();
        let count = self.0.queue.push(&mut state, bytes);
        if count < bytes.len() {
            state.waiting = Some(room.clone());
        }
        count
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        let mut state = self.queue.lock();
        state.closing = true;
        self.queue.changed.notify_all();
        while state.is_busy() {
            let before = state.written;
            let wait = self.queue.changed.wait_timeout_while(state, PATIENCE, |s| s.is_busy() && s.written == before);
            let (now, timeout) = wait.unwrap_or_else(PoisonError::into_inner);
            if timeout.timed_out() {
                tracing::warn!("the guest's last {} bytes of output could not be written", now.bytes.len());
                return;
            }
            state = now;
        }
    }
}

impl State {
    fn is_busy(&self) -> bool {
        !self.discarding && (self.in_hand > 0 || !self.bytes.is_empty())
    }

    fn discard(&mut self, reason: &dyn Display) {
        tracing::warn!("the guest's output is lost from here on: {reason}");
        self.discarding = true;
        self.bytes.clear();
        self.make_room_known();
    }

    fn make_room_known(&mut self) {
        if let Some(event) = self.waiting.take() {
            event.signal();
        }
    }
}

impl Queue {
    fn new(discarding: bool) -> Self {
        let state = State { bytes: VecDeque::new(), in_hand: 0, written: 0, closing: false, discarding, waiting: None };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, state: &mut State, bytes: &[u8]) -> usize {
        if state.discarding {
            return bytes.len();
        }
        let count = bytes.len().min(CAPACITY - state.bytes.len());
        let was_empty = state.bytes.is_empty();
        state.bytes.extend(&bytes[..count]);
        // The writer sleeps only on an empty queue: most characters need no system call.
        if was_empty {
            self.changed.notify_all();
        }
        count
    }

    /// The writer's thread.
    fn write_out(&self, mut sink: Box<dyn Write + Send>) {
        while let Some(bytes) = self.take() {
            let result = sink.write_all(&bytes).and_then(|()| sink.flush());
            let mut state = self.lock();
            state.in_hand = 0;
            state.written += bytes.len() as u64;
            if let Err(error) = result {
                state.discard(&error);
            }
            self.changed.notify_all();
        }
    }

    /// Nobody will write.
    fn give_up(&self, reason: &dyn Display) {
        self.lock().discard(reason);
        self.changed.notify_all();
    }

    /// Waits for bytes to write; `None` when there will be none.
    fn take(&self) -> Option<Vec<u8>> {
        let idle = |state: &mut State| state.bytes.is_empty() && !state.closing && !state.discarding;
        let mut state = self.changed.wait_while(self.lock(), idle).unwrap_or_else(PoisonError::into_inner);
        let bytes: Vec<u8> = state.bytes.drain(..).collect();
        state.in_hand = bytes.len();
        state.make_room_known();
        (!bytes.is_empty()).then_some(bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, time::Instant};

    use super::*;
    use crate::testing::Collect;

    /// Takes nothing until it is told that it may.
    struct Blocked(mpsc::Receiver<()>, Collect);

    impl Write for Blocked {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.0.recv();
            self.1.write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    struct Closed;

    impl Write for Closed {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn all_is_written_before_the_last_handle_is_gone() {
        let sink = Collect::default();
        let output = Output::new(Box::new(sink.clone())).unwrap();
        let other = output.clone();
        for _ in 0..1000 {
            assert_eq!(output.push(b"ab"), 2);
            assert_eq!(other.push(b"c"), 1);
        }
        drop(output);
        drop(other);
        assert_eq!(sink.bytes(), b"abc".repeat(1000));
    }

    #[test]
    fn a_sink_that_does_not_take_anything_fills_the_queue_without_blocking() {
        let (go, gate) = mpsc::channel();
        let sink = Collect::default();
        let output = Output::new(Box::new(Blocked(gate, sink.clone()))).unwrap();
        let mut pushed = 0;
        let chunk = [b'x'; 1000];
        // The writer may take one queue's worth in hand.
        while pushed <= 2 * CAPACITY {
            match output.push(&chunk) {
                0 => break,
                count => pushed += count,
            }
        }
        assert!((CAPACITY..=2 * CAPACITY).contains(&pushed), "{pushed}");
        drop(go);
        drop(output);
        assert_eq!(sink.bytes().len(), pushed);
    }

    #[test]
    fn after_an_error_everything_is_dropped() {
        let output = Output::new(Box::new(Closed)).unwrap();
        let start = Instant::now();
        let mut pushed = 0;
        while pushed < 10 * CAPACITY {
            pushed += output.push(&[0; 4096]);
            assert!(start.elapsed() < Duration::from_secs(60), "the queue stays full");
        }
        drop(output);
    }
}
