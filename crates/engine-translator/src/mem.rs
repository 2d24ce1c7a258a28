//! Loads and stores of the emulated instructions: by linear address through the TLB, by physical address to memory,
//! the local APIC or the bus.

use std::sync::atomic::{AtomicU64, Ordering};

use purlin_engine::{After, Bus};

use crate::{cpu::Cpu, exception::Exception, tlb::Privilege};

/// What an access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// A data load.
    Read,
    /// A data store, or the load of a read-modify-write.
    Write,
    /// An instruction fetch.
    Fetch,
}

/// Where one page's part of an access goes.
#[derive(Clone, Copy, Debug)]
pub enum Target {
    /// Memory: the host address of the byte.
    Ram(*mut u8),
    /// Not memory: the guest physical address.
    Mmio(u64),
}

/// An unsigned integer of 1, 2, 4 or 8 bytes.
pub trait Scalar: Copy + Default {
    /// Its size in bytes.
    const SIZE: usize;
    /// From little-endian bytes.
    fn from_le(bytes: &[u8]) -> Self;
    /// To little-endian bytes in a buffer of eight.
    fn to_le(self) -> [u8; 8];
}

macro_rules! scalar {
    ($($t:ty),*) => {$(
        impl Scalar for $t {
            const SIZE: usize = size_of::<$t>();
            fn from_le(bytes: &[u8]) -> Self {
                let mut b = [0; size_of::<$t>()];
                b.copy_from_slice(&bytes[..size_of::<$t>()]);
                <$t>::from_le_bytes(b)
            }
            fn to_le(self) -> [u8; 8] {
                u64::from(self).to_le_bytes()
            }
        }
    )*};
}
scalar!(u8, u16, u32, u64);

/// Bytes left in the page from `linear` on.
pub fn page_rest(linear: u64) -> usize {
    4096 - (linear & 0xfff) as usize
}

impl Cpu {
    /// Loads from linear `address`, with the privilege of the current CPL.
    pub fn load<T: Scalar>(&mut self, address: u64) -> Result<T, Exception> {
        self.load_as(address, self.privilege())
    }

    /// Stores to linear `address`, with the privilege of the current CPL. Both pages of a store that crosses one are
    /// checked before anything is written.
    pub fn store<T: Scalar>(&mut self, address: u64, value: T) -> Result<(), Exception> {
        self.store_as(address, value, self.privilege())
    }

    /// Loads as supervisor whatever the CPL: descriptor tables, TSS (SDM vol. 3A 4.6, implicit accesses).
    pub fn load_system<T: Scalar>(&mut self, address: u64) -> Result<T, Exception> {
        self.load_as(address, Privilege::Supervisor)
    }

    /// Stores as supervisor whatever the CPL.
    pub fn store_system<T: Scalar>(&mut self, address: u64, value: T) -> Result<(), Exception> {
        self.store_as(address, value, Privilege::Supervisor)
    }

    /// Eight bytes at `address`, if that is a multiple of eight and the TLB knows the page.
    pub fn load_quickly(&self, address: u64, privilege: Privilege) -> Option<u64> {
        let host = self.tlb.readable(privilege, address).filter(|_| address & 7 == 0)?;
        // SAFETY: eight aligned bytes of guest memory, which is mapped as long as the TLB has entries for it; whoever
        // else uses them does so as shared memory.
        #[allow(unsafe_code)]
        let word = unsafe { AtomicU64::from_ptr(host.cast_mut().cast()) };
        Some(u64::from_le(word.load(Ordering::Relaxed)))
    }

    /// Loads with a given privilege.
    pub fn load_as<T: Scalar>(&mut self, address: u64, privilege: Privilege) -> Result<T, Exception> {
        let mut bytes = [0; 8];
        self.read_as(address, &mut bytes[..T::SIZE], privilege)?;
        Ok(T::from_le(&bytes))
    }

    /// Stores with a given privilege.
    pub fn store_as<T: Scalar>(&mut self, address: u64, value: T, privilege: Privilege) -> Result<(), Exception> {
        self.write_as(address, &value.to_le()[..T::SIZE], privilege)
    }

    /// Reads bytes from linear `address`; they may lie on several pages.
    pub fn read_as(&mut self, address: u64, data: &mut [u8], privilege: Privilege) -> Result<(), Exception> {
        let mut done = 0;
        while done < data.len() {
            let at = self.wrapped(address, done);
            let n = page_rest(at).min(data.len() - done);
            let target = self.resolve(at, Access::Read, privilege)?;
            self.read_target(target, &mut data[done..done + n]);
            done += n;
        }
        Ok(())
    }

    /// Writes bytes to linear `address`; they may lie on several pages, all of which are checked first.
    pub fn write_as(&mut self, address: u64, data: &[u8], privilege: Privilege) -> Result<(), Exception> {
        if data.len() > page_rest(address) {
            self.probe(address, data.len(), Access::Write, privilege)?;
        }
        let mut done = 0;
        while done < data.len() {
            let at = self.wrapped(address, done);
            let n = page_rest(at).min(data.len() - done);
            let target = self.resolve(at, Access::Write, privilege)?;
            self.write_target(target, &data[done..done + n]);
            done += n;
        }
        Ok(())
    }

    /// The linear address `by` bytes on: outside of 64-bit mode addresses wrap at 4 GiB. (Descriptor tables may lie
    /// beyond that in compatibility mode.)
    fn wrapped(&self, address: u64, by: usize) -> u64 {
        let sum = address.wrapping_add(by as u64);
        if address <= 0xffff_ffff && !self.code64() { sum & 0xffff_ffff } else { sum }
    }

