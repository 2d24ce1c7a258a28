use purlin_arch::x86_64::regs::cr0;

use super::*;
use crate::{
    cpu::access,
    testing::{
        CODE, GDT, IDT, Mode, PAGES, STACK, TSS, cpu, descriptor, gate, peek, poke, rights,
        selector::{self, CODE16, CODE32, CODE64, CONFORMING, DATA, FREE, USER_CODE32, USER_CODE64, USER_DATA},
        set_descriptor, set_gate, step,
    },
};

const HANDLER: u32 = 0xa000;
/// The inner stack that the TSS names.
const INNER: u64 = 0x7000;
const INTERRUPT: u8 = system_type::INTERRUPT_GATE;
const TRAP: u8 = system_type::TRAP_GATE;

/// `count` values of `size` bytes from the stack pointer up.
fn frame(cpu: &Cpu, size: u64, count: u64) -> Vec<u64> {
    let mask = if size == 8 { u64::MAX } else { (1 << (8 * size)) - 1 };
    (0..count).map(|i| peek(cpu, (cpu.gpr[RSP] & 0xffff_ffff) + i * size) & mask).collect()
}

/// A processor whose TSS has [`INNER`] for level 0.
fn with_tss(mode: Mode) -> Box<Cpu> {
    let cpu = cpu(mode);
    poke(&cpu, TSS + 4, INNER);
    if !cpu.long_mode() {
        poke(&cpu, TSS + 8, u32::from(DATA));
    }
    cpu
}

fn deliver_exception(cpu: &mut Cpu, exception: Exception) {
    assert_eq!(deliver(cpu, Event::Exception(exception)), Ok(()));
}

#[test]
fn real_mode() {
    let mut cpu = cpu(Mode::Real);
    cpu.rflags |= rflags::IF | rflags::TF | rflags::AC | rflags::CF;
    let flags = cpu.rflags;
    poke(&cpu, 0x21 * 4, 0x0123_4567u32);
    step(&mut cpu, b"\xcd\x21").unwrap();
    assert_eq!((cpu.seg[CS].selector, cpu.seg[CS].base, cpu.rip), (0x123, 0x1230, 0x4567));
    assert_eq!(cpu.rflags, rflags::FIXED | rflags::CF);
    assert_eq!(frame(&cpu, 2, 3), [CODE + 2, 0, flags & 0xffff]);
    // The table ends at IDTR's limit; no error codes are pushed.
    cpu.idtr.limit = 0x21 * 4 + 2;
    poke(&cpu, 13 * 4, 0x0100_0042u32);
    assert_eq!(step(&mut cpu, b"\xcd\x21"), Err(Exception::with_error(vector::GP, 0x21 * 8 + 2)));
    let sp = cpu.gpr[RSP];
    deliver_exception(&mut cpu, Exception::GP0);
    assert_eq!((cpu.rip, cpu.gpr[RSP]), (0x42, sp - 6));
}

#[test]
fn long_mode_from_user() {
    let mut cpu = with_tss(Mode::Long(3));
    cpu.rflags |= rflags::IF | rflags::TF | rflags::NT | rflags::AC;
    let flags = cpu.rflags;
    set_gate(&cpu, vector::PF, gate(CODE64, HANDLER, INTERRUPT, 0));
    deliver_exception(&mut cpu, Exception::page_fault(0x1234_5678, 6));
    assert_eq!(cpu.cr2, 0x1234_5678);
    let expected = [6, CODE, u64::from(USER_CODE64), flags | rflags::RF, STACK, u64::from(USER_DATA)];
    assert_eq!(frame(&cpu, 8, 6), expected);
    assert_eq!(cpu.gpr[RSP], INNER - 48);
    assert_eq!((cpu.cpl, cpu.rip, cpu.seg[CS].selector), (0, u64::from(HANDLER), CODE64));
    assert_eq!((cpu.seg[SS].selector, cpu.seg[SS].unusable()), (0, true));
    assert_eq!(cpu.rflags, rflags::FIXED | rflags::AC);
    assert_eq!(cpu.seg[DS].selector, USER_DATA);
}

#[test]
fn long_mode_aligns_the_stack() {
    let mut cpu = cpu(Mode::Long(0));
    cpu.gpr[RSP] = STACK + 5;
    cpu.rflags |= rflags::IF;
    set_gate(&cpu, 0x30, gate(CODE64, HANDLER, TRAP, 0));
    assert_eq!(deliver(&mut cpu, Event::Interrupt(0x30)), Ok(()));
    assert_eq!(cpu.gpr[RSP], STACK - 40);
    assert_eq!(frame(&cpu, 8, 5)[3], STACK + 5);
    // A trap gate leaves IF alone; SS stays where the level does.
    assert_ne!(cpu.rflags & rflags::IF, 0);
    assert_eq!(cpu.seg[SS].selector, DATA);
}

