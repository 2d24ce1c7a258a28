//! SYSCALL, SYSRET, IRET and page faults by which emitted code goes from one mode to another by itself, and what must stop it.

use std::time::Duration;

use iced_x86::{IcedError, code_asm::*};
use purlin_arch::x86_64::{
    msr,
    regs::{
        efer,
        gpr::{RAX, RCX},
        rflags,
    },
    state::VcpuState,
};
use purlin_engine_translator::profile::{ExitKind, Profile};

use crate::{
    apic::{EOI, SELF_IPI, wrmsr, x2apic},
    machine::*,
};

type Result = std::result::Result<(), IcedError>;
type Code = fn(&mut CodeAssembler) -> Result;

const KERNEL: u64 = CODE + 0x1000;
const ROUNDS: u32 = 3000;
const VECTOR: u8 = 0x41;
const HANDLER: u64 = CODE + 0x2000;

/// User code at [`CODE`], the kernel's entry at [`KERNEL`].
fn machine(
    kernel: impl FnOnce(&mut CodeAssembler) -> Result,
    user: impl FnOnce(&mut CodeAssembler) -> Result,
) -> Machine {
    let m = Machine::new(1);
    m.user_pages(CODE, 0x1000);
    m.user_pages(DATA, 0x1000);
    m.code(KERNEL, kernel);
    m.code(CODE, user);
    m
}

fn vcpu(m: &Machine, change: impl FnOnce(&mut VcpuState)) -> Guest {
    m.vcpu(0, |s| {
        user_mode(s);
        s.regs.rflags |= rflags::IOPL;
        take_syscalls(s, KERNEL);
        change(s);
    })
}

/// [`ROUNDS`] of `body`, counted in R12.
fn rounds(a: &mut CodeAssembler, body: impl FnOnce(&mut CodeAssembler) -> Result) -> Result {
    let mut again = a.create_label();
    a.mov(r12d, ROUNDS)?;
    a.set_label(&mut again)?;
    body(a)?;
    a.dec(r12d)?;
    a.jnz(again)?;
    done(a)
}

/// ZF unless R13 is a multiple of sixteen; counts it up.
fn now_and_then(a: &mut CodeAssembler) -> Result {
    a.inc(r13d)?;
    a.test(r13d, 15)
}

#[test]
fn vectors_are_the_users_throughout() {
    // The kernel leaves them alone, adds to them, or saves, clears and restores them; user code does its sums in them.
    const AREA: u64 = DATA + 0x1000;
    let change: Code = |a| a.vpaddd(ymm15, ymm15, ymm2);
    let swap: Code = |a| {
        a.mov(edi, AREA as u32)?;
        a.mov(eax, 7)?;
        a.xor(edx, edx)?;
        a.xsave64(ptr(rdi))?;
        a.vpxor(ymm15, ymm15, ymm15)?;
        a.fldpi()?;
        a.xrstor64(ptr(rdi))
    };
    for (name, kernel, each) in [("none", None, 3), ("change", Some(change), 4), ("swap", Some(swap), 3)] {
        let m = machine(
            |a| {
                let mut out = a.create_label();
                if let Some(kernel) = kernel {
                    if name == "swap" {
                        now_and_then(a)?;
                        a.jnz(out)?;
                    }
                    kernel(a)?;
                }
                a.set_label(&mut out)?;
                a.nop()?;
                a.sysretq()
            },
            |a| {
                a.fninit()?;
                a.fld1()?;
                a.vpcmpeqd(ymm2, ymm2, ymm2)?;
                a.vpxor(ymm15, ymm15, ymm15)?;
                rounds(a, |a| {
                    a.vpaddd(ymm15, ymm15, ymm2)?;
                    a.syscall()?;
                    a.vpaddd(ymm15, ymm15, ymm2)?;
                    a.vpaddd(ymm15, ymm15, ymm2)?;
                    a.vmovdqu(ymmword_ptr(DATA), ymm15)?;
                    a.fst(dword_ptr(DATA + 64))
                })
            },
        );
        let mut guest = vcpu(&m, |_| {});
        let stop = guest.run();
        assert!(matches!(stop, Stop::Done(_)), "{name}: {stop:?}");
        let sums: [u32; 8] = std::array::from_fn(|i| m.peek(DATA + 4 * i as u64));
        assert_eq!(sums, [0u32.wrapping_sub(each * ROUNDS); 8], "{name}");
        assert_eq!(m.peek::<u32>(DATA + 64), 1f32.to_bits(), "{name}");
    }
}

