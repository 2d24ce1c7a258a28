use purlin_arch::x86_64::regs::{
    cr4,
    gpr::RSP,
    rflags::{AC, CF, FIXED, ID, IF, IOPL, NT, RF, TF, VIF, VIP, VM},
};

use crate::{
    cpu::Cpu,
    debug::dr6,
    exception::Exception,
    testing::{Mode, STACK, cpu, peek, poke, step},
};

const CLI: &[u8] = b"\xfa";
const STI: &[u8] = b"\xfb";

/// SDM vol. 2, tables of CLI and STI: the outcome as RFLAGS, or #GP(0).
#[test]
fn cli_and_sti() {
    let gp = Err(Exception::GP0);
    // (mode, CR4, RFLAGS, instruction, IF and VIF after)
    let cases = [
        (Mode::Real, 0, IF, CLI, Ok(0)),
        (Mode::Protected(0), 0, IF, CLI, Ok(0)),
        (Mode::Protected(3), 0, IF, CLI, gp),
        (Mode::Protected(3), 0, IF | IOPL, CLI, Ok(0)),
        (Mode::Protected(3), cr4::PVI, IF | VIF, CLI, Ok(IF)),
        (Mode::Protected(3), cr4::PVI, IF, STI, Ok(IF | VIF)),
        (Mode::Protected(3), cr4::PVI, IF | VIP, STI, gp),
        (Mode::Protected(3), cr4::VME, IF, STI, gp),
        (Mode::Long(3), 0, 0, STI, gp),
        (Mode::Long(3), cr4::PVI, 0, STI, Ok(VIF)),
        (Mode::V86, 0, IF, CLI, gp),
        (Mode::V86, 0, IF | IOPL, CLI, Ok(0)),
        (Mode::V86, cr4::VME, IF | VIF, CLI, Ok(IF)),
        (Mode::V86, cr4::VME, IF, STI, Ok(IF | VIF)),
        (Mode::V86, cr4::VME, IF | VIP, STI, gp),
        (Mode::V86, cr4::PVI, IF, STI, gp),
    ];
    for (mode, cr4, flags, bytes, expected) in cases {
        let mut cpu = cpu(mode);
        cpu.cr4 |= cr4;
        cpu.rflags |= flags;
        let result = step(&mut cpu, bytes).map(|()| cpu.rflags & (IF | VIF));
        assert_eq!(result, expected, "{mode:?} {cr4:#x} {flags:#x} {bytes:02x?}");
    }
}

#[test]
fn sti_holds_interrupts_back_once() {
    let mut cpu = cpu(Mode::Long(0));
    step(&mut cpu, STI).unwrap();
    assert!(cpu.sti_shadow);
    // Not where interrupts were on already.
    step(&mut cpu, STI).unwrap();
    assert!(!cpu.sti_shadow);
}

/// Pops `image` with POPF of the given bytes; RFLAGS before were `flags`.
fn popf(mode: Mode, cr4: u64, flags: u64, bytes: &[u8], image: u64) -> Result<(Box<Cpu>, u64), Exception> {
    let mut cpu = cpu(mode);
    cpu.cr4 |= cr4;
    cpu.rflags |= flags;
    poke(&cpu, STACK, image);
    step(&mut cpu, bytes)?;
    let flags = cpu.rflags;
    Ok((cpu, flags))
}

