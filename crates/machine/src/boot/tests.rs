//! Each boot method, from the bytes of a kernel file to what the kernel finds.

use std::sync::Arc;

use purlin_arch::x86_64::{
    cpuid::CpuModel,
    state::{Segment, VcpuState},
};
use purlin_engine::memory::{self, GuestRam};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::{
    boot::image::Image,
    config::{HostSide, MachineConfig, MachineType, OptionalDevice, SavedConfig},
    layout::{self, MIB},
    testing::kernels::{self, BzImage, CODE, elf, image, multiboot_flat, multiboot_header},
};

/// A machine's configuration with a kernel that halts.
pub(crate) fn config(memory: u64, cpus: u32) -> MachineConfig {
    let boot = boot_config(&BzImage::default().build(), &[], "");
    let (machine_type, cpu_model) = (MachineType::Pc1, CpuModel::V2);
    MachineConfig {
        machine_type,
        memory,
        cpus,
        cpu_model,
        serial: true,
        devices: Default::default(),
        disks: Vec::new(),
        networks: Vec::new(),
        console: None,
        on_io_error: Default::default(),
        vsock: None,
        balloon: None,
        boot,
    }
}

fn boot_config(kernel: &[u8], initrds: &[&[u8]], cmdline: &str) -> BootConfig {
    let open = |bytes: &&[u8]| Arc::new(Image::from_bytes("/boot/module", "initrd", bytes).unwrap());
    BootConfig { kernel: image(kernel), initrds: initrds.iter().map(open).collect(), cmdline: cmdline.into() }
}

struct Booted {
    ram: GuestRam,
    state: VcpuState,
}

fn boot(kernel: &[u8], initrds: &[&[u8]], cmdline: &str, memory: u64) -> Result<Booted, String> {
    let ram = memory::create(&layout::slots(memory)).unwrap();
    // What ran here before a reset must not shine through.
    ram.write_slice(&[0xee; 0x9_fc00], GuestAddress(0)).unwrap();
    ram.write_slice(&[0xee; 0x1_0000], GuestAddress(CODE.into())).unwrap();
    let entry = load(&boot_config(kernel, initrds, cmdline), &ram, memory).map_err(|e| e.to_string())?;
    let mut state = VcpuState::default();
    state.lapic.regs = vec![0; 1024];
    entry.apply(&mut state);
    Ok(Booted { ram, state })
}

