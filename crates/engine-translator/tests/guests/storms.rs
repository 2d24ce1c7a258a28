//! Storms of interrupts over code that masks them, saves flags, copies strings, computes with vectors and calls: the
//! result is that of undisturbed code, and each interrupt that was asked for comes.

use std::time::{Duration, Instant};

use iced_x86::{IcedError, code_asm::*};
use purlin_arch::x86_64::{
    msr,
    regs::gpr::{RBP, RBX, RDX},
    regs::rflags,
};

use crate::{
    apic::{DIVIDE, EOI, ICR, INITIAL_COUNT, LVT_TIMER, SELF_IPI, wrmsr, x2apic},
    machine::*,
    smp::relax,
};

type Result = std::result::Result<(), IcedError>;

const TIMER: u8 = 0x41;
const IPI: u8 = 0x42;
const HANDLERS: u64 = CODE + 0x8000;
/// What each vCPU's R15 points at: timer interrupts, messages that came, messages that were sent.
const COUNTERS: u64 = DATA;
const CAME: i32 = 8;
const SENT: i32 = 16;
/// Where a handler may write, and what the work is done on.
const SCRATCH: i32 = 0x400;
const BUFFERS: u64 = DATA + 0x1_0000;
/// Each vCPU's share of these.
const SHARE: u64 = 0x1000;
/// What EAX is where the guest has found something wrong.
const WRONG: u32 = 0xbad;

/// Counts at R15 + `counter`, executes `more`, and uses all registers meanwhile.
fn handler(m: &Machine, vector: u8, counter: i32, more: impl FnOnce(&mut CodeAssembler) -> Result) {
    let at = HANDLERS + 0x400 * u64::from(vector - TIMER);
    let all = [rax, rcx, rdx, rbx, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15];
    m.gate(vector, at);
    let end = m.code(at, |a| {
        for register in all {
            a.push(register)?;
        }
        a.sub(rsp, 32)?;
        a.movups(xmmword_ptr(rsp), xmm1)?;
        a.movups(xmmword_ptr(rsp + 16), xmm5)?;
        a.lock().inc(dword_ptr(r15 + counter))?;
        a.lea(rdi, r15 + SCRATCH)?;
        a.mov(ecx, 8)?;
        a.mov(rax, -1i64)?;
        a.cld()?;
        a.rep().stosq()?;
        a.pcmpeqd(xmm1, xmm1)?;
        a.pxor(xmm5, xmm5)?;
        more(a)?;
        wrmsr(a, EOI, 0)?;
        a.movups(xmm1, xmmword_ptr(rsp))?;
        a.movups(xmm5, xmmword_ptr(rsp + 16))?;
        a.add(rsp, 32)?;
        for register in &all[..14] {
            a.mov(*register, 0x5555_5555_5555_5555u64)?;
        }
        a.stc()?;
        for register in all.into_iter().rev() {
            a.pop(register)?;
        }
        a.iretq()
    });
    assert!(end <= at + 0x400);
}

/// A round of the work: RBP is the checksum, RBX 0x400 bytes. Interrupts are on before and behind it. R12 to R15 stay.
fn work(a: &mut CodeAssembler, wrong: CodeLabel) -> Result {
    let (mut function, mut over) = (a.create_label(), a.create_label());
    a.imul_3(rbp, rbp, 1103515245)?;
    a.add(rbp, 12345)?;
    // The carry flag lives through a section with interrupts off, and IF comes back with it.
    a.bt(rbp, 7)?;
    a.pushfq()?;
    a.cli()?;
    a.mov(r9d, dword_ptr(r15))?;
    a.mov(r10d, dword_ptr(r15 + CAME))?;
    a.mov(qword_ptr(rbx), rbp)?;
    a.mov(rsi, rbx)?;
    a.lea(rdi, rbx + 8)?;
    a.mov(ecx, 31)?;
    a.rep().movsq()?;
    // Nothing has come meanwhile.
    a.cmp(r9d, dword_ptr(r15))?;
    a.jne(wrong)?;
    a.cmp(r10d, dword_ptr(r15 + CAME))?;
    a.jne(wrong)?;
    a.popfq()?;
    a.adc(rbp, 0)?;
    // Strings, with interrupts on.
    a.mov(rsi, rbx)?;
    a.lea(rdi, rbx + 0x100)?;
    a.mov(ecx, 0x100)?;
    a.rep().movsb()?;
    a.mov(rsi, rbx)?;
    a.lea(rdi, rbx + 0x100)?;
    a.mov(ecx, 0x40)?;
    a.repe().cmpsd()?;
    a.jne(wrong)?;
    a.lodsq()?;
    a.add(rbp, rax)?;
    a.mov(eax, ebp)?;
    a.lea(rdi, rbx + 0x200)?;
    a.mov(ecx, 0x20)?;
    a.rep().stosd()?;
    a.add(rbp, qword_ptr(rbx + 0x240))?;
    // Vectors.
    a.movq(xmm1, rbp)?;
    a.pshufd(xmm5, xmm1, 0x4e)?;
    a.paddq(xmm5, xmm1)?;
    a.vpaddd(xmm5, xmm5, xmmword_ptr(rbx + 0x100))?;
    a.psrlq(xmm5, 3)?;
    a.movq(rax, xmm5)?;
    a.xor(rbp, rax)?;
    a.call(function)?;
    a.jmp(over)?;
    a.set_label(&mut function)?;
    a.push(rbp)?;
    a.cli()?;
    a.pushfq()?;
    a.pop(rax)?;
    a.and(eax, rflags::IF as i32)?;
    a.jnz(wrong)?;
    a.sti()?;
    a.pushfq()?;
    a.pop(rcx)?;
    a.and(ecx, rflags::IF as i32)?;
    a.jz(wrong)?;
    a.add(rax, rcx)?;
    a.pop(rbp)?;
    a.add(rbp, rax)?;
    a.ret()?;
    a.set_label(&mut over)?;
    a.rol(rbp, 5)
}

