//! Pages of code that have several linear addresses, with one translation for all of them.

use std::sync::Arc;

use iced_x86::{Code, IcedError, Instruction, MemoryOperand, Register, code_asm::*};
use purlin_arch::x86_64::regs::gpr::{RAX, RBX, RSP};
use purlin_engine_translator::profile::Profile;

use crate::machine::*;

const R8: usize = 8;
const R12: usize = 12;
const R14: usize = 14;

type Result = std::result::Result<(), IcedError>;

/// Where the shared pages are in memory: two of code. What follows them is of each linear address's own.
const SHARED: u64 = 0x40_0000;
/// Linear addresses that they have. The low halves of the first two's lowest 32 bits are the same, so they meet in tables of
/// jumps; the third meets the first in those of pages.
const PLACES: [u64; 3] = [0x7f12_3456_7000, 0x5555_0001_7000, 0x7f12_3456_7000 + (4096 << 12)];
/// Data of each place's own, in memory; a page each.
const OWN: u64 = 0x41_0000;
/// A page of code that is not shared.
const OTHER: u64 = 0x44_0000;
const STACK_TOP: u64 = 0x60_0000;

/// The shared pages at all places.
fn map_places(m: &Machine) {
    for (i, place) in PLACES.into_iter().enumerate() {
        let own = OWN + 0x1000 * i as u64;
        for (page, physical) in [SHARED, SHARED + 0x1000, own].into_iter().enumerate() {
            m.map(place + 0x1000 * page as u64, physical, pte::P | pte::W);
        }
        m.poke(own, 1000 + i as u64);
    }
}

/// Assembles code of the shared pages, `offset` bytes in, as if it were at the first place.
fn shared(m: &Machine, offset: u64, code: impl FnOnce(&mut CodeAssembler) -> Result) {
    m.code_of(64, PLACES[0] + offset, SHARED + offset, code);
}

/// What is `offset` bytes into the place, from code at the first one.
fn here(offset: u64) -> MemoryOperand {
    MemoryOperand::with_base_displ(Register::RIP, (PLACES[0] + offset) as i64)
}

/// An instruction with RAX or RDX and such an operand.
fn load(a: &mut CodeAssembler, code: Code, register: Register, offset: u64) -> Result {
    a.add_instruction(Instruction::with2(code, register, here(offset))?)
}

/// Where the place's own data is.
const DATA_OFFSET: u64 = 0x2000;

/// Runs with the code translated for the first executions, and for speed.
fn both(test: impl Fn(&dyn Fn() -> Machine)) {
    test(&|| Machine::new(1));
    test(&|| Machine::with_engine(1, engine().with_hot_code()));
}

/// A function at the beginning of the shared pages: what it returns in RAX tells all the ways in which its address matters.
fn function(m: &Machine) {
    let second = PLACES[0] + 0x1100;
    shared(m, 0, |a| {
        let (mut again, mut local, mut over) = (a.create_label(), a.create_label(), a.create_label());
        a.push(rbx)?;
        load(a, Code::Mov_r64_rm64, Register::RAX, DATA_OFFSET)?;
        load(a, Code::Add_r64_rm64, Register::RAX, DATA_OFFSET + 8)?;
        a.mov(ecx, 3)?;
        a.set_label(&mut again)?;
        a.call(second)?;
        a.call(local)?;
        a.dec(ecx)?;
        a.jnz(again)?;
        // By a pointer.
        load(a, Code::Lea_r64_m, Register::RDX, 0x800)?;
        a.call(rdx)?;
        a.jmp(over)?;
        a.set_label(&mut local)?;
        a.add(rax, 7)?;
        a.ret()?;
        a.set_label(&mut over)?;
        // The address itself.
        a.lea(rbx, qword_ptr(over))?;
        a.add(rax, rbx)?;
        a.add_instruction(Instruction::with1(Code::Inc_rm64, here(DATA_OFFSET + 0x10))?)?;
        a.pop(rbx)?;
        a.ret()
    });
    shared(m, 0x1100, |a| {
        load(a, Code::Add_r64_rm64, Register::RAX, DATA_OFFSET)?;
        a.ret()
    });
    shared(m, 0x800, |a| {
        // From one page to the other without a call.
        a.jmp(PLACES[0] + 0x1200)
    });
    shared(m, 0x1200, |a| {
        a.add(rax, 100)?;
        a.ret()
    });
}

