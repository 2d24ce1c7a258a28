//! Functions that change all the time, in many ways by turns: what is executed is always what was stored last.

use iced_x86::{IcedError, code_asm::*};
use purlin_arch::x86_64::regs::gpr::{RBX, RCX, RDI, RSI};

use crate::machine::*;

type Result = std::result::Result<(), IcedError>;

/// The next of a sequence of pseudo-random numbers: R13 is the state, EBP the number.
pub fn random(a: &mut CodeAssembler) -> Result {
    // The multiplier is Knuth's (TAOCP vol. 2, 3.3.4, MMIX); the upper half is the good one.
    a.mov(rax, 6364136223846793005u64)?;
    a.imul_2(r13, rax)?;
    a.add(r13, 12345)?;
    a.mov(rbp, r13)?;
    a.shr(rbp, 32)
}

// --- any function by any store

/// Where functions lie.
const FUNCTIONS: u64 = CODE + 0x2_0000;
/// Another mapping of [`FUNCTIONS`] + 0xa000.
const ALIAS: u64 = 0x5555_5000;
/// Two mappings of two frames in the other order, the first for execution only.
const APART: u64 = 0x4000_0000;
const APART_TOO: u64 = 0x6000_0000;
/// What each function must return, what to call for it, and an image of one.
const SHADOWS: u64 = DATA + 0x1000;
const CALLS: u64 = DATA + 0x2000;
const IMAGE: u64 = DATA + 0x3000;
const SEGMENTS: u64 = DATA + 0x4000;

/// Functions `mov eax, imm32; ret`: where each is called, and where it is stored to.
const TARGETS: [(u64, u64); 12] = [
    // On the page of the code that changes it.
    (CODE + 0x40, CODE + 0x40),
    // Two on a page of their own.
    (FUNCTIONS + 0x10, FUNCTIONS + 0x10),
    (FUNCTIONS + 0x20, FUNCTIONS + 0x20),
    // On two pages, divided everywhere.
    (FUNCTIONS + 0x1fff, FUNCTIONS + 0x1fff),
    (FUNCTIONS + 0x3ffe, FUNCTIONS + 0x3ffe),
    (FUNCTIONS + 0x5ffd, FUNCTIONS + 0x5ffd),
    (FUNCTIONS + 0x7ffc, FUNCTIONS + 0x7ffc),
    (FUNCTIONS + 0x9ffb, FUNCTIONS + 0x9ffb),
    // By way of another mapping, either way.
    (FUNCTIONS + 0xa010, ALIAS + 0x10),
    (ALIAS + 0x30, FUNCTIONS + 0xa030),
    // On two frames that do not follow each other.
    (APART + 0xffd, APART_TOO + 0xffd),
    (APART + 0x1800, APART_TOO + 0x1800),
];

type Store = fn(&mut CodeAssembler) -> Result;

/// Ways to make a function at RDI return EBP, or some of EBP, which is then changed. The image of the new function is
/// in RDX and at [`IMAGE`]. RAX, RCX, RSI, RDI and XMM0 may change.
const STORES: [(&str, Store); 14] = [
    ("mov", |a| a.mov(dword_ptr(rdi + 1), ebp)),
    ("bytes", |a| {
        a.mov(eax, ebp)?;
        for i in 0..4 {
            a.mov(byte_ptr(rdi + 1 + i), al)?;
            a.shr(eax, 8)?;
        }
        Ok(())
    }),
    ("words, the last first", |a| {
        a.mov(eax, ebp)?;
        a.shr(eax, 16)?;
        a.mov(word_ptr(rdi + 3), ax)?;
        a.mov(word_ptr(rdi + 1), bp)
    }),
    ("mov of all", |a| a.mov(qword_ptr(rdi), rdx)),
    ("the last byte alone", |a| {
        a.mov(eax, dword_ptr(rdi + 1))?;
        a.and(eax, 0x00ff_ffff)?;
        a.and(ebp, 0xff00_0000u32 as i32)?;
        a.or(ebp, eax)?;
        a.mov(eax, ebp)?;
        a.shr(eax, 24)?;
        a.mov(byte_ptr(rdi + 4), al)
    }),
    ("the first byte alone", |a| {
        a.mov(al, bpl)?;
        a.mov(ebp, dword_ptr(rdi + 1))?;
        a.mov(bpl, al)?;
        a.mov(byte_ptr(rdi + 1), al)
    }),
    ("xchg", |a| {
        a.mov(eax, ebp)?;
        a.xchg(dword_ptr(rdi + 1), eax)
    }),
    ("cmpxchg", |a| {
        a.mov(eax, dword_ptr(rdi + 1))?;
        a.lock().cmpxchg(dword_ptr(rdi + 1), ebp)
    }),
    ("lock add", |a| {
        a.mov(eax, ebp)?;
        a.sub(eax, dword_ptr(rdi + 1))?;
        a.lock().add(dword_ptr(rdi + 1), eax)
    }),
    ("movnti", |a| a.movnti(dword_ptr(rdi + 1), ebp)),
    ("rep movsb", |a| {
        a.mov(esi, IMAGE as u32)?;
        a.mov(ecx, 6)?;
        a.rep().movsb()
    }),
    ("rep stosd", |a| {
        a.mov(eax, ebp)?;
        a.inc(rdi)?;
        a.mov(ecx, 1)?;
        a.rep().stosd()
    }),
    ("push", |a| {
        a.mov(rcx, rsp)?;
        a.lea(rsp, rdi + 8)?;
        a.push(rdx)?;
        a.mov(rsp, rcx)
    }),
    ("movups", |a| {
        a.mov(esi, IMAGE as u32)?;
        a.movups(xmm0, xmmword_ptr(rsi))?;
        a.movups(xmmword_ptr(rdi), xmm0)
    }),
];

