//! Exceptions in emitted code: the state that a handler sees is the one before the instruction, flags included, and
//! the instruction works when it is started again.

use iced_x86::{Decoder, DecoderOptions, IcedError, code_asm::*};
use purlin_arch::x86_64::{
    regs::{
        cr0, cr4,
        gpr::{RAX, RBX, RCX, RDI, RDX, RSI, RSP},
        rflags,
    },
    state::VcpuState,
};

use crate::machine::*;

/// Linear addresses of two pages, frames at [`DATA`]; the second may be missing.
const WINDOW: u64 = 0x8000_0000;
const SECOND: u64 = WINDOW + 0x1000;
/// What `cmp eax, ecx` makes of 1 and 2, with IOPL 3.
const FLAGS: u64 = rflags::FIXED | rflags::CF | rflags::PF | rflags::AF | rflags::SF | rflags::IOPL;
/// Where jumps and calls lead when they can.
const ELSEWHERE: u64 = CODE + 0x800;

type Code = fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// An instruction with one operand that may be missing.
struct Case {
    name: &'static str,
    size: u64,
    write: bool,
    code: Code,
    /// Points the operand at an address.
    point: fn(&mut VcpuState, u64),
}

fn at_rbx(s: &mut VcpuState, address: u64) {
    s.regs.gpr[RBX] = address;
}
fn at_rsp(s: &mut VcpuState, address: u64) {
    s.regs.gpr[RSP] = address;
}
fn below_rsp(s: &mut VcpuState, address: u64) {
    s.regs.gpr[RSP] = address + 8;
}
fn at_rsi(s: &mut VcpuState, address: u64) {
    s.regs.gpr[RSI] = address;
}
fn at_rdi(s: &mut VcpuState, address: u64) {
    s.regs.gpr[RDI] = address;
}
fn at_rbp(s: &mut VcpuState, address: u64) {
    s.regs.gpr[5] = address;
}

fn load(name: &'static str, size: u64, code: Code) -> Case {
    Case { name, size, write: false, code, point: at_rbx }
}

fn store(name: &'static str, size: u64, code: Code) -> Case {
    Case { name, size, write: true, code, point: at_rbx }
}

