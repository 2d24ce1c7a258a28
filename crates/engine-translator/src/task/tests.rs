use purlin_arch::x86_64::regs::gpr::{RAX, RSP};

use super::*;
use crate::{
    exception::vector,
    interrupt::{Event, deliver},
    testing::{
        CODE, GDT, IDT, Mode, PAGES, STACK, TSS, cpu, descriptor, gate, peek, poke, rights,
        selector::{self, CODE32, DATA, FREE, USER_CODE32, USER_DATA},
        set_descriptor, set_gate, step,
    },
};

/// The TSS of the other task.
const OTHER: u64 = 0x6000;
/// A task gate to it.
const GATE: u16 = FREE + 8;
const TARGET: u64 = 0xa000;
const OTHER_STACK: u64 = 0x7000;

fn jmp(selector: u16) -> Vec<u8> {
    [&b"\xea\0\0\0\0"[..], &selector.to_le_bytes()].concat()
}

fn call(selector: u16) -> Vec<u8> {
    [&b"\x9a\0\0\0\0"[..], &selector.to_le_bytes()].concat()
}

fn poke_fields(cpu: &Cpu, fields: &[(u64, u32)]) {
    for &(offset, value) in fields {
        poke(cpu, OTHER + offset, value);
    }
}

/// A processor at level 0 with a second 32-bit task at level 0, in [`FREE`], and a task gate.
fn two_tasks() -> Box<Cpu> {
    let cpu = cpu(Mode::Protected(0));
    set_descriptor(&cpu, FREE, descriptor(OTHER as u32, 0x67, access_of(system_type::TSS)));
    set_descriptor(&cpu, GATE, gate(FREE, 0, system_type::TASK_GATE, 3));
    let data = u32::from(DATA);
    let fields = [
        (0x20, TARGET as u32),
        (0x24, 0x2),
        (0x28, 0x1111_1111),
        (0x38, OTHER_STACK as u32),
        (0x48, data),
        (0x4c, u32::from(CODE32)),
        (0x50, data),
        (0x54, data),
        (0x58, 0),
        (0x5c, 0),
        (0x60, 0),
        (0x64, 0),
    ];
    poke_fields(&cpu, &fields);
    cpu
}

fn access_of(kind: u8) -> u32 {
    crate::cpu::access::P | u32::from(kind)
}

fn kind_in_gdt(cpu: &Cpu, selector: u16) -> u8 {
    (peek(cpu, GDT + u64::from(selector)) >> 40) as u8 & 15
}

fn word(cpu: &Cpu, address: u64) -> u32 {
    peek(cpu, address) as u32
}

#[test]
fn jump() {
    let mut cpu = two_tasks();
    cpu.gpr[RAX] = 0x2222_2222;
    cpu.dr7 |= 0x3ff;
    step(&mut cpu, &jmp(FREE)).unwrap();
    assert_eq!((cpu.rip, cpu.gpr[RAX], cpu.gpr[RSP]), (TARGET, 0x1111_1111, OTHER_STACK));
    assert_eq!((cpu.tr.selector, cpu.tr.base, cpu.tr.access & 15), (FREE, OTHER, 11));
    assert_eq!((cpu.rflags, cpu.seg[CS].selector, cpu.seg[SS].selector), (2, CODE32, DATA));
    assert!(cpu.seg[FS].unusable());
    assert_ne!(cpu.cr0 & cr0::TS, 0);
    assert_eq!(cpu.dr7 & 0x3ff, 0x2aa, "local breakpoints are off");
    // The old task: no longer busy, and saved.
    assert_eq!((kind_in_gdt(&cpu, selector::TSS), kind_in_gdt(&cpu, FREE)), (9, 11));
    assert_eq!((word(&cpu, TSS + 0x20), word(&cpu, TSS + 0x28)), (CODE as u32 + 7, 0x2222_2222));
    assert_eq!((word(&cpu, TSS + 0x38), word(&cpu, TSS + 0x4c) as u16), (STACK as u32, CODE32));
    // And back.
    step(&mut cpu, &jmp(selector::TSS)).unwrap();
    assert_eq!((cpu.rip, cpu.gpr[RAX], cpu.gpr[RSP]), (CODE + 7, 0x2222_2222, STACK));
    assert_eq!(word(&cpu, OTHER + 0x20), TARGET as u32 + 7);
}

