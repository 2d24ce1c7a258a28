//! The host's own instructions are the oracle: states are loaded into its registers and stored again by the
//! instruction under test, and the images compared byte by byte.
#![allow(unsafe_code)]

use std::arch::asm;

use iced_x86::{Decoder, DecoderOptions};
use purlin_arch::x86_64::regs::{
    cr0, cr4,
    gpr::{RAX, RCX, RDI, RDX},
    rflags,
    seg::DS,
};

use super::{layout::COMPONENTS, *};
use crate::{
    cpu::Cpu,
    exception::{Exception, pf, vector},
    testing::{Mode, PAGES, cpus, peek, poke, step},
};

/// Where images are in the guest's memory.
const AT: u64 = 0x30000;
const XSAVE: &[u8] = &[0x48, 0x0f, 0xae, 0x20];
const XSAVEOPT: &[u8] = &[0x48, 0x0f, 0xae, 0x30];
const XSAVEC: &[u8] = &[0x48, 0x0f, 0xc7, 0x20];
const XRSTOR: &[u8] = &[0x48, 0x0f, 0xae, 0x28];
const FXSAVE64: &[u8] = &[0x48, 0x0f, 0xae, 0x00];
const FXRSTOR64: &[u8] = &[0x48, 0x0f, 0xae, 0x08];

#[repr(C, align(64))]
#[derive(Clone)]
struct Image([u8; AREA]);

impl Image {
    /// Memory before a store: a pattern that shows what is not written.
    fn untouched() -> Self {
        Self([0xcc; AREA])
    }

    fn words(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.0[at..at + 8].try_into().unwrap())
    }

    fn set(&mut self, at: usize, value: u64) {
        self.0[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }
}

/// Loads `state` into the host's registers, stores them by `$store` to `$out`, and puts the registers back.
macro_rules! on_host {
    ($state:expr, $mask:expr, $store:literal, $out:expr) => {{
        let mut saved = Image([0; AREA]);
        // SAFETY: the images are large enough and aligned; all registers are as before at the end.
        unsafe {
            asm!(
                "xsave64 [{saved}]",
                "xrstor64 [{state}]",
                "mov eax, {mask:e}",
                concat!($store, " [{out}]"),
                "mov eax, {all:e}",
                "xrstor64 [{saved}]",
                saved = in(reg) &raw mut saved.0,
                state = in(reg) &raw const $state.0,
                out = in(reg) &raw mut $out.0,
                mask = in(reg) $mask as u32,
                all = in(reg) all() as u32,
                inout("eax") all() as u32 => _,
                inout("edx") 0 => _,
            );
        }
    }};
}

/// A processor with everything enabled.
fn processor(mode: Mode) -> Box<Cpu> {
    let mut cpu = cpus(mode, 1).remove(0);
    cpu.cr4 |= cr4::OSFXSR | cr4::OSXSAVE;
    cpu.xcr0 = cpu.features.xcr0;
    cpu.gpr[RAX] = AT;
    cpu
}

/// Has RAX point at the image, which the requested components are in as well: 16-byte aligned addresses have zeros.
fn request(cpu: &mut Cpu, components: u64) {
    cpu.gpr[RAX] = components;
    cpu.gpr[RDX] = 0;
    cpu.gpr[RCX] = AT;
}

/// The instruction with its address in RCX.
fn by_rcx(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    *bytes.last_mut().unwrap() |= 1;
    bytes
}

fn put(cpu: &Cpu, image: &Image) {
    poke(cpu, AT, &image.0[..]);
}

fn get(cpu: &Cpu) -> Image {
    let mut image = Image([0; AREA]);
    for (i, piece) in image.0.chunks_mut(8).enumerate() {
        piece.copy_from_slice(&peek(cpu, AT + 8 * i as u64).to_le_bytes());
    }
    image
}

/// Images in the standard format with these components present, and something in every register.
fn state(present: u64) -> Image {
    let mut image = Image([0; AREA]);
    for (i, byte) in image.0.iter_mut().enumerate() {
        *byte = (i * 37 + i / 256 * 11) as u8;
    }
    image.0[offset::FCW..offset::FCW + 8].copy_from_slice(&[0x7f, 0x03, 0x00, 0x28, 0b1010_0110, 0, 0x23, 0x01]);
    image.set(offset::FIP, 0x0000_7fff_1234_5678);
    image.set(offset::FDP, 0x0000_7fff_8765_4321);
    image.set(offset::MXCSR, 0xffff_0000_9fc1);
    for i in 0..8 {
        // 80 bits each; the rest is not kept.
        image.0[offset::ST + 16 * i + 10..offset::ST + 16 * (i + 1)].fill(0);
    }
    image.0[offset::LEGACY_END..offset::HEADER_END].fill(0);
    image.set(offset::XSTATE_BV, present);
    image
}

fn all() -> u64 {
    Layout::host().components()
}

/// The same, perhaps with an unmasked x87 exception that waits: the pointers are saved then.
fn state_with_exception(present: u64, waiting: bool) -> Image {
    let mut image = state(present);
    if waiting {
        image.0[offset::FCW] &= !1;
        image.0[offset::FSW] |= 0x81;
        image.0[offset::FSW + 1] |= 0x80;
    }
    image
}

/// Interesting sets of components.
fn sets() -> Vec<u64> {
    [0, 1, 2, 3, 4, 7, 0x20, 0x40, 0x80, 0xe3, 0xe7].into_iter().filter(|s| s & !all() == 0).collect()
}

