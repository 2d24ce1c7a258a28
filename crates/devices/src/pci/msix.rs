//! MSI-X (PCI Local Bus 3.0, 6.8.2): a table of messages in the function's own memory, each of which can be masked.

use std::sync::{Mutex, MutexGuard, PoisonError};

use prost::Message;
use purlin_state::StateError;

use crate::MsiLine;

/// Capability ID.
pub const CAPABILITY: u8 = 0x11;
/// Message control: MSI-X is used.
const ENABLE: u16 = 1 << 15;
/// Message control: every vector is masked.
const FUNCTION_MASK: u16 = 1 << 14;
/// Bytes of a table entry: address, upper address, data, vector control.
const ENTRY: usize = 16;
/// Vector control: masked.
const MASK: u32 = 1;

/// Where table and pending bits are: both in the memory of one base address register, at multiples of 8.
#[derive(Clone, Copy, Debug)]
pub struct MsixPlace {
    /// The register.
    pub bar: u8,
    /// Offset of the table.
    pub table: u32,
    /// Offset of the pending bits.
    pub pending: u32,
}

/// The vectors of a function.
///
/// The lock is held while a message is sent, so that after a mask bit has been set none is on its way. It comes before
/// what an engine locks to deliver messages, and behind everything in a device.
pub struct Msix {
    line: MsiLine,
    state: Mutex<State>,
}

struct State {
    control: u16,
    entries: Vec<Entry>,
}

#[derive(Clone, Copy)]
struct Entry {
    registers: [u32; 4],
    pending: bool,
}

impl Entry {
    /// After a reset, each vector is masked (6.8.2.9).
    const RESET: Self = Self { registers: [0, 0, 0, MASK], pending: false };
}

/// The saved state.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct SavedMsix {
    /// Enable and function mask in bits 15 and 14.
    #[prost(uint32, tag = "1")]
    pub control: u32,
    /// Address, upper address, data and control of each vector in turn.
    #[prost(fixed32, repeated, tag = "2")]
    pub table: Vec<u32>,
    /// Vectors whose interrupt waits for the mask to be lifted.
    #[prost(uint32, repeated, tag = "3")]
    pub pending: Vec<u32>,
}

impl Msix {
    /// `count` vectors (1 to 2048) whose messages go to `line`.
    pub fn new(count: u16, line: MsiLine) -> Self {
        assert!((1..=2048).contains(&count));
        Self { line, state: Mutex::new(State { control: 0, entries: vec![Entry::RESET; count.into()] }) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Number of vectors.
    pub fn count(&self) -> u16 {
        self.lock().entries.len() as u16
    }

    /// The capability after its header, and which bits of it can be written.
    pub fn capability(&self, place: MsixPlace) -> ([u8; 10], [u8; 10]) {
        let mut body = [0; 10];
        body[..2].copy_from_slice(&(self.count() - 1).to_le_bytes());
        body[2..6].copy_from_slice(&(place.table | u32::from(place.bar)).to_le_bytes());
        body[6..].copy_from_slice(&(place.pending | u32::from(place.bar)).to_le_bytes());
        let mut writable = [0; 10];
        writable[..2].copy_from_slice(&(ENABLE | FUNCTION_MASK).to_le_bytes());
        (body, writable)
    }

    /// Whether the guest uses MSI-X.
    pub fn is_enabled(&self) -> bool {
        self.lock().control & ENABLE != 0
    }

    /// Message control has been written.
    pub fn set_control(&self, control: u16) {
        let mut state = self.lock();
        state.control = control & (ENABLE | FUNCTION_MASK);
        for vector in 0..state.entries.len() {
            state.send_pending(vector, &self.line);
        }
    }

    /// Sends a vector's message, now or once it is no longer masked. Without MSI-X, nothing is sent.
    pub fn raise(&self, vector: u16) {
        let mut state = self.lock();
        let Some(entry) = state.entries.get_mut(usize::from(vector)) else { return };
        entry.pending = true;
        state.send_pending(vector.into(), &self.line);
    }

    /// A load from the table.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        for (at, byte) in (offset as usize..).zip(data) {
            let entry = state.entries.get(at / ENTRY);
            *byte = entry.map_or(0, |e| e.registers[at % ENTRY / 4].to_le_bytes()[at % 4]);
        }
    }