/// What it returns, but for the distance of the address that it looks at from the place.
fn result(place: usize) -> u64 {
    PLACES[place] + 4 * (1000 + place as u64) + 3 * 7 + 100
}

/// Calls R12 and R14 in turn, R8 times in all; RAX is the sum of what they return.
fn caller(m: &Machine) {
    m.code(CODE, |a| {
        let mut again = a.create_label();
        a.xor(r13d, r13d)?;
        a.set_label(&mut again)?;
        a.call(r12)?;
        a.add(r13, rax)?;
        a.xchg(r12, r14)?;
        a.dec(r8)?;
        a.jnz(again)?;
        a.mov(rax, r13)?;
        done(a)
    });
}

fn call(guest: &mut Guest, target: u64, times: u64) -> u64 {
    call_in_turn(guest, [target; 2], times)
}

fn call_in_turn(guest: &mut Guest, targets: [u64; 2], times: u64) -> u64 {
    guest.change(|s| {
        (s.regs.rip, s.regs.gpr[R8], s.regs.gpr[RSP]) = (CODE, times, STACK_TOP);
        [s.regs.gpr[R12], s.regs.gpr[R14]] = targets;
    });
    let stop = guest.run();
    assert!(matches!(stop, Stop::Done(_)), "{stop:x?}");
    assert_eq!(guest.state().regs.gpr[RSP], STACK_TOP);
    guest.state().regs.gpr[RAX]
}

#[test]
fn the_same_code_at_each_of_its_addresses() {
    both(|new| {
        let m = new();
        map_places(&m);
        function(&m);
        caller(&m);
        let mut guest = m.vcpu(0, |_| {});
        let distance = call(&mut guest, PLACES[0], 1) - result(0);
        assert!(distance < 0x1000);
        for round in 0..30 {
            for (i, place) in PLACES.into_iter().enumerate() {
                let times = 1 + round % 4;
                assert_eq!(call(&mut guest, place, times), times * (result(i) + distance), "place {i}, round {round}");
            }
        }
        for i in 0..3 {
            let calls = (0..30).map(|round| 1 + round % 4).sum::<u64>() + u64::from(i == 0);
            assert_eq!(m.peek::<u64>(OWN + 0x1000 * i + 0x10), calls);
        }
    });
}

#[test]
fn it_is_translated_once() {
    let profile = Arc::new(Profile::default());
    let m = Machine::with_engine(1, engine().with_profile(profile.clone()));
    map_places(&m);
    function(&m);
    caller(&m);
    let mut guest = m.vcpu(0, |_| {});
    let made = |profile: &Profile| profile.report().translation.cold;
    call(&mut guest, PLACES[0], 2);
    let first = made(&profile);
    assert!(first > 5);
    call(&mut guest, PLACES[1], 2);
    call(&mut guest, PLACES[2], 2);
    assert_eq!(made(&profile), first);
}

#[test]
fn a_return_to_the_same_place_elsewhere() {
    // What is called turns the return address into that of another place: the site behind the call is the same one, for
    // another page.
    both(|new| {
        let m = new();
        map_places(&m);
        caller(&m);
        shared(&m, 0, |a| {
            let mut here = a.create_label();
            a.call(PLACES[0] + 0x1100)?;
            a.set_label(&mut here)?;
            a.lea(rax, qword_ptr(here))?;
            a.ret()
        });
        shared(&m, 0x1100, |a| {
            a.add(qword_ptr(rsp), rbx)?;
            a.ret()
        });
        let mut guest = m.vcpu(0, |_| {});
        for (from, to) in [(0, 0), (0, 1), (1, 0), (2, 0), (0, 2), (2, 1), (1, 1)].repeat(3) {
            guest.change(|s| s.regs.gpr[RBX] = PLACES[to].wrapping_sub(PLACES[from]));
            let times = 20;
            assert_eq!(call(&mut guest, PLACES[from], times), times * (PLACES[to] + 5), "from {from} to {to}");
        }
        // Where there is another page there is other code at the same distance.
        m.code_of(64, PLACES[2] + 5, OTHER + 5, |a| {
            a.mov(eax, 3)?;
            a.ret()
        });
        m.map(PLACES[2], OTHER, pte::P | pte::W);
        guest.change(|s| s.regs.gpr[RBX] = PLACES[2].wrapping_sub(PLACES[0]));
        assert_eq!(call(&mut guest, PLACES[0], 20), 20 * 3);
    });
}

