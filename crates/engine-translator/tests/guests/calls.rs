//! Calls and returns: deep ones, stacks that are switched, code that changes in between. Whatever is predicted of a
//! return, it leads to where the stack says.

use iced_x86::{IcedError, code_asm::*};
use purlin_arch::x86_64::regs::gpr::{RAX, RBP, RBX, RCX, RSP};
use vm_memory::{Bytes, GuestAddress};

use crate::{
    apic::{DIVIDE, EOI, INITIAL_COUNT, LVT_TIMER, wrmsr, x2apic},
    machine::*,
};

type Result = std::result::Result<(), IcedError>;

/// Top of a stack of 8 MiB and more, at the end of memory.
const DEEP: u64 = MEMORY;
/// Functions away from the code that calls them.
const FAR: u64 = CODE + 0x1_0000;

/// Calls at odd levels and at even ones return to different places. ECX: levels to go; RAX: a checksum of the way
/// back.
fn recursion(a: &mut CodeAssembler) -> Result {
    let (mut function, mut even, mut over) = (a.create_label(), a.create_label(), a.create_label());
    a.jmp(over)?;
    a.set_label(&mut function)?;
    let mut bottom = a.create_label();
    a.dec(ecx)?;
    a.jz(bottom)?;
    a.test(ecx, 1)?;
    a.jz(even)?;
    a.call(function)?;
    a.inc(ecx)?;
    a.imul_3(rax, rax, 31)?;
    a.add(rax, rcx)?;
    a.ret()?;
    a.set_label(&mut even)?;
    a.call(function)?;
    a.inc(ecx)?;
    a.imul_3(rax, rax, 37)?;
    a.sub(rax, rcx)?;
    a.set_label(&mut bottom)?;
    a.ret()?;
    a.set_label(&mut over)?;
    a.xor(eax, eax)?;
    a.call(function)
}

fn recursion_result(levels: u64) -> u64 {
    let step = |sum: u64, left: u64| match left % 2 {
        1 => sum.wrapping_mul(31).wrapping_add(left),
        _ => sum.wrapping_mul(37).wrapping_sub(left),
    };
    // On the way back ECX counts up again.
    (1..levels).fold(0, step)
}

#[test]
fn a_million_calls_deep() {
    const LEVELS: u64 = 1_000_000;
    let m = Machine::new(1);
    m.code(CODE, |a| {
        // Twice: at first there is no code yet.
        let mut again = a.create_label();
        a.mov(ebx, 2)?;
        a.set_label(&mut again)?;
        a.mov(r8, rax)?;
        a.mov(ecx, LEVELS as u32)?;
        recursion(a)?;
        a.dec(ebx)?;
        a.jnz(again)?;
        done(a)
    });
    let mut guest = m.vcpu(0, |s| s.regs.gpr[RSP] = DEEP);
    assert!(matches!(guest.run(), Stop::Done(_)));
    let gpr = guest.state().regs.gpr;
    assert_eq!((gpr[8], gpr[RAX], gpr[RSP]), (recursion_result(LEVELS), recursion_result(LEVELS), DEEP));
}

#[test]
fn a_call_that_is_never_returned_from() {
    const CALLS: u32 = 10_000_000;
    let m = Machine::new(1);
    let (stop, state) = m.run(|a| {
        let (mut again, mut next) = (a.create_label(), a.create_label());
        a.mov(ecx, CALLS)?;
        a.xor(ebx, ebx)?;
        a.set_label(&mut again)?;
        a.call(next)?;
        a.set_label(&mut next)?;
        a.pop(rax)?;
        a.add(rbx, rax)?;
        a.dec(ecx)?;
        a.jnz(again)?;
        // One real return behind all these.
        let (mut function, mut over) = (a.create_label(), a.create_label());
        a.call(function)?;
        a.jmp(over)?;
        a.set_label(&mut function)?;
        a.ret()?;
        a.set_label(&mut over)?;
        a.mov(eax, 1)?;
        done(a)
    });
    assert_eq!(stop, Stop::Done(1));
    // `mov ecx, imm32; xor ebx, ebx; call rel32`
    assert_eq!((state.regs.gpr[3], state.regs.gpr[RSP]), (u64::from(CALLS) * (CODE + 12), STACK));
}

