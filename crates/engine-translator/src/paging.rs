//! The page walk (SDM vol. 3A chapter 4): no paging, 32-bit, PAE and 4-level.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use purlin_arch::x86_64::regs::{cr0, cr4, efer};

use crate::{
    cpu::Cpu,
    exception::{Exception, pf},
    mem::Access,
    tlb::{Privilege, Walked},
};

/// Bits of paging-structure entries (SDM vol. 3A figure 4-11).
mod entry {
    pub const P: u64 = 1 << 0;
    pub const W: u64 = 1 << 1;
    pub const U: u64 = 1 << 2;
    pub const A: u64 = 1 << 5;
    pub const D: u64 = 1 << 6;
    /// Maps a page rather than a table (all levels but the last).
    pub const PS: u64 = 1 << 7;
    pub const G: u64 = 1 << 8;
    pub const NX: u64 = 1 << 63;
    /// The address in an 8-byte entry.
    pub const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
}

/// Bits of a linear address below the parts that levels index with, by level: 4-level paging's PML4E, and a page.
const SHIFT_PML4: u32 = 39;
const SHIFT_PD: u32 = 21;
const SHIFT_PAGE: u32 = 12;

/// One entry as it was read.
#[derive(Clone, Copy)]
struct Slot {
    value: u64,
    /// Where it is in guest memory; null if it is not in memory (nothing is then written back).
    host: *mut u8,
    /// Eight bytes, not four.
    wide: bool,
}

/// The entries that lead to a page, and what they say together.
struct Path {
    slots: [Slot; 4],
    len: usize,
    /// Physical address of the 4 KiB page.
    physical: u64,
    user: bool,
    write: bool,
    nx: bool,
    large: bool,
}

/// A walk that ends before a page: bits for the error code.
struct Miss(u32);

const NOT_PRESENT: Miss = Miss(0);
const RESERVED: Miss = Miss(pf::PRESENT | pf::RESERVED);

impl Path {
    fn new() -> Self {
        let slot = Slot { value: 0, host: std::ptr::null_mut(), wide: false };
        Self { slots: [slot; 4], len: 0, physical: 0, user: true, write: true, nx: false, large: false }
    }

    fn push(&mut self, slot: Slot) {
        self.slots[self.len] = slot;
        self.len += 1;
        self.user &= slot.value & entry::U != 0;
        self.write &= slot.value & entry::W != 0;
        self.nx |= slot.wide && slot.value & entry::NX != 0;
    }

    /// The page is `linear`'s 4 KiB of the one at `base` whose size is 1 << `shift`.
    fn end(&mut self, base: u64, linear: u64, shift: u32) {
        let inside = (1 << shift) - 1;
        self.physical = base & !inside | linear & inside & !0xfff;
        self.large = shift != SHIFT_PAGE;
    }

    fn leaf(&self) -> &Slot {
        &self.slots[self.len - 1]
    }
}

impl Cpu {
    /// Walks the page tables for an access to linear `address` (canonical), setting accessed and dirty flags.
    pub fn walk(&mut self, address: u64, access: Access, privilege: Privilege) -> Result<Walked, Exception> {
        // Outside of long mode linear addresses have 32 bits; one may come here as the sum of two.
        let linear = if self.long_mode() { address } else { address & 0xffff_ffff };
        if !self.paging() {
            return Ok(identity(linear));
        }
        loop {
            let fault = |cpu: &Self, miss: Miss| cpu.page_fault(linear, access, privilege, miss);
            let path = self.descend(linear).map_err(|miss| fault(self, miss))?;
            let mut walked = self.rights(&path, privilege);
            let allowed = match access {
                Access::Read => walked.readable,
                Access::Write => walked.writable,
                Access::Fetch => walked.executable,
            };
            if !allowed {
                return Err(fault(self, Miss(pf::PRESENT)));
            }
            let set = if access == Access::Write { entry::A | entry::D } else { entry::A };
            if self.mark(&path, set) {
                walked.writable &= (path.leaf().value | set) & entry::D != 0;
                return Ok(walked);
            }
        }
    }