/// A function that returns 0, with room for the largest store.
const FUNCTION: [u8; 16] = [0xb8, 0, 0, 0, 0, 0xc3, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90];

fn make_functions(m: &Machine) {
    m.map(ALIAS, FUNCTIONS + 0xa000, pte::P | pte::W);
    for (at, bits) in [(APART, pte::P), (APART_TOO, pte::P | pte::W)] {
        m.map(at, FUNCTIONS + 0xd000, bits);
        m.map(at + 0x1000, FUNCTIONS + 0xc000, bits);
    }
    for (i, (call, _)) in TARGETS.into_iter().enumerate() {
        for (byte, at) in FUNCTION.into_iter().zip(call..) {
            m.poke(physical(at), byte);
        }
        m.poke(CALLS + 8 * i as u64, call);
    }
    m.load(IMAGE, &FUNCTION);
}

fn physical(linear: u64) -> u64 {
    match linear {
        0x4000_0000..0x4000_1000 => linear - APART + FUNCTIONS + 0xd000,
        0x4000_1000..0x4000_2000 => linear - APART - 0x1000 + FUNCTIONS + 0xc000,
        0x5555_5000..0x5555_6000 => linear - ALIAS + FUNCTIONS + 0xa000,
        same => same,
    }
}

#[test]
fn any_function_by_any_store_in_any_order() {
    const ROUNDS: u32 = 12_000;
    let m = Machine::new(1);
    make_functions(&m);
    // RBX: SHADOWS. R12: rounds left. R13: randomness. R14: CALLS. R15: SEGMENTS.
    let (next, wrong) = (CODE + 0x100, CODE + 0x300);
    let mut at = CODE + 0x400;
    for (t, (call, store)) in TARGETS.into_iter().enumerate() {
        for (s, (_, code)) in STORES.into_iter().enumerate() {
            let index = (t * STORES.len() + s) as u64;
            m.poke(SEGMENTS + 8 * index, at);
            at = m.code(at, |a| {
                a.mov(rdi, store)?;
                code(a)?;
                a.mov(dword_ptr(rbx + 4 * t as i32), ebp)?;
                a.mov(esi, index as u32)?;
                a.mov(rax, call)?;
                a.call(rax)?;
                a.cmp(eax, ebp)?;
                a.jne(wrong)?;
                a.jmp(next)
            });
        }
    }
    assert!(at < FUNCTIONS);
    let end = m.code(next, |a| {
        let mut go_on = a.create_label();
        // One that was not changed just now.
        random(a)?;
        a.xor(edx, edx)?;
        a.mov(eax, ebp)?;
        a.mov(ecx, TARGETS.len() as u32)?;
        a.div(ecx)?;
        a.mov(edi, edx)?;
        a.mov(esi, 1000)?;
        a.call(qword_ptr(r14 + rdi * 8))?;
        a.cmp(eax, dword_ptr(rbx + rdi * 4))?;
        a.jne(wrong)?;
        a.dec(r12d)?;
        a.jnz(go_on)?;
        a.xor(eax, eax)?;
        done(a)?;
        a.set_label(&mut go_on)?;
        random(a)?;
        a.mov(eax, ebp)?;
        a.xor(edx, edx)?;
        a.mov(ecx, (TARGETS.len() * STORES.len()) as u32)?;
        a.div(ecx)?;
        a.mov(ecx, edx)?;
        random(a)?;
        a.mov(edx, ebp)?;
        a.shl(rdx, 8)?;
        a.mov(rax, 0x9090_c300_0000_00b8u64)?;
        a.or(rdx, rax)?;
        a.mov(edi, IMAGE as u32)?;
        a.mov(qword_ptr(rdi), rdx)?;
        a.jmp(qword_ptr(r15 + rcx * 8))
    });
    assert!(end < wrong);
    m.code(wrong, |a| {
        a.lea(eax, rsi + 1)?;
        done(a)
    });
    let mut guest = m.vcpu(0, |s| {
        s.regs.rip = next;
        s.regs.gpr[RBX] = SHADOWS;
        s.regs.gpr[12] = ROUNDS.into();
        s.regs.gpr[14] = CALLS;
        s.regs.gpr[15] = SEGMENTS;
    });
    let stop = guest.run();
    let what = match stop {
        Stop::Done(n @ 1..=1000) => {
            let n = n as usize - 1;
            format!("{:x?} by {}", TARGETS[n / STORES.len()], STORES[n % STORES.len()].0)
        }
        _ => "one that was not changed".into(),
    };
    assert_eq!(stop, Stop::Done(0), "{what}, {} rounds left", guest.state().regs.gpr[12]);
}

