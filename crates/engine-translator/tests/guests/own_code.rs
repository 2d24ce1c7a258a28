//! Instructions that are emulated in general and have emitted code in 64-bit mode: what the manual says of them, and that
//! what emitted code does not do itself is still done.

use iced_x86::{IcedError, code_asm::*};
use purlin_arch::x86_64::regs::{
    cr4,
    gpr::{RAX, RBX, RCX, RDI, RDX, RSI},
    rflags,
};

use crate::machine::*;

const GP: u8 = 13;
const PF: u8 = 14;

/// Linear addresses of two pages, frames at [`DATA`] in reverse order.
const WINDOW: u64 = 0x8000_0000;

/// A machine with the window, and bytes in it that all differ from their neighbours.
fn with_window() -> Machine {
    let m = Machine::new(1);
    m.map(WINDOW, DATA + 0x1000, pte::P | pte::W);
    m.map(WINDOW + 0x1000, DATA, pte::P | pte::W);
    for at in 0..0x2000 {
        poke(&m, WINDOW + at, at as u8 ^ (at >> 8) as u8);
    }
    m
}

fn physical(linear: u64) -> u64 {
    DATA + ((linear - WINDOW) ^ 0x1000)
}

fn poke(m: &Machine, linear: u64, value: u8) {
    m.poke(physical(linear), value);
}

fn peek(m: &Machine, linear: u64) -> u8 {
    m.peek(physical(linear))
}

fn window(m: &Machine) -> Vec<u8> {
    (0..0x2000).map(|at| peek(m, WINDOW + at)).collect()
}

/// What MOVS or STOS makes of the window, element by element.
fn model(
    memory: &mut [u8],
    moves: bool,
    size: usize,
    count: u64,
    down: bool,
    [mut from, mut to]: [u64; 2],
    value: u64,
) {
    let step = if down { (size as u64).wrapping_neg() } else { size as u64 };
    for _ in 0..count {
        let at = (to - WINDOW) as usize;
        let element: Vec<u8> = match moves {
            true => memory[(from - WINDOW) as usize..][..size].to_vec(),
            false => value.to_le_bytes()[..size].to_vec(),
        };
        memory[at..at + size].copy_from_slice(&element);
        (from, to) = (from.wrapping_add(step), to.wrapping_add(step));
    }
}

#[test]
fn strings_wherever_they_lie() {
    // Pointers into the window: on one page, up to its end, over it, overlapping.
    let places = [(0x100u64, 0x900u64), (0x100, 0x104), (0x104, 0x100), (0xf00, 0x1f00), (0xff8, 0x20), (0x20, 0xff9)];
    for size in [1usize, 2, 4, 8] {
        for (moves, down) in [(false, false), (false, true), (true, false), (true, true)] {
            let m = with_window();
            m.code(CODE, |a| string(a, moves, size, down));
            let mut guest = m.vcpu(0, |_| {});
            for (from, to) in places {
                let (from, to) = if down { (from | 0x800, to | 0x400) } else { (from, to) };
                for count in [0u64, 1, 3, 16, 100] {
                    let fits = |at: u64| down || at + count * size as u64 <= 0x2000;
                    if fits(from) && fits(to) {
                        one_string(&m, &mut guest, moves, size, count, down, [WINDOW + from, WINDOW + to]);
                    }
                }
            }
        }
    }
}

/// The code that [`one_string`] runs.
fn string(a: &mut CodeAssembler, moves: bool, size: usize, down: bool) -> Result<(), IcedError> {
    if down {
        a.std()?
    } else {
        a.cld()?
    }
    let a = a.rep();
    match (moves, size) {
        (true, 1) => a.movsb()?,
        (true, 2) => a.movsw()?,
        (true, 4) => a.movsd()?,
        (true, _) => a.movsq()?,
        (false, 1) => a.stosb()?,
        (false, 2) => a.stosw()?,
        (false, 4) => a.stosd()?,
        (false, _) => a.stosq()?,
    }
    done(a)
}

fn one_string(m: &Machine, guest: &mut Guest, moves: bool, size: usize, count: u64, down: bool, at: [u64; 2]) {
    const VALUE: u64 = 0x1122_3344_5566_7788;
    let mut wanted = window(m);
    model(&mut wanted, moves, size, count, down, at, VALUE);
    guest.change(|s| {
        s.regs.rip = CODE;
        (s.regs.gpr[RSI], s.regs.gpr[RDI], s.regs.gpr[RCX], s.regs.gpr[RAX]) = (at[0], at[1], count, VALUE);
        s.regs.rflags |= rflags::CF | rflags::ZF;
    });
    let name = format!("moves {moves} size {size} count {count} down {down} at {at:x?}");
    assert!(matches!(guest.run(), Stop::Done(_)), "{name}");
    let state = guest.state();
    let moved = count * size as u64;
    let end = |at: u64| if down { at.wrapping_sub(moved) } else { at + moved };
    assert_eq!(state.regs.gpr[RDI], end(at[1]), "{name}");
    assert_eq!(state.regs.gpr[RSI], if moves { end(at[0]) } else { at[0] }, "{name}");
    assert_eq!(state.regs.gpr[RCX], 0, "{name}");
    assert_eq!(state.regs.rflags & rflags::STATUS, rflags::CF | rflags::ZF, "{name}");
    assert_eq!(state.regs.rflags & rflags::DF != 0, down, "{name}");
    assert!(window(m) == wanted, "{name}");
}

