use purlin_arch::x86_64::regs::{
    gpr::RSP,
    seg::{CS, DS, ES, SS},
};

use crate::{
    cpu::{Cpu, Segment, access},
    descriptor::system_type::{CALL_GATE, CALL_GATE16},
    exception::Exception,
    testing::{
        CODE, GDT, Mode, STACK, TSS, cpu, descriptor, gate, peek, poke, rights, segment,
        selector::{CODE16, CODE32, CODE64, CONFORMING, DATA, DATA16, FREE, USER_CODE32, USER_CODE64, USER_DATA},
        set_descriptor, step,
    },
};

const TARGET: u32 = 0xa000;
const INNER: u64 = 0x7000;

/// JMP or CALL ptr16:32 in 32-bit code.
fn direct(opcode: u8, selector: u16, offset: u32) -> Vec<u8> {
    [&[opcode][..], &offset.to_le_bytes(), &selector.to_le_bytes()].concat()
}

fn jmp(selector: u16, offset: u32) -> Vec<u8> {
    direct(0xea, selector, offset)
}

fn call(selector: u16, offset: u32) -> Vec<u8> {
    direct(0x9a, selector, offset)
}

fn values(cpu: &Cpu, size: u64, count: u64) -> Vec<u64> {
    let mask = if size == 8 { u64::MAX } else { (1 << (8 * size)) - 1 };
    (0..count).map(|i| peek(cpu, cpu.gpr[RSP] + i * size) & mask).collect()
}

/// A code segment at [`FREE`].
fn free_code(cpu: &Cpu, kind: u32, dpl: u32, limit: u32) {
    set_descriptor(cpu, FREE, descriptor(0, limit, rights(access::CODE | kind, dpl)));
}

#[test]
fn real_mode() {
    let mut cpu = cpu(Mode::Real);
    // CALL 0x123:0x4567
    step(&mut cpu, b"\x9a\x67\x45\x23\x01").unwrap();
    assert_eq!((cpu.seg[CS].selector, cpu.seg[CS].base, cpu.rip), (0x123, 0x1230, 0x4567));
    assert_eq!(values(&cpu, 2, 2), [CODE + 5, 0]);
    // RETF 4
    step(&mut cpu, b"\xca\x04\x00").unwrap();
    assert_eq!((cpu.seg[CS].selector, cpu.rip, cpu.gpr[RSP]), (0, CODE + 5, STACK + 4));
    // JMP to an offset beyond 64 KiB
    assert_eq!(step(&mut cpu, b"\x66\xea\x00\x00\x01\x00\x00\x00"), Err(Exception::GP0));
}

#[test]
fn privilege_of_direct_targets() {
    let np = |s| Some(Exception::np(s));
    let gp = |s| Some(Exception::gp(s));
    // (CPL, kind and DPL of the code segment, RPL, fault)
    let cases = [
        (0, 0, 0, 0, None),
        (0, 0, 0, 3, gp(FREE | 3)),
        (3, 0, 3, 3, None),
        (3, 0, 3, 0, None),
        (3, 0, 0, 3, gp(FREE | 3)),
        (0, 0, 3, 0, gp(FREE)),
        (3, access::DC, 0, 3, None),
        (0, access::DC, 3, 0, gp(FREE)),
        (0, access::DC, 0, 3, None),
    ];
    for (cpl, kind, dpl, rpl, fault) in cases {
        for bytes in [jmp(FREE | rpl, TARGET), call(FREE | rpl, TARGET)] {
            let mut cpu = cpu(Mode::Protected(cpl));
            free_code(&cpu, kind | access::DB, dpl, u32::MAX);
            assert_eq!(step(&mut cpu, &bytes).err(), fault, "CPL {cpl} {kind:#x} DPL {dpl} RPL {rpl}");
            if fault.is_none() {
                assert_eq!((cpu.rip, cpu.cpl), (u64::from(TARGET), cpl));
                assert_eq!(cpu.seg[CS].selector, FREE | u16::from(cpl));
            } else {
                assert_eq!((cpu.rip, cpu.gpr[RSP]), (CODE, STACK));
            }
        }
    }
    let mut cpu = cpu(Mode::Protected(0));
    set_descriptor(&cpu, FREE, descriptor(0, u32::MAX, rights(access::CODE, 0) & !access::P));
    assert_eq!(step(&mut cpu, &jmp(FREE, TARGET)).err(), np(FREE));
    assert_eq!(step(&mut cpu, &jmp(DATA, TARGET)).err(), gp(DATA));
    assert_eq!(step(&mut cpu, &jmp(0, TARGET)).err(), Some(Exception::GP0));
    cpu.gdtr.limit = 0x5f;
    assert_eq!(step(&mut cpu, &jmp(0xff8, TARGET)).err(), gp(0xff8));
}

