//! XSAVE and its like, and XRSTOR, by which kernels switch between threads: whose vectors are where, and what must not be done
//! on the way that is quick.

use iced_x86::{IcedError, code_asm::*};
use purlin_arch::x86_64::{
    regs::{
        cr0, cr4,
        gpr::{RBP, RBX},
    },
    state::VcpuState,
};
use purlin_engine_translator::{
    TranslatorEngine,
    profile::{ExitKind, Profile},
};

use crate::machine::*;

type Result = std::result::Result<(), IcedError>;
type Code = fn(&mut CodeAssembler) -> Result;

const KERNEL: u64 = CODE + 0x1000;
/// Where the second thread begins.
const OTHER: u64 = CODE + 0x800;
/// On a page of its own.
const AREA: u64 = DATA + 0x1000;
/// Two pages that do not follow each other in memory.
const WINDOW: u64 = 0x8000_0000;
const BEHIND: u64 = WINDOW + 0x1000;
/// On both.
const ACROSS: u64 = BEHIND - 0x240;
const ROUNDS: u32 = 2000;

const MXCSR: u64 = 24;
const XMM: u64 = 160;
const XSTATE_BV: u64 = 512;
const YMM: u64 = 576;
const SIZE: u64 = 832;
const INITIAL_MXCSR: u32 = 0x1f80;

/// An engine, and how often its guest's instructions were emulated outside of emitted code.
struct Counted {
    machine: Machine,
    profile: std::sync::Arc<Profile>,
}

impl Counted {
    fn new() -> Self {
        let profile = std::sync::Arc::new(Profile::default());
        let engine = TranslatorEngine::new().unwrap().with_profile(profile.clone());
        let machine = Machine::with_engine(1, engine);
        machine.user_pages(CODE, 0x1000);
        machine.user_pages(DATA, 0x1000);
        machine.map(WINDOW, DATA + 0x4000, pte::P | pte::W);
        machine.map(BEHIND, DATA + 0x2000, pte::P | pte::W);
        Self { machine, profile }
    }

    fn emulated(&self) -> u64 {
        self.profile.report().exits.iter().filter(|(kind, _)| *kind == ExitKind::Emulate).map(|(_, n)| *n).sum()
    }
}

/// User code at [`CODE`]; the area of the thread that runs in RBX, that of the other in RBP, and where it goes on in R13.
fn user(m: &Machine, areas: [u64; 2], change: impl FnOnce(&mut VcpuState)) -> Guest {
    m.vcpu(0, |s| {
        user_mode(s);
        take_syscalls(s, KERNEL);
        s.regs.rflags |= purlin_arch::x86_64::regs::rflags::IOPL;
        (s.regs.gpr[RBX], s.regs.gpr[RBP], s.regs.gpr[13]) = (areas[0], areas[1], OTHER);
        change(s);
    })
}

/// EDX:EAX = `mask`.
fn components(a: &mut CodeAssembler, mask: u32) -> Result {
    a.mov(eax, mask)?;
    a.xor(edx, edx)
}

/// The other thread goes on.
fn switch(a: &mut CodeAssembler, save: Code, between: Code) -> Result {
    components(a, 7)?;
    save(a)?;
    between(a)?;
    a.xchg(rbx, rbp)?;
    a.xchg(rcx, r13)?;
    components(a, 7)?;
    a.xrstor64(ptr(rbx))?;
    a.sysretq()
}

/// Fills an area with rubbish, but for a header that says that all is in its initial state.
fn rubbish(m: &Machine, area: u64) {
    let (first, second) = (DATA + 0x4000 + (area & 0xfff), DATA + 0x2000);
    for at in 0..SIZE {
        let linear = area + at;
        let physical = match linear {
            WINDOW..BEHIND => first + at,
            BEHIND.. => second + (linear - BEHIND),
            _ => linear,
        };
        m.poke(physical, if (XSTATE_BV..YMM).contains(&at) { 0 } else { 0x5au8 });
        if (MXCSR..MXCSR + 4).contains(&at) {
            m.poke(physical, INITIAL_MXCSR.to_le_bytes()[(at - MXCSR) as usize]);
        }
    }
}