#[test]
fn interrupt_stack_table() {
    let mut cpu = cpu(Mode::Long(0));
    poke(&cpu, TSS + 0x24 + 8, 0x6008u64);
    set_gate(&cpu, vector::NMI, gate(CODE64, HANDLER, INTERRUPT, 0) | 2 << 32);
    assert_eq!(deliver(&mut cpu, Event::Nmi), Ok(()));
    assert_eq!(cpu.gpr[RSP], 0x6000 - 40);
    assert!(cpu.nmi_masked);
    assert_eq!(cpu.seg[SS].selector, DATA);
}

#[test]
fn faults_of_gates_in_long_mode() {
    let gp = |error| Exception::with_error(vector::GP, error);
    let present = |kind| gate(CODE64, HANDLER, kind, 3);
    let absent = present(INTERRUPT) & !(0x80 << 40);
    // (gate, fault with EXT clear)
    let cases = [
        (0, gp(0x30 * 8 + 2)),
        (present(system_type::INTERRUPT_GATE16), gp(0x30 * 8 + 2)),
        (present(system_type::TASK_GATE), gp(0x30 * 8 + 2)),
        (present(system_type::CALL_GATE), gp(0x30 * 8 + 2)),
        (absent, Exception::with_error(vector::NP, 0x30 * 8 + 2)),
        (gate(0, HANDLER, INTERRUPT, 3), gp(0)),
        (gate(CODE32, HANDLER, INTERRUPT, 3), gp(u32::from(CODE32))),
        (gate(DATA, HANDLER, INTERRUPT, 3), gp(u32::from(DATA))),
        (gate(0xff8, HANDLER, INTERRUPT, 3), gp(0xff8)),
    ];
    for (gate, expected) in cases {
        let mut cpu = with_tss(Mode::Long(3));
        cpu.gdtr.limit = 0x5f;
        set_gate(&cpu, 0x30, gate);
        let before = (cpu.gpr, cpu.rip, cpu.seg);
        assert_eq!(step(&mut cpu, b"\xcd\x30"), Err(expected), "{gate:#x}");
        assert_eq!((cpu.gpr, cpu.rip, cpu.seg), before);
    }
}

#[test]
fn non_canonical_handlers_and_stacks() {
    let mut cpu = with_tss(Mode::Long(3));
    set_gate(&cpu, 0x30, gate(CODE64, HANDLER, INTERRUPT, 3));
    poke(&cpu, IDT + 16 * 0x30 + 8, 0x8000u32);
    assert_eq!(step(&mut cpu, b"\xcd\x30"), Err(Exception::GP0));
    poke(&cpu, IDT + 16 * 0x30 + 8, 0u32);
    poke(&cpu, TSS + 4, 0x8000_0000_0000u64);
    assert_eq!(step(&mut cpu, b"\xcd\x30"), Err(Exception::SS0));
    cpu.tr.limit = 10;
    assert_eq!(step(&mut cpu, b"\xcd\x30"), Err(Exception::ts(selector::TSS)));
}

#[test]
fn software_interrupts_check_the_gate_hardware_does_not() {
    for (bytes, vector) in [(&b"\xcd\x30"[..], 0x30), (b"\xcc", vector::BP)] {
        let mut cpu = with_tss(Mode::Long(3));
        set_gate(&cpu, vector, gate(CODE64, HANDLER, INTERRUPT, 0));
        let fault = Exception::with_error(vector::GP, u32::from(vector) * 8 + 2);
        assert_eq!(step(&mut cpu, bytes), Err(fault));
        assert_eq!(deliver(&mut cpu, Event::Interrupt(vector)), Ok(()));
        assert_eq!(cpu.rip, u64::from(HANDLER));
    }
    // INT1 asks nobody.
    let mut cpu = with_tss(Mode::Long(3));
    set_gate(&cpu, vector::DB, gate(CODE64, HANDLER, INTERRUPT, 0));
    let dr6 = cpu.dr6;
    step(&mut cpu, b"\xf1").unwrap();
    assert_eq!((cpu.rip, frame(&cpu, 8, 1)[0], cpu.dr6), (u64::from(HANDLER), CODE + 1, dr6));
}