/// fib(EDI) in EAX, by two calls each.
fn fibonacci(a: &mut CodeAssembler, function: &mut CodeLabel) -> Result {
    let mut last = a.create_label();
    a.set_label(function)?;
    a.mov(eax, edi)?;
    a.cmp(edi, 2)?;
    a.jb(last)?;
    a.push(rdi)?;
    a.dec(edi)?;
    a.call(*function)?;
    a.mov(edi, dword_ptr(rsp))?;
    a.mov(dword_ptr(rsp), eax)?;
    a.sub(edi, 2)?;
    a.call(*function)?;
    a.add(eax, dword_ptr(rsp))?;
    a.add(rsp, 8)?;
    a.set_label(&mut last)?;
    a.ret()
}

#[test]
fn trees_of_calls() {
    let m = Machine::new(1);
    let (stop, state) = m.run(|a| {
        let (mut fib, mut ackermann, mut over) = (a.create_label(), a.create_label(), a.create_label());
        a.jmp(over)?;
        fibonacci(a, &mut fib)?;
        // A(ESI, EDI), in EDI: Ackermann's function as Péter gave it, of two arguments.
        let (mut first, mut deep) = (a.create_label(), a.create_label());
        a.set_label(&mut ackermann)?;
        a.test(esi, esi)?;
        a.jz(first)?;
        a.test(edi, edi)?;
        a.jnz(deep)?;
        a.dec(esi)?;
        a.mov(edi, 1)?;
        a.jmp(ackermann)?;
        a.set_label(&mut deep)?;
        a.push(rsi)?;
        a.dec(edi)?;
        a.call(ackermann)?;
        a.pop(rsi)?;
        a.dec(esi)?;
        a.jmp(ackermann)?;
        a.set_label(&mut first)?;
        a.inc(edi)?;
        a.ret()?;
        a.set_label(&mut over)?;
        a.mov(rsp, DEEP)?;
        a.mov(esi, 3)?;
        a.mov(edi, 8)?;
        a.call(ackermann)?;
        a.mov(ebx, edi)?;
        a.mov(edi, 25)?;
        a.call(fib)?;
        done(a)
    });
    assert_eq!(stop, Stop::Done(75_025));
    assert_eq!(state.regs.gpr[3], 2045);
}

// --- stacks that are switched

/// `switch` puts RSP to the first address and takes it from the second; callee-saved registers are RBX and RBP.
fn switch(a: &mut CodeAssembler, from: u64, to: u64) -> Result {
    a.push(rbx)?;
    a.push(rbp)?;
    a.mov(qword_ptr(from), rsp)?;
    a.mov(rsp, qword_ptr(to))?;
    a.pop(rbp)?;
    a.pop(rbx)?;
    a.ret()
}

#[test]
fn coroutines() {
    // One walks a tree by recursion, and hands each node to the other in the midst of it.
    const DEPTH: u64 = 15;
    let m = Machine::new(1);
    let (walker, consumer) = (DATA, DATA + 8);
    let (hand_over, take) = (FAR, FAR + 0x100);
    m.code(hand_over, |a| switch(a, walker, consumer));
    m.code(take, |a| switch(a, consumer, walker));
    // EDI: a node; its children are 2n and 2n + 1. R12D: the first that has none. R13: the node that is handed over.
    let walk = CODE + 0x800;
    m.code(walk, |a| {
        let mut none = a.create_label();
        a.push(rdi)?;
        a.cmp(edi, r12d)?;
        a.jae(none)?;
        a.add(edi, edi)?;
        a.call(walk)?;
        a.mov(r13, qword_ptr(rsp))?;
        a.call(hand_over)?;
        a.mov(edi, dword_ptr(rsp))?;
        a.lea(edi, rdi + rdi + 1)?;
        a.call(walk)?;
        a.set_label(&mut none)?;
        a.pop(rdi)?;
        a.ret()
    });
    let start = CODE + 0xc00;
    m.code(start, |a| {
        a.mov(edi, 1)?;
        a.mov(r12d, 1 << DEPTH)?;
        a.call(walk)?;
        a.mov(r13, 0u64)?;
        a.call(hand_over)?;
        a.ud2()
    });
    // The walker's stack: RBP, RBX, and where it begins.
    let stack = DATA + 0x1_0000;
    m.poke(stack - 8, start);
    m.poke(walker, stack - 24);
    let (stop, state) = m.run(|a| {
        let (mut again, mut over) = (a.create_label(), a.create_label());
        a.xor(ebx, ebx)?;
        a.set_label(&mut again)?;
        a.call(take)?;
        a.test(r13, r13)?;
        a.jz(over)?;
        a.imul_3(rbx, rbx, 31)?;
        a.add(rbx, r13)?;
        a.jmp(again)?;
        a.set_label(&mut over)?;
        a.xor(eax, eax)?;
        done(a)
    });
    fn in_order(node: u64, visit: &mut impl FnMut(u64)) {
        if node < 1 << DEPTH {
            in_order(2 * node, visit);
            visit(node);
            in_order(2 * node + 1, visit);
        }
    }
    let mut sum = 0u64;
    in_order(1, &mut |node| sum = sum.wrapping_mul(31).wrapping_add(node));
    assert_eq!(stop, Stop::Done(0));
    assert_eq!((state.regs.gpr[3], state.regs.gpr[RSP]), (sum, STACK));
}

