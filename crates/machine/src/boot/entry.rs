//! The state in which the first processor enters a kernel.

use purlin_arch::x86_64::{
    msr,
    regs::{cr0, cr4, efer, gpr, rflags, seg},
    state::{Activity, Msr, Segment, SystemRegs, Table, VcpuState},
};
use purlin_engine::memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};

use crate::{error::MachineError, layout::handover};

/// Access rights as [`Segment::access`] has them.
mod access {
    /// Code, 32-bit, readable, accessed, present, in pages.
    pub const CODE32: u32 = 0xc09b;
    /// Code, 64-bit.
    pub const CODE64: u32 = 0xa09b;
    /// Data, writable.
    pub const DATA: u32 = 0xc093;
    /// Busy task state segment.
    pub const TSS: u32 = 0x008b;
    /// No segment.
    pub const UNUSABLE: u32 = 1 << 16;
}

/// Selectors: those that Linux's boot protocol asks for (`__BOOT_CS`, `__BOOT_DS`).
mod selector {
    pub const CODE: u32 = 0x10;
    pub const DATA: u32 = 0x18;
    pub const TSS: u32 = 0x20;
}

/// Size of a page-directory's page and of what it maps with 2 MiB pages.
const TABLE: u64 = 0x1000;
/// Present, writable.
const PTE_TABLE: u64 = 0b11;
/// Present, writable, a large page.
const PTE_LARGE: u64 = 0b1000_0011;

/// The mode that a kernel is entered in. Interrupts are off, segments are flat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// Protected mode without paging.
    Protected,
    /// Long mode, the first 4 GiB mapped to themselves.
    Long,
}

/// Where and how the first processor starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    mode: Mode,
    rip: u64,
    registers: Vec<(usize, u64)>,
}

impl Entry {
    /// 32-bit protected mode at `rip`, with these general registers (index as in [`gpr`], value) and zero in all others.
    pub(super) fn protected(ram: &GuestRam, rip: u64, registers: &[(usize, u64)]) -> Result<Self, MachineError> {
        write_gdt(ram, access::CODE32)?;
        Ok(Self { mode: Mode::Protected, rip, registers: registers.to_vec() })
    }

    /// 64-bit mode at `rip`.
    pub(super) fn long(ram: &GuestRam, rip: u64, registers: &[(usize, u64)]) -> Result<Self, MachineError> {
        write_gdt(ram, access::CODE64)?;
        write_identity_map(ram)?;
        Ok(Self { mode: Mode::Long, rip, registers: registers.to_vec() })
    }

    /// Turns the state after power-up into the state at the kernel's entry.
    pub fn apply(&self, state: &mut VcpuState) {
        state.regs.gpr = vec![0; 16];
        for &(index, value) in &self.registers {
            state.regs.gpr[index] = value;
        }
        state.regs.rip = self.rip;
        state.regs.rflags = rflags::FIXED;
        state.activity = Activity::Running as i32;
        self.apply_system(&mut state.system);
        virtual_wire(&mut state.lapic.regs);
    }

    fn apply_system(&self, system: &mut SystemRegs) {
        let code = match self.mode {
            Mode::Protected => access::CODE32,
            Mode::Long => access::CODE64,
        };
        system.segments = vec![flat(selector::DATA, access::DATA); 6];
        system.segments[seg::CS] = flat(selector::CODE, code);
        system.tr = task();
        system.ldtr = Segment { access: access::UNUSABLE, ..Segment::default() };
        system.gdtr = Table { base: handover::GDT, limit: 5 * 8 + 8 - 1 };
        system.idtr = Table { base: 0, limit: 0 };
        system.cr0 = cr0::PE | cr0::ET;
        system.cr4 = 0;
        system.efer = 0;
        if self.mode == Mode::Long {
            system.cr0 |= cr0::PG;
            system.cr3 = handover::PAGE_TABLES;
            system.cr4 = cr4::PAE;
            system.efer = efer::LME | efer::LMA;
        }
    }
}