#[test]
fn flags_go_to_the_kernel_and_back() {
    // The kernel finds them in R11, has its own, and changes those that user code comes back to.
    let m = machine(
        |a| {
            a.mov(r9, r11)?;
            a.and(r9d, 0xcd5)?;
            a.add(r8, r9)?;
            a.xor(r11d, rflags::CF as i32)?;
            a.test(eax, 0)?;
            a.sysretq()
        },
        |a| {
            a.std()?;
            rounds(a, |a| {
                a.xor(eax, eax)?;
                a.cmp(eax, 1)?;
                a.syscall()?;
                a.setc(bl)?;
                a.movzx(ebx, bl)?;
                a.add(r14, rbx)
            })
        },
    );
    let mut guest = vcpu(&m, |_| {});
    assert!(matches!(guest.run(), Stop::Done(_)));
    let state = guest.state();
    // SF, AF, PF, CF and DF.
    assert_eq!((state.regs.gpr[8], state.regs.gpr[14]), (u64::from(ROUNDS) * 0x495, 0));
    assert_ne!(state.regs.rflags & rflags::DF, 0);
}

#[test]
fn tf_behind_sysret_and_iret() {
    // It is set in what is loaded, once the way is well trodden: the trap comes behind the next instruction.
    let rows: [(&str, Code); 2] = [
        ("sysret", |a| {
            a.mov(eax, 0)?;
            a.mov(edx, rflags::TF as u32)?;
            a.cmovz(eax, edx)?;
            a.or(r11, rax)?;
            a.sysretq()
        }),
        ("iret", |a| {
            a.mov(eax, 0)?;
            a.mov(edx, rflags::TF as u32)?;
            a.cmovz(eax, edx)?;
            a.or(r11, rax)?;
            frame(a, selector::USER_CODE64, selector::USER_DATA)
        }),
    ];
    for (name, end) in rows {
        let m = machine(
            |a| {
                a.cmp(r12d, 1)?;
                end(a)
            },
            |a| rounds(a, |a| a.syscall()),
        );
        let mut guest = vcpu(&m, |_| {});
        let Stop::Vector(1, at) = guest.run() else { panic!("{name}") };
        // `mov r12d, ROUNDS` has six bytes, SYSCALL two, DEC three.
        assert_eq!((at.rip, at.cs as u16), (CODE + 11, selector::USER_CODE64), "{name}");
    }
}

/// Returns by IRETQ to RIP in RCX with the flags in R11, on the user's stack.
fn frame(a: &mut CodeAssembler, code: u16, stack: u16) -> Result {
    a.mov(rdi, rsp)?;
    a.mov(rsp, RING0_STACK)?;
    a.push(i32::from(stack))?;
    a.push(rdi)?;
    a.push(r11)?;
    a.push(i32::from(code))?;
    a.push(rcx)?;
    a.iretq()
}

#[test]
fn sysret_to_where_no_address_is() {
    let m = machine(
        |a| {
            let mut out = a.create_label();
            a.cmp(r12d, 1)?;
            a.jne(out)?;
            a.mov(rcx, 0x8000_0000_0000u64)?;
            a.set_label(&mut out)?;
            a.nop()?;
            a.sysretq()
        },
        |a| rounds(a, |a| a.syscall()),
    );
    let mut guest = vcpu(&m, |_| {});
    let Stop::Vector(13, at) = guest.run() else { panic!() };
    // Intel's processors raise it at CPL 0, AMD's at the target.
    let expected = if at.cs as u16 == selector::CODE64 { KERNEL + 17 } else { 0x8000_0000_0000 };
    assert_eq!((at.error, at.rip), (Some(0), expected));
}

