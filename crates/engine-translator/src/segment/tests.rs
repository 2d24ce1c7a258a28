// Tables of cases are tables of tuples.
#![allow(clippy::type_complexity)]

use purlin_arch::x86_64::regs::seg::{DS, GS};

use super::*;
use crate::testing::{
    GDT, Mode, cpu, descriptor, peek, rights, segment as gdt_segment, selector,
    selector::{FREE, USER_DATA},
    set_descriptor,
};

const DATA: u32 = 0;
const CODE: u32 = access::CODE;
const UP: u32 = 0;
const DOWN: u32 = access::DC;

#[test]
fn limits_and_types() {
    use Access::{Fetch, Read, Write};
    let read_only = access::P | access::S;
    let rw = read_only | access::RW;
    let execute_only = read_only | access::CODE;
    // (access rights, limit, offset, size, access, permitted)
    let cases = [
        (rw | UP, 0xffff, 0xfffc, 4, Read, true),
        (rw | UP, 0xffff, 0xfffd, 4, Read, false),
        (rw | UP, 0xffff_ffff, 0xffff_fffc, 4, Write, true),
        (rw | UP, 0xffff_ffff, 0xffff_fffd, 4, Write, false),
        (rw | UP, 0, 0, 1, Read, true),
        (rw | UP, 0, 0, 2, Read, false),
        // Expand-down: above the limit, up to 64 KiB or 4 GiB.
        (rw | DOWN, 0xfff, 0xfff, 1, Read, false),
        (rw | DOWN, 0xfff, 0x1000, 1, Read, true),
        (rw | DOWN, 0xfff, 0xffff, 1, Read, true),
        (rw | DOWN, 0xfff, 0xffff, 2, Read, false),
        (rw | DOWN, 0xfff, 0x1_0000, 1, Read, false),
        (rw | DOWN | access::DB, 0xfff, 0x1_0000, 4, Read, true),
        (read_only, 0xffff, 0, 1, Read, true),
        (read_only, 0xffff, 0, 1, Write, false),
        (execute_only, 0xffff, 0, 1, Read, false),
        (execute_only, 0xffff, 0, 1, Fetch, true),
        (execute_only | access::RW, 0xffff, 0, 1, Read, true),
        (execute_only | access::RW, 0xffff, 0, 1, Write, false),
        // Conforming code does not expand down.
        (execute_only | access::RW | access::DC, 0xffff, 0, 1, Read, true),
        (rw | access::UNUSABLE, 0xffff, 0, 1, Read, false),
    ];
    for (access, limit, offset, size, wanted, expected) in cases {
        let segment = Segment { base: 0, limit, access, selector: 8 };
        assert_eq!(segment.permits(offset, size, wanted, true), expected, "{access:#x} {limit:#x} {offset:#x} {size}");
    }
    // Real mode looks at the limit alone.
    let code = Segment { base: 0, limit: 0xffff, access: execute_only, selector: 8 };
    assert!(code.permits(0, 1, Write, false));
    assert!(!code.permits(0xffff, 2, Write, false));
}

/// Whether an access goes on behind 4 GiB: in a flat segment of Intel's processors.
#[test]
fn flat_segments_have_no_end_on_intels_processors() {
    let rw = access::P | access::S | access::RW | access::DB;
    let mut cpu = cpu(Mode::Protected(0));
    // (AMD's, base, limit, rights, permitted)
    let cases = [
        (false, 0, u32::MAX, rw, true),
        (true, 0, u32::MAX, rw, false),
        (false, 0x1000, u32::MAX, rw, false),
        (false, 0, 0xf_ffff, rw, false),
        (false, 0, u32::MAX, rw | DOWN, false),
    ];
    for (amd, base, limit, access, permitted) in cases {
        cpu.features.amd = amd;
        let segment = Segment { base, limit, access, selector: 8 };
        assert_eq!(
            cpu.permits(&segment, 0xffff_fffd, 4, Access::Read),
            permitted,
            "{amd} {base:#x} {limit:#x} {access:#x}"
        );
    }
}

#[test]
fn legacy_addresses_wrap_at_4_gib() {
    let mut cpu = cpu(Mode::Protected(0));
    cpu.seg[DS].base = 0xffff_f000;
    assert_eq!(cpu.linear(DS, 0x2000, 4, Access::Read), Ok(0x1000));
    cpu.seg[DS].access |= access::UNUSABLE;
    assert_eq!(cpu.linear(DS, 0, 1, Access::Read), Err(Exception::GP0));
    cpu.seg[SS].limit = 0xfff;
    assert_eq!(cpu.linear(SS, 0xffd, 4, Access::Read), Err(Exception::SS0));
}