/// SDM vol. 2, table 4-16.
#[test]
fn popf_changes_what_the_level_may() {
    let all = 0xffff_ffffu64;
    let always = 0x4dd5 | FIXED;
    // (mode, RFLAGS before, bytes, RFLAGS after an image of all ones)
    let cases: [(Mode, u64, &[u8], u64); 9] = [
        (Mode::Long(0), 0, b"\x9d", always | IF | IOPL | AC | ID),
        (Mode::Long(0), 0, b"\x66\x9d", always | IF | IOPL),
        (Mode::Long(3), 0, b"\x9d", always | AC | ID),
        (Mode::Long(3), IF, b"\x9d", always | IF | AC | ID),
        (Mode::Long(3), IOPL, b"\x9d", always | IOPL | IF | AC | ID),
        (Mode::Protected(0), VIF | VIP, b"\x9d", always | VIF | VIP | IF | IOPL | AC | ID),
        (Mode::Real, 0, b"\x66\x9d", always | IF | IOPL | AC | ID),
        (Mode::Real, 0, b"\x9d", always | IF | IOPL),
        (Mode::V86, IOPL, b"\x66\x9d", always | VM | IOPL | IF | AC | ID),
    ];
    for (mode, flags, bytes, expected) in cases {
        let (_, after) = popf(mode, 0, flags, bytes, all).unwrap();
        assert_eq!(after, expected, "{mode:?} {flags:#x} {bytes:02x?}");
    }
}

#[test]
fn popf_in_v86_mode_below_iopl_3() {
    let gp = Some(Exception::GP0);
    assert_eq!(popf(Mode::V86, 0, 0, b"\x9d", 0).err(), gp);
    assert_eq!(popf(Mode::V86, cr4::VME, 0, b"\x66\x9d", 0).err(), gp);
    assert_eq!(popf(Mode::V86, cr4::VME, 0, b"\x9d", TF).err(), gp);
    assert_eq!(popf(Mode::V86, cr4::VME, VIP, b"\x9d", IF).err(), gp);
    let (_, flags) = popf(Mode::V86, cr4::VME, IF, b"\x9d", CF | IF | IOPL).unwrap();
    assert_eq!(flags, FIXED | VM | IF | VIF | CF);
    let (_, flags) = popf(Mode::V86, cr4::VME, IF | VIF | VIP, b"\x9d", NT).unwrap();
    assert_eq!(flags, FIXED | VM | IF | VIP | NT);
}

#[test]
fn popf_that_ends_stepping_is_stepped() {
    let (cpu, _) = popf(Mode::Long(0), 0, TF, b"\x9d", 0).unwrap();
    assert_eq!(cpu.pending_debug, dr6::BS);
    let (cpu, _) = popf(Mode::Long(0), 0, 0, b"\x9d", TF).unwrap();
    assert_eq!(cpu.pending_debug, 0);
}

#[test]
fn pushf() {
    let mut long = cpu(Mode::Long(0));
    long.rflags |= RF | AC | IF;
    step(&mut long, b"\x9c").unwrap();
    assert_eq!(peek(&long, STACK - 8), FIXED | AC | IF);
    let mut v86 = cpu(Mode::V86);
    assert_eq!(step(&mut v86, b"\x9c"), Err(Exception::GP0));
    v86.cr4 |= cr4::VME;
    v86.rflags |= IF;
    assert_eq!(step(&mut v86, b"\x66\x9c"), Err(Exception::GP0));
    step(&mut v86, b"\x9c").unwrap();
    assert_eq!(peek(&v86, STACK - 2) as u16, (FIXED | IOPL) as u16);
    v86.rflags = v86.rflags & !IF | VIF;
    step(&mut v86, b"\x9c").unwrap();
    assert_eq!(peek(&v86, STACK - 4) as u16, (FIXED | IOPL | IF) as u16);
    v86.rflags |= IOPL;
    step(&mut v86, b"\x66\x9c").unwrap();
    assert_eq!((peek(&v86, STACK - 8) as u32, v86.gpr[RSP]), ((FIXED | IOPL | VIF) as u32, STACK - 8));
}

#[test]
fn stac_and_clac() {
    let mut kernel = cpu(Mode::Long(0));
    step(&mut kernel, b"\x0f\x01\xcb").unwrap();
    assert_ne!(kernel.rflags & AC, 0);
    step(&mut kernel, b"\x0f\x01\xca").unwrap();
    assert_eq!(kernel.rflags & AC, 0);
    assert_eq!(step(&mut cpu(Mode::Long(3)), b"\x0f\x01\xcb"), Err(Exception::UD));
    kernel.features.cr4 &= !cr4::SMAP;
    assert_eq!(step(&mut kernel, b"\x0f\x01\xcb"), Err(Exception::UD));
}
