//! ELF kernels with a PVH note (Xen, docs/misc/pvh.pandoc; xen/include/public/arch-x86/hvm/start_info.h).

use linux_loader::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{Bytes, GuestAddress};

use super::{
    elf::Elf,
    entry::{Entry, RBX},
    placement::Target,
};
use crate::{
    config::BootConfig,
    error::MachineError,
    layout::{self, handover},
};

/// `XEN_HVM_START_MAGIC_VALUE`.
const MAGIC: u32 = 0x336e_c578;
/// The first version with a memory map.
const VERSION: u32 = 1;
/// The module list, behind the memory map in the lists' page.
const MODULES: u64 = handover::LISTS + 0x800;

/// `file` as an ELF file with a PVH note, if it is one.
pub(super) fn recognise(file: &[u8]) -> Option<Elf<'_>> {
    Elf::parse(file).ok().filter(|elf| elf.pvh_entry.is_some())
}

/// Loads it. The initrds become one module, which is what Linux knows.
pub(super) fn load(boot: &BootConfig, elf: &Elf, target: &Target) -> Result<Entry, MachineError> {
    let kernel_end = elf.load(&boot.kernel, target)?;
    let (initrd, initrd_length) = target.load_initrds(&boot.initrds, kernel_end, u32::MAX.into())?;
    target.write_cmdline(&boot.cmdline, usize::MAX)?;

    let entries = write_memory_map(target)?;
    if initrd_length > 0 {
        let module = hvm_modlist_entry { paddr: initrd, size: initrd_length, ..Default::default() };
        target.ram.write_obj(module, GuestAddress(MODULES))?;
    }
    let info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        flags: 0,
        nr_modules: (initrd_length > 0).into(),
        modlist_paddr: if initrd_length > 0 { MODULES } else { 0 },
        cmdline_paddr: handover::CMDLINE,
        rsdp_paddr: layout::ACPI,
        memmap_paddr: handover::LISTS,
        memmap_entries: entries,
        reserved: 0,
    };
    target.ram.write_obj(info, GuestAddress(handover::INFO))?;
    Entry::protected(target.ram, elf.pvh_entry.unwrap_or(elf.entry), &[(RBX, handover::INFO)])
}

fn write_memory_map(target: &Target) -> Result<u32, MachineError> {
    let map = layout::memory_map(target.memory);
    let mut address = handover::LISTS;
    for range in &map {
        let entry =
            hvm_memmap_table_entry { addr: range.start, size: range.length, type_: range.kind as u32, reserved: 0 };
        target.ram.write_obj(entry, GuestAddress(address))?;
        address += size_of::<hvm_memmap_table_entry>() as u64;
    }
    Ok(map.len() as u32)
}
