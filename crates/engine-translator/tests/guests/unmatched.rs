//! Returns that match no call: each leads to where the stack says.

use iced_x86::{IcedError, code_asm::*};
use purlin_arch::x86_64::regs::gpr::RSP;

use crate::{machine::*, smc_torture::random};

type Result = std::result::Result<(), IcedError>;

/// Leads, by calls and returns that do not match, to code behind that has added `value` to RBP, once. RAX, RCX, RDX,
/// R8 and R9 may change.
type Unmatched = fn(&mut CodeAssembler, value: i32) -> Result;

/// Adds to RBP what must never be added.
fn astray(a: &mut CodeAssembler) -> Result {
    a.add(rbp, 0x1_0000)
}

const UNMATCHED: [(&str, Unmatched); 14] = [
    ("push; ret", |a, value| {
        let mut behind = a.create_label();
        a.lea(rax, ptr(behind))?;
        a.push(rax)?;
        a.add(rbp, value)?;
        a.ret()?;
        astray(a)?;
        a.set_label(&mut behind)?;
        a.nop()
    }),
    ("ret imm16", |a, value| {
        let (mut function, mut over) = (a.create_label(), a.create_label());
        for _ in 0..3 {
            a.push(value)?;
        }
        a.call(function)?;
        a.jmp(over)?;
        a.set_label(&mut function)?;
        a.add(rbp, qword_ptr(rsp + 16))?;
        a.ret_1(24)?;
        a.set_label(&mut over)?;
        a.nop()
    }),
    ("a return address that is changed", |a, value| {
        let (mut function, mut over) = (a.create_label(), a.create_label());
        a.call(function)?;
        a.db(&[0x48, 0x81, 0xc5, 0, 0, 1, 0])?; // add rbp, 0x10000
        a.jmp(over)?;
        a.set_label(&mut function)?;
        a.add(qword_ptr(rsp), 7)?;
        a.add(rbp, value)?;
        a.ret()?;
        a.set_label(&mut over)?;
        a.nop()
    }),
    ("a return as an indirect jump, with a trap behind the call", |a, value| {
        let (mut function, mut trap, mut over) = (a.create_label(), a.create_label(), a.create_label());
        a.lea(rax, ptr(over))?;
        a.call(function)?;
        a.set_label(&mut trap)?;
        a.pause()?;
        a.jmp(trap)?;
        a.set_label(&mut function)?;
        a.mov(qword_ptr(rsp), rax)?;
        a.ret()?;
        a.set_label(&mut over)?;
        a.add(rbp, value)
    }),
    ("longjmp", |a, value| {
        let (mut function, mut bottom, mut over) = (a.create_label(), a.create_label(), a.create_label());
        a.mov(r8, rsp)?;
        a.mov(ecx, 9)?;
        a.call(function)?;
        astray(a)?;
        a.set_label(&mut function)?;
        a.dec(ecx)?;
        a.jz(bottom)?;
        a.call(function)?;
        astray(a)?;
        a.set_label(&mut bottom)?;
        a.mov(rsp, r8)?;
        a.lea(rax, ptr(over))?;
        a.jmp(rax)?;
        a.set_label(&mut over)?;
        a.add(rbp, value)
    }),
    ("a return to the caller's caller", |a, value| {
        let (mut outer, mut inner, mut over) = (a.create_label(), a.create_label(), a.create_label());
        a.call(outer)?;
        a.jmp(over)?;
        a.set_label(&mut outer)?;
        a.call(inner)?;
        astray(a)?;
        a.ret()?;
        a.set_label(&mut inner)?;
        a.add(rsp, 8)?;
        a.add(rbp, value)?;
        a.ret()?;
        a.set_label(&mut over)?;
        a.nop()
    }),
    ("a jump at the end of a function", |a, value| {
        let (mut outer, mut inner, mut over) = (a.create_label(), a.create_label(), a.create_label());
        a.call(outer)?;
        a.jmp(over)?;
        a.set_label(&mut outer)?;
        a.jmp(inner)?;
        a.set_label(&mut inner)?;
        a.add(rbp, value)?;
        a.ret()?;
        a.set_label(&mut over)?;
        a.nop()
    }),
    ("pop; jmp", |a, value| {
        let (mut function, mut over) = (a.create_label(), a.create_label());
        a.call(function)?;
        a.jmp(over)?;
        a.set_label(&mut function)?;
        a.pop(rdx)?;
        a.add(rbp, value)?;
        a.jmp(rdx)?;
        a.set_label(&mut over)?;
        a.nop()
    }),
    ("two returns to one place", |a, value| {
        let (mut twice, mut over) = (a.create_label(), a.create_label());
        a.lea(rax, ptr(over))?;
        a.push(rax)?;
        a.lea(rax, ptr(twice))?;
        a.push(rax)?;
        a.push(rax)?;
        a.add(rbp, value)?;
        a.sub(rbp, 4)?;
        a.ret()?;
        a.set_label(&mut twice)?;
        a.add(rbp, 2)?;
        a.ret()?;
        a.set_label(&mut over)?;
        a.nop()
    }),
    ("an indirect call, a far return", |a, value| {
        let (mut function, mut over) = (a.create_label(), a.create_label());
        a.lea(rax, ptr(function))?;
        a.call(rax)?;
        a.jmp(over)?;
        a.set_label(&mut function)?;
        a.pop(rdx)?;
        a.push(i32::from(selector::CODE64))?;
        a.push(rdx)?;
        a.add(rbp, value)?;
        a.db(&[0x48, 0xcb])?;
        a.set_label(&mut over)?;
        a.nop()
    }),
    ("iretq", |a, value| {
        let (mut function, mut over) = (a.create_label(), a.create_label());
        a.call(function)?;
        a.jmp(over)?;
        a.set_label(&mut function)?;
        a.pop(rdx)?;
        a.mov(rax, rsp)?;
        a.push(i32::from(selector::DATA))?;
        a.push(rax)?;
        a.push(2)?;
        a.push(i32::from(selector::CODE64))?;
        a.push(rdx)?;
        a.add(rbp, value)?;
        a.iretq()?;
        a.set_label(&mut over)?;
        a.nop()
    }),
    ("the stack moves between call and return", |a, value| {
        let (mut function, mut over) = (a.create_label(), a.create_label());
        a.mov(r8, rsp)?;
        a.call(function)?;
        a.mov(rsp, r8)?;
        a.jmp(over)?;
        a.set_label(&mut function)?;
        a.mov(rax, qword_ptr(rsp))?;
        a.mov(rsp, DATA + 0x1_0000)?;
        a.push(rax)?;
        a.add(rbp, value)?;
        a.ret()?;
        a.set_label(&mut over)?;
        a.nop()
    }),
    ("one function, two callers, the one returned to in turn", |a, value| {
        let (mut function, mut second, mut over) = (a.create_label(), a.create_label(), a.create_label());
        // The second's return address is under the first's: the first call returns into the second's continuation.
        a.lea(rax, ptr(second))?;
        a.call(function)?;
        astray(a)?;
        a.jmp(over)?;
        a.set_label(&mut function)?;
        a.xchg(qword_ptr(rsp), rax)?;
        a.ret()?;
        a.set_label(&mut second)?;
        a.add(rbp, value)?;
        a.set_label(&mut over)?;
        a.nop()
    }),
    ("one's own return address, by way of memory", |a, value| {
        let (mut function, mut over) = (a.create_label(), a.create_label());
        a.mov(r9, DATA)?;
        a.lea(rax, ptr(function))?;
        a.mov(qword_ptr(r9), rax)?;
        a.call(qword_ptr(r9))?;
        a.jmp(over)?;
        a.set_label(&mut function)?;
        a.pop(qword_ptr(r9 + 8))?;
        a.push(qword_ptr(r9 + 8))?;
        a.add(rbp, value)?;
        a.ret()?;
        a.set_label(&mut over)?;
        a.nop()
    }),
];