/// The emulated processor with the registers that `image` holds.
fn loaded(image: &Image) -> Box<Cpu> {
    let mut cpu = processor(Mode::Long(3));
    load(&mut cpu, image);
    cpu
}

fn load(cpu: &mut Cpu, image: &Image) {
    cpu.xstate = XState::default();
    put(cpu, image);
    request(cpu, u64::MAX);
    step(cpu, &by_rcx(XRSTOR)).expect("xrstor");
}

/// A processor may find that registers hold their initial values, and call the component unused: the emulation does
/// not look.
fn forgive_unused(got: &mut Image, wanted: &Image) {
    let (ours, theirs) = (got.words(offset::XSTATE_BV), wanted.words(offset::XSTATE_BV));
    for component in (1..COMPONENTS).filter(|i| ours & !theirs & 1 << i != 0) {
        let range = Layout::host().range(component).unwrap();
        assert!(got.0[range].iter().all(|b| *b == 0), "component {component} is in use");
        got.set(offset::XSTATE_BV, got.words(offset::XSTATE_BV) & !(1 << component));
    }
}

fn compare(got: &Image, wanted: &Image, what: &str) {
    for at in (0..AREA).step_by(4) {
        let piece = at..at + 4;
        assert_eq!(got.0[piece.clone()], wanted.0[piece], "{what}: at {at}");
    }
}

#[test]
fn xsave_and_its_variants_write_what_the_host_writes() {
    let mut cpu = processor(Mode::Long(3));
    for (present, requested, waiting) in
        sets().into_iter().flat_map(|p| sets().into_iter().flat_map(move |r| [(p, r, false), (p, r, true)]))
    {
        let image = state_with_exception(present, waiting);
        for (name, bytes) in [("xsave", XSAVE), ("xsaveopt", XSAVEOPT), ("xsavec", XSAVEC), ("fxsave", FXSAVE64)] {
            let what = format!("{name}, present {present:#x}, requested {requested:#x}");
            same_soon(&what, || {
                let mut wanted = Image::untouched();
                // The host's XSAVE merges with the header that it finds.
                wanted.set(offset::XSTATE_BV, 0x85);
                load(&mut cpu, &image);
                put(&cpu, &wanted);
                match name {
                    "xsave" => on_host!(image, requested, "xsave64", wanted),
                    "xsaveopt" => on_host!(image, requested, "xsaveopt64", wanted),
                    "xsavec" => on_host!(image, requested, "xsavec64", wanted),
                    _ => on_host!(image, requested, "fxsave64", wanted),
                }
                request(&mut cpu, requested);
                step(&mut cpu, &by_rcx(bytes)).unwrap();
                (get(&cpu), wanted)
            });
        }
    }
}

/// Compares what `make` makes, ours and the host's. A processor may take a component for in use that is in its initial
/// state (SDM vol. 1 13.6), and does so where it was interrupted between loading and storing it: then once more.
fn same_soon(what: &str, mut make: impl FnMut() -> (Image, Image)) {
    for _ in 0..20 {
        let (ours, host) = make();
        if ours.0 == host.0 {
            return;
        }
    }
    let (ours, host) = make();
    compare(&ours, &host, what);
}

#[test]
fn xrstor_loads_what_the_host_loads_from_both_formats() {
    let mut cpu = processor(Mode::Long(3));
    for present in sets() {
        for format in sets().into_iter().filter(|format| present & !format == 0) {
            // Made by the host.
            let mut compacted = Image([0; AREA]);
            let source = state(present);
            on_host!(source, format, "xsavec64", compacted);
            for requested in sets() {
                // Into registers that hold something else.
                let mut before = state(all());
                before.0[offset::XMM..offset::LEGACY_END].fill(0x5a);
                before.0[offset::HEADER_END..].fill(0xa5);
                load(&mut cpu, &before);
                put(&cpu, &compacted);
                request(&mut cpu, requested);
                step(&mut cpu, &by_rcx(XRSTOR)).unwrap();
                let mut got_cpu_image = Image([0; AREA]);
                put(&cpu, &got_cpu_image);
                request(&mut cpu, all());
                step(&mut cpu, &by_rcx(XSAVE)).unwrap();
                got_cpu_image.0.copy_from_slice(&get(&cpu).0);

                let mut wanted = Image([0; AREA]);
                let mut saved = Image([0; AREA]);
                // SAFETY: as in `on_host`.
                unsafe {
                    asm!(
                        "xsave64 [{saved}]",
                        "xrstor64 [{before}]",
                        "mov eax, {mask:e}",
                        "xrstor64 [{compacted}]",
                        "mov eax, {all:e}",
                        "xsave64 [{out}]",
                        "xrstor64 [{saved}]",
                        saved = in(reg) &raw mut saved.0,
                        before = in(reg) &raw const before.0,
                        compacted = in(reg) &raw const compacted.0,
                        out = in(reg) &raw mut wanted.0,
                        mask = in(reg) requested as u32,
                        all = in(reg) all() as u32,
                        inout("eax") all() as u32 => _,
                        inout("edx") 0 => _,
                    );
                }
                forgive_unused(&mut got_cpu_image, &wanted);
                // See `same_soon`.
                forgive_unused(&mut wanted, &got_cpu_image);
                compare(
                    &got_cpu_image,
                    &wanted,
                    &format!("present {present:#x}, format {format:#x}, requested {requested:#x}"),
                );
            }
        }
    }
}

