use iced_x86::Register;
use purlin_arch::x86_64::regs::{
    gpr::{RAX, RBX, RSI},
    rflags::{AF, CF, FIXED, OF, PF, SF, ZF},
    seg::DS,
};

use crate::{
    exception::{Exception, vector},
    testing::{CODE, Mode, cpu, decode, gate, poke, selector::CODE32, set_gate, step},
};

/// FNV-1a over 32-bit words.
struct Hash(u64);

impl Hash {
    fn add(&mut self, value: u64) {
        for byte in (value as u32).to_le_bytes() {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        }
    }
}

/// Each instruction for all values of AX, CF and AF: a hash over AX and the defined flags, as an AMD EPYC computes it
/// in compatibility mode.
#[test]
fn same_as_the_processor() {
    let adjust = CF | AF | ZF | SF | PF;
    let result = ZF | SF | PF;
    let cases: [(&[u8], u64, u64); 8] = [
        (b"\x27", adjust, 0xd049_cfc8_6a9d_df25),
        (b"\x2f", adjust, 0x49a8_cbb2_7f27_d925),
        (b"\x37", CF | AF, 0xe6c8_014b_5635_3f25),
        (b"\x3f", CF | AF, 0xb1e6_a106_a3e3_4b25),
        (b"\xd4\x0a", result, 0x7e2c_7a06_6ff1_bb25),
        (b"\xd4\x07", result, 0x1c03_03ff_b8a3_4325),
        (b"\xd5\x0a", result, 0x6d9f_d019_66e2_2325),
        (b"\xd5\xc8", result, 0x9804_78e6_0db2_2325),
    ];
    let mut cpu = cpu(Mode::Protected(3));
    for (bytes, defined, expected) in cases {
        let insn = decode(&cpu, bytes);
        let mut hash = Hash(0xcbf2_9ce4_8422_2325);
        for ax in 0..0x1_0000 {
            for carry in 0..4 {
                cpu.gpr[RAX] = ax;
                cpu.rip = CODE;
                cpu.rflags = FIXED | if carry & 1 != 0 { CF } else { 0 } | if carry & 2 != 0 { AF } else { 0 };
                crate::system::emulate(&mut cpu, &insn).unwrap();
                hash.add(cpu.gpr[RAX] & 0xffff);
                hash.add(cpu.rflags & defined);
            }
        }
        assert_eq!(hash.0, expected, "{:?}", insn.mnemonic());
    }
}

#[test]
fn aam_divides_by_zero() {
    let mut cpu = cpu(Mode::Protected(0));
    assert_eq!(step(&mut cpu, b"\xd4\x00"), Err(Exception::DE));
}

#[test]
fn salc() {
    let mut cpu = cpu(Mode::Protected(0));
    cpu.gpr[RAX] = 0x1234;
    cpu.rflags |= CF;
    step(&mut cpu, b"\xd6").unwrap();
    assert_eq!(cpu.gpr[RAX], 0x12ff);
    cpu.rflags &= !CF;
    step(&mut cpu, b"\xd6").unwrap();
    assert_eq!(cpu.gpr[RAX], 0x1200);
}

#[test]
fn bound() {
    let mut cpu = cpu(Mode::Protected(0));
    poke(&cpu, 0x5000, -5i32 as u32);
    poke(&cpu, 0x5004, 7u32);
    for (index, inside) in [(-6, false), (-5, true), (7, true), (8, false)] {
        cpu.set_register(Register::EAX, index as u32 as u64);
        let result = step(&mut cpu, b"\x62\x05\x00\x50\x00\x00");
        assert_eq!(result, if inside { Ok(()) } else { Err(Exception::plain(vector::BR)) }, "{index}");
    }
    // The upper limit is not there: nor is it looked at by Intel's processors, if the lower one is enough. BOUND EAX, [ESI]
    for (amd, faults) in [(true, true), (false, false)] {
        cpu.features.amd = amd;
        cpu.seg[DS].limit = 0x5003;
        (cpu.gpr[RSI], cpu.gpr[RAX]) = (0x5000, -6i32 as u32 as u64);
        let expected = if faults { Exception::GP0 } else { Exception::plain(vector::BR) };
        assert_eq!(step(&mut cpu, b"\x62\x06"), Err(expected));
    }
    cpu.seg[DS].limit = u32::MAX;
    // 16-bit operands
    poke(&cpu, 0x5000, 0x7fff_8000u32);
    assert_eq!(step(&mut cpu, b"\x66\x62\x05\x00\x50\x00\x00"), Ok(()));
    // A 16-bit address that reaches the lower limit, and no further: BOUND EAX, [SI]
    poke(&cpu, 0xfffc, 1u32);
    poke(&cpu, 0, 3u32);
    poke(&cpu, 0x1_0000, 0u32);
    (cpu.gpr[RSI], cpu.gpr[RAX]) = (0xfffc, 2);
    assert_eq!(step(&mut cpu, b"\x67\x62\x04"), Ok(()));
}

#[test]
fn into() {
    let mut cpu = cpu(Mode::Protected(0));
    set_gate(&cpu, vector::OF, gate(CODE32, 0xa000, 15, 0));
    step(&mut cpu, b"\xce").unwrap();
    assert_eq!(cpu.rip, CODE + 1);
    cpu.rflags |= OF;
    step(&mut cpu, b"\xce").unwrap();
    assert_eq!((cpu.rip, cpu.pop(4)), (0xa000, Ok(CODE + 2)));
}

#[test]
fn xlat() {
    let mut cpu = cpu(Mode::Protected(0));
    cpu.gpr[RAX] = 0x1205;
    cpu.gpr[RBX] = 0x5000;
    poke(&cpu, 0x5005, 0x99u8);
    step(&mut cpu, b"\xd7").unwrap();
    assert_eq!(cpu.gpr[RAX], 0x1299);
}
