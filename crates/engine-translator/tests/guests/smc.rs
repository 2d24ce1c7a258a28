//! Code that changes: by its own stores, by another mapping's, by a device's, by another page taking its place.

use std::time::{Duration, Instant};

use iced_x86::{IcedError, code_asm::*};
use purlin_arch::x86_64::regs::gpr::{RAX, RBX, RCX, RDI, RSI};

use crate::machine::*;

/// Where functions lie that are changed: alone on their page.
const FUNCTION: u64 = CODE + 0x1000;
/// `mov eax, imm32; ret`
fn function(value: u32) -> [u8; 6] {
    let [a, b, c, d] = value.to_le_bytes();
    [0xb8, a, b, c, d, 0xc3]
}

/// What every kind of store does to the instruction that comes next.
#[test]
fn the_next_instruction_is_changed_by_any_store() {
    type Store = fn(&mut CodeAssembler) -> Result<(), IcedError>;
    // RBX: address of the immediate of a `mov edx, imm32` that follows. RSI: 7 in memory. RCX: 4. RAX: 7.
    let stores: [(&str, Store); 18] = [
        ("mov byte", |a| a.mov(byte_ptr(rbx), 7)),
        ("mov dword", |a| a.mov(dword_ptr(rbx), eax)),
        ("xchg", |a| a.xchg(dword_ptr(rbx), eax)),
        ("lock add", |a| a.lock().add(dword_ptr(rbx), 2)),
        ("inc", |a| {
            a.inc(dword_ptr(rbx))?;
            a.inc(dword_ptr(rbx))
        }),
        ("lock xadd", |a| {
            a.mov(ecx, 2)?;
            a.lock().xadd(dword_ptr(rbx), ecx)
        }),
        ("cmpxchg", |a| {
            a.mov(ecx, 7)?;
            a.mov(eax, 5)?;
            a.lock().cmpxchg(dword_ptr(rbx), ecx)
        }),
        ("bts", |a| a.bts(dword_ptr(rbx), 1)),
        ("movnti", |a| a.movnti(dword_ptr(rbx), eax)),
        ("stosb", |a| a.stosb()),
        ("rep stosb", |a| {
            a.mov(ecx, 1)?;
            a.rep().stosb()
        }),
        ("movsd", |a| a.movsd()),
        ("rep movsb", |a| a.rep().movsb()),
        ("movd", |a| {
            a.movd(xmm0, eax)?;
            a.movd(dword_ptr(rbx), xmm0)
        }),
        ("vmovd", |a| {
            a.vmovd(xmm0, eax)?;
            a.vmovd(dword_ptr(rbx), xmm0)
        }),
        ("fistp", |a| {
            a.fild(dword_ptr(rsi))?;
            a.fistp(dword_ptr(rbx))
        }),
        ("pop", |a| {
            // Eight bytes: the immediate, and the four bytes that follow it.
            a.mov(edx, dword_ptr(rbx + 4))?;
            a.shl(rdx, 32)?;
            a.or(rdx, 7)?;
            a.push(rdx)?;
            a.pop(qword_ptr(rbx))
        }),
        ("push", |a| {
            a.mov(edx, dword_ptr(rbx + 4))?;
            a.shl(rdx, 32)?;
            a.or(rdx, 7)?;
            a.mov(rbp, rsp)?;
            a.lea(rsp, rbx + 8)?;
            a.push(rdx)
        }),
    ];
    for (name, store) in stores {
        let m = Machine::new(1);
        m.poke(DATA, 7u32);
        let code = |target: u64| {
            move |a: &mut CodeAssembler| {
                a.mov(rbx, target + 1)?;
                a.mov(rdi, rbx)?;
                a.mov(rsi, DATA)?;
                a.mov(ecx, 4)?;
                a.mov(eax, 7)?;
                store(a)?;
                a.mov(edx, 5)?;
                a.nop()?;
                a.nop()?;
                a.mov(eax, edx)?;
                done(a)
            }
        };
        // 2 + 2: out; 2: mov eax, edx; 1 + 1: nop; 5: mov edx.
        let length = assemble(64, CODE, code(CODE)).len() as u64;
        let (stop, _) = m.run(code(CODE + length - 11));
        assert_eq!(stop, Stop::Done(7), "{name}");
    }
}