// --- what has become hot

#[test]
fn a_loop_that_has_become_hot() {
    // Where the addend is: in the loop, or in a function on its page, another page, or two. It is stored to by way of
    // another mapping, or not.
    const ROUNDS: u64 = 20_000_000;
    const EACH: u64 = 1 << 17;
    let window = 0x7000_0000;
    for (function, alias) in [(None, false), (None, true), (Some(CODE + 0x800), false), (Some(FUNCTIONS + 0xffd), true)]
    {
        let m = Machine::new(1);
        for page in [CODE, FUNCTIONS, FUNCTIONS + 0x1000] {
            m.map(window + page, page, pte::P | pte::W);
        }
        let add = [0x48, 0x05, 1, 0, 0, 0]; // add rax, imm32
        let addend = function.unwrap_or(CODE + 0x100);
        // RDI: the immediate. ECX: rounds left.
        let code = |a: &mut CodeAssembler| {
            let (mut again, mut keep) = (a.create_label(), a.create_label());
            a.xor(eax, eax)?;
            a.set_label(&mut again)?;
            match function {
                Some(function) => a.call(function)?,
                None => a.jmp(addend)?,
            }
            let mut here = a.create_label();
            a.set_label(&mut here)?;
            a.test(ecx, (EACH - 1) as i32)?;
            a.jnz(keep)?;
            a.mov(dword_ptr(rdi), ecx)?;
            a.set_label(&mut keep)?;
            a.dec(ecx)?;
            a.jnz(again)?;
            done(a)
        };
        m.code(CODE, code);
        match function {
            Some(function) => m.load(function, &[&add[..], &[0xc3]].concat()),
            // `xor eax, eax; jmp addend`: two bytes, and two or five.
            None => {
                let back = if m.peek::<u8>(CODE + 2) == 0xe9 { CODE + 7 } else { CODE + 4 };
                let end = addend + add.len() as u64;
                m.load(addend, &add);
                m.code(end, |a| a.jmp(back));
            }
        }
        let mut guest = m.vcpu(0, |s| {
            s.regs.gpr[RDI] = addend + 2 + if alias { window } else { 0 };
            s.regs.gpr[RCX] = ROUNDS;
        });
        assert!(matches!(guest.run(), Stop::Done(_)));
        let (mut expected, mut addend) = (0, 1);
        for left in (1..=ROUNDS).rev() {
            expected += addend;
            if left % EACH == 0 {
                addend = left;
            }
        }
        assert_eq!(guest.state().regs.gpr[0], expected, "{function:x?}, {alias}");
    }
}

// --- copies

/// Offsets of functions on a page that is copied; the last lies on two.
const ON_PAGE: [u64; 4] = [0, 0x7f9, 0xff0, 0xffd];