#[test]
fn protected_mode_from_user() {
    let mut cpu = with_tss(Mode::Protected(3));
    cpu.rflags |= rflags::IF;
    let flags = cpu.rflags;
    set_gate(&cpu, vector::GP, gate(CODE32, HANDLER, INTERRUPT, 0));
    deliver_exception(&mut cpu, Exception::with_error(vector::GP, 0x1234));
    let expected = [0x1234, CODE, u64::from(USER_CODE32), flags | rflags::RF, STACK, u64::from(USER_DATA)];
    assert_eq!(frame(&cpu, 4, 6), expected);
    assert_eq!((cpu.gpr[RSP], cpu.cpl, cpu.rip), (INNER - 24, 0, u64::from(HANDLER)));
    assert_eq!((cpu.seg[SS].selector, cpu.seg[DS].selector), (DATA, USER_DATA));
}

#[test]
fn sixteen_bit_gates() {
    let mut cpu = cpu(Mode::Protected(0));
    cpu.gpr[RSP] = 0x1234_0000 | STACK;
    cpu.seg[SS] = crate::testing::segment(&cpu, selector::DATA16);
    set_gate(&cpu, 0x30, gate(CODE16, 0xffff_a000, system_type::TRAP_GATE16, 0));
    step(&mut cpu, b"\xcd\x30").unwrap();
    assert_eq!((cpu.rip, cpu.gpr[RSP]), (0xa000, 0x1234_0000 | (STACK - 6)));
    cpu.gpr[RSP] &= 0xffff;
    assert_eq!(frame(&cpu, 2, 3), [CODE + 2, u64::from(CODE32), 2]);
}

#[test]
fn conforming_handlers_stay_at_their_level() {
    let mut cpu = cpu(Mode::Protected(3));
    set_gate(&cpu, 0x30, gate(CONFORMING, HANDLER, TRAP, 3));
    step(&mut cpu, b"\xcd\x30").unwrap();
    assert_eq!((cpu.cpl, cpu.seg[CS].selector, cpu.gpr[RSP]), (3, CONFORMING | 3, STACK - 12));
}

#[test]
fn faults_of_inner_stacks() {
    let ts = |s: u16| Exception::ts(s);
    // (selector in the TSS, rights of the free descriptor, fault)
    let cases = [
        (0, 0, ts(0)),
        (USER_DATA, 0, ts(USER_DATA)),
        (CODE32, 0, ts(CODE32)),
        (0xff8, 0, ts(0xff8)),
        (FREE, rights(0, 0) & !access::RW, ts(FREE)),
        (FREE, rights(0, 0) & !access::P, Exception::ss(FREE)),
        (FREE | 1, rights(0, 0), ts(FREE | 1)),
    ];
    for (ss, rights, expected) in cases {
        let mut cpu = with_tss(Mode::Protected(3));
        cpu.gdtr.limit = 0x67;
        set_descriptor(&cpu, FREE, descriptor(0, 0xfff, rights));
        poke(&cpu, TSS + 8, u32::from(ss));
        set_gate(&cpu, 0x30, gate(CODE32, HANDLER, INTERRUPT, 3));
        assert_eq!(step(&mut cpu, b"\xcd\x30"), Err(expected), "{ss:#x} {rights:#x}");
    }
    // No room.
    let mut cpu = with_tss(Mode::Protected(3));
    set_descriptor(&cpu, FREE, descriptor(0, 0xfff, rights(access::DB, 0)));
    poke(&cpu, TSS + 4, 16u32);
    poke(&cpu, TSS + 8, u32::from(FREE));
    set_gate(&cpu, 0x30, gate(CODE32, HANDLER, INTERRUPT, 3));
    assert_eq!(step(&mut cpu, b"\xcd\x30"), Err(Exception::ss(FREE)));
    poke(&cpu, TSS + 4, 20u32);
    step(&mut cpu, b"\xcd\x30").unwrap();
    assert_eq!(cpu.gpr[RSP], 0);
}

#[test]
fn handlers_outside_of_their_segment() {
    let mut cpu = cpu(Mode::Protected(0));
    set_descriptor(&cpu, FREE, descriptor(0, 0xfff, rights(access::CODE | access::DB, 0)));
    set_gate(&cpu, 0x30, gate(FREE, 0x1000, INTERRUPT, 0));
    assert_eq!(step(&mut cpu, b"\xcd\x30"), Err(Exception::GP0));
    set_gate(&cpu, 0x30, gate(FREE, 0xfff, INTERRUPT, 0));
    step(&mut cpu, b"\xcd\x30").unwrap();
}

