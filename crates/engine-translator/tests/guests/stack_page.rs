//! The page that the stack pointer was on last: accesses to it have a short way, which ends with what it rests on.

use iced_x86::{IcedError, code_asm::*};
use purlin_arch::x86_64::regs::gpr::{RAX, RCX, RDX, RSP};

use crate::machine::*;

/// Two pages, whose frames do not follow each other; the stack pointer is between them.
const WINDOW: u64 = 0x8000_0000;
const SECOND: u64 = WINDOW + 0x1000;
const FRAME: u64 = DATA + 0x1_0000;
const OTHER_FRAME: u64 = DATA + 0x3_0000;

/// How a translation is forgotten.
#[derive(Clone, Copy, Debug)]
enum Flush {
    Invlpg,
    Cr3,
    Cr4,
}

/// With whether the page is a global one.
const FLUSHES: [(Flush, bool); 4] =
    [(Flush::Invlpg, false), (Flush::Cr3, false), (Flush::Cr4, true), (Flush::Invlpg, true)];

impl Flush {
    /// Forgets the page of `[rbx]`; RAX is changed.
    fn emit(self, a: &mut CodeAssembler) -> Result<(), IcedError> {
        match self {
            Flush::Invlpg => a.invlpg(ptr(rbx)),
            Flush::Cr3 => {
                a.mov(rax, cr3)?;
                a.mov(cr3, rax)
            }
            Flush::Cr4 => {
                a.mov(rax, cr4)?;
                a.btr(rax, 7)?;
                a.mov(cr4, rax)
            }
        }
    }
}

/// Exceptions get a stack of their own (SDM vol. 3, 8.7: IST1), since that of the guest is under test.
pub fn own_stack_for(m: &Machine, vector: u8) {
    let gate = IDT + 16 * u64::from(vector);
    m.poke(gate + 4, m.peek::<u8>(gate + 4) | 1);
    m.poke(TSS + 36, RING0_STACK);
}

#[test]
fn another_page_in_its_place() {
    for (flush, global) in FLUSHES {
        let m = Machine::new(1);
        m.map(WINDOW, FRAME, pte::P | pte::W | if global { pte::G } else { 0 });
        let entry = m.pte(WINDOW);
        let (stop, state) = m.run(|a| {
            a.mov(rbx, WINDOW)?;
            a.mov(rsi, entry)?;
            // The second time it is the page of the stack.
            for _ in 0..2 {
                a.lea(rsp, rbx + 0x800)?;
                a.push(0x11)?;
                a.mov(qword_ptr(rsp - 0x100), 0x12)?;
            }
            a.xor(qword_ptr(rsi), (FRAME ^ OTHER_FRAME) as i32)?;
            flush.emit(a)?;
            a.push(0x21)?;
            a.mov(qword_ptr(rsp - 0x100), 0x22)?;
            a.mov(rdx, qword_ptr(rsp + 8))?;
            a.pop(rcx)?;
            done(a)
        });
        assert!(matches!(stop, Stop::Done(_)), "{flush:?}: {stop:?}");
        let words = |frame: u64| [0x7f8, 0x7f0, 0x6f8, 0x6f0].map(|at| m.peek::<u64>(frame + at));
        assert_eq!(words(FRAME), [0x11, 0, 0x12, 0], "{flush:?}, global {global}");
        assert_eq!(words(OTHER_FRAME), [0, 0x21, 0, 0x22], "{flush:?}, global {global}");
        assert_eq!((state.regs.gpr[RDX], state.regs.gpr[RCX]), (0, 0x21), "{flush:?}, global {global}");
    }
}

#[test]
fn rights_taken_away() {
    for (flush, global) in FLUSHES {
        let m = Machine::new(1);
        m.map(WINDOW, FRAME, pte::P | pte::W | if global { pte::G } else { 0 });
        own_stack_for(&m, 14);
        let entry = m.pte(WINDOW);
        let (stop, state) = m.run(|a| {
            let (mut again, mut keep) = (a.create_label(), a.create_label());
            a.mov(rbx, WINDOW)?;
            a.mov(rsi, entry)?;
            a.lea(rsp, rbx + 0x800)?;
            a.xor(ecx, ecx)?;
            a.set_label(&mut again)?;
            a.push(rcx)?;
            a.pop(rdx)?;
            a.inc(ecx)?;
            a.cmp(ecx, 50)?;
            a.jne(keep)?;
            a.and(qword_ptr(rsi), !2)?;
            flush.emit(a)?;
            // It may still be read.
            a.mov(rdx, qword_ptr(rsp - 8))?;
            a.set_label(&mut keep)?;
            a.cmp(ecx, 100)?;
            a.jne(again)?;
            done(a)
        });
        assert_eq!((stop.vector().0, stop.vector().1), (14, Some(3)), "{flush:?}, global {global}");
        assert_eq!((state.regs.gpr[RCX], state.regs.gpr[RDX]), (50, 49), "{flush:?}, global {global}");
    }
}