    /// Loads the PAE page-directory pointers that CR3 points at (SDM vol. 3A 4.4.1), for the CR0, CR3 and CR4 that
    /// are about to be set. #GP(0) if one is present and has reserved bits set.
    pub fn load_pdptes(&mut self, cr3: u64) -> Result<[u64; 4], Exception> {
        let reserved = self.features.reserved_physical() | 0xfff0_0000_0000_01e6;
        let mut pdptes = [0; 4];
        for (i, pdpte) in pdptes.iter_mut().enumerate() {
            *pdpte = self.read_entry((cr3 & 0xffff_ffe0) + 8 * i as u64, true).value;
            if *pdpte & entry::P != 0 && *pdpte & reserved != 0 {
                return Err(Exception::GP0);
            }
        }
        Ok(pdptes)
    }

    fn descend(&mut self, linear: u64) -> Result<Path, Miss> {
        if self.long_mode() {
            return self.descend_wide(linear, self.cr3 & entry::ADDRESS, SHIFT_PML4);
        }
        if self.cr4 & cr4::PAE == 0 {
            return self.descend_narrow(linear);
        }
        let pdpte = self.pdptes[(linear >> 30) as usize & 3];
        if pdpte & entry::P == 0 {
            return Err(NOT_PRESENT);
        }
        self.descend_wide(linear, pdpte & entry::ADDRESS, SHIFT_PD)
    }

    /// PAE and 4-level paging, from the table at `table` on, whose entries map 1 << `shift` bytes each.
    fn descend_wide(&mut self, linear: u64, mut table: u64, mut shift: u32) -> Result<Path, Miss> {
        let mut path = Path::new();
        loop {
            let slot = self.read_entry(table + (linear >> shift & 511) * 8, true);
            if slot.value & entry::P == 0 {
                return Err(NOT_PRESENT);
            }
            let leaf = shift == SHIFT_PAGE || slot.value & entry::PS != 0;
            if slot.value & self.reserved_wide(shift, leaf) != 0 {
                return Err(RESERVED);
            }
            path.push(slot);
            let address = slot.value & entry::ADDRESS;
            if leaf {
                path.end(address, linear, shift);
                return Ok(path);
            }
            (table, shift) = (address, shift - 9);
        }
    }

    /// Bits that must be zero in an 8-byte entry that maps 1 << `shift` bytes (SDM vol. 3A 4.4.2, 4.5.4).
    fn reserved_wide(&self, shift: u32, leaf: bool) -> u64 {
        let mut reserved = self.features.reserved_physical();
        if self.efer & efer::NXE == 0 {
            reserved |= entry::NX;
        }
        if !self.long_mode() {
            reserved |= 0x7ff0_0000_0000_0000;
        }
        if shift == SHIFT_PML4 || shift == 30 && !self.features.pages_1g {
            reserved |= entry::PS;
        }
        if leaf && shift != SHIFT_PAGE {
            // Between the PAT bit, 12, and the page's address.
            reserved |= (1 << shift) - (1 << 13);
        }
        reserved
    }

    /// 32-bit paging (SDM vol. 3A 4.3).
    fn descend_narrow(&mut self, linear: u64) -> Result<Path, Miss> {
        let mut path = Path::new();
        let pde = self.read_entry((self.cr3 & 0xffff_f000) + (linear >> 22) * 4, false);
        if pde.value & entry::P == 0 {
            return Err(NOT_PRESENT);
        }
        path.push(pde);
        if pde.value & entry::PS != 0 && self.cr4 & cr4::PSE != 0 {
            // PSE-36: bits 20:13 are 39:32 of the address, as far as the processor has them; bit 21 is reserved.
            let high = (pde.value >> 13 & 0xff) << 32;
            if pde.value & 1 << 21 != 0 || high & self.features.reserved_physical() != 0 {
                return Err(RESERVED);
            }
            path.end(pde.value & 0xffc0_0000 | high, linear, 22);
            return Ok(path);
        }
        let pte = self.read_entry((pde.value & 0xffff_f000) + (linear >> 12 & 1023) * 4, false);
        if pte.value & entry::P == 0 {
            return Err(NOT_PRESENT);
        }
        path.push(pte);
        path.end(pte.value & 0xffff_f000, linear, SHIFT_PAGE);
        Ok(path)
    }

