use super::*;
use crate::testing::{CODE, Mode, cpu, step};

/// DR7 with breakpoint `n` enabled, of the given kind and length field.
fn enabled(n: usize, kind: u64, length: u64) -> u64 {
    dr7::FIXED | 1 << (2 * n) | (kind | length << 2) << (16 + 4 * n)
}

#[test]
fn instruction_breakpoints() {
    let mut cpu = cpu(Mode::Long(0));
    cpu.dr[2] = CODE;
    cpu.dr7 = enabled(2, INSTRUCTION, 0);
    assert_eq!(instruction_breakpoint(&cpu), Some(Exception::debug(4)));
    cpu.rflags |= rflags::RF;
    assert_eq!(instruction_breakpoint(&cpu), None);
    cpu.rflags &= !rflags::RF;
    cpu.mov_ss_shadow = true;
    assert_eq!(instruction_breakpoint(&cpu), None);
    cpu.mov_ss_shadow = false;
    cpu.rip += 1;
    assert_eq!(instruction_breakpoint(&cpu), None);
}

#[test]
fn data_breakpoints_cover_their_length() {
    // Length fields: 0 is one byte, 1 two, 3 four, 2 eight (SDM vol. 3B 17.2.4).
    for (length, bytes) in [(0, 1u64), (1, 2), (3, 4), (2, 8)] {
        for (address, size) in [(0x4ff8u64, 8usize), (0x5000, 1), (0x5007, 1), (0x5008, 8), (0x4ffe, 4)] {
            let mut cpu = cpu(Mode::Long(0));
            cpu.dr[1] = 0x5000;
            cpu.dr7 = enabled(1, LOADS_AND_STORES, length);
            data_breakpoints(&mut cpu, address, size, Access::Read);
            let hit = address < 0x5000 + bytes && 0x5000 < address + size as u64;
            assert_eq!(cpu.pending_debug, if hit { 2 } else { 0 }, "{bytes} bytes, {size} at {address:#x}");
        }
    }
}

#[test]
fn stores_and_loads_are_told_apart() {
    for (kind, access, hit) in [
        (STORES, Access::Read, 0),
        (STORES, Access::Write, 1),
        (LOADS_AND_STORES, Access::Read, 1),
        (LOADS_AND_STORES, Access::Write, 1),
        (INSTRUCTION, Access::Write, 0),
    ] {
        let mut cpu = cpu(Mode::Long(0));
        cpu.dr[0] = 0x5000;
        cpu.dr7 = enabled(0, kind, 0);
        data_breakpoints(&mut cpu, 0x5000, 1, access);
        assert_eq!(cpu.pending_debug, hit, "{kind} {access:?}");
    }
}

#[test]
fn traps_come_after_the_instruction() {
    let mut cpu = cpu(Mode::Long(0));
    cpu.dr[0] = crate::testing::STACK - 8;
    cpu.dr7 = enabled(0, STORES, 2);
    // PUSH RAX
    step(&mut cpu, b"\x50").unwrap();
    assert_eq!(trap_after(&mut cpu, false), Some(Exception::debug(1)));
    assert_eq!(trap_after(&mut cpu, false), None);
    cpu.rflags |= rflags::TF;
    step(&mut cpu, b"\x50").unwrap();
    assert_eq!(trap_after(&mut cpu, true), Some(Exception::debug(dr6::BS)));
}

/// SDM vol. 3B 17.3.1.2: INT n clears TF, its handler is not entered with a trap.
#[test]
fn software_interrupts_are_not_stepped() {
    let mut cpu = cpu(Mode::Real);
    cpu.rflags |= rflags::TF;
    step(&mut cpu, b"\xcd\x21").unwrap();
    assert_eq!(trap_after(&mut cpu, true), None);
}

#[test]
fn an_instruction_that_faults_hits_no_data_breakpoint() {
    let mut cpu = cpu(Mode::Long(0));
    cpu.dr[0] = 0x5000;
    cpu.dr7 = enabled(0, LOADS_AND_STORES, 0);
    cpu.gpr[purlin_arch::x86_64::regs::gpr::RSP] = 0x4000_0000;
    // PUSH [0x5000], where there is no stack
    assert!(step(&mut cpu, b"\xff\x34\x25\x00\x50\x00\x00").is_err());
    assert_eq!(cpu.pending_debug, 0);
}

#[test]
fn a_load_of_ss_holds_traps_back() {
    let mut cpu = cpu(Mode::Protected(0));
    cpu.dr[0] = 0x5000;
    cpu.dr7 = enabled(0, LOADS_AND_STORES, 0);
    crate::testing::poke(&cpu, 0x5000, crate::testing::selector::DATA);
    // MOV SS, [0x5000]
    step(&mut cpu, b"\x8e\x15\x00\x50\x00\x00").unwrap();
    assert!(cpu.mov_ss_shadow);
    assert_eq!(trap_after(&mut cpu, true), None);
    // PUSH EAX
    step(&mut cpu, b"\x50").unwrap();
    assert_eq!(trap_after(&mut cpu, false), Some(Exception::debug(1)));
}
