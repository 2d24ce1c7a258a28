//! Multiboot 1 kernels (Multiboot Specification 0.6.96): ELF files, or any file with an address field in its header.

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};

use super::{
    elf::Elf,
    entry::{Entry, RAX, RBX},
    image::Image,
    placement::Target,
};
use crate::{
    config::BootConfig,
    error::MachineError,
    layout::{self, PAGE, handover},
};

/// In the kernel's header.
const HEADER_MAGIC: u32 = 0x1bad_b002;
/// In EAX at the kernel's entry.
const LOADER_MAGIC: u64 = 0x2bad_b002;
/// The header lies within so many bytes, at a multiple of four (3.1).
const SEARCH: usize = 8192;

/// Requirements that a loader must refuse to boot if it does not know them: bits 0 to 15 (3.1.2).
mod requires {
    /// Modules start at pages: here they always do.
    pub const PAGE_ALIGN: u32 = 1 << 0;
    /// Memory information: here it is always given.
    pub const MEMORY: u32 = 1 << 1;
    /// Video mode. There is no video; a kernel finds that in the information's flags, and most go on.
    pub const VIDEO: u32 = 1 << 2;
    /// All that must be understood.
    pub const MANDATORY: u32 = 0xffff;
    /// The header says where to load (the "a.out kludge").
    pub const ADDRESSES: u32 = 1 << 16;
}

/// Which fields of the information are valid (3.3).
mod gives {
    pub const MEMORY: u32 = 1 << 0;
    pub const CMDLINE: u32 = 1 << 2;
    pub const MODULES: u32 = 1 << 3;
    pub const MEMORY_MAP: u32 = 1 << 6;
    pub const LOADER_NAME: u32 = 1 << 9;
}

/// Offsets in the information.
mod field {
    pub const FLAGS: u64 = 0;
    pub const MEM_LOWER: u64 = 4;
    pub const MEM_UPPER: u64 = 8;
    pub const CMDLINE: u64 = 16;
    pub const MODS_COUNT: u64 = 20;
    pub const MODS_ADDR: u64 = 24;
    pub const MMAP_LENGTH: u64 = 44;
    pub const MMAP_ADDR: u64 = 48;
    pub const LOADER_NAME: u64 = 64;
    /// Length of it all.
    pub const END: u64 = 116;
}

/// The memory map, in the lists' page.
const MEMORY_MAP: u64 = handover::LISTS;
/// The module list, behind it, to the end of that page.
const MODULES: u64 = handover::LISTS + 0x400;
/// Length of a module's entry.
const MODULE_LENGTH: u64 = 16;
/// How many there is room for.
const MOST_MODULES: usize = ((handover::LISTS + PAGE - MODULES) / MODULE_LENGTH) as usize;

/// The header that makes a file a multiboot kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    offset: usize,
    flags: u32,
    /// header_addr, load_addr, load_end_addr, bss_end_addr, entry_addr.
    addresses: [u32; 5],
}

/// The header in `file`, if there is one.
pub(super) fn recognise(file: &[u8]) -> Option<Header> {
    let word = |offset: usize| file.get(offset..)?.first_chunk().map(|b| u32::from_le_bytes(*b));
    let head = file.len().min(SEARCH);
    let valid = |&offset: &usize| {
        let (Some(magic), Some(flags), Some(checksum)) = (word(offset), word(offset + 4), word(offset + 8)) else {
            return false;
        };
        offset + 12 <= head && magic == HEADER_MAGIC && magic.wrapping_add(flags).wrapping_add(checksum) == 0
    };
    let offset = (0..head).step_by(4).find(valid)?;
    let addresses = std::array::from_fn(|i| word(offset + 12 + 4 * i).unwrap_or(0));
    Some(Header { offset, flags: word(offset + 4)?, addresses })
}

/// Loads it.
pub(super) fn load(boot: &BootConfig, file: &[u8], header: Header, target: &Target) -> Result<Entry, MachineError> {
    let unknown = header.flags & requires::MANDATORY & !(requires::PAGE_ALIGN | requires::MEMORY | requires::VIDEO);
    if unknown != 0 {
        let reason = format!("its multiboot header requires what is not known here (flags {unknown:#x})");
        return Err(boot.kernel.not_a_kernel(reason));
    }
    let (entry, end) = if header.flags & requires::ADDRESSES != 0 {
        load_by_header(&boot.kernel, file, header, target)?
    } else {
        load_elf(&boot.kernel, file, target)?
    };
    write_information(boot, end, target)?;
    Entry::protected(target.ram, entry, &[(RAX, LOADER_MAGIC), (RBX, handover::INFO)])
}