/// What firmware does on every processor: memory is cached (SDM vol. 3A 12.11.2.1: MTRRs on, write-back by default).
pub fn enable_caching(state: &mut VcpuState) {
    const ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;
    state.msrs.retain(|m| m.index != msr::MTRR_DEF_TYPE);
    state.msrs.push(Msr { index: msr::MTRR_DEF_TYPE, value: ENABLED_WRITE_BACK });
}

/// What firmware leaves the first local APIC in: on, the 8259's wire going through LINT0, NMI on LINT1 (MultiProcessor
/// Specification 1.4, 3.6.2.2), so that a kernel which knows no APIC gets its interrupts.
fn virtual_wire(lapic: &mut [u8]) {
    const SPURIOUS: (usize, u32) = (0xf0, 1 << 8 | 0xff);
    const LINT0_EXTINT: (usize, u32) = (0x350, 7 << 8);
    const LINT1_NMI: (usize, u32) = (0x360, 4 << 8);
    for (offset, value) in [SPURIOUS, LINT0_EXTINT, LINT1_NMI] {
        if let Some(register) = lapic.get_mut(offset..offset + 4) {
            register.copy_from_slice(&value.to_le_bytes());
        }
    }
}

fn flat(selector: u32, access: u32) -> Segment {
    Segment { selector, base: 0, limit: 0xffff_ffff, access }
}

/// The task that PVH asks for; no other method minds.
fn task() -> Segment {
    Segment { selector: selector::TSS, base: 0, limit: 0x67, access: access::TSS }
}

fn write_gdt(ram: &GuestRam, code: u32) -> Result<(), MachineError> {
    let table = [0, 0, descriptor(flat(0, code)), descriptor(flat(0, access::DATA)), descriptor(task()), 0];
    for (index, entry) in table.into_iter().enumerate() {
        ram.write_obj::<u64>(entry, GuestAddress(handover::GDT + 8 * index as u64))?;
    }
    Ok(())
}

/// A segment as its descriptor (SDM vol. 3A 3.4.5).
fn descriptor(segment: Segment) -> u64 {
    let in_pages = segment.access & 1 << 15 != 0;
    let limit = u64::from(if in_pages { segment.limit >> 12 } else { segment.limit });
    let access = u64::from(segment.access & 0xf0ff);
    limit & 0xffff
        | (segment.base & 0xff_ffff) << 16
        | access << 40
        | (limit >> 16 & 0xf) << 48
        | (segment.base >> 24 & 0xff) << 56
}

fn write_identity_map(ram: &GuestRam) -> Result<(), MachineError> {
    let put = |address, value: u64| ram.write_obj(value, GuestAddress(address));
    let (pml4, pdpt, directories) =
        (handover::PAGE_TABLES, handover::PAGE_TABLES + TABLE, handover::PAGE_TABLES + 2 * TABLE);
    for index in 0..TABLE / 8 {
        put(pml4 + 8 * index, if index == 0 { pdpt | PTE_TABLE } else { 0 })?;
        put(pdpt + 8 * index, if index < 4 { (directories + TABLE * index) | PTE_TABLE } else { 0 })?;
    }
    for page in 0..4 * TABLE / 8 {
        put(directories + 8 * page, page << 21 | PTE_LARGE)?;
    }
    Ok(())
}

/// Index of the registers that boot protocols use.
pub(super) const RAX: usize = gpr::RAX;
/// See [`RAX`].
pub(super) const RBX: usize = gpr::RBX;
/// See [`RAX`].
pub(super) const RSI: usize = gpr::RSI;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_encoded_as_the_manual_says() {
        assert_eq!(descriptor(flat(0, access::CODE32)), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(flat(0, access::CODE64)), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(flat(0, access::DATA)), 0x00cf_9300_0000_ffff);
        assert_eq!(descriptor(task()), 0x0000_8b00_0000_0067);
    }
}