#[test]
fn a_string_stops_where_a_page_is_missing() {
    let m = with_window();
    m.map(WINDOW + 0x1000, 0, 0);
    m.code(CODE, |a| {
        a.rep().stosq()?;
        done(a)
    });
    let mut guest = m.vcpu(0, |s| {
        (s.regs.gpr[RDI], s.regs.gpr[RCX], s.regs.gpr[RAX]) = (WINDOW + 0xff0, 4, 0);
    });
    let Stop::Vector(PF, frame) = guest.run() else { panic!("a page fault") };
    assert_eq!((frame.rip, guest.state().system.cr2), (CODE, WINDOW + 0x1000));
    assert_eq!((guest.state().regs.gpr[RDI], guest.state().regs.gpr[RCX]), (WINDOW + 0x1000, 2));
    m.map(WINDOW + 0x1000, DATA, pte::P | pte::W);
    guest.resume(&frame, CODE);
    assert!(matches!(guest.run(), Stop::Done(_)));
    assert_eq!((0..0x20).map(|at| peek(&m, WINDOW + 0xff0 + at)).collect::<Vec<_>>(), [0; 0x20]);
}

#[test]
fn the_time_goes_on_and_has_its_halves() {
    let m = Machine::new(1);
    let (_, state) = m.run(|a| {
        a.mov(rax, -1i64 as u64)?;
        a.mov(rdx, -1i64 as u64)?;
        a.rdtsc()?;
        a.mov(rsi, rax)?;
        a.mov(rdi, rdx)?;
        a.rdtsc()?;
        done(a)
    });
    let time = |low: usize, high: usize| {
        let (low, high) = (state.regs.gpr[low], state.regs.gpr[high]);
        assert!(low <= u64::from(u32::MAX) && high <= u64::from(u32::MAX), "{low:#x} {high:#x}");
        high << 32 | low
    };
    assert!(time(RSI, RDI) < time(RAX, RDX));
}

#[test]
fn user_code_is_kept_from_the_time_by_tsd() {
    for tsd in [false, true] {
        let m = Machine::new(1);
        m.user_pages(0, MEMORY);
        m.code(CODE, |a| {
            a.rdtsc()?;
            a.ud2()
        });
        let mut guest = m.vcpu(0, |s| {
            user_mode(s);
            s.system.cr4 |= if tsd { cr4::TSD } else { 0 };
        });
        match guest.run() {
            Stop::Vector(GP, frame) => assert!(tsd && frame.rip == CODE),
            Stop::Vector(6, _) => assert!(!tsd),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn bases_are_read_and_written() {
    const BASE: u64 = 0xffff_8000_1234_5678;
    let m = Machine::new(1);
    m.code(CODE, |a| {
        a.wrfsbase(rbx)?;
        a.wrgsbase(ebx)?;
        a.rdfsbase(rcx)?;
        a.rdgsbase(rdx)?;
        a.rdfsbase(esi)?;
        a.rdgsbase(r10)?;
        a.mov(rdi, r10)?;
        done(a)
    });
    let mut guest = m.vcpu(0, |s| {
        s.system.cr4 |= cr4::FSGSBASE;
        s.regs.gpr[RBX] = BASE;
        s.regs.rflags |= rflags::CF;
    });
    assert!(matches!(guest.run(), Stop::Done(_)));
    let gpr = guest.state().regs.gpr;
    assert_eq!((gpr[RCX], gpr[RDX], gpr[RSI], gpr[RDI]), (BASE, 0x1234_5678, 0x1234_5678, 0x1234_5678));
    assert_eq!(guest.state().regs.rflags & rflags::STATUS, rflags::CF);
    guest.change(|s| (s.regs.rip, s.regs.gpr[RBX]) = (CODE, 0x8000_0000_0000));
    let Stop::Vector(GP, frame) = guest.run() else { panic!("an address that is not canonical") };
    assert_eq!((frame.rip, frame.rflags & rflags::STATUS), (CODE, rflags::CF));
}

#[test]
fn selectors_and_control_registers_are_read() {
    let m = Machine::new(1);
    let (_, state) = m.run(|a| {
        a.mov(rax, -1i64 as u64)?;
        a.mov(rbx, rax)?;
        a.mov(r10, rax)?;
        a.mov(ax, ds)?;
        a.mov(ebx, ds)?;
        a.mov(r10, ds)?;
        a.mov(rdi, r10)?;
        a.mov(rcx, cr0)?;
        a.mov(r11, cr3)?;
        a.mov(rdx, r11)?;
        a.mov(rsi, cr4)?;
        // `done` tells EAX.
        done(a)
    });
    let gpr = state.regs.gpr;
    let data = u64::from(state.system.segments[3].selector);
    assert_eq!((gpr[RAX], gpr[RBX], gpr[RDI]), (!0xffff | data, data, data));
    assert_eq!((gpr[RCX], gpr[RDX], gpr[RSI]), (state.system.cr0, state.system.cr3, state.system.cr4));
}