#[test]
fn pages_of_code_are_copied() {
    // Two images of a page with functions take turns; string instructions copy them, up or down.
    type Copy = fn(&mut CodeAssembler) -> Result;
    let copies: [(&str, Copy); 4] = [
        ("rep movsq", |a| {
            a.mov(ecx, 514)?;
            a.rep().movsq()
        }),
        ("rep movsb", |a| {
            a.mov(ecx, 514 * 8)?;
            a.rep().movsb()
        }),
        ("rep movsb, down", |a| {
            a.mov(ecx, 514 * 8)?;
            a.lea(rsi, rsi + 514 * 8 - 1)?;
            a.lea(rdi, rdi + 514 * 8 - 1)?;
            a.std()?;
            a.rep().movsb()?;
            a.cld()
        }),
        ("movdqu", |a| {
            let mut again = a.create_label();
            a.mov(ecx, 514 / 2)?;
            a.set_label(&mut again)?;
            a.movdqu(xmm0, xmmword_ptr(rsi))?;
            a.movdqu(xmmword_ptr(rdi), xmm0)?;
            a.add(rsi, 16)?;
            a.add(rdi, 16)?;
            a.dec(ecx)?;
            a.jnz(again)
        }),
    ];
    const ROUNDS: u32 = 400;
    for (name, copy) in copies {
        let m = Machine::new(1);
        let images = [DATA + 0x1_0000, DATA + 0x2_0000];
        for (i, image) in images.into_iter().enumerate() {
            for (j, at) in ON_PAGE.into_iter().enumerate() {
                m.load(image + at, &FUNCTION[..6]);
                m.poke(image + at + 1, (16 * i + j) as u32);
            }
        }
        let (stop, state) = m.run(|a| {
            let mut again = a.create_label();
            a.mov(r8, images[0])?;
            a.mov(r9, images[1])?;
            a.mov(r12d, ROUNDS)?;
            a.xor(ebp, ebp)?;
            a.set_label(&mut again)?;
            a.mov(rsi, r8)?;
            a.mov(rdi, FUNCTIONS)?;
            copy(a)?;
            for at in ON_PAGE {
                a.mov(rdi, FUNCTIONS + at)?;
                a.call(rdi)?;
                a.imul_3(rbp, rbp, 37)?;
                a.add(rbp, rax)?;
            }
            a.xchg(r8, r9)?;
            a.dec(r12d)?;
            a.jnz(again)?;
            done(a)
        });
        assert!(matches!(stop, Stop::Done(_)), "{name}: {stop:?}");
        let values = (0..ROUNDS as u64).flat_map(|round| (0..4).map(move |j| 16 * (round % 2) + j));
        let expected = values.fold(0u64, |sum, value| sum.wrapping_mul(37).wrapping_add(value));
        assert_eq!(state.regs.gpr[5], expected, "{name}");
    }
}

#[test]
fn a_copy_over_the_instruction_that_makes_it() {
    // `rep movs` replaces its own page, itself by the same bytes, and what follows it by others.
    const ROUNDS: u32 = 1000;
    for rep_movs in [[0xf3, 0x48, 0xa5], [0xf3, 0x90, 0xa4]] {
        let bytes = rep_movs[2] == 0xa4;
        // `rep movsq`, or a NOP and `rep movsb`.
        let rep_movs = if bytes { [0x90, 0xf3, 0xa4] } else { rep_movs };
        let m = Machine::new(1);
        let images = [DATA + 0x1_0000, DATA + 0x2_0000];
        for at in [FUNCTIONS, images[0], images[1]] {
            m.load(at + 0x7f0, &rep_movs);
            m.load(at + 0x7f3, &FUNCTION[..6]);
            m.poke(at + 0x7f4, (at >> 16) as u32);
        }
        m.code(CODE, |a| {
            let (mut again, mut wrong) = (a.create_label(), a.create_label());
            a.mov(r12d, ROUNDS)?;
            a.mov(rdx, FUNCTIONS + 0x7f0)?;
            a.set_label(&mut again)?;
            a.mov(rsi, rbx)?;
            a.mov(rdi, FUNCTIONS)?;
            a.mov(ecx, if bytes { 4096 } else { 512 })?;
            a.call(rdx)?;
            a.mov(ecx, ebx)?;
            a.shr(ecx, 16)?;
            a.cmp(eax, ecx)?;
            a.jne(wrong)?;
            a.xor(rbx, (images[0] ^ images[1]) as i32)?;
            a.dec(r12d)?;
            a.jnz(again)?;
            a.xor(eax, eax)?;
            a.set_label(&mut wrong)?;
            done(a)
        });
        let mut guest = m.vcpu(0, |s| s.regs.gpr[RBX] = images[0]);
        assert_eq!(guest.run(), Stop::Done(0), "{rep_movs:x?}");
        assert_eq!(guest.state().regs.gpr[RSI], images[1] + 0x1000);
    }
}
