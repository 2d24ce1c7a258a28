//! Single steps and debug registers in emitted code (SDM vol. 3B chapter 17).

use iced_x86::code_asm::*;
use purlin_arch::x86_64::{
    msr,
    regs::{
        cr4,
        gpr::{RBX, RCX, RDI, RSI},
        rflags,
    },
    state::Msr,
};

use crate::machine::*;

const DB: u8 = 1;
const BS: u64 = 1 << 14;

/// Runs until the guest is done; the RIP of each #DB on the way, and DR6 there.
fn traps(guest: &mut Guest) -> Vec<(u64, u64)> {
    let mut traps = Vec::new();
    loop {
        assert!(traps.len() < 100, "no end of traps: {:x?}", &traps[..10]);
        match guest.run() {
            Stop::Done(_) => return traps,
            Stop::Vector(DB, frame) => {
                let why = guest.state().system.dr6 & 0xe00f;
                traps.push((frame.rip, why));
                // RF, which the processor leaves clear at an instruction breakpoint (SDM vol. 3B 17.3.1.1), lets the
                // instruction pass.
                guest.change(|s| {
                    s.system.dr6 = 0xffff_0ff0;
                    s.regs.rip = frame.rip;
                    s.regs.gpr[4] = frame.rsp;
                    s.regs.rflags = frame.rflags | rflags::RF;
                });
            }
            other => panic!("{other:?} after {traps:x?}"),
        }
    }
}

#[test]
fn a_trap_after_each_instruction() {
    let m = Machine::new(1);
    // Lengths of the instructions, in order.
    let code: &[&[u8]] = &[
        &[0x90],                   // nop
        &[0x48, 0x01, 0xc0],       // add rax, rax
        &[0x48, 0xff, 0x03],       // inc qword [rbx]
        &[0xf0, 0x48, 0xff, 0x03], // lock inc qword [rbx]
        &[0x50],                   // push rax
        &[0x58],                   // pop rax
        &[0x9c],                   // pushfq
        &[0x9d],                   // popfq, TF stays
        &[0x0f, 0x58, 0xc9],       // addps xmm1, xmm1
        &[0xd9, 0xe8],             // fld1
        &[0xeb, 0x00],             // jmp
        &[0x74, 0x00],             // jz
        &[0xe8, 0, 0, 0, 0],       // call
        &[0x58],                   // pop rax
        &[0x0f, 0xa2],             // cpuid
        &[0xfa],                   // cli
        &[0x8c, 0xd8],             // mov eax, ds
        &[0x0f, 0x20, 0xc0],       // mov rax, cr0
        &[0xa4],                   // movsb
        &[0xe6, 0x80],             // out 0x80, al
    ];
    m.load(CODE, &code.concat());
    m.code(CODE + code.iter().map(|c| c.len() as u64).sum::<u64>(), done);
    let mut guest = m.vcpu(0, |s| {
        s.regs.rflags |= rflags::TF;
        s.regs.gpr[RBX] = DATA;
        (s.regs.gpr[RSI], s.regs.gpr[RDI]) = (DATA + 0x100, DATA + 0x200);
    });
    let mut rip = CODE;
    let mut expected = Vec::new();
    for insn in code {
        rip += insn.len() as u64;
        expected.push((rip, BS));
    }
    assert_eq!(traps(&mut guest), expected);
    assert_eq!(m.peek::<u64>(DATA), 2);
}

#[test]
fn a_trap_after_each_iteration() {
    let m = Machine::new(1);
    let end = m.code(CODE, |a| a.rep().movsb());
    m.code(end, done);
    let mut guest = m.vcpu(0, |s| {
        s.regs.rflags |= rflags::TF;
        s.regs.gpr[RCX] = 4;
        (s.regs.gpr[RSI], s.regs.gpr[RDI]) = (DATA, DATA + 0x100);
    });
    assert_eq!(traps(&mut guest), [(CODE, BS), (CODE, BS), (CODE, BS), (end, BS)]);
}

#[test]
fn popf_and_iret_set_tf_for_the_instruction_after() {
    let m = Machine::new(1);
    m.code(CODE, |a| {
        a.push(0x102)?;
        a.popfq()?;
        a.nop()?;
        a.push(2)?;
        a.popfq()?;
        a.nop()?;
        done(a)
    });
    // PUSH imm32 is 5 bytes, PUSH imm8 2.
    let first = CODE + 5 + 1 + 1;
    let mut guest = m.vcpu(0, |_| {});
    // After the NOP, the PUSH, and the POPFQ that clears TF (which was set when it began).
    let rips: Vec<u64> = traps(&mut guest).iter().map(|t| t.0).collect();
    assert_eq!(rips[..2], [first, first + 2]);
    assert!(rips.len() <= 3, "{rips:x?}");
}