/// Changes a function's immediate and calls it, again and again; the result is the sum of what was returned.
fn patch_and_call(a: &mut CodeAssembler, function: u64, written_at: u64, rounds: u32) -> Result<(), IcedError> {
    let mut again = a.create_label();
    a.xor(esi, esi)?;
    a.mov(ecx, rounds)?;
    a.mov(edi, function as u32)?;
    a.mov(ebx, written_at as u32 + 1)?;
    a.set_label(&mut again)?;
    a.mov(dword_ptr(ebx), ecx)?;
    if a.bitness() == 64 {
        a.call(rdi)?
    } else {
        a.call(edi)?
    };
    a.add(esi, eax)?;
    a.dec(ecx)?;
    a.jnz(again)?;
    a.mov(eax, esi)?;
    done(a)
}

const ROUNDS: u32 = 2000;
const SUM: u32 = ROUNDS * (ROUNDS + 1) / 2;

#[test]
fn a_function_on_the_same_page_another_page_and_two_pages() {
    for at in [CODE + 0x800, FUNCTION, FUNCTION + 0xffe, FUNCTION + 0xfff, FUNCTION + 0xffb] {
        let m = Machine::new(1);
        m.load(at, &function(0));
        let (stop, _) = m.run(|a| patch_and_call(a, at, at, ROUNDS));
        assert_eq!(stop, Stop::Done(SUM), "{at:#x}");
    }
}

#[test]
fn the_second_half_of_an_instruction_on_two_pages() {
    // The opcode on one page, the immediate on the next: only the latter is stored to.
    let m = Machine::new(1);
    let at = FUNCTION + 0xfff;
    m.load(at, &function(0));
    m.map(0x4000_0000, FUNCTION, pte::P);
    m.map(0x4000_1000, FUNCTION + 0x1000, pte::P);
    let (stop, _) = m.run(|a| patch_and_call(a, 0x4000_0fff, at, ROUNDS));
    assert_eq!(stop, Stop::Done(SUM));
}

#[test]
fn one_frame_as_both_pages_of_an_instruction() {
    // The opcode is the frame's last byte, the immediate its first four.
    let m = Machine::new(1);
    let frame = FUNCTION;
    m.poke(frame + 0xfff, 0xb8u8);
    m.poke(frame + 4, 0xc3u8);
    m.map(0x4000_0000, frame, pte::P);
    m.map(0x4000_1000, frame, pte::P);
    let (stop, _) = m.run(|a| patch_and_call(a, 0x4000_0fff, frame - 1, ROUNDS));
    assert_eq!(stop, Stop::Done(SUM));
}

#[test]
fn by_way_of_another_mapping() {
    let m = Machine::new(1);
    let alias = 0x5555_5000;
    m.load(FUNCTION + 0x10, &function(0));
    m.map(alias, FUNCTION, pte::P | pte::W);
    let (stop, _) = m.run(|a| patch_and_call(a, FUNCTION + 0x10, alias + 0x10, ROUNDS));
    assert_eq!(stop, Stop::Done(SUM));
}

#[test]
fn in_32_bit_code() {
    for at in [CODE + 0x800, FUNCTION + 0xffe] {
        let m = Machine::new(1);
        m.load(at, &function(0));
        m.code_of(32, CODE, CODE, |a| patch_and_call(a, at, at, ROUNDS));
        let mut guest = m.vcpu(0, compatibility);
        assert_eq!(guest.run(), Stop::Done(SUM), "{at:#x}");
    }
}

#[test]
fn in_16_bit_code() {
    for at in [0x8800u64, 0x9fff] {
        let m = Machine::new(1);
        m.load(at, &[0xb8, 0, 0, 0xc3]);
        m.code_of(16, 0x8000, 0x8000, |a| {
            let mut again = a.create_label();
            a.xor(esi, esi)?;
            a.mov(cx, 500)?;
            a.mov(di, at as u32 as i32)?;
            a.set_label(&mut again)?;
            a.mov(word_ptr(di + 1), cx)?;
            a.call(di)?;
            a.movzx(eax, ax)?;
            a.add(esi, eax)?;
            a.loop_(again)?;
            a.mov(eax, esi)?;
            done(a)
        });
        assert_eq!(m.vcpu(0, crate::modes::real_mode).run(), Stop::Done(500 * 501 / 2), "{at:#x}");
    }
}

