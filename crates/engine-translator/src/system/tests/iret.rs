use purlin_arch::x86_64::regs::{
    cr4,
    gpr::RSP,
    rflags::{AC, CF, FIXED, ID, IF, IOPL, NT, RF, TF, VIF, VIP, VM},
    seg::{CS, DS, ES, FS, GS, SS},
};

use crate::{
    cpu::{Cpu, Segment},
    debug::dr6,
    exception::Exception,
    testing::{
        CODE, Mode, STACK, cpu, poke,
        selector::{CODE32, CODE64, DATA, USER_CODE32, USER_CODE64, USER_DATA},
        step,
    },
};

const IRETQ: &[u8] = b"\x48\xcf";
/// IRETD in 32-bit code, IRETD in 64-bit code, IRET in 16-bit code.
const IRET: &[u8] = b"\xcf";
const ALL: u64 = 0xffff_ffff & !(VM | NT);

/// Puts `frame` on the stack in pieces of `size` bytes.
fn push_frame(cpu: &Cpu, size: usize, frame: &[u64]) {
    for (i, value) in frame.iter().enumerate() {
        poke(cpu, STACK + (i * size) as u64, &value.to_le_bytes()[..size]);
    }
}

#[test]
fn long_mode_to_user() {
    let mut cpu = cpu(Mode::Long(0));
    cpu.nmi_masked = true;
    cpu.seg[FS] = Segment { base: 0x7000, ..Segment::null(3) };
    push_frame(&cpu, 8, &[0xa000, u64::from(USER_CODE64), FIXED | IF | RF, 0x6000, u64::from(USER_DATA)]);
    step(&mut cpu, IRETQ).unwrap();
    assert_eq!((cpu.rip, cpu.cpl, cpu.gpr[RSP]), (0xa000, 3, 0x6000));
    assert_eq!((cpu.seg[CS].selector, cpu.seg[SS].selector), (USER_CODE64, USER_DATA));
    // RF stays for the instruction that is returned to.
    assert_eq!(cpu.rflags, FIXED | IF | RF);
    assert!(!cpu.nmi_masked);
    assert_eq!(cpu.seg[DS], Segment::null(0), "of level 0");
    assert_eq!((cpu.seg[FS].selector, cpu.seg[FS].base), (0, 0x7000), "null already: the selector becomes 0");
}

#[test]
fn long_mode_at_one_level_takes_the_stack_too() {
    let mut cpu = cpu(Mode::Long(0));
    push_frame(&cpu, 8, &[0xa000, u64::from(CODE64), FIXED, 0x6005, 0]);
    step(&mut cpu, IRETQ).unwrap();
    assert_eq!((cpu.rip, cpu.cpl, cpu.gpr[RSP]), (0xa000, 0, 0x6005));
    assert_eq!((cpu.seg[SS].selector, cpu.seg[SS].unusable()), (0, true));
}

#[test]
fn long_mode_to_compatibility_code() {
    let mut cpu = cpu(Mode::Long(0));
    push_frame(&cpu, 8, &[0xa000, u64::from(USER_CODE32), FIXED, 0x1_0000_6000, u64::from(USER_DATA)]);
    step(&mut cpu, IRETQ).unwrap();
    assert_eq!((cpu.rip, cpu.cpl, cpu.gpr[RSP], cpu.code64()), (0xa000, 3, 0x6000, false));
}

#[test]
fn faults_in_long_mode() {
    let gp = |selector| Exception::gp(selector);
    let user = u64::from(USER_CODE64);
    let data = u64::from(USER_DATA);
    let cases = [
        ([0x8000_0000_0000, user, FIXED, 0x6000, data], Exception::GP0),
        ([0x1_0000_0000, u64::from(USER_CODE32), FIXED, 0x6000, data], Exception::GP0),
        ([0xa000, 0, FIXED, 0x6000, data], Exception::GP0),
        ([0xa000, u64::from(USER_DATA), FIXED, 0x6000, data], gp(USER_DATA)),
        ([0xa000, user, FIXED, 0x6000, 3], Exception::GP0),
        ([0xa000, user, FIXED, 0x6000, u64::from(DATA)], gp(DATA)),
        ([0xa000, u64::from(CODE32), FIXED, 0x6000, 0], Exception::GP0),
        ([0xa000, u64::from(CODE64), FIXED, 0x6000, 3], Exception::GP0),
    ];
    for (frame, expected) in cases {
        let mut cpu = cpu(Mode::Long(0));
        cpu.nmi_masked = true;
        push_frame(&cpu, 8, &frame);
        assert_eq!(step(&mut cpu, IRETQ), Err(expected), "{frame:x?}");
        assert_eq!((cpu.rip, cpu.gpr[RSP], cpu.cpl, cpu.rflags), (CODE, STACK, 0, FIXED));
        assert!(!cpu.nmi_masked, "even so");
    }
    let mut nested = cpu(Mode::Long(0));
    nested.rflags |= NT;
    assert_eq!(step(&mut nested, IRETQ), Err(Exception::GP0));
}

