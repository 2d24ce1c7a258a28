use purlin_arch::x86_64::regs::{
    gpr::{RAX, RBP, RBX, RCX, RSP},
    seg::{DS, FS, SS},
};

use super::*;
use crate::testing::{CODE, Mode, cpu, decode, poke, step};

#[test]
fn registers_of_all_sizes() {
    let mut cpu = cpu(Mode::Long(0));
    cpu.gpr[RAX] = 0x1122_3344_5566_7788;
    cpu.gpr[RSP] = 0x99;
    let reads = [
        (Register::AL, 0x88),
        (Register::AH, 0x77),
        (Register::AX, 0x7788),
        (Register::EAX, 0x5566_7788),
        (Register::RAX, 0x1122_3344_5566_7788),
        (Register::SPL, 0x99),
    ];
    for (register, expected) in reads {
        assert_eq!(cpu.register(register), expected, "{register:?}");
    }
    let writes = [
        (Register::AL, 0x1122_3344_5566_77ff),
        (Register::AH, 0x1122_3344_5566_ff88),
        (Register::AX, 0x1122_3344_5566_ffff),
        (Register::EAX, 0xffff_ffff),
        (Register::RAX, u64::MAX),
    ];
    for (register, expected) in writes {
        cpu.gpr[RAX] = 0x1122_3344_5566_7788;
        cpu.set_register(register, u64::MAX);
        assert_eq!(cpu.gpr[RAX], expected, "{register:?}");
    }
    cpu.set_register(Register::R8L, 0x42);
    assert_eq!(cpu.gpr[8], 0x42);
}

#[test]
fn effective_addresses() {
    // PUSH m with all kinds of addresses: (mode, bytes, segment, offset)
    let cases: [(Mode, &[u8], usize, u64); 12] = [
        (Mode::Long(0), b"\xff\x73\x10", DS, 0xffff_ffff_0000_0010),
        (Mode::Long(0), b"\xff\x75\xf0", SS, 0x1ff0),
        (Mode::Long(0), b"\x67\xff\x73\x10", DS, 0x10),
        (Mode::Long(0), b"\xff\x74\x8b\x10", DS, 0xffff_ffff_0000_0410),
        (Mode::Long(0), b"\xff\x35\x10\x00\x00\x00", DS, CODE + 6 + 0x10),
        (Mode::Long(0), b"\x67\xff\x35\xf0\xff\xff\xff", DS, CODE + 7 - 0x10),
        (Mode::Long(0), b"\x64\xff\x34\x25\xf0\xff\xff\xff", FS, 0xffff_ffff_ffff_fff0),
        (Mode::Long(0), b"\x67\xff\x34\x25\xf0\xff\xff\xff", DS, 0xffff_fff0),
        (Mode::Protected(0), b"\xff\x75\xf0", SS, 0x1ff0),
        (Mode::Protected(0), b"\x3e\xff\x75\xf0", DS, 0x1ff0),
        (Mode::Real, b"\xff\x76\xf0", SS, 0x1ff0),
        (Mode::Real, b"\xff\x76\x7f", SS, 0x207f),
    ];
    for (mode, bytes, segment, offset) in cases {
        let mut cpu = cpu(mode);
        cpu.gpr[RBX] = 0xffff_ffff_0000_0000;
        cpu.gpr[RCX] = 0x100;
        cpu.gpr[RBP] = 0x2000;
        let insn = decode(&cpu, bytes);
        assert_eq!(cpu.effective_address(&insn), (segment, offset), "{mode:?} {bytes:02x?}");
    }
}

#[test]
fn sixteen_bit_addresses_wrap() {
    let mut cpu = cpu(Mode::Real);
    cpu.gpr[RBX] = 0xfff0;
    cpu.gpr[purlin_arch::x86_64::regs::gpr::RSI] = 0x20;
    // PUSH [BX+SI]
    let insn = decode(&cpu, b"\xff\x30");
    assert_eq!(cpu.effective_address(&insn), (DS, 0x10));
}

#[test]
fn addresses_are_of_where_the_code_runs_not_where_it_was_decoded() {
    let mut cpu = cpu(Mode::Long(0));
    let insn = decode(&cpu, b"\xff\x35\x10\x00\x00\x00");
    let jump = decode(&cpu, b"\xe9\x00\x01\x00\x00");
    cpu.rip += 0x10_0000;
    assert_eq!(cpu.effective_address(&insn), (DS, CODE + 0x10_0000 + 6 + 0x10));
    assert_eq!(cpu.branch_target(&jump), CODE + 0x10_0000 + 5 + 0x100);
}

#[test]
fn memory_operands_are_read_and_written() {
    let mut cpu = cpu(Mode::Long(0));
    poke(&cpu, 0x5000, 0x1122_3344_5566_7788u64);
    // PUSH qword [0x5000]; POP qword [0x5008]
    step(&mut cpu, b"\xff\x34\x25\x00\x50\x00\x00").unwrap();
    step(&mut cpu, b"\x8f\x04\x25\x08\x50\x00\x00").unwrap();
    assert_eq!(cpu.load::<u64>(0x5008), Ok(0x1122_3344_5566_7788));
    assert_eq!(cpu.gpr[RSP], crate::testing::STACK);
}