#[test]
fn pointers_are_made_canonical_as_on_the_host() {
    for pointer in [1 << 47, 1 << 56, 1 << 63, 0xbeef_1234_5678_9abc, 0x0123_8000_0000_0000, u64::MAX >> 1] {
        let mut image = state_with_exception(3, true);
        image.set(offset::FIP, pointer);
        image.set(offset::FDP, !pointer);
        let mut wanted = Image([0; AREA]);
        on_host!(image, 3, "fxsave64", wanted);
        let mut cpu = loaded(&image);
        put(&cpu, &Image([0; AREA]));
        request(&mut cpu, 0);
        step(&mut cpu, &by_rcx(FXSAVE64)).unwrap();
        let got = get(&cpu);
        for at in [offset::FIP, offset::FDP] {
            assert_eq!(got.words(at), wanted.words(at), "{pointer:#x}, at {at}");
        }
    }
}

#[test]
fn xrstor_refuses_bad_headers() {
    let cases: [(&str, usize, u64); 9] = [
        ("a component that is not enabled", offset::XSTATE_BV, 1 << 9),
        ("XCOMP_BV without its format bit", offset::XSTATE_BV + 8, 1),
        ("bytes 16 to 23", offset::XSTATE_BV + 16, 1),
        ("compacted, not enabled", offset::XSTATE_BV + 8, 1 << 63 | 1 << 9),
        ("compacted, present but not in it", offset::XSTATE_BV + 8, 1 << 63 | 1),
        ("XSTATE_BV bit 63", offset::XSTATE_BV, 1 << 63),
        ("MXCSR", offset::MXCSR, 1 << 16),
        ("MXCSR bit 31", offset::MXCSR, 1 << 31),
        ("bytes 16 to 23, the upper ones", offset::XSTATE_BV + 16, 1 << 63),
    ];
    for (what, at, value) in cases {
        let mut image = state(3);
        image.set(at, value);
        let mut cpu = processor(Mode::Long(0));
        put(&cpu, &image);
        request(&mut cpu, 3);
        assert_eq!(step(&mut cpu, &by_rcx(XRSTOR)), Err(Exception::GP0), "{what}");
    }
    // The rest of a standard header is not looked at; that of a compacted one is.
    for (format, wanted) in [(0, Ok(())), (1 << 63 | 3, Err(Exception::GP0))] {
        let mut image = state(3);
        image.set(offset::XSTATE_BV + 8, format);
        image.set(offset::XSTATE_BV + 56, 1);
        let mut cpu = processor(Mode::Long(0));
        put(&cpu, &image);
        request(&mut cpu, 3);
        assert_eq!(step(&mut cpu, &by_rcx(XRSTOR)), wanted);
    }
}

/// A processor in compatibility mode, where DS is such that an area of which `before` bytes are below 4 GiB is at [`AT`].
fn at_the_end_of_addresses(before: u64) -> Box<Cpu> {
    let mut cpu = processor(Mode::Compatibility(0));
    cpu.features.amd = true;
    cpu.seg[DS].base = AT + before;
    (0..8).for_each(|i| cpu.xstate.set_vector(i, &[0x50 + i as u8; 16]));
    request(&mut cpu, 3);
    cpu.gpr[RCX] = (1 << 32) - before;
    cpu
}

#[test]
fn areas_go_round_where_addresses_end_but_not_within_a_register() {
    let plain = |instruction: &[u8]| {
        let mut cpu = at_the_end_of_addresses(0);
        cpu.gpr[RCX] = 0;
        put(&cpu, &Image([0; AREA]));
        step(&mut cpu, &by_rcx(instruction)).unwrap();
        get(&cpu)
    };
    const OF_32_BITS: [&[u8]; 2] = [&[0x0f, 0xae, 0x20], &[0x0f, 0xae, 0x00]];
    for save in OF_32_BITS {
        for (before, wanted) in [(72, Ok(())), (176, Ok(())), (168, Err(Exception::GP0))] {
            let mut cpu = at_the_end_of_addresses(before);
            put(&cpu, &Image([0; AREA]));
            assert_eq!(step(&mut cpu, &by_rcx(save)), wanted, "{save:02x?}, {before} bytes");
            let expected = if wanted.is_ok() { plain(save) } else { Image([0; AREA]) };
            compare(&get(&cpu), &expected, "saved");
        }
    }
    for restore in [&[0x0f, 0xae, 0x28], &[0x0f, 0xae, 0x08]] {
        for (before, wanted) in [(72, Ok(())), (168, Err(Exception::GP0))] {
            let mut cpu = at_the_end_of_addresses(before);
            let mut image = state(3);
            image.set(offset::XMM, 0x1234);
            put(&cpu, &image);
            assert_eq!(step(&mut cpu, &by_rcx(restore)), wanted, "{restore:02x?}, {before} bytes");
            assert_eq!(cpu.xstate.vector(0, 8)[..2] == [0x34, 0x12], wanted.is_ok());
        }
    }
    // Only what is asked for is accessed.
    let mut cpu = at_the_end_of_addresses(168);
    cpu.gpr[RAX] = 1;
    assert_eq!(step(&mut cpu, &by_rcx(OF_32_BITS[0])), Ok(()));
}

