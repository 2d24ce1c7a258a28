//! Kernels made by hand: the least of each format around a few bytes of code.

use crate::boot::image::Image;
use std::sync::Arc;

/// Where the kernels here load their code.
pub const CODE: u32 = 0x10_0000;

/// `bytes` as a kernel file.
pub fn image(bytes: &[u8]) -> Arc<Image> {
    Arc::new(Image::from_bytes("kernel", "kernel", bytes).expect("a memfd can be made"))
}

/// What differs between bzImages.
pub struct BzImage<'a> {
    /// Code at the 32-bit entry point.
    pub code32: &'a [u8],
    /// Code at the 64-bit entry point; `None` for a kernel that has none.
    pub code64: Option<&'a [u8]>,
    /// Highest address that the initrd may have.
    pub initrd_addr_max: u32,
    /// Memory that it needs from 1 MiB up, to unpack itself.
    pub init_size: u32,
}

impl Default for BzImage<'_> {
    fn default() -> Self {
        Self { code32: b"\xf4", code64: Some(b"\xf4"), initrd_addr_max: 0x7fff_ffff, init_size: 0x1_0000 }
    }
}

impl BzImage<'_> {
    /// The file: boot protocol 2.15, one sector of setup.
    pub fn build(&self) -> Vec<u8> {
        let mut payload = self.code32.to_vec();
        payload.resize(0x200, 0);
        payload.extend(self.code64.unwrap_or_default());
        payload.resize(payload.len().next_multiple_of(16), 0);

        let mut file = vec![0; 1024];
        let mut put = |offset: usize, bytes: &[u8]| file[offset..offset + bytes.len()].copy_from_slice(bytes);
        put(0x1f1, &[1]);
        put(0x1f4, &(payload.len() as u32 / 16).to_le_bytes());
        put(0x1fe, &[0x55, 0xaa, 0xeb, 0x66]);
        put(0x202, b"HdrS");
        put(0x206, &0x20fu16.to_le_bytes());
        put(0x211, &[1]);
        put(0x214, &CODE.to_le_bytes());
        put(0x22c, &self.initrd_addr_max.to_le_bytes());
        put(0x230, &0x20_0000u32.to_le_bytes());
        put(0x236, &u16::from(self.code64.is_some()).to_le_bytes());
        put(0x238, &2047u32.to_le_bytes());
        put(0x258, &u64::from(CODE).to_le_bytes());
        put(0x260, &self.init_size.to_le_bytes());
        file.extend(payload);
        file
    }
}

/// An ELF file of one segment: `code` at [`CODE`], where it is entered, then 4 KiB of zeros. With a PVH note if `pvh`.
/// `class` is 32 or 64.
pub fn elf(class: u32, machine: u16, code: &[u8], pvh: bool) -> Vec<u8> {
    let (header, program) = if class == 64 { (64usize, 56usize) } else { (52, 32) };
    let note_offset = header + 2 * program;
    let mut note = Vec::new();
    for word in [4u32, 4, 18] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend(CODE.to_le_bytes());
    let code_offset = note_offset + note.len();

    let mut file = b"\x7fELF".to_vec();
    file.extend([if class == 64 { 2 } else { 1 }, 1, 1]);
    file.resize(16, 0);
    let word = |file: &mut Vec<u8>, value: u64| match class {
        64 => file.extend(value.to_le_bytes()),
        _ => file.extend((value as u32).to_le_bytes()),
    };
    file.extend(2u16.to_le_bytes());
    file.extend(machine.to_le_bytes());
    file.extend(1u32.to_le_bytes());
    for value in [CODE.into(), header as u64, 0] {
        word(&mut file, value);
    }
    file.extend(0u32.to_le_bytes());
    for half in [header, program, if pvh { 2 } else { 1 }, 0, 0, 0] {
        file.extend((half as u16).to_le_bytes());
    }
    let mut segment = |kind: u32, offset: usize, address: u64, filesz: usize, memsz: usize| {
        file.extend(kind.to_le_bytes());
        if class == 64 {
            file.extend(7u32.to_le_bytes());
        }
        for value in [offset as u64, address, address, filesz as u64, memsz as u64] {
            word(&mut file, value);
        }
        if class == 32 {
            file.extend(7u32.to_le_bytes());
        }
        word(&mut file, 1);
    };
    segment(1, code_offset, CODE.into(), code.len(), code.len() + 4096);
    segment(if pvh { 4 } else { 0 }, note_offset, 0, note.len(), note.len());
    file.extend(note);
    file.extend(code);
    file
}

/// A multiboot header with these flags; `addresses` (header, load, load end, bss end, entry) if bit 16 is set.
pub fn multiboot_header(flags: u32, addresses: [u32; 5]) -> Vec<u8> {
    let magic = 0x1bad_b002u32;
    let checksum = 0u32.wrapping_sub(magic).wrapping_sub(flags);
    [[magic, flags, checksum].as_slice(), &addresses].concat().iter().flat_map(|w| w.to_le_bytes()).collect()
}

/// A flat multiboot file: header, then code, all at [`CODE`].
pub fn multiboot_flat(code: &[u8]) -> Vec<u8> {
    let mut file = multiboot_header(1 << 16 | 3, [CODE, CODE, 0, CODE + 0x2000, CODE + 32]);
    file.extend(code);
    file
}