#[test]
fn addresses_in_64bit_mode() {
    let mut cpu = cpu(Mode::Long(0));
    cpu.seg[DS].base = 0x1000;
    cpu.seg[GS].base = 0xffff_8000_0000_0000;
    let top = 0x7fff_ffff_fff8;
    // (segment, offset, size, outcome)
    let cases = [
        (DS, 0x10, 8, Ok(0x10)),
        (GS, 0x10, 8, Ok(0xffff_8000_0000_0010)),
        (GS, (-0x10i64) as u64, 8, Err(Exception::GP0)),
        (DS, top, 8, Ok(top)),
        (DS, top + 1, 8, Err(Exception::GP0)),
        (SS, top + 8, 1, Err(Exception::SS0)),
        (SS, 0x8000_0000_0000_0000, 8, Err(Exception::SS0)),
        (DS, u64::MAX, 1, Ok(u64::MAX)),
    ];
    for (seg, offset, size, expected) in cases {
        assert_eq!(cpu.linear(seg, offset, size, Access::Read), expected, "{seg} {offset:#x} {size}");
    }
}

#[test]
fn alignment_is_checked_at_cpl_3_only() {
    let mut user = cpu(Mode::Long(3));
    user.cr0 |= cr0::AM;
    assert_eq!(user.linear(DS, 0x101, 4, Access::Read), Ok(0x101));
    user.rflags |= rflags::AC;
    assert_eq!(user.linear(DS, 0x101, 4, Access::Read), Err(Exception::AC0));
    assert_eq!(user.linear(DS, 0x104, 4, Access::Read), Ok(0x104));
    assert_eq!(user.linear(DS, 0x104, 8, Access::Write), Err(Exception::AC0));
    assert_eq!(user.linear(DS, 0x101, 1, Access::Write), Ok(0x101));
    // Alignment comes before paging, on the processors that the oracle has been run on.
    assert_eq!(user.linear(DS, 0x4000_0001, 4, Access::Read), Err(Exception::AC0));
    let mut kernel = cpu(Mode::Long(0));
    kernel.cr0 |= cr0::AM;
    kernel.rflags |= rflags::AC;
    assert_eq!(kernel.linear(DS, 0x101, 4, Access::Read), Ok(0x101));
}

#[test]
fn loading_data_segments() {
    let absent = |dpl| rights(DATA, dpl) & !access::P;
    // (CPL, descriptor's rights, RPL, expected fault)
    let cases: [(u8, u32, u16, Option<fn(u16) -> Exception>); 12] = [
        (0, rights(DATA, 0), 0, None),
        (0, rights(DATA, 0), 3, Some(Exception::gp)),
        (0, rights(DATA, 3), 3, None),
        (3, rights(DATA, 0), 0, Some(Exception::gp)),
        (3, rights(DATA, 3), 0, None),
        (0, rights(CODE, 0), 0, None),
        (0, rights(CODE, 0) & !access::RW, 0, Some(Exception::gp)),
        (3, rights(CODE, 0), 3, Some(Exception::gp)),
        // Conforming code is open to all.
        (3, rights(CODE | access::DC, 0), 3, None),
        (0, absent(0), 0, Some(Exception::np)),
        (3, absent(0), 0, Some(Exception::gp)),
        (0, access::P | 2, 0, Some(Exception::gp)),
    ];
    for (cpl, rights, rpl, expected) in cases {
        let mut cpu = cpu(Mode::Protected(cpl));
        set_descriptor(&cpu, FREE, descriptor(0x1234, 0xfff, rights));
        let before = cpu.seg[DS];
        let selector = FREE | rpl;
        let result = cpu.load_segment(DS, selector);
        assert_eq!(result.err(), expected.map(|f| f(selector)), "CPL {cpl} {rights:#x} RPL {rpl}");
        let expected = if expected.is_some() { before } else { Segment { selector, ..gdt_segment(&cpu, selector) } };
        assert_eq!(cpu.seg[DS], expected);
    }
}