#[test]
fn code_and_data_on_one_page() {
    // The counter shares the loop's page: never stale, never lost.
    let m = Machine::new(1);
    let counter = CODE + 0xff0;
    let (stop, state) = m.run(|a| {
        let mut again = a.create_label();
        a.mov(rbx, counter)?;
        a.mov(ecx, 20_000)?;
        a.set_label(&mut again)?;
        a.add(qword_ptr(rbx), 3)?;
        a.mov(rdx, qword_ptr(rbx))?;
        a.dec(ecx)?;
        a.jnz(again)?;
        done(a)
    });
    assert_eq!(stop, Stop::Done(0));
    assert_eq!((state.regs.gpr[2], m.peek::<u64>(counter)), (60_000, 60_000));
}

#[test]
fn a_loop_that_unrolls_itself() {
    // Each round writes one more `inc eax; nop` over the nops behind it: the store hits the block it is in.
    let m = Machine::new(1);
    let (stop, _) = m.run(|a| {
        let mut again = a.create_label();
        let mut slots = a.create_label();
        a.xor(eax, eax)?;
        a.lea(rdi, ptr(slots))?;
        a.mov(ecx, 20)?;
        a.set_label(&mut again)?;
        a.mov(word_ptr(rdi), 0xc0ffu32 as i32)?;
        a.add(rdi, 2)?;
        a.set_label(&mut slots)?;
        for _ in 0..40 {
            a.nop()?;
        }
        a.dec(ecx)?;
        a.jnz(again)?;
        done(a)
    });
    assert_eq!(stop, Stop::Done(20 * 21 / 2));
}

#[test]
fn by_a_device_while_it_runs() {
    // The guest calls the function for ever and shows what it returns; the device changes the function.
    for at in [FUNCTION, FUNCTION + 0xfff] {
        let m = Machine::new(1);
        m.load(at, &function(0));
        m.code(CODE, |a| {
            let mut again = a.create_label();
            a.mov(rdi, at)?;
            a.mov(rbx, DATA)?;
            a.set_label(&mut again)?;
            a.call(rdi)?;
            a.mov(dword_ptr(rbx), eax)?;
            a.cmp(eax, -1)?;
            a.jne(again)?;
            done(a)
        });
        let mut guest = m.vcpu(0, |_| {});
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let start = Instant::now();
                for value in (1..200u32).chain([u32::MAX]) {
                    m.load(at + 1, &value.to_le_bytes());
                    while m.peek::<u32>(DATA) != value && start.elapsed() < Duration::from_secs(8) {
                        std::thread::yield_now();
                    }
                }
            });
            assert_eq!(guest.run(), Stop::Done(u32::MAX), "{at:#x}");
        });
    }
}

#[test]
fn by_a_page_that_is_given_back_while_it_runs() {
    // The guest calls the function for ever. When its page is the host's again it is full of zeroes, `add [rax], al`,
    // behind which another function ends the loop.
    let m = Machine::new(1);
    m.load(FUNCTION, &function(DATA as u32 + 64));
    m.load(FUNCTION + 0x1000, &function(u32::MAX));
    m.code(CODE, |a| {
        let mut again = a.create_label();
        a.mov(rdi, FUNCTION)?;
        a.mov(rbx, DATA)?;
        a.set_label(&mut again)?;
        a.call(rdi)?;
        a.mov(dword_ptr(rbx), eax)?;
        a.cmp(eax, -1)?;
        a.jne(again)?;
        done(a)
    });
    let mut guest = m.vcpu(0, |cpu| cpu.regs.gpr[RAX] = DATA + 64);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let start = Instant::now();
            while m.peek::<u32>(DATA) != DATA as u32 + 64 && start.elapsed() < Duration::from_secs(8) {
                std::thread::yield_now();
            }
            purlin_engine::memory::discard(&m.memory, FUNCTION, 0x1000).unwrap();
        });
        assert_eq!(guest.run(), Stop::Done(u32::MAX));
    });
}