/// R12 rounds of work with `more` behind each, then `last`; EAX is 0 in the end.
fn program(
    a: &mut CodeAssembler,
    start: impl FnOnce(&mut CodeAssembler) -> Result,
    more: impl FnOnce(&mut CodeAssembler, CodeLabel) -> Result,
    last: impl FnOnce(&mut CodeAssembler) -> Result,
) -> Result {
    let (mut again, mut wrong) = (a.create_label(), a.create_label());
    x2apic(a)?;
    start(a)?;
    a.sti()?;
    a.set_label(&mut again)?;
    work(a, wrong)?;
    more(a, wrong)?;
    a.dec(r12d)?;
    a.jnz(again)?;
    last(a)?;
    a.cli()?;
    a.xor(eax, eax)?;
    done(a)?;
    a.set_label(&mut wrong)?;
    a.mov(eax, WRONG)?;
    done(a)
}

fn nothing(_: &mut CodeAssembler) -> Result {
    Ok(())
}

/// vCPU `index`, at code of its own.
fn vcpu(m: &Machine, index: u32, rounds: u32) -> Guest {
    m.vcpu(index, |s| {
        s.regs.rip = CODE + 0x1000 * u64::from(index);
        let gpr = &mut s.regs.gpr;
        (gpr[12], gpr[RBX], gpr[RBP]) = (rounds.into(), BUFFERS + SHARE * u64::from(index), 1);
        gpr[15] = COUNTERS + SHARE * u64::from(index);
    })
}

fn undisturbed(rounds: u32) -> u64 {
    let m = Machine::new(1);
    m.code(CODE, |a| program(a, nothing, |_, _| Ok(()), nothing));
    let mut guest = vcpu(&m, 0, rounds);
    assert_eq!(guest.run(), Stop::Done(0));
    guest.state().regs.gpr[RBP]
}

#[test]
fn the_timer_as_often_as_it_goes() {
    // Periodic, with the shortest count: the timer makes of it what it can.
    const ROUNDS: u32 = 60_000;
    /// The shortest period of the engine's, in ns.
    const PERIOD: u128 = 100_000;
    let expected = undisturbed(ROUNDS);
    let m = Machine::new(1);
    handler(&m, TIMER, 0, nothing);
    let start = |a: &mut CodeAssembler| {
        wrmsr(a, DIVIDE, 0xb)?;
        wrmsr(a, LVT_TIMER, 1 << 17 | u64::from(TIMER))?;
        wrmsr(a, INITIAL_COUNT, 1)
    };
    m.code(CODE, |a| program(a, start, |_, _| Ok(()), nothing));
    let mut guest = vcpu(&m, 0, ROUNDS);
    let begun = Instant::now();
    assert_eq!(guest.run(), Stop::Done(0));
    let most = begun.elapsed().as_nanos() / PERIOD + 2;
    let count = u128::from(m.peek::<u32>(COUNTERS));
    assert_eq!(guest.state().regs.gpr[RBP], expected, "after {count} interrupts");
    assert!((most / 20..=most).contains(&count), "{count} interrupts of {most}");
}

