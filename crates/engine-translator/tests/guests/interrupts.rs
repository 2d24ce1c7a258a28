//! Interrupts: shadows, NMI, the local APIC's timer and messages, kicks, and state saved in the middle of things.

use std::{
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
    time::{Duration, Instant},
};

use iced_x86::{IcedError, code_asm::*};
use purlin_arch::x86_64::{
    msr,
    regs::{
        gpr::{RAX, RDI},
        rflags,
    },
    state::{Activity, VcpuState},
};
use vm_memory::{Bytes, GuestAddress};

use crate::{
    apic::{CURRENT_COUNT, DIVIDE, EOI, ICR, INITIAL_COUNT, LVT_LINT0, LVT_TIMER, SELF_IPI, wrmsr, x2apic},
    machine::*,
};

type Result = std::result::Result<(), IcedError>;
type Code = fn(&mut CodeAssembler) -> Result;

/// The vector that most of these tests use, and where its handler is.
const VECTOR: u8 = 0x41;
const HANDLER: u64 = CODE + 0x4000;
/// Each vCPU's counter of interrupts: R15 points at it.
const COUNTERS: u64 = DATA;

/// Counts at R15 and ends the interrupt.
fn counting_handler(m: &Machine, vector: u8) {
    m.gate(vector, HANDLER);
    m.code(HANDLER, |a| {
        a.push(rax)?;
        a.push(rcx)?;
        a.push(rdx)?;
        a.lock().inc(dword_ptr(r15))?;
        wrmsr(a, EOI, 0)?;
        a.pop(rdx)?;
        a.pop(rcx)?;
        a.pop(rax)?;
        a.iretq()
    });
}

/// A vCPU with R15 at its counter.
fn vcpu(m: &Machine, index: u32, rip: u64) -> Guest {
    m.vcpu(index, |s| {
        s.regs.rip = rip;
        s.regs.gpr[15] = COUNTERS + 64 * u64::from(index);
    })
}

#[test]
fn an_interrupt_waits_for_its_shadow_to_end() {
    // The 8259's line is up from the start. What comes after the prologue, and how far it gets.
    let rows: [(&str, Code, Option<usize>); 9] = [
        ("sti; nop", |a| a.db(&[0xfb, 0x90, 0x90]), Some(2)),
        ("sti; hlt", |a| a.db(&[0xfb, 0xf4, 0x90]), Some(2)),
        ("sti; sti", |a| a.db(&[0xfb, 0xfb, 0x90]), Some(2)),
        ("sti; cli", |a| a.db(&[0xfb, 0xfa, 0x90]), None),
        ("sti; mov ss, ebx; nop", |a| a.db(&[0xfb, 0x8e, 0xd3, 0x90, 0x90]), Some(4)),
        ("sti; inc dword [rsi]", |a| a.db(&[0xfb, 0xff, 0x06, 0x90]), Some(3)),
        ("sti; jmp", |a| a.db(&[0xfb, 0xeb, 0x01, 0x90, 0x90]), Some(4)),
        ("push 0x202; popfq; nop", |a| a.db(&[0x68, 2, 2, 0, 0, 0x9d, 0x90, 0x90]), Some(6)),
        ("sti; rep stosb", |a| a.db(&[0xfb, 0xf3, 0xaa, 0x90]), Some(3)),
    ];
    for (name, code, taken) in rows {
        let m = Machine::new(1);
        lock(&m.bus.vectors).push_back(VECTOR);
        let start = m.code(CODE, |a| {
            x2apic(a)?;
            wrmsr(a, LVT_LINT0, 0x700)?;
            a.mov(ebx, u32::from(selector::DATA))?;
            a.mov(rsi, DATA)?;
            a.mov(rdi, DATA)?;
            a.mov(ecx, 1)
        });
        m.code(start, |a| {
            code(a)?;
            done(a)
        });
        let mut guest = m.vcpu(0, |_| {});
        m.vm.set_extint(true);
        match (guest.run(), taken) {
            (Stop::Done(_), None) => {}
            (Stop::Vector(VECTOR, frame), Some(n)) => assert_eq!(frame.rip - start, n as u64, "{name}"),
            other => panic!("{name}: {other:?}"),
        }
    }
}

