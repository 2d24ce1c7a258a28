//! Pages that share an entry of the TLB and are used by turns: what one takes the place of is kept elsewhere, and forgotten
//! with everything else.

use iced_x86::{IcedError, code_asm::*};
use purlin_arch::x86_64::regs::gpr::{RAX, RDX, RSI};

use crate::{machine::*, stack_page::own_stack_for};

type Result = std::result::Result<(), IcedError>;
type Code = fn(&mut CodeAssembler) -> Result;

/// From one of such pages to the next.
const STEP: u64 = 16 << 20;
const FIRST: u64 = 0x8000_0000;
const SECOND: u64 = FIRST + STEP;
const FRAME: u64 = DATA + 0x1_0000;
const OTHER_FRAME: u64 = DATA + 0x3_0000;
const ROUNDS: u32 = 1000;

/// The two pages, with frames of their own.
fn machine() -> Machine {
    let m = Machine::new(1);
    m.map(FIRST, FRAME, pte::P | pte::W);
    m.map(SECOND, FRAME + 0x1000, pte::P | pte::W);
    m
}

/// RBX and RBP point at the pages, RSI at the entry of the first.
fn pointers(a: &mut CodeAssembler, m: &Machine) -> Result {
    a.mov(rbx, FIRST)?;
    a.mov(rbp, SECOND)?;
    a.mov(rsi, m.pte(FIRST))
}

/// Puts the first page into an entry by `access`, and the second in its place.
fn displace(a: &mut CodeAssembler, access: Code) -> Result {
    access(a)?;
    a.mov(rax, qword_ptr(rbp))
}

const LOAD: Code = |a| a.mov(rdx, qword_ptr(rbx));
const STORE: Code = |a| a.mov(qword_ptr(rbx), 0x12);
const PUSH: Code = |a| {
    a.lea(rsp, qword_ptr(rbx + 8))?;
    a.push(0x12)
};

#[test]
fn each_page_has_what_was_stored_to_it() {
    // By loads and stores, as a stack, and by a vector register; more than are kept.
    const PAGES: u64 = 48;
    let m = Machine::new(1);
    (0..PAGES).for_each(|i| m.map(FIRST + i * STEP, FRAME + i * 0x1000, pte::P | pte::W));
    let (stop, state) = m.run(|a| {
        let (mut round, mut page) = (a.create_label(), a.create_label());
        a.vpcmpeqd(ymm1, ymm1, ymm1)?;
        a.vpxor(ymm2, ymm2, ymm2)?;
        a.mov(r12d, ROUNDS)?;
        a.set_label(&mut round)?;
        a.mov(rbx, FIRST)?;
        a.mov(ecx, PAGES as u32)?;
        a.set_label(&mut page)?;
        a.add(qword_ptr(rbx), rcx)?;
        a.lea(rsp, qword_ptr(rbx + 0x800))?;
        a.push(rcx)?;
        a.add(r14, qword_ptr(rbx + 0x7f8))?;
        a.vpsubd(ymm3, ymm2, ymm1)?;
        a.vpaddd(ymm3, ymm3, ymmword_ptr(rbx + 0x40))?;
        a.vmovdqu(ymmword_ptr(rbx + 0x40), ymm3)?;
        a.add(rbx, STEP as i32)?;
        a.dec(ecx)?;
        a.jnz(page)?;
        a.dec(r12d)?;
        a.jnz(round)?;
        done(a)
    });
    assert!(matches!(stop, Stop::Done(_)), "{stop:?}");
    for i in 0..PAGES {
        let at = |offset: u64| m.peek::<u64>(FRAME + i * 0x1000 + offset);
        let each = PAGES - i;
        let both = u64::from(ROUNDS) << 32 | u64::from(ROUNDS);
        assert_eq!((at(0), at(0x7f8), at(0x40), at(0x58)), (each * u64::from(ROUNDS), each, both, both), "{i}");
    }
    assert_eq!(state.regs.gpr[14], (1..=PAGES).sum::<u64>() * u64::from(ROUNDS));
}