/// Frames with functions that return 1 and 2.
const ONE: u64 = CODE + 0x10_0000 - 0x5_0000;
const TWO: u64 = ONE + 0x1000;
/// Where one of them is mapped.
const WINDOW: u64 = 0x7000_0000;

fn two_functions(m: &Machine) {
    m.load(ONE, &function(1));
    m.load(TWO, &function(2));
    m.map(WINDOW, ONE, pte::P);
}

#[test]
fn another_page_in_its_place() {
    let m = Machine::new(1);
    two_functions(&m);
    let entry = m.pte(WINDOW);
    let (stop, _) = m.run(|a| {
        let mut again = a.create_label();
        a.mov(rdi, WINDOW)?;
        a.mov(rbx, entry)?;
        a.xor(esi, esi)?;
        a.mov(ecx, 2000)?;
        a.set_label(&mut again)?;
        a.xor(qword_ptr(rbx), (ONE ^ TWO) as i32)?;
        a.invlpg(ptr(rdi))?;
        a.call(rdi)?;
        // 2, 1, 2, 1 …: each half of the sum has its own weight.
        a.imul_3(esi, esi, 3)?;
        a.add(esi, eax)?;
        a.dec(ecx)?;
        a.jnz(again)?;
        a.mov(eax, esi)?;
        done(a)
    });
    let expected = (0..2000).fold(0u32, |sum, i| sum.wrapping_mul(3) + if i % 2 == 0 { 2 } else { 1 });
    assert_eq!(stop, Stop::Done(expected));
}

/// An instruction on two pages, and what comes behind it: a page of the second half for each value.
fn halves(m: &Machine) -> [u64; 2] {
    m.load(ONE + 0xff0, &[0x31, 0xc0, 0xeb, 9]); // xor eax, eax; jmp to the instruction
    m.load(ONE + 0xffd, &[0xb8, 0x11, 0x22]);
    let seconds = [TWO, TWO + 0x1000];
    for (value, second) in [0x3333u16, 0x4444].into_iter().zip(seconds) {
        m.poke(second, value);
        m.load(second + 2, &[0x83, 0xc0, value as u8, 0xc3]); // add eax, imm8; ret
    }
    m.map(WINDOW, ONE, pte::P);
    m.map(WINDOW + 0x1000, seconds[0], pte::P);
    seconds
}

#[test]
fn another_page_in_the_place_of_an_instructions_second() {
    // INVLPG of the second page alone; the instruction is come to by a call, by a jump, or while its code is hot.
    const ROUNDS: u32 = 1000;
    for (entry, calls) in [(0xffd, 1), (0xff0, 1), (0xff0, 1000)] {
        let m = Machine::new(1);
        let seconds = halves(&m);
        let pte = m.pte(WINDOW + 0x1000);
        let (stop, _) = m.run(|a| {
            let (mut again, mut call) = (a.create_label(), a.create_label());
            a.mov(rbx, pte)?;
            a.mov(rsi, WINDOW + 0x1ffc)?;
            a.mov(rdi, WINDOW + entry)?;
            a.xor(ebp, ebp)?;
            a.mov(ecx, ROUNDS)?;
            a.set_label(&mut again)?;
            a.xor(qword_ptr(rbx), (seconds[0] ^ seconds[1]) as i32)?;
            a.invlpg(ptr(rsi))?;
            a.mov(edx, calls)?;
            a.set_label(&mut call)?;
            a.call(rdi)?;
            a.dec(edx)?;
            a.jnz(call)?;
            a.imul_3(ebp, ebp, 3)?;
            a.add(ebp, eax)?;
            a.dec(ecx)?;
            a.jnz(again)?;
            a.mov(eax, ebp)?;
            done(a)
        });
        let value = |i| if i % 2 == 0 { 0x4444_2211 + 0x44 } else { 0x3333_2211 + 0x33 };
        let expected = (0..ROUNDS).fold(0u32, |sum, i| sum.wrapping_mul(3).wrapping_add(value(i)));
        assert_eq!(stop, Stop::Done(expected), "from {entry:#x}, {calls} calls");
    }
}

