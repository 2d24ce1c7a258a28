use purlin_arch::x86_64::regs::{
    cr4,
    gpr::{RAX, RBX, RSI},
    rflags,
    seg::{DS, ES, SS},
};

use crate::{
    cpu::{Cpu, Segment, Table, access},
    exception::Exception,
    testing::{
        GDT, Mode, cpu, descriptor, peek, poke, rights, segment,
        selector::{self, CODE32, CONFORMING, DATA, FREE, USER_DATA},
        set_descriptor, step,
    },
};

const LDT: u32 = access::P | 2;
const TSS32: u32 = access::P | 9;

#[test]
fn moves() {
    let mut cpu = cpu(Mode::Protected(0));
    cpu.gpr[RAX] = u64::from(USER_DATA);
    // MOV DS, AX; MOV EBX, DS; MOV [0x5000], DS
    step(&mut cpu, b"\x8e\xd8").unwrap();
    assert_eq!(cpu.seg[DS], segment(&cpu, USER_DATA));
    cpu.gpr[RBX] = 0xffff_ffff;
    step(&mut cpu, b"\x8c\xdb").unwrap();
    assert_eq!(cpu.gpr[RBX], u64::from(USER_DATA));
    poke(&cpu, 0x5000, u64::MAX);
    step(&mut cpu, b"\x8c\x1d\x00\x50\x00\x00").unwrap();
    assert_eq!(peek(&cpu, 0x5000), u64::MAX << 16 | u64::from(USER_DATA));
    // MOV SS makes a shadow, the next instruction ends it.
    cpu.gpr[RAX] = u64::from(DATA);
    step(&mut cpu, b"\x8e\xd0").unwrap();
    assert!(cpu.mov_ss_shadow);
    step(&mut cpu, b"\x8e\xd8").unwrap();
    assert!(!cpu.mov_ss_shadow);
}

#[test]
fn far_pointers() {
    let mut cpu = cpu(Mode::Protected(0));
    poke(&cpu, 0x5000, 0x1234_5678u32);
    poke(&cpu, 0x5004, USER_DATA);
    // LES EAX, [0x5000]
    step(&mut cpu, b"\xc4\x05\x00\x50\x00\x00").unwrap();
    assert_eq!((cpu.gpr[RAX], cpu.seg[ES].selector), (0x1234_5678, USER_DATA));
    // A selector that cannot be loaded leaves the register alone.
    poke(&cpu, 0x5000, 1u32);
    poke(&cpu, 0x5004, 0u16);
    assert_eq!(step(&mut cpu, b"\x0f\xb2\x05\x00\x50\x00\x00"), Err(Exception::GP0));
    assert_eq!((cpu.gpr[RAX], cpu.seg[SS].selector), (0x1234_5678, DATA));
    // Two accesses: the address of the selector wraps by itself. LES EAX, [SI]
    poke(&cpu, 0xfffc, 7u32);
    poke(&cpu, 0, DATA);
    poke(&cpu, 0x1_0000, USER_DATA);
    cpu.gpr[RSI] = 0xfffc;
    step(&mut cpu, b"\x67\xc4\x04").unwrap();
    assert_eq!((cpu.gpr[RAX], cpu.seg[ES].selector), (7, DATA));
}

#[test]
fn table_registers() {
    let mut protected = cpu(Mode::Protected(0));
    poke(&protected, 0x5000, 0x1234u16);
    poke(&protected, 0x5002, 0x89ab_cdefu32);
    // LGDT [0x5000], with 32- and 16-bit operands; LIDT
    step(&mut protected, b"\x0f\x01\x15\x00\x50\x00\x00").unwrap();
    assert_eq!(protected.gdtr, Table { base: 0x89ab_cdef, limit: 0x1234 });
    step(&mut protected, b"\x66\x0f\x01\x15\x00\x50\x00\x00").unwrap();
    assert_eq!(protected.gdtr, Table { base: 0xab_cdef, limit: 0x1234 });
    step(&mut protected, b"\x0f\x01\x1d\x00\x50\x00\x00").unwrap();
    assert_eq!(protected.idtr, Table { base: 0x89ab_cdef, limit: 0x1234 });
    // SIDT [0x5010]
    step(&mut protected, b"\x0f\x01\x0d\x10\x50\x00\x00").unwrap();
    assert_eq!(peek(&protected, 0x5010) & 0xffff_ffff_ffff, 0x89ab_cdef_1234);

    let mut long = cpu(Mode::Long(0));
    poke(&long, 0x5000, 0x1234u16);
    poke(&long, 0x5002, 0xffff_8000_0000_1000u64);
    step(&mut long, b"\x0f\x01\x14\x25\x00\x50\x00\x00").unwrap();
    assert_eq!(long.gdtr, Table { base: 0xffff_8000_0000_1000, limit: 0x1234 });
    step(&mut long, b"\x0f\x01\x04\x25\x10\x50\x00\x00").unwrap();
    assert_eq!(peek(&long, 0x5012), 0xffff_8000_0000_1000);
    poke(&long, 0x5002, 0x8000_0000_0000u64);
    assert_eq!(step(&mut long, b"\x0f\x01\x14\x25\x00\x50\x00\x00"), Err(Exception::GP0));
}

