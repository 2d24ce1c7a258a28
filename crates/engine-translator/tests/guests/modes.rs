//! From mode to mode, and segments that are not flat.

use iced_x86::code_asm::*;
use purlin_arch::x86_64::{
    regs::{
        cr0, efer,
        gpr::{RBX, RCX, RSI, RSP},
        rflags,
        seg::{CS, DS, ES, FS, GS, SS},
    },
    state::{Segment, Table, VcpuState},
};

use crate::machine::*;

/// Real mode, CS and all others at 0.
pub fn real_mode(state: &mut VcpuState) {
    let (regs, system) = (&mut state.regs, &mut state.system);
    regs.rip = 0x8000;
    regs.gpr[RSP] = 0x8000;
    system.segments = vec![Segment { selector: 0, base: 0, limit: 0xffff, access: 0x93 }; 6];
    system.segments[CS].access = 0x9b;
    (system.cr0, system.cr4, system.efer) = (cr0::ET, 0, 0);
    system.idtr = Table { base: 0, limit: 0x3ff };
}

/// 32-bit protected mode without paging, ring 0.
fn protected(state: &mut VcpuState) {
    let system = &mut state.system;
    system.segments[CS] = flat(selector::CODE32, 0x409b);
    (system.cr0, system.cr4, system.efer) = (cr0::ET | cr0::PE | cr0::NE, 0, 0);
}

#[test]
fn real_protected_compatibility_long_and_back() {
    // Each stage adds its digit to EDI.
    let m = Machine::new(1);
    let descriptor = 0x7000u64;
    m.load(descriptor, &[0xff, 0x0f]);
    m.poke(descriptor + 2, GDT as u32);
    let (at32, at64, compat, back32, back16, again) =
        (0x8100u32, 0x8200u64, 0x8300u32, 0x8400u32, 0x8500u32, 0x8600u32);
    m.code_of(16, 0x8000, 0x8000, |a| {
        a.mov(edi, 1)?;
        a.lgdt(fword_ptr(descriptor as u32 as i32))?;
        a.mov(eax, cr0)?;
        a.or(al, 1)?;
        a.mov(cr0, eax)?;
        a.db(&[0x66, 0xea])?;
        a.dd(&[at32])?;
        a.dw(&[selector::CODE32])
    });
    m.code_of(32, at32.into(), at32.into(), |a| {
        a.shl(edi, 4)?;
        a.or(edi, 2)?;
        a.mov(eax, u32::from(selector::DATA))?;
        for segment in [ds, es, ss] {
            a.mov(segment, eax)?;
        }
        a.mov(eax, PAGES as u32)?;
        a.mov(cr3, eax)?;
        a.mov(eax, 0x20)?;
        a.mov(cr4, eax)?;
        a.mov(ecx, 0xc000_0080u32)?;
        a.rdmsr()?;
        a.or(eax, 0x100)?;
        a.wrmsr()?;
        a.mov(eax, cr0)?;
        a.or(eax, 0x8000_0000u32)?;
        a.mov(cr0, eax)?;
        // Compatibility mode until CS is loaded.
        a.shl(edi, 4)?;
        a.or(edi, 3)?;
        a.db(&[0xea])?;
        a.dd(&[at64 as u32])?;
        a.dw(&[selector::CODE64])
    });
    m.code_of(64, at64, at64, |a| {
        a.shl(rdi, 4)?;
        a.or(rdi, 4)?;
        a.mov(r8, 0x1_0000_0000u64)?;
        a.push(u32::from(selector::CODE32) as i32)?;
        a.push(compat as i32)?;
        a.db(&[0x48, 0xcb])
    });
    m.code_of(32, compat.into(), compat.into(), |a| {
        // 40 is INC EAX here, a prefix in 64-bit code.
        a.mov(eax, 0)?;
        a.db(&[0x40])?;
        a.lea(edi, edi * 8 + eax)?;
        a.mov(ebx, cr0)?;
        a.btr(ebx, 31)?;
        a.mov(cr0, ebx)?;
        a.mov(ecx, 0xc000_0080u32)?;
        a.rdmsr()?;
        a.btr(eax, 8)?;
        a.wrmsr()?;
        a.db(&[0xea])?;
        a.dd(&[back32])?;
        a.dw(&[selector::CODE32])
    });
    m.code_of(32, back32.into(), back32.into(), |a| {
        a.shl(edi, 4)?;
        a.or(edi, 6)?;
        a.db(&[0xea])?;
        a.dd(&[back16])?;
        a.dw(&[selector::CODE16])
    });
    m.code_of(16, back16.into(), back16.into(), |a| {
        a.mov(ax, u32::from(selector::DATA16) as i32)?;
        for segment in [ds, es, ss] {
            a.mov(segment, ax)?;
        }
        a.mov(eax, cr0)?;
        a.and(al, 0xfeu32 as i32)?;
        a.mov(cr0, eax)?;
        a.db(&[0xea])?;
        a.dw(&[again as u16, 0])
    });
    m.code_of(16, again.into(), again.into(), |a| {
        a.shl(edi, 4)?;
        a.or(edi, 7)?;
        a.mov(eax, edi)?;
        done(a)
    });
    let mut guest = m.vcpu(0, real_mode);
    assert_eq!(guest.run(), Stop::Done((0x1234 * 8 + 1) << 8 | 0x67));
    let state = guest.state();
    assert_eq!(state.system.cr0 & (cr0::PE | cr0::PG), 0);
    assert_eq!(state.system.efer & (efer::LME | efer::LMA), 0);
}