    /// A store to the table: one or two whole registers (6.8.2: others are undefined, here ignored).
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        if !offset.is_multiple_of(4) || !data.len().is_multiple_of(4) {
            return;
        }
        let mut state = self.lock();
        for (at, bytes) in (offset as usize..).step_by(4).zip(data.chunks_exact(4)) {
            let Some(entry) = state.entries.get_mut(at / ENTRY) else { return };
            let value = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            entry.registers[at % ENTRY / 4] = match at % ENTRY / 4 {
                0 => value & !3,
                3 => value & MASK,
                _ => value,
            };
            state.send_pending(at / ENTRY, &self.line);
        }
    }

    /// A load from the pending bits.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        for (at, byte) in (offset as usize..).zip(data) {
            let entries = state.entries.iter().skip(at * 8).take(8);
            *byte = entries.enumerate().fold(0, |bits, (bit, entry)| bits | u8::from(entry.pending) << bit);
        }
    }

    /// As after power-up.
    pub fn reset(&self) {
        let mut state = self.lock();
        state.control = 0;
        state.entries.fill(Entry::RESET);
    }

    /// The state.
    pub fn save(&self) -> SavedMsix {
        let state = self.lock();
        let pending = (0..).zip(&state.entries).filter(|(_, e)| e.pending).map(|(vector, _)| vector).collect();
        let table = state.entries.iter().flat_map(|e| e.registers).collect();
        SavedMsix { control: state.control.into(), table, pending }
    }

    /// Takes over a saved state; nothing is sent.
    pub fn restore(&self, saved: &SavedMsix) -> Result<(), StateError> {
        let mut state = self.lock();
        if saved.table.len() != state.entries.len() * 4 {
            return Err(StateError::corrupt("msix", "the number of vectors is another one"));
        }
        state.control = saved.control as u16 & (ENABLE | FUNCTION_MASK);
        for (vector, (entry, registers)) in (0..).zip(state.entries.iter_mut().zip(saved.table.chunks_exact(4))) {
            entry.registers = [registers[0] & !3, registers[1], registers[2], registers[3] & MASK];
            entry.pending = saved.pending.contains(&vector);
        }
        Ok(())
    }
}

impl State {
    fn send_pending(&mut self, vector: usize, line: &MsiLine) {
        let entry = &mut self.entries[vector];
        if self.control & ENABLE == 0 {
            // There is nobody to be told later, either.
            entry.pending = false;
        }
        let masked = self.control & FUNCTION_MASK != 0 || entry.registers[3] & MASK != 0;
        if entry.pending && !masked {
            entry.pending = false;
            let [low, high, data, _] = entry.registers;
            line.send(u64::from(high) << 32 | u64::from(low), data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Messages;

    fn msix() -> (Msix, Messages) {
        let messages = Messages::default();
        let msix = Msix::new(3, messages.line());
        msix.write_table(16, &0xfee0_1000u32.to_le_bytes());
        msix.write_table(24, &0x41u32.to_le_bytes());
        (msix, messages)
    }

    const UNMASK: [u8; 4] = [0; 4];

    #[test]
    fn a_message_is_sent_when_nothing_masks_it() {
        let (msix, messages) = msix();
        msix.set_control(ENABLE);
        msix.write_table(28, &UNMASK);
        msix.raise(1);
        assert_eq!(messages.take(), [(0xfee0_1000, 0x41)]);
        // Vectors that there are not.
        msix.raise(3);
        msix.raise(0xffff);
        assert_eq!(messages.take(), []);
    }

    #[test]
    fn a_masked_message_is_pending_and_sent_once_when_unmasked() {
        let (msix, messages) = msix();
        msix.set_control(ENABLE);
        msix.raise(1);
        msix.raise(1);
        let mut pending = [0xff; 8];
        msix.read_pending(0, &mut pending);
        assert_eq!((messages.take(), pending), (vec![], [2, 0, 0, 0, 0, 0, 0, 0]));
        msix.write_table(28, &UNMASK);
        assert_eq!(messages.take(), [(0xfee0_1000, 0x41)]);
        // The same with the mask of all.
        msix.set_control(ENABLE | FUNCTION_MASK);
        msix.raise(1);
        assert_eq!(messages.take(), []);
        msix.set_control(ENABLE);
        assert_eq!(messages.take(), [(0xfee0_1000, 0x41)]);
        msix.read_pending(0, &mut pending);
        assert_eq!(pending, [0; 8]);
    }

    #[test]
    fn without_msi_x_nothing_is_sent() {
        let (msix, messages) = msix();
        msix.write_table(28, &UNMASK);
        msix.raise(1);
        msix.set_control(ENABLE);
        assert_eq!(messages.take(), []);
    }

    #[test]
    fn the_table_is_read_back_and_bounded() {
        let (msix, _) = msix();
        let mut entry = [0; 16];
        msix.read_table(16, &mut entry);
        assert_eq!(entry, [0, 0x10, 0xe0, 0xfe, 0, 0, 0, 0, 0x41, 0, 0, 0, 1, 0, 0, 0]);
        msix.write_table(48, &[0xff; 8]);
        msix.write_table(u64::MAX - 3, &[0xff; 4]);
        msix.write_table(17, &[0xff; 4]);
        msix.write_table(16, &[0xff; 2]);
        let mut again = [0; 16];
        msix.read_table(16, &mut again);
        assert_eq!(again, entry);
        msix.read_table(48, &mut again);
        assert_eq!(again, [0; 16]);
    }

    #[test]
    fn pending_vectors_are_saved() {
        let (first, _) = msix();
        first.set_control(ENABLE);
        first.raise(1);
        let messages = Messages::default();
        let second = Msix::new(3, messages.line());
        second.restore(&first.save()).unwrap();
        assert_eq!(second.save(), first.save());
        assert_eq!(messages.take(), []);
        second.write_table(28, &UNMASK);
        assert_eq!(messages.take(), [(0xfee0_1000, 0x41)]);
        assert!(Msix::new(4, messages.line()).restore(&first.save()).is_err());
    }
}
