//! Calls that nobody returns from: kernels fill the processor's stack of return addresses with them.

use iced_x86::{IcedError, code_asm::*};

use crate::{machine::*, stack_page::own_stack_for};

type Result = std::result::Result<(), IcedError>;

const ROUNDS: u32 = 3000;
/// Below it are the return addresses.
const TOP: u64 = DATA + 0x800;

/// As Linux has it: so many times two calls over a byte each. The stack pointer comes back by `back`.
fn fill(a: &mut CodeAssembler, times: u32, back: i32) -> Result {
    let mut again = a.create_label();
    a.mov(ecx, times)?;
    a.set_label(&mut again)?;
    for _ in 0..2 {
        slot(a)?;
    }
    a.add(rsp, back)?;
    a.dec(ecx)?;
    a.jnz(again)
}

/// `call 1f; int3; 1:`
fn slot(a: &mut CodeAssembler) -> Result {
    a.db(&[0xe8, 1, 0, 0, 0, 0xcc])
}

#[test]
fn they_push_what_calls_push() {
    let m = Machine::new(1);
    m.code(CODE + 0x800, |a| {
        fill(a, 16, 16)?;
        a.inc(r14)?;
        a.ret()
    });
    let (stop, state) = m.run(|a| {
        let mut again = a.create_label();
        a.mov(rsp, TOP)?;
        a.mov(r12d, ROUNDS)?;
        a.set_label(&mut again)?;
        a.mov(rdi, CODE + 0x800)?;
        a.call(rdi)?;
        a.dec(r12d)?;
        a.jnz(again)?;
        done(a)
    });
    assert!(matches!(stop, Stop::Done(_)), "{stop:?}");
    assert_eq!((state.regs.gpr[14], state.regs.gpr[4]), (ROUNDS.into(), TOP));
    // `mov ecx` has five bytes, each slot six.
    let first = CODE + 0x800 + 5 + 5;
    assert_eq!([TOP - 16, TOP - 24].map(|at| m.peek::<u64>(at)), [first, first + 6]);
}

#[test]
fn flags_are_not_theirs() {
    let m = Machine::new(1);
    let (stop, state) = m.run(|a| {
        let mut again = a.create_label();
        a.mov(r12d, ROUNDS)?;
        a.set_label(&mut again)?;
        a.cmp(r12d, -1)?;
        slot(a)?;
        slot(a)?;
        a.setc(al)?;
        a.lea(rsp, qword_ptr(rsp + 16))?;
        a.movzx(eax, al)?;
        a.add(r14, rax)?;
        a.dec(r12d)?;
        a.jnz(again)?;
        done(a)
    });
    assert!(matches!(stop, Stop::Done(_)), "{stop:?}");
    assert_eq!(state.regs.gpr[14], u64::from(ROUNDS));
}

#[test]
fn whoever_returns_there_gets_there() {
    // What is behind the last slot does not take the addresses away: the return of the last round leads to its byte.
    let m = Machine::new(1);
    let (stop, _) = m.run(|a| {
        let (mut again, mut out) = (a.create_label(), a.create_label());
        a.mov(r12d, ROUNDS)?;
        a.set_label(&mut again)?;
        slot(a)?;
        slot(a)?;
        a.add(rsp, 0)?;
        a.dec(r12d)?;
        a.jz(out)?;
        a.lea(rsp, qword_ptr(rsp + 16))?;
        a.jmp(again)?;
        a.set_label(&mut out)?;
        a.ret()
    });
    let Stop::Vector(3, frame) = stop else { panic!("{stop:?}") };
    // Behind INT3, which is behind two slots' calls and one byte.
    assert_eq!(frame.rip, CODE + 6 + 6 + 6);
}

#[test]
fn the_stack_may_be_missing() {
    // At the second of them, in the last round.
    const WINDOW: u64 = 0x8000_0000;
    let m = Machine::new(1);
    own_stack_for(&m, 14);
    m.map(WINDOW, 0, 0);
    m.map(WINDOW + 0x1000, DATA, pte::P | pte::W);
    let (stop, state) = m.run(|a| {
        let mut again = a.create_label();
        a.mov(rsp, WINDOW + 0x1800)?;
        a.mov(r12d, ROUNDS)?;
        a.mov(edi, 0)?;
        a.mov(rdx, WINDOW + 0x1008)?;
        a.set_label(&mut again)?;
        a.cmp(r12d, 1)?;
        a.cmove(rsp, rdx)?;
        slot(a)?;
        slot(a)?;
        a.add(rsp, 16)?;
        a.dec(r12d)?;
        a.jnz(again)?;
        done(a)
    });
    let Stop::Vector(14, frame) = stop else { panic!("{stop:?}") };
    assert_eq!((frame.error, state.system.cr2, frame.rsp), (Some(2), WINDOW + 0xff8, WINDOW + 0x1000));
    assert_eq!(m.peek::<[u8; 6]>(frame.rip), [0xe8, 1, 0, 0, 0, 0xcc]);
    assert_eq!(m.peek::<u8>(frame.rip + 6), 0x48);
    assert_eq!(state.regs.gpr[12], 1);
}

#[test]
fn threads_that_wait_at_the_same_place() {
    // Two threads call through the same functions and take turns at the bottom: each comes back up through its own calls.
    const LEVELS: u64 = 6;
    const OTHER_STACK: u64 = DATA + 0x4000;
    const OTHER: u64 = CODE + 0x800;
    let m = Machine::new(1);
    let function = |level: u64| CODE + 0x200 + level * 0x80;
    for level in 0..LEVELS {
        // RBX is the thread's own, and is found again on its stack.
        m.code(function(level), |a| {
            a.push(rbx)?;
            if level + 1 < LEVELS {
                a.call(function(level + 1))?;
            } else {
                a.xchg(rsp, rbp)?;
                fill(a, 16, 16)?;
            }
            a.pop(rbx)?;
            a.inc(rbx)?;
            a.ret()
        });
    }
    m.code(OTHER, |a| {
        let mut again = a.create_label();
        a.mov(rbx, 1u64 << 40)?;
        a.set_label(&mut again)?;
        a.call(function(0))?;
        a.mov(qword_ptr(DATA), rbx)?;
        a.jmp(again)
    });
    // It begins with a return from the bottom.
    m.poke(OTHER_STACK + 8, OTHER);
    let (stop, state) = m.run(|a| {
        let mut again = a.create_label();
        a.mov(rbp, OTHER_STACK)?;
        a.mov(r12d, ROUNDS)?;
        a.set_label(&mut again)?;
        a.call(function(0))?;
        a.dec(r12d)?;
        a.jnz(again)?;
        done(a)
    });
    assert!(matches!(stop, Stop::Done(_)), "{stop:?}");
    // Each level adds one to what its caller had, not to what is below.
    assert_eq!((state.regs.gpr[3], m.peek::<u64>(DATA)), (ROUNDS.into(), (1 << 40) + u64::from(ROUNDS) - 1));
}