/// SDM vol. 2, IRET: which flags each level takes over from an image of all ones.
#[test]
fn flags_by_level() {
    let always = 0x0dd5 | FIXED | RF | AC | ID;
    // (mode, flags before, bytes, frame's CS, flags after)
    let cases: [(Mode, u64, &[u8], u16, u64); 6] = [
        (Mode::Protected(0), 0, IRET, CODE32, always | IF | IOPL | VIF | VIP),
        (Mode::Protected(0), 0, b"\x66\xcf", CODE32, 0x0dd5 | FIXED | IF | IOPL),
        (Mode::Protected(3), 0, IRET, USER_CODE32, always),
        (Mode::Protected(3), IF, IRET, USER_CODE32, always | IF),
        (Mode::Protected(3), IOPL, IRET, USER_CODE32, always | IOPL | IF),
        // The level that counts is the one before the return.
        (Mode::Protected(0), 0, IRET, USER_CODE32, always | IF | IOPL | VIF | VIP),
    ];
    for (mode, before, bytes, cs, after) in cases {
        let mut cpu = cpu(mode);
        cpu.rflags |= before;
        let size = if bytes.len() == 1 { 4 } else { 2 };
        push_frame(&cpu, size, &[0xa000, u64::from(cs), ALL, 0x6000, u64::from(USER_DATA)]);
        step(&mut cpu, bytes).unwrap();
        assert_eq!(cpu.rflags, after, "{mode:?} {before:#x} {bytes:02x?}");
        assert_eq!(cpu.rip, 0xa000);
    }
}

#[test]
fn an_iret_that_ends_stepping_is_stepped() {
    let mut cpu = cpu(Mode::Protected(0));
    cpu.rflags |= TF;
    push_frame(&cpu, 4, &[0xa000, u64::from(CODE32), FIXED]);
    step(&mut cpu, IRET).unwrap();
    assert_eq!((cpu.pending_debug, cpu.gpr[RSP]), (dr6::BS, STACK + 12));
}

#[test]
fn real_mode() {
    let mut cpu = cpu(Mode::Real);
    push_frame(&cpu, 2, &[0x4567, 0x123, 0xffff]);
    step(&mut cpu, IRET).unwrap();
    assert_eq!((cpu.rip, cpu.seg[CS].base, cpu.rflags), (0x4567, 0x1230, 0x7fd7));
    cpu.rflags = FIXED;
    cpu.gpr[RSP] = STACK;
    push_frame(&cpu, 4, &[0x4567, 0x123, 0xffff_ffff]);
    step(&mut cpu, b"\x66\xcf").unwrap();
    assert_eq!(cpu.rflags, 0x7fd7 | RF | AC | ID);
    cpu.gpr[RSP] = STACK;
    push_frame(&cpu, 4, &[0x1_0000, 0x123, 0]);
    assert_eq!(step(&mut cpu, b"\x66\xcf"), Err(Exception::GP0));
}

#[test]
fn to_v86_mode() {
    let mut cpu = cpu(Mode::Protected(0));
    let flags = FIXED | VM | IF | VIF | IOPL | CF;
    push_frame(&cpu, 4, &[0x4567, 0x123, flags, 0x6000, 1, 2, 3, 4, 5]);
    step(&mut cpu, IRET).unwrap();
    assert_eq!((cpu.rip, cpu.cpl, cpu.gpr[RSP], cpu.rflags), (0x4567, 3, 0x6000, flags));
    for (seg, selector) in [(CS, 0x123), (SS, 1), (ES, 2), (DS, 3), (FS, 4), (GS, 5)] {
        assert_eq!(cpu.seg[seg], Segment::v86(selector));
    }
    // Not from an outer level: VM is then just a bit that IRET leaves alone.
    let mut user = crate::testing::cpu(Mode::Protected(3));
    push_frame(&user, 4, &[0xa000, u64::from(USER_CODE32), FIXED | VM]);
    step(&mut user, IRET).unwrap();
    assert!(!user.v86());
    let mut beyond = crate::testing::cpu(Mode::Protected(0));
    push_frame(&beyond, 4, &[0x1_0000, 0x123, flags, 0x6000, 1, 2, 3, 4, 5]);
    assert_eq!(step(&mut beyond, IRET), Err(Exception::GP0));
}

#[test]
fn within_v86_mode() {
    let with = |flags: u64, vme: bool| {
        let mut cpu = cpu(Mode::V86);
        cpu.rflags |= flags;
        cpu.cr4 |= if vme { cr4::VME } else { 0 };
        cpu
    };
    let gp = Err(Exception::GP0);
    // (flags, VME, bytes, popped flags, flags after)
    let cases: [(u64, bool, &[u8], u64, Result<u64, Exception>); 8] = [
        (0, false, b"\xcf", FIXED, gp),
        (0, true, b"\x66\xcf", FIXED, gp),
        (IOPL, false, b"\xcf", IF | CF, Ok(IOPL | IF | CF)),
        (IOPL | VIP, false, b"\x66\xcf", VIF | AC | CF, Ok(IOPL | VIP | AC | CF)),
        (0, true, b"\xcf", IF | CF, Ok(VIF | CF)),
        (IF | VIF, true, b"\xcf", 0, Ok(IF)),
        (VIP, true, b"\xcf", IF, gp),
        (0, true, b"\xcf", TF, gp),
    ];
    for (flags, vme, bytes, popped, expected) in cases {
        let mut cpu = with(flags, vme);
        push_frame(&cpu, if bytes.len() == 1 { 2 } else { 4 }, &[0x4567, 0x123, popped]);
        let result = step(&mut cpu, bytes).map(|()| cpu.rflags);
        assert_eq!(result, expected.map(|f| f | FIXED | VM), "{flags:#x} {vme} {bytes:02x?} {popped:#x}");
        let expected = if result.is_ok() { (0x4567, 0x1230) } else { (CODE, 0) };
        assert_eq!((cpu.rip, cpu.seg[CS].base), expected);
    }
}