#[test]
fn from_v86_mode() {
    let mut cpu = with_tss(Mode::V86);
    cpu.rflags |= rflags::IOPL;
    for (seg, value) in [(ES, 0x11), (DS, 0x22), (FS, 0x33), (GS, 0x44)] {
        cpu.seg[seg] = Segment::v86(value);
    }
    let flags = cpu.rflags;
    set_gate(&cpu, 0x30, gate(CODE32, HANDLER, INTERRUPT, 3));
    step(&mut cpu, b"\xcd\x30").unwrap();
    assert_eq!(frame(&cpu, 4, 9), [CODE + 2, 0, flags, STACK, 0, 0x11, 0x22, 0x33, 0x44]);
    assert!(!cpu.v86());
    assert_eq!((cpu.cpl, cpu.seg[DS], cpu.seg[GS]), (0, Segment::null(0), Segment::null(0)));
    // A handler that is not at level 0.
    let mut cpu = with_tss(Mode::V86);
    cpu.rflags |= rflags::IOPL;
    set_gate(&cpu, 0x30, gate(CONFORMING, HANDLER, INTERRUPT, 3));
    assert_eq!(step(&mut cpu, b"\xcd\x30"), Err(Exception::gp(CONFORMING)));
}

/// SDM vol. 3A table 20-2, by IOPL, VME and the redirection bit.
#[test]
fn software_interrupts_in_v86_mode() {
    #[derive(Debug, PartialEq)]
    enum Outcome {
        Fault,
        Monitor,
        Program { pushed: u64, now: u64 },
    }
    use Outcome::*;
    let (iopl, vif, iflag) = (rflags::IOPL, rflags::VIF, rflags::IF);
    // (RFLAGS, VME, redirection bit, outcome)
    let cases = [
        (0, false, 0, Fault),
        (iopl, false, 0, Monitor),
        (iopl, true, 1, Monitor),
        (0, true, 1, Fault),
        (iopl | iflag, true, 0, Program { pushed: 2 | iopl | iflag, now: iopl }),
        (vif | iflag, true, 0, Program { pushed: 2 | iopl | iflag, now: iflag }),
        (iflag, true, 0, Program { pushed: 2 | iopl, now: iflag }),
    ];
    for (flags, vme, bit, expected) in cases {
        let mut cpu = with_tss(Mode::V86);
        cpu.rflags |= flags;
        cpu.cr4 |= if vme { cr4::VME } else { 0 };
        // I/O bitmap at 0x88, redirection bitmap below it.
        poke(&cpu, TSS + 0x66, 0x88u16);
        poke(&cpu, TSS + 0x68 + 0x21 / 8, (bit << (0x21 % 8)) as u8);
        poke(&cpu, 0x21 * 4, 0x0123_4567u32);
        set_gate(&cpu, 0x21, gate(CODE32, HANDLER, INTERRUPT, 3));
        let outcome = match step(&mut cpu, b"\xcd\x21") {
            Err(e) => {
                assert_eq!(e, Exception::GP0);
                Fault
            }
            Ok(()) if !cpu.v86() => Monitor,
            Ok(()) => {
                assert_eq!((cpu.seg[CS].selector, cpu.rip), (0x123, 0x4567));
                let now = cpu.rflags & (iopl | iflag | vif);
                Program { pushed: frame(&cpu, 2, 3)[2], now }
            }
        };
        assert_eq!(outcome, expected, "{flags:#x} {vme} {bit}");
    }
    // INT3 always goes to the monitor.
    let mut cpu = with_tss(Mode::V86);
    cpu.cr4 |= cr4::VME;
    set_gate(&cpu, vector::BP, gate(CODE32, HANDLER, INTERRUPT, 3));
    step(&mut cpu, b"\xcc").unwrap();
    assert!(!cpu.v86());
}

#[test]
fn debug_exceptions_set_dr6_and_clear_gd() {
    let mut cpu = cpu(Mode::Long(0));
    set_gate(&cpu, vector::DB, gate(CODE64, HANDLER, INTERRUPT, 0));
    cpu.dr7 |= dr7::GD;
    cpu.dr6 |= 0xe;
    deliver_exception(&mut cpu, Exception::debug(dr6::BS | 1));
    // The breakpoint bits are this exception's; the rest piles up.
    assert_eq!(cpu.dr6, 0xffff_0ff0 | dr6::BS | 1);
    assert_eq!(cpu.dr7 & dr7::GD, 0);
    // A trap is pushed without RF.
    assert_eq!(frame(&cpu, 8, 3)[2] & rflags::RF, 0);
}

