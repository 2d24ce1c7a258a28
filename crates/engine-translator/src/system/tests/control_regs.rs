use purlin_arch::x86_64::{
    regs::{
        cr0, cr4, efer,
        gpr::{RAX, RCX, RDX},
        rflags,
    },
    state::Activity,
};

use crate::{
    cpu::Cpu,
    debug::{dr6, dr7},
    exception::Exception,
    testing::{CODE, Mode, PAGES, cpu, peek, poke, selector, step},
};

const GP: Result<(), Exception> = Err(Exception::GP0);

/// MOV CRn, RAX (or EAX) for the given value.
fn set_cr(cpu: &mut Cpu, n: u8, value: u64) -> Result<(), Exception> {
    cpu.gpr[RAX] = value;
    if n == 8 { step(cpu, b"\x44\x0f\x22\xc0") } else { step(cpu, &[0x0f, 0x22, 0xc0 | n << 3]) }
}

fn get_cr(cpu: &mut Cpu, n: u8) -> u64 {
    let bytes = [0x44, 0x0f, 0x20, 0xc0 | (n & 7) << 3];
    step(cpu, if n == 8 { &bytes } else { &bytes[1..] }).unwrap();
    cpu.gpr[RAX]
}

#[test]
fn cr0_rules() {
    let (pe, pg, wp) = (cr0::PE, cr0::PG, cr0::WP);
    // (mode, value, outcome)
    let cases = [
        (Mode::Real, pg, GP),
        (Mode::Real, pe | cr0::NW, GP),
        (Mode::Real, pe | cr0::NW | cr0::CD, Ok(())),
        (Mode::Real, pe, Ok(())),
        (Mode::Protected(0), 0, Ok(())),
        (Mode::Long(0), pe | pg | wp | 1 << 32, GP),
        (Mode::Long(0), pe | wp, GP),
        (Mode::Long(0), pg | wp, GP),
        (Mode::Compatibility(0), pe, Ok(())),
        (Mode::Long(0), pe | pg | 1 << 28, Ok(())),
        (Mode::Long(3), pe | pg, GP),
    ];
    for (mode, value, expected) in cases {
        let mut cpu = cpu(mode);
        let before = cpu.cr0;
        assert_eq!(set_cr(&mut cpu, 0, value), expected, "{mode:?} {value:#x}");
        // ET reads as one, bits that do not exist as zero.
        let after = if expected.is_ok() { value & !(1 << 28) | cr0::ET } else { before };
        assert_eq!(cpu.cr0, after, "{mode:?} {value:#x}");
    }
}

#[test]
fn entering_and_leaving_long_mode() {
    let mut cpu = cpu(Mode::Protected(0));
    cpu.efer = efer::LME;
    cpu.cr3 = PAGES;
    assert_eq!(set_cr(&mut cpu, 0, cr0::PE | cr0::PG), GP, "without PAE");
    cpu.cr4 = cr4::PAE;
    set_cr(&mut cpu, 0, cr0::PE | cr0::PG).unwrap();
    assert_eq!(cpu.efer, efer::LME | efer::LMA);
    assert_eq!(set_cr(&mut cpu, 4, 0), GP, "PAE cannot go in long mode");
    set_cr(&mut cpu, 0, cr0::PE).unwrap();
    assert_eq!(cpu.efer, efer::LME);
    // 64-bit code cannot be what turns it on.
    cpu.seg[1].access |= crate::cpu::access::L;
    assert_eq!(set_cr(&mut cpu, 0, cr0::PE | cr0::PG), GP);
}

#[test]
fn pae_pointers_are_loaded_with_cr0_cr3_and_cr4() {
    let mut cpu = cpu(Mode::Protected(0));
    poke(&cpu, PAGES, 0x2_0001u64);
    poke(&cpu, PAGES + 0x20, 0x3_0001u64);
    poke(&cpu, PAGES + 0x40, 0x4_0003u64);
    set_cr(&mut cpu, 4, cr4::PAE).unwrap();
    set_cr(&mut cpu, 3, PAGES).unwrap();
    assert_eq!(cpu.pdptes, [0; 4]);
    set_cr(&mut cpu, 0, cr0::PE | cr0::PG).unwrap();
    assert_eq!(cpu.pdptes[0], 0x2_0001);
    set_cr(&mut cpu, 3, PAGES + 0x20).unwrap();
    assert_eq!(cpu.pdptes[0], 0x3_0001);
    // Reserved bits: nothing changes.
    assert_eq!(set_cr(&mut cpu, 3, PAGES + 0x40), GP);
    assert_eq!((cpu.cr3, cpu.pdptes[0]), (PAGES + 0x20, 0x3_0001));
    poke(&cpu, PAGES + 0x20, 0x5_0001u64);
    set_cr(&mut cpu, 4, cr4::PAE | cr4::PGE).unwrap();
    assert_eq!(cpu.pdptes[0], 0x5_0001);
}