#[test]
fn a_timer_that_its_handler_sets_again() {
    // It is due again within a few instructions, by count or by the TSC; each one that was set fires once.
    const ROUNDS: u32 = 3000;
    const SHOTS: u32 = 3000;
    let expected = undisturbed(ROUNDS);
    for deadline in [false, true] {
        let m = Machine::new(1);
        let set = move |a: &mut CodeAssembler| {
            if !deadline {
                return wrmsr(a, INITIAL_COUNT, 700);
            }
            a.rdtsc()?;
            a.shl(rdx, 32)?;
            a.or(rax, rdx)?;
            a.add(rax, 1500)?;
            a.mov(rdx, rax)?;
            a.shr(rdx, 32)?;
            a.mov(ecx, msr::TSC_DEADLINE)?;
            a.wrmsr()
        };
        handler(&m, TIMER, 0, |a| {
            let mut enough = a.create_label();
            a.cmp(dword_ptr(r15), SHOTS as i32)?;
            a.jae(enough)?;
            set(a)?;
            a.set_label(&mut enough)?;
            a.nop()
        });
        let start = |a: &mut CodeAssembler| {
            wrmsr(a, DIVIDE, 0xb)?;
            wrmsr(a, LVT_TIMER, if deadline { 2 << 17 } else { 0 } | u64::from(TIMER))?;
            set(a)
        };
        let last = |a: &mut CodeAssembler| {
            let (mut wait, mut enough) = (a.create_label(), a.create_label());
            a.nop()?;
            a.set_label(&mut wait)?;
            a.cli()?;
            a.cmp(dword_ptr(r15), SHOTS as i32)?;
            a.jae(enough)?;
            a.sti()?;
            a.hlt()?;
            a.jmp(wait)?;
            a.set_label(&mut enough)?;
            a.nop()
        };
        m.code(CODE, |a| program(a, start, |_, _| Ok(()), last));
        let mut guest = vcpu(&m, 0, ROUNDS);
        assert_eq!(guest.run(), Stop::Done(0), "{} fired, deadline: {deadline}", m.peek::<u32>(COUNTERS));
        assert_eq!(guest.state().regs.gpr[RBP], expected, "deadline: {deadline}");
        assert_eq!(m.peek::<u32>(COUNTERS), SHOTS);
    }
}

type Window = fn(&mut CodeAssembler) -> Result;

/// Ways to let an interrupt in that a processor has sent to itself while RFLAGS.IF was clear: each of them comes there.
const WINDOWS: [(&str, Window); 7] = [
    ("sti", |a| {
        a.sti()?;
        a.nop()
    }),
    ("sti; jmp", |a| {
        a.sti()?;
        a.db(&[0xeb, 0])?;
        a.nop()
    }),
    ("popfq", |a| {
        a.push(rflags::IF as i32)?;
        a.popfq()
    }),
    ("iretq", |a| {
        let mut behind = a.create_label();
        a.mov(rax, rsp)?;
        a.push(i32::from(selector::DATA))?;
        a.push(rax)?;
        a.push(rflags::IF as i32)?;
        a.push(i32::from(selector::CODE64))?;
        a.lea(rax, ptr(behind))?;
        a.push(rax)?;
        a.iretq()?;
        a.set_label(&mut behind)?;
        a.nop()
    }),
    ("sti; cli, sti; ret", |a| {
        // The first lets nothing in.
        a.sti()?;
        a.cli()?;
        let mut behind = a.create_label();
        a.lea(rax, ptr(behind))?;
        a.push(rax)?;
        a.sti()?;
        a.ret()?;
        a.set_label(&mut behind)?;
        a.nop()
    }),
    ("sti; hlt", |a| {
        a.sti()?;
        a.hlt()
    }),
    ("a string instruction", |a| {
        a.lea(rdi, rbx + 0x300)?;
        a.mov(ecx, 3)?;
        a.sti()?;
        a.rep().stosb()
    }),
];

#[test]
fn messages_to_itself() {
    // Behind each round of the work, one that comes at once, and one for each of the windows.
    const ROUNDS: u32 = 2000;
    let expected = undisturbed(ROUNDS);
    let m = Machine::new(1);
    handler(&m, IPI, CAME, nothing);
    let more = |a: &mut CodeAssembler, wrong: CodeLabel| {
        let sent = |a: &mut CodeAssembler| {
            a.inc(dword_ptr(r15 + SENT))?;
            wrmsr(a, SELF_IPI, IPI.into())
        };
        let all_came = |a: &mut CodeAssembler| {
            a.mov(eax, dword_ptr(r15 + SENT))?;
            a.cmp(eax, dword_ptr(r15 + CAME))?;
            a.jne(wrong)
        };
        a.mov(edx, 100)?;
        sent(a)?;
        all_came(a)?;
        for (_, window) in WINDOWS {
            a.cli()?;
            sent(a)?;
            a.dec(dword_ptr(r15 + SENT))?;
            all_came(a)?;
            a.inc(dword_ptr(r15 + SENT))?;
            a.mov(r11d, dword_ptr(r15 + SENT))?;
            window(a)?;
            all_came(a)?;
        }
        a.sti()
    };
    m.code(CODE, |a| program(a, nothing, more, nothing));
    let mut guest = vcpu(&m, 0, ROUNDS);
    let stop = guest.run();
    let windows = ROUNDS * (1 + WINDOWS.len() as u32);
    let [came, sent] = [CAME, SENT].map(|at| m.peek::<u32>(COUNTERS + at as u64));
    let last = sent.wrapping_sub(1) as usize % (1 + WINDOWS.len());
    let name = last.checked_sub(1).map_or("at once", |i| WINDOWS[i].0);
    assert_eq!(stop, Stop::Done(0), "{came} of {sent} came; the last: {name}; EDX {:#x}", guest.state().regs.gpr[RDX]);
    assert_eq!((came, sent), (windows, windows));
    assert_eq!(guest.state().regs.gpr[RBP], expected);
}