#[test]
fn iret_checks_what_it_loads() {
    // CS and SS of the last round, and the error code; none: it goes through.
    let user = (selector::USER_CODE64, selector::USER_DATA);
    let rows = [
        (user.0, selector::DATA, Some(0x10)),
        (user.0, selector::DATA | 3, Some(0x10)),
        (user.0, 0, Some(0)),
        (user.0 & !3, user.1, Some(0x40)),
        (selector::CODE64 | 3, user.1, Some(0x08)),
        (selector::FREE | 3, user.1, None),
        (user.0, (selector::FREE + 8) | 3, None),
        ((selector::FREE + 16) | 3, user.1, Some(0x70)),
        (user.0, (selector::FREE + 24) | 3, Some(0x78)),
    ];
    for (code, stack, error) in rows {
        let m = machine(
            |a| {
                let mut odd = a.create_label();
                a.cmp(r12d, 1)?;
                a.je(odd)?;
                frame(a, user.0, user.1)?;
                a.set_label(&mut odd)?;
                frame(a, code, stack)
            },
            |a| rounds(a, |a| a.syscall()),
        );
        // Not accessed yet: code, data; code that is not present; data that is only read.
        m.poke(GDT + 0x60, 0x00af_fa00_0000_ffffu64);
        m.poke(GDT + 0x68, 0x00cf_f200_0000_ffffu64);
        m.poke(GDT + 0x70, 0x00af_7b00_0000_ffffu64);
        m.poke(GDT + 0x78, 0x00cf_f100_0000_ffffu64);
        let stop = vcpu(&m, |_| {}).run();
        let name = format!("{code:#x} {stack:#x}: {stop:?}");
        match (stop, error) {
            (Stop::Done(_), None) => {
                let accessed = |at: u64| m.peek::<u8>(at + 5) & 1;
                let expected = if code == user.0 { (0, 1) } else { (1, 0) };
                assert_eq!((accessed(GDT + 0x60), accessed(GDT + 0x68)), expected, "{name}");
            }
            (Stop::Vector(vector @ (11 | 13), at), Some(error)) => {
                assert_eq!((at.error, vector == 11), (Some(error), code & !3 == 0x70), "{name}");
                assert_eq!(at.cs as u16, selector::CODE64, "{name}");
            }
            _ => panic!("{name}"),
        }
    }
}

#[test]
fn iret_reads_the_descriptors_of_now() {
    // The kernel takes the user's code segment away, whose descriptor every round before has read.
    let m = machine(
        |a| {
            let mut out = a.create_label();
            a.cmp(r12d, 1)?;
            a.jne(out)?;
            a.mov(byte_ptr(GDT + u64::from(selector::USER_CODE64 & !7) + 5), 0x7b)?;
            a.set_label(&mut out)?;
            frame(a, selector::USER_CODE64, selector::USER_DATA)
        },
        |a| rounds(a, |a| a.syscall()),
    );
    let Stop::Vector(11, at) = vcpu(&m, |_| {}).run() else { panic!() };
    assert_eq!(at.error, Some(u32::from(selector::USER_CODE64 & !3)));
}

#[test]
fn system_calls_that_are_not_allowed() {
    let m = machine(|a| a.sysretq(), |a| rounds(a, |a| a.syscall()));
    let mut guest = vcpu(&m, |s| s.system.efer &= !efer::SCE);
    let Stop::Vector(6, at) = guest.run() else { panic!() };
    assert_eq!(at.rip, CODE + 6);

    // An entry that is not there: the fault is the kernel's.
    let m = machine(|a| a.sysretq(), |a| rounds(a, |a| a.syscall()));
    let nowhere = 0xffff_8000_0000_0000;
    let mut guest = vcpu(&m, |s| s.msrs.iter_mut().filter(|m| m.index == msr::LSTAR).for_each(|m| m.value = nowhere));
    // (There is no stack for the handler of a kernel on the user's.)
    let Stop::Vector(14, at) = guest.run() else { panic!() };
    assert_eq!((at.rip, at.cs as u16, guest.state().regs.gpr[RCX]), (nowhere, selector::CODE64, CODE + 8));
}

#[test]
fn a_way_round_by_system_calls_alone_can_be_left() {
    // No jump, no branch: nothing but the transfers themselves can notice a request.
    let m = machine(
        |a| {
            a.sub(rcx, 2)?;
            a.inc(r8)?;
            a.sysretq()
        },
        |a| a.syscall(),
    );
    let mut guest = vcpu(&m, |_| {});
    for _ in 0..5 {
        let before = guest.state().regs.gpr[8];
        assert_eq!(guest.run_for(Duration::from_millis(30)), Stop::Kicked);
        assert!(guest.state().regs.gpr[8] > before);
    }
}