#[test]
fn exceptions_say_where_they_were() {
    both(|new| {
        let m = new();
        map_places(&m);
        m.map(PLACES[1] + 0x2000, 0, 0);
        caller(&m);
        let load = m.code_of(64, PLACES[0], SHARED, |a| {
            a.nop()?;
            load(a, Code::Mov_r64_rm64, Register::RAX, DATA_OFFSET)?;
            a.xor(ecx, ecx)
        }) - PLACES[0];
        shared(&m, load, |a| a.div(ecx));
        let mut guest = m.vcpu(0, |_| {});
        // What raises it, then where: a load from a page that is missing at one place, a division, and what follows.
        for (place, vector, offset) in [(0, 0, load), (1, 14, 1), (2, 0, load), (1, 14, 1), (0, 0, load)] {
            guest.change(|s| {
                (s.regs.rip, s.regs.gpr[RSP], s.regs.gpr[R8]) = (CODE, STACK_TOP, 9);
                [s.regs.gpr[R12], s.regs.gpr[R14]] = [PLACES[place]; 2];
            });
            let Stop::Vector(met, frame) = guest.run() else { panic!("no exception") };
            assert_eq!((met, frame.rip), (vector, PLACES[place] + offset), "place {place}");
        }
    });
}

#[test]
fn calls_deeper_than_the_stack_of_guesses() {
    // Code that is movable and code that is not call each other: the former leaves two words for each call, so either of them
    // may be the one that finds no room.
    const LEVELS: u64 = 30_000;
    both(|new| {
        let low = CODE + 0x800;
        for pattern in [1u32, 2, 3, 0] {
            let m = new();
            map_places(&m);
            // R8 levels to go; at those whose bits of the pattern are all clear the other function is called.
            let body = |a: &mut CodeAssembler, this: u64, other: u64| {
                let (mut bottom, mut change, mut back) = (a.create_label(), a.create_label(), a.create_label());
                a.dec(r8)?;
                a.jz(bottom)?;
                a.push(r8)?;
                a.test(r8d, pattern)?;
                a.jz(change)?;
                a.call(this)?;
                a.jmp(back)?;
                a.set_label(&mut change)?;
                a.mov(rdx, other)?;
                a.call(rdx)?;
                a.set_label(&mut back)?;
                a.pop(r8)?;
                a.imul_3(rax, rax, 31)?;
                a.add(rax, r8)?;
                a.set_label(&mut bottom)?;
                a.ret()
            };
            shared(&m, 0, |a| body(a, PLACES[0], low));
            m.code(low, |a| body(a, low, PLACES[1]));
            // Again and again, from movable code: what is left of one time is what the next one begins with.
            shared(&m, 0x1000, |a| {
                let mut again = a.create_label();
                a.mov(r9d, 9)?;
                a.set_label(&mut again)?;
                a.mov(r8, LEVELS)?;
                a.xor(eax, eax)?;
                a.call(PLACES[0])?;
                a.dec(r9d)?;
                a.jnz(again)?;
                a.ret()
            });
            m.code(CODE, |a| {
                a.mov(r10, PLACES[0] + 0x1000)?;
                a.call(r10)?;
                a.call(r10)?;
                done(a)
            });
            let mut guest = m.vcpu(0, |_| {});
            for _ in 0..3 {
                guest.change(|s| (s.regs.rip, s.regs.gpr[RSP]) = (CODE, 0xf0_0000));
                let stop = guest.run();
                assert!(matches!(stop, Stop::Done(_)), "{stop:x?}");
                let expected = (1..LEVELS).fold(0u64, |sum, left| sum.wrapping_mul(31).wrapping_add(left));
                assert_eq!(guest.state().regs.gpr[RAX], expected, "pattern {pattern}");
            }
        }
    });
}

