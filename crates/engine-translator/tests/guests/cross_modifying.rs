//! Two processors, one of which changes what the other executes, by the protocols that systems use.

use iced_x86::{IcedError, code_asm::*};
use purlin_arch::x86_64::regs::gpr::RBX;

use crate::{
    apic::{EOI, ICR, wrmsr, x2apic},
    machine::*,
    smp::relax,
};

type Result = std::result::Result<(), IcedError>;

/// `mov eax, 0; ret`
const FUNCTION: [u8; 6] = [0xb8, 0, 0, 0, 0, 0xc3];
const PAGE: u64 = CODE + 0x1_0000;
/// Where each vCPU's code is.
const OTHER: u64 = CODE + 0x1000;

/// SDM vol. 3A 8.1.3: the writer stores, in pieces, then sets a flag; the other waits for it, serialises and calls.
#[test]
fn code_that_is_changed_in_pieces() {
    const CHANGES: u32 = 1000;
    type Store = fn(&mut CodeAssembler) -> Result;
    let stores: [(&str, Store); 4] = [
        ("bytes", |a| {
            a.mov(edx, eax)?;
            for i in 1..=4 {
                a.mov(byte_ptr(rbx + i), dl)?;
                a.ror(edx, 8)?;
            }
            Ok(())
        }),
        ("rep movsb", |a| {
            a.mov(rsi, DATA + 0x100)?;
            a.mov(dword_ptr(rsi + 1), eax)?;
            a.mov(rdi, rbx)?;
            a.mov(ecx, 6)?;
            a.rep().movsb()
        }),
        ("xchg", |a| {
            a.mov(edx, eax)?;
            a.xchg(dword_ptr(rbx + 1), edx)
        }),
        ("push", |a| {
            a.mov(rdx, 0xc300_0000_00b8u64)?;
            a.mov(ecx, eax)?;
            a.shl(rcx, 8)?;
            a.or(rdx, rcx)?;
            a.mov(rcx, rsp)?;
            a.lea(rsp, rbx + 8)?;
            a.push(rdx)?;
            a.mov(rsp, rcx)
        }),
    ];
    for (name, store) in stores {
        for function in [PAGE, PAGE + 0xffd] {
            let m = Machine::new(2);
            m.load(function, &FUNCTION);
            m.load(DATA + 0x100, &FUNCTION);
            // R8: the flag. R9: the answer.
            m.code(CODE, |a| {
                let (mut again, mut wait) = (a.create_label(), a.create_label());
                a.xor(eax, eax)?;
                a.set_label(&mut again)?;
                a.inc(eax)?;
                store(a)?;
                a.mov(dword_ptr(r8), eax)?;
                a.set_label(&mut wait)?;
                relax(a)?;
                a.cmp(dword_ptr(r9), eax)?;
                a.jne(wait)?;
                a.cmp(eax, CHANGES as i32)?;
                a.jne(again)?;
                done(a)
            });
            m.code(OTHER, |a| {
                let (mut again, mut wait, mut wrong) = (a.create_label(), a.create_label(), a.create_label());
                a.mov(rdi, function)?;
                a.xor(r10d, r10d)?;
                a.set_label(&mut again)?;
                a.inc(r10d)?;
                a.set_label(&mut wait)?;
                relax(a)?;
                a.cmp(dword_ptr(r8), r10d)?;
                a.jne(wait)?;
                a.xor(eax, eax)?;
                a.cpuid()?;
                a.call(rdi)?;
                a.cmp(eax, r10d)?;
                a.jne(wrong)?;
                a.mov(dword_ptr(r9), eax)?;
                a.cmp(eax, CHANGES as i32)?;
                a.jne(again)?;
                done(a)?;
                a.set_label(&mut wrong)?;
                a.ud2()
            });
            let mut guests: Vec<_> = [CODE, OTHER]
                .into_iter()
                .zip(0..)
                .map(|(rip, i)| {
                    m.vcpu(i, |s| {
                        s.regs.rip = rip;
                        let gpr = &mut s.regs.gpr;
                        (gpr[RBX], gpr[8], gpr[9]) = (function, DATA, DATA + 64);
                    })
                })
                .collect();
            assert_eq!(run_all(&mut guests), [Stop::Done(CHANGES); 2], "{name} at {function:#x}");
        }
    }
}

/// The vector by which the writer makes the other serialise.
const SYNC: u8 = 0x50;

