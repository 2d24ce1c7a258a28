use purlin_arch::x86_64::regs::rflags;

use super::*;
use crate::testing::{Mode, PAGES, cpu, peek, poke};

const PD: u64 = PAGES + 0x2000;
/// A page table that tests hang under the second entry of the page directory: linear 2 MiB and up.
const PT: u64 = PAGES + 0x3000;
const LINEAR: u64 = 0x20_0000;

const P: u64 = entry::P;
const W: u64 = entry::W;
const U: u64 = entry::U;
const A: u64 = entry::A;
const D: u64 = entry::D;
const NX: u64 = entry::NX;

/// A processor in long mode with `pte` for the page at [`LINEAR`].
fn with_pte(pte: u64) -> Box<Cpu> {
    let cpu = cpu(Mode::Long(0));
    poke(&cpu, PD + 8, PT | P | W | U);
    poke(&cpu, PT, pte);
    cpu
}

fn error(result: Result<Walked, Exception>) -> Option<u32> {
    result.err().map(|e| {
        assert_eq!(e.vector, 14);
        e.error.expect("a page fault has an error code")
    })
}

#[test]
fn rights_and_error_codes() {
    use Access::{Fetch, Read, Write};
    use Privilege::{Supervisor, SupervisorAc, User};
    let (wp, smep, smap) = (1, 2, 4);
    let user = P | W | U | 0x5000;
    // (entry, on: WP/SMEP/SMAP, access, privilege, error code or success)
    let cases = [
        (0x5000, 0, Read, Supervisor, Some(0)),
        (0x5000, 0, Write, User, Some(6)),
        (0x5000, 0, Fetch, User, Some(0x14)),
        (user, 0, Read, User, None),
        (user, 0, Write, User, None),
        (user, 0, Fetch, User, None),
        (user & !W, 0, Write, User, Some(7)),
        (user & !W, wp, Write, Supervisor, Some(3)),
        (user & !W, 0, Write, Supervisor, None),
        (user & !U, 0, Read, User, Some(5)),
        (user & !U, 0, Fetch, User, Some(0x15)),
        (user | NX, 0, Fetch, User, Some(0x15)),
        (user | NX, 0, Fetch, Supervisor, Some(0x11)),
        (user | NX, 0, Read, User, None),
        (user, smep, Fetch, Supervisor, Some(0x11)),
        (user & !U, smep, Fetch, Supervisor, None),
        (user, smap, Read, Supervisor, Some(1)),
        (user, smap, Write, Supervisor, Some(3)),
        (user, smap, Read, SupervisorAc, None),
        (user, smap, Fetch, Supervisor, None),
        (user & !U, smap, Read, Supervisor, None),
        // Bits 51:40 are beyond MAXPHYADDR.
        (user | 1 << 40, 0, Read, Supervisor, Some(9)),
        (user | 1 << 51, 0, Write, User, Some(0xf)),
        (user | 1 << 52, 0, Read, User, None),
    ];
    for (pte, on, access, privilege, expected) in cases {
        let mut cpu = with_pte(pte);
        cpu.cr0 &= !cr0::WP;
        cpu.cr0 |= if on & wp != 0 { cr0::WP } else { 0 };
        cpu.cr4 |= if on & smep != 0 { cr4::SMEP } else { 0 };
        cpu.cr4 |= if on & smap != 0 { cr4::SMAP } else { 0 };
        let result = cpu.walk(LINEAR + 0x123, access, privilege);
        if let Err(e) = &result {
            assert_eq!(e.payload, LINEAR + 0x123);
        }
        assert_eq!(error(result), expected, "{pte:#x} {on} {access:?} {privilege:?}");
    }
}

#[test]
fn nx_is_reserved_without_nxe_and_fetch_not_told() {
    let mut cpu = with_pte(P | W | U | NX | 0x5000);
    cpu.efer &= !efer::NXE;
    assert_eq!(error(cpu.walk(LINEAR, Access::Read, Privilege::User)), Some(0xd));
    poke(&cpu, PT, 0u64);
    assert_eq!(error(cpu.walk(LINEAR, Access::Fetch, Privilege::User)), Some(4));
    cpu.cr4 |= cr4::SMEP;
    assert_eq!(error(cpu.walk(LINEAR, Access::Fetch, Privilege::User)), Some(0x14));
}

#[test]
fn rights_are_the_least_of_all_levels() {
    for (bit, access, expected) in [(W, Access::Write, 7), (U, Access::Read, 5)] {
        for level in [PAGES, PAGES + 0x1000, PD + 8] {
            let mut cpu = with_pte(P | W | U | 0x5000);
            poke(&cpu, level, peek(&cpu, level) & !bit);
            assert_eq!(error(cpu.walk(LINEAR, access, Privilege::User)), Some(expected), "{level:#x}");
        }
    }
    let mut cpu = with_pte(P | W | U | 0x5000);
    poke(&cpu, PAGES, peek(&cpu, PAGES) | NX);
    assert_eq!(error(cpu.walk(LINEAR, Access::Fetch, Privilege::User)), Some(0x15));
}