#[test]
fn no_wakeup_is_lost_between_sti_and_hlt() {
    // An idle loop: it sleeps only if nothing has come; an interrupt that comes between STI and HLT would be slept
    // through.
    let m = Machine::new(1);
    counting_handler(&m, VECTOR);
    const ROUNDS: u32 = 5000;
    m.code(CODE, |a| {
        let (mut again, mut idle, mut come) = (a.create_label(), a.create_label(), a.create_label());
        x2apic(a)?;
        a.xor(ebx, ebx)?;
        a.set_label(&mut again)?;
        a.mov(dword_ptr(r15 + 8), ebx)?;
        a.set_label(&mut idle)?;
        a.cli()?;
        a.cmp(dword_ptr(r15), ebx)?;
        a.jne(come)?;
        a.sti()?;
        a.hlt()?;
        a.jmp(idle)?;
        a.set_label(&mut come)?;
        a.inc(ebx)?;
        a.cmp(ebx, ROUNDS as i32)?;
        a.jne(again)?;
        a.mov(eax, ebx)?;
        done(a)
    });
    let mut guest = vcpu(&m, 0, CODE);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0..ROUNDS {
                // The guest has told that it is about to sleep.
                while m.peek::<u32>(COUNTERS + 8) != round && !over.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
                for _ in 0..round % 61 {
                    std::hint::spin_loop();
                }
                if round == 0 {
                    // Its APIC may not be enabled yet.
                    std::thread::sleep(Duration::from_millis(20));
                }
                m.vm.deliver_msi(0xfee0_0000, u32::from(VECTOR));
            }
        });
        let stop = guest.run_for(Duration::from_secs(8));
        over.store(true, Ordering::Relaxed);
        assert_eq!(stop, Stop::Done(ROUNDS), "stuck after {} rounds", m.peek::<u32>(COUNTERS + 8));
    });
}

#[test]
fn nmis_are_masked_until_iret() {
    // The handler sends itself another NMI, which must wait for its IRET.
    let m = Machine::new(1);
    m.gate(2, HANDLER);
    m.code(HANDLER, |a| {
        let mut last = a.create_label();
        a.inc(dword_ptr(r15))?;
        a.mov(ebx, dword_ptr(r15))?;
        a.cmp(ebx, 3)?;
        a.je(last)?;
        wrmsr(a, ICR, 4 << 8)?;
        for _ in 0..20 {
            a.nop()?;
        }
        // Nothing has come in between.
        a.cmp(ebx, dword_ptr(r15))?;
        a.je(last)?;
        a.ud2()?;
        a.set_label(&mut last)?;
        a.iretq()
    });
    m.code(CODE, |a| {
        x2apic(a)?;
        wrmsr(a, ICR, 4 << 8)?;
        a.nop()?;
        a.mov(eax, dword_ptr(r15))?;
        done(a)
    });
    // Maskable interrupts are off: it comes all the same.
    assert_eq!(vcpu(&m, 0, CODE).run(), Stop::Done(3));
}