#[test]
fn an_interrupt_comes_before_the_first_user_instruction() {
    // It is there while the kernel has interrupts disabled, and is taken where that ends: no instruction of the user's
    // is executed before.
    let rows: [(&str, Code); 2] =
        [("sysret", |a| a.sysretq()), ("iret", |a| frame(a, selector::USER_CODE64, selector::USER_DATA))];
    for (name, end) in rows {
        let m = machine(
            |a| {
                let (mut out, mut first) = (a.create_label(), a.create_label());
                a.test(r12d, r12d)?;
                a.jz(first)?;
                now_and_then(a)?;
                a.jnz(out)?;
                a.mov(r9, rcx)?;
                wrmsr(a, SELF_IPI, VECTOR.into())?;
                a.mov(rcx, r9)?;
                a.inc(r14d)?;
                a.set_label(&mut out)?;
                a.mov(ebx, 0)?;
                end(a)?;
                a.set_label(&mut first)?;
                a.mov(r9, rcx)?;
                x2apic(a)?;
                a.mov(rcx, r9)?;
                a.sysretq()
            },
            |a| {
                a.syscall()?;
                rounds(a, |a| {
                    a.syscall()?;
                    a.mov(ebx, 1)
                })
            },
        );
        m.poke(TSS + 4, RING0_STACK);
        m.gate(VECTOR, HANDLER);
        m.code(HANDLER, |a| {
            a.sub(r14d, 1)?;
            a.add(r15d, ebx)?;
            a.mov(r9, rcx)?;
            wrmsr(a, EOI, 0)?;
            a.mov(rcx, r9)?;
            a.iretq()
        });
        let mut guest = vcpu(&m, |s| s.regs.rflags |= rflags::IF);
        let stop = guest.run();
        assert!(matches!(stop, Stop::Done(_)), "{name}: {stop:?}");
        let gpr = guest.state().regs.gpr;
        assert_eq!((gpr[14], gpr[15], gpr[13]), (0, 0, ROUNDS.into()), "{name} {:#x}", gpr[RAX]);
    }
}

/// A page that is there for one access each.
const WINDOW: u64 = 0x8000_0000;
/// What the handler of page faults has found: CR2, RIP, flags and RSP.
const FOUND: u64 = DATA + 0x1000;

/// User code makes `access` to [`WINDOW`] in each round, and a system call that takes the page away again. The handler
/// sums error codes up in R14 and counts in R15.
fn faulting(m: &Machine, access: impl FnOnce(&mut CodeAssembler) -> Result) {
    m.user_pages(CODE, 0x1000);
    m.user_pages(DATA, 0x1000);
    m.user_pages(STACK - 0x1000, 0x1000);
    m.map(WINDOW, 0, 0);
    m.map(WINDOW + 0x1000, 0, 0);
    let entry = m.pte(WINDOW);
    m.code(CODE, |a| {
        a.mov(rbx, WINDOW)?;
        a.vpcmpeqd(ymm2, ymm2, ymm2)?;
        a.vpxor(ymm15, ymm15, ymm15)?;
        rounds(a, |a| {
            a.vpaddd(ymm15, ymm15, ymm2)?;
            a.cmp(ebp, 1)?;
            access(a)?;
            a.setc(al)?;
            a.add(r13b, al)?;
            a.vmovdqu(ymmword_ptr(DATA), ymm15)?;
            a.syscall()
        })
    });
    m.code(KERNEL, |a| {
        a.mov(qword_ptr(entry), 0)?;
        a.mov(r8, WINDOW)?;
        a.invlpg(byte_ptr(r8))?;
        a.sysretq()
    });
    m.gate(14, HANDLER);
    m.code(HANDLER, |a| {
        a.pop(r8)?;
        a.add(r14, r8)?;
        a.inc(r15)?;
        a.mov(r8, cr2)?;
        a.mov(qword_ptr(FOUND), r8)?;
        for (from, to) in [(0, 8), (16, 16), (24, 24)] {
            a.mov(r8, qword_ptr(rsp + from))?;
            a.mov(qword_ptr(FOUND + to), r8)?;
        }
        a.mov(r8, (DATA + 0x2000) | pte::P | pte::W | pte::U)?;
        a.mov(qword_ptr(entry), r8)?;
        a.iretq()
    });
}