#[test]
fn masked_elements_do_not_go_round() {
    let mut cpu = at_the_end_of_addresses(8);
    poke(&cpu, AT, 0x2222_2222_1111_1111u64);
    let load = [0xc4, 0xe2, 0x69, 0x2c, 0x09]; // vmaskmovps xmm1, xmm2, [ecx]
    cpu.xstate.set_vector(2, &[[0x80; 8], [0; 8]].concat());
    step(&mut cpu, &load).unwrap();
    assert_eq!(cpu.xstate.vector(1, 8)[..8], 0x2222_2222_1111_1111u64.to_le_bytes());
    cpu.xstate.set_vector(2, &[[0; 8], [0x80; 8]].concat());
    assert_eq!(step(&mut cpu, &load), Err(Exception::GP0));
    // maskmovdqu xmm1, xmm2, which is in two halves, does; but not within one.
    cpu.xstate.set_vector(1, &[0x77; 16]);
    cpu.gpr[RDI] = 0xffff_fff8;
    step(&mut cpu, &[0x66, 0x0f, 0xf7, 0xca]).unwrap();
    assert_eq!(peek(&cpu, AT + 8), 0x7777_7777_7777_7777);
    cpu.gpr[RDI] = 0xffff_fff4;
    assert_eq!(step(&mut cpu, &[0x66, 0x0f, 0xf7, 0xca]), Err(Exception::GP0));
}

#[test]
fn checks_come_in_their_order() {
    type Set = fn(&mut Cpu);
    type Row = (&'static [u8], &'static str, Set, Result<(), Exception>);
    let cases: [Row; 11] = [
        (FXSAVE64, "misaligned", |c| c.gpr[RAX] += 8, Err(Exception::GP0)),
        (XSAVE, "misaligned", |c| c.gpr[RAX] += 32, Err(Exception::GP0)),
        (FXSAVE64, "TS", |c| c.cr0 |= cr0::TS, Err(Exception::NM)),
        (FXRSTOR64, "EM", |c| c.cr0 |= cr0::EM, Err(Exception::NM)),
        (XSAVE, "TS", |c| c.cr0 |= cr0::TS, Err(Exception::NM)),
        (XSAVE, "EM does not matter", |c| c.cr0 |= cr0::EM, Ok(())),
        (
            XSAVE,
            "no OSXSAVE before TS",
            |c| (c.cr4, c.cr0) = (c.cr4 & !cr4::OSXSAVE, c.cr0 | cr0::TS),
            Err(Exception::UD),
        ),
        (XRSTOR, "no OSXSAVE", |c| c.cr4 &= !cr4::OSXSAVE, Err(Exception::UD)),
        (FXSAVE64, "TS before alignment", |c| (c.gpr[RAX], c.cr0) = (AT + 1, c.cr0 | cr0::TS), Err(Exception::NM)),
        (XSAVE, "not canonical", |c| c.gpr[RAX] = 1 << 47, Err(Exception::GP0)),
        (XSAVE, "not mapped", |c| c.gpr[RAX] = 0x40_0000, Err(Exception::page_fault(0x40_0000, pf::WRITE))),
    ];
    for (bytes, what, change, wanted) in cases {
        let mut cpu = processor(Mode::Long(0));
        put(&cpu, &state(0));
        cpu.gpr[RDX] = 0;
        change(&mut cpu);
        let got = step(&mut cpu, bytes);
        match (got, wanted) {
            (Err(got), Err(wanted)) => assert_eq!(
                (got.vector, got.error.is_some()),
                (wanted.vector, wanted.error.is_some()),
                "{what}: {got:?}"
            ),
            (got, wanted) => assert_eq!(got, wanted, "{bytes:02x?} {what}"),
        }
    }
}