#[test]
fn the_timer_of_the_local_apic() {
    let m = Machine::new(1);
    counting_handler(&m, VECTOR);
    let wait = |a: &mut CodeAssembler, count: u32| {
        let mut again = a.create_label();
        a.nop()?;
        a.set_label(&mut again)?;
        a.sti()?;
        a.hlt()?;
        a.cli()?;
        a.cmp(dword_ptr(r15), count as i32)?;
        a.jb(again)
    };
    m.code(CODE, |a| {
        x2apic(a)?;
        wrmsr(a, DIVIDE, 0xb)?;
        // One-shot, 1 ms at 1 GHz: once only.
        wrmsr(a, LVT_TIMER, VECTOR.into())?;
        wrmsr(a, INITIAL_COUNT, 1_000_000)?;
        wait(a, 1)?;
        a.mov(ecx, CURRENT_COUNT)?;
        a.rdmsr()?;
        a.mov(r8d, eax)?;
        // Periodic: five more.
        wrmsr(a, LVT_TIMER, 1 << 17 | u64::from(VECTOR))?;
        wrmsr(a, INITIAL_COUNT, 500_000)?;
        wait(a, 6)?;
        wrmsr(a, INITIAL_COUNT, 0)?;
        a.mov(r9d, dword_ptr(r15))?;
        // TSC-deadline: not before the TSC is there.
        wrmsr(a, LVT_TIMER, 2 << 17 | u64::from(VECTOR))?;
        a.mov(dword_ptr(r15), 0)?;
        a.rdtsc()?;
        a.shl(rdx, 32)?;
        a.or(rax, rdx)?;
        a.add(rax, 3_000_000)?;
        a.mov(r10, rax)?;
        a.mov(rdx, rax)?;
        a.shr(rdx, 32)?;
        a.mov(ecx, msr::TSC_DEADLINE)?;
        a.wrmsr()?;
        wait(a, 1)?;
        a.rdtsc()?;
        a.shl(rdx, 32)?;
        a.or(rax, rdx)?;
        a.sub(rax, r10)?;
        a.mov(r11, rax)?;
        a.mov(ecx, msr::TSC_DEADLINE)?;
        a.rdmsr()?;
        a.mov(r12d, eax)?;
        a.or(r12d, edx)?;
        // A deadline that has passed fires at once; zero disarms.
        a.mov(eax, 1)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        wait(a, 2)?;
        a.mov(eax, dword_ptr(r15))?;
        done(a)
    });
    let mut guest = vcpu(&m, 0, CODE);
    let start = Instant::now();
    assert_eq!(guest.run(), Stop::Done(2));
    assert!(start.elapsed() >= Duration::from_micros(3500), "too early: {:?}", start.elapsed());
    let gpr = guest.state().regs.gpr;
    assert_eq!(gpr[8], 0, "the current count of a one-shot timer that has fired");
    assert!(gpr[9] >= 6);
    assert!((gpr[11] as i64) >= 0, "the deadline's interrupt came {} ticks early", -(gpr[11] as i64));
    assert_eq!(gpr[12], 0, "IA32_TSC_DEADLINE is cleared when it fires");
}

/// Four vCPUs; the first sends, all count.
fn counts_after(x2: bool, send: impl Fn(&mut CodeAssembler) -> Result, expected: [u32; 4]) {
    let m = Machine::new(4);
    m.map(0xfee0_0000, 0xfee0_0000, pte::P | pte::W);
    m.gate(VECTOR, HANDLER);
    m.gate(2, HANDLER + 0x100);
    m.code(HANDLER, |a| {
        a.push(rax)?;
        a.push(rcx)?;
        a.push(rdx)?;
        a.lock().inc(dword_ptr(r15))?;
        if x2 {
            wrmsr(a, EOI, 0)?;
        } else {
            a.mov(eax, 0xfee0_00b0u32)?;
            a.mov(dword_ptr(rax), 0)?;
        }
        a.pop(rdx)?;
        a.pop(rcx)?;
        a.pop(rax)?;
        a.iretq()
    });
    m.code(HANDLER + 0x100, |a| {
        a.lock().add(dword_ptr(r15), 0x100)?;
        a.iretq()
    });
    let ready = COUNTERS + 0x800;
    m.code(CODE, |a| {
        let (mut idle, mut wait, mut sender) = (a.create_label(), a.create_label(), a.create_label());
        if x2 {
            x2apic(a)?;
        } else {
            a.mov(ebx, 0xfee0_0000u32)?;
            a.mov(dword_ptr(rbx + 0xf0), 0x1ff)?;
            // Flat model, one bit each: R14 is the number.
            a.mov(dword_ptr(rbx + 0xe0), -1)?;
            a.mov(ecx, r14d)?;
            a.mov(eax, 0x100_0000)?;
            a.shl(eax, cl)?;
            a.mov(dword_ptr(rbx + 0xd0), eax)?;
        }
        a.mov(rsi, ready)?;
        a.lock().inc(dword_ptr(rsi))?;
        a.test(r14d, r14d)?;
        a.jz(sender)?;
        a.sti()?;
        a.set_label(&mut idle)?;
        a.hlt()?;
        a.jmp(idle)?;
        a.set_label(&mut sender)?;
        a.sti()?;
        a.set_label(&mut wait)?;
        a.out(u32::from(YIELD), al)?;
        a.cmp(dword_ptr(rsi), 4)?;
        a.jne(wait)?;
        send(a)?;
        a.nop()?;
        done(a)
    });
    let mut guests: Vec<_> = (0..4)
        .map(|i| {
            m.vcpu(i, |s| {
                s.regs.gpr[15] = COUNTERS + 64 * u64::from(i);
                s.regs.gpr[14] = i.into();
            })
        })
        .collect();
    let kickers: Vec<_> = guests.iter().map(|g| g.kicker.clone()).collect();
    let counters = || [0, 1, 2, 3].map(|i| m.peek::<u32>(COUNTERS + 64 * i));
    watchdog(&kickers.clone(), || {
        std::thread::scope(|scope| {
            let (first, others) = guests.split_at_mut(1);
            let others: Vec<_> = others.iter_mut().map(|g| scope.spawn(|| g.run_unwatched())).collect();
            assert!(matches!(first[0].run_unwatched(), Stop::Done(_)));
            let start = Instant::now();
            while counters() != expected && start.elapsed() < Duration::from_secs(5) {
                std::thread::sleep(Duration::from_micros(200));
            }
            // Nothing more comes.
            std::thread::sleep(Duration::from_millis(2));
            kickers.iter().for_each(|k| k.kick());
            for thread in others {
                assert_eq!(thread.join().unwrap(), Stop::Kicked);
            }
        });
    });
    assert_eq!(counters(), expected);
}

