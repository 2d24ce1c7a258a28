//! Says what a file is that cannot be booted.

use object::elf::{EM_386, EM_AARCH64, EM_ARM, EM_PPC64, EM_RISCV, EM_S390, EM_X86_64};

const ADVICE: &str = "give a bzImage, an ELF kernel with a PVH note, or a multiboot kernel";

/// One line: what the file is, and what would do instead.
pub(super) fn refusal(file: &[u8]) -> String {
    match file {
        [] => format!("the file is empty: {ADVICE}"),
        [0x7f, b'E', b'L', b'F', ..] => elf(file),
        [0x1f, 0x8b, ..] => "it is compressed with gzip: unpack it, or give the bzImage it was made from".into(),
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => "it is compressed with xz: unpack it first".into(),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "it is compressed with zstd: unpack it first".into(),
        [b'#', b'!', ..] => format!("it is a script: {ADVICE}"),
        _ if arm64_image(file) => format!("it is a Linux kernel for AArch64, the guest is x86-64: {ADVICE}"),
        [b'M', b'Z', ..] => format!("it is a PE file (an EFI or Windows program): {ADVICE}"),
        _ if text(file) => format!("it is a text file: {ADVICE}"),
        _ => format!("it is not a kernel of a known format (it may be truncated): {ADVICE}"),
    }
}

fn elf(file: &[u8]) -> String {
    let Some(machine) = file.get(18..20) else {
        return "it is an ELF file cut off in its header: get the whole file".into();
    };
    if file[5] != object::elf::ELFDATA2LSB {
        return format!("it is a big-endian ELF file, the guest is x86-64: {ADVICE}");
    }
    let foreign = match u16::from_le_bytes([machine[0], machine[1]]) {
        EM_386 | EM_X86_64 => {
            return match super::elf::Elf::parse(file) {
                Ok(_) => "it is an x86 ELF file with neither a PVH note nor a multiboot header: give the bzImage, or \
                          build the kernel with CONFIG_PVH=y"
                    .into(),
                Err(damage) => format!("it is a damaged ELF file ({damage}): get the whole file"),
            };
        }
        EM_ARM => "ARM".into(),
        EM_AARCH64 => "AArch64".into(),
        EM_RISCV => "RISC-V".into(),
        EM_PPC64 => "PowerPC".into(),
        EM_S390 => "S/390".into(),
        other => format!("another processor (ELF machine {other})"),
    };
    format!("it is an ELF file for {foreign}, the guest is x86-64: {ADVICE}")
}

/// The magic number of an arm64 `Image` (Linux, Documentation/arch/arm64/booting.rst).
fn arm64_image(file: &[u8]) -> bool {
    file.get(56..60) == Some(b"ARM\x64")
}

fn text(file: &[u8]) -> bool {
    let head = &file[..file.len().min(512)];
    head.iter().all(|&c| c >= 0x20 && c != 0x7f || matches!(c, b'\n' | b'\r' | b'\t' | 0x0c))
}

#[cfg(test)]
mod tests {
    use super::refusal;

    #[test]
    fn every_foreign_file_is_called_by_its_name() {
        let mut arm = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x28\0".to_vec();
        arm.resize(64, 0);
        let cases: &[(&[u8], &str)] = &[
            (b"", "empty"),
            (b"hello, world\n", "text file"),
            (b"#!/bin/sh\n", "script"),
            (&arm, "ELF file for ARM"),
            (b"\x7fELF\x02", "cut off"),
            (b"\x1f\x8b\x08\0", "gzip"),
            (b"MZ\x90\0\x03", "PE file"),
            (&[0; 700], "may be truncated"),
        ];
        for (file, expected) in cases {
            assert!(refusal(file).contains(expected), "{}", refusal(file));
        }
    }
}