#[test]
fn code_on_the_page_is_changed_by_a_push() {
    let m = Machine::new(1);
    m.map(WINDOW, FRAME, pte::P | pte::W);
    // mov eax, 0; ret
    m.load(FRAME + 0x400, &[0xb8, 0, 0, 0, 0, 0xc3]);
    let (stop, _) = m.run(|a| {
        let mut again = a.create_label();
        a.mov(rbx, WINDOW)?;
        a.lea(rsp, rbx + 0x800)?;
        a.lea(rdi, rbx + 0x400)?;
        a.xor(esi, esi)?;
        a.mov(ecx, 2000)?;
        a.set_label(&mut again)?;
        a.push(rcx)?;
        a.call(rdi)?;
        a.pop(rcx)?;
        a.add(esi, eax)?;
        // All eight bytes from the function's second one on.
        a.mov(rdx, 0xc3u64 << 32)?;
        a.or(rdx, rcx)?;
        a.lea(rsp, rbx + 0x409)?;
        a.push(rdx)?;
        a.lea(rsp, rbx + 0x800)?;
        a.dec(ecx)?;
        a.jnz(again)?;
        a.mov(eax, esi)?;
        done(a)
    });
    // The first call returns 0, each of the others what was pushed before it.
    assert_eq!(stop, Stop::Done((2..=2000).sum()));
}

#[test]
fn words_on_two_pages() {
    for at in 0..=16u64 {
        let m = Machine::new(1);
        m.map(WINDOW, FRAME, pte::P | pte::W);
        m.map(SECOND, OTHER_FRAME, pte::P | pte::W);
        let (stop, state) = m.run(|a| {
            a.mov(rbx, SECOND + at)?;
            a.mov(rax, 0x1817_1615_1413_1211u64)?;
            a.mov(rdx, 0x2827_2625_2423_2221u64)?;
            a.mov(rsp, rbx)?;
            // The page of the stack is known, and is this or that one.
            a.mov(qword_ptr(rsp - 0x80), rax)?;
            a.mov(qword_ptr(rsp + 0x80), rax)?;
            a.push(rax)?;
            a.push(rdx)?;
            a.add(qword_ptr(rsp + 4), 1)?;
            a.pop(rdx)?;
            a.pop(rax)?;
            done(a)
        });
        assert!(matches!(stop, Stop::Done(_)), "{at}: {stop:?}");
        // One is added to the 64 bits across the two words, and carries nowhere.
        let gpr = state.regs.gpr;
        assert_eq!((gpr[RDX], gpr[RAX]), (0x2827_2626_2423_2221, 0x1817_1615_1413_1211), "{at}");
        assert_eq!(gpr[RSP], SECOND + at);
    }
}

#[test]
fn a_page_that_is_only_read() {
    let m = Machine::new(1);
    m.map(WINDOW, FRAME, pte::P);
    own_stack_for(&m, 14);
    (0..8u64).for_each(|i| m.poke(FRAME + 8 * i, i));
    let (stop, state) = m.run(|a| {
        a.mov(rsp, WINDOW)?;
        a.xor(ecx, ecx)?;
        for _ in 0..8 {
            a.pop(rax)?;
            a.add(rcx, rax)?;
        }
        a.push(rax)?;
        done(a)
    });
    assert_eq!((stop.vector().0, stop.vector().1), (14, Some(3)));
    assert_eq!((state.regs.gpr[RCX], state.system.cr2), (28, WINDOW + 56));
}

#[test]
fn a_pointer_that_is_not_canonical() {
    for pointer in [1u64 << 47, 1 << 62, 1 << 63, 0xffff_7fff_ffff_fff0] {
        let m = Machine::new(1);
        own_stack_for(&m, 12);
        let (stop, state) = m.run(|a| {
            a.push(1)?;
            a.mov(rsp, pointer)?;
            a.mov(ecx, 7)?;
            a.pop(rcx)?;
            done(a)
        });
        assert_eq!((stop.vector().0, stop.vector().1), (12, Some(0)), "{pointer:#x}");
        assert_eq!(state.regs.gpr[RCX], 7, "{pointer:#x}");
    }
}