/// The exceptions of [`check_fpu`] for a few of each class.
#[test]
fn classes_of_instructions() {
    let (ud, nm) = (Err(Exception::UD), Err(Exception::NM));
    // What a processor lacks has no exception but one: XCR0 cannot enable it.
    let of_avx512 = match processor(Mode::Long(3)).features.xcr0 & xcr0::AVX512 != 0 {
        true => [Ok(()), nm, Ok(()), ud, ud, ud],
        false => [ud; 6],
    };
    type Row = (&'static str, &'static [u8], [Result<(), Exception>; 6]);
    // CR0.EM; CR0.TS; no OSFXSR; no OSXSAVE; XCR0 = 3; XCR0 = 7
    let rows: [Row; 12] = [
        ("fadd", &[0xd8, 0xc1], [nm, nm, Ok(()), Ok(()), Ok(()), Ok(())]),
        ("wait", &[0x9b], [Ok(()), Ok(()), Ok(()), Ok(()), Ok(()), Ok(())]),
        ("paddb mm", &[0x0f, 0xfc, 0xc1], [ud, nm, Ok(()), Ok(()), Ok(()), Ok(())]),
        ("emms", &[0x0f, 0x77], [ud, nm, Ok(()), Ok(()), Ok(()), Ok(())]),
        ("addps", &[0x0f, 0x58, 0xc1], [ud, nm, ud, Ok(()), Ok(()), Ok(())]),
        ("cvtpi2ps xmm, mm", &[0x0f, 0x2a, 0xc1], [ud, nm, ud, Ok(()), Ok(()), Ok(())]),
        ("ldmxcsr", &[0x0f, 0xae, 0x10], [ud, nm, ud, Ok(()), Ok(()), Ok(())]),
        ("vaddps ymm", &[0xc5, 0xf4, 0x58, 0xc1], [Ok(()), nm, Ok(()), ud, ud, Ok(())]),
        ("vzeroupper", &[0xc5, 0xf8, 0x77], [Ok(()), nm, Ok(()), ud, ud, Ok(())]),
        ("vaddps zmm", &[0x62, 0xf1, 0x74, 0x48, 0x58, 0xc1], of_avx512),
        ("kmovw", &[0xc5, 0xf8, 0x90, 0xc1], of_avx512),
        ("andn", &[0xc4, 0xe2, 0x70, 0xf2, 0xc1], [Ok(()), Ok(()), Ok(()), Ok(()), Ok(()), Ok(())]),
    ];
    for (name, bytes, wanted) in rows {
        let insn = Decoder::with_ip(64, bytes, 0, DecoderOptions::NONE).decode();
        let changes: [fn(&mut Cpu); 6] = [
            |c| c.cr0 |= cr0::EM,
            |c| c.cr0 |= cr0::TS,
            |c| c.cr4 &= !cr4::OSFXSR,
            |c| c.cr4 &= !cr4::OSXSAVE,
            |c| c.xcr0 = 3,
            |c| c.xcr0 = 7,
        ];
        for (i, (change, wanted)) in changes.into_iter().zip(wanted).enumerate() {
            let mut cpu = processor(Mode::Long(3));
            change(&mut cpu);
            assert_eq!(check_fpu(&cpu, &insn), wanted, "{name}, column {i}");
        }
        let cpu = processor(Mode::Real);
        let vex = matches!(bytes[0], 0xc4 | 0xc5 | 0x62);
        assert_eq!(check_fpu(&cpu, &insn), if vex { ud } else { Ok(()) }, "{name} in real mode");
    }
    let wait = Decoder::with_ip(64, &[0x9b], 0, DecoderOptions::NONE).decode();
    let mut cpu = processor(Mode::Long(3));
    cpu.cr0 |= cr0::TS | cr0::MP;
    assert_eq!(check_x87(&cpu, &wait), nm);
}

#[test]
fn fxrstor_takes_what_fxsave_wrote() {
    let mut cpu = loaded(&state(3));
    put(&cpu, &Image::untouched());
    cpu.gpr[RAX] = AT;
    step(&mut cpu, FXSAVE64).unwrap();
    let image = get(&cpu);
    let mut fresh = processor(Mode::Long(3));
    put(&fresh, &image);
    step(&mut fresh, FXRSTOR64).unwrap();
    assert_eq!(fresh.xstate.area[..416], {
        let mut area = cpu.xstate.area[..416].to_vec();
        area[offset::MXCSR_MASK..offset::MXCSR_MASK + 4]
            .copy_from_slice(&fresh.xstate.area[offset::MXCSR_MASK..offset::MXCSR_MASK + 4]);
        area
    });
    // Outside of 64-bit mode: eight registers, 32-bit pointers.
    let mut narrow = processor(Mode::Compatibility(3));
    put(&narrow, &image);
    step(&mut narrow, &FXRSTOR64[1..]).unwrap();
    assert_eq!(narrow.xstate.vector(7, 16), cpu.xstate.vector(7, 16));
    assert_eq!(narrow.xstate.vector(8, 16), [0; 64]);
    poke(&narrow, AT + offset::MXCSR as u64, 1u32 << 20);
    assert_eq!(step(&mut narrow, &FXRSTOR64[1..]), Err(Exception::GP0));
}

#[test]
fn the_environment_is_what_the_host_stores() {
    let image = state(1);
    let mut wanted = Image::untouched();
    on_host!(image, 0, "fnstenv", wanted);
    let mut cpu = loaded(&image);
    put(&cpu, &Image::untouched());
    cpu.gpr[RAX] = AT;
    step(&mut cpu, &[0xd9, 0x30]).unwrap();
    compare(&get(&cpu), &wanted, "fnstenv");

    let mut wanted = Image::untouched();
    on_host!(image, 0, "fnsave", wanted);
    let mut cpu = loaded(&image);
    put(&cpu, &Image::untouched());
    cpu.gpr[RAX] = AT;
    step(&mut cpu, &[0xdd, 0x30]).unwrap();
    compare(&get(&cpu), &wanted, "fnsave");
    assert_eq!((cpu.xstate.fcw(), cpu.xstate.fsw(), cpu.xstate.area[offset::FTW]), (0x37f, 0, 0));
    // And back.
    step(&mut cpu, &[0xdd, 0x20]).unwrap(); // frstor
    let original = loaded(&image);
    assert_eq!(cpu.xstate.area[..6], original.xstate.area[..6]);
    assert_eq!(cpu.xstate.area[offset::ST..offset::XMM], original.xstate.area[offset::ST..offset::XMM]);
}

#[test]
fn environments_of_real_mode_and_16_bits() {
    let mut cpu = processor(Mode::Real);
    cpu.xstate.materialise(0);
    cpu.xstate.set_pointers(0xa_bcde, 0x5_4321, 0x2d1);
    cpu.gpr[3] = 0x3000; // bx
    step(&mut cpu, &[0xd9, 0x37]).unwrap(); // fnstenv [bx]
    assert_eq!(peek(&cpu, 0x3000), 0xbcde_ffff_0000_037f);
    assert_eq!(peek(&cpu, 0x3008) & 0xffff_ffff_ffff, 0x5000_4321_a2d1);
    cpu.xstate = XState::default();
    step(&mut cpu, &[0xd9, 0x27]).unwrap(); // fldenv
    assert_eq!((cpu.xstate.fip, cpu.xstate.fdp, cpu.xstate.fop), (0xa_bcde, 0x5_4321, 0x2d1));
}