#[test]
fn no_trap_between_a_load_of_ss_and_the_next_instruction() {
    let m = Machine::new(1);
    let start = m.code(CODE, |a| {
        a.mov(ebx, u32::from(selector::DATA))?;
        a.mov(ss, ebx)
    });
    let end = m.code(start, |a| a.nop());
    m.code(end, done);
    let mut guest = m.vcpu(0, |s| s.regs.rflags |= rflags::TF);
    assert_eq!(traps(&mut guest), [(CODE + 5, BS), (end, BS)]);
}

#[test]
fn syscall_masks_tf() {
    let m = Machine::new(1);
    m.user_pages(CODE, 0x1000);
    m.user_pages(STACK - 0x1000, 0x1000);
    let next = m.code(CODE, |a| a.syscall());
    m.code(next, done);
    m.code(CODE + 0x1000, |a| a.sysretq());
    let mut guest = m.vcpu(0, |s| {
        user_mode(s);
        s.regs.rflags |= rflags::TF | rflags::IOPL;
        s.msrs.retain(|m| ![msr::STAR, msr::LSTAR, msr::SFMASK].contains(&m.index));
        s.msrs.extend([
            Msr { index: msr::STAR, value: 0x0033_0008 << 32 },
            Msr { index: msr::LSTAR, value: CODE + 0x1000 },
            Msr { index: msr::SFMASK, value: rflags::TF },
        ]);
    });
    // None in the kernel. SYSRET restores TF from R11; the trap comes after the instruction that follows it, or, on
    // some processors, before.
    let rips: Vec<u64> = traps(&mut guest).iter().map(|t| t.0).collect();
    assert!(rips.iter().all(|&rip| rip == next), "{rips:x?}");
}

/// DR7 for breakpoint 0: kind (0 instruction, 1 stores, 3 loads and stores) and length in bytes.
fn dr7(kind: u64, length: u64) -> u64 {
    let length = [0, 0, 1, 0, 3, 0, 0, 0, 2][length as usize];
    0x402 | kind << 16 | length << 18
}

#[test]
fn breakpoints_on_instructions() {
    let m = Machine::new(1);
    let at = CODE + 5 + 2;
    m.code(CODE, |a| {
        let mut again = a.create_label();
        a.mov(ecx, 3)?;
        a.set_label(&mut again)?;
        a.add(eax, ecx)?;
        a.inc(edx)?;
        a.dec(ecx)?;
        a.jnz(again)?;
        done(a)
    });
    let mut guest = m.vcpu(0, |s| {
        s.system.dr[0] = at;
        s.system.dr7 = dr7(0, 1);
        s.system.cr4 |= cr4::DE;
    });
    // Faults: before the instruction, each time it is reached.
    assert_eq!(traps(&mut guest), [(at, 1); 3]);
    assert_eq!(guest.state().regs.gpr[2], 3);
}

#[test]
fn breakpoints_on_data() {
    let m = Machine::new(1);
    let code = |a: &mut CodeAssembler| {
        a.mov(edx, dword_ptr(rbx))?; //      2 bytes: 0..2
        a.mov(dword_ptr(rbx), edx)?; //      2..4
        a.mov(byte_ptr(rbx + 3), dl)?; //    4..7
        a.mov(byte_ptr(rbx + 4), dl)?; //    7..10
        a.add(dword_ptr(rbx - 2), 1)?; //    10..14
        a.push(rdx)?; //                     14..15
        done(a)
    };
    m.code(CODE, code);
    for (kind, expected) in [(1, vec![4u64, 7, 14]), (3, vec![2, 4, 7, 14])] {
        let m = Machine::new(1);
        m.code(CODE, code);
        let mut guest = m.vcpu(0, |s| {
            s.regs.gpr[RBX] = DATA;
            s.system.dr[0] = DATA;
            s.system.dr7 = dr7(kind, 4);
        });
        // Traps: after the instruction.
        let expected: Vec<_> = expected.into_iter().map(|n| (CODE + n, 1)).collect();
        assert_eq!(traps(&mut guest), expected, "kind {kind}");
    }
}