#[test]
fn targets_beyond_the_limit() {
    let mut cpu = cpu(Mode::Protected(0));
    free_code(&cpu, access::DB, 0, 0xfff);
    for bytes in [jmp(FREE, 0x1000), call(FREE, 0x1000)] {
        assert_eq!(step(&mut cpu, &bytes), Err(Exception::GP0));
        assert_eq!((cpu.seg[CS].selector, cpu.gpr[RSP]), (CODE32, STACK));
    }
}

#[test]
fn call_and_return_at_one_level() {
    let mut cpu = cpu(Mode::Protected(0));
    step(&mut cpu, &call(CODE16, 0x1234)).unwrap();
    assert_eq!((cpu.seg[CS].selector, cpu.rip), (CODE16, 0x1234));
    assert_eq!(values(&cpu, 4, 2), [CODE + 7, u64::from(CODE32)]);
    // RETF with 32-bit operands, from 16-bit code.
    step(&mut cpu, b"\x66\xcb").unwrap();
    assert_eq!((cpu.seg[CS].selector, cpu.rip, cpu.gpr[RSP]), (CODE32, CODE + 7, STACK));
    // Through memory: CALL FAR [0x5000]
    poke(&cpu, 0x5000, TARGET);
    poke(&cpu, 0x5004, CONFORMING);
    step(&mut cpu, b"\xff\x1d\x00\x50\x00\x00").unwrap();
    assert_eq!((cpu.seg[CS].selector, cpu.rip), (CONFORMING, u64::from(TARGET)));
}

#[test]
fn into_and_out_of_64bit_mode() {
    let mut cpu = cpu(Mode::Compatibility(0));
    step(&mut cpu, &jmp(CODE64, TARGET)).unwrap();
    assert!(cpu.code64());
    // L and D together are reserved.
    set_descriptor(&cpu, FREE, descriptor(0, u32::MAX, rights(access::CODE | access::L | access::DB, 0)));
    poke(&cpu, 0x5000, TARGET);
    poke(&cpu, 0x5004, FREE);
    assert_eq!(step(&mut cpu, b"\xff\x2c\x25\x00\x50\x00\x00"), Err(Exception::gp(FREE)));
    poke(&cpu, 0x5004, CODE32);
    step(&mut cpu, b"\xff\x2c\x25\x00\x50\x00\x00").unwrap();
    assert!(cpu.long_mode() && !cpu.code64());
    assert_eq!(cpu.rip, u64::from(TARGET));
}

#[test]
fn a_return_into_another_mode_moves_the_stack_pointer_of_that_mode() {
    // From the top of a stack of 4 GiB to 64-bit code.
    let mut compatibility = cpu(Mode::Compatibility(0));
    compatibility.seg[SS].base = STACK + 8;
    compatibility.gpr[RSP] = 0xffff_fff8;
    poke(&compatibility, STACK, u64::from(CODE64) << 32 | u64::from(TARGET));
    step(&mut compatibility, b"\xca\x10\x00").unwrap();
    assert!(compatibility.code64());
    assert_eq!((compatibility.rip, compatibility.gpr[RSP]), (u64::from(TARGET), 0x1_0000_0010));

    // From 64-bit code to other code on a stack of 16 bits.
    let mut long = cpu(Mode::Long(0));
    long.seg[SS] = segment(&long, DATA16);
    long.gpr[RSP] = 0x1_fff8;
    poke(&long, 0x1_fff8, u64::from(CODE32) << 32 | u64::from(TARGET));
    step(&mut long, b"\xca\x10\x00").unwrap();
    assert!(!long.code64());
    assert_eq!((long.rip, long.gpr[RSP]), (u64::from(TARGET), 0x1_0010));
}