#[test]
fn another_page_in_the_place_of_a_jumps_second() {
    // Nothing but the jump's own bytes is executed on the second page, so only for these does INVLPG of it count.
    const ROUNDS: u32 = 1000;
    let jump = WINDOW + 0xfff;
    let targets = [WINDOW + 0x100, WINDOW + 0x200];
    let m = Machine::new(1);
    let seconds = [TWO, TWO + 0x1000];
    m.poke(ONE + 0xfff, 0xe9u8);
    for ((target, second), value) in targets.into_iter().zip(seconds).zip([3, 5]) {
        m.poke(second, (target as u32).wrapping_sub(jump as u32 + 5));
        m.load(target - WINDOW + ONE, &function(value));
    }
    m.map(WINDOW, ONE, pte::P);
    m.map(WINDOW + 0x1000, seconds[0], pte::P);
    let pte = m.pte(WINDOW + 0x1000);
    let (stop, _) = m.run(|a| {
        let mut again = a.create_label();
        a.mov(rbx, pte)?;
        a.mov(rsi, WINDOW + 0x1000)?;
        a.mov(rdi, jump)?;
        a.xor(ebp, ebp)?;
        a.mov(ecx, ROUNDS)?;
        a.set_label(&mut again)?;
        a.call(rdi)?;
        a.imul_3(ebp, ebp, 3)?;
        a.add(ebp, eax)?;
        a.xor(qword_ptr(rbx), (seconds[0] ^ seconds[1]) as i32)?;
        a.invlpg(ptr(rsi))?;
        a.dec(ecx)?;
        a.jnz(again)?;
        a.mov(eax, ebp)?;
        done(a)
    });
    let expected = (0..ROUNDS).fold(0u32, |sum, i| sum.wrapping_mul(3).wrapping_add(3 + 2 * (i % 2)));
    assert_eq!(stop, Stop::Done(expected));
}

#[test]
fn no_page_in_the_place_of_an_instructions_second() {
    // The fetch of the second half faults, at the instruction; when the page is there again, it goes on.
    let m = Machine::new(1);
    halves(&m);
    let pte = m.pte(WINDOW + 0x1000);
    m.code(CODE, |a| {
        let mut again = a.create_label();
        a.mov(rbx, pte)?;
        a.mov(rsi, WINDOW + 0x1000)?;
        a.mov(rdi, WINDOW + 0xff0)?;
        a.mov(ecx, 100)?;
        a.set_label(&mut again)?;
        a.call(rdi)?;
        a.dec(ecx)?;
        a.jnz(again)?;
        a.and(qword_ptr(rbx), !1)?;
        a.invlpg(ptr(rsi))?;
        a.call(rdi)?;
        done(a)
    });
    let mut guest = m.vcpu(0, |_| {});
    let stop = guest.run();
    assert_eq!(stop.vector(), (14, Some(0x10), WINDOW + 0xffd));
    assert_eq!(guest.state().system.cr2, WINDOW + 0x1000);
    let Stop::Vector(_, frame) = stop else { unreachable!() };
    m.map(WINDOW + 0x1000, TWO, pte::P);
    guest.resume(&frame, frame.rip);
    assert_eq!(guest.run(), Stop::Done(0x3333_2211 + 0x33));
}

/// A second address space that shares the first's lower half but for [`WINDOW`].
fn second_space(m: &Machine, frame: u64) -> u64 {
    let root = m.new_table();
    for page in (0..MEMORY).step_by(4096) {
        m.map_in(root, page, page, pte::P | pte::W);
    }
    m.map_in(root, WINDOW, frame, pte::P);
    root
}