#[test]
fn umip() {
    // SGDT, SIDT, SLDT, STR, SMSW
    let instructions: [&[u8]; 5] = [
        b"\x0f\x01\x04\x25\x00\x50\x00\x00",
        b"\x0f\x01\x0c\x25\x00\x50\x00\x00",
        b"\x0f\x00\xc0",
        b"\x0f\x00\xc8",
        b"\x0f\x01\xe0",
    ];
    for bytes in instructions {
        let mut user = cpu(Mode::Long(3));
        assert_eq!(step(&mut user, bytes), Ok(()), "{bytes:02x?}");
        user.cr4 |= cr4::UMIP;
        assert_eq!(step(&mut user, bytes), Err(Exception::GP0), "{bytes:02x?}");
        let mut kernel = cpu(Mode::Long(0));
        kernel.cr4 |= cr4::UMIP;
        assert_eq!(step(&mut kernel, bytes), Ok(()), "{bytes:02x?}");
    }
}

#[test]
fn lldt() {
    // (selector, rights, fault)
    let cases: [(u16, u32, Option<Exception>); 5] = [
        (FREE, LDT, None),
        (FREE, LDT & !access::P, Some(Exception::np(FREE))),
        (FREE, TSS32, Some(Exception::gp(FREE))),
        (FREE, rights(0, 0), Some(Exception::gp(FREE))),
        (FREE | 4, LDT, Some(Exception::gp(FREE | 4))),
    ];
    for (selector, rights, fault) in cases {
        let mut cpu = cpu(Mode::Protected(0));
        set_descriptor(&cpu, FREE, descriptor(0x6000, 0xff, rights));
        cpu.gpr[RAX] = u64::from(selector);
        assert_eq!(step(&mut cpu, b"\x0f\x00\xd0").err(), fault, "{selector:#x} {rights:#x}");
        if fault.is_none() {
            assert_eq!(cpu.ldtr, Segment { base: 0x6000, limit: 0xff, access: LDT, selector });
        }
    }
    let mut null = cpu(Mode::Protected(0));
    null.gpr[RAX] = 3;
    step(&mut null, b"\x0f\x00\xd0").unwrap();
    assert!(null.ldtr.unusable());
    assert_eq!(step(&mut cpu(Mode::Real), b"\x0f\x00\xd0"), Err(Exception::UD));
}

#[test]
fn ltr() {
    let mut protected = cpu(Mode::Protected(0));
    set_descriptor(&protected, FREE, descriptor(0x6000, 0x67, TSS32));
    protected.gpr[RAX] = u64::from(FREE);
    step(&mut protected, b"\x0f\x00\xd8").unwrap();
    assert_eq!(protected.tr, Segment { base: 0x6000, limit: 0x67, access: access::P | 11, selector: FREE });
    // It is busy now.
    assert_eq!(peek(&protected, GDT + u64::from(FREE)) >> 40 & 0xff, 0x8b);
    assert_eq!(step(&mut protected, b"\x0f\x00\xd8"), Err(Exception::gp(FREE)));
    protected.gpr[RAX] = 0;
    assert_eq!(step(&mut protected, b"\x0f\x00\xd8"), Err(Exception::GP0));

    // Sixteen bytes in long mode.
    let mut long = cpu(Mode::Long(0));
    set_descriptor(&long, FREE, descriptor(0x6000, 0x67, TSS32));
    set_descriptor(&long, FREE + 8, 0xffff_8000);
    long.gpr[RAX] = u64::from(FREE);
    step(&mut long, b"\x0f\x00\xd8").unwrap();
    assert_eq!(long.tr.base, 0xffff_8000_0000_6000);
    let faults = [(TSS32, 0x8000, FREE), (TSS32, 1 << 40, FREE), (access::P | 1, 0, FREE)];
    for (rights, high, selector) in faults {
        set_descriptor(&long, FREE, descriptor(0x6000, 0x67, rights));
        set_descriptor(&long, FREE + 8, high);
        assert_eq!(step(&mut long, b"\x0f\x00\xd8"), Err(Exception::gp(selector)), "{rights:#x} {high:#x}");
    }
}

/// Executes LAR, LSL, VERR or VERW on the selector in EAX: ZF and EBX.
fn inspect(cpu: &mut Cpu, bytes: &[u8], selector: u16) -> Option<u64> {
    cpu.gpr[RAX] = u64::from(selector);
    cpu.gpr[RBX] = 0x5555;
    step(cpu, bytes).unwrap();
    (cpu.rflags & rflags::ZF != 0).then_some(cpu.gpr[RBX])
}

const LAR: &[u8] = b"\x0f\x02\xd8";
const LSL: &[u8] = b"\x0f\x03\xd8";
const VERR: &[u8] = b"\x0f\x00\xe0";
const VERW: &[u8] = b"\x0f\x00\xe8";

