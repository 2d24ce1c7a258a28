use purlin_arch::x86_64::regs::{
    gpr::{RAX, RCX, RSP},
    rflags::{CF, FIXED, OF, PF, SF, ZF},
    seg::CS,
};

use crate::{
    exception::Exception,
    testing::{CODE, Mode, STACK, cpu, poke, step},
};

/// SDM vol. 1 appendix B: for each condition code the flags with which it holds.
#[test]
fn conditions() {
    let holds: [fn(u64) -> bool; 8] = [
        |f| f & OF != 0,
        |f| f & CF != 0,
        |f| f & ZF != 0,
        |f| f & CF != 0 || f & ZF != 0,
        |f| f & SF != 0,
        |f| f & PF != 0,
        |f| (f & SF != 0) != (f & OF != 0),
        |f| f & ZF != 0 || (f & SF != 0) != (f & OF != 0),
    ];
    let flags = [CF, PF, ZF, SF, OF];
    for set in 0..32u32 {
        let flags = flags.iter().enumerate().filter(|(i, _)| set >> i & 1 != 0).fold(0, |f, (_, b)| f | b);
        for code in 0..16u8 {
            let mut cpu = cpu(Mode::Long(0));
            cpu.rflags = FIXED | flags;
            step(&mut cpu, &[0x70 + code, 0x10]).unwrap();
            let taken = holds[usize::from(code / 2)](flags) != (code % 2 == 1);
            assert_eq!(cpu.rip, CODE + if taken { 0x12 } else { 2 }, "condition {code}, flags {flags:#x}");
        }
    }
}

#[test]
fn loops_count_by_address_size() {
    // (mode, bytes, RCX, ZF, RCX after, taken)
    let cases: [(Mode, &[u8], u64, u64, u64, bool); 10] = [
        (Mode::Long(0), b"\xe2\x10", 2, 0, 1, true),
        (Mode::Long(0), b"\xe2\x10", 1, 0, 0, false),
        (Mode::Long(0), b"\xe2\x10", 0, 0, u64::MAX, true),
        (Mode::Long(0), b"\x67\xe2\x10", 0xf_0000_0000, 0, 0xffff_ffff, true),
        (Mode::Protected(0), b"\x67\xe2\x10", 0x5_0001, 0, 0x5_0000, false),
        (Mode::Real, b"\xe2\x10", 0x5_0001, 0, 0x5_0000, false),
        (Mode::Long(0), b"\xe1\x10", 2, ZF, 1, true),
        (Mode::Long(0), b"\xe1\x10", 2, 0, 1, false),
        (Mode::Long(0), b"\xe0\x10", 2, ZF, 1, false),
        (Mode::Long(0), b"\xe0\x10", 2, 0, 1, true),
    ];
    for (mode, bytes, rcx, zf, after, taken) in cases {
        let mut cpu = cpu(mode);
        cpu.gpr[RCX] = rcx;
        cpu.rflags |= zf;
        step(&mut cpu, bytes).unwrap();
        let next = CODE + bytes.len() as u64;
        assert_eq!((cpu.gpr[RCX], cpu.rip), (after, next + if taken { 0x10 } else { 0 }), "{mode:?} {bytes:02x?}");
    }
}

#[test]
fn jcxz() {
    let cases: [(Mode, &[u8], u64, bool); 4] = [
        (Mode::Long(0), b"\xe3\x10", 1 << 32, false),
        (Mode::Long(0), b"\x67\xe3\x10", 1 << 32, true),
        (Mode::Protected(0), b"\x67\xe3\x10", 0x1_0000, true),
        (Mode::Real, b"\xe3\x10", 0x1_0001, false),
    ];
    for (mode, bytes, rcx, taken) in cases {
        let mut cpu = cpu(mode);
        cpu.gpr[RCX] = rcx;
        step(&mut cpu, bytes).unwrap();
        let next = CODE + bytes.len() as u64;
        assert_eq!(cpu.rip, next + if taken { 0x10 } else { 0 }, "{mode:?} {bytes:02x?}");
    }
}

#[test]
fn call_and_ret() {
    let mut cpu = cpu(Mode::Long(0));
    step(&mut cpu, b"\xe8\x00\x01\x00\x00").unwrap();
    assert_eq!((cpu.rip, cpu.gpr[RSP]), (CODE + 0x105, STACK - 8));
    step(&mut cpu, b"\xc2\x10\x00").unwrap();
    assert_eq!((cpu.rip, cpu.gpr[RSP]), (CODE + 5, STACK + 0x10));
    // Through a register and through memory.
    cpu.gpr[RAX] = 0xa000;
    step(&mut cpu, b"\xff\xd0").unwrap();
    assert_eq!(cpu.rip, 0xa000);
    poke(&cpu, 0x5000, 0xb000u64);
    step(&mut cpu, b"\xff\x24\x25\x00\x50\x00\x00").unwrap();
    assert_eq!(cpu.rip, 0xb000);
}

#[test]
fn operand_size_cuts_the_target() {
    let mut cpu = cpu(Mode::Protected(0));
    cpu.rip = 0x12_9000;
    step(&mut cpu, b"\x66\xe8\x00\x01").unwrap();
    assert_eq!((cpu.rip, cpu.gpr[RSP]), (0x9104, STACK - 2));
    assert_eq!(cpu.pop(2), Ok(0x9004));
}

#[test]
fn targets_outside_fault_and_change_nothing() {
    let mut long = cpu(Mode::Long(0));
    long.gpr[RAX] = 0x8000_0000_0000;
    poke(&long, STACK, 0x8000_0000_0000u64);
    for bytes in [&b"\xff\xe0"[..], b"\xff\xd0", b"\xc3"] {
        assert_eq!(step(&mut long, bytes), Err(Exception::GP0), "{bytes:02x?}");
        assert_eq!((long.rip, long.gpr[RSP]), (CODE, STACK));
    }
    let mut protected = cpu(Mode::Protected(0));
    protected.seg[CS].limit = 0x9fff;
    protected.gpr[RCX] = 5;
    for bytes in [&b"\xe9\x00\x10\x00\x00"[..], b"\xe8\x00\x10\x00\x00", b"\x0f\x85\x00\x10\x00\x00"] {
        assert_eq!(step(&mut protected, bytes), Err(Exception::GP0), "{bytes:02x?}");
        assert_eq!((protected.rip, protected.gpr[RSP]), (CODE, STACK));
    }
    protected.rip = 0x9ff0;
    assert_eq!(step(&mut protected, b"\xe2\x7f"), Err(Exception::GP0));
    assert_eq!(protected.gpr[RCX], 5);
}