#[test]
fn another_address_space() {
    let m = Machine::new(1);
    two_functions(&m);
    let other = second_space(&m, TWO);
    let (stop, _) = m.run(|a| {
        let mut again = a.create_label();
        a.mov(rdi, WINDOW)?;
        a.mov(rbx, PAGES)?;
        a.mov(rdx, other)?;
        a.xor(esi, esi)?;
        a.mov(ecx, 2000)?;
        a.set_label(&mut again)?;
        a.xchg(rbx, rdx)?;
        a.mov(cr3, rbx)?;
        a.call(rdi)?;
        a.imul_3(esi, esi, 3)?;
        a.add(esi, eax)?;
        a.dec(ecx)?;
        a.jnz(again)?;
        a.mov(eax, esi)?;
        done(a)
    });
    let expected = (0..2000).fold(0u32, |sum, i| sum.wrapping_mul(3) + if i % 2 == 0 { 2 } else { 1 });
    assert_eq!(stop, Stop::Done(expected));
}

#[test]
fn jumps_within_a_page_stay_within_its_frame() {
    // In the first space the window's mapping changes without INVLPG while its code runs, and its fetch translation is
    // evicted (maybe): where a jump within the page leads is then the processor's choice. The second space must
    // still find its own frame's code when it makes the same jump.
    let m = Machine::new(1);
    let other = second_space(&m, ONE);
    let entry = m.pte(WINDOW);
    let target = WINDOW + 0x100;
    // What a direct-mapped cache of translations has in the window's place.
    let far: Vec<u64> = (1..5).map(|i| WINDOW + (i << 20)).collect();
    m.poke(TWO + 0x200, 0xc3u8);
    for &far in &far {
        m.map(far, TWO, pte::P);
    }
    m.map(WINDOW, ONE, pte::P);
    for (frame, value) in [(ONE, 1), (TWO, 2)] {
        m.code_of(64, WINDOW, frame, |a| {
            let mut untaken = a.create_label();
            for &far in &far {
                a.mov(rax, far + 0x200)?;
                a.call(rax)?;
            }
            a.test(esi, esi)?;
            a.jz(untaken)?;
            a.jmp(target)?;
            a.set_label(&mut untaken)?;
            a.ret()
        });
        m.load(frame + 0x100, &function(value));
    }
    for &far in &far {
        m.map_in(other, far, TWO, pte::P);
    }
    let (stop, _) = m.run(|a| {
        a.mov(rdi, WINDOW)?;
        a.mov(rbx, entry)?;
        // Once with the jump untaken, so that the blocks around it are there.
        a.xor(esi, esi)?;
        a.call(rdi)?;
        a.xor(qword_ptr(rbx), (ONE ^ TWO) as i32)?;
        a.mov(esi, 1)?;
        a.call(rdi)?;
        a.mov(rdx, other)?;
        a.mov(cr3, rdx)?;
        a.call(rdi)?;
        done(a)
    });
    assert_eq!(stop, Stop::Done(1));
}

#[test]
fn room_for_emitted_code_runs_out() {
    for cpus in [1, 4] {
        let m = Machine::with_small_code_cache(cpus);
        // Each vCPU makes a long function of its own anew each round, and shares one with the others.
        let shared = FUNCTION;
        m.load(shared, &function(1));
        for i in 0..cpus {
            let own = ONE + 0x2000 * u64::from(i);
            m.load(own, &[[0x83, 0x03, 0x01].repeat(40), function(0).to_vec()].concat());
            m.code(CODE + 0x100 * u64::from(i), |a| {
                let mut again = a.create_label();
                a.mov(rdi, own)?;
                a.mov(rbp, shared)?;
                a.mov(rbx, DATA + 0x1000 * u64::from(i))?;
                a.xor(esi, esi)?;
                a.mov(ecx, 500)?;
                a.set_label(&mut again)?;
                a.mov(dword_ptr(rdi + 121), ecx)?;
                a.call(rdi)?;
                a.add(esi, eax)?;
                a.call(rbp)?;
                a.add(esi, eax)?;
                a.dec(ecx)?;
                a.jnz(again)?;
                a.mov(eax, esi)?;
                done(a)
            });
        }
        let mut guests: Vec<_> = (0..cpus).map(|i| m.vcpu(i, |s| s.regs.rip = CODE + 0x100 * u64::from(i))).collect();
        for stop in run_all(&mut guests) {
            assert_eq!(stop, Stop::Done(500 * 501 / 2 + 500));
        }
        for i in 0..cpus {
            assert_eq!(m.peek::<u32>(DATA + 0x1000 * u64::from(i)), 500 * 40);
        }
    }
}