fn cases() -> Vec<Case> {
    let stack = |name, write, code: Code, point| Case { name, size: 8, write, code, point };
    vec![
        load("mov r8", 1, |a| a.mov(dl, byte_ptr(rbx))),
        load("mov r16", 2, |a| a.mov(dx, word_ptr(rbx))),
        load("mov r64", 8, |a| a.mov(rdx, qword_ptr(rbx))),
        load("mov rsp", 8, |a| a.mov(rsp, qword_ptr(rbx))),
        load("mov r10", 8, |a| a.mov(r10, qword_ptr(rbx))),
        load("mov rbx", 8, |a| a.mov(rbx, qword_ptr(rbx))),
        load("mov with index", 4, |a| a.mov(edx, dword_ptr(rbx + r11 * 4))),
        load("movzx", 2, |a| a.movzx(edx, word_ptr(rbx))),
        load("movsxd", 4, |a| a.movsxd(rdx, dword_ptr(rbx))),
        load("add r, m", 8, |a| a.add(rdx, qword_ptr(rbx))),
        load("adc r, m", 8, |a| a.adc(rdx, qword_ptr(rbx))),
        load("cmp m, r", 4, |a| a.cmp(dword_ptr(rbx), edx)),
        load("test m, imm", 4, |a| a.test(dword_ptr(rbx), 1)),
        load("imul", 8, |a| a.imul_2(rdx, qword_ptr(rbx))),
        load("mul", 8, |a| a.mul(qword_ptr(rbx))),
        load("bt m, r", 8, |a| a.bt(qword_ptr(rbx), rax)),
        load("cmov", 8, |a| a.cmovz(rdx, qword_ptr(rbx))),
        load("popcnt", 8, |a| a.popcnt(rdx, qword_ptr(rbx))),
        load("movbe", 8, |a| a.movbe(rdx, qword_ptr(rbx))),
        load("movups", 16, |a| a.movups(xmm1, xmmword_ptr(rbx))),
        load("movsd", 8, |a| a.movsd_2(xmm1, qword_ptr(rbx))),
        load("vmovdqu", 32, |a| a.vmovdqu(ymm1, ymmword_ptr(rbx))),
        load("vaddps", 32, |a| a.vaddps(ymm1, ymm2, ymmword_ptr(rbx))),
        load("fld m80", 10, |a| a.fld(tbyte_ptr(rbx))),
        load("fild", 4, |a| a.fild(dword_ptr(rbx))),
        load("ldmxcsr", 4, |a| a.ldmxcsr(dword_ptr(rbx))),
        Case { point: |s, address| s.regs.gpr[RBX] = address - 1, ..load("xlat", 1, |a| a.xlatb()) },
        load("jmp m", 8, |a| a.jmp(qword_ptr(rbx))),
        load("call m", 8, |a| a.call(qword_ptr(rbx))),
        load("push m, its source", 8, |a| a.push(qword_ptr(rbx))),
        store("mov m, r8", 1, |a| a.mov(byte_ptr(rbx), dl)),
        store("mov m, r16", 2, |a| a.mov(word_ptr(rbx), dx)),
        store("mov m, r64", 8, |a| a.mov(qword_ptr(rbx), rdx)),
        store("mov m, imm", 8, |a| a.mov(qword_ptr(rbx), 1)),
        store("add m, r", 8, |a| a.add(qword_ptr(rbx), rdx)),
        store("adc m, imm", 4, |a| a.adc(dword_ptr(rbx), 1)),
        store("lock add", 8, |a| a.lock().add(qword_ptr(rbx), rdx)),
        store("inc", 8, |a| a.inc(qword_ptr(rbx))),
        store("neg", 2, |a| a.neg(word_ptr(rbx))),
        store("not", 8, |a| a.not(qword_ptr(rbx))),
        store("shl", 4, |a| a.shl(dword_ptr(rbx), 3)),
        store("rcl", 4, |a| a.rcl(dword_ptr(rbx), cl)),
        store("shld", 8, |a| a.shld(qword_ptr(rbx), rdx, 4)),
        store("xchg", 8, |a| a.xchg(qword_ptr(rbx), rdx)),
        store("xadd", 8, |a| a.lock().xadd(qword_ptr(rbx), rdx)),
        store("cmpxchg", 8, |a| a.lock().cmpxchg(qword_ptr(rbx), rdx)),
        store("cmpxchg8b", 8, |a| a.cmpxchg8b(qword_ptr(rbx))),
        store("bts", 8, |a| a.bts(qword_ptr(rbx), rax)),
        store("setcc", 1, |a| a.setb(byte_ptr(rbx))),
        store("movups to", 16, |a| a.movups(xmmword_ptr(rbx), xmm1)),
        store("vmovdqu to", 32, |a| a.vmovdqu(ymmword_ptr(rbx), ymm1)),
        store("movnti", 8, |a| a.movnti(qword_ptr(rbx), rdx)),
        store("fnstcw", 2, |a| a.fnstcw(word_ptr(rbx))),
        store("stmxcsr", 4, |a| a.stmxcsr(dword_ptr(rbx))),
        store("pop m, its target", 8, |a| a.pop(qword_ptr(rbx))),
        store("sgdt", 10, |a| a.sgdt(tbyte_ptr(rbx))),
        stack("push r", true, |a| a.push(rdx), below_rsp),
        stack("push rsp", true, |a| a.push(rsp), below_rsp),
        stack("push imm", true, |a| a.push(0x1234), below_rsp),
        stack("push m, the stack", true, |a| a.push(qword_ptr(rbp)), below_rsp),
        stack("pushfq", true, |a| a.pushfq(), below_rsp),
        stack("push fs", true, |a| a.push(fs), below_rsp),
        stack("call", true, |a| a.call(ELSEWHERE), below_rsp),
        stack("call r", true, |a| a.call(r9), below_rsp),
        stack("call m, the stack", true, |a| a.call(qword_ptr(rbp)), below_rsp),
        stack("enter", true, |a| a.enter(0, 0), below_rsp),
        stack("pop r", false, |a| a.pop(rdx), at_rsp),
        stack("pop rsp", false, |a| a.pop(rsp), at_rsp),
        stack("pop m, the stack", false, |a| a.pop(qword_ptr(rbp)), at_rsp),
        stack("ret", false, |a| a.ret(), at_rsp),
        stack("ret imm", false, |a| a.ret_1(16), at_rsp),
        stack("leave", false, |a| a.leave(), at_rbp),
        stack("lods", false, |a| a.lodsq(), at_rsi),
        stack("movs, source", false, |a| a.movsq(), at_rsi),
        stack("movs, target", true, |a| a.movsq(), at_rdi),
        stack("rep movs, source", false, |a| a.rep().movsq(), at_rsi),
        stack("rep movs, target", true, |a| a.rep().movsq(), at_rdi),
        stack("stos", true, |a| a.stosq(), at_rdi),
        stack("rep stos", true, |a| a.rep().stosq(), at_rdi),
        stack("cmps", false, |a| a.cmpsq(), at_rsi),
        stack("repne scas", false, |a| a.repne().scasq(), at_rdi),
    ]
}

/// What comes around the instruction in its block.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Around {
    /// Nobody needs its flags, nor those before it.
    FlagsDie,
    /// The flags are needed.
    FlagsLive,
    /// It is alone, with TF set.
    Stepped,
}

/// Whether an instruction leaves all flags as they are.
fn keeps_flags(code: Code) -> bool {
    let bytes = assemble(64, CODE, code);
    Decoder::new(64, &bytes, DecoderOptions::NONE).decode().rflags_modified() == 0
}