#[test]
fn page_faults_go_to_their_handler() {
    let rows: [(&str, u64, u64, Code); 4] = [
        ("load", 4, WINDOW + 8, |a| a.mov(rdx, qword_ptr(rbx + 8))),
        ("store", 6, WINDOW + 16, |a| a.mov(byte_ptr(rbx + 16), 1)),
        ("push", 6, WINDOW + 0xff8, |a| {
            a.lea(rsp, qword_ptr(rbx + 0x1000))?;
            a.push(rbx)
        }),
        ("group", 4, WINDOW + 24, |a| {
            a.mov(rdx, qword_ptr(rbx + 24))?;
            a.mov(rsi, qword_ptr(rbx + 8))?;
            a.mov(qword_ptr(rbx + 32), rsi)
        }),
    ];
    for (name, error, address, access) in rows {
        let profile = std::sync::Arc::new(Profile::default());
        let engine = engine().with_profile(profile.clone());
        let m = Machine::with_engine(1, engine);
        faulting(&m, access);
        let mut guest = vcpu(&m, |_| {});
        let stop = guest.run();
        assert!(matches!(stop, Stop::Done(_)), "{name}: {stop:?}");
        let gpr = guest.state().regs.gpr;
        assert_eq!((gpr[14], gpr[15]), (error * u64::from(ROUNDS), ROUNDS.into()), "{name}");
        // The comparison's flags, before and behind.
        assert_eq!(gpr[13] as u8, ROUNDS as u8, "{name}");
        let [cr2_then, at, flags, stack] = [0, 8, 16, 24].map(|at| m.peek::<u64>(FOUND + at));
        let expected = rflags::FIXED | rflags::CF | rflags::SF | rflags::AF | rflags::PF;
        let others = rflags::RF | rflags::IOPL;
        assert_eq!((cr2_then, flags), (address, expected | others), "{name}");
        assert!((CODE..CODE + 0x100).contains(&at), "{name}: {at:#x}");
        assert_eq!(stack, if name == "push" { WINDOW + 0x1000 } else { STACK }, "{name}");
        let sums: [u32; 8] = std::array::from_fn(|i| m.peek(DATA + 4 * i as u64));
        assert_eq!(sums, [0u32.wrapping_sub(ROUNDS); 8], "{name}");

        let report = profile.report();
        let exits = report.exits.iter().find(|(kind, _)| *kind == ExitKind::Fault).map_or(0, |(_, n)| *n);
        assert!(exits < 100, "{name}: emitted code was left {exits} times");
    }
}

#[test]
fn a_page_fault_on_a_stack_of_its_own() {
    // By the interrupt stack table, and as supervisor code on the stack that it is on, aligned.
    const IST: u64 = RING0_STACK - 0x800;
    for (name, ist, stack) in [("user", 1u64, IST), ("kernel", 1, IST), ("here", 0, STACK - 0x20)] {
        let m = Machine::new(1);
        faulting(&m, |a| a.mov(rdx, qword_ptr(rbx)));
        let gate: u64 = m.peek(IDT + 16 * 14);
        m.poke(IDT + 16 * 14, gate | ist << 32);
        m.poke(TSS + 36, IST);
        let user = name == "user";
        if !user {
            // As a subroutine: the system call would end in user code.
            m.code(KERNEL, |a| {
                a.mov(qword_ptr(m.pte(WINDOW)), 0)?;
                a.mov(r8, WINDOW)?;
                a.invlpg(byte_ptr(r8))?;
                a.jmp(rcx)
            });
        }
        m.code(HANDLER, |a| {
            a.mov(qword_ptr(FOUND), rsp)?;
            a.add(rsp, 8)?;
            a.inc(r15)?;
            a.mov(r8, (DATA + 0x2000) | pte::P | pte::W | pte::U)?;
            a.mov(qword_ptr(m.pte(WINDOW)), r8)?;
            a.iretq()
        });
        let mut guest = vcpu(&m, |s| {
            if !user {
                s.system.segments = vec![flat(selector::DATA, 0x4093); 6];
                s.system.segments[1] = flat(selector::CODE64, 0x209b);
                s.regs.gpr[4] = STACK - 0x18;
            }
        });
        let stop = guest.run();
        assert!(matches!(stop, Stop::Done(_)), "{name}: {stop:?}");
        assert_eq!(guest.state().regs.gpr[15], u64::from(ROUNDS), "{name}");
        assert_eq!(m.peek::<u64>(FOUND), stack - 48, "{name}");
    }
}

