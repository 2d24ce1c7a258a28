//! Interrupts that an instruction brings about, or lets in: whichever it is, none is passed by.

use iced_x86::{IcedError, code_asm::*};
use purlin_arch::x86_64::regs::rflags;

use crate::{
    apic::{EOI, SELF_IPI, TPR, wrmsr, x2apic},
    machine::*,
};

type Result = std::result::Result<(), IcedError>;
type Code = fn(&mut CodeAssembler) -> Result;

const VECTOR: u8 = 0x41;
/// One of a higher priority.
const HIGHER: u8 = 0x81;
const HANDLER: u64 = CODE + 0x4000;
/// R15 points here; counts of what came and what must have come.
const COUNTERS: u64 = DATA;
const SENT: i32 = 8;
/// The local APIC in xAPIC mode: RBX points here. Registers are those of SDM vol. 3A table 11-1.
const XAPIC: u64 = 0xfee0_0000;
const XTPR: i32 = 0x80;
const XEOI: i32 = 0xb0;
const XSVR: i32 = 0xf0;
const XICR: i32 = 0x300;
const XLVT_TIMER: i32 = 0x320;
const XINITIAL_COUNT: i32 = 0x380;
const XDIVIDE: i32 = 0x3e0;
/// ICR: to oneself, fixed.
const TO_SELF: u32 = 1 << 18;

/// A machine whose handler counts, and ends interrupts in either mode of the APIC.
fn machine(x2: bool) -> Machine {
    let m = Machine::new(1);
    m.map(XAPIC, XAPIC, pte::P | pte::W);
    m.gate(VECTOR, HANDLER);
    m.code(HANDLER, |a| {
        a.push(rax)?;
        a.push(rcx)?;
        a.push(rdx)?;
        a.inc(dword_ptr(r15))?;
        if x2 {
            wrmsr(a, EOI, 0)?;
        } else {
            a.mov(dword_ptr(rbx + XEOI), 0)?;
        }
        a.pop(rdx)?;
        a.pop(rcx)?;
        a.pop(rax)?;
        a.iretq()
    });
    m
}

fn vcpu(m: &Machine) -> Guest {
    m.vcpu(0, |s| (s.regs.gpr[3], s.regs.gpr[15]) = (XAPIC, COUNTERS))
}

/// Rounds of `body`, in R12.
fn rounds(
    a: &mut CodeAssembler,
    count: u32,
    start: Code,
    body: impl FnOnce(&mut CodeAssembler, CodeLabel) -> Result,
) -> Result {
    let (mut again, mut wrong) = (a.create_label(), a.create_label());
    start(a)?;
    a.mov(r12d, count)?;
    a.set_label(&mut again)?;
    body(a, wrong)?;
    a.dec(r12d)?;
    a.jnz(again)?;
    a.xor(eax, eax)?;
    done(a)?;
    a.set_label(&mut wrong)?;
    a.mov(eax, 1)?;
    done(a)
}

/// As many have come as must have.
fn all_came(a: &mut CodeAssembler, wrong: CodeLabel) -> Result {
    a.mov(eax, dword_ptr(r15))?;
    a.cmp(eax, dword_ptr(r15 + SENT))?;
    a.jne(wrong)
}

fn xapic(a: &mut CodeAssembler) -> Result {
    a.mov(dword_ptr(rbx + XSVR), 0x1ff)
}