#[test]
fn messages_between_processors_x2apic() {
    let v = u64::from(VECTOR);
    let icr = |value: u64| move |a: &mut CodeAssembler| wrmsr(a, ICR, value);
    counts_after(true, icr(1 << 32 | v), [0, 1, 0, 0]);
    counts_after(true, icr(1 << 18 | v), [1, 0, 0, 0]);
    counts_after(true, icr(2 << 18 | v), [1, 1, 1, 1]);
    counts_after(true, icr(3 << 18 | v), [0, 1, 1, 1]);
    counts_after(true, icr(0xffff_ffff << 32 | v), [1, 1, 1, 1]);
    // Logical: cluster 0, processors 1 and 3.
    counts_after(true, icr(0xa << 32 | 1 << 11 | v), [0, 1, 0, 1]);
    counts_after(true, icr(2 << 32 | 4 << 8), [0, 0, 0x100, 0]);
    counts_after(true, icr(3 << 18 | 4 << 8), [0, 0x100, 0x100, 0x100]);
    counts_after(true, |a| wrmsr(a, SELF_IPI, v), [1, 0, 0, 0]);
    // Nobody has this ID.
    counts_after(true, icr(9 << 32 | v), [0, 0, 0, 0]);
}

#[test]
fn messages_between_processors_xapic() {
    let v = u32::from(VECTOR);
    let icr = |high: u32, low: u32| {
        move |a: &mut CodeAssembler| {
            a.mov(dword_ptr(rbx + 0x310), high)?;
            a.mov(dword_ptr(rbx + 0x300), low)
        }
    };
    counts_after(false, icr(3 << 24, v), [0, 0, 0, 1]);
    counts_after(false, icr(0xff << 24, v), [1, 1, 1, 1]);
    counts_after(false, icr(0, 1 << 18 | v), [1, 0, 0, 0]);
    counts_after(false, icr(0, 3 << 18 | v), [0, 1, 1, 1]);
    counts_after(false, icr(6 << 24, 1 << 11 | v), [0, 1, 1, 0]);
    // Lowest priority, logical, one processor to choose from.
    counts_after(false, icr(4 << 24, 1 << 11 | 1 << 8 | v), [0, 0, 1, 0]);
    counts_after(false, icr(1 << 24, 4 << 8), [0, 0x100, 0, 0]);
}