#[test]
fn unreal_mode_reaches_beyond_64_kib_in_a_loop() {
    let m = Machine::new(1);
    m.code_of(16, 0x8000, 0x8000, |a| {
        let mut again = a.create_label();
        a.mov(esi, 0x20_0000)?;
        a.mov(cx, 1000)?;
        a.xor(eax, eax)?;
        a.set_label(&mut again)?;
        a.inc(dword_ptr(esi))?;
        a.add(eax, dword_ptr(esi))?;
        a.loop_(again)?;
        done(a)
    });
    let mut guest = m.vcpu(0, |s| {
        real_mode(s);
        s.system.segments[DS].limit = u32::MAX;
    });
    assert_eq!(guest.run(), Stop::Done(500_500));
    // With the usual limit the first access raises #GP, which the vector table sends to 0x8800.
    let m2 = Machine::new(1);
    let mut code = vec![0; 0x40];
    use vm_memory::{Bytes, GuestAddress};
    m.memory.read_slice(&mut code, GuestAddress(0x8000)).unwrap();
    m2.load(0x8000, &code);
    m2.poke(13 * 4, 0x8800u32);
    m2.code_of(16, 0x8800, 0x8800, |a| {
        a.pop(ax)?;
        a.movzx(eax, ax)?;
        done(a)
    });
    let mut guest = m2.vcpu(0, real_mode);
    // mov esi: 6, mov cx: 3, xor eax: 3
    assert_eq!(guest.run(), Stop::Done(0x800c));
}

#[test]
fn real_mode_segments_and_wrapping() {
    let m = Machine::new(1);
    m.poke(0x1_2345, 0x66u8);
    m.code_of(16, 0x8000, 0x8000, |a| {
        a.mov(ax, 0x1000)?;
        a.mov(ds, ax)?;
        a.mov(bx, 0x2340)?;
        a.mov(si, 5)?;
        a.movzx(ecx, byte_ptr(bx + si))?;
        // Offsets wrap at 64 KiB: BX + SI = 0x1_2345, too.
        a.mov(bx, 0xffffu32 as i32)?;
        a.mov(si, 0x2346)?;
        a.movzx(edx, byte_ptr(bx + si))?;
        a.shl(ecx, 8)?;
        a.lea(eax, ecx + edx)?;
        done(a)
    });
    assert_eq!(m.vcpu(0, real_mode).run(), Stop::Done(0x6666));
}

/// Runs 32-bit code with `segment` loaded as FS; whether it faulted, and with what.
fn with_segment(
    segment: Segment,
    index: usize,
    code: impl Fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>,
) -> (Stop, VcpuState) {
    let m = Machine::new(1);
    // 32-bit gates: the handlers tell their vector and error code.
    for vector in 0..32u64 {
        let at = 0x9000 + 16 * vector;
        m.poke(IDT + 8 * vector, at & 0xffff | u64::from(selector::CODE32) << 16 | 0x8e00 << 32 | (at >> 16) << 48);
        m.code_of(32, at, at, |a| {
            a.pop(eax)?;
            a.or(eax, (vector as i32) << 24)?;
            done(a)
        });
    }
    m.code_of(32, CODE, CODE, |a| {
        code(a)?;
        done(a)
    });
    let mut guest = m.vcpu(0, |s| {
        protected(s);
        s.system.segments[index] = segment;
        s.regs.gpr[RBX] = 0;
    });
    let stop = guest.run();
    (stop, guest.state())
}