#[test]
fn threads_that_the_timer_switches() {
    // Three compute by recursion, each on its stack; the timer's handler goes to the next one.
    const VECTOR: u8 = 0x41;
    const THREADS: u64 = 3;
    const FIRST: u64 = 26;
    let m = Machine::new(1);
    let (handler, saved, switches, results) = (CODE + 0x4000, DATA, DATA + 0x100, DATA + 0x200);
    let all = [rax, rcx, rdx, rbx, rbp, rsi, rdi];
    m.gate(VECTOR, handler);
    // R15: the number of the thread.
    m.code(handler, |a| {
        let mut in_range = a.create_label();
        for register in all {
            a.push(register)?;
        }
        wrmsr(a, EOI, 0)?;
        a.mov(rdi, saved)?;
        a.mov(qword_ptr(rdi + r15 * 8), rsp)?;
        a.inc(dword_ptr(switches))?;
        a.inc(r15)?;
        a.cmp(r15, THREADS as i32)?;
        a.jb(in_range)?;
        a.xor(r15d, r15d)?;
        a.set_label(&mut in_range)?;
        a.mov(rsp, qword_ptr(rdi + r15 * 8))?;
        for register in all.into_iter().rev() {
            a.pop(register)?;
        }
        a.iretq()
    });
    // RBX: the own number, which R15 need not be before the first switch.
    let thread = CODE + 0x1000;
    m.code(thread, |a| {
        let (mut fib, mut over, mut wait) = (a.create_label(), a.create_label(), a.create_label());
        a.jmp(over)?;
        fibonacci(a, &mut fib)?;
        a.set_label(&mut over)?;
        a.lea(edi, rbx + FIRST as i32)?;
        a.call(fib)?;
        a.mov(rsi, results)?;
        a.mov(dword_ptr(rsi + rbx * 4), eax)?;
        a.inc(dword_ptr(rsi + 0x40))?;
        a.set_label(&mut wait)?;
        a.hlt()?;
        a.test(rbx, rbx)?;
        a.jnz(wait)?;
        a.cmp(dword_ptr(rsi + 0x40), THREADS as i32)?;
        a.jne(wait)?;
        a.cli()?;
        a.xor(eax, eax)?;
        done(a)
    });
    // What the handler finds on the stacks of threads that have not begun.
    for i in 1..THREADS {
        let top = DATA + 0x1_0000 + 0x1000 * i;
        let words = [0, 0, 0, i, 0, 0, 0, thread, selector::CODE64.into(), 0x202, top, selector::DATA.into()];
        let lowest = top - 8 * words.len() as u64;
        m.poke(saved + 8 * i, lowest);
        for (word, at) in words.into_iter().zip((lowest..).step_by(8)) {
            m.poke(at, word);
        }
    }
    let (stop, _) = m.run(|a| {
        x2apic(a)?;
        wrmsr(a, DIVIDE, 0xb)?;
        wrmsr(a, LVT_TIMER, 1 << 17 | u64::from(VECTOR))?;
        wrmsr(a, INITIAL_COUNT, 100_000)?;
        a.xor(ebx, ebx)?;
        a.sti()?;
        a.jmp(thread)
    });
    assert_eq!(stop, Stop::Done(0));
    let results = [0, 1, 2].map(|i| m.peek::<u32>(results + 4 * i));
    assert_eq!(results, [121_393, 196_418, 317_811]);
    assert!(m.peek::<u32>(switches) > 3, "{} switches", m.peek::<u32>(switches));
}