#[test]
fn what_comes_before_a_page_fault() {
    // An operand that is not aligned, on a page that is missing.
    let m = Machine::new(1);
    faulting(&m, |a| {
        // From the last round on.
        a.cmp(r12d, 1)?;
        a.setz(al)?;
        a.movzx(eax, al)?;
        a.movaps(xmm3, xmmword_ptr(rbx + rax * 8))
    });
    let mut guest = vcpu(&m, |_| {});
    let Stop::Vector(13, at) = guest.run() else { panic!() };
    assert_eq!((at.error, guest.state().regs.gpr[15]), (Some(0), u64::from(ROUNDS) - 1));
}

#[test]
fn page_faults_that_cannot_be_delivered_as_before() {
    // In the last round but one the kernel changes what every round before has used: the gate is not present, of another
    // kind, or beyond the limit, or its segment is gone; or it is a trap gate, behind which interrupts stay on.
    let rows: [(&str, Code); 5] = [
        ("gate", |a| a.mov(byte_ptr(IDT + 16 * 14 + 5), 0x6e)),
        ("kind", |a| a.mov(byte_ptr(IDT + 16 * 14 + 5), 0xec)),
        ("limit", |a| a.lidt(fword_ptr(FOUND + 0x40))),
        ("descriptor", |a| a.mov(byte_ptr(GDT + 8 + 5), 0x1b)),
        ("trap", |a| a.mov(byte_ptr(IDT + 16 * 14 + 5), 0xef)),
    ];
    for (name, change) in rows {
        let m = Machine::new(1);
        faulting(&m, |a| a.mov(rdx, qword_ptr(rbx)));
        m.poke(FOUND + 0x40, (16 * 14 - 1) as u16);
        m.poke(FOUND + 0x42, IDT);
        m.code(KERNEL, |a| {
            let mut out = a.create_label();
            a.mov(qword_ptr(m.pte(WINDOW)), 0)?;
            a.mov(r8, WINDOW)?;
            a.invlpg(byte_ptr(r8))?;
            a.cmp(r12d, 2)?;
            a.jne(out)?;
            change(a)?;
            a.set_label(&mut out)?;
            a.nop()?;
            a.sysretq()
        });
        if name == "trap" {
            m.code(HANDLER, |a| {
                a.pushfq()?;
                a.pop(r9)?;
                a.pop(r8)?;
                a.inc(r15)?;
                a.mov(r8, (DATA + 0x2000) | pte::P | pte::W | pte::U)?;
                a.mov(qword_ptr(m.pte(WINDOW)), r8)?;
                a.iretq()
            });
        }
        let mut guest = vcpu(&m, |s| s.regs.rflags |= rflags::IF);
        let stop = guest.run();
        let gpr = guest.state().regs.gpr;
        match (name, stop) {
            ("trap", Stop::Done(_)) => {
                assert_eq!(gpr[15], u64::from(ROUNDS));
                assert_ne!(gpr[9] & rflags::IF, 0);
            }
            // No handler has a segment any more.
            ("descriptor", Stop::Shutdown) => {}
            // A fault on the way to the handler of a page fault.
            ("gate" | "kind" | "limit", Stop::Vector(8, at)) => {
                assert_eq!((at.error, gpr[15]), (Some(0), u64::from(ROUNDS) - 1), "{name}");
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_page_fault_without_a_stack_is_a_double_fault() {
    let m = Machine::new(1);
    faulting(&m, |a| a.mov(rdx, qword_ptr(rbx)));
    // The double fault's handler has a stack of its own.
    let gate: u64 = m.peek(IDT + 16 * 8);
    m.poke(IDT + 16 * 8, gate | 1 << 32);
    m.poke(TSS + 36, STACK - 0x2000);
    m.code(KERNEL, |a| {
        let mut out = a.create_label();
        a.mov(qword_ptr(m.pte(WINDOW)), 0)?;
        a.mov(r8, WINDOW)?;
        a.invlpg(byte_ptr(r8))?;
        a.cmp(r12d, 2)?;
        a.jne(out)?;
        a.mov(r8, RING0_STACK - 8)?;
        a.mov(qword_ptr(m.pte(RING0_STACK - 8)), 0)?;
        a.invlpg(byte_ptr(r8))?;
        a.set_label(&mut out)?;
        a.nop()?;
        a.sysretq()
    });
    let mut guest = vcpu(&m, |_| {});
    let Stop::Vector(8, at) = guest.run() else { panic!() };
    assert_eq!((at.error, at.cs as u16), (Some(0), selector::USER_CODE64));
    let state = guest.state();
    assert_eq!((state.regs.gpr[15], state.system.cr2), (u64::from(ROUNDS) - 1, RING0_STACK - 8));
}