/// Loads a file by the addresses in its header (3.1.3). Returns entry point and end.
fn load_by_header(image: &Image, file: &[u8], header: Header, target: &Target) -> Result<(u64, u64), MachineError> {
    let [header_address, load, load_end, bss_end, entry] = header.addresses;
    let start = header_address.checked_sub(load).and_then(|before| header.offset.checked_sub(before as usize));
    let rest = start.and_then(|start| file.get(start..)).unwrap_or_default();
    // No load_end_addr: the whole file. No bss_end_addr: no bss.
    let length = if load_end == 0 { rest.len() } else { load_end.saturating_sub(load) as usize };
    let content = rest.get(..length).filter(|c| !c.is_empty()).ok_or_else(|| {
        image.not_a_kernel("the addresses in its multiboot header do not fit the file: get the whole file")
    })?;
    let (load, content_end) = (u64::from(load), u64::from(load) + length as u64);
    let end = content_end.max(bss_end.into());
    target.check_kernel(image, load, end - load)?;
    target.write(load, content)?;
    target.zero(content_end, end - content_end)?;
    Ok((entry.into(), end))
}

fn load_elf(image: &Image, file: &[u8], target: &Target) -> Result<(u64, u64), MachineError> {
    let elf = Elf::parse(file).map_err(|damage| {
        image.not_a_kernel(format!("it has a multiboot header without addresses, but is no sound ELF file ({damage})"))
    })?;
    if elf.entry > u32::MAX.into() {
        return Err(image.not_a_kernel("its entry point is above 4 GiB, multiboot enters in 32-bit mode: relink it"));
    }
    let end = elf.load(image, target)?;
    Ok((elf.entry, end))
}

fn write_information(boot: &BootConfig, kernel_end: u64, target: &Target) -> Result<(), MachineError> {
    let name = target.write_cmdline(&boot.cmdline, usize::MAX)?;
    let strings = write_string(target, name, "Purlin")?;
    write_modules(boot, kernel_end, strings, target)?;
    let map_length = write_memory_map(target)?;

    target.zero(handover::INFO, field::END)?;
    let flags = gives::MEMORY | gives::CMDLINE | gives::MODULES | gives::MEMORY_MAP | gives::LOADER_NAME;
    let upper = layout::low_end(target.memory) - layout::HIGH_RAM;
    let fields = [
        (field::FLAGS, flags.into()),
        (field::MEM_LOWER, layout::EBDA / 1024),
        (field::MEM_UPPER, upper / 1024),
        (field::CMDLINE, handover::CMDLINE),
        (field::MODS_COUNT, boot.initrds.len() as u64),
        (field::MODS_ADDR, MODULES),
        (field::MMAP_LENGTH, map_length),
        (field::MMAP_ADDR, MEMORY_MAP),
        (field::LOADER_NAME, name),
    ];
    for (offset, value) in fields {
        target.ram.write_obj(value as u32, GuestAddress(handover::INFO + offset))?;
    }
    Ok(())
}

/// The memory map: each entry starts with the length of what follows it. Returns its length.
fn write_memory_map(target: &Target) -> Result<u64, MachineError> {
    let mut address = MEMORY_MAP;
    for range in layout::memory_map(target.memory) {
        target.ram.write_obj(20u32, GuestAddress(address))?;
        target.ram.write_obj(range.start, GuestAddress(address + 4))?;
        target.ram.write_obj(range.length, GuestAddress(address + 12))?;
        target.ram.write_obj(range.kind as u32, GuestAddress(address + 20))?;
        address += 24;
    }
    Ok(address - MEMORY_MAP)
}

/// Each initrd as a module of its own at the next page after what is there; its string is the file's path.
fn write_modules(boot: &BootConfig, kernel_end: u64, strings: u64, target: &Target) -> Result<(), MachineError> {
    if boot.initrds.len() > MOST_MODULES {
        return Err(MachineError::TooManyModules { count: boot.initrds.len(), most: MOST_MODULES });
    }
    let (mut address, mut string) = (kernel_end.max(layout::HIGH_RAM).next_multiple_of(PAGE), strings);
    check_room(&boot.initrds, address, target)?;
    for (index, image) in boot.initrds.iter().enumerate() {
        image.load(target.ram, address)?;
        let end = address + image.length();
        let entry = [address, end, string, 0].map(|v| v as u32);
        for (i, word) in entry.into_iter().enumerate() {
            let place = MODULES + MODULE_LENGTH * index as u64 + 4 * i as u64;
            target.ram.write_obj(word, GuestAddress(place))?;
        }
        string = write_string(target, string, &image.path().to_string_lossy())?;
        address = end.next_multiple_of(PAGE);
    }
    Ok(())
}

fn check_room(modules: &[Arc<Image>], start: u64, target: &Target) -> Result<(), MachineError> {
    let room = layout::low_end(target.memory).saturating_sub(start);
    let pages = |m: &Arc<Image>| m.length().div_ceil(PAGE).saturating_mul(PAGE);
    let need = modules.iter().fold(0u64, |sum, m| sum.saturating_add(pages(m)));
    if need > room { Err(MachineError::InitrdTooLarge { need, room }) } else { Ok(()) }
}

/// Writes a string with its final NUL into the command line's area, cut to what fits. Returns the address after it.
fn write_string(target: &Target, address: u64, text: &str) -> Result<u64, MachineError> {
    let address = address.min(handover::CMDLINE_END - 1);
    let room = (handover::CMDLINE_END - 1 - address) as usize;
    let text = &text.as_bytes()[..text.len().min(room)];
    target.write(address, text)?;
    target.zero(address + text.len() as u64, 1)?;
    Ok(address + text.len() as u64 + 1)
}
