//! A queue of bytes that takes memory only while it holds some, from a store that all queues share.

use std::io::{IoSlice, IoSliceMut};

/// The memory that all queues together may take.
#[derive(Debug)]
pub struct Memory {
    used: usize,
    limit: usize,
}

impl Memory {
    /// The most that one queue takes, in bytes.
    pub const MOST: usize = 1 << 20;
    /// What a queue may always take, in bytes, so that no connection stands still for others' sake.
    pub const LEAST: usize = 8 << 10;

    /// A store of `limit` bytes, beside [`Memory::LEAST`] for each queue.
    pub fn new(limit: usize) -> Self {
        Self { used: 0, limit }
    }

    /// How much a queue may hold now: an eighth of what is free, so that many queues share evenly and some is always
    /// left for a new one (Choudhury and Hahne's dynamic threshold).
    pub fn allowance(&self) -> usize {
        (self.limit.saturating_sub(self.used) / 8).clamp(Self::LEAST, Self::MOST)
    }

    /// Bytes taken by all queues.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn used(&self) -> usize {
        self.used
    }
}

/// A queue of bytes. What it has taken of [`Memory`] is given back by [`Ring::release`].
#[derive(Debug, Default)]
pub struct Ring {
    bytes: Vec<u8>,
    /// Where the first byte is.
    start: usize,
    len: usize,
}

impl Ring {
    /// Bytes held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Makes room, as far as `memory` allows, for `wanted` bytes more. Returns for how many there is room now.
    pub fn make_room(&mut self, wanted: usize, memory: &mut Memory) -> usize {
        if self.bytes.len() - self.len < wanted {
            let goal = (self.len + wanted).next_power_of_two().max(Memory::LEAST);
            // The largest power of two within the allowance.
            let most = 1 << memory.allowance().ilog2();
            self.grow(goal.min(most), memory);
        }
        (self.bytes.len() - self.len).min(wanted)
    }

    fn grow(&mut self, capacity: usize, memory: &mut Memory) {
        if capacity <= self.bytes.len() {
            return;
        }
        memory.used += capacity - self.bytes.len();
        let mut bytes = vec![0; capacity];
        let (first, second) = self.slices(0, self.len);
        bytes[..first.len()].copy_from_slice(first);
        bytes[first.len()..][..second.len()].copy_from_slice(second);
        self.bytes = bytes;
        self.start = 0;
    }

    /// Gives the memory back, with all that is held.
    pub fn release(&mut self, memory: &mut Memory) {
        memory.used -= self.bytes.len();
        *self = Self::default();
    }

    /// `len` bytes (at most) from the `from`th, in two pieces.
    pub fn slices(&self, from: usize, len: usize) -> (&[u8], &[u8]) {
        let from = from.min(self.len);
        let len = len.min(self.len - from);
        if len == 0 {
            return (&[], &[]);
        }
        let at = (self.start + from) % self.bytes.len();
        let first = len.min(self.bytes.len() - at);
        (&self.bytes[at..][..first], &self.bytes[..len - first])
    }

    /// All that is held, to be written somewhere.
    pub fn filled(&self) -> [IoSlice<'_>; 2] {
        let (first, second) = self.slices(0, self.len);
        [IoSlice::new(first), IoSlice::new(second)]
    }

    /// The first `most` free bytes, to be read into; [`Ring::added`] then makes them part of the queue.
    pub fn free(&mut self, most: usize) -> [IoSliceMut<'_>; 2] {
        let capacity = self.bytes.len();
        let most = most.min(capacity - self.len);
        let end = if capacity == 0 { 0 } else { (self.start + self.len) % capacity };
        let first = most.min(capacity - end);
        let (head, tail) = self.bytes.split_at_mut(end);
        let second = (most - first).min(head.len());
        [IoSliceMut::new(&mut tail[..first]), IoSliceMut::new(&mut head[..second])]
    }

    /// `count` bytes of [`Ring::free`] have been filled.
    pub fn added(&mut self, count: usize) {
        self.len += count;
        debug_assert!(self.len <= self.bytes.len());
    }

    /// Adds what fits of `data`, after making room. Returns how much that was.
    pub fn push(&mut self, data: &[u8], memory: &mut Memory) -> usize {
        let room = self.make_room(data.len(), memory);
        let mut data = &data[..room];
        for mut slice in self.free(room) {
            let (here, rest) = data.split_at(slice.len());
            slice.copy_from_slice(here);
            data = rest;
        }
        self.added(room);
        room
    }

    /// Drops the first `count` bytes.
    pub fn consume(&mut self, count: usize) {
        let count = count.min(self.len);
        self.len -= count;
        if !self.bytes.is_empty() {
            self.start = (self.start + count) % self.bytes.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_allowance_is_a_share_of_what_is_free() {
        let mut memory = Memory::new(1 << 20);
        assert_eq!(memory.allowance(), 128 << 10);
        let mut ring = Ring::default();
        assert_eq!(ring.make_room(1 << 20, &mut memory), 128 << 10);
        assert_eq!((memory.used(), memory.allowance()), (128 << 10, 112 << 10));
        ring.release(&mut memory);
        assert_eq!(memory.used(), 0);
        // However little there is, each has the least.
        let mut memory = Memory::new(0);
        assert_eq!(Ring::default().make_room(usize::MAX >> 2, &mut memory), Memory::LEAST);
    }

    proptest! {
        /// It does what a VecDeque does.
        #[test]
        fn is_a_queue(steps in prop::collection::vec((any::<bool>(), 0usize..20_000), 1..60)) {
            let mut memory = Memory::new(256 << 10);
            let (mut ring, mut model) = (Ring::default(), VecDeque::new());
            let mut next = 0u8;
            for (push, count) in steps {
                if push {
                    let data: Vec<u8> = (0..count).map(|_| { next = next.wrapping_mul(5).wrapping_add(3); next }).collect();
                    let taken = ring.push(&data, &mut memory);
                    prop_assert!(taken == count || model.len() + taken + count > 8 << 10);
                    model.extend(&data[..taken]);
                } else {
                    ring.consume(count);
                    model.drain(..count.min(model.len()));
                }
                let (first, second) = ring.slices(0, usize::MAX);
                prop_assert_eq!([first, second].concat(), model.iter().copied().collect::<Vec<_>>());
                let (first, second) = ring.slices(count / 2, 100);
                let expected: Vec<u8> = model.iter().copied().skip(count / 2).take(100).collect();
                prop_assert_eq!([first, second].concat(), expected);
            }
        }
    }
}
