//! The receiving half of the 16550, and the wire that leads to it.
//!
//! Characters come at the programmed speed, as from a real line: a guest that has set up its flow control gets the
//! time to use it. While it does not listen, or its FIFO is full, the far end keeps them: nothing is lost on the way.

use std::collections::VecDeque;

use super::registers::FIFO_DEPTH;

/// Characters that may wait at the far end of the wire.
const WIRE_CAPACITY: usize = 4096;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Receiver {
    /// What the guest can read: the FIFO, or the one character of the receiver buffer register.
    pub fifo: VecDeque<u8>,
    /// What the far end has still to send.
    pub wire: VecDeque<u8>,
    /// When the first character of the wire will have arrived.
    pub next_arrival: u64,
    /// When a character last came or was read.
    pub last_activity: u64,
    /// A character was lost (in loopback; the wire waits).
    pub overrun: bool,
}

/// How the receiver is set up.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    pub fifos: bool,
    /// FCR's trigger level, 0 to 3.
    pub trigger: u8,
    /// Whether the far end may send.
    pub listening: bool,
    /// Time for a character, ns.
    pub character_ns: u64,
}

impl Setup {
    fn depth(self) -> usize {
        if self.fifos { FIFO_DEPTH } else { 1 }
    }

    /// How many characters make an interrupt (data sheet 8.4).
    pub fn trigger_level(self) -> usize {
        if self.fifos { [1, 4, 8, 14][usize::from(self.trigger & 3)] } else { 1 }
    }
}

impl Receiver {
    pub fn new() -> Self {
        Self { fifo: VecDeque::new(), wire: VecDeque::new(), next_arrival: 0, last_activity: 0, overrun: false }
    }

    /// How many characters [`Receiver::send`] takes now.
    pub fn room(&self) -> usize {
        WIRE_CAPACITY.saturating_sub(self.wire.len())
    }

    /// The far end has these to send; returns how many it took over.
    pub fn send(&mut self, now: u64, bytes: &[u8]) -> usize {
        if self.wire.is_empty() {
            self.next_arrival = self.next_arrival.max(now);
        }
        let count = bytes.len().min(self.room());
        self.wire.extend(&bytes[..count]);
        count
    }

    /// Lets arrive what has arrived by now.
    pub fn advance(&mut self, now: u64, setup: Setup) {
        while setup.listening && self.fifo.len() < setup.depth() && self.next_arrival <= now {
            let Some(byte) = self.wire.pop_front() else { return };
            self.fifo.push_back(byte);
            self.last_activity = self.last_activity.max(self.next_arrival);
            self.next_arrival = self.next_arrival.saturating_add(setup.character_ns);
        }
        // While the far end has to wait no time is saved up for sending faster later.
        self.next_arrival = self.next_arrival.max(now);
    }

    /// The guest reads a character. An empty buffer reads as 0.
    pub fn read(&mut self, now: u64) -> u8 {
        self.last_activity = now;
        self.fifo.pop_front().unwrap_or(0)
    }

    /// A character from the guest's own transmitter. One too many is an overrun: a full FIFO keeps what it has, the
    /// receiver buffer register is overwritten (data sheet 8.5, bit 1).
    pub fn loop_back(&mut self, now: u64, byte: u8, setup: Setup) {
        self.last_activity = now;
        if self.fifo.len() >= setup.depth() {
            self.overrun = true;
            if setup.fifos {
                return;
            }
            self.fifo.clear();
        }
        self.fifo.push_back(byte);
    }

    /// The guest clears the FIFO. What came from outside goes back on the wire: it comes again once the guest, done
    /// with setting up its port, listens.
    pub fn clear(&mut self, from_outside: bool) {
        while let Some(byte) = self.fifo.pop_back() {
            if from_outside {
                self.wire.push_front(byte);
            }
        }
    }

    /// When the FIFO's content becomes old enough for the character timeout: four characters' time after the last was
    /// received or read (data sheet 8.4, FIFO interrupt mode).
    pub fn timeout_at(&self, setup: Setup) -> Option<u64> {
        (setup.fifos && !self.fifo.is_empty()).then(|| self.last_activity.saturating_add(4 * setup.character_ns))
    }

    /// When the guest next has to hear of characters: at the trigger level, at the last character or at the timeout.
    pub fn deadline(&self, now: u64, setup: Setup) -> Option<u64> {
        let missing = setup.trigger_level().saturating_sub(self.fifo.len());
        let coming = if setup.listening { missing.min(self.wire.len()) } else { 0 };
        match coming {
            0 if missing == 0 => None,
            0 => self.timeout_at(setup).filter(|&at| at > now),
            count => Some(self.next_arrival.saturating_add((count as u64 - 1) * setup.character_ns)),
        }
    }
}