#[test]
fn call_gates_to_an_inner_level() {
    for (kind, size) in [(CALL_GATE, 4u64), (CALL_GATE16, 2)] {
        let mut cpu = cpu(Mode::Protected(3));
        poke(&cpu, TSS + 4, INNER);
        poke(&cpu, TSS + 8, u32::from(DATA));
        set_descriptor(&cpu, FREE, gate(CODE32, TARGET, kind, 3) | 2 << 32);
        poke(&cpu, STACK, if size == 4 { 0x2222_2222_1111_1111u64 } else { 0x2222_1111 });
        step(&mut cpu, &call(FREE | 3, 0xdead)).unwrap();
        assert_eq!((cpu.cpl, cpu.rip, cpu.seg[CS].selector), (0, u64::from(TARGET), CODE32));
        assert_eq!((cpu.seg[SS].selector, cpu.gpr[RSP]), (DATA, INNER - 6 * size));
        let parameters = if size == 4 { [0x1111_1111, 0x2222_2222] } else { [0x1111, 0x2222] };
        let frame = [CODE + 7, u64::from(USER_CODE32), parameters[0], parameters[1], STACK, u64::from(USER_DATA)];
        assert_eq!(values(&cpu, size, 6), frame);

        // And back, releasing the parameters on both stacks; a kernel segment is dropped.
        cpu.load_segment(ES, DATA).unwrap();
        let bytes: &[u8] = if size == 4 { b"\xca\x08\x00" } else { b"\x66\xca\x04\x00" };
        step(&mut cpu, bytes).unwrap();
        assert_eq!((cpu.cpl, cpu.rip, cpu.seg[CS].selector), (3, CODE + 7, USER_CODE32));
        assert_eq!((cpu.seg[SS].selector, cpu.gpr[RSP]), (USER_DATA, STACK + 2 * size));
        assert_eq!((cpu.seg[ES], cpu.seg[DS].selector), (Segment::null(0), USER_DATA));
    }
}

#[test]
fn call_gates_in_long_mode() {
    let mut cpu = cpu(Mode::Long(3));
    poke(&cpu, TSS + 4, INNER);
    set_descriptor(&cpu, FREE, gate(CODE64, TARGET, CALL_GATE, 3));
    set_descriptor(&cpu, FREE + 8, 0);
    poke(&cpu, 0x5000, 0u32);
    poke(&cpu, 0x5004, FREE | 3);
    let bytes = b"\xff\x1c\x25\x00\x50\x00\x00";
    step(&mut cpu, bytes).unwrap();
    assert_eq!((cpu.cpl, cpu.rip, cpu.gpr[RSP]), (0, u64::from(TARGET), INNER - 32));
    assert_eq!(values(&cpu, 8, 4), [CODE + 7, u64::from(USER_CODE64), STACK, u64::from(USER_DATA)]);
    assert!(cpu.seg[SS].unusable());
    // RETFQ
    step(&mut cpu, b"\x48\xcb").unwrap();
    assert_eq!((cpu.cpl, cpu.rip, cpu.gpr[RSP], cpu.seg[SS].selector), (3, CODE + 7, STACK, USER_DATA));
    // A gate to 32-bit code, a 16-bit gate, a second half that is none.
    let gp = |selector| Err(Exception::gp(selector));
    let cases = [
        (gate(CODE32, TARGET, CALL_GATE, 3), 0, gp(CODE32)),
        (gate(CODE64, TARGET, CALL_GATE16, 3), 0, gp(FREE | 3)),
        (gate(CODE64, TARGET, CALL_GATE, 3), 1 << 40, gp(FREE | 3)),
        (gate(CODE64, TARGET, CALL_GATE, 3), 0x8000, Err(Exception::GP0)),
    ];
    for (low, high, expected) in cases {
        set_descriptor(&cpu, FREE, low);
        set_descriptor(&cpu, FREE + 8, high);
        assert_eq!(step(&mut cpu, bytes), expected, "{low:#x} {high:#x}");
    }
}

