use purlin_arch::x86_64::regs::{
    cr4, efer,
    gpr::{RAX, RCX, RDX, RSP},
    rflags::{AC, DF, FIXED, IF, RF, TF},
    seg::{CS, FS, GS, SS},
};

use crate::{
    cpu::Cpu,
    exception::Exception,
    testing::{CODE, Mode, STACK, cpu, step},
};

const SYSCALL: &[u8] = b"\x0f\x05";
const SYSRET: &[u8] = b"\x0f\x07";
const SYSRETQ: &[u8] = b"\x48\x0f\x07";
const R11: usize = 11;

/// Selectors as Linux sets them: kernel code 0x10, user code 0x23 (32-bit) and 0x33.
fn with_star(mode: Mode) -> Box<Cpu> {
    let mut cpu = cpu(mode);
    cpu.efer |= efer::SCE;
    cpu.msrs.star = 0x0023_0010_1234_5678;
    cpu.msrs.lstar = 0xffff_ffff_8100_0000;
    cpu.msrs.cstar = 0xffff_ffff_8200_0000;
    cpu.msrs.sfmask = IF | TF | DF;
    cpu
}

#[test]
fn syscall() {
    let mut long = with_star(Mode::Long(3));
    long.rflags |= IF | DF | AC | RF;
    step(&mut long, SYSCALL).unwrap();
    assert_eq!((long.rip, long.gpr[RCX], long.gpr[R11]), (long.msrs.lstar, CODE + 2, FIXED | IF | DF | AC));
    assert_eq!((long.rflags, long.cpl, long.gpr[RSP]), (FIXED | AC, 0, STACK));
    let (cs, ss) = (long.seg[CS], long.seg[SS]);
    assert_eq!((cs.selector, cs.base, cs.limit, cs.access), (0x10, 0, u32::MAX, 0xa09b));
    assert_eq!((ss.selector, ss.base, ss.limit, ss.access), (0x18, 0, u32::MAX, 0xc093));

    // AMD: from compatibility mode too, to CSTAR.
    let mut compatibility = with_star(Mode::Compatibility(3));
    step(&mut compatibility, SYSCALL).unwrap();
    assert_eq!((compatibility.rip, compatibility.code64()), (compatibility.msrs.cstar, true));

    let mut protected = with_star(Mode::Protected(3));
    protected.rflags |= IF | DF;
    protected.gpr[R11] = 77;
    step(&mut protected, SYSCALL).unwrap();
    assert_eq!((protected.rip, protected.gpr[RCX], protected.gpr[R11]), (0x1234_5678, CODE + 2, 77));
    assert_eq!((protected.rflags, protected.cpl, protected.seg[CS].access), (FIXED | DF, 0, 0xc09b));
}

#[test]
fn sysret() {
    for (bytes, cs, access, rip) in [(SYSRETQ, 0x33, 0xa0fb, 0x1_2345_6789), (SYSRET, 0x23, 0xc0fb, 0x2345_6789u64)] {
        let mut cpu = with_star(Mode::Long(0));
        cpu.gpr[RCX] = 0x1_2345_6789;
        cpu.gpr[R11] = u64::MAX;
        step(&mut cpu, bytes).unwrap();
        assert_eq!((cpu.rip, cpu.cpl, cpu.rflags), (rip, 3, 0x3c_7fd7));
        assert_eq!((cpu.seg[CS].selector, cpu.seg[CS].access), (cs, access));
        assert_eq!((cpu.seg[SS].selector, cpu.seg[SS].access), (0x2b, 0xc0f3));
    }
}

#[test]
fn sysret_to_a_non_canonical_address() {
    // AMD lets the fetch at CPL 3 fault, Intel SYSRET itself.
    for (amd, expected) in [(true, Ok(())), (false, Err(Exception::GP0))] {
        let mut cpu = with_star(Mode::Long(0));
        cpu.features.amd = amd;
        cpu.gpr[RCX] = 0x8000_0000_0000;
        assert_eq!(step(&mut cpu, SYSRETQ), expected);
    }
}