#[test]
fn another_page_in_its_place() {
    let flushes: [(&str, Code, u64); 4] = [
        ("invlpg", |a| a.invlpg(ptr(rbx)), 0),
        ("invlpg, global", |a| a.invlpg(ptr(rbx)), pte::G),
        (
            "cr3",
            |a| {
                a.mov(rax, cr3)?;
                a.mov(cr3, rax)
            },
            0,
        ),
        (
            "cr4, global",
            |a| {
                a.mov(rax, cr4)?;
                a.btr(rax, 7)?;
                a.mov(cr4, rax)
            },
            pte::G,
        ),
    ];
    for (name, flush, global) in flushes {
        for (access, left) in [(LOAD, 7u64), (STORE, 0x12), (PUSH, 0x12)] {
            let m = machine();
            m.map(FIRST, FRAME, pte::P | pte::W | global);
            m.poke(OTHER_FRAME, 7u64);
            let (stop, state) = m.run(|a| {
                pointers(a, &m)?;
                for _ in 0..2 {
                    displace(a, access)?;
                }
                a.xor(qword_ptr(rsi), (FRAME ^ OTHER_FRAME) as i32)?;
                flush(a)?;
                a.mov(rdx, qword_ptr(rbx))?;
                access(a)?;
                done(a)
            });
            assert!(matches!(stop, Stop::Done(_)), "{name}: {stop:?}");
            assert_eq!(state.regs.gpr[RDX], 7, "{name}");
            assert_eq!(m.peek::<u64>(OTHER_FRAME), left, "{name}");
        }
    }
}

#[test]
fn what_may_only_be_loaded() {
    // It was, and has made way: a store still is a fault.
    for access in [STORE, PUSH] {
        let m = machine();
        m.map(FIRST, FRAME, pte::P);
        own_stack_for(&m, 14);
        let (stop, state) = m.run(|a| {
            pointers(a, &m)?;
            for _ in 0..3 {
                displace(a, LOAD)?;
            }
            access(a)?;
            done(a)
        });
        let Stop::Vector(14, frame) = stop else { panic!("{stop:?}") };
        assert_eq!((frame.error, state.system.cr2), (Some(3), FIRST));
    }
}

#[test]
fn the_first_store_sets_the_dirty_flag() {
    let m = machine();
    let (stop, state) = m.run(|a| {
        pointers(a, &m)?;
        for _ in 0..3 {
            displace(a, LOAD)?;
        }
        a.mov(rdx, qword_ptr(rsi))?;
        STORE(a)?;
        a.mov(rax, qword_ptr(rsi))?;
        done(a)
    });
    assert!(matches!(stop, Stop::Done(_)), "{stop:?}");
    let gpr = state.regs.gpr;
    assert_eq!((gpr[RDX] & (pte::A | pte::D), gpr[RAX] & (pte::A | pte::D)), (pte::A, pte::A | pte::D));
    assert_eq!(gpr[RSI], m.pte(FIRST));
}

#[test]
fn code_that_is_stored_to_by_a_page_that_has_made_way() {
    // A function whose constant each round changes, by way of the first page; it is executed where its frame is mapped, too.
    let m = machine();
    let function = FRAME + 0x100;
    m.code(function, |a| {
        a.mov(eax, 0)?;
        a.ret()
    });
    let (stop, state) = m.run(|a| {
        let mut again = a.create_label();
        pointers(a, &m)?;
        a.mov(r12d, ROUNDS)?;
        a.mov(edi, function as u32)?;
        a.set_label(&mut again)?;
        a.mov(dword_ptr(rbx + 0x101), r12d)?;
        a.mov(rdx, qword_ptr(rbp))?;
        a.call(rdi)?;
        a.sub(eax, r12d)?;
        a.or(r14d, eax)?;
        a.dec(r12d)?;
        a.jnz(again)?;
        done(a)
    });
    assert!(matches!(stop, Stop::Done(_)), "{stop:?}");
    assert_eq!(state.regs.gpr[14], 0, "old code was executed");
}