#[test]
fn a_new_top_moves_the_stack_and_unmasked_exceptions_wait() {
    let mut cpu = loaded(&state(1));
    let physical_5 = cpu.xstate.area[offset::ST..offset::ST + 10].to_vec(); // TOP is 5
    let environment: [u32; 7] = [0x37e, 0x0001 | 2 << 11, 0, 0, 0, 0, 0];
    for (i, word) in environment.iter().enumerate() {
        poke(&cpu, AT + 4 * i as u64, *word);
    }
    cpu.gpr[RAX] = AT;
    step(&mut cpu, &[0xd9, 0x20]).unwrap(); // fldenv
    let at = offset::ST + 16 * 3;
    assert_eq!(cpu.xstate.area[at..at + 10], physical_5, "physical register 5 is ST(3) now");
    assert_eq!(cpu.xstate.area[offset::FTW], 0xff);
    assert!(cpu.xstate.x87_exception_pending(), "invalid operation is not masked");
    cpu.cr0 |= cr0::NE;
    assert_eq!(step(&mut cpu, &[0xd9, 0x20]), Err(Exception::plain(vector::MF)));
    step(&mut cpu, &[0xd9, 0x30]).unwrap(); // fnstenv does not wait, and masks
    assert!(!cpu.xstate.x87_exception_pending());
}

#[test]
fn mxcsr() {
    let mut cpu = processor(Mode::Long(3));
    poke(&cpu, AT, 0x1f80u32 | 1 << 15);
    step(&mut cpu, &[0x0f, 0xae, 0x10]).unwrap(); // ldmxcsr [rax]
    assert_eq!(cpu.xstate.mxcsr(), 0x9f80);
    cpu.gpr[RAX] += 4;
    step(&mut cpu, &[0x0f, 0xae, 0x18]).unwrap(); // stmxcsr [rax]
    assert_eq!(peek(&cpu, AT) >> 32, 0x9f80);
    poke(&cpu, AT + 4, 1u32 << 18);
    assert_eq!(step(&mut cpu, &[0x0f, 0xae, 0x10]), Err(Exception::GP0));
    assert_eq!(cpu.xstate.mxcsr(), 0x9f80);
}

/// Only the first of two pages, from [`AT`] on, is there.
fn with_a_missing_page(cpu: &mut Cpu) {
    let table = PAGES + 0x8000;
    for page in 0..512u64 {
        poke(cpu, table + 8 * page, if page == (AT >> 12) + 1 { 0u64 } else { page << 12 | 7 });
    }
    poke(cpu, PAGES + 0x2000, table | 7);
    cpu.flush_tlb_all();
}

#[test]
fn masked_elements_do_not_fault() {
    let end = AT + 0x1000;
    let mut cpu = processor(Mode::Long(3));
    with_a_missing_page(&mut cpu);
    poke(&cpu, end - 8, 0x2222_2222_1111_1111u64);
    cpu.gpr[RAX] = end - 8;
    let mut mask = [0; 16];
    mask[3] = 0x80;
    mask[7] = 0xff;
    cpu.xstate.set_vector(2, &mask);
    cpu.xstate.set_vector(1, &[0xee; 32]);
    step(&mut cpu, &[0xc4, 0xe2, 0x69, 0x2c, 0x08]).unwrap(); // vmaskmovps xmm1, xmm2, [rax]
    assert_eq!(cpu.xstate.vector(1, 32)[..8], 0x2222_2222_1111_1111u64.to_le_bytes());
    assert_eq!(cpu.xstate.vector(1, 32)[8..32], [0; 24], "zeros elsewhere, above too");
    mask[11] = 0x80;
    cpu.xstate.set_vector(2, &mask);
    let fault = Exception::page_fault(end, pf::USER);
    assert_eq!(step(&mut cpu, &[0xc4, 0xe2, 0x69, 0x2c, 0x08]), Err(fault));
    // vmaskmovps [rax], xmm2, xmm3: nothing is stored if something faults.
    cpu.xstate.set_vector(3, &[0x77; 16]);
    for (amd, told) in [(true, end), (false, end + 3)] {
        cpu.features.amd = amd;
        let fault = Exception::page_fault(told, pf::USER | pf::WRITE);
        assert_eq!(step(&mut cpu, &[0xc4, 0xe2, 0x69, 0x2e, 0x18]), Err(fault));
    }
    assert_eq!(peek(&cpu, end - 8), 0x2222_2222_1111_1111);
    mask[11] = 0;
    mask[3] = 0x7f;
    cpu.xstate.set_vector(2, &mask);
    step(&mut cpu, &[0xc4, 0xe2, 0x69, 0x2e, 0x18]).unwrap();
    assert_eq!(peek(&cpu, end - 8), 0x7777_7777_1111_1111);
    // maskmovdqu xmm3, xmm2: the whole operand has to be there, as on the host.
    let maskmovdqu = [0x66, 0x0f, 0xf7, 0xda];
    cpu.gpr[RDI] = end - 8;
    cpu.xstate.set_vector(3, &[0x99; 16]);
    assert_eq!(step(&mut cpu, &maskmovdqu), Err(Exception::page_fault(end, pf::USER | pf::WRITE)));
    cpu.gpr[RDI] = end - 16;
    step(&mut cpu, &maskmovdqu).unwrap();
    assert_eq!(peek(&cpu, end - 16) >> 56, 0x99);
    assert_eq!(peek(&cpu, end - 8), 0x7777_7777_1111_1111);
}