#[test]
fn registers_survive_a_store_to_code_on_the_same_page() {
    let m = Machine::new(1);
    let (stop, state) = m.run(|a| {
        let mut next = a.create_label();
        a.mov(rax, 0x1111_2222_3333_4444u64)?;
        a.mov(rcx, 0x5555_6666_7777_8888u64)?;
        a.mov(r10, 0x99aa_bbcc_ddee_ff00u64)?;
        a.mov(r11, 0x0123_4567_89ab_cdefu64)?;
        a.mov(r15, 0xfedc_ba98_7654_3210u64)?;
        a.movq(xmm7, rcx)?;
        a.stc()?;
        a.lea(rbx, ptr(next))?;
        a.adc(byte_ptr(rbx + 3), 6)?;
        a.set_label(&mut next)?;
        a.add(rsi, 1)?;
        a.movq(rdi, xmm7)?;
        a.db(&[0xe7, DONE as u8])
    });
    assert_eq!(stop, Stop::Done(0x3333_4444));
    let gpr = &state.regs.gpr;
    assert_eq!(gpr[RCX], 0x5555_6666_7777_8888);
    assert_eq!(gpr[10], 0x99aa_bbcc_ddee_ff00);
    assert_eq!(gpr[11], 0x0123_4567_89ab_cdef);
    assert_eq!(gpr[15], 0xfedc_ba98_7654_3210);
    assert_eq!(gpr[RDI], 0x5555_6666_7777_8888);
    assert_eq!((gpr[RAX], gpr[RSI]), (0x1111_2222_3333_4444, 8));
    assert_ne!(gpr[RBX], 0);
}

/// One page has many functions, of which each is translated when it is called: from the bytes that are there by then.
#[test]
fn of_a_page_that_others_were_translated_from() {
    const FUNCTIONS: u32 = 100;
    for device in [false, true] {
        let m = Machine::new(1);
        for i in 0..FUNCTIONS {
            m.load(FUNCTION + 16 * u64::from(i), &function(0));
        }
        m.code(CODE, |a| {
            let mut again = a.create_label();
            a.mov(rdi, FUNCTION)?;
            a.mov(ecx, FUNCTIONS)?;
            a.xor(ebx, ebx)?;
            a.set_label(&mut again)?;
            // Of the one that comes, which has not been called yet.
            if device {
                a.out(u32::from(DONE), eax)?;
            } else {
                a.mov(dword_ptr(rdi + 1), ecx)?;
            }
            a.call(rdi)?;
            a.add(ebx, eax)?;
            a.add(rdi, 16)?;
            a.dec(ecx)?;
            a.jnz(again)?;
            a.mov(eax, ebx)?;
            a.add(eax, 1 << 20)?;
            done(a)
        });
        let mut guest = m.vcpu(0, |_| {});
        let mut value = FUNCTIONS;
        let sum = loop {
            match guest.run() {
                Stop::Done(sum) if sum >> 20 != 0 => break sum - (1 << 20),
                _ => m.poke(FUNCTION + 16 * u64::from(FUNCTIONS - value) + 1, value),
            }
            value -= 1;
        };
        assert_eq!(sum, FUNCTIONS * (FUNCTIONS + 1) / 2, "device: {device}");
    }
}

