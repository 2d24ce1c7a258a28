//! Bytes on their way to somebody who may not take them now.

use std::{io, os::fd::AsFd};

use rustix::io::Errno;

/// Some bytes. Whoever adds any sees to it that there are not too many.
#[derive(Debug, Default)]
pub struct Pending {
    data: Vec<u8>,
    /// How many of them have gone.
    gone: usize,
}

impl Pending {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.data.len() - self.gone
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Where more can be appended.
    pub fn tail(&mut self) -> &mut Vec<u8> {
        self.data.drain(..std::mem::take(&mut self.gone));
        &mut self.data
    }

    /// Forgets them; returns how many there were.
    pub fn clear(&mut self) -> usize {
        let count = self.len();
        *self = Self::default();
        count
    }

    /// Writes what `to` takes now; returns how much that was.
    pub fn write(&mut self, to: impl AsFd) -> io::Result<usize> {
        let before = self.gone;
        while !self.is_empty() {
            match rustix::io::write(&to, &self.data[self.gone..]) {
                Ok(count) => self.gone += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(self.gone - before)
    }
}