// --- what a return leads to has changed meanwhile

#[test]
fn the_place_behind_a_call_is_changed_by_what_was_called() {
    const ROUNDS: u32 = 5000;
    for apart in [false, true] {
        let m = Machine::new(1);
        // `call FUNCTION; mov eax, imm32; ret` on the page of the caller, or on two.
        let (site, function) = (if apart { FAR + 0xff8 } else { CODE + 0x800 }, FAR + 0x2000);
        m.code(site, |a| {
            a.call(function)?;
            a.mov(eax, 0)?;
            a.ret()
        });
        m.code(function, |a| {
            a.mov(rdi, qword_ptr(rsp))?;
            a.mov(dword_ptr(rdi + 1), ecx)?;
            a.ret()
        });
        let (stop, _) = m.run(|a| {
            let (mut again, mut wrong) = (a.create_label(), a.create_label());
            a.mov(ecx, ROUNDS)?;
            a.mov(rsi, site)?;
            a.set_label(&mut again)?;
            a.call(rsi)?;
            a.cmp(eax, ecx)?;
            a.jne(wrong)?;
            a.dec(ecx)?;
            a.jnz(again)?;
            a.xor(eax, eax)?;
            done(a)?;
            a.set_label(&mut wrong)?;
            a.ud2()
        });
        assert_eq!(stop, Stop::Done(0), "apart: {apart}");
    }
}

#[test]
fn the_page_behind_a_call_is_replaced_by_what_was_called() {
    // By INVLPG or by CR3; the function returns to the same address of another frame.
    const ROUNDS: u32 = 2000;
    let window = 0x7000_0000;
    let frames = [FAR + 0x1_0000, FAR + 0x2_0000];
    for by_cr3 in [false, true] {
        let m = Machine::new(1);
        m.map(window, frames[0], pte::P);
        let (entry, function) = (m.pte(window), FAR);
        for (frame, value) in frames.into_iter().zip([1u32, 2]) {
            m.code_of(64, window, frame, |a| {
                a.call(function)?;
                a.mov(eax, value)?;
                a.ret()
            });
        }
        m.code(function, |a| {
            a.xor(qword_ptr(rbx), (frames[0] ^ frames[1]) as i32)?;
            if by_cr3 {
                a.mov(rax, cr3)?;
                a.mov(cr3, rax)?;
            } else {
                a.invlpg(ptr(rsi))?;
            }
            a.ret()
        });
        let (stop, _) = m.run(|a| {
            let mut again = a.create_label();
            a.mov(rbx, entry)?;
            a.mov(rsi, window)?;
            a.xor(ebp, ebp)?;
            a.mov(ecx, ROUNDS)?;
            a.set_label(&mut again)?;
            a.call(rsi)?;
            a.imul_3(ebp, ebp, 3)?;
            a.add(ebp, eax)?;
            a.dec(ecx)?;
            a.jnz(again)?;
            a.mov(eax, ebp)?;
            done(a)
        });
        let expected = (0..ROUNDS).fold(0u32, |sum, i| sum.wrapping_mul(3).wrapping_add(2 - i % 2));
        assert_eq!(stop, Stop::Done(expected), "by CR3: {by_cr3}");
    }
}

