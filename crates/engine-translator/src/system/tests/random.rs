//! Whatever a guest has in its registers, tables and instructions, nothing panics, faults change nothing, and the
//! state stays one that a processor can be in.

use iced_x86::{Decoder, DecoderOptions};
use purlin_arch::x86_64::regs::{cr0, rflags, seg::SS};

use crate::{
    cpu::Cpu,
    interrupt::{Event, deliver},
    system::emulate,
    testing::{self, GDT, IDT, Mode, PAGES, TSS},
};

/// xorshift64*: the same sequence in each run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// A value as guests have them: small, a selector, an address that is there, or anything.
    fn value(&mut self) -> u64 {
        match self.below(5) {
            0 => self.below(32),
            1 => self.below(0x80),
            2 => self.below(0x1_0000),
            3 => (self.next() as i32) as u64,
            _ => self.next(),
        }
    }

    /// A descriptor or gate, mostly present and pointing at something.
    fn descriptor(&mut self) -> u64 {
        let mut descriptor = self.next();
        if !self.one_in(8) {
            descriptor |= 0x80 << 40;
        }
        if self.one_in(2) {
            // A gate's selector, or a base near tables.
            descriptor = descriptor & !0xffff_ffff_0000 | self.below(0x60) << 16 | (descriptor & 0xff << 40);
        }
        if self.one_in(2) { descriptor & !(0xff << 56) } else { descriptor }
    }
}

const MODES: [Mode; 8] = [
    Mode::Real,
    Mode::Protected(0),
    Mode::Protected(3),
    Mode::V86,
    Mode::Compatibility(0),
    Mode::Compatibility(3),
    Mode::Long(0),
    Mode::Long(3),
];

/// Opcodes of emulated instructions; random bytes follow.
const OPCODES: [&[u8]; 58] = [
    b"\x06",
    b"\x07",
    b"\x16",
    b"\x17",
    b"\x1e",
    b"\x1f",
    b"\x27",
    b"\x2f",
    b"\x37",
    b"\x3f",
    b"\x50",
    b"\x58",
    b"\x60",
    b"\x61",
    b"\x62",
    b"\x63",
    b"\x68",
    b"\x6a",
    b"\x70",
    b"\x8c",
    b"\x8e",
    b"\x8f",
    b"\x9a",
    b"\x9c",
    b"\x9d",
    b"\xc2",
    b"\xc3",
    b"\xc4",
    b"\xc5",
    b"\xc8",
    b"\xc9",
    b"\xca",
    b"\xcb",
    b"\xcc",
    b"\xcd",
    b"\xce",
    b"\xcf",
    b"\xd4",
    b"\xd7",
    b"\xe2",
    b"\xe3",
    b"\xe8",
    b"\xe9",
    b"\xea",
    b"\xf1",
    b"\xfb",
    b"\xff",
    b"\x0f\x00",
    b"\x0f\x01",
    b"\x0f\x02",
    b"\x0f\x03",
    b"\x0f\x05",
    b"\x0f\x07",
    b"\x0f\x20",
    b"\x0f\x22",
    b"\x0f\x23",
    b"\x0f\x34",
    b"\x0f\xb2",
];

fn instruction(random: &mut Random) -> Vec<u8> {
    let mut bytes = Vec::new();
    for prefix in [0x66, 0x67, 0x48, 0x2e, 0x64] {
        if random.one_in(6) {
            bytes.push(prefix);
        }
    }
    if random.one_in(16) {
        bytes.extend(random.next().to_le_bytes());
    } else {
        bytes.extend(OPCODES[random.below(OPCODES.len() as u64) as usize]);
    }
    for _ in 0..6 {
        bytes.extend((random.value() as u16).to_le_bytes());
    }
    bytes
}

/// A processor whose registers and tables are partly random.
fn processor(random: &mut Random) -> Box<Cpu> {
    let mut cpu = testing::cpu(MODES[random.below(8) as usize]);
    for entry in 12..32 {
        testing::poke(&cpu, GDT + 8 * entry, random.descriptor());
    }
    for entry in 0..256 {
        if !random.one_in(4) {
            testing::poke(&cpu, IDT + 8 * entry, random.descriptor());
        }
    }
    for word in 0..26u64 {
        testing::poke(&cpu, TSS + 4 * word, random.value() as u32);
    }
    if cpu.long_mode() && random.one_in(4) {
        testing::poke(&cpu, PAGES + 0x2000, 0x87u64 ^ 1 << random.below(9));
    }
    cpu.ldtr.base = GDT;
    cpu.ldtr.limit = 0xff;
    let status = random.next() & (rflags::STATUS | rflags::TF | rflags::NT | rflags::IOPL | rflags::AC);
    cpu.rflags |= status;
    cpu
}

fn check_invariants(cpu: &Cpu) {
    assert_eq!(cpu.rflags & (rflags::FIXED | 1 << 3 | 1 << 5 | 1 << 15 | !0x3f_ffff), rflags::FIXED);
    if !cpu.code64() {
        assert_eq!(cpu.rip >> 32, 0);
    }
    match (cpu.protected(), cpu.v86()) {
        (false, _) => assert_eq!(cpu.cpl, 0),
        (true, true) => assert_eq!(cpu.cpl, 3),
        (true, false) => assert_eq!(cpu.seg[SS].dpl(), cpu.cpl),
    }
}

#[test]
fn no_guest_can_break_it() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let (mut done, mut faulted, mut delivered) = (0, 0, 0);
    for _ in 0..400 {
        let mut cpu = processor(&mut random);
        for _ in 0..100 {
            for register in 0..16 {
                if random.one_in(4) {
                    cpu.gpr[register] = random.value();
                }
            }
            for word in 0..6 {
                let stack = cpu.gpr[4] & 0xfff8;
                testing::poke(&cpu, stack + 8 * word, random.value());
            }
            let bits = 8 * cpu.code_size() as u32;
            let bytes = instruction(&mut random);
            let insn = Decoder::with_ip(bits, &bytes, cpu.rip, DecoderOptions::AMD).decode();
            // Set again by a task switch.
            cpu.cr0 &= !cr0::TS;
            let before = (cpu.gpr, cpu.rip, cpu.seg, cpu.cr0, cpu.cr3, cpu.cr4, cpu.cpl);
            match emulate(&mut cpu, &insn) {
                Ok(()) => done += 1,
                Err(exception) => {
                    faulted += 1;
                    let after = (cpu.gpr, cpu.rip, cpu.seg, cpu.cr0, cpu.cr3, cpu.cr4, cpu.cpl);
                    // String instructions get as far as they get; a task switch's late faults are the new task's.
                    if !insn.is_string_instruction() && cpu.cr0 & cr0::TS == 0 {
                        assert_eq!(after, before, "{bytes:02x?} in {bits}-bit code raised {exception:?}");
                    }
                    if deliver(&mut cpu, Event::Exception(exception)).is_ok() {
                        delivered += 1;
                    }
                }
            }
            if cpu.cr0 & cr0::TS != 0 {
                break;
            }
            check_invariants(&cpu);
        }
    }
    // Else the test would show little.
    assert!(done > 5_000 && faulted > 5_000 && delivered > 500, "{done} {faulted} {delivered}");
}
