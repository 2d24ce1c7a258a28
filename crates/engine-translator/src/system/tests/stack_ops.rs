use purlin_arch::x86_64::regs::{
    gpr::{RAX, RBP, RSP},
    seg::{DS, ES, FS, SS},
};

use crate::{
    exception::Exception,
    testing::{CODE, Mode, STACK, cpu, peek, poke, segment, selector, step},
};

#[test]
fn widths_and_wrapping() {
    // PUSH RAX: (mode, bytes, stack pointer before, after)
    let cases: [(Mode, &[u8], u64, u64); 6] = [
        (Mode::Long(0), b"\x50", STACK, STACK - 8),
        (Mode::Long(0), b"\x66\x50", STACK, STACK - 2),
        (Mode::Protected(0), b"\x50", STACK, STACK - 4),
        (Mode::Real, b"\x50", STACK, STACK - 2),
        (Mode::Real, b"\x66\x50", STACK, STACK - 4),
        // SP wraps; what is above it stays.
        (Mode::Real, b"\x50", 0x1234_0000, 0x1234_fffe),
    ];
    for (mode, bytes, before, after) in cases {
        let mut cpu = cpu(mode);
        cpu.gpr[RSP] = before;
        cpu.gpr[RAX] = 0x1122_3344_5566_7788;
        step(&mut cpu, bytes).unwrap();
        assert_eq!(cpu.gpr[RSP], after, "{mode:?} {bytes:02x?}");
        assert_eq!(peek(&cpu, after & 0xffff) as u16, 0x7788);
    }
}

#[test]
fn a_sixteen_bit_stack_in_32bit_code() {
    let mut cpu = cpu(Mode::Protected(0));
    cpu.seg[SS] = segment(&cpu, selector::DATA16);
    cpu.gpr[RSP] = 0xabcd_0004;
    step(&mut cpu, b"\x50").unwrap();
    assert_eq!(cpu.gpr[RSP], 0xabcd_0000);
    // At 0 the next push goes to the top of the segment.
    step(&mut cpu, b"\x50").unwrap();
    assert_eq!(cpu.gpr[RSP], 0xabcd_fffc);
    // One that would straddle the top is outside of it.
    cpu.gpr[RSP] = 0xabcd_0002;
    assert_eq!(step(&mut cpu, b"\x50"), Err(Exception::SS0));
    assert_eq!((cpu.gpr[RSP], cpu.rip), (0xabcd_0002, CODE + 2));
}

#[test]
fn sixteen_bit_stacks_wrap_between_pushes() {
    let mut cpu = cpu(Mode::Real);
    cpu.gpr[RSP] = 8;
    step(&mut cpu, b"\x60").unwrap();
    assert_eq!(cpu.gpr[RSP], 0xfff8);
    // Not within one.
    cpu.gpr[RSP] = 7;
    assert_eq!(step(&mut cpu, b"\x60"), Err(Exception::SS0));
}

#[test]
fn push_rsp_pushes_the_old_value() {
    let mut cpu = cpu(Mode::Long(0));
    step(&mut cpu, b"\x54").unwrap();
    assert_eq!(peek(&cpu, STACK - 8), STACK);
    // POP RSP: the value wins over the increment.
    poke(&cpu, STACK - 8, 0x4242u64);
    step(&mut cpu, b"\x5c").unwrap();
    assert_eq!(cpu.gpr[RSP], 0x4242);
}

#[test]
fn pop_addresses_memory_after_the_increment() {
    let mut cpu = cpu(Mode::Long(0));
    poke(&cpu, STACK, 0x1234u64);
    // POP [RSP]
    step(&mut cpu, b"\x8f\x04\x24").unwrap();
    assert_eq!((peek(&cpu, STACK + 8), cpu.gpr[RSP]), (0x1234, STACK + 8));
    // A fault leaves RSP alone: POP [0x40000000]
    assert!(step(&mut cpu, b"\x8f\x04\x25\x00\x00\x00\x40").is_err());
    assert_eq!(cpu.gpr[RSP], STACK + 8);
}

