//! What emitted code calls without saving the vector registers whole, by the thousand and in the midst of vector code: refills
//! of the TLB and look-ups of jumps. What libc's copies would leave of these registers, on whatever host, is looked at.

use iced_x86::{IcedError, code_asm::*};
use purlin_arch::x86_64::regs::gpr::{RCX, RDI, RDX, RSI};

use crate::machine::*;

type Result = std::result::Result<(), IcedError>;

/// More pages than lists of TLB entries are long.
const PAGES: u64 = 20_000;
const WINDOW: u64 = 0x8000_0000;
/// What the registers hold, and where they are stored.
const BEFORE: u64 = DATA + 0x2_0000;
const AFTER: u64 = BEFORE + 0x1000;
const BYTES: u64 = 32 * 64;
/// Code that loads the registers, and code that stores them.
const LOAD: u64 = CODE + 0x4000;
const STORE: u64 = CODE + 0x5000;
const TEST: u64 = CODE + 0x6000;

/// Runs code at [`TEST`] with values in all vector registers that there are, and expects them to be there still. `None` on a
/// host without AVX.
fn with_vectors(hot: bool, prepare: impl FnOnce(&Machine), run: impl FnOnce(&mut Guest)) {
    if !std::is_x86_feature_detected!("avx") {
        return;
    }
    let wide = std::is_x86_feature_detected!("avx512f");
    let engine = engine();
    let m = Machine::with_engine(1, if hot { engine.with_hot_code() } else { engine });
    (0..BYTES).for_each(|i| m.poke(BEFORE + i, ((i * 37) >> 3) as u8 | 1));
    m.code(LOAD, |a| {
        a.mov(rbx, BEFORE)?;
        all_vectors(wide, |i, at| match i {
            Vector::Wide(z) => a.vmovdqu64(z, zmmword_ptr(rbx + at)),
            Vector::Half(y) => a.vmovdqu(y, ymmword_ptr(rbx + at)),
        })?;
        done(a)
    });
    m.code(STORE, |a| {
        a.mov(rbx, AFTER)?;
        all_vectors(wide, |i, at| match i {
            Vector::Wide(z) => a.vmovdqu64(zmmword_ptr(rbx + at), z),
            Vector::Half(y) => a.vmovdqu(ymmword_ptr(rbx + at), y),
        })?;
        done(a)
    });
    prepare(&m);
    let mut guest = m.vcpu(0, |s| {
        s.regs.rip = LOAD;
        s.xcr0 = if wide { 0xe7 } else { 7 };
    });
    let system = guest.state().system;
    assert!(matches!(guest.run(), Stop::Done(_)));
    guest.change(|s| s.regs.rip = TEST);
    run(&mut guest);
    guest.change(|s| (s.regs.rip, s.system) = (STORE, system));
    assert!(matches!(guest.run(), Stop::Done(_)));
    all_vectors(wide, |vector, at| {
        let size = if matches!(vector, Vector::Wide(_)) { 64 } else { 32 };
        let bytes = |from: u64| (0..size).map(|i| m.peek::<u8>(from + at as u64 + i)).collect::<Vec<_>>();
        assert_eq!(bytes(AFTER), bytes(BEFORE), "vector register {}", at / 64);
        Ok(())
    })
    .unwrap();
}

enum Vector {
    Wide(AsmRegisterZmm),
    Half(AsmRegisterYmm),
}

/// Calls `each` with each register and where it is in memory.
fn all_vectors(wide: bool, mut each: impl FnMut(Vector, i32) -> Result) -> Result {
    const HALVES: [AsmRegisterYmm; 16] =
        [ymm0, ymm1, ymm2, ymm3, ymm4, ymm5, ymm6, ymm7, ymm8, ymm9, ymm10, ymm11, ymm12, ymm13, ymm14, ymm15];
    const WIDE: [AsmRegisterZmm; 32] = [
        zmm0, zmm1, zmm2, zmm3, zmm4, zmm5, zmm6, zmm7, zmm8, zmm9, zmm10, zmm11, zmm12, zmm13, zmm14, zmm15, zmm16,
        zmm17, zmm18, zmm19, zmm20, zmm21, zmm22, zmm23, zmm24, zmm25, zmm26, zmm27, zmm28, zmm29, zmm30, zmm31,
    ];
    if wide {
        return WIDE.into_iter().zip(0..).try_for_each(|(z, i)| each(Vector::Wide(z), 64 * i));
    }
    HALVES.into_iter().zip(0..).try_for_each(|(y, i)| each(Vector::Half(y), 64 * i))
}

/// Many pages on a few frames: what is on them does not matter.
fn many_pages(m: &Machine, bits: u64) {
    (0..PAGES).for_each(|n| m.map(WINDOW + 0x1000 * n, DATA + 0x1000 * (n % 16), bits));
}

/// Stores a vector to a page after the other, and loads from it.
fn touch(a: &mut CodeAssembler, rest: impl FnOnce(&mut CodeAssembler, &mut CodeLabel) -> Result) -> Result {
    let mut page = a.create_label();
    a.set_label(&mut page)?;
    rest(a, &mut page)?;
    a.mov(eax, ecx)?;
    done(a)
}