#[test]
fn cr3_and_cr4_rules() {
    let pcid = cr4::PAE | cr4::PCIDE;
    // (register, value, CR4 before, outcome)
    let cases = [
        (3, PAGES | 0x18, cr4::PAE, Ok(())),
        (3, 1 << 40, cr4::PAE, GP),
        (3, 1 << 63 | PAGES, cr4::PAE, GP),
        (3, 1 << 63 | PAGES, pcid, Ok(())),
        (4, cr4::PAE | cr4::SMEP | cr4::SMAP | cr4::UMIP | cr4::FSGSBASE, cr4::PAE, Ok(())),
        (4, cr4::PAE | cr4::LA57, cr4::PAE, GP),
        (4, cr4::PAE | 1 << 13, cr4::PAE, GP),
        (4, cr4::PAE | 1 << 40, cr4::PAE, GP),
        (4, pcid, cr4::PAE, Ok(())),
        (8, 15, cr4::PAE, Ok(())),
        (8, 16, cr4::PAE, GP),
    ];
    for (register, value, cr4, expected) in cases {
        let mut cpu = cpu(Mode::Long(0));
        cpu.cr4 = cr4;
        assert_eq!(set_cr(&mut cpu, register, value), expected, "CR{register} {value:#x}");
        if expected.is_ok() {
            assert_eq!(get_cr(&mut cpu, register), value & !(1 << 63));
        }
    }
    let mut cpu = cpu(Mode::Long(0));
    cpu.cr3 |= 5;
    assert_eq!(set_cr(&mut cpu, 4, pcid), GP, "with a PCID in CR3");
    assert_eq!(set_cr(&mut crate::testing::cpu(Mode::Protected(0)), 4, pcid), GP, "outside of long mode");
}

#[test]
fn translations_are_forgotten() {
    let linear = 0x20_0000;
    let pte = PAGES + 0x2008;
    // (instruction, prepares RAX, whether a global page goes too)
    let cases: [(&[u8], fn(&Cpu) -> u64, bool); 4] = [
        (b"\x0f\x22\xd8", |cpu| cpu.cr3, false),
        (b"\x0f\x22\xe0", |cpu| cpu.cr4 | cr4::PSE, true),
        (b"\x0f\x22\xc0", |cpu| cpu.cr0 & !cr0::WP, true),
        (b"\x0f\x01\x38", |_| 0x20_0000, true),
    ];
    for (bytes, rax, global_too) in cases {
        for global in [false, true] {
            let mut cpu = cpu(Mode::Long(0));
            cpu.cr4 |= cr4::PGE;
            poke(&cpu, pte, 0x20_0083 | if global { 0x100u64 } else { 0 });
            cpu.load::<u8>(linear).unwrap();
            poke(&cpu, pte, 0u64);
            assert!(cpu.load::<u8>(linear).is_ok(), "it is still known");
            cpu.gpr[RAX] = rax(&cpu);
            step(&mut cpu, bytes).unwrap();
            let gone = cpu.load::<u8>(linear).is_err();
            assert_eq!(gone, !global || global_too, "{bytes:02x?} {global}");
        }
    }
}

#[test]
fn lmsw_and_smsw() {
    let mut cpu = cpu(Mode::Protected(0));
    cpu.gpr[RAX] = 0xfff0 | cr0::TS | cr0::MP;
    step(&mut cpu, b"\x0f\x01\xf0").unwrap();
    assert_eq!(cpu.cr0 & 15, cr0::PE | cr0::TS | cr0::MP, "PE cannot be cleared");
    step(&mut cpu, b"\x0f\x06").unwrap();
    assert_eq!(cpu.cr0 & 15, cr0::PE | cr0::MP);
    step(&mut cpu, b"\x0f\x01\xe0").unwrap();
    assert_eq!(cpu.gpr[RAX], cpu.cr0);
    // To memory only 16 bits go.
    poke(&cpu, 0x5000, u64::MAX);
    step(&mut cpu, b"\x0f\x01\x25\x00\x50\x00\x00").unwrap();
    assert_eq!(peek(&cpu, 0x5000), u64::MAX << 16 | cpu.cr0 & 0xffff);
}

#[test]
fn privileged_at_cpl_3() {
    let instructions: [&[u8]; 14] = [
        b"\xf4",
        b"\x0f\x06",
        b"\x0f\x08",
        b"\x0f\x09",
        b"\x0f\x20\xc0",
        b"\x0f\x22\xd8",
        b"\x0f\x21\xc0",
        b"\x0f\x23\xf8",
        b"\x0f\x01\xf0",
        b"\x0f\x01\x10",
        b"\x0f\x01\x18",
        b"\x0f\x01\x38",
        b"\x0f\x00\xd0",
        b"\x0f\x00\xd8",
    ];
    for bytes in instructions {
        assert_eq!(step(&mut cpu(Mode::Long(3)), bytes), GP, "{bytes:02x?}");
    }
}

#[test]
fn hlt() {
    let mut cpu = cpu(Mode::Long(0));
    step(&mut cpu, b"\xf4").unwrap();
    assert_eq!((cpu.activity, cpu.rip), (Activity::Halted, CODE + 1));
}