#[test]
fn all_code_is_forgotten_between_call_and_return() {
    // At the bottom of a recursion a function is made anew until there is no more room for emitted code.
    const LEVELS: u32 = 200;
    let m = Machine::with_small_code_cache(1);
    let own = FAR;
    m.load(own, &[[0x83, 0x03, 0x01].repeat(40), vec![0xb8, 0, 0, 0, 0, 0xc3]].concat());
    let (stop, state) = m.run(|a| {
        let (mut function, mut bottom, mut over) = (a.create_label(), a.create_label(), a.create_label());
        a.jmp(over)?;
        a.set_label(&mut function)?;
        a.dec(ecx)?;
        a.jz(bottom)?;
        a.push(rcx)?;
        a.call(function)?;
        a.pop(rcx)?;
        a.imul_3(rbp, rbp, 31)?;
        a.add(rbp, rcx)?;
        a.ret()?;
        a.set_label(&mut bottom)?;
        let mut make = a.create_label();
        a.mov(edx, 200)?;
        a.set_label(&mut make)?;
        a.mov(dword_ptr(rdi + 121), edx)?;
        a.call(rdi)?;
        a.add(rbp, rax)?;
        a.dec(edx)?;
        a.jnz(make)?;
        a.ret()?;
        a.set_label(&mut over)?;
        a.mov(rdi, own)?;
        a.mov(rbx, DATA)?;
        let mut again = a.create_label();
        a.mov(r12d, 10)?;
        a.xor(ebp, ebp)?;
        a.set_label(&mut again)?;
        a.mov(ecx, LEVELS)?;
        a.call(function)?;
        a.dec(r12d)?;
        a.jnz(again)?;
        a.xor(eax, eax)?;
        done(a)
    });
    let back = |sum: u64| (1..u64::from(LEVELS)).fold(sum, |sum, left| sum.wrapping_mul(31).wrapping_add(left));
    let expected = (0..10).fold(0u64, |sum, _| back(sum.wrapping_add(200 * 201 / 2)));
    assert_eq!(stop, Stop::Done(0));
    assert_eq!((state.regs.gpr[RBP], m.peek::<u32>(DATA)), (expected, 10 * 200 * 40));
}

#[test]
fn the_machine_is_another_at_the_bottom_of_a_recursion() {
    const LEVELS: u64 = 3000;
    let m = Machine::new(1);
    let function = CODE + 0x800;
    m.code(function, |a| {
        let mut deeper = a.create_label();
        a.dec(ecx)?;
        a.jnz(deeper)?;
        done(a)?;
        a.ret()?;
        a.set_label(&mut deeper)?;
        a.call(function)?;
        a.inc(ecx)?;
        a.imul_3(rbp, rbp, 31)?;
        a.add(rbp, rcx)?;
        a.ret()
    });
    m.code(CODE, |a| {
        a.call(function)?;
        a.mov(eax, 1)?;
        done(a)
    });
    let mut guest = m.vcpu(0, |s| (s.regs.gpr[RSP], s.regs.gpr[RCX]) = (DEEP, LEVELS));
    assert_eq!(guest.run(), Stop::Done(0));
    let state = guest.state();
    let next = Machine::new(1);
    let mut memory = vec![0; MEMORY as usize];
    m.memory.read_slice(&mut memory, GuestAddress(0)).unwrap();
    next.load(0, &memory);
    let mut guest = next.vcpu(0, |s| *s = state);
    assert_eq!(guest.run(), Stop::Done(1));
    let gpr = guest.state().regs.gpr;
    let expected = (1..LEVELS).fold(0u64, |sum, left| sum.wrapping_mul(31).wrapping_add(left));
    assert_eq!((gpr[RBP], gpr[RSP]), (expected, DEEP));
}

#[test]
fn a_return_that_faults_faults_as_itself() {
    // Behind a call that matches it: its stack is gone, or the address that it finds is none.
    let missing = 0x8000_0000u64;
    let function = CODE + 0x800;
    for (gone, vector) in [(true, 14), (false, 13)] {
        let m = Machine::new(1);
        m.code(CODE, |a| {
            let mut again = a.create_label();
            a.mov(ecx, 100)?;
            a.set_label(&mut again)?;
            a.call(function)?;
            a.dec(ecx)?;
            a.jmp(again)
        });
        let end = m.code(function, |a| {
            let mut go_on = a.create_label();
            a.test(ecx, ecx)?;
            a.jnz(go_on)?;
            if gone {
                a.mov(rsp, missing)?;
            } else {
                a.mov(rax, 0x8000_0000_0000u64)?;
                a.mov(qword_ptr(rsp), rax)?;
            }
            a.set_label(&mut go_on)?;
            a.ret()
        });
        // The handler of a fault on a stack that is gone needs another one: the first of the TSS's table.
        m.poke(TSS + 0x24, RING0_STACK);
        m.poke(IDT + 16 * 14 + 4, 1u8);
        let mut guest = m.vcpu(0, |_| {});
        let stop = guest.run();
        assert_eq!(stop.vector(), (vector, Some(0), end - 1));
        let Stop::Vector(_, frame) = stop else { unreachable!() };
        assert_eq!(frame.rsp, if gone { missing } else { STACK - 8 });
        if gone {
            assert_eq!(guest.state().system.cr2, missing);
        }
    }
}