#[test]
fn segment_limits_in_emitted_code() {
    let small = Segment { selector: 0x63, base: DATA, limit: 0xfff, access: 0x40f3 };
    let down = Segment { access: 0x40f7, ..small };
    let read_only = Segment { access: 0x40f1, ..small };
    let null = Segment { access: 1 << 16, ..Segment::default() };
    const GP: Stop = Stop::Done(13 << 24);
    const OK: Stop = Stop::Done(0);
    for (name, segment, offset, size, store, expected) in [
        ("last byte", small, 0xfff, 1, false, OK),
        ("first beyond", small, 0x1000, 1, false, GP),
        ("last dword", small, 0xffc, 4, true, OK),
        ("half beyond", small, 0xffd, 4, true, GP),
        ("far beyond", small, 0x8000_0000u32, 4, false, GP),
        ("expand-down, within", down, 0x1000, 4, true, OK),
        ("expand-down, below", down, 0xfff, 1, false, GP),
        ("expand-down, half below", down, 0xffe, 4, false, GP),
        ("read only, load", read_only, 0, 4, false, OK),
        ("read only, store", read_only, 0, 4, true, GP),
        ("null", null, 0, 4, false, GP),
    ] {
        let (stop, _) = with_segment(segment, FS, |a| {
            a.mov(ebx, offset)?;
            a.xor(eax, eax)?;
            match (size, store) {
                (1, false) => a.mov(dl, byte_ptr(ebx).fs()),
                (4, false) => a.mov(edx, dword_ptr(ebx).fs()),
                (1, true) => a.mov(byte_ptr(ebx).fs(), dl),
                _ => a.mov(dword_ptr(ebx).fs(), edx),
            }
        });
        assert_eq!(stop, expected, "{name}");
    }
}

#[test]
fn a_based_segment_reaches_its_memory() {
    let based = Segment { selector: 0x63, base: DATA, limit: 0xffff, access: 0x4093 };
    for index in [DS, ES, GS] {
        let (stop, _) = with_segment(based, index, |a| {
            a.mov(ebx, 0x10)?;
            a.mov(ecx, 0x1234_5678)?;
            let place = match index {
                DS => dword_ptr(ebx),
                ES => dword_ptr(ebx).es(),
                _ => dword_ptr(ebx).gs(),
            };
            a.mov(place, ecx)?;
            a.add(place, 1)?;
            // The same by a flat segment.
            a.mov(eax, dword_ptr(DATA as u32 as i32 + 0x10).cs())
        });
        assert_eq!(stop, Stop::Done(0x1234_5679), "{index}");
    }
}

#[test]
fn a_16_bit_stack_in_32_bit_code() {
    // SS.B clear: SP wraps at 64 KiB, the upper half of ESP stays.
    let stack = Segment { selector: 0x28, base: DATA, limit: 0xffff, access: 0x93 };
    let (stop, state) = with_segment(stack, SS, |a| {
        let mut function = a.create_label();
        let mut over = a.create_label();
        a.mov(esp, 0x5555_0004u32)?;
        a.push(0x11)?;
        a.push(0x22)?;
        a.call(function)?;
        a.pop(eax)?;
        a.pop(ecx)?;
        a.shl(eax, 8)?;
        a.or(eax, ecx)?;
        a.jmp(over)?;
        a.set_label(&mut function)?;
        a.push(ebp)?;
        a.mov(ebp, esp)?;
        a.leave()?;
        a.ret()?;
        a.set_label(&mut over)?;
        a.nop()
    });
    assert_eq!(stop, Stop::Done(0x2211));
    assert_eq!(state.regs.gpr[RSP], 0x5555_0004);
}