/// INVLPG of any part of a large page forgets all of it, though nothing was ever done with it but to fetch from one part.
#[test]
fn another_large_page_in_its_place() {
    const LARGE: u64 = 1 << 7;
    const FAR: u64 = 0x5000;
    let (frames, rounds) = ([0x40_0000u64, 0x60_0000], 10);
    let m = Machine::new(1);
    for (frame, value) in frames.into_iter().zip([1, 2]) {
        m.load(frame + FAR, &function(value));
    }
    // The entry one level up.
    let table = (m.pte(WINDOW) & !0xfff, m.new_table());
    let mut entry = None;
    for at in (PAGES..table.1).step_by(8) {
        if m.peek::<u64>(at) & !0xfff == table.0 {
            entry = Some(at);
        }
    }
    let entry = entry.expect("a directory's entry");
    m.poke(entry, frames[0] | LARGE | pte::P | pte::W);
    let (stop, _) = m.run(|a| {
        let mut again = a.create_label();
        a.mov(rdi, WINDOW + FAR)?;
        a.mov(rsi, WINDOW + 0x12_3000)?;
        a.mov(rbx, entry)?;
        a.xor(ebp, ebp)?;
        a.mov(ecx, rounds)?;
        a.set_label(&mut again)?;
        a.call(rdi)?;
        a.imul_3(ebp, ebp, 3)?;
        a.add(ebp, eax)?;
        a.xor(qword_ptr(rbx), (frames[0] ^ frames[1]) as i32)?;
        a.invlpg(ptr(rsi))?;
        a.dec(ecx)?;
        a.jnz(again)?;
        a.mov(eax, ebp)?;
        done(a)
    });
    let expected = (0..rounds).fold(0u32, |sum, i| sum.wrapping_mul(3).wrapping_add(1 + i % 2));
    assert_eq!(stop, Stop::Done(expected));
}

/// A function takes a flag from its caller only from some time on: the flags that it is passed are right, though nobody had
/// needed them when whoever leads there was translated.
#[test]
fn a_function_that_begins_to_look_at_the_flags_finds_them() {
    const CALLER: u64 = CODE + 0x200;
    // Each sets ZF, and leads to what follows it in one way or another.
    type Way = (&'static str, fn(&mut CodeAssembler, CodeLabel) -> Result<(), IcedError>);
    const WAYS: [Way; 4] = [
        ("a jump behind an access, whose check takes the flags", |a, function| {
            a.cmp(r8, r8)?;
            a.mov(dword_ptr(rdi), ecx)?;
            a.jmp(function)
        }),
        ("a conditional jump over it, behind one", |a, function| {
            a.cmp(r8, r8)?;
            a.mov(dword_ptr(rdi), ecx)?;
            a.jrcxz(function)?;
            a.jmp(function)
        }),
        ("no jump, but a block is only so long", |a, _| {
            a.cmp(r8, r8)?;
            a.mov(dword_ptr(rdi), ecx)?;
            (0..62).try_for_each(|_| a.nop())
        }),
        ("a call whose push is checked with another", |a, function| {
            let mut over = a.create_label();
            a.push(rbx)?;
            a.cmp(r8, r8)?;
            a.call(function)?;
            a.pop(rbx)?;
            a.jmp(over)?;
            a.set_label(&mut over)?;
            a.ret()
        }),
    ];
    for ((way, lead), hot) in WAYS.into_iter().flat_map(|way| [(way, false), (way, true)]) {
        let engine = engine();
        let m = Machine::with_engine(1, if hot { engine.with_hot_code() } else { engine });
        let length = assemble(64, CALLER, |a| {
            let mut function = a.create_label();
            lead(a, function)?;
            a.set_label(&mut function)?;
            a.ret()
        })
        .len() as u64;
        let function = CALLER + length - 1;
        m.code(CALLER, |a| {
            let mut label = a.create_label();
            lead(a, label)?;
            a.set_label(&mut label)?;
            // It kills them all, and takes eight bytes.
            a.xor(eax, eax)?;
            a.ret()
        });
        let (stop, _) = m.run(|a| {
            let mut again = a.create_label();
            let mut end = a.create_label();
            a.mov(edi, DATA as u32)?;
            a.mov(ecx, 5)?;
            a.xor(ebx, ebx)?;
            a.set_label(&mut again)?;
            a.call(CALLER)?;
            a.add(ebx, eax)?;
            a.cmp(ecx, 3)?;
            a.jne(end)?;
            // From here on: setz al; movzx eax, al; ret.
            a.mov(rdx, 0x00c3_c0b6_0fc0_940fu64)?;
            a.mov(rsi, function)?;
            a.mov(qword_ptr(rsi), rdx)?;
            a.set_label(&mut end)?;
            a.dec(ecx)?;
            a.jnz(again)?;
            a.mov(eax, ebx)?;
            done(a)
        });
        assert_eq!(stop, Stop::Done(2), "{way}; hot: {hot}");
    }
}
