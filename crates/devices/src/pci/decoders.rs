//! Which addresses a function answers at: what its base address and command registers say, in a form that every access
//! to the bus can look at without a lock.

use std::sync::atomic::{AtomicU64, Ordering};

use super::config_space::ConfigSpace;

/// What a base address register is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarSpace {
    /// So many bytes of memory, a power of two from 16 up, below 4 GiB.
    Memory32(u64),
    /// The same, anywhere.
    Memory64(u64),
}

impl BarSpace {
    /// Bytes.
    pub fn length(self) -> u64 {
        match self {
            Self::Memory32(length) | Self::Memory64(length) => length,
        }
    }

    /// Whether the address has 64 bits.
    pub fn is_64_bit(self) -> bool {
        matches!(self, Self::Memory64(_))
    }
}

/// Nowhere. No range of a power of two's length begins here.
const OFF: u64 = u64::MAX;

/// The decoders of one function.
pub struct Decoders(Vec<Decoder>);

struct Decoder {
    bar: u8,
    space: BarSpace,
    base: AtomicU64,
}

impl Decoders {
    /// Those for the base address registers of this space, off until [`Decoders::update`].
    pub fn new(space: &ConfigSpace) -> Self {
        let decoder = |&(bar, space): &(u8, BarSpace)| Decoder { bar, space, base: AtomicU64::new(OFF) };
        Self(space.bars().iter().map(decoder).collect())
    }

    /// The configuration space has changed.
    pub fn update(&self, space: &ConfigSpace) {
        for decoder in &self.0 {
            let base = space.bar_address(decoder.bar, decoder.space).unwrap_or(OFF);
            decoder.base.store(base, Ordering::Release);
        }
    }

    /// Which register's range an access of `length` bytes at `address` is wholly in, and where in it.
    pub fn find(&self, address: u64, length: usize) -> Option<(u8, u64)> {
        self.0.iter().find_map(|decoder| {
            let base = decoder.base.load(Ordering::Acquire);
            let offset = address.checked_sub(base).filter(|_| base != OFF)?;
            let end = offset.checked_add(length as u64)?;
            (end <= decoder.space.length()).then_some((decoder.bar, offset))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{super::Identity, *};

    #[test]
    fn accesses_are_found_where_the_guest_put_the_registers() {
        let identity = Identity { vendor: 1, device: 1, revision: 0, class: 0, subsystem_vendor: 0, subsystem: 0 };
        let mut space = ConfigSpace::new(&identity);
        space.add_bar(0, BarSpace::Memory32(0x1000));
        space.add_bar(1, BarSpace::Memory64(0x10));
        let decoders = Decoders::new(&space);
        assert_eq!(decoders.find(0, 1), None);
        assert_eq!(decoders.find(u64::MAX, 1), None);
        space.enable_memory();
        space.set_bar_address(0, BarSpace::Memory32(0x1000), 0xc000_0000);
        space.set_bar_address(1, BarSpace::Memory64(0x10), u64::MAX - 0xf);
        decoders.update(&space);
        assert_eq!(decoders.find(0xc000_0000, 8), Some((0, 0)));
        assert_eq!(decoders.find(0xc000_0ff8, 8), Some((0, 0xff8)));
        assert_eq!(decoders.find(0xc000_0ff9, 8), None);
        assert_eq!(decoders.find(0xbfff_ffff, 1), None);
        assert_eq!(decoders.find(u64::MAX, 1), Some((1, 0xf)));
        assert_eq!(decoders.find(u64::MAX - 1, 4), None);
    }
}