#[test]
fn a_processor_is_started_and_started_again() {
    let m = Machine::new(2);
    // Real mode: counts at 0x7000, then loops (the first) or sleeps (the second).
    m.code_of(16, 0, 0x8000, |a| {
        let mut again = a.create_label();
        a.xor(ax, ax)?;
        a.mov(ds, ax)?;
        a.inc(word_ptr(0x7000))?;
        a.set_label(&mut again)?;
        a.jmp(again)
    });
    m.code_of(16, 0, 0x9000, |a| {
        a.xor(ax, ax)?;
        a.mov(ds, ax)?;
        a.mov(word_ptr(0x7004), cs)?;
        a.add(word_ptr(0x7000), 0x10)?;
        a.hlt()
    });
    m.code(CODE, |a| {
        x2apic(a)?;
        let send = |a: &mut CodeAssembler, value: u64, until: u32| {
            wrmsr(a, ICR, 1 << 32 | value)?;
            let mut wait = a.create_label();
            a.mov(rsi, 0x7000u64)?;
            a.set_label(&mut wait)?;
            a.out(u32::from(YIELD), al)?;
            a.cmp(word_ptr(rsi), until as i32)?;
            a.jne(wait)
        };
        // A second SIPI is ignored by a processor that runs.
        send(a, 0x4500, 0)?;
        send(a, 0x4608, 1)?;
        send(a, 0x4609, 1)?;
        send(a, 0x4500, 1)?;
        send(a, 0x4609, 0x11)?;
        send(a, 0x4608, 0x11)?;
        done(a)
    });
    let mut first = m.vcpu(0, |_| {});
    let mut second = m.vcpu(1, |s| *s = waiting(s));
    let kickers = [first.kicker.clone(), second.kicker.clone()];
    watchdog(&kickers, || {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| second.run_unwatched());
            assert!(matches!(first.run_unwatched(), Stop::Done(_)));
            kickers[1].kick();
            assert_eq!(thread.join().unwrap(), Stop::Kicked);
        });
    });
    assert_eq!((m.peek::<u16>(0x7000), m.peek::<u16>(0x7004)), (0x11, 0x900));
    assert_eq!(second.state().activity, Activity::Halted as i32);
}

/// `state` of a processor that waits for SIPI.
fn waiting(state: &VcpuState) -> VcpuState {
    VcpuState { activity: Activity::WaitForSipi.into(), ..state.clone() }
}

#[test]
fn the_end_of_a_level_triggered_interrupt_reaches_the_bus() {
    let m = Machine::new(1);
    counting_handler(&m, VECTOR);
    counting_handler(&m, VECTOR + 1);
    m.code(CODE, |a| {
        let mut again = a.create_label();
        x2apic(a)?;
        a.mov(dword_ptr(r15 + 8), 1)?;
        a.sti()?;
        a.set_label(&mut again)?;
        a.hlt()?;
        a.cmp(dword_ptr(r15), 2)?;
        a.jb(again)?;
        done(a)
    });
    let mut guest = vcpu(&m, 0, CODE);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while m.peek::<u32>(COUNTERS + 8) == 0 {
                std::thread::yield_now();
            }
            // Edge, then level and assert (SDM vol. 3A 11.11.2).
            m.vm.deliver_msi(0xfee0_0000, u32::from(VECTOR));
            m.vm.deliver_msi(0xfee0_0000, 3 << 14 | u32::from(VECTOR + 1));
        });
        assert!(matches!(guest.run(), Stop::Done(_)));
    });
    assert_eq!(*lock(&m.bus.ends), [VECTOR + 1]);
}

