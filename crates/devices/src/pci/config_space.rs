//! A type 0 configuration space (PCI Local Bus 3.0, 6.1; PCI Express Base 5.0, 7.5.1): which bits there are and which
//! of them can be written.

use super::decoders::BarSpace;

/// Bytes of the space that mechanism 1 reaches. The extended space behind it has no capabilities and reads as zero.
const LENGTH: usize = 256;

/// Registers by offset.
mod register {
    pub const COMMAND: u16 = 0x04;
    pub const STATUS: u16 = 0x06;
    pub const BARS: u16 = 0x10;
    pub const CAPABILITIES: u16 = 0x34;
    /// The first byte that is not the header's.
    pub const END_OF_HEADER: u16 = 0x40;
}

/// Command: memory space is decoded.
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// Command: may act as bus master.
const COMMAND_MASTER: u16 = 1 << 2;
/// Command: no INTx.
const COMMAND_NO_INTX: u16 = 1 << 10;
/// Status: there is a list of capabilities.
const STATUS_CAPABILITIES: u8 = 1 << 4;
/// Base address register, bits 2:1: 64 bits wide.
const BAR_64: u32 = 2 << 1;

/// Who a function is.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision ID.
    pub revision: u8,
    /// Class code: base class in bits 23:16, subclass in 15:8, programming interface in 7:0.
    pub class: u32,
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

/// A configuration space, built by adding to it.
pub struct ConfigSpace {
    bytes: [u8; LENGTH],
    /// Bits that a store changes.
    writable: [u8; LENGTH],
    /// Where the next capability begins.
    free: u16,
    /// The pointer that the next capability's offset goes to.
    link: u16,
    bars: Vec<(u8, BarSpace)>,
}

impl ConfigSpace {
    /// A function without base addresses or capabilities, whose command register is writable.
    pub fn new(identity: &Identity) -> Self {
        let mut space = Self {
            bytes: [0; LENGTH],
            writable: [0; LENGTH],
            free: register::END_OF_HEADER,
            link: register::CAPABILITIES,
            bars: Vec::new(),
        };
        space.put(0x00, &identity.vendor.to_le_bytes());
        space.put(0x02, &identity.device.to_le_bytes());
        space.put(0x08, &(identity.class << 8 | u32::from(identity.revision)).to_le_bytes());
        space.put(0x2c, &identity.subsystem_vendor.to_le_bytes());
        space.put(0x2e, &identity.subsystem.to_le_bytes());
        space.allow(register::COMMAND, &(COMMAND_MEMORY | COMMAND_MASTER | COMMAND_NO_INTX).to_le_bytes());
        // What firmware notes here (the interrupt line) means nothing to the function.
        space.allow(0x3c, &[0xff]);
        space
    }

    /// Adds base address register `bar` (0 to 5; one of 64 bits takes the next one, too) for memory that is not
    /// prefetchable.
    ///
    /// # Panics
    /// If the register is taken, or the length is not one that it can tell: a mistake in the device.
    pub fn add_bar(&mut self, bar: u8, space: BarSpace) {
        let length = space.length();
        let words = if space.is_64_bit() { 2 } else { 1 };
        assert!(length.is_power_of_two() && length >= 16 && bar + words <= 6);
        assert!(self.bars.iter().all(|(other, s)| *other + s.is_64_bit() as u8 != bar && *other != bar));
        let mask = (!(length - 1)).to_le_bytes();
        let at = register::BARS + 4 * u16::from(bar);
        if space.is_64_bit() {
            self.put(at, &BAR_64.to_le_bytes());
            self.allow(at, &mask);
        } else {
            assert!(length <= 1 << 31);
            self.allow(at, &mask[..4]);
        }
        self.bars.push((bar, space));
    }