#[test]
fn returns_that_match_no_call() {
    // Some of each, in any order. R12: rounds left. R14: where each is.
    const ROUNDS: u32 = 200_000;
    let m = Machine::new(1);
    let table = DATA + 0x1000;
    let (next, mut at) = (CODE, CODE + 0x100);
    for (i, (_, code)) in UNMATCHED.into_iter().enumerate() {
        m.poke(table + 8 * i as u64, at);
        at = m.code(at, |a| {
            a.imul_3(rbp, rbx, 31)?;
            code(a, i as i32 + 1)?;
            a.mov(rbx, rbp)?;
            a.jmp(next)
        });
    }
    let end = m.code(next, |a| {
        let mut go_on = a.create_label();
        a.dec(r12d)?;
        a.jnz(go_on)?;
        a.mov(eax, ebx)?;
        done(a)?;
        a.set_label(&mut go_on)?;
        random(a)?;
        a.mov(eax, ebp)?;
        a.xor(edx, edx)?;
        a.mov(ecx, UNMATCHED.len() as u32)?;
        a.div(ecx)?;
        a.inc(dword_ptr(r14 + rdx * 8 + 0x800))?;
        a.jmp(qword_ptr(r14 + rdx * 8))
    });
    assert!(end <= CODE + 0x100);
    let mut guest = m.vcpu(0, |s| (s.regs.gpr[12], s.regs.gpr[14]) = (ROUNDS.into(), table));
    let stop = guest.run();
    let (mut state, mut sum) = (0u64, 0u64);
    for _ in 1..ROUNDS {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(12345);
        sum = sum.wrapping_mul(31).wrapping_add((state >> 32) % UNMATCHED.len() as u64 + 1);
    }
    assert_eq!(stop, Stop::Done(sum as u32));
    assert_eq!((guest.state().regs.gpr[3], guest.state().regs.gpr[RSP]), (sum, STACK));
}

#[test]
fn each_return_that_matches_no_call() {
    // The same one by one, so that a failure has a name.
    for (name, code) in UNMATCHED {
        let m = Machine::new(1);
        let (stop, state) = m.run(|a| {
            let mut again = a.create_label();
            a.xor(ebp, ebp)?;
            a.mov(r12d, 5000)?;
            a.set_label(&mut again)?;
            code(a, 3)?;
            a.dec(r12d)?;
            a.jnz(again)?;
            a.mov(eax, ebp)?;
            done(a)
        });
        assert_eq!(stop, Stop::Done(15_000), "{name}");
        assert_eq!(state.regs.gpr[RSP], STACK, "{name}");
    }
}