#[test]
fn a_priority_that_is_lowered() {
    // An interrupt waits for both the task priority and RFLAGS.IF; they go in either order.
    let rows: [(&str, bool, Code); 9] = [
        ("mov cr8; sti", true, |a| {
            a.mov(cr8, rsi)?;
            a.sti()?;
            a.nop()
        }),
        ("sti; mov cr8", true, |a| {
            a.sti()?;
            a.nop()?;
            a.nop()?;
            a.mov(cr8, rsi)
        }),
        ("sti, mov cr8 in its shadow", true, |a| {
            a.sti()?;
            a.mov(cr8, rsi)
        }),
        ("mov cr8; others; sti", true, |a| {
            a.mov(cr8, rsi)?;
            a.add(rdi, 1)?;
            a.mov(dword_ptr(r15 + 0x40), edi)?;
            a.sti()?;
            a.mov(edi, dword_ptr(r15 + 0x40))
        }),
        ("mov cr8; popfq", true, |a| {
            a.push(rflags::IF as i32)?;
            a.mov(cr8, rsi)?;
            a.popfq()
        }),
        ("wrmsr; sti", true, |a| {
            wrmsr(a, TPR, 0)?;
            a.sti()?;
            a.nop()
        }),
        ("mov to the register; sti", false, |a| {
            a.mov(dword_ptr(rbx + XTPR), esi)?;
            a.sti()?;
            a.nop()
        }),
        ("stosd to the register; sti", false, |a| {
            a.lea(rdi, rbx + XTPR)?;
            a.xor(eax, eax)?;
            a.stosd()?;
            a.sti()?;
            a.nop()
        }),
        ("sti; rep stosd to the register", false, |a| {
            a.lea(rdi, rbx + XTPR)?;
            a.xor(eax, eax)?;
            a.mov(ecx, 1)?;
            a.sti()?;
            a.nop()?;
            a.rep().stosd()
        }),
    ];
    const ROUNDS: u32 = 3000;
    for (name, x2, lower) in rows {
        let m = machine(x2);
        m.code(CODE, |a| {
            rounds(a, ROUNDS, if x2 { x2apic } else { xapic }, |a, wrong| {
                a.cli()?;
                a.mov(eax, 15)?;
                a.mov(cr8, rax)?;
                if x2 {
                    wrmsr(a, SELF_IPI, VECTOR.into())?;
                } else {
                    a.mov(dword_ptr(rbx + XICR), TO_SELF | u32::from(VECTOR))?;
                }
                // The priority holds it back, whatever the flag is.
                a.sti()?;
                a.nop()?;
                a.cli()?;
                all_came(a, wrong)?;
                a.inc(dword_ptr(r15 + SENT))?;
                a.xor(esi, esi)?;
                lower(a)?;
                all_came(a, wrong)
            })
        });
        let mut guest = vcpu(&m);
        let stop = guest.run();
        let came = m.peek::<u32>(COUNTERS);
        assert_eq!((stop, came), (Stop::Done(0), ROUNDS), "{name}");
    }
}

#[test]
fn an_interrupt_that_was_the_highest_ends() {
    // In the handler of a higher one, a lower one waits for the end of that, and for STI.
    let ends: [(&str, bool, Code); 3] = [
        ("wrmsr", true, |a| wrmsr(a, EOI, 0)),
        ("mov", false, |a| a.mov(dword_ptr(rbx + XEOI), 0)),
        ("rep stosd", false, |a| {
            a.lea(rdi, rbx + XEOI)?;
            a.xor(eax, eax)?;
            a.mov(ecx, 1)?;
            a.rep().stosd()
        }),
    ];
    const ROUNDS: u32 = 3000;
    for (name, x2, end) in ends {
        let m = machine(x2);
        let to_self = |a: &mut CodeAssembler, vector: u8| {
            if x2 {
                wrmsr(a, SELF_IPI, vector.into())
            } else {
                a.mov(dword_ptr(rbx + XICR), TO_SELF | u32::from(vector))
            }
        };
        let handler = HANDLER + 0x400;
        m.gate(HIGHER, handler);
        m.code(handler, |a| {
            let mut wrong = a.create_label();
            to_self(a, VECTOR)?;
            a.sti()?;
            a.nop()?;
            a.cli()?;
            all_came(a, wrong)?;
            a.inc(dword_ptr(r15 + SENT))?;
            end(a)?;
            a.sti()?;
            a.nop()?;
            all_came(a, wrong)?;
            a.cli()?;
            a.inc(dword_ptr(r15 + 16))?;
            a.set_label(&mut wrong)?;
            a.iretq()
        });
        m.code(CODE, |a| {
            rounds(a, ROUNDS, if x2 { x2apic } else { xapic }, |a, wrong| {
                a.sti()?;
                to_self(a, HIGHER)?;
                a.nop()?;
                all_came(a, wrong)
            })
        });
        let stop = vcpu(&m).run();
        let counts = [0, 16].map(|at| m.peek::<u32>(COUNTERS + at));
        assert_eq!((stop, counts), (Stop::Done(0), [ROUNDS; 2]), "{name}");
    }
}