fn load_state(s: &mut VcpuState, around: Around) {
    user_mode(s);
    let gpr = &mut s.regs.gpr;
    for (i, register) in gpr.iter_mut().enumerate() {
        *register = 0x0101_0101_0101_0101 * (i as u64 + 0x10);
    }
    (gpr[RAX], gpr[RCX], gpr[RDX]) = (1, 2, 3);
    gpr[RSP] = STACK - 0x100;
    (gpr[RSI], gpr[RDI], gpr[5]) = (DATA + 0x8000, DATA + 0x9000, DATA + 0xa000);
    (gpr[9], gpr[11]) = (ELSEWHERE, 0);
    s.regs.rflags = rflags::FIXED | rflags::IOPL | rflags::ZF | rflags::OF;
    if around == Around::Stepped {
        s.regs.rflags |= rflags::TF;
    }
    s.system.cr4 |= cr4::FSGSBASE;
}

#[test]
fn page_faults_come_before_anything_has_changed() {
    let m = Machine::new(1);
    m.user_pages(CODE, 0x1000);
    m.user_pages(DATA, 0x10_000);
    m.user_pages(STACK - 0x1000, 0x2000);
    let user = pte::P | pte::W | pte::U;
    m.map(WINDOW, DATA, user);
    let mut guest = m.vcpu(0, |_| {});
    let start = guest.state();
    m.code(ELSEWHERE, done);
    for case in cases() {
        for around in [Around::FlagsDie, Around::FlagsLive, Around::Stepped] {
            // On the page that is missing, or half on it.
            for address in [SECOND + 0x100, SECOND - case.size / 2] {
                if case.size == 1 && address < SECOND {
                    continue;
                }
                let what = format!("{} at {address:#x}, {around:?}", case.name);
                let frame_address = DATA + (address - WINDOW);
                let end = m.code(CODE, |a| {
                    if around != Around::Stepped {
                        a.cmp(eax, ecx)?;
                    }
                    (case.code)(a)?;
                    if around == Around::FlagsDie {
                        a.test(rbp, rbp)?;
                    } else {
                        a.setc(r8b)?;
                    }
                    done(a)
                });
                assert!(end < ELSEWHERE);
                let rip = if around == Around::Stepped { CODE } else { CODE + 2 };
                let mut state = start.clone();
                load_state(&mut state, around);
                (case.point)(&mut state, address);
                state.regs.rip = CODE;
                // What is loaded is a place to jump to.
                for at in [frame_address, DATA + 0xa000] {
                    m.poke(at, ELSEWHERE);
                }
                for (mapped, second) in [(false, 0), (false, pte::P | pte::W), (true, user)] {
                    m.map(SECOND, DATA + 0x1000, second);
                    guest.vcpu.restore(&state).unwrap();
                    let stop = guest.run();
                    if mapped {
                        let stepped = matches!(stop, Stop::Vector(1, _)) && around == Around::Stepped;
                        // LDMXCSR's operand is an address here: that sets bits that may be reserved.
                        let reserved = case.name == "ldmxcsr" && stop.vector().0 == 13;
                        assert!(matches!(stop, Stop::Done(_)) || stepped || reserved, "{what}: {stop:?}");
                        continue;
                    }
                    let error = 4 | u32::from(case.write) << 1 | u32::from(second != 0);
                    let Stop::Vector(vector, frame) = stop else { panic!("{what}: {stop:?}") };
                    assert_eq!((vector, frame.error, frame.rip), (14, Some(error), rip), "{what}");
                    let seen = guest.state();
                    assert_eq!(seen.system.cr2, address.max(SECOND), "{what}");
                    let before = if around == Around::Stepped { state.regs.rflags } else { FLAGS };
                    let expected = before | rflags::RF;
                    // Flags that the code cannot read any more are not kept.
                    let kept = around == Around::Stepped || around == Around::FlagsLive && keeps_flags(case.code);
                    let dead = if kept { 0 } else { rflags::STATUS };
                    assert_eq!(frame.rflags | dead, expected | dead, "{what}: flags");
                    let mut gpr = seen.regs.gpr.clone();
                    gpr[RSP] = frame.rsp;
                    assert_eq!(gpr, state.regs.gpr, "{what}");
                }
            }
        }
    }
}

#[test]
fn vectors_are_kept_by_what_faults() {
    let m = Machine::new(1);
    let mut guest = m.vcpu(0, |s| s.regs.gpr[RBX] = SECOND);
    m.code(CODE, |a| {
        a.pcmpeqd(xmm1, xmm1)?;
        a.vpcmpeqd(ymm2, ymm2, ymm2)?;
        a.fld1()?;
        a.vpaddd(ymm2, ymm2, ymmword_ptr(rbx))?;
        done(a)
    });
    assert_eq!(guest.run().vector().0, 14);
    let area = guest.state().xsave;
    assert_eq!(area[160 + 16..160 + 32], [0xff; 16], "XMM1");
    assert_eq!(area[160 + 32..160 + 48], [0xff; 16], "XMM2");
    assert_eq!(area[576 + 32..576 + 48], [0xff; 16], "YMM2's upper half");
    assert_eq!(area[32..42], [0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x3f], "ST0");
}