#[test]
fn debug_registers() {
    let mut cpu = cpu(Mode::Long(0));
    let set = |cpu: &mut Cpu, n: u8, value: u64| {
        cpu.gpr[RAX] = value;
        step(cpu, &[0x0f, 0x23, 0xc0 | n << 3])
    };
    set(&mut cpu, 3, 0x1234_5678_9abc_def0).unwrap();
    assert_eq!(cpu.dr[3], 0x1234_5678_9abc_def0);
    set(&mut cpu, 6, 0).unwrap();
    assert_eq!(cpu.dr6, 0xffff_0ff0);
    set(&mut cpu, 6, 0xffff_ffff).unwrap();
    assert_eq!(cpu.dr6, 0xffff_efff);
    assert_eq!(set(&mut cpu, 7, 1 << 32), GP);
    // DR5 is DR7, DR4 is DR6, until CR4.DE.
    set(&mut cpu, 5, 0xffff_ffff & !dr7::GD).unwrap();
    assert_eq!(cpu.dr7, 0xffff_07ff);
    cpu.cr4 |= cr4::DE;
    assert_eq!(set(&mut cpu, 5, 0), Err(Exception::UD));
    // User code is told its level first.
    let mut user = crate::testing::cpu(Mode::Long(3));
    user.cr4 |= cr4::DE;
    assert_eq!(set(&mut user, 5, 0), GP);
    cpu.dr7 |= dr7::GD;
    assert_eq!(set(&mut cpu, 0, 0), Err(Exception::debug(dr6::BD)));
    assert_eq!(step(&mut cpu, b"\x0f\x21\xf8"), Err(Exception::debug(dr6::BD)));
}

#[test]
fn extended_control_register() {
    let xsetbv = b"\x0f\x01\xd1";
    let mut long = cpu(Mode::Long(0));
    assert_eq!(step(&mut long, xsetbv), Err(Exception::UD), "without OSXSAVE");
    long.cr4 |= cr4::OSXSAVE;
    // (ECX, value, outcome)
    let cases = [
        (0, 1, Ok(())),
        (0, 3, Ok(())),
        (0, 7, Ok(())),
        (0, 0xe7, Ok(())),
        (0, 0, GP),
        (0, 2, GP),
        (0, 5, GP),
        (0, 0x27, GP),
        (0, 0xe3, GP),
        (0, 0x1f, GP),
        (0, 1 << 63 | 1, GP),
        (1, 1, GP),
    ];
    for (ecx, value, expected) in cases {
        long.xcr0 = 0x55;
        (long.gpr[RCX], long.gpr[RAX], long.gpr[RDX]) = (ecx, value & 0xffff_ffff, value >> 32);
        assert_eq!(step(&mut long, xsetbv), expected, "{ecx} {value:#x}");
        assert_eq!(long.xcr0, if expected.is_ok() { value } else { 0x55 });
    }
    long.gpr[RCX] = 0;
    long.xcr0 = 7;
    step(&mut long, b"\x0f\x01\xd0").unwrap();
    assert_eq!((long.gpr[RAX], long.gpr[RDX]), (7, 0));
    let mut user = cpu(Mode::Long(3));
    user.cr4 |= cr4::OSXSAVE;
    assert_eq!(step(&mut user, xsetbv), GP);
}

#[test]
fn invpcid() {
    // INVPCID RAX, [RCX]
    let bytes = b"\x66\x0f\x38\x82\x01";
    // (type, PCID word, address, CR4.PCIDE, outcome)
    let cases = [
        (0, 0u64, 0x1000u64, false, Ok(())),
        (0, 0, 0x8000_0000_0000, false, GP),
        (0, 5, 0x1000, false, GP),
        (0, 5, 0x1000, true, Ok(())),
        (1, 0x1000, 0, true, GP),
        (2, 5, 0, false, Ok(())),
        (3, 0, 0x8000_0000_0000, false, Ok(())),
        (4, 0, 0, true, GP),
    ];
    for (kind, pcid, address, pcide, expected) in cases {
        let mut cpu = cpu(Mode::Long(0));
        cpu.cr4 |= if pcide { cr4::PCIDE } else { 0 };
        (cpu.gpr[RAX], cpu.gpr[RCX]) = (kind, 0x5000);
        poke(&cpu, 0x5000, pcid);
        poke(&cpu, 0x5008, address);
        assert_eq!(step(&mut cpu, bytes), expected, "{kind} {pcid:#x} {address:#x} {pcide}");
    }
    let mut without = cpu(Mode::Long(0));
    without.features.invpcid = false;
    assert_eq!(step(&mut without, bytes), Err(Exception::UD));
}

#[test]
fn nothing_is_known_of_monitor_or_ud() {
    for bytes in [&b"\x0f\x0b"[..], b"\x0f\x01\xc8", b"\x0f\x01\xc9"] {
        assert_eq!(step(&mut cpu(Mode::Long(0)), bytes), Err(Exception::UD), "{bytes:02x?}");
    }
    let mut cpu = cpu(Mode::Protected(0));
    cpu.rflags |= rflags::RF;
    step(&mut cpu, b"\x0f\x06").unwrap();
    assert_eq!(cpu.rflags & rflags::RF, 0, "RF holds for one instruction");
    assert_eq!(cpu.seg[1].selector, selector::CODE32);
}