/// A computation over registers, flags, memory, x87 and vectors; its result in EAX.
fn computation(a: &mut CodeAssembler, rounds: u32) -> Result {
    let (mut again, mut function, mut over) = (a.create_label(), a.create_label(), a.create_label());
    a.mov(rbx, DATA + 0x4000)?;
    a.mov(r12d, rounds)?;
    a.mov(eax, 1)?;
    a.fninit()?;
    a.fldz()?;
    a.pxor(xmm5, xmm5)?;
    a.xor(r10d, r10d)?;
    a.xor(r11d, r11d)?;
    a.set_label(&mut again)?;
    a.imul_3(eax, eax, 1103515245)?;
    a.add(eax, 12345)?;
    a.rcr(r10, 3)?;
    a.adc(r10, rax)?;
    a.mov(ecx, eax)?;
    a.and(ecx, 0x3f8)?;
    a.add(qword_ptr(rbx + rcx), r10)?;
    a.adc(r11, 0)?;
    a.movd(xmm1, eax)?;
    a.paddq(xmm5, xmm1)?;
    a.fld1()?;
    a.faddp(st1, st0)?;
    a.call(function)?;
    a.dec(r12d)?;
    a.jnz(again)?;
    a.fistp(dword_ptr(rbx + 0x1000))?;
    a.add(eax, dword_ptr(rbx + 0x1000))?;
    a.movq(rdx, xmm5)?;
    a.xor(rax, rdx)?;
    a.xor(rax, r10)?;
    a.add(rax, r11)?;
    a.mov(ecx, 128)?;
    a.mov(rsi, rbx)?;
    let mut sum = a.create_label();
    a.set_label(&mut sum)?;
    a.add(rax, qword_ptr(rsi))?;
    a.rol(rax, 1)?;
    a.add(rsi, 8)?;
    a.dec(ecx)?;
    a.jnz(sum)?;
    a.mov(rdx, rax)?;
    a.shr(rdx, 32)?;
    a.xor(eax, edx)?;
    a.jmp(over)?;
    a.set_label(&mut function)?;
    a.push(rax)?;
    a.lahf()?;
    a.movzx(edx, ah)?;
    a.add(r10, rdx)?;
    a.pop(rax)?;
    a.ret()?;
    a.set_label(&mut over)?;
    a.cli()?;
    done(a)
}

fn undisturbed(rounds: u32) -> Stop {
    let m = Machine::new(1);
    m.run(|a| computation(a, rounds)).0
}

#[test]
fn a_storm_of_interrupts_changes_no_register() {
    const ROUNDS: u32 = 5_000_000;
    let expected = undisturbed(ROUNDS);
    assert!(matches!(expected, Stop::Done(_)));
    let m = Machine::new(1);
    counting_handler(&m, VECTOR);
    m.code(CODE, |a| {
        x2apic(a)?;
        wrmsr(a, DIVIDE, 0xb)?;
        wrmsr(a, LVT_TIMER, 1 << 17 | u64::from(VECTOR))?;
        wrmsr(a, INITIAL_COUNT, 100_000)?;
        a.sti()?;
        computation(a, ROUNDS)
    });
    let mut guest = vcpu(&m, 0, CODE);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                m.vm.deliver_msi(0xfee0_0000, u32::from(VECTOR));
                (0..200).for_each(|_| std::hint::spin_loop());
            }
        });
        let stop = guest.run();
        over.store(true, Ordering::Relaxed);
        assert_eq!(stop, expected);
    });
    assert!(m.peek::<u32>(COUNTERS) > 3, "{} interrupts", m.peek::<u32>(COUNTERS));
}

#[test]
fn a_processor_that_sleeps_uses_no_time() {
    let m = Machine::new(1);
    m.code(CODE, |a| {
        a.sti()?;
        a.hlt()
    });
    let mut guest = m.vcpu(0, |_| {});
    let kicker = guest.kicker.clone();
    let used = || {
        let t = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
        Duration::new(t.tv_sec as u64, t.tv_nsec as u32)
    };
    std::thread::scope(|scope| {
        scope.spawn(move || {
            std::thread::sleep(Duration::from_millis(200));
            kicker.kick();
        });
        let before = used();
        assert_eq!(guest.run(), Stop::Kicked);
        assert!(used() - before < Duration::from_millis(50), "{:?}", used() - before);
    });
}

#[test]
fn no_kick_is_lost() {
    let loops: [Code; 3] = [
        |a| a.db(&[0xeb, 0xfe]),
        |a| {
            a.hlt()?;
            a.jmp(CODE)
        },
        |a| {
            a.call(CODE + 0x1000)?;
            a.out(u32::from(YIELD), al)?;
            a.jmp(CODE)
        },
    ];
    for code in loops {
        let m = Machine::new(1);
        m.code(CODE, code);
        m.poke(CODE + 0x1000, 0xc3u8);
        let mut guest = m.vcpu(0, |s| s.regs.rflags |= rflags::IF);
        // As many as a busy host manages in a while: each has to end one run.
        const KICKS: u32 = 3500;
        let start = Instant::now();
        let seen = AtomicU32::new(0);
        let kicker = guest.kicker.clone();
        let (seen, over) = (&seen, &AtomicBool::new(false));
        watchdog(&[guest.kicker.clone()], || {
            std::thread::scope(|scope| {
                scope.spawn(move || {
                    for kick in 1..=KICKS {
                        kicker.kick();
                        while seen.load(Ordering::Acquire) < kick && !over.load(Ordering::Relaxed) {
                            std::thread::yield_now();
                        }
                    }
                });
                // One kick, one return.
                for kick in 1..=KICKS {
                    assert_eq!(guest.run_unwatched(), Stop::Kicked);
                    seen.store(kick, Ordering::Release);
                    if start.elapsed() > Duration::from_secs(1) {
                        break;
                    }
                }
                over.store(true, Ordering::Relaxed);
            });
        });
    }
}