#[test]
fn a_repeated_instruction_stops_where_it_faults() {
    for (name, code, bytes) in [
        ("rep stosb", (|a: &mut CodeAssembler| a.rep().stosb()) as Code, 1u64),
        ("rep stosq", |a| a.rep().stosq(), 8),
        ("rep movsd", |a| a.rep().movsd(), 4),
    ] {
        let m = Machine::new(1);
        m.map(WINDOW, DATA, pte::P | pte::W);
        m.code(CODE, |a| {
            a.cmp(eax, ecx)?;
            code(a)?;
            done(a)
        });
        let mut guest = m.vcpu(0, |s| {
            let gpr = &mut s.regs.gpr;
            (gpr[RAX], gpr[RCX]) = (1, 0x1000);
            (gpr[RDI], gpr[RSI]) = (SECOND - 0x100, DATA + 0x8000);
        });
        let stop = guest.run();
        assert_eq!(stop.vector(), (14, Some(2), CODE + 2), "{name}");
        let state = guest.state();
        let gpr = &state.regs.gpr;
        let left = 0x1000 - 0x100 / bytes;
        assert_eq!((gpr[RCX], gpr[RDI], state.system.cr2), (left, SECOND, SECOND), "{name}");
        if name == "rep movsd" {
            assert_eq!(gpr[RSI], DATA + 0x8100);
        }
        let Stop::Vector(_, frame) = stop else { unreachable!() };
        // It goes on.
        m.map(SECOND, DATA + 0x1000, pte::P | pte::W);
        m.map(SECOND + 0x1000, DATA + 0x2000, pte::P | pte::W);
        for i in 2..10 {
            m.map(WINDOW + 0x1000 * i, DATA + 0x1000 * i, pte::P | pte::W);
        }
        guest.resume(&frame, frame.rip);
        assert_eq!(guest.run(), Stop::Done(1), "{name}");
        assert_eq!(guest.state().regs.gpr[RDI], SECOND + left * bytes, "{name}");
    }
}

