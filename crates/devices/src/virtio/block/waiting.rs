//! Requests of one queue that the host could not carry out, and that wait to be made anew: the chains are the device's
//! still, and the driver hears nothing of it.

use std::sync::{Mutex, MutexGuard, PoisonError};

use prost::Message;

/// Shared by the queue's thread, which fills and empties it, and the device, which saves it while that is held.
#[derive(Default)]
pub struct Waiting(Mutex<Vec<u16>>);

/// The chains that wait, in the order in which they failed.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct SavedWaiting {
    #[prost(uint32, repeated, tag = "1")]
    heads: Vec<u32>,
}

impl SavedWaiting {
    /// Whether a queue of this size can have all of these.
    pub fn fits(&self, size: u16) -> bool {
        self.heads.len() <= usize::from(size) && self.heads.iter().all(|head| *head < size.into())
    }
}

impl Waiting {
    fn lock(&self) -> MutexGuard<'_, Vec<u16>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The chain `head` waits from here on. False if `most` do: a driver does not have so many.
    pub fn push(&self, head: u16, most: u16) -> bool {
        let mut heads = self.lock();
        let room = heads.len() < most.into();
        if room {
            heads.push(head);
        }
        room
    }

    /// Takes all of them.
    pub fn take(&self) -> Vec<u16> {
        std::mem::take(&mut *self.lock())
    }

    /// The driver has taken its chains back.
    pub fn clear(&self) {
        self.lock().clear();
    }

    pub fn save(&self) -> SavedWaiting {
        SavedWaiting { heads: self.lock().iter().map(|head| u32::from(*head)).collect() }
    }

    /// Takes over what [`SavedWaiting::fits`].
    pub fn restore(&self, saved: SavedWaiting) {
        *self.lock() = saved.heads.into_iter().map(|head| head as u16).collect();
    }
}