#[test]
fn gathers_stop_at_a_fault_and_go_on() {
    let end = AT + 0x1000;
    let mut cpu = processor(Mode::Long(3));
    with_a_missing_page(&mut cpu);
    for i in 0..4u64 {
        poke(&cpu, AT + 0x100 + 4 * i, 0xa0 + i as u32);
    }
    // vpgatherdd xmm1, [rax + xmm2*4], xmm3: elements 3, 1, beyond the page, 0
    let beyond = ((end - AT - 0x100) / 4) as u32;
    let indices: Vec<u8> = [3u32, 1, beyond, 0].into_iter().flat_map(u32::to_le_bytes).collect();
    cpu.gpr[RAX] = AT + 0x100;
    cpu.xstate.set_vector(1, &[0xee; 32]);
    cpu.xstate.set_vector(2, &indices);
    cpu.xstate.set_vector(3, &[0xff; 16]);
    let gather = [0xc4, 0xe2, 0x61, 0x90, 0x0c, 0x90];
    assert_eq!(step(&mut cpu, &gather), Err(Exception::page_fault(end, pf::USER)));
    let word = |cpu: &mut Cpu, register, i: usize| {
        u32::from_le_bytes(cpu.xstate.vector(register, 64)[4 * i..4 * i + 4].try_into().unwrap())
    };
    assert_eq!([0, 1, 2, 3].map(|i| word(&mut cpu, 1, i)), [0xa3, 0xa1, 0xeeee_eeee, 0xeeee_eeee]);
    assert_eq!([0, 1, 2, 3].map(|i| word(&mut cpu, 3, i)), [0, 0, u32::MAX, u32::MAX]);
    let indices: Vec<u8> = [9u32, 9, 2, 0].into_iter().flat_map(u32::to_le_bytes).collect();
    cpu.xstate.set_vector(2, &indices);
    step(&mut cpu, &gather).unwrap();
    assert_eq!([0, 1, 2, 3].map(|i| word(&mut cpu, 1, i)), [0xa3, 0xa1, 0xa2, 0xa0]);
    assert_eq!(cpu.xstate.vector(3, 32), [0; 64]);
}

/// What AMD's processors leave alone at a fault, Intel's change: a mask's element is all ones or zeros, and what is above the
/// operands' length is cleared in the mask, and in the target once an element is loaded.
#[test]
fn a_gathers_fault_clears_what_is_above_on_intels_processors() {
    let gather = [0xc4, 0xe2, 0x61, 0x90, 0x0c, 0x90]; // vpgatherdd xmm1, [rax + xmm2*4], xmm3
    for (first, target) in [(0, [0; 16]), (0x400, [0xee; 16])] {
        let mut cpu = processor(Mode::Long(3));
        cpu.features.amd = false;
        with_a_missing_page(&mut cpu);
        cpu.gpr[RAX] = AT;
        cpu.xstate.set_vector(1, &[0xee; 32]);
        let indices: Vec<u8> = [first, 0x400u32, 0, 0].into_iter().flat_map(u32::to_le_bytes).collect();
        cpu.xstate.set_vector(2, &indices);
        cpu.xstate.set_vector(3, &[[0x81; 12], [0x71; 12]].concat());
        step(&mut cpu, &gather).unwrap_err();
        assert_eq!(cpu.xstate.vector(1, 32)[16..32], target, "the first from {first:#x}");
        let left = if first == 0 { [0, 0xff, 0xff, 0] } else { [0xff, 0xff, 0xff, 0] };
        let left: Vec<u8> = left.into_iter().flat_map(|byte| [byte; 4]).collect();
        assert_eq!(cpu.xstate.vector(3, 32)[..32], [left, vec![0; 16]].concat());
    }
}

/// FDP and FOP of Intel's processors are those of the last instruction that raised an unmasked exception.
#[test]
fn pointers_are_settled_where_exceptions_wait() {
    const SUMMARY: u16 = 0x8081;
    let mut state = XState::default();
    state.materialise(0);
    state.set_pointers(1, 2, 3);
    (state.fip, state.fdp, state.fop) = (4, 5, 6);
    state.settle_pointers();
    assert_eq!((state.fip, state.fdp, state.fop), (4, 2, 3), "nothing waits");
    state.set_u16(offset::FSW, SUMMARY);
    (state.fdp, state.fop) = (7, 8);
    state.settle_pointers();
    state.set_u16(offset::FSW, 0);
    (state.fdp, state.fop) = (9, 10);
    state.settle_pointers();
    assert_eq!((state.fip, state.fdp, state.fop), (4, 7, 8), "what has waited");
}