#[test]
fn faults_of_call_gates() {
    let gate_at = |target, dpl| gate(target, TARGET, CALL_GATE, dpl);
    let absent = gate_at(CODE32, 3) & !(0x80 << 40);
    // (CPL, gate, RPL, JMP rather than CALL, fault)
    let cases = [
        (3, gate_at(CODE32, 0), 3, false, Some(Exception::gp(FREE | 3))),
        (0, gate_at(CODE32, 0), 3, false, Some(Exception::gp(FREE | 3))),
        (3, absent, 3, false, Some(Exception::np(FREE | 3))),
        (3, gate_at(0, 3), 3, false, Some(Exception::GP0)),
        (3, gate_at(DATA, 3), 3, false, Some(Exception::gp(DATA))),
        (0, gate_at(USER_CODE32, 0), 0, false, Some(Exception::gp(USER_CODE32))),
        // JMP cannot go inward, but to conforming code.
        (3, gate_at(CODE32, 3), 3, true, Some(Exception::gp(CODE32))),
        (3, gate_at(CONFORMING, 3), 3, true, None),
        (0, gate_at(CODE32, 0), 0, true, None),
        (0, gate_at(CODE32, 0), 0, false, None),
    ];
    for (cpl, gate, rpl, jump, fault) in cases {
        let mut cpu = cpu(Mode::Protected(cpl));
        set_descriptor(&cpu, FREE, gate);
        let bytes = if jump { jmp(FREE | rpl, 0) } else { call(FREE | rpl, 0) };
        assert_eq!(step(&mut cpu, &bytes).err(), fault, "CPL {cpl} {gate:#x} RPL {rpl} {jump}");
        if fault.is_none() {
            assert_eq!((cpu.cpl, cpu.rip), (cpl, u64::from(TARGET)));
        }
    }
}

/// Executes RETF at CPL 0 with the given frame on the stack.
fn retf(frame: [u16; 4], prepare: impl Fn(&Cpu)) -> (Box<Cpu>, Result<(), Exception>) {
    let mut cpu = cpu(Mode::Protected(0));
    prepare(&cpu);
    for (i, value) in frame.into_iter().enumerate() {
        poke(&cpu, STACK + 4 * i as u64, u32::from(value));
    }
    let result = step(&mut cpu, b"\xcb");
    (cpu, result)
}

#[test]
fn faults_of_far_returns() {
    let gp = |s| Some(Exception::gp(s));
    let free = |rights: u32| move |cpu: &Cpu| set_descriptor(cpu, FREE, descriptor(0, 0xfff, rights));
    let user = rights(access::CODE, 3);
    // (CS, SS, rights of FREE, fault)
    let cases = [
        (0, USER_DATA, 0, Some(Exception::GP0)),
        (DATA, USER_DATA, 0, gp(DATA)),
        (CODE32 | 3, USER_DATA, 0, gp(CODE32 | 3)),
        (USER_CODE32 & !3, USER_DATA, 0, gp(USER_CODE32 & !3)),
        (FREE | 3, USER_DATA, user & !access::P, Some(Exception::np(FREE | 3))),
        (USER_CODE32, 0, 0, Some(Exception::GP0)),
        (USER_CODE32, DATA, 0, gp(DATA)),
        (USER_CODE32, USER_CODE32, 0, gp(USER_CODE32)),
        (USER_CODE32, FREE | 3, rights(0, 3) & !access::P, Some(Exception::ss(FREE | 3))),
        // The offset is beyond the limit.
        (FREE | 3, USER_DATA, user, Some(Exception::GP0)),
        (USER_CODE32, USER_DATA, 0, None),
        (CONFORMING | 3, USER_DATA, 0, None),
    ];
    for (cs, ss, rights, fault) in cases {
        let (cpu, result) = retf([0xa000, cs, 0x6000, ss], free(rights));
        assert_eq!(result.err(), fault, "{cs:#x} {ss:#x} {rights:#x}");
        if fault.is_some() {
            assert_eq!((cpu.gpr[RSP], cpu.cpl, cpu.seg[CS].selector), (STACK, 0, CODE32));
        } else {
            assert_eq!((cpu.gpr[RSP], cpu.cpl, cpu.rip), (0x6000, 3, 0xa000));
        }
    }
    // Returns never go inward.
    let mut user = cpu(Mode::Protected(3));
    poke(&user, STACK, 0xa000u32);
    poke(&user, STACK + 4, u32::from(CODE32));
    assert_eq!(step(&mut user, b"\xcb"), Err(Exception::gp(CODE32)));
}

#[test]
fn code_descriptors_are_marked_accessed() {
    let mut cpu = cpu(Mode::Protected(0));
    let clear = descriptor(0, u32::MAX, rights(access::CODE | access::DB, 0) & !access::ACCESSED);
    set_descriptor(&cpu, FREE, clear);
    step(&mut cpu, &jmp(FREE, TARGET)).unwrap();
    assert_eq!(peek(&cpu, GDT + u64::from(FREE)), clear | 1 << 40);
}