#[test]
fn accessed_and_dirty() {
    let mut cpu = with_pte(P | W | U | 0x5000);
    let walked = cpu.walk(LINEAR, Access::Read, Privilege::User).unwrap();
    assert_eq!((walked.physical, walked.readable, walked.writable), (0x5000, true, false));
    assert_eq!(peek(&cpu, PT) & (A | D), A);
    for level in [PAGES, PAGES + 0x1000, PD + 8] {
        assert_eq!(peek(&cpu, level) & (A | D), A, "{level:#x}");
    }
    let walked = cpu.walk(LINEAR, Access::Write, Privilege::User).unwrap();
    assert!(walked.writable);
    assert_eq!(peek(&cpu, PT) & (A | D), A | D);
    // Now that it is dirty, a load's walk may say so.
    assert!(cpu.walk(LINEAR, Access::Read, Privilege::User).unwrap().writable);
}

#[test]
fn a_fault_leaves_the_flags_alone() {
    let mut cpu = with_pte(P | U | 0x5000);
    assert_eq!(error(cpu.walk(LINEAR, Access::Write, Privilege::User)), Some(7));
    assert_eq!(peek(&cpu, PT) & (A | D), 0);
}

#[test]
fn large_pages_and_their_reserved_bits() {
    let mut cpu = with_pte(0);
    poke(&cpu, PD + 8, 0x20_0000 | P | W | U | entry::PS | entry::G);
    let walked = cpu.walk(LINEAR + 0x1_2345, Access::Write, Privilege::User).unwrap();
    assert_eq!((walked.physical, walked.large, walked.global), (0x21_2000, true, false));
    assert_eq!(peek(&cpu, PD + 8) & (A | D), A | D);
    cpu.cr4 |= cr4::PGE;
    assert!(cpu.walk(LINEAR, Access::Read, Privilege::User).unwrap().global);
    // Bit 12 is PAT; 13 to 20 are reserved.
    poke(&cpu, PD + 8, 0x20_0000 | 1 << 12 | P | U | entry::PS);
    assert_eq!(cpu.walk(LINEAR, Access::Read, Privilege::User).unwrap().physical, 0x20_0000);
    for bit in 13..21 {
        poke(&cpu, PD + 8, 0x20_0000 | 1 << bit | P | U | entry::PS);
        assert_eq!(error(cpu.walk(LINEAR, Access::Read, Privilege::User)), Some(0xd), "bit {bit}");
    }
    // 1 GiB, where the processor has it.
    poke(&cpu, PAGES + 0x1000, P | U | entry::PS);
    assert_eq!(cpu.walk(0x3456_7000, Access::Read, Privilege::User).unwrap().physical, 0x3456_7000);
    poke(&cpu, PAGES + 0x1000, 1 << 29 | P | U | entry::PS);
    assert_eq!(error(cpu.walk(LINEAR, Access::Read, Privilege::User)), Some(0xd));
    poke(&cpu, PAGES + 0x1000, P | U | entry::PS);
    cpu.features.pages_1g = false;
    assert_eq!(error(cpu.walk(LINEAR, Access::Read, Privilege::User)), Some(0xd));
    poke(&cpu, PAGES, peek(&cpu, PAGES) | entry::PS);
    assert_eq!(error(cpu.walk(LINEAR, Access::Read, Privilege::User)), Some(0xd));
}

/// A processor in 32-bit protected mode with paging on and CR3 at [`PAGES`].
fn legacy(cr4: u64) -> Box<Cpu> {
    let mut cpu = cpu(Mode::Protected(0));
    cpu.cr0 |= cr0::PG;
    cpu.cr4 = cr4;
    cpu.cr3 = PAGES;
    cpu
}

#[test]
fn paging_32bit() {
    let mut cpu = legacy(0);
    poke(&cpu, PAGES + 4, (PT | P | W | U) as u32);
    poke(&cpu, PT + 4, 0x5000 | (P | W) as u32);
    let walked = cpu.walk(0x40_1abc, Access::Write, Privilege::Supervisor).unwrap();
    assert_eq!((walked.physical, walked.large), (0x5000, false));
    assert_eq!(peek(&cpu, PT + 4) as u32, 0x5000 | (P | W | A | D) as u32);
    assert_eq!(peek(&cpu, PAGES + 4) as u32, (PT | P | W | U | A) as u32);
    assert_eq!(error(cpu.walk(0x40_1abc, Access::Fetch, Privilege::User)), Some(5));
    // The neighbour in the same eight bytes is another entry.
    assert_eq!(error(cpu.walk(0x40_2000, Access::Read, Privilege::User)), Some(4));
}