/// Two threads, both with vectors and the x87's registers in use. The second one puts them into their initial state before it
/// gives way, and adds what it finds then to what must stay zero.
fn threads(m: &Machine) {
    m.code(CODE, |a| {
        let mut again = a.create_label();
        a.fninit()?;
        a.fld1()?;
        a.fldz()?;
        a.vpcmpeqd(ymm2, ymm2, ymm2)?;
        a.vpxor(ymm15, ymm15, ymm15)?;
        a.mov(r12d, ROUNDS)?;
        a.set_label(&mut again)?;
        a.vpaddd(ymm15, ymm15, ymm2)?;
        a.fadd_2(st0, st1)?;
        a.syscall()?;
        a.dec(r12d)?;
        a.jnz(again)?;
        a.vmovdqu(ymmword_ptr(DATA), ymm15)?;
        a.fistp(dword_ptr(DATA + 32))?;
        done(a)
    });
    m.code(OTHER, |a| {
        let (mut again, mut plain) = (a.create_label(), a.create_label());
        a.set_label(&mut again)?;
        // Initial, or what was there.
        a.vpaddd(ymm15, ymm15, ymmword_ptr(DATA + 64))?;
        a.vmovdqu(ymmword_ptr(DATA + 64), ymm15)?;
        a.fnstenv(ptr(DATA + 96))?;
        a.mov(eax, dword_ptr(DATA + 96 + 8))?;
        a.cmp(ax, -1)?;
        a.setne(al)?;
        a.movzx(eax, al)?;
        a.add(r8, rax)?;
        a.vpcmpeqd(ymm15, ymm15, ymm15)?;
        a.vpcmpeqd(ymm2, ymm2, ymm2)?;
        a.vpslld(ymm2, ymm2, 7)?;
        a.fldpi()?;
        a.inc(r14d)?;
        a.test(r14d, 1)?;
        a.jz(plain)?;
        // Vectors come back as they were.
        a.syscall()?;
        a.vpcmpeqd(ymm3, ymm3, ymm3)?;
        a.vpcmpeqd(ymm3, ymm3, ymm15)?;
        a.vpmovmskb(eax, ymm3)?;
        a.not(eax)?;
        a.add(r8, rax)?;
        a.set_label(&mut plain)?;
        a.vzeroall()?;
        a.fninit()?;
        a.syscall()?;
        a.jmp(again)
    });
}

#[test]
fn threads_keep_their_vectors() {
    let saves: [(&str, Code); 3] = [
        ("xsave", |a| a.xsave64(ptr(rbx))),
        ("xsaveopt", |a| a.xsaveopt64(ptr(rbx))),
        ("xsavec", |a| a.xsavec64(ptr(rbx))),
    ];
    let kernels: [(&str, Code); 2] = [
        ("without vectors", |a| a.nop()),
        ("with vectors", |a| {
            a.fnclex()?;
            a.vpcmpeqd(ymm15, ymm15, ymm15)?;
            a.vpsrld(ymm15, ymm15, 3)?;
            a.fldpi()
        }),
    ];
    for (save, instruction) in saves {
        for (kernel, between) in kernels {
            for areas in [[AREA, AREA + 0x400], [ACROSS, AREA], [AREA, ACROSS]] {
                let name = format!("{save} {kernel} {areas:x?}");
                let counted = Counted::new();
                let m = &counted.machine;
                threads(m);
                areas.into_iter().for_each(|area| rubbish(m, area));
                m.code(KERNEL, |a| switch(a, instruction, between));
                let mut guest = user(m, areas, |_| {});
                let stop = guest.run();
                assert!(matches!(stop, Stop::Done(_)), "{name}: {stop:?}");
                let sums: [u32; 8] = std::array::from_fn(|i| m.peek(DATA + 4 * i as u64));
                assert_eq!(sums, [0u32.wrapping_sub(ROUNDS); 8], "{name}");
                assert_eq!(m.peek::<u32>(DATA + 32), ROUNDS, "{name}");
                let others: [u32; 8] = std::array::from_fn(|i| m.peek(DATA + 64 + 4 * i as u64));
                let gpr = guest.state().regs.gpr;
                assert_eq!((others, gpr[8]), ([0; 8], 0), "{name}");
                assert!(gpr[14] > 100 && gpr[12] == 0, "{name}");
                if kernel == "without vectors" {
                    // FNSTENV is emulated.
                    let emulated = counted.emulated().saturating_sub(u64::from(ROUNDS));
                    assert!(emulated < 200, "{name}: {emulated} were emulated");
                }
            }
        }
    }
}