#[test]
fn arithmetic_faults() {
    type Row = (&'static str, u8, Option<u32>, Code);
    let rows: [Row; 16] = [
        ("div by zero", 0, None, |a| a.div(r12)),
        ("div overflow", 0, None, |a| a.div(ecx)),
        ("idiv m", 0, None, |a| a.idiv(dword_ptr(rsi))),
        ("ud2", 6, None, |a| a.ud2()),
        ("ud1", 6, None, |a| a.db(&[0x0f, 0xb9, 0xc0])),
        ("lock mov", 6, None, |a| a.db(&[0xf0, 0x89, 0x03])),
        ("lock add r", 6, None, |a| a.db(&[0xf0, 0x01, 0xc3])),
        ("mov cs", 6, None, |a| a.db(&[0x8e, 0xc8])),
        ("movaps", 13, Some(0), |a| a.movaps(xmm1, xmmword_ptr(rsi + 1))),
        ("movaps to", 13, Some(0), |a| a.movaps(xmmword_ptr(rsi + 8), xmm1)),
        ("addps", 13, Some(0), |a| a.addps(xmm1, xmmword_ptr(rsi + 4))),
        ("vmovaps", 13, Some(0), |a| a.vmovaps(ymm1, ymmword_ptr(rsi + 16))),
        ("cmpxchg16b", 13, Some(0), |a| a.cmpxchg16b(xmmword_ptr(rsi + 8))),
        ("not canonical", 13, Some(0), |a| a.mov(rdx, qword_ptr(r13))),
        ("not canonical, stack", 12, Some(0), |a| a.mov(rdx, qword_ptr(rsp + r13))),
        ("hlt", 13, Some(0), |a| a.hlt()),
    ];
    let m = Machine::new(1);
    m.user_pages(CODE, 0x1000);
    m.user_pages(DATA, 0x1000);
    m.user_pages(STACK - 0x1000, 0x1000);
    let mut guest = m.vcpu(0, |_| {});
    let start = guest.state();
    for (name, vector, error, code) in rows {
        m.code(CODE, |a| {
            a.cmp(eax, ecx)?;
            code(a)?;
            a.setc(dl)?;
            done(a)
        });
        let mut state = start.clone();
        load_state(&mut state, Around::FlagsDie);
        (state.regs.gpr[12], state.regs.gpr[RDX], state.regs.gpr[RSI]) = (0, 0x1_0000, DATA);
        state.regs.gpr[13] = 0x8000_0000_0000;
        guest.vcpu.restore(&state).unwrap();
        let stop = guest.run();
        let Stop::Vector(v, frame) = stop else { panic!("{name}: {stop:?}") };
        assert_eq!((v, frame.error), (vector, error), "{name}");
        assert_eq!(frame.rip, CODE + 2, "{name}");
        // Flags that the code cannot read any more are not kept: IDIV leaves all of them undefined.
        let dead = if name == "idiv m" { rflags::STATUS } else { 0 };
        assert_eq!(frame.rflags | dead, FLAGS | rflags::RF | dead, "{name}");
        let mut gpr = guest.state().regs.gpr;
        gpr[RSP] = frame.rsp;
        assert_eq!(gpr, state.regs.gpr, "{name}");
    }
}

#[test]
fn floating_point_exceptions() {
    // #XM by an unmasked division by zero; #UD without CR4.OSXMMEXCPT; #MF at the next waiting x87 instruction.
    for (exceptions, vector) in [(true, 19), (false, 6)] {
        let m = Machine::new(1);
        m.poke(DATA, 0x1f80u32 & !(1 << 9));
        m.code(CODE, |a| {
            a.ldmxcsr(dword_ptr(rbx))?;
            a.mov(eax, 0x3f80_0000u32)?;
            a.movd(xmm1, eax)?;
            a.pxor(xmm2, xmm2)?;
            a.cmp(eax, ecx)?;
            a.divss(xmm1, xmm2)?;
            done(a)
        });
        let mut guest = m.vcpu(0, |s| {
            s.regs.gpr[RBX] = DATA;
            if !exceptions {
                s.system.cr4 &= !cr4::OSXMMEXCPT;
            }
        });
        let (v, _, rip) = guest.run().vector();
        assert_eq!((v, m.peek::<u16>(rip)), (vector, 0x0ff3), "at the DIVSS");
        let area = guest.state().xsave;
        assert_eq!(area[160 + 16..160 + 20], 0x3f80_0000u32.to_le_bytes(), "XMM1 is as it was");
    }
    let m = Machine::new(1);
    m.poke(DATA, 0x037bu16); // zero-divide unmasked
    let (stop, state) = m.run(|a| {
        a.fninit()?;
        a.mov(rbx, DATA)?;
        a.fldcw(word_ptr(rbx))?;
        a.fld1()?;
        a.fldz()?;
        a.fdivp(st1, st0)?;
        a.inc(ecx)?;
        a.fnstsw(word_ptr(rbx + 8))?;
        a.fld1()?;
        done(a)
    });
    let (v, _, rip) = stop.vector();
    assert_eq!((v, m.peek::<u16>(rip)), (16, 0xe8d9), "at the second FLD1");
    assert_eq!(state.regs.gpr[RCX], 1);
    assert_eq!(m.peek::<u16>(DATA + 8) & 0x84, 0x84, "ZE and ES");
}

#[test]
fn accessed_and_dirty_flags() {
    let m = Machine::new(1);
    m.map(WINDOW, DATA, pte::P | pte::W);
    let flags = |m: &Machine| m.peek::<u64>(m.pte(WINDOW)) & (pte::A | pte::D);
    let entry = m.pte(WINDOW);
    m.code(CODE, |a| {
        a.mov(rbx, WINDOW)?;
        a.mov(rsi, entry)?;
        a.mov(rdx, qword_ptr(rbx))?;
        a.mov(r8, qword_ptr(rsi))?;
        a.mov(rdx, qword_ptr(rbx + 8))?;
        a.mov(qword_ptr(rbx), rdx)?;
        a.mov(r9, qword_ptr(rsi))?;
        // Cleared without INVLPG they may stay; with it the next access sets them again.
        a.and(qword_ptr(rsi), !0x60)?;
        a.invlpg(ptr(rbx))?;
        a.cmp(byte_ptr(rbx), 0)?;
        a.mov(r12, qword_ptr(rsi))?;
        a.lock().add(dword_ptr(rbx), 0)?;
        a.mov(r13, qword_ptr(rsi))?;
        done(a)
    });
    let mut guest = m.vcpu(0, |_| {});
    assert!(matches!(guest.run(), Stop::Done(_)));
    let state = guest.state();
    let seen = [8, 9, 12, 13].map(|r| state.regs.gpr[r] & (pte::A | pte::D));
    assert_eq!(seen, [pte::A, pte::A | pte::D, pte::A, pte::A | pte::D]);
    assert_eq!(flags(&m), pte::A | pte::D);
}

#[test]
fn a_comparison_that_fails_still_makes_a_page_dirty() {
    // A locked CMPXCHG always writes (SDM vol. 2A, CMPXCHG).
    let m = Machine::new(1);
    m.map(WINDOW, DATA, pte::P | pte::W);
    let (stop, _) = m.run(|a| {
        a.mov(rbx, WINDOW)?;
        a.mov(eax, 5)?;
        a.lock().cmpxchg(dword_ptr(rbx), ecx)?;
        done(a)
    });
    assert_eq!(stop, Stop::Done(0));
    assert_eq!(m.peek::<u64>(m.pte(WINDOW)) & pte::D, pte::D);
}

/// Permissions of a page, what the access is, and the error code (SDM vol. 3A 4.6, 4.7).
#[test]
fn permissions_with_the_tlb_warm_and_cold() {
    const READ: u32 = 0;
    const WRITE: u32 = 2;
    const FETCH: u32 = 0x10;
    let (p, w, u, nx) = (pte::P, pte::W, pte::U, pte::NX);
    type Row = (u64, bool, [bool; 4], u32, Option<u32>);
    // Bits of the page; user code; WP, SMEP, SMAP, AC; access; error code or none.
    #[rustfmt::skip]
    let rows: [Row; 20] = [
        (p | u,      true,  [true, false, false, false],  READ,  None),
        (p | u,      true,  [true, false, false, false],  WRITE, Some(7)),
        (p | w,      true,  [true, false, false, false],  READ,  Some(5)),
        (p | w,      true,  [true, false, false, false],  WRITE, Some(7)),
        (p | w,      true,  [true, false, false, false],  FETCH, Some(0x15)),
        (p | u | nx, true,  [true, false, false, false],  FETCH, Some(0x15)),
        (p | u,      true,  [true, true, true, false],    FETCH, None),
        (0,          true,  [true, false, false, false],  FETCH, Some(0x14)),
        (p,          false, [true, false, false, false],  WRITE, Some(3)),
        (p,          false, [false, false, false, false], WRITE, None),
        (p | u,      false, [true, false, false, false],  WRITE, Some(3)),
        (p | u,      false, [false, false, false, false], WRITE, None),
        (p | u,      false, [true, true, false, false],   FETCH, Some(0x11)),
        (p | u,      false, [true, false, false, false],  FETCH, None),
        (p | u | w,  false, [true, false, true, false],   READ,  Some(1)),
        (p | u | w,  false, [true, false, true, false],   WRITE, Some(3)),
        (p | u | w,  false, [true, false, true, true],    READ,  None),
        (p | u | w,  false, [true, false, true, true],    WRITE, None),
        (p | nx,     false, [true, false, false, false],  FETCH, Some(0x11)),
        (p,          false, [true, true, true, false],    FETCH, None),
    ];
    let m = Machine::new(1);
    m.user_pages(CODE, 0x1000);
    m.user_pages(STACK - 0x1000, 0x1000);
    m.poke(DATA, 0xc3u8);
    let mut guest = m.vcpu(0, |_| {});
    let start = guest.state();
    for (i, (bits, user, [wp, smep, smap, ac], access, error)) in rows.into_iter().enumerate() {
        // For supervisor code the code's own page must not be a user's where SMEP is on.
        m.map(CODE, CODE, if user { p | w | u } else { p | w });
        m.map(STACK - 0x1000, STACK - 0x1000, if user { p | w | u } else { p | w });
        m.code(CODE, |a| {
            a.mov(rbx, WINDOW)?;
            match access {
                READ => a.mov(dl, byte_ptr(rbx))?,
                WRITE => a.mov(byte_ptr(rbx), 0xc3u32 as i32)?,
                _ => a.call(rbx)?,
            }
            a.dec(ecx)?;
            a.jnz(CODE)?;
            done(a)
        });
        let mut state = start.clone();
        if user {
            user_mode(&mut state);
        }
        state.regs.rflags = rflags::FIXED | rflags::IOPL | if ac { rflags::AC } else { 0 };
        state.regs.gpr[RCX] = 3;
        let set = |on, bit| if on { bit } else { 0 };
        state.system.cr0 = state.system.cr0 & !cr0::WP & !cr0::AM | set(wp, cr0::WP);
        state.system.cr4 |= set(smep, cr4::SMEP) | set(smap, cr4::SMAP);
        m.map(WINDOW, DATA, bits);
        guest.vcpu.restore(&state).unwrap();
        match (guest.run(), error) {
            (Stop::Done(_), None) => {}
            (Stop::Vector(14, frame), Some(error)) => {
                assert_eq!(frame.error, Some(error), "row {i}");
                assert_eq!(guest.state().system.cr2, WINDOW, "row {i}");
            }
            other => panic!("row {i}: {other:?}"),
        }
    }
}

#[test]
fn rights_taken_away_count_after_invlpg() {
    // Loops over a page, and takes its rights away in the middle, by INVLPG, by CR3 and, for a global page, by CR4.
    for (how, global) in [(0, false), (1, false), (2, true), (0, true)] {
        let m = Machine::new(1);
        let bits = pte::P | pte::W | if global { pte::G } else { 0 };
        m.map(WINDOW, DATA, bits);
        let entry = m.pte(WINDOW);
        m.code(CODE, |a| {
            let (mut again, mut keep) = (a.create_label(), a.create_label());
            a.mov(rbx, WINDOW)?;
            a.mov(rsi, entry)?;
            a.set_label(&mut again)?;
            a.inc(dword_ptr(rbx))?;
            a.inc(ecx)?;
            a.cmp(ecx, 50)?;
            a.jne(keep)?;
            a.and(qword_ptr(rsi), !2)?;
            match how {
                0 => a.invlpg(ptr(rbx))?,
                1 => {
                    a.mov(rax, cr3)?;
                    a.mov(cr3, rax)?;
                }
                _ => {
                    a.mov(rax, cr4)?;
                    a.btr(rax, 7)?;
                    a.mov(cr4, rax)?;
                }
            }
            a.set_label(&mut keep)?;
            a.cmp(ecx, 100)?;
            a.jne(again)?;
            done(a)
        });
        let mut guest = m.vcpu(0, |_| {});
        assert_eq!(guest.run().vector().1, Some(3), "{how}");
        assert_eq!((guest.state().regs.gpr[RCX], m.peek::<u32>(DATA)), (50, 50), "{how}");
    }
}

#[test]
fn a_global_page_outlives_cr3() {
    // It may, and guests that test for it expect it to: the stale translation is used.
    let m = Machine::new(1);
    m.map(WINDOW, DATA, pte::P | pte::W | pte::G);
    m.poke(DATA, 1u32);
    m.poke(DATA + 0x1000, 2u32);
    let entry = m.pte(WINDOW);
    let (stop, _) = m.run(|a| {
        a.mov(rbx, WINDOW)?;
        a.mov(rsi, entry)?;
        a.mov(edx, dword_ptr(rbx))?;
        a.xor(qword_ptr(rsi), 0x1000)?;
        a.mov(rax, cr3)?;
        a.mov(cr3, rax)?;
        a.mov(edx, dword_ptr(rbx))?;
        a.invlpg(ptr(rbx))?;
        a.mov(eax, dword_ptr(rbx))?;
        a.shl(eax, 4)?;
        a.or(eax, edx)?;
        done(a)
    });
    assert_eq!(stop, Stop::Done(0x21));
}

#[test]
fn alignment_is_checked_where_asked() {
    let m = Machine::new(1);
    m.user_pages(CODE, 0x1000);
    m.user_pages(DATA, 0x2000);
    m.user_pages(STACK - 0x1000, 0x1000);
    let mut guest = m.vcpu(0, |_| {});
    let start = guest.state();
    let rows: [(&str, Code, bool); 9] = [
        ("mov", |a| a.mov(edx, dword_ptr(rbx + 2)), true),
        ("mov, aligned", |a| a.mov(edx, dword_ptr(rbx + 4)), false),
        ("mov 8", |a| a.mov(rdx, qword_ptr(rbx + 4)), true),
        ("store", |a| a.mov(word_ptr(rbx + 1), dx), true),
        ("add m", |a| a.lock().add(dword_ptr(rbx + 1), edx), true),
        ("byte", |a| a.mov(dl, byte_ptr(rbx + 1)), false),
        ("movsd", |a| a.movsd_2(xmm1, qword_ptr(rbx + 4)), true),
        ("movs", |a| a.movsd(), true),
        ("push", |a| a.push(rdx), true),
    ];
    for (name, code, faults) in rows {
        for checked in [true, false] {
            m.code(CODE, |a| {
                code(a)?;
                done(a)
            });
            let mut state = start.clone();
            user_mode(&mut state);
            state.regs.rflags = rflags::FIXED | rflags::IOPL | if checked { rflags::AC } else { 0 };
            (state.regs.gpr[RBX], state.regs.gpr[RSI], state.regs.gpr[RDI]) = (DATA, DATA + 1, DATA + 0x100);
            state.regs.gpr[RSP] = STACK - 0x100 + if name == "push" { 4 } else { 0 };
            guest.vcpu.restore(&state).unwrap();
            let stop = guest.run();
            if faults && checked {
                assert_eq!(stop.vector(), (17, Some(0), CODE), "{name}");
            } else {
                assert!(matches!(stop, Stop::Done(_)), "{name}: {stop:?}");
            }
        }
    }
}

#[test]
fn two_tasks_share_the_fpu_lazily() {
    // #NM by CR0.TS: each task's x87, SSE and AVX state is swapped by FXSAVE (and VEXTRACTF128) in the handler.
    let m = Machine::new(1);
    let (areas, owner) = (DATA, DATA + 0x2000);
    m.gate(7, CODE + 0x800);
    m.code(CODE + 0x800, |a| {
        // R14: the task that runs; the owner's state goes to its area.
        a.clts()?;
        a.push(rax)?;
        a.mov(rax, qword_ptr(owner))?;
        a.fxsave(byte_ptr(rax))?;
        a.vextractf128(xmmword_ptr(rax + 512), ymm3, 1)?;
        a.fxrstor(byte_ptr(r14))?;
        a.vinsertf128(ymm3, ymm3, xmmword_ptr(r14 + 512), 1)?;
        a.mov(qword_ptr(owner), r14)?;
        a.pop(rax)?;
        a.iretq()
    });
    m.poke(owner, areas);
    // A plain FXSAVE image for the second task.
    m.poke(areas + 0x400, 0x37fu16);
    m.poke(areas + 0x400 + 24, 0x1f80u32);
    let (stop, _) = m.run(|a| {
        let (mut again, mut wrong) = (a.create_label(), a.create_label());
        a.mov(rbp, areas)?;
        a.mov(r14, rbp)?;
        a.mov(r15d, 300)?;
        a.fninit()?;
        a.fldz()?;
        a.vpxor(xmm3, xmm3, xmm3)?;
        a.nop()?;
        a.set_label(&mut again)?;
        // Switch tasks: R12 and R13 count what each has done.
        a.xor(r14, 0x400)?;
        a.xchg(r12, r13)?;
        a.mov(rax, cr0)?;
        a.or(eax, 8)?;
        a.mov(cr0, rax)?;
        a.inc(r12)?;
        // The second task has no ST0 at first.
        a.cmp(r12d, 1)?;
        let mut has = a.create_label();
        a.jne(has)?;
        a.fninit()?;
        a.fldz()?;
        a.vpxor(xmm3, xmm3, xmm3)?;
        a.set_label(&mut has)?;
        a.fld1()?;
        a.faddp(st1, st0)?;
        a.vmovq(xmm1, r12)?;
        a.vpbroadcastq(ymm1, xmm1)?;
        a.vpaddq(ymm3, ymm3, ymm1)?;
        a.fist(dword_ptr(rbp + 0x1000))?;
        a.cmp(dword_ptr(rbp + 0x1000), r12d)?;
        a.jne(wrong)?;
        // The sum of 1 to n in every lane.
        a.vextractf128(xmm1, ymm3, 1)?;
        a.vmovq(rax, xmm1)?;
        a.lea(rcx, r12 + 1)?;
        a.imul_2(rcx, r12)?;
        a.shr(rcx, 1)?;
        a.cmp(rax, rcx)?;
        a.jne(wrong)?;
        a.dec(r15d)?;
        a.jnz(again)?;
        a.xor(eax, eax)?;
        done(a)?;
        a.set_label(&mut wrong)?;
        a.mov(eax, r12d)?;
        done(a)
    });
    assert_eq!(stop, Stop::Done(0), "wrong after so many switches");
}

#[test]
fn loads_and_stores_outside_of_memory() {
    const MMIO: u64 = 0xd000_0000;
    let m = Machine::new(1);
    m.map(MMIO, MMIO, pte::P | pte::W);
    for (i, byte) in (0..64u64).zip(0x10u8..) {
        lock(&m.bus.mmio).insert(MMIO + i, byte);
    }
    let (stop, state) = m.run(|a| {
        a.mov(rbx, MMIO)?;
        a.mov(r8b, byte_ptr(rbx))?;
        a.mov(r9w, word_ptr(rbx + 2))?;
        a.mov(r10d, dword_ptr(rbx + 4))?;
        a.mov(r11, qword_ptr(rbx + 8))?;
        a.movzx(r12d, byte_ptr(rbx + 1))?;
        a.mov(byte_ptr(rbx), 1)?;
        a.mov(word_ptr(rbx + 2), 0x0203)?;
        a.mov(dword_ptr(rbx + 4), 0x0405_0607)?;
        a.mov(qword_ptr(rbx + 8), r11)?;
        a.stc()?;
        a.adc(dword_ptr(rbx + 0x10), 1)?;
        a.setc(r13b)?;
        a.xchg(dword_ptr(rbx + 0x14), r10d)?;
        a.or(byte_ptr(rbx + 0x18), 0x80u32 as i32)?;
        a.mov(rdi, rbx)?;
        a.mov(ecx, 3)?;
        a.mov(eax, 0x55)?;
        a.rep().stosb()?;
        a.push(qword_ptr(rbx + 0x20))?;
        a.pop(qword_ptr(rbx + 0x28))?;
        a.movups(xmm1, xmmword_ptr(rbx + 0x30))?;
        a.movd(r14d, xmm1)?;
        a.xor(eax, eax)?;
        done(a)
    });
    assert_eq!(stop, Stop::Done(0));
    let gpr = &state.regs.gpr;
    assert_eq!((gpr[8], gpr[9], gpr[11]), (0x10, 0x1312, 0x1f1e_1d1c_1b1a_1918));
    assert_eq!((gpr[12], gpr[13], gpr[14], gpr[10]), (0x11, 0, 0x4342_4140, 0x2726_2524));
    let expected: Vec<(u64, Vec<u8>)> = vec![
        (0, vec![1]),
        (2, vec![3, 2]),
        (4, vec![7, 6, 5, 4]),
        (8, (0x18..0x20).collect()),
        (0x10, vec![0x22, 0x21, 0x22, 0x23]),
        (0x14, vec![0x14, 0x15, 0x16, 0x17]),
        (0x18, vec![0xa8]),
        (0, vec![0x55]),
        (1, vec![0x55]),
        (2, vec![0x55]),
        (0x28, (0x30..0x38).collect()),
    ];
    let writes: Vec<_> = lock(&m.bus.writes).iter().map(|(at, bytes)| (at - MMIO, bytes.clone())).collect();
    assert_eq!(writes, expected);
}