    /// What an access with `privilege` may do on the page (SDM vol. 3A 4.6.1).
    fn rights(&self, path: &Path, privilege: Privilege) -> Walked {
        let (cr0, cr4) = (self.cr0, self.cr4);
        let (data, write, fetch) = match privilege {
            Privilege::User => (path.user, path.write, path.user),
            Privilege::Supervisor | Privilege::SupervisorAc => {
                let smap = cr4 & cr4::SMAP != 0 && privilege == Privilege::Supervisor;
                let smep = cr4 & cr4::SMEP != 0;
                (!(path.user && smap), path.write || cr0 & cr0::WP == 0, !(path.user && smep))
            }
        };
        Walked {
            physical: path.physical,
            readable: data,
            writable: data && write,
            executable: fetch && !path.nx,
            global: cr4 & cr4::PGE != 0 && path.leaf().value & entry::G != 0,
            large: path.large,
        }
    }

    fn page_fault(&self, address: u64, access: Access, privilege: Privilege, Miss(mut error): Miss) -> Exception {
        if access == Access::Write {
            error |= pf::WRITE;
        }
        if privilege == Privilege::User {
            error |= pf::USER;
        }
        // I/D is told only where it can matter (SDM vol. 3A 4.7).
        let nx = self.cr4 & cr4::PAE != 0 && self.efer & efer::NXE != 0;
        if access == Access::Fetch && (nx || self.cr4 & cr4::SMEP != 0) {
            error |= pf::FETCH;
        }
        Exception::page_fault(address, error)
    }

    /// Sets `leaf_bits` in the last entry and the accessed flag in the others. False if an entry has changed since it
    /// was read: the walk must be done again.
    fn mark(&self, path: &Path, leaf_bits: u64) -> bool {
        path.slots[..path.len].iter().enumerate().all(|(i, slot)| {
            let bits = if i + 1 == path.len { leaf_bits } else { entry::A };
            slot.value & bits == bits || slot.host.is_null() || self.set_bits(slot, bits)
        })
    }

    fn set_bits(&self, slot: &Slot, bits: u64) -> bool {
        let (old, new) = (slot.value, slot.value | bits);
        let order = (Ordering::SeqCst, Ordering::Relaxed);
        let done = if slot.wide {
            wide_entry(slot.host).compare_exchange(old, new, order.0, order.1).is_ok()
        } else {
            narrow_entry(slot.host).compare_exchange(old as u32, new as u32, order.0, order.1).is_ok()
        };
        if done {
            self.shared.ram.written(&self.shared.code, slot.host, if slot.wide { 8 } else { 4 });
        }
        done
    }

    /// The entry at a physical address, a multiple of its size.
    fn read_entry(&mut self, physical: u64, wide: bool) -> Slot {
        let page = self.shared.ram.page(physical);
        if self.emitted.lean && page.is_none_or(|page| self.shared.ram.is_watched(page)) {
            // Not now, when neither the bus may be asked nor translations killed: as if it were absent, so that it is asked
            // for again.
            self.emitted.walk_cut = true;
            return Slot { value: 0, host: std::ptr::null_mut(), wide };
        }
        if let Some(page) = page {
            let host = page.host.wrapping_add((physical & 0xfff) as usize);
            let value = if wide {
                wide_entry(host).load(Ordering::Acquire)
            } else {
                u64::from(narrow_entry(host).load(Ordering::Acquire))
            };
            return Slot { value, host, wide };
        }
        // Tables in device memory: whatever the bus answers, which is all ones where nobody is.
        let mut bytes = [0; 8];
        self.mmio_read(physical, &mut bytes[..if wide { 8 } else { 4 }]);
        Slot { value: u64::from_le_bytes(bytes), host: std::ptr::null_mut(), wide }
    }
}

/// Without paging every access is allowed and linear addresses are physical ones.
fn identity(linear: u64) -> Walked {
    Walked {
        physical: linear & 0xffff_f000,
        readable: true,
        writable: true,
        executable: true,
        global: false,
        large: false,
    }
}

fn wide_entry<'a>(host: *mut u8) -> &'a AtomicU64 {
    // SAFETY: `host` comes from `Cpu::read_entry`: eight bytes of guest memory, aligned, mapped as long as the VM's
    // `Ram` is; whoever else uses them does so as shared memory.
    #[allow(unsafe_code)]
    unsafe {
        AtomicU64::from_ptr(host.cast())
    }
}

fn narrow_entry<'a>(host: *mut u8) -> &'a AtomicU32 {
    // SAFETY: as in `wide_entry`, four bytes.
    #[allow(unsafe_code)]
    unsafe {
        AtomicU32::from_ptr(host.cast())
    }
}

#[cfg(test)]
mod tests;