/// Ways to store EAX to the register at RDI.
const STORES: [(&str, Code); 11] = [
    ("mov", |a| a.mov(dword_ptr(rdi), eax)),
    ("stosd", |a| a.stosd()),
    ("rep stosd", |a| {
        a.mov(ecx, 1)?;
        a.rep().stosd()
    }),
    ("movsd", |a| {
        a.lea(rsi, r15 + 0x80)?;
        a.mov(dword_ptr(rsi), eax)?;
        a.movsd()
    }),
    ("rep movsd", |a| {
        a.lea(rsi, r15 + 0x80)?;
        a.mov(dword_ptr(rsi), eax)?;
        a.mov(ecx, 1)?;
        a.rep().movsd()
    }),
    ("rep movsd, down", |a| {
        a.lea(rsi, r15 + 0x80)?;
        a.mov(dword_ptr(rsi), eax)?;
        a.mov(ecx, 1)?;
        a.std()?;
        a.rep().movsd()?;
        a.cld()
    }),
    ("xchg", |a| a.xchg(dword_ptr(rdi), eax)),
    ("movnti", |a| a.movnti(dword_ptr(rdi), eax)),
    ("movd", |a| {
        a.movd(xmm0, eax)?;
        a.movd(dword_ptr(rdi), xmm0)
    }),
    ("and, or", |a| {
        a.and(dword_ptr(rdi), 0)?;
        a.or(dword_ptr(rdi), eax)
    }),
    ("fistp", |a| {
        a.mov(dword_ptr(r15 + 0x80), eax)?;
        a.fild(dword_ptr(r15 + 0x80))?;
        a.fistp(dword_ptr(rdi))
    }),
];

/// RDTSC into RAX. RDX is changed.
fn ticks(a: &mut CodeAssembler) -> Result {
    a.rdtsc()?;
    a.shl(rdx, 32)?;
    a.or(rax, rdx)
}

#[test]
fn any_store_sets_the_timer() {
    // Behind it nothing leaves emitted code: the interrupt has to come by itself, and not only when something else
    // happens to be looked after.
    const ROUNDS: u32 = 50;
    const AFTER_NS: u32 = 20_000;
    let start: Code = |a| {
        xapic(a)?;
        a.fninit()?;
        a.mov(r14, -1i64)?;
        a.mov(dword_ptr(rbx + XDIVIDE), 0xb)?;
        a.mov(dword_ptr(rbx + XLVT_TIMER), u32::from(VECTOR))
    };
    for (name, store) in STORES {
        // With IF set at the store, or only later.
        for before in [true, false] {
            let m = machine(false);
            // R14: the fewest ticks that it took.
            m.code(CODE, |a| {
                rounds(a, ROUNDS, start, |a, _| {
                    let mut wait = a.create_label();
                    a.cli()?;
                    a.inc(dword_ptr(r15 + SENT))?;
                    a.lea(rdi, rbx + XINITIAL_COUNT)?;
                    ticks(a)?;
                    a.mov(rbp, rax)?;
                    a.mov(eax, AFTER_NS)?;
                    if before {
                        a.sti()?;
                    }
                    store(a)?;
                    a.sti()?;
                    a.set_label(&mut wait)?;
                    a.mov(eax, dword_ptr(r15))?;
                    a.cmp(eax, dword_ptr(r15 + SENT))?;
                    a.jne(wait)?;
                    ticks(a)?;
                    a.sub(rax, rbp)?;
                    a.cmp(rax, r14)?;
                    a.cmovb(r14, rax)
                })
            });
            let mut guest = vcpu(&m);
            let what = format!("{name}, IF before: {before}");
            assert_eq!((guest.run(), m.peek::<u32>(COUNTERS)), (Stop::Done(0), ROUNDS), "{what}");
            let soonest = guest.state().regs.gpr[14] * 1_000_000 / u64::from(m.vm.tsc_khz());
            assert!((u64::from(AFTER_NS)..500_000).contains(&soonest), "{what}: {soonest} ns at the soonest");
        }
    }
}

#[test]
fn any_store_sends_a_message() {
    // To the processor itself: it comes behind the store, or behind the instruction after STI.
    const ROUNDS: u32 = 1000;
    let start: Code = |a| {
        xapic(a)?;
        a.fninit()
    };
    // AND with 0 would send vector 0.
    for (name, store) in STORES.into_iter().filter(|(name, _)| *name != "and, or") {
        for before in [true, false] {
            let m = machine(false);
            m.code(CODE, |a| {
                rounds(a, ROUNDS, start, |a, wrong| {
                    a.inc(dword_ptr(r15 + SENT))?;
                    a.lea(rdi, rbx + XICR)?;
                    a.mov(eax, TO_SELF | u32::from(VECTOR))?;
                    if before {
                        a.sti()?;
                        store(a)?;
                    } else {
                        a.cli()?;
                        store(a)?;
                        a.sti()?;
                    }
                    a.nop()?;
                    all_came(a, wrong)
                })
            });
            let stop = vcpu(&m).run();
            assert_eq!((stop, m.peek::<u32>(COUNTERS)), (Stop::Done(0), ROUNDS), "{name}, IF before: {before}");
        }
    }
}