#[test]
fn paging_32bit_large() {
    // Without CR4.PSE the PS bit is ignored: the entry points at a table.
    let mut cpu = legacy(0);
    poke(&cpu, PAGES + 4, (PT | P | W | entry::PS) as u32);
    assert_eq!(error(cpu.walk(0x40_0000, Access::Read, Privilege::Supervisor)), Some(0));
    cpu.cr4 = cr4::PSE;
    poke(&cpu, PAGES + 4, 0x40_0000 | (P | W | entry::PS) as u32);
    let walked = cpu.walk(0x7f_f123, Access::Read, Privilege::Supervisor).unwrap();
    assert_eq!((walked.physical, walked.large), (0x7f_f000, true));
    // PSE-36: bits 20:13 are 39:32 of the address.
    poke(&cpu, PAGES + 4, 0x40_0000 | 0xff << 13 | (P | entry::PS) as u32);
    assert_eq!(cpu.walk(0x40_0000, Access::Read, Privilege::Supervisor).unwrap().physical, 0xff_0040_0000);
    poke(&cpu, PAGES + 4, 0x40_0000 | 1 << 21 | (P | entry::PS) as u32);
    assert_eq!(error(cpu.walk(0x40_0000, Access::Read, Privilege::Supervisor)), Some(9));
    cpu.features.physical_bits = 36;
    poke(&cpu, PAGES + 4, 0x40_0000 | 1 << 17 | (P | entry::PS) as u32);
    assert_eq!(error(cpu.walk(0x40_0000, Access::Read, Privilege::Supervisor)), Some(9));
}

#[test]
fn paging_pae() {
    let mut cpu = legacy(cr4::PAE);
    poke(&cpu, PAGES + 0x28, PD | P);
    cpu.pdptes = cpu.load_pdptes(PAGES + 0x20).unwrap();
    assert_eq!(cpu.pdptes, [0, PD | P, 0, 0]);
    poke(&cpu, PD + 8, PT | P | W | U);
    poke(&cpu, PT, 0x5000 | P | W | U);
    let linear = 0x4020_0000;
    assert_eq!(cpu.walk(linear, Access::Write, Privilege::User).unwrap().physical, 0x5000);
    assert_eq!(error(cpu.walk(0x8020_0000, Access::Write, Privilege::User)), Some(6));
    // Bits 62:52 are ignored in long mode and reserved here; so is 63 without NXE.
    for bit in [40, 52, 62, 63] {
        poke(&cpu, PT, 0x5000 | P | W | U | 1 << bit);
        assert_eq!(error(cpu.walk(linear, Access::Read, Privilege::User)), Some(0xd), "bit {bit}");
    }
    poke(&cpu, PD + 8, 0x20_0000 | P | W | U | entry::PS);
    assert_eq!(cpu.walk(linear + 0x3000, Access::Read, Privilege::User).unwrap().physical, 0x20_3000);
}

#[test]
fn page_directory_pointers_are_checked_when_loaded() {
    let mut cpu = legacy(cr4::PAE);
    for bit in [1, 2, 5, 6, 7, 8, 40, 52, 63] {
        poke(&cpu, PAGES, PD | P | 1 << bit);
        assert_eq!(cpu.load_pdptes(PAGES), Err(Exception::GP0), "bit {bit}");
        poke(&cpu, PAGES, PD | 1 << bit);
        assert!(cpu.load_pdptes(PAGES).is_ok(), "bit {bit} of one that is not present");
    }
    for bit in [3, 4, 9, 10, 11] {
        poke(&cpu, PAGES, PD | P | 1 << bit);
        assert!(cpu.load_pdptes(PAGES).is_ok(), "bit {bit}");
    }
}

#[test]
fn without_paging_linear_is_physical() {
    let mut cpu = cpu(Mode::Real);
    let walked = cpu.walk(0xffff_fff0, Access::Fetch, Privilege::Supervisor).unwrap();
    assert_eq!((walked.physical, walked.writable, walked.executable), (0xffff_f000, true, true));
}

#[test]
fn tables_outside_of_memory_read_as_all_ones() {
    let mut cpu = with_pte(0);
    poke(&cpu, PD + 8, 0x8000_0000 | P | W | U);
    assert_eq!(error(cpu.walk(LINEAR, Access::Read, Privilege::Supervisor)), Some(9));
}

#[test]
fn smap_follows_ac() {
    let mut cpu = with_pte(P | W | U | 0x5000);
    cpu.cr4 |= cr4::SMAP;
    assert!(cpu.load::<u8>(LINEAR).is_err());
    cpu.rflags |= rflags::AC;
    assert!(cpu.load::<u8>(LINEAR).is_ok());
    // Implicit accesses are never let through.
    assert!(cpu.load_system::<u8>(LINEAR).is_err());
}