    /// Appends a capability of which `body` is what follows the ID and the pointer to the next; `writable` has a one
    /// for each bit of it that can be written. Returns its offset.
    ///
    /// # Panics
    /// If there is no room: a mistake in the device.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> u16 {
        assert!(body.len() == writable.len());
        let at = self.free;
        self.put(self.link, &[at as u8]);
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        self.allow(at + 2, writable);
        self.bytes[usize::from(register::STATUS)] |= STATUS_CAPABILITIES;
        self.link = at + 1;
        self.free = (at + 2 + body.len() as u16).next_multiple_of(4);
        at
    }

    fn put(&mut self, at: u16, bytes: &[u8]) {
        self.bytes[usize::from(at)..][..bytes.len()].copy_from_slice(bytes);
    }

    fn allow(&mut self, at: u16, mask: &[u8]) {
        self.writable[usize::from(at)..][..mask.len()].copy_from_slice(mask);
    }

    /// A load.
    pub fn read(&self, register: u16, data: &mut [u8]) {
        for (at, byte) in (usize::from(register)..).zip(data) {
            *byte = self.bytes.get(at).copied().unwrap_or(0);
        }
    }

    /// A store by the guest: bits that cannot be written stay.
    pub fn write(&mut self, register: u16, data: &[u8]) {
        let start = usize::from(register).min(LENGTH);
        for ((byte, mask), new) in self.bytes[start..].iter_mut().zip(&self.writable[start..]).zip(data) {
            *byte = *byte & !mask | new & mask;
        }
    }

    /// A 16-bit register.
    pub fn word(&self, register: u16) -> u16 {
        let mut data = [0; 2];
        self.read(register, &mut data);
        u16::from_le_bytes(data)
    }

    /// A 32-bit register.
    pub fn dword(&self, register: u16) -> u32 {
        let mut data = [0; 4];
        self.read(register, &mut data);
        u32::from_le_bytes(data)
    }

    /// The base address registers that there are.
    pub fn bars(&self) -> &[(u8, BarSpace)] {
        &self.bars
    }

    /// Where the registers behind `bar` are now; `None` if they are not decoded.
    pub fn bar_address(&self, bar: u8, space: BarSpace) -> Option<u64> {
        if self.word(register::COMMAND) & COMMAND_MEMORY == 0 {
            return None;
        }
        let at = register::BARS + 4 * u16::from(bar);
        let low = u64::from(self.dword(at) & !0xf);
        let high = if space.is_64_bit() { u64::from(self.dword(at + 4)) } else { 0 };
        Some(high << 32 | low)
    }

    /// Sets a base address, as firmware does.
    pub fn set_bar_address(&mut self, bar: u8, space: BarSpace, address: u64) {
        let at = register::BARS + 4 * u16::from(bar);
        self.write(at, &(address as u32).to_le_bytes());
        if space.is_64_bit() {
            self.write(at + 4, &((address >> 32) as u32).to_le_bytes());
        }
    }

    /// Lets the function answer at its base addresses, as firmware does.
    pub fn enable_memory(&mut self) {
        let command = self.word(register::COMMAND) | COMMAND_MEMORY;
        self.write(register::COMMAND, &command.to_le_bytes());
    }

    /// All that can be written is zero.
    pub fn reset(&mut self) {
        self.write(0, &[0; LENGTH]);
    }

    /// The space's content, to be saved.
    pub fn content(&self) -> Vec<u8> {
        self.bytes.to_vec()
    }

    /// Takes over what can be written of a saved content.
    pub fn set_content(&mut self, content: &[u8]) {
        self.write(0, content);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDENTITY: Identity = Identity {
        vendor: 0x1af4,
        device: 0x1044,
        revision: 1,
        class: 0x00_ff_00,
        subsystem_vendor: 0x1af4,
        subsystem: 4,
    };

    #[test]
    fn the_header_says_who_the_function_is() {
        let space = ConfigSpace::new(&IDENTITY);
        assert_eq!(space.dword(0), 0x1044_1af4);
        assert_eq!(space.dword(8), 0x00ff_0001);
        assert_eq!(space.dword(0x2c), 0x0004_1af4);
        // Header type 0, one function, no interrupt pin, no capabilities.
        assert_eq!((space.dword(0x0c), space.word(0x3c), space.word(6)), (0, 0, 0));
    }

    /// PCI Local Bus 3.0, 6.2.5.1: ones are written, and the bits that stay zero tell the size.
    #[test]
    fn base_addresses_are_sized() {
        let mut space = ConfigSpace::new(&IDENTITY);
        space.add_bar(0, BarSpace::Memory32(0x8000));
        space.add_bar(2, BarSpace::Memory64(1 << 33));
        for at in [0x10, 0x14, 0x18, 0x1c, 0x20] {
            space.write(at, &[0xff; 4]);
        }
        assert_eq!(space.dword(0x10), 0xffff_8000);
        assert_eq!(space.dword(0x14), 0);
        assert_eq!((space.dword(0x18), space.dword(0x1c)), (4, 0xffff_fffe));
        assert_eq!(space.dword(0x20), 0);
    }

    #[test]
    fn addresses_are_decoded_when_the_command_register_says_so() {
        let mut space = ConfigSpace::new(&IDENTITY);
        let (low, high) = (BarSpace::Memory32(0x1000), BarSpace::Memory64(0x1000));
        space.add_bar(1, low);
        space.add_bar(4, high);
        space.set_bar_address(1, low, 0xc000_1000);
        space.set_bar_address(4, high, 0x80_0000_2000);
        assert_eq!(space.bar_address(1, low), None);
        space.enable_memory();
        assert_eq!(space.bar_address(1, low), Some(0xc000_1000));
        assert_eq!(space.bar_address(4, high), Some(0x80_0000_2000));
        space.reset();
        assert_eq!(space.bar_address(1, low), None);
        assert_eq!(space.dword(0x20), 4);
    }

    #[test]
    fn capabilities_are_a_list() {
        let mut space = ConfigSpace::new(&IDENTITY);
        let first = space.add_capability(0x11, &[0; 10], &[0; 10]);
        let second = space.add_capability(0x09, &[1, 2, 3], &[0, 0xf0, 0]);
        assert_eq!(space.word(6), 1 << 4);
        assert_eq!((space.word(0x34), space.word(first)), (first, second << 8 | 0x11));
        assert_eq!(space.word(second), 0x09);
        space.write(second + 2, &[0xff; 3]);
        assert_eq!(space.dword(second), 0xf2_01_00_09);
    }

    #[test]
    fn beyond_its_end_there_is_nothing() {
        let mut space = ConfigSpace::new(&IDENTITY);
        space.write(0xfff, &[0xff; 4]);
        space.write(0xfe, &[0xff; 4]);
        assert_eq!((space.dword(0xffc), space.dword(0xfe), space.dword(0x100)), (0, 0, 0));
    }
}