#[test]
fn code_that_changes_under_its_callers() {
    // What is called stores to the page that it returns to: the block that called is dead by then.
    both(|new| {
        let m = new();
        map_places(&m);
        caller(&m);
        let constant = 0x100 + 1;
        shared(&m, 0, |a| {
            a.call(PLACES[0] + 0x1100)?;
            a.jmp(PLACES[0] + 0x100)
        });
        shared(&m, 0x100, |a| {
            a.mov(eax, 5)?;
            a.ret()
        });
        // R9 times in 16 the store is one to the block that called, too.
        shared(&m, 0x1100, |a| {
            let mut away = a.create_label();
            a.inc(dword_ptr(SHARED + constant))?;
            a.inc(r9d)?;
            a.test(r9d, 3)?;
            a.jnz(away)?;
            a.mov(ecx, dword_ptr(SHARED + 1))?;
            a.mov(dword_ptr(SHARED + 1), ecx)?;
            a.set_label(&mut away)?;
            a.ret()
        });
        let mut guest = m.vcpu(0, |_| {});
        let mut value = 5u64;
        for place in PLACES.repeat(20) {
            let times = 7;
            let expected: u64 = (1..=times).map(|i| value + i).sum();
            assert_eq!(call(&mut guest, place, times), expected, "at {place:#x}");
            value += times;
        }
    });
}

#[test]
fn a_page_that_is_another_one_by_now() {
    // At the third place the second page is one of its own, then another one; jumps there were linked when it was the
    // shared one elsewhere.
    both(|new| {
        let m = new();
        map_places(&m);
        function(&m);
        caller(&m);
        for (offset, sum) in [(0x100, 1), (0x200, 2)] {
            m.code_of(64, PLACES[2] + 0x1000 + offset, OTHER + offset, |a| {
                a.add(rax, sum)?;
                a.ret()
            });
        }
        let entry = m.pte(PLACES[2] + 0x1000);
        let mut guest = m.vcpu(0, |_| {});
        let distance = call(&mut guest, PLACES[0], 5) / 5 - result(0);
        for round in 0..6 {
            let changed = round % 2 == 1;
            let physical = if changed { OTHER } else { SHARED + 0x1000 };
            m.poke(entry, physical | pte::P | pte::W);
            // As MOV CR3 would.
            guest.change(|_| {});
            for (i, place) in [(0, PLACES[0]), (2, PLACES[2]), (1, PLACES[1]), (2, PLACES[2])] {
                let plain = result(i) + distance;
                let expected = if i == 2 && changed { plain - 3 * 1002 - 100 + 3 + 2 } else { plain };
                assert_eq!(call(&mut guest, place, 4), 4 * expected, "round {round}, place {i}");
                let both = call_in_turn(&mut guest, [PLACES[0], place], 8);
                assert_eq!(both, 4 * (expected + result(0) + distance), "round {round}, place {i}");
            }
        }
    });
}

#[test]
fn where_movable_code_begins() {
    // One page below 4 GiB, one above: they jump to and call each other.
    const EDGE: u64 = 1 << 32;
    both(|new| {
        let m = new();
        caller(&m);
        m.map(EDGE - 0x1000, SHARED, pte::P | pte::W);
        m.map(EDGE, SHARED + 0x1000, pte::P | pte::W);
        let assemble_at = |offset: u64, code: &dyn Fn(&mut CodeAssembler) -> Result| {
            m.code_of(64, EDGE - 0x1000 + offset, SHARED + offset, |a| code(a));
        };
        assemble_at(0, &|a| {
            a.xor(eax, eax)?;
            a.call(EDGE + 0x100)?;
            a.inc(eax)?;
            a.jmp(EDGE + 0x200)
        });
        assemble_at(0x400, &|a| {
            a.add(eax, 1000)?;
            a.jmp(EDGE + 0x300)
        });
        assemble_at(0x1100, &|a| {
            a.add(eax, 10)?;
            a.call(EDGE - 0x1000 + 0x500)?;
            a.ret()
        });
        assemble_at(0x500, &|a| {
            a.add(eax, 100)?;
            a.ret()
        });
        assemble_at(0x1200, &|a| a.jmp(EDGE - 0x1000 + 0x400));
        assemble_at(0x1300, &|a| {
            a.add(eax, 10_000)?;
            a.ret()
        });
        let mut guest = m.vcpu(0, |_| {});
        assert_eq!(call(&mut guest, EDGE - 0x1000, 50), 50 * 11_111);
    });
}