#[test]
fn messages_between_two_processors_that_work() {
    // Each sends the next message when the last has been handled; the timers of both go, too.
    const ROUNDS: u32 = 20_000;
    let expected = undisturbed(ROUNDS);
    let m = Machine::new(2);
    handler(&m, TIMER, 0, nothing);
    handler(&m, IPI, CAME, nothing);
    let ready = DATA + 0x8000;
    for own in 0..2 {
        let other = 1 - own;
        // From the own counters to the other's.
        let apart = if own == 0 { SHARE as i32 } else { -(SHARE as i32) };
        let start = |a: &mut CodeAssembler| {
            wrmsr(a, DIVIDE, 0xb)?;
            wrmsr(a, LVT_TIMER, 1 << 17 | u64::from(TIMER))?;
            wrmsr(a, INITIAL_COUNT, 150_000)?;
            let mut wait = a.create_label();
            a.mov(rsi, ready)?;
            a.lock().inc(dword_ptr(rsi))?;
            a.set_label(&mut wait)?;
            relax(a)?;
            a.cmp(dword_ptr(rsi), 2)?;
            a.jne(wait)
        };
        let more = |a: &mut CodeAssembler, _: CodeLabel| {
            let (mut on_its_way, mut over) = (a.create_label(), a.create_label());
            a.mov(eax, dword_ptr(r15 + SENT))?;
            a.cmp(eax, dword_ptr(r15 + (CAME + apart)))?;
            a.jne(on_its_way)?;
            a.inc(dword_ptr(r15 + SENT))?;
            wrmsr(a, ICR, other << 32 | u64::from(IPI))?;
            a.jmp(over)?;
            // The other may have no processor of the host's to run on.
            a.set_label(&mut on_its_way)?;
            a.add(r13b, 16)?;
            a.jnz(over)?;
            a.out(u32::from(YIELD), al)?;
            a.set_label(&mut over)?;
            a.nop()
        };
        let last = |a: &mut CodeAssembler| {
            // Until both know that nothing is on its way any more.
            let (mut wait, mut both) = (a.create_label(), a.create_label());
            a.mov(rsi, ready)?;
            a.set_label(&mut wait)?;
            relax(a)?;
            a.mov(eax, dword_ptr(r15 + SENT))?;
            a.cmp(eax, dword_ptr(r15 + (CAME + apart)))?;
            a.jne(wait)?;
            a.lock().inc(dword_ptr(rsi))?;
            a.set_label(&mut both)?;
            relax(a)?;
            a.cmp(dword_ptr(rsi), 4)?;
            a.jne(both)
        };
        m.code(CODE + 0x1000 * own, |a| program(a, start, more, last));
    }
    let mut guests: Vec<_> = (0..2).map(|i| vcpu(&m, i, ROUNDS)).collect();
    let begun = Instant::now();
    let stops = run_all(&mut guests);
    let counts = [0, 1].map(|i| [0, CAME, SENT].map(|at| m.peek::<u32>(COUNTERS + SHARE * i + at as u64)));
    assert_eq!(stops, [Stop::Done(0); 2], "ticks, came and sent: {counts:?}");
    for guest in &mut guests {
        assert_eq!(guest.state().regs.gpr[RBP], expected, "{counts:?}");
    }
    let [[ticks, came, sent], [other_ticks, other_came, other_sent]] = counts;
    assert_eq!((came, other_came), (other_sent, sent));
    // Where both share one processor of the host's, there is one for each of its time slices.
    assert!(sent >= 3 && other_sent >= 3, "{counts:?}");
    let most = begun.elapsed().as_nanos() / Duration::from_micros(150).as_nanos() + 2;
    for ticks in [ticks, other_ticks] {
        assert!(ticks >= 3 && u128::from(ticks) <= most, "{ticks} ticks of {most}");
    }
}