#[test]
fn segment_registers() {
    let mut cpu = cpu(Mode::Protected(0));
    poke(&cpu, STACK - 4, 0xffff_ffffu32);
    // PUSH DS; POP ES; PUSH DS with 16-bit operands
    step(&mut cpu, b"\x1e").unwrap();
    assert_eq!(peek(&cpu, STACK - 4) as u32, u32::from(selector::DATA));
    step(&mut cpu, b"\x07").unwrap();
    assert_eq!((cpu.seg[ES].selector, cpu.gpr[RSP]), (selector::DATA, STACK));
    step(&mut cpu, b"\x66\x1e").unwrap();
    assert_eq!(cpu.gpr[RSP], STACK - 2);
    // POP SS makes a shadow, POP DS none.
    step(&mut cpu, b"\x66\x17").unwrap();
    assert!(cpu.mov_ss_shadow);
    step(&mut cpu, b"\x1e").unwrap();
    assert!(!cpu.mov_ss_shadow);
    // A selector that cannot be loaded stays on the stack.
    poke(&cpu, STACK - 4, 0xff8u32);
    cpu.gdtr.limit = 0x5f;
    assert_eq!(step(&mut cpu, b"\x1f"), Err(Exception::gp(0xff8)));
    assert_eq!((cpu.gpr[RSP], cpu.seg[DS].selector), (STACK - 4, selector::DATA));
    let mut long = crate::testing::cpu(Mode::Long(0));
    poke(&long, STACK, u64::from(selector::USER_DATA));
    step(&mut long, b"\x0f\xa1").unwrap();
    assert_eq!((long.seg[FS].selector, long.gpr[RSP]), (selector::USER_DATA, STACK + 8));
}

/// Of 32 bits Intel's processors push the lower half only, and of whatever they pop the selector.
#[test]
fn selectors_alone_on_intels_processors() {
    let mut cpu = cpu(Mode::Protected(0));
    for (amd, pushed) in [(false, 0xaaaa_0000 | u32::from(selector::DATA)), (true, selector::DATA.into())] {
        cpu.features.amd = amd;
        poke(&cpu, STACK - 4, 0xaaaa_aaaau32);
        step(&mut cpu, b"\x1e").unwrap();
        assert_eq!((peek(&cpu, STACK - 4) as u32, cpu.gpr[RSP]), (pushed, STACK - 4));
        cpu.gpr[RSP] = STACK;
    }
    // POP DS two bytes before the end of the stack
    cpu.seg[SS].limit = STACK as u32 - 3;
    for (amd, expected) in [(true, Err(Exception::SS0)), (false, Ok(()))] {
        cpu.features.amd = amd;
        cpu.gpr[RSP] = STACK - 4;
        assert_eq!(step(&mut cpu, b"\x1f"), expected);
    }
    assert_eq!(cpu.gpr[RSP], STACK);
}

#[test]
fn all_registers() {
    let mut cpu = cpu(Mode::Protected(0));
    for (i, register) in cpu.gpr.iter_mut().enumerate().filter(|(i, _)| *i != RSP) {
        *register = 0x1111_1111 * (i as u64 + 1);
    }
    let before = cpu.gpr;
    step(&mut cpu, b"\x60").unwrap();
    assert_eq!(cpu.gpr[RSP], STACK - 32);
    let pushed: Vec<u64> = (0..8).map(|i| peek(&cpu, STACK - 4 - 4 * i) & 0xffff_ffff).collect();
    assert_eq!(pushed, before[..8]);
    cpu.gpr = [7; 16];
    cpu.gpr[RSP] = STACK - 32;
    step(&mut cpu, b"\x61").unwrap();
    assert_eq!(cpu.gpr[..8], before[..8]);
    // 16-bit operands leave the upper halves.
    step(&mut cpu, b"\x66\x60").unwrap();
    cpu.gpr[RAX] = 0xffff_0000;
    step(&mut cpu, b"\x66\x61").unwrap();
    assert_eq!(cpu.gpr[RAX], 0xffff_1111);
}

#[test]
fn frames() {
    let mut cpu = cpu(Mode::Long(0));
    cpu.gpr[RBP] = 0x7000;
    step(&mut cpu, b"\xc8\x20\x00\x00").unwrap();
    assert_eq!((cpu.gpr[RBP], cpu.gpr[RSP], peek(&cpu, STACK - 8)), (STACK - 8, STACK - 0x28, 0x7000));
    step(&mut cpu, b"\xc9").unwrap();
    assert_eq!((cpu.gpr[RBP], cpu.gpr[RSP]), (0x7000, STACK));
    // Nesting level 3: two outer frame pointers are copied, then the own one (SDM vol. 2, ENTER).
    poke(&cpu, 0x6ff8, 0xaaau64);
    poke(&cpu, 0x6ff0, 0xbbbu64);
    step(&mut cpu, b"\xc8\x10\x00\x03").unwrap();
    let pushed: Vec<u64> = (1..5).map(|i| peek(&cpu, STACK - 8 * i)).collect();
    assert_eq!(pushed, [0x7000, 0xaaa, 0xbbb, STACK - 8]);
    assert_eq!((cpu.gpr[RBP], cpu.gpr[RSP]), (STACK - 8, STACK - 0x30));
}

#[test]
fn enter_faults_before_anything_changes() {
    let mut cpu = cpu(Mode::Protected(0));
    cpu.gpr[RBP] = 0x7000;
    cpu.seg[SS].limit = 0x8fff;
    assert_eq!(step(&mut cpu, b"\xc8\xff\xff\x00"), Err(Exception::SS0));
    assert_eq!((cpu.gpr[RBP], cpu.gpr[RSP]), (0x7000, STACK));
}