#[test]
fn a_part_is_loaded_beside_what_is_in_registers() {
    // The user's vectors are in the host's registers; the kernel changes the upper halves alone, or the lower.
    for (mask, expected) in [(4, [1, 7]), (2, [9, 2]), (1, [1, 2]), (6, [9, 7])] {
        let m = Counted::new().machine;
        m.code(CODE, |a| {
            let mut again = a.create_label();
            a.mov(r12d, ROUNDS)?;
            a.set_label(&mut again)?;
            a.vmovdqu(ymm15, ymmword_ptr(DATA))?;
            a.syscall()?;
            a.vmovdqu(ymmword_ptr(DATA + 32), ymm15)?;
            a.dec(r12d)?;
            a.jnz(again)?;
            done(a)
        });
        m.code(KERNEL, |a| {
            components(a, mask)?;
            a.xrstor64(ptr(rbx))?;
            a.sysretq()
        });
        rubbish(&m, AREA);
        for at in [0, 16] {
            m.poke(DATA + at, 1 + at / 16);
            m.poke(DATA + at + 8, 1 + at / 16);
        }
        m.poke(AREA + XSTATE_BV, 6u64);
        for (at, value) in [(XMM, 9u64), (YMM, 7)] {
            (0..2).for_each(|half| m.poke(AREA + at + 240 + 8 * half, value));
        }
        let stop = user(&m, [AREA; 2], |_| {}).run();
        assert!(matches!(stop, Stop::Done(_)), "{mask}: {stop:?}");
        let found = [32, 40, 48, 56].map(|at| m.peek::<u64>(DATA + at));
        assert_eq!(found, [expected[0], expected[0], expected[1], expected[1]], "{mask}");
    }
}

#[test]
fn what_is_not_asked_for_stays_in_memory() {
    // A mask of one component: the others' bits in the header and their bytes are as they were. With XSAVEOPT so are those of
    // one that is in its initial state, but not its bit.
    let rows: [(&str, Code, u32, u64, [u64; 2]); 4] = [
        ("xsave", |a| a.xsave64(ptr(rbx)), 2, 0x8000_0000_0000_0007, [3, OLD]),
        ("xsaveopt", |a| a.xsaveopt64(ptr(rbx)), 2, 0x8000_0000_0000_0007, [3, OLD]),
        ("xsave of nothing", |a| a.xsave64(ptr(rbx)), 0, 0x8000_0000_0000_0007, [OLD, OLD]),
        // AVX's upper halves are zero, which is their initial state.
        ("xsaveopt of both", |a| a.xsaveopt64(ptr(rbx)), 6, 0x8000_0000_0000_0003, [3, OLD]),
    ];
    const OLD: u64 = 0x5a5a_5a5a_5a5a_5a5a;
    for (name, save, mask, header, [low, high]) in rows {
        let m = Counted::new().machine;
        m.code(CODE, |a| {
            let mut again = a.create_label();
            a.vzeroall()?;
            a.mov(r12d, ROUNDS)?;
            a.set_label(&mut again)?;
            a.mov(eax, 3)?;
            a.vmovq(xmm0, rax)?;
            a.syscall()?;
            a.dec(r12d)?;
            a.jnz(again)?;
            done(a)
        });
        m.code(KERNEL, |a| {
            a.mov(r8, 0x8000_0000_0000_0007u64)?;
            a.mov(qword_ptr(rbx + XSTATE_BV as i32), r8)?;
            components(a, mask)?;
            save(a)?;
            a.sysretq()
        });
        rubbish(&m, AREA);
        let stop = user(&m, [AREA; 2], |_| {}).run();
        assert!(matches!(stop, Stop::Done(_)), "{name}: {stop:?}");
        let found = [XSTATE_BV, XMM, YMM, YMM - 8].map(|at| m.peek::<u64>(AREA + at));
        assert_eq!(found, [header, low, high, 0], "{name}");
        assert_eq!(m.peek::<u64>(AREA), OLD, "{name}: x87");
    }
}

