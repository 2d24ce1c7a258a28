//! Linux's bzImage, by its boot protocol (Linux, Documentation/arch/x86/boot.rst): the 64-bit entry where the kernel
//! has one, else the 32-bit entry.

use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::{
    entry::{Entry, RSI},
    image::Image,
    placement::Target,
};
use crate::{
    config::BootConfig,
    error::{MachineError, size},
    layout::{self, handover},
};

/// Where the setup header starts, in the file as in `boot_params`.
const HEADER: usize = 0x1f1;
/// `HdrS`.
const MAGIC: u32 = 0x5372_6448;
/// A boot loader without a number of its own.
const UNKNOWN_LOADER: u8 = 0xff;
/// `loadflags`: the kernel is loaded at 1 MiB, not at 64 KiB.
const LOADED_HIGH: u8 = 1;
/// `xloadflags`: there is a 64-bit entry point, 0x200 after the 32-bit one.
const KERNEL_64: u16 = 1;
/// `xloadflags`: kernel, boot parameters, command line and initrd may be above 4 GiB.
const CAN_BE_LOADED_ABOVE_4G: u16 = 1 << 1;
/// `initrd_addr_max` before protocol 2.03.
const OLD_INITRD_MAX: u32 = 0x37ff_ffff;
/// `cmdline_size` before protocol 2.06.
const OLD_CMDLINE_SIZE: u32 = 255;

/// Whether `file` is a bzImage (or an older image that starts alike).
pub(super) fn recognise(file: &[u8]) -> bool {
    file.get(0x202..0x206) == Some(&MAGIC.to_le_bytes()) && file.get(0x1fe..0x200) == Some(&[0x55, 0xaa])
}

/// Loads it.
pub(super) fn load(boot: &BootConfig, file: &[u8], target: &Target) -> Result<Entry, MachineError> {
    let mut header = read_header(&boot.kernel, file)?;
    let payload = payload(&boot.kernel, file, &header)?;
    let start = u64::from(header.code32_start);
    let kernel_end = place(&boot.kernel, &header, start, payload.len() as u64, target)?;
    target.write(start, payload)?;

    let (initrd, initrd_length) = target.load_initrds(&boot.initrds, kernel_end, initrd_limit(&header))?;
    target.write_cmdline(&boot.cmdline, header.cmdline_size as usize)?;
    header.type_of_loader = UNKNOWN_LOADER;
    header.cmd_line_ptr = handover::CMDLINE as u32;
    header.ramdisk_image = initrd as u32;
    header.ramdisk_size = initrd_length as u32;
    target.ram.write_obj(zero_page(header, target.memory), GuestAddress(handover::INFO))?;

    if header.xloadflags & KERNEL_64 != 0 {
        Entry::long(target.ram, start + 0x200, &[(RSI, handover::INFO)])
    } else {
        Entry::protected(target.ram, start, &[(RSI, handover::INFO)])
    }
}

/// The header with today's meaning of every field, whatever the protocol's version.
fn read_header(image: &Image, file: &[u8]) -> Result<setup_header, MachineError> {
    // The header ends where the jump at 0x200 leads (its second byte is the distance from 0x202).
    let end = 0x202 + usize::from(file[0x201]);
    let mut header = setup_header::default();
    let bytes = header.as_mut_slice();
    let length = bytes.len().min(end - HEADER);
    let source = file.get(HEADER..HEADER + length).ok_or_else(|| truncated(image))?;
    bytes[..length].copy_from_slice(source);

    if header.version < 0x200 || header.loadflags & LOADED_HIGH == 0 {
        return Err(image.not_a_kernel("it is a Linux zImage of the 1990s: give a bzImage"));
    }
    if header.version < 0x203 {
        header.initrd_addr_max = OLD_INITRD_MAX;
    }
    if header.version < 0x205 {
        header.relocatable_kernel = 0;
    }
    if header.version < 0x206 {
        header.cmdline_size = OLD_CMDLINE_SIZE;
    }
    if header.version < 0x20a {
        (header.pref_address, header.init_size) = (0, 0);
    }
    if header.version < 0x20c {
        header.xloadflags = 0;
    }
    Ok(header)
}

/// The part of the file that runs in protected mode.
fn payload<'a>(image: &Image, file: &'a [u8], header: &setup_header) -> Result<&'a [u8], MachineError> {
    let setup_sectors = if header.setup_sects == 0 { 4 } else { usize::from(header.setup_sects) };
    let payload = file.get((setup_sectors + 1) * 512..).filter(|p| !p.is_empty()).ok_or_else(|| truncated(image))?;
    // `syssize` counts paragraphs (from protocol 2.04 on in 32 bits). A signature may follow.
    let declared = header.syssize as usize * 16;
    if header.version >= 0x204 && payload.len() < declared.saturating_sub(15) {
        return Err(truncated(image));
    }
    Ok(payload)
}

/// Checks that the kernel fits, as loaded and as it unpacks itself. Returns the end of all that it uses.
fn place(image: &Image, header: &setup_header, start: u64, length: u64, target: &Target) -> Result<u64, MachineError> {
    target.check_kernel(image, start, length)?;
    // A relocatable kernel stays where it is loaded, but not below the preferred address (startup_64).
    let alignment = u64::from(header.kernel_alignment).max(1);
    let unpacked = match header.relocatable_kernel {
        0 => header.pref_address,
        _ => start.next_multiple_of(alignment).max(header.pref_address),
    };
    let end = unpacked.saturating_add(header.init_size.into()).max(start + length);
    let memory_end = layout::low_end(target.memory);
    if end > memory_end {
        return Err(image.too_large(format!(
            "it unpacks itself up to {}, memory ends at {}: give the machine more memory",
            size(end),
            size(memory_end)
        )));
    }
    Ok(end)
}

/// The highest address that the initrd's last byte may have.
fn initrd_limit(header: &setup_header) -> u64 {
    if header.xloadflags & CAN_BE_LOADED_ABOVE_4G != 0 { u32::MAX.into() } else { header.initrd_addr_max.into() }
}

fn zero_page(header: setup_header, memory: u64) -> boot_params {
    let mut params = boot_params { hdr: header, acpi_rsdp_addr: layout::ACPI, ..Default::default() };
    let map = layout::memory_map(memory);
    for (entry, range) in params.e820_table.iter_mut().zip(&map) {
        *entry = boot_e820_entry { addr: range.start, size: range.length, r#type: range.kind as u32 };
    }
    params.e820_entries = map.len() as u8;
    params
}

fn truncated(image: &Image) -> MachineError {
    image.not_a_kernel("the bzImage is truncated: get the whole file")
}