#[test]
fn vector_registers_outlive_any_number_of_refills() {
    for (hot, bits) in [(false, pte::P | pte::W), (true, pte::P | pte::W), (true, pte::P | pte::W | pte::G)] {
        let prepare = |m: &Machine| {
            many_pages(m, bits);
            m.code(TEST, |a| {
                touch(a, |a, page| {
                    a.vmovdqu(ymmword_ptr(rdi), ymm0)?;
                    a.add(rdi, 0x1000)?;
                    a.dec(rcx)?;
                    a.jnz(*page)
                })
            });
        };
        with_vectors(hot, prepare, |guest| {
            guest.change(|s| (s.regs.gpr[RDI], s.regs.gpr[RCX]) = (WINDOW, PAGES));
            assert_eq!(guest.run(), Stop::Done(0), "hot: {hot}");
        });
    }
}

/// In code that has another way to Rust, too: of 32 bits.
#[test]
fn vector_registers_outlive_any_number_of_accesses_by_way_of_rust() {
    let prepare = |m: &Machine| {
        many_pages(m, pte::P | pte::W);
        m.code_of(32, TEST, TEST, |a| {
            touch(a, |a, page| {
                a.vmovdqu(ymmword_ptr(edi), ymm0)?;
                a.add(edi, 0x1000)?;
                a.dec(ecx)?;
                a.jnz(*page)
            })
        });
    };
    with_vectors(false, prepare, |guest| {
        guest.change(|s| {
            (s.regs.gpr[RDI], s.regs.gpr[RCX]) = (WINDOW, PAGES);
            compatibility(s);
        });
        assert_eq!(guest.run(), Stop::Done(0));
    });
}

/// Functions that take each other's place in the table of jumps.
#[test]
fn vector_registers_outlive_any_number_of_jumps_that_are_looked_up() {
    const ROUNDS: u64 = 50_000;
    // In no order that a sort would leave alone.
    let functions = [0x70, 0x20, 0x50, 0x40].map(|offset| CODE + 0x2_0000 + offset);
    for hot in [false, true] {
        let prepare = |m: &Machine| {
            for function in functions.into_iter().flat_map(|low| [low, low + 0x1_0000]) {
                m.code(function, |a| {
                    a.movq(rax, xmm0)?;
                    a.ret()
                });
            }
            m.code(TEST, |a| {
                touch(a, |a, again| {
                    for function in functions {
                        a.lea(rax, rsi + (function as i64 - functions[0] as i64) as i32)?;
                        a.call(rax)?;
                    }
                    a.xchg(rsi, rdx)?;
                    a.dec(rcx)?;
                    a.jnz(*again)
                })
            });
        };
        with_vectors(hot, prepare, |guest| {
            guest.change(|s| {
                let gpr = &mut s.regs.gpr;
                (gpr[RSI], gpr[RDX], gpr[RCX]) = (functions[0], functions[0] + 0x1_0000, ROUNDS);
            });
            assert_eq!(guest.run(), Stop::Done(0), "hot: {hot}");
        });
    }
}

/// Page-table entries that are code at the same time: what the walk sets in them kills translations, which is not for code that
/// saves half of the registers.
#[test]
fn vector_registers_outlive_walks_that_change_code() {
    const ENTRIES: u64 = 200;
    let (scratch, other) = (DATA + 0x4_0000, DATA + 0x5_0000);
    let prepare = |m: &Machine| {
        // Every other one, with a return (a page, too) behind it: `add eax, [rax]; and [rax], al; add [rax], al; …`.
        for n in 0..ENTRIES {
            m.map(WINDOW + 0x2000 * n, DATA, pte::P | pte::W);
            m.map(WINDOW + 0x2000 * n + 0x1000, 0, 0xc3);
        }
        let entries = m.pte(WINDOW);
        m.code(TEST, |a| {
            let (mut first, mut wrong) = (a.create_label(), a.create_label());
            let with = |a: &mut CodeAssembler, value: u64| {
                a.mov(eax, scratch as u32)?;
                a.mov(dword_ptr(rax), value as i32)?;
                a.call(rsi)
            };
            // All at first, so that there are many that are not hit.
            a.mov(rsi, entries)?;
            a.set_label(&mut first)?;
            with(a, 0)?;
            a.add(rsi, 16)?;
            a.cmp(rsi, (entries + 16 * ENTRIES) as i32)?;
            a.jb(first)?;
            a.mov(rsi, entries)?;
            touch(a, |a, again| {
                a.vmovdqu(ymmword_ptr(rdi), ymm0)?;
                // By now it is `movsxd eax, [rax]; …`.
                with(a, other)?;
                a.cmp(eax, other as i32)?;
                a.jne(wrong)?;
                a.add(rsi, 16)?;
                a.add(rdi, 0x2000)?;
                a.dec(rcx)?;
                a.jnz(*again)?;
                a.set_label(&mut wrong)
            })
        });
    };
    with_vectors(false, prepare, |guest| {
        guest.change(|s| (s.regs.gpr[RDI], s.regs.gpr[RCX]) = (WINDOW, ENTRIES));
        assert_eq!(guest.run(), Stop::Done(0));
    });
}