#[test]
fn refused() {
    let mut off = with_star(Mode::Long(3));
    off.efer &= !efer::SCE;
    assert_eq!(step(&mut off, SYSCALL), Err(Exception::UD));
    assert_eq!(step(&mut off, SYSRETQ), Err(Exception::UD));
    assert_eq!(step(&mut with_star(Mode::Long(3)), SYSRETQ), Err(Exception::GP0));
    assert_eq!(step(&mut with_star(Mode::Real), SYSCALL), Err(Exception::UD));
    assert_eq!(step(&mut with_star(Mode::V86), SYSCALL), Err(Exception::UD));
    let mut intel = with_star(Mode::Compatibility(3));
    intel.features.amd = false;
    assert_eq!(step(&mut intel, SYSCALL), Err(Exception::UD));
}

#[test]
fn sysenter_and_sysexit() {
    let mut cpu = with_star(Mode::Protected(3));
    assert_eq!(step(&mut cpu, b"\x0f\x34"), Err(Exception::GP0), "SYSENTER_CS is null");
    cpu.msrs.sysenter_cs = 0x0b;
    cpu.msrs.sysenter_esp = 0x7000;
    cpu.msrs.sysenter_eip = 0xa000;
    cpu.rflags |= IF;
    step(&mut cpu, b"\x0f\x34").unwrap();
    assert_eq!((cpu.cpl, cpu.rip, cpu.gpr[RSP], cpu.rflags), (0, 0xa000, 0x7000, FIXED));
    assert_eq!((cpu.seg[CS].selector, cpu.seg[SS].selector), (8, 0x10));
    (cpu.gpr[RDX], cpu.gpr[RCX]) = (CODE, STACK);
    step(&mut cpu, b"\x0f\x35").unwrap();
    assert_eq!((cpu.cpl, cpu.rip, cpu.gpr[RSP]), (3, CODE, STACK));
    assert_eq!((cpu.seg[CS].selector, cpu.seg[SS].selector), (0x1b, 0x23));
    assert_eq!(step(&mut cpu, b"\x0f\x35"), Err(Exception::GP0), "at CPL 3");
    // AMD has neither in long mode.
    assert_eq!(step(&mut with_star(Mode::Long(3)), b"\x0f\x34"), Err(Exception::UD));
    assert_eq!(step(&mut with_star(Mode::Long(3)), b"\x0f\x35"), Err(Exception::GP0), "the level comes first");
    assert_eq!(step(&mut with_star(Mode::Long(0)), b"\x0f\x35"), Err(Exception::UD));
    let mut intel = with_star(Mode::Long(3));
    intel.features.amd = false;
    intel.msrs.sysenter_cs = 8;
    intel.msrs.sysenter_eip = 0xffff_ffff_8100_0000;
    step(&mut intel, b"\x0f\x34").unwrap();
    assert_eq!((intel.rip, intel.code64()), (0xffff_ffff_8100_0000, true));
}

#[test]
fn bases() {
    let mut kernel = cpu(Mode::Long(0));
    kernel.seg[GS].base = 1;
    kernel.msrs.kernel_gs_base = 2;
    step(&mut kernel, b"\x0f\x01\xf8").unwrap();
    assert_eq!((kernel.seg[GS].base, kernel.msrs.kernel_gs_base), (2, 1));
    assert_eq!(step(&mut cpu(Mode::Long(3)), b"\x0f\x01\xf8"), Err(Exception::GP0));

    let mut user = cpu(Mode::Long(3));
    assert_eq!(step(&mut user, b"\xf3\x48\x0f\xae\xd0"), Err(Exception::UD), "without CR4.FSGSBASE");
    user.cr4 |= cr4::FSGSBASE;
    user.gpr[RAX] = 0xffff_8000_1234_5678;
    step(&mut user, b"\xf3\x48\x0f\xae\xd0").unwrap();
    assert_eq!(user.seg[FS].base, 0xffff_8000_1234_5678);
    step(&mut user, b"\xf3\x0f\xae\xd8").unwrap();
    assert_eq!(user.seg[GS].base, 0x1234_5678);
    step(&mut user, b"\xf3\x48\x0f\xae\xc1").unwrap();
    assert_eq!(user.gpr[RCX], 0xffff_8000_1234_5678);
    user.gpr[RAX] = 0x8000_0000_0000;
    assert_eq!(step(&mut user, b"\xf3\x48\x0f\xae\xd0"), Err(Exception::GP0));
}