    /// Checks that an access of `size` bytes would not fault.
    pub fn probe(&mut self, address: u64, size: usize, access: Access, privilege: Privilege) -> Result<(), Exception> {
        let mut done = 0;
        while done < size {
            let at = self.wrapped(address, done);
            self.resolve(at, access, privilege)?;
            done += page_rest(at);
        }
        Ok(())
    }

    /// Checks that a store to two pages at most would not fault, of which a mask says that it is from the byte at `first` to the
    /// one at `last`. These are the addresses that Intel's processors tell of a page fault, whatever is stored between them.
    pub fn probe_ends(&mut self, first: u64, last: u64) -> Result<(), Exception> {
        [first, last].into_iter().try_for_each(|end| self.probe(end, 1, Access::Write, self.privilege()))
    }

    /// Reads from what [`Cpu::resolve`] found; the access stays on its page.
    pub fn read_target(&mut self, target: Target, data: &mut [u8]) {
        match target {
            Target::Ram(host) => copy_from_guest(host, data),
            Target::Mmio(physical) => self.mmio_read(physical, data),
        }
    }

    /// Writes to what [`Cpu::resolve`] found for [`Access::Write`]; the access stays on its page.
    pub fn write_target(&mut self, target: Target, data: &[u8]) {
        match target {
            Target::Ram(host) => {
                copy_to_guest(host, data);
                self.wrote_ram(host, data.len());
            }
            Target::Mmio(physical) => self.mmio_write(physical, data),
        }
    }

    /// Translations made from these bytes are no longer valid. Returns whether there were any on that page.
    pub fn wrote_ram(&mut self, host: *mut u8, len: usize) -> bool {
        self.shared.ram.written(&self.shared.code, host, len)
    }

    /// A load from a physical address that is not memory: the local APIC's page, else the bus, in pieces of up to
    /// eight bytes.
    pub fn mmio_read(&mut self, physical: u64, data: &mut [u8]) {
        for (i, piece) in data.chunks_mut(8).enumerate() {
            let at = physical + 8 * i as u64;
            match self.lapic_offset(at) {
                Some(offset) => crate::lapic::mmio_read(self, offset, piece),
                None => self.bus().mmio_read(at, piece),
            }
        }
    }

    /// A store to a physical address that is not memory.
    pub fn mmio_write(&mut self, physical: u64, data: &[u8]) {
        for (i, piece) in data.chunks(8).enumerate() {
            let at = physical + 8 * i as u64;
            match self.lapic_offset(at) {
                Some(offset) => crate::lapic::mmio_write(self, offset, piece),
                None => {
                    let after = self.bus().mmio_write(at, piece);
                    self.after_bus(after);
                }
            }
        }
    }

    /// Takes note of what a bus write answered.
    pub fn after_bus(&mut self, after: After) {
        if after == After::Leave {
            self.leave = true;
        }
    }

    /// Where in the local APIC's register page `physical` is, while the APIC is in xAPIC mode.
    fn lapic_offset(&self, physical: u64) -> Option<u32> {
        let base = self.lapic.mmio_base()?;
        (physical & !0xfff == base).then_some((physical & 0xfff) as u32)
    }
}

/// Copies from guest memory, which other threads may be writing: no reference is made to it.
#[allow(unsafe_code)]
pub(crate) fn copy_from_guest(host: *const u8, data: &mut [u8]) {
    // SAFETY: `host` is an address that `Cpu::resolve` found in guest memory, with `data.len()` bytes left on its
    // page. Scalars are moved in one piece, as the guest's other processors expect.
    unsafe {
        match data.len() {
            1 => data[0] = host.read_volatile(),
            2 => data.copy_from_slice(&host.cast::<u16>().read_unaligned().to_ne_bytes()),
            4 => data.copy_from_slice(&host.cast::<u32>().read_unaligned().to_ne_bytes()),
            8 => data.copy_from_slice(&host.cast::<u64>().read_unaligned().to_ne_bytes()),
            n => std::ptr::copy_nonoverlapping(host, data.as_mut_ptr(), n),
        }
    }
}

/// Copies to guest memory.
#[allow(unsafe_code)]
pub(crate) fn copy_to_guest(host: *mut u8, data: &[u8]) {
    // SAFETY: as in `copy_from_guest`; `Cpu::resolve` was asked for `Access::Write`.
    unsafe {
        match *data {
            [b] => host.write_volatile(b),
            [a, b] => host.cast::<u16>().write_unaligned(u16::from_ne_bytes([a, b])),
            [a, b, c, d] => host.cast::<u32>().write_unaligned(u32::from_ne_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] => {
                host.cast::<u64>().write_unaligned(u64::from_ne_bytes([a, b, c, d, e, f, g, h]));
            }
            _ => std::ptr::copy_nonoverlapping(data.as_ptr(), host, data.len()),
        }
    }
}

/// A bus on which nobody answers.
pub struct NoBus;

impl Bus for NoBus {
    fn port_in(&self, _port: u16, _size: u8) -> u32 {
        u32::MAX
    }
    fn port_out(&self, _port: u16, _size: u8, _value: u32) -> After {
        After::Continue
    }
    fn mmio_read(&self, _address: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _address: u64, _data: &[u8]) -> After {
        After::Continue
    }
    fn acknowledge_interrupt(&self) -> u8 {
        0xff
    }
    fn end_of_interrupt(&self, _vector: u8) {}
}