#[test]
fn call_and_return() {
    let mut cpu = two_tasks();
    step(&mut cpu, &call(GATE)).unwrap();
    assert_eq!((cpu.rip, cpu.rflags), (TARGET, 2 | NT));
    assert_eq!(word(&cpu, OTHER) as u16, selector::TSS);
    assert_eq!((kind_in_gdt(&cpu, selector::TSS), kind_in_gdt(&cpu, FREE)), (11, 11));
    step(&mut cpu, b"\xcf").unwrap();
    assert_eq!((cpu.rip, cpu.rflags, cpu.tr.selector), (CODE + 7, 2, selector::TSS));
    assert_eq!((kind_in_gdt(&cpu, selector::TSS), kind_in_gdt(&cpu, FREE)), (11, 9));
    // NT is not saved for the task that is left.
    assert_eq!((word(&cpu, OTHER + 0x24), word(&cpu, OTHER + 0x20)), (2, TARGET as u32 + 1));
}

#[test]
fn exceptions_through_a_task_gate() {
    let mut cpu = two_tasks();
    set_gate(&cpu, vector::GP, gate(FREE, 0, system_type::TASK_GATE, 0));
    assert_eq!(deliver(&mut cpu, Event::Exception(Exception::gp(0x1230))), Ok(()));
    assert_eq!((cpu.rip, cpu.gpr[RSP], word(&cpu, OTHER_STACK - 4)), (TARGET, OTHER_STACK - 4, 0x1230));
    // The instruction that faulted is what is returned to.
    assert_eq!(word(&cpu, TSS + 0x20), CODE as u32);
    assert_eq!(word(&cpu, TSS + 0x24), 0x1_0002, "with RF");
    assert_ne!(cpu.rflags & NT, 0);
}

#[test]
fn sixteen_bit_task() {
    let mut cpu = two_tasks();
    set_descriptor(&cpu, FREE, descriptor(OTHER as u32, 0x2b, access_of(system_type::TSS16)));
    let words: [u16; 22] =
        [0, 0, 0, 0, 0, 0, 0, TARGET as u16, 0x3002, 1, 2, 3, 4, 0x7000, 6, 7, 8, DATA, CODE32, DATA, DATA, 0];
    for (i, word) in words.into_iter().enumerate() {
        poke(&cpu, OTHER + 2 * i as u64, word);
    }
    step(&mut cpu, &jmp(FREE)).unwrap();
    assert_eq!((cpu.rip, cpu.rflags, cpu.gpr[RSP]), (TARGET, 0x3002, 0xffff_7000));
    assert!(cpu.seg[FS].unusable() && cpu.seg[GS].unusable());
    cpu.gpr[RAX] = 0x55;
    step(&mut cpu, &jmp(selector::TSS)).unwrap();
    assert_eq!((word(&cpu, OTHER + 0x12) as u16, cpu.rip), (0x55, CODE + 7));
}

#[test]
fn faults_before_the_switch() {
    let with = |prepare: fn(&mut Cpu), bytes: &[u8], expected: Exception| {
        let mut cpu = two_tasks();
        prepare(&mut cpu);
        let before = (cpu.gpr, cpu.rip, cpu.seg, cpu.tr);
        assert_eq!(step(&mut cpu, bytes), Err(expected));
        assert_eq!((cpu.gpr, cpu.rip, cpu.seg, cpu.tr), before);
    };
    // Itself, which is busy.
    with(|_| {}, &jmp(selector::TSS), Exception::gp(selector::TSS));
    with(
        |cpu| set_descriptor(cpu, FREE, descriptor(OTHER as u32, 0x66, access_of(9))),
        &jmp(FREE),
        Exception::ts(FREE),
    );
    with(|cpu| set_descriptor(cpu, FREE, descriptor(OTHER as u32, 0x67, 9)), &jmp(FREE), Exception::np(FREE));
    // A gate whose DPL is below RPL; one to a selector that is no TSS.
    with(
        |cpu| set_descriptor(cpu, GATE, gate(FREE, 0, system_type::TASK_GATE, 0)),
        &jmp(GATE | 3),
        Exception::gp(GATE | 3),
    );
    with(|cpu| set_descriptor(cpu, GATE, gate(DATA, 0, system_type::TASK_GATE, 0)), &jmp(GATE), Exception::gp(DATA));
    with(
        |cpu| set_descriptor(cpu, GATE, gate(FREE, 0, system_type::TASK_GATE, 0) & !(0x80 << 40)),
        &jmp(GATE),
        Exception::np(GATE),
    );
    // A return to a task that is not busy.
    with(
        |cpu| {
            cpu.rflags |= NT;
            poke(cpu, TSS, FREE);
        },
        b"\xcf",
        Exception::ts(FREE),
    );
}