#[test]
fn state_moves_to_another_machine_between_any_two_instructions() {
    const ROUNDS: u32 = 3_000_000;
    let expected = undisturbed(ROUNDS);
    let mut m = Machine::new(1);
    counting_handler(&m, VECTOR);
    m.code(CODE, |a| {
        x2apic(a)?;
        wrmsr(a, DIVIDE, 0xb)?;
        wrmsr(a, LVT_TIMER, 1 << 17 | u64::from(VECTOR))?;
        wrmsr(a, INITIAL_COUNT, 100_000)?;
        a.sti()?;
        computation(a, ROUNDS)
    });
    let mut guest = vcpu(&m, 0, CODE);
    let mut moves = 0;
    let stop = loop {
        let kicker = guest.kicker.clone();
        let stop = std::thread::scope(|scope| {
            let pause = Duration::from_micros(300 + moves * 7919 % 900);
            if moves < 20 {
                scope.spawn(move || {
                    std::thread::sleep(pause);
                    kicker.kick();
                });
            }
            guest.run()
        });
        if stop != Stop::Kicked {
            break stop;
        }
        moves += 1;
        let state = guest.state();
        let next = Machine::new(1);
        let mut memory = vec![0; MEMORY as usize];
        m.memory.read_slice(&mut memory, GuestAddress(0)).unwrap();
        next.load(0, &memory);
        guest = next.vcpu(0, |s| *s = state);
        m = next;
    };
    assert_eq!(stop, expected, "after {moves} moves");
    assert!(moves > 0, "it was never moved");
    assert!(m.peek::<u32>(COUNTERS) > 3, "{} timer interrupts", m.peek::<u32>(COUNTERS));
}

#[test]
fn a_mapping_taken_away_from_four_processors() {
    // The first changes a mapping, tells the others by an interrupt, waits until all have heard, and changes the old
    // page, which nobody must read any more.
    const ROUNDS: u32 = 12;
    const WINDOW: u64 = 0x7000_0000;
    let (one, two) = (DATA + 0x1_0000, DATA + 0x2_0000);
    let (heard, over) = (DATA + 0x3000, DATA + 0x3040);
    let m = Machine::new(4);
    m.map(WINDOW, one, pte::P);
    let entry = m.pte(WINDOW);
    m.gate(VECTOR, HANDLER);
    m.code(HANDLER, |a| {
        a.push(rax)?;
        a.push(rcx)?;
        a.push(rdx)?;
        a.mov(rax, WINDOW)?;
        a.invlpg(ptr(rax))?;
        wrmsr(a, EOI, 0)?;
        a.mov(rax, heard)?;
        a.lock().inc(dword_ptr(rax))?;
        a.pop(rdx)?;
        a.pop(rcx)?;
        a.pop(rax)?;
        a.iretq()
    });
    m.code(CODE, |a| {
        let (mut again, mut wait, mut start) = (a.create_label(), a.create_label(), a.create_label());
        x2apic(a)?;
        a.mov(rsi, entry)?;
        a.mov(rdi, heard)?;
        a.mov(r8, one)?;
        a.mov(r9, two)?;
        a.mov(ebx, ROUNDS)?;
        a.set_label(&mut start)?;
        a.out(u32::from(YIELD), al)?;
        a.cmp(dword_ptr(rdi), 3)?;
        a.jne(start)?;
        a.set_label(&mut again)?;
        // The new page is good, the old one goes bad.
        a.mov(dword_ptr(r9), 0)?;
        a.mov(dword_ptr(rdi), 0)?;
        a.xor(qword_ptr(rsi), (one ^ two) as i32)?;
        wrmsr(a, ICR, 3 << 18 | u64::from(VECTOR))?;
        a.set_label(&mut wait)?;
        a.out(u32::from(YIELD), al)?;
        a.cmp(dword_ptr(rdi), 3)?;
        a.jne(wait)?;
        a.mov(dword_ptr(r8), 1)?;
        a.xchg(r8, r9)?;
        a.dec(ebx)?;
        a.jnz(again)?;
        a.mov(rax, over)?;
        a.mov(dword_ptr(rax), 1)?;
        done(a)
    });
    m.code(CODE + 0x1000, |a| {
        let (mut again, mut wrong) = (a.create_label(), a.create_label());
        x2apic(a)?;
        a.mov(rbx, WINDOW)?;
        a.mov(rsi, over)?;
        a.mov(rdi, heard)?;
        a.sti()?;
        a.lock().inc(dword_ptr(rdi))?;
        a.set_label(&mut again)?;
        a.cmp(dword_ptr(rbx), 0)?;
        a.jne(wrong)?;
        a.cmp(dword_ptr(rsi), 0)?;
        a.je(again)?;
        a.xor(eax, eax)?;
        done(a)?;
        a.set_label(&mut wrong)?;
        a.ud2()
    });
    let mut guests: Vec<_> = (0..4).map(|i| vcpu(&m, i, if i == 0 { CODE } else { CODE + 0x1000 })).collect();
    for stop in run_all(&mut guests) {
        assert!(matches!(stop, Stop::Done(_)), "{stop:?}");
    }
}