impl Booted {
    fn bytes(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.ram.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    fn word(&self, address: u64) -> u32 {
        self.ram.read_obj(GuestAddress(address)).unwrap()
    }

    fn long(&self, address: u64) -> u64 {
        self.ram.read_obj(GuestAddress(address)).unwrap()
    }

    fn string(&self, address: u64) -> String {
        let bytes = self.bytes(address, 256);
        String::from_utf8_lossy(bytes.split(|&b| b == 0).next().unwrap()).into_owned()
    }

    fn gpr(&self, index: usize) -> u64 {
        self.state.regs.gpr[index]
    }
}

fn error(result: Result<Booted, String>) -> String {
    match result {
        Ok(_) => panic!("it booted"),
        Err(text) => {
            assert!(!text.contains('\n'), "{text}");
            text
        }
    }
}

const FLAT_CODE: Segment = Segment { selector: 0x10, base: 0, limit: 0xffff_ffff, access: 0xc09b };
const FLAT_DATA: Segment = Segment { selector: 0x18, base: 0, limit: 0xffff_ffff, access: 0xc093 };

#[test]
fn bzimage_enters_a_64_bit_kernel_in_long_mode() {
    let kernel = BzImage { code32: b"32", code64: Some(b"64"), ..Default::default() }.build();
    let booted = boot(&kernel, &[], "console=ttyS0", 512 * MIB).unwrap();
    let system = &booted.state.system;
    assert_eq!(booted.state.regs.rip, 0x10_0200);
    assert_eq!(booted.bytes(0x10_0200, 2), b"64");
    assert_eq!((system.cr0, system.cr4, system.efer), (0x8000_0011, 0x20, 0x500));
    assert_eq!(system.segments[1].access, 0xa09b);
    // The first and the last 2 MiB of the first 4 GiB are mapped to themselves.
    let pdpt = booted.long(system.cr3) & !0xfff;
    assert_eq!(booted.long(booted.long(pdpt) & !0xfff), 0x83);
    assert_eq!(booted.long((booted.long(pdpt + 24) & !0xfff) + 511 * 8), 0xffe0_0083);
    assert_eq!((booted.long(system.cr3 + 8), booted.long(pdpt + 32)), (0, 0));
    // GDT: the selectors of the boot protocol.
    assert_eq!(booted.long(system.gdtr.base + 0x10), 0x00af_9b00_0000_ffff);
    assert_eq!(booted.long(system.gdtr.base + 0x18), 0x00cf_9300_0000_ffff);
    // RFLAGS.IF clear; the 8259 goes through LINT0.
    assert_eq!(booted.state.regs.rflags, 2);
    assert_eq!(booted.state.lapic.regs[0x350..0x354], 0x700u32.to_le_bytes());
}

#[test]
fn bzimage_without_a_64_bit_entry_is_entered_in_protected_mode() {
    let kernel = BzImage { code32: b"32", code64: None, ..Default::default() }.build();
    let booted = boot(&kernel, &[], "", 512 * MIB).unwrap();
    let system = &booted.state.system;
    assert_eq!(booted.state.regs.rip, 0x10_0000);
    assert_eq!((system.cr0, system.cr4, system.efer), (0x11, 0, 0));
    assert_eq!((system.segments[1], system.segments[3], system.segments[2]), (FLAT_CODE, FLAT_DATA, FLAT_DATA));
    assert_eq!(booted.gpr(6), 0x7000);
}

#[test]
fn bzimage_is_told_everything_in_boot_params() {
    let kernel = BzImage::default().build();
    let booted = boot(&kernel, &[b"first", b"second!!"], "root=/dev/ram quiet", 5 << 30).unwrap();
    let zero_page = booted.gpr(6);
    assert_eq!(booted.bytes(zero_page + 0x202, 4), b"HdrS");
    assert_eq!(booted.bytes(zero_page + 0x210, 1), [0xff]);
    assert_eq!(booted.string(booted.word(zero_page + 0x228).into()), "root=/dev/ram quiet");
    assert_eq!(booted.long(zero_page + 0x70), 0xe_0000);
    // Two archives in a row, each at a multiple of four, as high as initrd_addr_max lets them.
    let (start, length) = (booted.word(zero_page + 0x218), booted.word(zero_page + 0x21c));
    assert_eq!((start, length), (0x7fff_f000, 16));
    assert_eq!(booted.bytes(start.into(), 16), b"first\0\0\0second!!");
    // E820.
    let map: Vec<(u64, u64, u32)> = (0..u64::from(booted.bytes(zero_page + 0x1e8, 1)[0]))
        .map(|i| zero_page + 0x2d0 + 20 * i)
        .map(|a| (booted.long(a), booted.long(a + 8), booted.word(a + 16)))
        .collect();
    let expected = [
        (0, 0x9_fc00, 1),
        (0x9_fc00, 0x400, 2),
        (0xe_0000, 0x2_0000, 2),
        (0x10_0000, 0xbff0_0000, 1),
        (0xe000_0000, 0x1000_0000, 2),
        (0x1_0000_0000, 0x8000_0000, 1),
    ];
    assert_eq!(map, expected);
}

#[test]
fn initrd_is_placed_below_the_end_of_memory_and_its_limit() {
    let initrd = vec![7; 3 << 20];
    let place = |initrd_addr_max, memory| {
        let kernel = BzImage { initrd_addr_max, ..Default::default() }.build();
        let booted = boot(&kernel, &[&initrd], "", memory).unwrap();
        u64::from(booted.word(booted.gpr(6) + 0x218))
    };
    assert_eq!(place(0x7fff_ffff, 512 * MIB), 509 * MIB);
    assert_eq!(place(0x37ff_ffff, 1 << 30), 0x3800_0000 - 3 * MIB);
}

#[test]
fn pvh_kernel_gets_hvm_start_info() {
    for (class, machine) in [(64, 62), (32, 3)] {
        let booted = boot(&elf(class, machine, b"code", true), &[b"module"], "a b", 64 * MIB).unwrap();
        assert_eq!(booted.state.regs.rip, u64::from(CODE));
        assert_eq!(booted.bytes(CODE.into(), 8), b"code\0\0\0\0");
        assert_eq!((booted.state.system.cr0, booted.state.system.segments[1]), (0x11, FLAT_CODE));
        assert_eq!((booted.state.system.tr.access, booted.state.system.tr.limit), (0x8b, 0x67));
        let info = booted.gpr(3);
        assert_eq!((booted.word(info), booted.word(info + 4), booted.word(info + 12)), (0x336e_c578, 1, 1));
        let module = booted.long(info + 16);
        assert_eq!((booted.long(module), booted.long(module + 8)), (64 * MIB - 4096, 8));
        assert_eq!(booted.bytes(booted.long(module), 6), b"module");
        assert_eq!(booted.string(booted.long(info + 24)), "a b");
        assert_eq!(booted.long(info + 32), 0xe_0000);
        let (map, entries) = (booted.long(info + 40), booted.word(info + 48));
        assert_eq!(entries, 5);
        assert_eq!((booted.long(map + 72), booted.long(map + 80), booted.word(map + 88)), (MIB, 63 * MIB, 1));
    }
}

#[test]
fn multiboot_kernel_gets_its_information() {
    let booted = boot(&multiboot_flat(b"code"), &[b"one", &[2; 5000]], "x=y", 64 * MIB).unwrap();
    assert_eq!(booted.state.regs.rip, u64::from(CODE) + 32);
    assert_eq!(booted.bytes(CODE as u64 + 32, 8), b"code\0\0\0\0");
    assert_eq!((booted.gpr(0), booted.state.system.cr0), (0x2bad_b002, 0x11));
    let info = booted.gpr(3);
    assert_eq!(booted.word(info), 0b10_0100_1101);
    assert_eq!((booted.word(info + 4), booted.word(info + 8)), (639, 63 * 1024));
    assert_eq!(booted.string(booted.word(info + 16).into()), "x=y");
    assert_eq!(booted.string(booted.word(info + 64).into()), "Purlin");
    // Modules lie behind the kernel (its bss ends at 0x102000), each at a page.
    assert_eq!(booted.word(info + 20), 2);
    let modules = u64::from(booted.word(info + 24));
    assert_eq!((booted.word(modules), booted.word(modules + 4)), (0x10_2000, 0x10_2003));
    assert_eq!((booted.word(modules + 16), booted.word(modules + 20)), (0x10_3000, 0x10_3000 + 5000));
    assert_eq!(booted.bytes(0x10_3000, 3), [2, 2, 2]);
    assert_eq!(booted.string(booted.word(modules + 8).into()), "/boot/module");
    // The memory map: each entry is 20 bytes long behind its length.
    let (length, map) = (booted.word(info + 44), u64::from(booted.word(info + 48)));
    assert_eq!((length, booted.word(map), booted.long(map + 12), booted.word(map + 20)), (120, 20, 0x9_fc00, 1));
}

#[test]
fn multiboot_elf_is_loaded_by_its_segments() {
    let mut code = multiboot_header(0, [0; 5]);
    code.extend(b"code");
    for (class, machine) in [(32, 3), (64, 62)] {
        let booted = boot(&elf(class, machine, &code, false), &[], "", 64 * MIB).unwrap();
        assert_eq!((booted.state.regs.rip, booted.gpr(0)), (u64::from(CODE), 0x2bad_b002));
        assert_eq!(booted.bytes(CODE as u64 + 32, 4), b"code");
    }
}

#[test]
fn multiboot_refuses_what_it_does_not_know() {
    let kernel = multiboot_header(1 << 16 | 1 << 5, [CODE, CODE, 0, 0, CODE]);
    assert!(error(boot(&kernel, &[], "", 64 * MIB)).contains("flags 0x20"));
    let outside = multiboot_header(1 << 16, [CODE, CODE, CODE + 0x1000, 0, CODE]);
    assert!(error(boot(&outside, &[], "", 64 * MIB)).contains("do not fit the file"));
    let high = multiboot_header(1 << 16, [0xf000_0000, 0xf000_0000, 0, 0, CODE]);
    assert!(error(boot(&high, &[], "", 64 * MIB)).contains("memory ends at 0x4000000"));
    let low = multiboot_header(1 << 16, [0x7000, 0x7000, 0, 0, CODE]);
    assert!(error(boot(&low, &[], "", 64 * MIB)).contains("hands over"));
}

#[test]
fn foreign_and_truncated_kernels_are_refused_by_name() {
    let good = BzImage::default().build();
    let cases: [(&[u8], &str); 6] = [
        (b"", "is empty"),
        (b"just a text\n", "text file"),
        (&elf(32, 40, b"", false), "ELF file for ARM"),
        (&elf(64, 62, b"code", false), "neither a PVH note nor a multiboot header"),
        (&elf(64, 62, b"code", true)[..100], "damaged ELF file"),
        (&good[..good.len() - 17], "truncated"),
    ];
    for (kernel, expected) in cases {
        let text = error(boot(kernel, &[], "", 64 * MIB));
        assert!(text.starts_with("cannot boot 'kernel': ") && text.contains(expected), "{text}");
    }
}

#[test]
fn every_truncation_of_a_kernel_is_an_error_or_boots_but_never_panics() {
    for kernel in [BzImage::default().build(), elf(64, 62, b"code", true), multiboot_flat(b"code")] {
        for length in 0..kernel.len() {
            let _ = boot(&kernel[..length], &[], "", 2 * MIB);
        }
    }
}

#[test]
fn what_does_not_fit_is_refused_with_the_numbers() {
    let initrd = vec![0; 3 << 20];
    let kernel = BzImage::default().build();
    let text = error(boot(&kernel, &[&initrd], "", 2 * MIB));
    assert_eq!(
        text,
        "the initrd (3 MiB) does not fit beside the kernel, there is room for 960 KiB: give the machine more memory"
    );
    let text = error(boot(&multiboot_flat(b"code"), &[&initrd], "", 2 * MIB));
    assert!(text.contains("there is room for 1016 KiB"), "{text}");
    let large = BzImage { init_size: 64 << 20, ..Default::default() }.build();
    let text = error(boot(&large, &[], "", 16 * MIB));
    assert!(text.contains("memory ends at 16 MiB"), "{text}");
    let text = error(boot(&kernel, &[], &"x".repeat(2048), 16 * MIB));
    assert!(text.contains("takes 2047"), "{text}");
    assert!(error(boot(&kernel, &[], "a\0b", 16 * MIB)).contains("NUL"));
}

#[test]
fn sizes_and_counts_that_no_machine_can_have_are_refused() {
    let refuse = |memory, cpus| config(memory, cpus).validate(8 << 30).unwrap_err().to_string();
    assert!(refuse(0, 1).starts_with("0 bytes of memory is too little"));
    assert!(refuse(MIB, 1).starts_with("1 MiB of memory is too little"));
    assert!(refuse(9 << 30, 1).contains("more than this host has in RAM and swap (8 GiB)"));
    assert!(refuse(!0xfff, 1).contains("more than this host"));
    assert!(refuse((64 << 20) + 1, 1).contains("not a multiple of 4096"));
    assert!(refuse(64 << 20, 0).contains("cannot have 0 processors: give it 1 to 255"));
    assert!(refuse(64 << 20, 10_000).contains("cannot have 10000 processors"));
    assert!(config(8 << 30, 255).validate(8 << 30).is_ok());
}

#[test]
fn a_saved_configuration_is_the_same_again_or_refused() {
    let mut config = config(512 << 20, 3);
    config.devices.insert(OptionalDevice::Debugcon);
    let saved = config.saved();
    let again = saved.config(CpuModel::V3, HostSide::default(), config.boot.clone()).unwrap();
    assert_eq!(again.saved(), saved);
    let refuse = |saved: SavedConfig| {
        saved.config(CpuModel::V3, HostSide::default(), boot_config(b"", &[], "")).unwrap_err().to_string()
    };
    let foreign = SavedConfig { machine_type: "pc-9".into(), ..saved.clone() };
    assert!(refuse(foreign).contains("'pc-9', which this version does not know"));
    let disks = SavedConfig { disks: 2, ..saved.clone() };
    assert!(refuse(disks).contains("had 2 disks and is given 0"));
    let console = SavedConfig { console: true, ..saved.clone() };
    assert!(refuse(console).contains("had a console on virtio-console: give it one"));
    let devices = SavedConfig { devices: vec![0, 77], ..saved };
    assert!(refuse(devices).contains("there is no device 77"));
}

#[test]
fn a_reset_loads_the_same_file_after_its_path_has_changed_hands() {
    let path = std::env::temp_dir().join(format!("purlin-kernel-{}", std::process::id()));
    std::fs::write(&path, multiboot_flat(b"old")).unwrap();
    let image = Image::open(&path, "kernel").unwrap();
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, b"new").unwrap();
    assert_eq!(image.read().unwrap(), multiboot_flat(b"old"));
    std::fs::remove_file(&path).unwrap();
    let missing = Image::open(&path, "kernel").unwrap_err().to_string();
    assert!(missing.starts_with("cannot read the kernel '") && missing.contains("No such file"), "{missing}");
    assert!(kernels::image(b"abc").length() == 3);
}