/// Delivers `first` where only #DF has a handler (or not even that): its vector's gate raises `second` instead.
fn fault_upon(first: Exception, second: Exception, handlers: &[u8]) -> (Box<Cpu>, Result<(), Shutdown>) {
    let mut cpu = with_tss(Mode::Long(0));
    for &handler in handlers {
        set_gate(&cpu, handler, gate(CODE64, HANDLER + u32::from(handler), INTERRUPT, 0));
    }
    match second.vector {
        // A handler in a segment that is not there.
        vector::NP => {
            let absent = descriptor(0, u32::MAX, rights(access::CODE | access::L, 0) & !access::P);
            set_descriptor(&cpu, FREE, absent);
            set_gate(&cpu, first.vector, gate(FREE, HANDLER, INTERRUPT, 0));
        }
        // A stack on a page that is not there.
        vector::PF => {
            poke(&cpu, TSS + 0x24, second.payload + 16);
            set_gate(&cpu, first.vector, gate(CODE64, HANDLER, INTERRUPT, 0) | 1 << 32);
        }
        // No gate at all.
        _ => set_gate(&cpu, first.vector, 0),
    }
    let result = deliver(&mut cpu, Event::Exception(first));
    (cpu, result)
}

/// SDM vol. 3A table 6-5.
#[test]
fn double_faults() {
    let gp = Exception::GP0;
    let pf = Exception::page_fault(0x5555_5000, 0);
    let np = Exception::np(FREE);
    let second_pf = Exception::page_fault(0x6000_0000, 0);
    let cases = [
        // Benign first: the second is delivered.
        (Exception::UD, gp, vector::GP, Some((u64::from(vector::UD) * 8 + 2) | 1)),
        (Exception::AC0, np, vector::NP, Some(u64::from(FREE) | 1)),
        (Exception::UD, second_pf, vector::PF, Some(2)),
        // Contributory, then contributory.
        (Exception::DE, gp, vector::DF, Some(0)),
        (gp, np, vector::DF, Some(0)),
        // Contributory, then page fault: the page fault.
        (gp, second_pf, vector::PF, Some(2)),
        // Page fault, then either.
        (pf, np, vector::DF, Some(0)),
        (pf, second_pf, vector::DF, Some(0)),
    ];
    for (first, second, expected, error) in cases {
        let handlers = [vector::DF, vector::NP, vector::PF, vector::GP];
        let (cpu, result) = fault_upon(first, second, &handlers);
        assert_eq!(result, Ok(()), "{first:?} {second:?}");
        assert_eq!(cpu.rip, u64::from(HANDLER) + u64::from(expected), "{first:?} {second:?}");
        assert_eq!(error, Some(frame(&cpu, 8, 1)[0]), "{first:?} {second:?}");
        let faulted = [first, second].iter().rev().find(|e| e.vector == vector::PF).map(|e| e.payload);
        if let Some(address) = faulted {
            assert_eq!(cpu.cr2 & !0xfff, address & !0xfff, "{first:?} {second:?}");
        }
    }
}

#[test]
fn triple_faults() {
    assert_eq!(fault_upon(Exception::GP0, Exception::GP0, &[]).1, Err(Shutdown));
    assert_eq!(fault_upon(Exception::UD, Exception::GP0, &[]).1, Err(Shutdown));
    let mut cpu = cpu(Mode::Protected(0));
    cpu.idtr.limit = 0;
    assert_eq!(deliver(&mut cpu, Event::Interrupt(0x30)), Err(Shutdown));
}

#[test]
fn delivery_ends_a_halt_and_the_shadows() {
    let mut cpu = cpu(Mode::Long(0));
    set_gate(&cpu, 0x30, gate(CODE64, HANDLER, INTERRUPT, 0));
    cpu.activity = Activity::Halted;
    cpu.sti_shadow = true;
    assert_eq!(deliver(&mut cpu, Event::Interrupt(0x30)), Ok(()));
    assert_eq!((cpu.activity, cpu.sti_shadow), (Activity::Running, false));
}

#[test]
fn tables_are_read_as_supervisor() {
    let mut cpu = with_tss(Mode::Long(3));
    cpu.cr0 |= cr0::WP;
    // The tables' page is for the supervisor only, 4 KiB pages.
    let table = PAGES + 0x3000;
    poke(&cpu, PAGES + 0x2000, table | 7);
    for page in 0..32u64 {
        let user = page * 0x1000 == CODE || page * 0x1000 == STACK - 0x1000;
        poke(&cpu, table + 8 * page, (page * 0x1000) | if user { 7 } else { 3 });
    }
    assert!(cpu.load::<u8>(GDT).is_err());
    set_gate(&cpu, 0x30, gate(CODE64, HANDLER, INTERRUPT, 3));
    poke(&cpu, TSS + 4, 0x6000u64);
    step(&mut cpu, b"\xcd\x30").unwrap();
    assert_eq!(cpu.cpl, 0);
}