/// Values that an AMD EPYC gives for Linux's flat segments.
#[test]
fn lar_and_lsl_of_flat_segments() {
    let mut cpu = cpu(Mode::Long(3));
    for (selector, rights) in
        [(selector::USER_CODE32, 0x00cf_fb00), (USER_DATA, 0x00cf_f300), (selector::USER_CODE64, 0x00af_fb00)]
    {
        assert_eq!(inspect(&mut cpu, LAR, selector), Some(rights));
        assert_eq!(inspect(&mut cpu, LSL, selector), Some(0xffff_ffff));
    }
    assert_eq!(inspect(&mut cpu, LAR, 0), None);
    assert_eq!(cpu.gpr[RBX], 0x5555);
    assert_eq!(inspect(&mut cpu, LAR, DATA), None, "of level 0");
    assert_eq!(inspect(&mut cpu, LAR, CONFORMING | 3), Some(0x00cf_9f00));
    assert_eq!(inspect(&mut cpu, LSL, CONFORMING | 3), Some(0xffff_ffff));
    cpu.gdtr.limit = 0x5f;
    assert_eq!(inspect(&mut cpu, LAR, 0xff8), None, "outside of the table");
    assert_eq!(step(&mut crate::testing::cpu(Mode::Real), LAR), Err(Exception::UD));
    assert_eq!(step(&mut crate::testing::cpu(Mode::V86), VERR), Err(Exception::UD));
}

/// SDM vol. 2, tables 3-51 (LAR) and 3-66 (LSL).
#[test]
fn types_that_lar_and_lsl_answer_for() {
    let lar_legacy = [1, 2, 3, 4, 5, 9, 11, 12];
    let lsl_legacy = [1, 2, 3, 9, 11];
    let lar_long = [2, 9, 11, 12];
    let lsl_long = [2, 9, 11];
    for (mode, lar, lsl) in
        [(Mode::Protected(0), &lar_legacy[..], &lsl_legacy[..]), (Mode::Long(0), &lar_long, &lsl_long)]
    {
        let mut cpu = cpu(mode);
        for kind in 0..16 {
            set_descriptor(&cpu, FREE, descriptor(0, 0x123, access::P | kind));
            assert_eq!(inspect(&mut cpu, LAR, FREE).is_some(), lar.contains(&kind), "LAR {mode:?} type {kind}");
            assert_eq!(inspect(&mut cpu, LSL, FREE).is_some(), lsl.contains(&kind), "LSL {mode:?} type {kind}");
        }
    }
}

#[test]
fn verr_and_verw() {
    // (CPL, rights, RPL, readable, writable)
    let cases = [
        (0, rights(0, 0), 0, true, true),
        (0, rights(0, 0) & !access::RW, 0, true, false),
        (0, rights(0, 0), 3, false, false),
        (3, rights(0, 0), 3, false, false),
        (3, rights(0, 3), 3, true, true),
        (0, rights(access::CODE, 0), 0, true, false),
        (0, rights(access::CODE, 0) & !access::RW, 0, false, false),
        (3, rights(access::CODE | access::DC, 0), 3, true, false),
        (0, access::P | 2, 0, false, false),
        // Whether it is present does not matter.
        (0, rights(0, 0) & !access::P, 0, true, true),
    ];
    for (cpl, rights, rpl, readable, writable) in cases {
        let mut cpu = cpu(Mode::Protected(cpl));
        set_descriptor(&cpu, FREE, descriptor(0, 0xfff, rights));
        assert_eq!(inspect(&mut cpu, VERR, FREE | rpl).is_some(), readable, "VERR {cpl} {rights:#x} {rpl}");
        assert_eq!(inspect(&mut cpu, VERW, FREE | rpl).is_some(), writable, "VERW {cpl} {rights:#x} {rpl}");
    }
}

#[test]
fn arpl() {
    let mut cpu = cpu(Mode::Protected(0));
    for (destination, source, expected, zf) in
        [(CODE32, 3, CODE32 | 3, true), (CODE32 | 3, 2, CODE32 | 3, false), (CODE32 | 1, 1, CODE32 | 1, false)]
    {
        cpu.gpr[RAX] = u64::from(destination);
        cpu.gpr[RBX] = source;
        step(&mut cpu, b"\x63\xd8").unwrap();
        assert_eq!((cpu.gpr[RAX], cpu.rflags & rflags::ZF != 0), (u64::from(expected), zf));
    }
    // Of a register of 32 bits the upper half stays.
    (cpu.gpr[RAX], cpu.gpr[RBX]) = (0x1234_0000, 1);
    step(&mut cpu, b"\x63\xd8").unwrap();
    assert_eq!(cpu.gpr[RAX], 0x1234_0001);
    assert_eq!(step(&mut crate::testing::cpu(Mode::Real), b"\x63\xd8"), Err(Exception::UD));
}