#[test]
fn loading_ss() {
    // (CPL, descriptor's rights, RPL, expected fault)
    let cases: [(u8, u32, u16, Option<fn(u16) -> Exception>); 8] = [
        (0, rights(DATA, 0), 0, None),
        (0, rights(DATA, 0), 3, Some(Exception::gp)),
        (0, rights(DATA, 3), 0, Some(Exception::gp)),
        (3, rights(DATA, 3), 3, None),
        (0, rights(DATA, 0) & !access::RW, 0, Some(Exception::gp)),
        (0, rights(CODE, 0), 0, Some(Exception::gp)),
        (0, rights(DATA, 0) & !access::P, 0, Some(Exception::ss)),
        (3, rights(DATA, 0) & !access::P, 3, Some(Exception::gp)),
    ];
    for (cpl, rights, rpl, expected) in cases {
        let mut cpu = cpu(Mode::Protected(cpl));
        set_descriptor(&cpu, FREE, descriptor(0, 0xfff, rights));
        let selector = FREE | rpl;
        let result = cpu.load_segment(SS, selector);
        assert_eq!(result.err(), expected.map(|f| f(selector)), "CPL {cpl} {rights:#x} RPL {rpl}");
    }
}

#[test]
fn null_selectors() {
    let mut protected = cpu(Mode::Protected(0));
    assert_eq!(protected.load_segment(SS, 0), Err(Exception::GP0));
    assert_eq!(protected.load_segment(DS, 3), Ok(()));
    assert_eq!(protected.seg[DS], Segment::null(3));
    // 64-bit code below ring 3 can have a null SS with the RPL of its level.
    let mut long = cpu(Mode::Long(0));
    assert_eq!(long.load_segment(SS, 0), Ok(()));
    assert_eq!(long.load_segment(SS, 1), Err(Exception::GP0));
    assert_eq!(cpu(Mode::Long(3)).load_segment(SS, 3), Err(Exception::GP0));
    assert_eq!(cpu(Mode::Compatibility(0)).load_segment(SS, 0), Err(Exception::GP0));
}

#[test]
fn tables_end_at_their_limit() {
    let mut cpu = cpu(Mode::Protected(0));
    cpu.gdtr.limit = selector::DATA + 7;
    assert_eq!(cpu.load_segment(DS, selector::DATA), Ok(()));
    cpu.gdtr.limit -= 1;
    assert_eq!(cpu.load_segment(DS, selector::DATA), Err(Exception::gp(selector::DATA)));
    // An LDT that is not there has no entries.
    cpu.ldtr = Segment::null(0);
    assert_eq!(cpu.load_segment(DS, 4), Err(Exception::gp(4)));
    cpu.ldtr = Segment { base: GDT + 8, limit: 0xf, access: access::P | 2, selector: 0x60 };
    assert_eq!(cpu.load_segment(DS, 8 | 4), Ok(()));
    assert_eq!(cpu.load_segment(DS, 16 | 4), Err(Exception::gp(16 | 4)));
}

#[test]
fn the_accessed_bit_is_set_in_memory() {
    let mut cpu = cpu(Mode::Protected(0));
    let clear = descriptor(0, 0xfff, rights(DATA, 0) & !access::ACCESSED);
    set_descriptor(&cpu, FREE, clear);
    cpu.load_segment(DS, FREE).unwrap();
    assert_eq!(peek(&cpu, GDT + u64::from(FREE)), clear | 1 << 40);
    assert_ne!(cpu.seg[DS].access & access::ACCESSED, 0);
}

#[test]
fn unreal_mode_keeps_the_limit() {
    let mut cpu = cpu(Mode::Real);
    cpu.seg[DS].limit = u32::MAX;
    cpu.load_segment(DS, 0x1234).unwrap();
    assert_eq!((cpu.seg[DS].base, cpu.seg[DS].limit), (0x12340, u32::MAX));
    let mut v86 = crate::testing::cpu(Mode::V86);
    v86.load_segment(DS, 0x1234).unwrap();
    assert_eq!(v86.seg[DS], Segment { base: 0x12340, limit: 0xffff, access: 0xf3, selector: 0x1234 });
}

#[test]
fn segments_of_inner_levels_are_dropped() {
    let mut cpu = cpu(Mode::Protected(0));
    let conforming = Segment { access: rights(CODE | access::DC, 0), ..gdt_segment(&cpu, selector::CONFORMING) };
    cpu.seg[ES] = conforming;
    cpu.seg[FS] = gdt_segment(&cpu, USER_DATA);
    cpu.cpl = 3;
    let user = cpu.seg[FS];
    cpu.drop_inner_segments();
    assert_eq!(cpu.seg[ES], conforming);
    assert_eq!(cpu.seg[FS], user);
    assert_eq!((cpu.seg[DS], cpu.seg[GS]), (Segment::null(0), Segment::null(0)));
}