#[test]
fn gathers_and_scatters_load_what_the_host_loads() {
    if all() & xcr0::AVX512 != xcr0::AVX512 {
        return;
    }
    // Each with its address in RAX, index in register 2, mask k1 or register 3, data in register 1.
    let forms: [&[u8]; 10] = [
        &[0xc4, 0xe2, 0x61, 0x92, 0x0c, 0x90],       // vgatherdps xmm1, [rax+xmm2*4], xmm3
        &[0xc4, 0xe2, 0x65, 0x92, 0x0c, 0x90],       // vgatherdps ymm1
        &[0xc4, 0xe2, 0xe5, 0x92, 0x0c, 0xd0],       // vgatherdpd ymm1, [rax+xmm2*8], ymm3
        &[0xc4, 0xe2, 0x65, 0x93, 0x0c, 0x90],       // vgatherqps xmm1, [rax+ymm2*4], xmm3
        &[0xc4, 0xe2, 0xe1, 0x91, 0x4c, 0x10, 0x08], // vpgatherqq xmm1, [rax+xmm2+8], xmm3
        &[0x62, 0xf2, 0x7d, 0x49, 0x92, 0x0c, 0x90], // vgatherdps zmm1{k1}, [rax+zmm2*4]
        &[0x62, 0xf2, 0xfd, 0x49, 0x90, 0x0c, 0xd0], // vpgatherdq zmm1{k1}, [rax+ymm2*8]
        &[0x62, 0xf2, 0x7d, 0x49, 0x93, 0x0c, 0x90], // vgatherqps ymm1{k1}, [rax+zmm2*4]
        &[0x62, 0xf2, 0x7d, 0x49, 0xa2, 0x0c, 0x90], // vscatterdps [rax+zmm2*4]{k1}, zmm1
        &[0x62, 0xf2, 0xfd, 0x29, 0xa1, 0x0c, 0xd0], // vpscatterqq [rax+ymm2*8]{k1}, ymm1
    ];
    for (form, bytes) in forms.into_iter().enumerate() {
        let quad_index = bytes.iter().any(|b| *b == 0x93 || *b == 0x91 || *b == 0xa1);
        let mut before = state(all());
        let layout = Layout::host();
        let (avx, zmm, mask) = (layout.range(2).unwrap(), layout.range(6).unwrap(), layout.range(5).unwrap());
        let mut indices = [0u8; 64];
        for i in 0..64 / if quad_index { 8 } else { 4 } {
            let value = ((i * 5 + 3) % 13) as i64 - 4;
            match quad_index {
                true => indices[8 * i..8 * i + 8].copy_from_slice(&value.to_le_bytes()),
                false => indices[4 * i..4 * i + 4].copy_from_slice(&(value as i32).to_le_bytes()),
            }
        }
        before.0[offset::XMM + 32..offset::XMM + 48].copy_from_slice(&indices[..16]);
        before.0[avx.start + 32..avx.start + 48].copy_from_slice(&indices[16..32]);
        before.0[zmm.start + 64..zmm.start + 96].copy_from_slice(&indices[32..]);
        before.0[mask.start + 8..mask.start + 16].copy_from_slice(&0xb6d5u64.to_le_bytes());

        let mut memory = [0u64; 64];
        for (i, word) in memory.iter_mut().enumerate() {
            *word = 0x0101_0101_0101_0101 * i as u64 + 0x0706_0504_0302_0100;
        }
        let mut cpu = loaded(&before);
        for (i, word) in memory.iter().enumerate() {
            poke(&cpu, AT + 8 * i as u64, *word);
        }
        cpu.gpr[RAX] = AT + 0x80;
        step(&mut cpu, bytes).unwrap_or_else(|e| panic!("form {form}: {e:?}"));
        let got_memory: Vec<u64> = (0..64).map(|i| peek(&cpu, AT + 8 * i)).collect();
        put(&cpu, &Image([0; AREA]));
        request(&mut cpu, all());
        step(&mut cpu, &by_rcx(XSAVE)).unwrap();
        let got = get(&cpu);

        let wanted = on_host_at(bytes, &before, &mut memory);
        assert_eq!(got_memory, memory, "form {form}: memory");
        compare(&got, &wanted, &format!("form {form}"));
    }
}

/// Executes `bytes` on the host with RAX 0x80 into `memory`, and returns all registers.
fn on_host_at(bytes: &[u8], before: &Image, memory: &mut [u64; 64]) -> Image {
    let page = 4096;
    // SAFETY: a fresh page is filled with code and then made executable; the code ends with a return.
    unsafe {
        let code = libc::mmap(
            std::ptr::null_mut(),
            page,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        );
        assert_ne!(code, libc::MAP_FAILED);
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), code.cast::<u8>(), bytes.len());
        code.cast::<u8>().add(bytes.len()).write(0xc3);
        assert_eq!(libc::mprotect(code, page, libc::PROT_READ | libc::PROT_EXEC), 0);
        let (mut saved, mut out) = (Image([0; AREA]), Image([0; AREA]));
        asm!(
            "xsave64 [r8]",
            "xrstor64 [r9]",
            "mov rax, r12",
            "call r10",
            "mov eax, r13d",
            "xsave64 [r11]",
            "xrstor64 [r8]",
            in("r8") &raw mut saved.0,
            in("r9") &raw const before.0,
            in("r10") code,
            in("r11") &raw mut out.0,
            in("r12") memory.as_mut_ptr().cast::<u8>().add(0x80),
            in("r13") all(),
            inout("eax") all() as u32 => _,
            inout("edx") 0 => _,
        );
        libc::munmap(code, page);
        out
    }
}

#[test]
fn flags_stay() {
    let mut cpu = processor(Mode::Long(3));
    cpu.rflags |= rflags::STATUS;
    put(&cpu, &state(0));
    request(&mut cpu, 3);
    step(&mut cpu, &by_rcx(XRSTOR)).unwrap();
    assert_eq!(cpu.rflags & rflags::STATUS, rflags::STATUS);
}
