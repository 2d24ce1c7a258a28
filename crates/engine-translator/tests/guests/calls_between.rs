//! Calls and returns with a kernel's or a handler's own ones in between.

use iced_x86::{IcedError, code_asm::*};
use purlin_arch::x86_64::regs::{
    gpr::{RAX, RSP},
    rflags,
};

use crate::machine::*;

type Result = std::result::Result<(), IcedError>;

/// EDI levels deep, `down` before a call and `up` behind it; RAX is a checksum of the way back.
fn recursion(
    a: &mut CodeAssembler,
    function: u64,
    down: impl FnOnce(&mut CodeAssembler) -> Result,
    up: impl FnOnce(&mut CodeAssembler) -> Result,
) -> Result {
    let mut bottom = a.create_label();
    a.dec(edi)?;
    a.jz(bottom)?;
    down(a)?;
    a.call(function)?;
    up(a)?;
    a.inc(edi)?;
    a.imul_3(rax, rax, 31)?;
    a.add(rax, rdi)?;
    a.set_label(&mut bottom)?;
    a.ret()
}

fn result(levels: u64) -> u64 {
    (1..levels).fold(0, |sum, left| sum.wrapping_mul(31).wrapping_add(left))
}

#[test]
fn a_stack_that_grows_by_page_faults() {
    // The handler makes each page of the stack present when a call first pushes to it; it calls and returns itself.
    const LEVELS: u32 = 100_000;
    const PAGES_OF_STACK: u64 = 200;
    let m = Machine::new(1);
    let (window, frames, faults, handler) = (0x8000_0000, 0x40_0000, DATA, CODE + 0x1000);
    for i in 0..PAGES_OF_STACK {
        m.map(window + 0x1000 * i, frames + 0x1000 * i, pte::W);
    }
    let (first, top) = (m.pte(window), window + 0x1000 * PAGES_OF_STACK);
    // A stack of its own, the first of the TSS's table.
    m.poke(TSS + 0x24, RING0_STACK);
    m.gate(14, handler);
    m.poke(IDT + 16 * 14 + 4, 1u8);
    m.code(handler, |a| {
        let (mut function, mut over) = (a.create_label(), a.create_label());
        a.push(rax)?;
        a.push(rdx)?;
        a.call(function)?;
        a.jmp(over)?;
        a.set_label(&mut function)?;
        a.mov(rax, cr2)?;
        a.mov(edx, window as u32)?;
        a.sub(rax, rdx)?;
        a.shr(rax, 12)?;
        a.mov(rdx, first)?;
        a.or(qword_ptr(rdx + rax * 8), pte::P as i32)?;
        a.inc(dword_ptr(faults))?;
        a.ret()?;
        a.set_label(&mut over)?;
        a.pop(rdx)?;
        a.pop(rax)?;
        a.add(rsp, 8)?;
        a.iretq()
    });
    let function = CODE + 0x800;
    m.code(function, |a| recursion(a, function, |_| Ok(()), |_| Ok(())));
    m.code(CODE, |a| {
        a.mov(edi, LEVELS)?;
        a.call(function)?;
        done(a)
    });
    let mut guest = m.vcpu(0, |s| s.regs.gpr[RSP] = top);
    let stop = guest.run();
    let gpr = guest.state().regs.gpr;
    assert!(matches!(stop, Stop::Done(_)), "{stop:?}, {} pages", m.peek::<u32>(faults));
    assert_eq!((gpr[RAX], gpr[RSP]), (result(LEVELS.into()), top));
    assert_eq!(m.peek::<u32>(faults), (8 * LEVELS).div_ceil(0x1000));
}

#[test]
fn system_calls_at_each_level() {
    // User code calls the kernel on its way down and on its way back; the kernel calls and returns by itself.
    const LEVELS: u32 = 1500;
    const ROUNDS: u32 = 20;
    const KERNEL_LEVELS: u32 = 4;
    let m = Machine::new(1);
    let (function, kernel, depth) = (CODE + 0x800, CODE + 0x1000, CODE + 0x1800);
    m.user_pages(CODE, 0x1000);
    m.user_pages(STACK - 0x4000, 0x4000);
    // R8 counts what the kernel does. RCX and R11 are SYSCALL's.
    m.code(kernel, |a| {
        a.mov(r9, rsp)?;
        a.mov(rsp, RING0_STACK)?;
        a.push(rcx)?;
        a.push(r11)?;
        a.mov(edx, KERNEL_LEVELS)?;
        a.call(depth)?;
        a.pop(r11)?;
        a.pop(rcx)?;
        a.mov(rsp, r9)?;
        a.sysretq()
    });
    m.code(depth, |a| {
        let mut bottom = a.create_label();
        a.inc(r8d)?;
        a.dec(edx)?;
        a.jz(bottom)?;
        a.call(depth)?;
        a.set_label(&mut bottom)?;
        a.ret()
    });
    m.code(function, |a| recursion(a, function, |a| a.syscall(), |a| a.syscall()));
    m.code(CODE, |a| {
        let mut again = a.create_label();
        a.mov(r12d, ROUNDS)?;
        a.set_label(&mut again)?;
        a.xor(eax, eax)?;
        a.mov(edi, LEVELS)?;
        a.call(function)?;
        a.dec(r12d)?;
        a.jnz(again)?;
        done(a)
    });
    let mut guest = m.vcpu(0, |s| {
        user_mode(s);
        s.regs.rflags |= rflags::IOPL;
        take_syscalls(s, kernel);
    });
    assert!(matches!(guest.run(), Stop::Done(_)));
    let gpr = guest.state().regs.gpr;
    let calls = u64::from(ROUNDS * 2 * (LEVELS - 1) * KERNEL_LEVELS);
    assert_eq!((gpr[RAX], gpr[RSP], gpr[8]), (result(LEVELS.into()), STACK, calls));
}

#[test]
fn a_handler_that_returns_elsewhere() {
    // INT leads to a handler that unwinds to an outer level by changing its frame: the calls in between are never
    // returned from, and those outside of them are.
    const ROUNDS: u32 = 5000;
    const DEPTH: u32 = 12;
    let m = Machine::new(1);
    let (function, handler, inner, unwound) = (CODE + 0x800, CODE + 0x1000, CODE + 0x2000, CODE + 0x2800);
    m.gate(0x60, handler);
    // R14: RSP of the level to unwind to.
    m.code(handler, |a| {
        a.mov(rax, unwound)?;
        a.mov(qword_ptr(rsp), rax)?;
        a.mov(qword_ptr(rsp + 24), r14)?;
        a.iretq()
    });
    m.code(inner, |a| {
        let mut bottom = a.create_label();
        a.dec(ecx)?;
        a.jz(bottom)?;
        a.call(inner)?;
        a.ud2()?;
        a.set_label(&mut bottom)?;
        a.int(0x60)?;
        a.ud2()
    });
    m.code(unwound, |a| {
        a.inc(ebx)?;
        a.ret()
    });
    m.code(function, |a| {
        a.mov(r14, rsp)?;
        a.mov(ecx, DEPTH)?;
        a.call(inner)?;
        a.ud2()
    });
    let (stop, state) = m.run(|a| {
        let mut again = a.create_label();
        a.xor(ebx, ebx)?;
        a.mov(r12d, ROUNDS)?;
        a.set_label(&mut again)?;
        a.call(function)?;
        a.add(rbx, 2)?;
        a.dec(r12d)?;
        a.jnz(again)?;
        a.mov(eax, ebx)?;
        done(a)
    });
    assert_eq!(stop, Stop::Done(3 * ROUNDS));
    assert_eq!(state.regs.gpr[RSP], STACK);
}