#[test]
fn a_virtual_8086_task() {
    // IOPL 0: INT, CLI and denied ports raise #GP to the monitor, which sees the task's state. The 32-bit TSS gives
    // the stack, and allows port 0xe9.
    let m = Machine::new(1);
    m.poke(TSS + 4, 0x9_0000u32);
    m.poke(TSS + 8, u32::from(selector::DATA));
    m.poke(TSS + 0x66, 0x68u16);
    m.load(TSS + 0x68, &[0xff; 0x98]);
    m.poke(TSS + 0x68 + 0xe9 / 8, !(1u8 << (0xe9 % 8)));
    let handler = 0xb000u64;
    m.poke(IDT + 8 * 13, handler | u64::from(selector::CODE32) << 16 | 0x8e00 << 32);
    // Skips two bytes, and logs the first of them.
    m.code_of(32, handler, handler, |a| {
        a.push(eax)?;
        a.push(ebx)?;
        a.movzx(ebx, word_ptr(esp + 16))?;
        a.shl(ebx, 4)?;
        a.add(ebx, dword_ptr(esp + 12))?;
        a.movzx(eax, byte_ptr(ebx).cs())?;
        a.out(u32::from(LOG), eax)?;
        a.add(dword_ptr(esp + 12), 2)?;
        a.cmp(eax, 0xf4)?;
        let mut on = a.create_label();
        a.jne(on)?;
        done(a)?;
        a.set_label(&mut on)?;
        a.pop(ebx)?;
        a.pop(eax)?;
        a.add(esp, 4)?;
        a.iretd()
    });
    m.code_of(16, 0, 0x1_0000, |a| {
        let mut again = a.create_label();
        a.mov(ax, cs)?;
        a.add(ax, 0x100)?;
        a.mov(ds, ax)?;
        a.mov(cx, 10)?;
        a.set_label(&mut again)?;
        a.inc(word_ptr(8))?;
        a.loop_(again)?;
        a.mov(al, 0x77)?;
        a.out(u32::from(LOG), al)?;
        a.int(0x21)?;
        a.cli()?;
        a.nop()?;
        a.out(0x80, al)?;
        a.hlt()
    });
    let mut guest = m.vcpu(0, |s| {
        let system = &mut s.system;
        system.segments = vec![Segment { selector: 0x1000, base: 0x1_0000, limit: 0xffff, access: 0xf3 }; 6];
        (system.cr0, system.cr4, system.efer) = (cr0::ET | cr0::PE | cr0::NE, 0, 0);
        system.tr = Segment { selector: selector::TSS.into(), base: TSS, limit: 0xff, access: 0x8b };
        s.regs.rflags |= rflags::VM;
        s.regs.rip = 0;
        s.regs.gpr[RSP] = 0xfff0;
    });
    assert!(matches!(guest.run(), Stop::Done(_)), "{:x?}", lock(&m.bus.log));
    assert_eq!(*lock(&m.bus.log), [0x77, 0xcd, 0xfa, 0xe6, 0xf4]);
    assert_eq!(m.peek::<u16>(0x1_1008), 10);
    assert_eq!(guest.state().regs.gpr[RCX] & 0xffff, 0);
}

/// An x87 operand of ten bytes is accessed in two parts. Where an address of its size reaches no further than the first,
/// the second is at the beginning of the segment, whatever is behind.
#[test]
fn the_second_part_of_an_operand_wraps_at_the_address_size() {
    const NUMBER: [u8; 10] = [1, 2, 3, 4, 5, 6, 7, 0x80, 9, 0x40];
    const ROUNDS: u32 = 3;
    let (last, behind, number, result) = (DATA, DATA + 0x1000, DATA + 0x2000, DATA + 0x2010);
    // Bits of code and of addresses, FS or not, its base, where the first part is in memory.
    let cases = [
        (64, 32, false, 0, last + 0xff8),
        (64, 32, true, 0, last + 0xff8),
        (64, 32, true, 0x10, behind + 8),
        (32, 32, false, 0, last + 0xff8),
        (32, 16, false, 0, 0xfff8),
        (32, 16, true, 0x10, 0x1_0008),
    ];
    for case @ (bits, address_bits, in_fs, base, first) in cases {
        let m = Machine::new(1);
        m.map(0xffff_f000, last, pte::P | pte::W);
        m.map(0x1_0000_0000, behind, pte::P | pte::W);
        m.load(number, &NUMBER);
        let code = CODE + 0x1000;
        m.code_of(bits, code, code, |a| {
            let mut again = a.create_label();
            let operand = if address_bits == 16 { tbyte_ptr(si) } else { tbyte_ptr(esi) };
            let operand = if in_fs { operand.fs() } else { operand };
            a.set_label(&mut again)?;
            a.fld(tbyte_ptr(number))?;
            a.fstp(operand)?;
            a.fld(operand)?;
            a.fstp(tbyte_ptr(result))?;
            a.dec(ecx)?;
            a.jne(again)?;
            done(a)
        });
        let mut guest = m.vcpu(0, |s| {
            s.regs.rip = code;
            s.regs.gpr[RCX] = ROUNDS.into();
            s.regs.gpr[RSI] = if address_bits == 16 { 0xfff8 } else { 0xffff_fff8 };
            s.system.segments[FS].base = base;
            if bits == 32 {
                compatibility(s);
            }
        });
        assert_eq!(guest.run(), Stop::Done(0), "{case:?}");
        let bytes = |at: u64, n: usize| (0..n as u64).map(|i| m.peek::<u8>(at + i)).collect::<Vec<_>>();
        assert_eq!((bytes(first, 8), bytes(base, 2)), (NUMBER[..8].to_vec(), NUMBER[8..].to_vec()), "{case:?}");
        assert_eq!(bytes(result, 10), NUMBER, "{case:?}");
    }
}