/// What the kernel does in the last round, in front of both instructions, which every round before has prepared.
struct Odd {
    name: &'static str,
    change: Code,
    /// Vector, error code, CR2.
    expected: (u8, Option<u32>, Option<u64>),
    /// Which of the two raises it.
    restores: bool,
}

#[test]
fn exceptions_are_those_of_every_other_way() {
    const RSVD: i32 = XSTATE_BV as i32;
    let odd = |name, change: Code, expected, restores| Odd { name, change, expected, restores };
    let gone: Code = |a| {
        a.mov(r8, BEHIND)?;
        a.mov(qword_ptr(r9), 0)?;
        a.invlpg(byte_ptr(r8))
    };
    let read_only: Code = |a| {
        a.mov(r8, BEHIND)?;
        a.and(qword_ptr(r9), !2)?;
        a.invlpg(byte_ptr(r8))
    };
    let rows = [
        odd("misaligned", |a| a.add(rbx, 16), (13, Some(0), None), false),
        odd("misaligned, restored", |a| a.add(rbx, 32), (13, Some(0), None), true),
        odd("second page", gone, (14, Some(2), Some(BEHIND)), false),
        odd("second page, restored", gone, (14, Some(0), Some(BEHIND)), true),
        odd("read only", read_only, (14, Some(3), Some(BEHIND)), false),
        odd("component", |a| a.or(byte_ptr(rbx + RSVD + 1), 1), (13, Some(0), None), true),
        odd("format", |a| a.or(byte_ptr(rbx + RSVD + 16), 1), (13, Some(0), None), true),
        odd("mxcsr", |a| a.mov(byte_ptr(rbx + 27), 1), (13, Some(0), None), true),
        odd("not canonical", |a| a.btc(rbx, 63), (13, Some(0), None), false),
        odd("ts", |a| set_cr0(a, cr0::TS), (7, None, None), false),
        odd("ts, restored", |a| set_cr0(a, cr0::TS), (7, None, None), true),
        odd("osxsave", clear_osxsave, (6, None, None), false),
        odd("osxsave, restored", clear_osxsave, (6, None, None), true),
    ];
    for Odd { name, change, expected, restores } in rows {
        let m = Counted::new().machine;
        m.code(CODE, |a| {
            let mut again = a.create_label();
            a.mov(r12d, ROUNDS)?;
            a.set_label(&mut again)?;
            a.vpcmpeqd(ymm15, ymm15, ymm15)?;
            a.syscall()?;
            a.dec(r12d)?;
            a.jnz(again)?;
            done(a)
        });
        m.code(KERNEL, |a| {
            let mut plain = a.create_label();
            components(a, 7)?;
            if restores {
                a.xsave64(ptr(rbx))?;
            }
            a.cmp(r12d, 1)?;
            a.jne(plain)?;
            change(a)?;
            a.set_label(&mut plain)?;
            components(a, 7)?;
            match restores {
                true => a.xrstor64(ptr(rbx))?,
                false => a.xsaveopt64(ptr(rbx))?,
            }
            a.sysretq()
        });
        rubbish(&m, ACROSS);
        let entry = m.pte(BEHIND);
        let mut guest = user(&m, [ACROSS; 2], |s| s.regs.gpr[9] = entry);
        let stop = guest.run();
        let Stop::Vector(vector, frame) = stop else { panic!("{name}: {stop:?}") };
        assert_eq!((vector, frame.error), (expected.0, expected.1), "{name}");
        assert_eq!(frame.cs as u16, selector::CODE64, "{name}");
        let state = guest.state();
        if let Some(address) = expected.2 {
            assert_eq!(state.system.cr2, address, "{name}");
        }
        assert_eq!(state.regs.gpr[12], 1, "{name}: the last round");
        // The fault is the instruction's, and nothing was loaded.
        let bytes: [u8; 4] = std::array::from_fn(|i| m.peek(frame.rip + i as u64));
        assert_eq!(bytes, if restores { [0x48, 0x0f, 0xae, 0x2b] } else { [0x48, 0x0f, 0xae, 0x33] }, "{name}");
        assert_eq!(state.xsave[160 + 240..160 + 256], [0xff; 16], "{name}: XMM15");
        assert_eq!(state.xsave[576 + 240..576 + 256], [0xff; 16], "{name}: its upper half");
    }
}