/// A call through a register, of which one is not like all those before: it comes when the code has long been hot.
#[test]
fn the_last_of_many_indirect_calls() {
    let (function, other, elsewhere) = (CODE + 0x800, CODE + 0x900, DATA + 0x1000);
    let (missing, astray) = (0x8000_0000u64, 0x8000_0000_0000u64);
    // Where the last one leads, and on which stack.
    for (target, stack, vector) in [
        (astray, elsewhere, Some((13, 0))),
        (function, missing, Some((14, 2))),
        (other, missing, Some((14, 2))),
        (other, elsewhere, None),
    ] {
        let m = Machine::new(1);
        m.code(function, |a| a.ret());
        m.code(other, |a| {
            a.pop(rbx)?;
            a.mov(eax, 2)?;
            done(a)
        });
        m.poke(TSS + 0x24, RING0_STACK);
        [13, 14].into_iter().for_each(|vector| m.poke(IDT + 16 * vector + 4, 1u8));
        let mut call = 0;
        let length = |code: &dyn Fn(&mut CodeAssembler) -> Result| assemble(64, CODE, code).len() as u64;
        let before = |a: &mut CodeAssembler| {
            a.mov(rsi, target)?;
            a.mov(rdi, stack)?;
            a.mov(ecx, 20_000_000)
        };
        let choose = |a: &mut CodeAssembler| {
            a.mov(eax, function as u32)?;
            a.cmp(ecx, 1)?;
            a.cmove(rax, rsi)?;
            a.cmove(rsp, rdi)
        };
        m.code(CODE, |a| {
            let mut again = a.create_label();
            before(a)?;
            a.set_label(&mut again)?;
            choose(a)?;
            call = CODE + length(&before) + length(&choose);
            a.call(rax)?;
            a.dec(ecx)?;
            a.jnz(again)?;
            a.ud2()
        });
        let mut guest = m.vcpu(0, |_| {});
        let stop = guest.run();
        match vector {
            Some((vector, error)) => {
                assert_eq!(stop.vector(), (vector, Some(error), call), "{target:#x} {stack:#x}");
                let Stop::Vector(_, frame) = stop else { unreachable!() };
                assert_eq!(frame.rsp, stack);
            }
            None => assert_eq!((stop, guest.state().regs.gpr[RBX]), (Stop::Done(2), call + 2)),
        }
        // Of an address that is not canonical Intel's processors take note behind the push.
        let pushed = if vector.is_none() || target == astray && !is_amd() { call + 2 } else { 0 };
        assert_eq!(m.peek::<u64>(elsewhere - 8), pushed, "{target:#x} {stack:#x}");
    }
}

/// A few functions, each of which calls the next one twice: billions of calls, all of them forward, and as many returns. It
/// is the returns that notice the kick: every block is hot, and every jump linked, before that.
#[test]
fn calls_without_end_are_interrupted() {
    const LEVELS: usize = 29;
    let m = Machine::with_engine(1, engine().with_hot_code());
    m.code(CODE, |a| {
        let mut functions: Vec<_> = (0..=LEVELS).map(|_| a.create_label()).collect();
        // EBX: levels to go. So each is called early, not when all that comes before it is done.
        for &function in &functions {
            a.mov(ebx, 2)?;
            a.call(function)?;
        }
        a.mov(ebx, LEVELS as u32)?;
        a.call(functions[0])?;
        // After many seconds.
        done(a)?;
        for i in 0..LEVELS {
            let mut bottom = a.create_label();
            a.set_label(&mut functions[i])?;
            let next = functions[i + 1];
            a.test(ebx, ebx)?;
            a.jz(bottom)?;
            a.dec(ebx)?;
            a.call(next)?;
            a.call(next)?;
            a.inc(ebx)?;
            a.set_label(&mut bottom)?;
            a.ret()?;
        }
        a.set_label(&mut functions[LEVELS])?;
        a.ret()
    });
    let mut guest = m.vcpu(0, |_| {});
    assert_eq!(guest.run_for(std::time::Duration::from_millis(200)), Stop::Kicked);
}