/// As Linux's text_poke_bp: INT3 over the first byte, the others synchronised, the rest stored, synchronised, the first
/// byte stored, synchronised. Meanwhile the other executes the old instruction, the new one, or the INT3, whose
/// handler does what an instruction did that was there. None is older than the last whose change was over before.
#[test]
fn breakpoints_over_code_under_another_processor() {
    const CHANGES: u32 = 500;
    for function in [PAGE + 3, PAGE + 0xffc, PAGE + 0xfff] {
        let m = Machine::new(2);
        m.load(function, &FUNCTION);
        let (synced, ready, trapped) = (DATA, DATA + 64, DATA + 128);
        // The last change that was begun, and the last that was over.
        let (begun, over) = (DATA + 192, DATA + 256);
        m.gate(SYNC, CODE + 0x2000);
        m.code(CODE + 0x2000, |a| {
            a.push(rax)?;
            a.push(rcx)?;
            a.push(rdx)?;
            // IRET serialises.
            wrmsr(a, EOI, 0)?;
            a.mov(rax, synced)?;
            a.lock().inc(dword_ptr(rax))?;
            a.pop(rdx)?;
            a.pop(rcx)?;
            a.pop(rax)?;
            a.iretq()
        });
        // #BP: RIP goes behind the instruction.
        m.gate(3, CODE + 0x3000);
        m.code(CODE + 0x3000, |a| {
            let mut wrong = a.create_label();
            a.mov(rax, function + 1)?;
            a.cmp(qword_ptr(rsp), rax)?;
            a.jne(wrong)?;
            a.add(qword_ptr(rsp), 4)?;
            a.mov(rax, trapped)?;
            a.inc(dword_ptr(rax))?;
            a.mov(eax, dword_ptr(over))?;
            a.iretq()?;
            a.set_label(&mut wrong)?;
            a.ud2()
        });
        let sync = |a: &mut CodeAssembler| {
            let mut wait = a.create_label();
            a.inc(r12d)?;
            wrmsr(a, ICR, 1 << 32 | u64::from(SYNC))?;
            a.mov(rsi, synced)?;
            a.set_label(&mut wait)?;
            relax(a)?;
            a.cmp(dword_ptr(rsi), r12d)?;
            a.jne(wait)
        };
        m.code(CODE, |a| {
            let (mut again, mut wait) = (a.create_label(), a.create_label());
            x2apic(a)?;
            a.mov(rdi, ready)?;
            a.set_label(&mut wait)?;
            relax(a)?;
            a.cmp(dword_ptr(rdi), 1)?;
            a.jne(wait)?;
            a.mov(rbx, function)?;
            a.xor(ebp, ebp)?;
            a.xor(r12d, r12d)?;
            a.set_label(&mut again)?;
            a.inc(ebp)?;
            a.mov(dword_ptr(begun), ebp)?;
            a.mov(byte_ptr(rbx), 0xccu32 as i32)?;
            sync(a)?;
            a.mov(dword_ptr(rbx + 1), ebp)?;
            sync(a)?;
            a.mov(byte_ptr(rbx), 0xb8u32 as i32)?;
            sync(a)?;
            a.mov(dword_ptr(over), ebp)?;
            a.cmp(ebp, CHANGES as i32)?;
            a.jne(again)?;
            a.mov(eax, ebp)?;
            done(a)
        });
        m.code(OTHER, |a| {
            let (mut again, mut wrong) = (a.create_label(), a.create_label());
            x2apic(a)?;
            a.mov(rdi, function)?;
            a.mov(rsi, ready)?;
            a.mov(dword_ptr(rsi), 1)?;
            a.sti()?;
            a.set_label(&mut again)?;
            a.mov(ebx, dword_ptr(over))?;
            a.call(rdi)?;
            a.cmp(eax, ebx)?;
            a.jb(wrong)?;
            a.cmp(eax, dword_ptr(begun))?;
            a.ja(wrong)?;
            a.cmp(eax, CHANGES as i32)?;
            a.jne(again)?;
            // The last synchronisation may be on its way.
            a.mov(rsi, synced)?;
            let mut last = a.create_label();
            a.set_label(&mut last)?;
            relax(a)?;
            a.cmp(dword_ptr(rsi), (3 * CHANGES) as i32)?;
            a.jne(last)?;
            a.mov(eax, CHANGES)?;
            done(a)?;
            a.set_label(&mut wrong)?;
            a.ud2()
        });
        let mut guests = vec![m.vcpu(0, |_| {}), m.vcpu(1, |s| s.regs.rip = OTHER)];
        assert_eq!(run_all(&mut guests), [Stop::Done(CHANGES); 2], "{function:#x}");
        assert_eq!(m.peek::<u32>(synced), 3 * CHANGES, "synchronisations at {function:#x}");
        assert!(m.peek::<u32>(trapped) > 0, "no breakpoint was met at {function:#x}");
    }
}

/// Each changes a function of its own, and counts, on one page; neither loses a change or a count.
#[test]
fn both_change_code_and_data_of_one_page() {
    const CHANGES: u32 = 4000;
    let m = Machine::new(2);
    for i in 0..2 {
        m.load(PAGE + 0x100 * i, &FUNCTION);
        m.code(CODE + 0x1000 * i, |a| {
            let (mut again, mut wrong) = (a.create_label(), a.create_label());
            a.mov(rbx, PAGE + 0x100 * i)?;
            a.mov(ecx, CHANGES)?;
            a.set_label(&mut again)?;
            a.mov(dword_ptr(rbx + 1), ecx)?;
            a.inc(qword_ptr(rbx + 64))?;
            a.call(rbx)?;
            a.cmp(eax, ecx)?;
            a.jne(wrong)?;
            a.mov(rdx, qword_ptr(rbx + 64))?;
            a.add(edx, ecx)?;
            a.cmp(edx, CHANGES as i32 + 1)?;
            a.jne(wrong)?;
            a.dec(ecx)?;
            a.jnz(again)?;
            a.xor(eax, eax)?;
            done(a)?;
            a.set_label(&mut wrong)?;
            a.ud2()
        });
    }
    let mut guests: Vec<_> = (0..2).map(|i| m.vcpu(i, |s| s.regs.rip = CODE + 0x1000 * u64::from(i))).collect();
    assert_eq!(run_all(&mut guests), [Stop::Done(0); 2]);
}