#[test]
fn faults_of_the_new_task() {
    // (offset in the TSS, value, fault)
    let cases = [
        (0x60, u32::from(DATA), Exception::ts(DATA)),
        (0x60, 4, Exception::ts(4)),
        (0x4c, 0, Exception::ts(0)),
        (0x4c, u32::from(DATA), Exception::ts(DATA)),
        (0x4c, u32::from(USER_CODE32 & !3), Exception::ts(USER_CODE32 & !3)),
        (0x50, 0, Exception::ts(0)),
        (0x50, u32::from(USER_DATA), Exception::ts(USER_DATA)),
        (0x54, u32::from(GATE + 8), Exception::np(GATE + 8)),
        (0x5c, u32::from(GATE), Exception::ts(GATE)),
    ];
    for (offset, value, expected) in cases {
        let mut cpu = two_tasks();
        set_descriptor(&cpu, GATE + 8, descriptor(0, 0xfff, rights(0, 0) & !crate::cpu::access::P));
        poke_fields(&cpu, &[(offset, value)]);
        assert_eq!(step(&mut cpu, &jmp(FREE)), Err(expected), "{offset:#x} {value:#x}");
        // The switch is done; the fault is at the new task's first instruction.
        assert_eq!((cpu.tr.selector, cpu.rip, cpu.gpr[RAX]), (FREE, TARGET, 0x1111_1111));
    }
}

#[test]
fn a_trapping_task() {
    let mut cpu = two_tasks();
    poke_fields(&cpu, &[(0x64, 1)]);
    step(&mut cpu, &jmp(FREE)).unwrap();
    assert_eq!(crate::debug::trap_after(&mut cpu, false), Some(Exception::debug(dr6::BT)));
}

#[test]
fn to_a_v86_task() {
    let mut cpu = two_tasks();
    poke_fields(&cpu, &[(0x24, 0x2_0002), (0x20, 0x1234), (0x4c, 0x2000), (0x54, 0x3000)]);
    step(&mut cpu, &jmp(FREE)).unwrap();
    assert_eq!((cpu.v86(), cpu.cpl, cpu.rip, cpu.seg[CS].base), (true, 3, 0x1234, 0x2_0000));
    assert_eq!(cpu.seg[DS], Segment::v86(0x3000));
}

#[test]
fn a_task_with_page_tables_of_its_own() {
    let mut cpu = two_tasks();
    // Both directories map the first 4 MiB to themselves.
    for directory in [PAGES, PAGES + 0x1000] {
        poke(&cpu, directory, 0x87u32);
    }
    cpu.cr4 = cr4::PSE;
    cpu.cr3 = PAGES;
    cpu.cr0 |= cr0::PG;
    poke_fields(&cpu, &[(0x1c, PAGES as u32 + 0x1000)]);
    step(&mut cpu, &jmp(FREE)).unwrap();
    assert_eq!((cpu.cr3, cpu.rip), (PAGES + 0x1000, TARGET));
}

#[test]
fn no_tasks_in_long_mode() {
    let mut cpu = cpu(Mode::Compatibility(0));
    set_descriptor(&cpu, FREE, descriptor(OTHER as u32, 0x67, access_of(9)));
    set_descriptor(&cpu, FREE + 8, 0);
    assert_eq!(step(&mut cpu, &jmp(FREE)), Err(Exception::gp(FREE)));
    poke(&cpu, IDT + 16 * 0x30, gate(FREE, 0, system_type::TASK_GATE, 3));
    assert_eq!(step(&mut cpu, b"\xcd\x30"), Err(Exception::with_error(vector::GP, 0x30 * 8 + 2)));
}