#[test]
fn an_interrupt_in_user_code_switches_the_stack() {
    let m = Machine::new(1);
    m.user_pages(CODE, 0x1000);
    m.user_pages(STACK - 0x1000, 0x1000);
    lock(&m.bus.vectors).push_back(VECTOR);
    m.code(CODE, |a| a.db(&[0xeb, 0xfe]));
    let mut guest = m.vcpu(0, |s| {
        user_mode(s);
        s.regs.rflags |= rflags::IF;
        s.regs.gpr[RAX] = 77;
    });
    // The APIC is not enabled by software: the 8259's line is the processor's own pin.
    let vm = m.vm.clone();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            std::thread::sleep(Duration::from_millis(5));
            vm.set_extint(true);
        });
        guest.change(|s| {
            s.lapic.regs[0x350..0x354].copy_from_slice(&0x700u32.to_le_bytes());
        });
        let Stop::Vector(vector, frame) = guest.run() else { panic!("no interrupt") };
        assert_eq!((vector, frame.rip, frame.cs, frame.ss), (VECTOR, CODE, 0x43, 0x3b));
        assert_eq!((frame.rsp, frame.error), (STACK, None));
    });
    let state = guest.state();
    assert_eq!(state.regs.gpr[4], RING0_STACK - 40);
    assert_eq!(state.regs.rflags & rflags::IF, 0, "an interrupt gate");
    assert_eq!(state.regs.gpr[RAX], 77);
}

/// A jump of almost 2 GiB round the end of the address space leads backward, so it may be interrupted: at its target, which
/// is more than 2 GiB away from where the block begins.
#[test]
fn a_jump_as_far_as_jumps_reach_is_interrupted() {
    const START: u64 = 0xffff_ffff_ffff_f000;
    const TARGET: u64 = 0x7fff_f008;
    let m = Machine::new(1);
    // inc ebx, twice; jmp +0x7fffffff
    m.map(START, CODE, pte::P);
    m.load(CODE, &[0xff, 0xc3, 0xff, 0xc3, 0xe9, 0xff, 0xff, 0xff, 0x7f]);
    // jmp rdi
    m.map(TARGET & !0xfff, CODE + 0x1000, pte::P);
    m.load(CODE + 0x1000 + (TARGET & 0xfff), &[0xff, 0xe7]);
    let mut guest = m.vcpu(0, |s| (s.regs.rip, s.regs.gpr[RDI]) = (START, START));
    for _ in 0..100 {
        assert_eq!(guest.run_for(Duration::from_millis(1)), Stop::Kicked);
        let rip = guest.state().regs.rip;
        assert!([START, TARGET].contains(&rip), "{rip:#x}");
    }
}