fn set_cr0(a: &mut CodeAssembler, bits: u64) -> Result {
    a.mov(r8, cr0)?;
    a.or(r8, bits as i32)?;
    a.mov(cr0, r8)
}

fn clear_osxsave(a: &mut CodeAssembler) -> Result {
    a.mov(r8, cr4)?;
    a.and(r8, !(cr4::OSXSAVE as i32))?;
    a.mov(cr4, r8)
}

#[test]
fn code_that_xsave_writes() {
    // XMM0 has the bytes of `mov eax, COUNT; ret`, and is saved to where they are executed, once in a while with other
    // components beside.
    for mask in [2, 7] {
        let m = Counted::new().machine;
        let code = CODE + 0x400;
        m.code(CODE, |a| {
            let mut again = a.create_label();
            a.mov(r12d, ROUNDS)?;
            a.set_label(&mut again)?;
            a.mov(eax, r12d)?;
            a.shl(rax, 8)?;
            // (The byte behind the constant is RET.)
            a.mov(rdi, 0xb8u64 | 0xc3 << 40)?;
            a.or(rax, rdi)?;
            a.vmovq(xmm0, rax)?;
            a.syscall()?;
            a.mov(rdi, code + XMM)?;
            a.call(rdi)?;
            a.sub(eax, r12d)?;
            a.or(r14d, eax)?;
            a.dec(r12d)?;
            a.jnz(again)?;
            done(a)
        });
        m.code(KERNEL, |a| {
            components(a, mask)?;
            a.xsave64(ptr(rbx))?;
            a.sysretq()
        });
        rubbish(&m, code);
        m.user_pages(STACK - 0x1000, 0x1000);
        let mut guest = user(&m, [code; 2], |_| {});
        let stop = guest.run();
        assert!(matches!(stop, Stop::Done(_)), "{mask}: {stop:?}");
        assert_eq!(guest.state().regs.gpr[14], 0, "{mask}: old code was executed");
    }
}

#[test]
fn an_area_that_is_not_memory() {
    const DEVICE: u64 = 0xd000_0000;
    let m = Counted::new().machine;
    m.map(WINDOW, DEVICE, pte::P | pte::W);
    m.code(CODE, |a| {
        let mut again = a.create_label();
        a.mov(r12d, 20)?;
        a.set_label(&mut again)?;
        a.vpcmpeqd(ymm15, ymm15, ymm15)?;
        a.syscall()?;
        a.dec(r12d)?;
        a.jnz(again)?;
        a.vmovdqu(ymmword_ptr(DATA), ymm15)?;
        done(a)
    });
    m.code(KERNEL, |a| {
        components(a, 6)?;
        a.xsave64(ptr(rbx))?;
        a.xrstor64(ptr(rbx))?;
        a.sysretq()
    });
    {
        let mut mmio = lock(&m.bus.mmio);
        mmio.extend((0..SIZE).map(|at| (DEVICE + at, 0)));
        mmio.extend((MXCSR..).zip(INITIAL_MXCSR.to_le_bytes()).map(|(at, byte)| (DEVICE + at, byte)));
        mmio.insert(DEVICE + XSTATE_BV, 6);
        mmio.extend((0..16).flat_map(|i| [(DEVICE + XMM + 240 + i, 0x11), (DEVICE + YMM + 240 + i, 0x22)]));
    }
    let stop = user(&m, [WINDOW; 2], |_| {}).run();
    assert!(matches!(stop, Stop::Done(_)), "{stop:?}");
    let stored =
        lock(&m.bus.writes).iter().filter(|(at, bytes)| *at == DEVICE + XMM + 240 && *bytes == [0xff; 8]).count();
    assert_eq!(stored, 20);
    let found: [u8; 32] = std::array::from_fn(|i| m.peek(DATA + i as u64));
    assert_eq!(found, std::array::from_fn(|i| if i < 16 { 0x11 } else { 0x22 }));
}
