use super::*;
use crate::{
    exception::{Exception, pf},
    mailbox::request,
    testing::{CODE, MEMORY, Mode, PAGES, cpus, peek, poke},
};

/// Four-level tables as the test processor's, but with 4 KiB pages: the first 512 pages to themselves, `hole` absent.
fn with_small_pages(cpu: &mut Cpu, hole: u64) {
    let table = PAGES + 0x8000;
    for page in 0..512 {
        poke(cpu, table + 8 * page, if page == hole { 0u64 } else { (page << 12) | 7 });
    }
    poke(cpu, PAGES + 0x2000, table | 7);
    cpu.flush_tlb_all();
}

fn long() -> Box<Cpu> {
    cpus(Mode::Long(0), 1).remove(0)
}

fn fill(cpu: &Cpu, from: u64, bytes: &[u8]) {
    for (i, byte) in bytes.iter().enumerate() {
        poke(cpu, from + i as u64, *byte);
    }
}

fn byte(cpu: &Cpu, at: u64) -> u8 {
    let base = at & !7;
    (peek(cpu, base) >> (8 * (at - base))) as u8
}

/// Executes until the instruction is done.
fn run(cpu: &mut Cpu, bytes: &[u8]) -> Result<(), Exception> {
    let insn = crate::testing::decode(cpu, bytes);
    let start = cpu.rip;
    for _ in 0..100_000 {
        crate::system::emulate(cpu, &insn)?;
        if cpu.rip != start {
            assert_eq!(cpu.rip, start + bytes.len() as u64);
            return Ok(());
        }
        if let Some(mailbox) = cpu.shared.mailbox(0) {
            mailbox.take();
        }
    }
    panic!("it does not end");
}

/// A way to do it one element at a time.
#[test]
fn moves_equal_single_moves_in_all_sizes_directions_and_overlaps() {
    let prefixes: [(&[u8], u64); 4] =
        [(&[0xf3, 0xa4], 1), (&[0xf3, 0x66, 0xa5], 2), (&[0xf3, 0xa5], 4), (&[0xf3, 0x48, 0xa5], 8)];
    for (bytes, size) in prefixes {
        for down in [false, true] {
            for (source, target, count) in [
                (0x20000u64, 0x30000u64, 700u64),
                (0x20ff9, 0x30ffd, 1000),
                (0x20ffd, 0x20ffe, 600),
                (0x20ffe, 0x20ffd, 600),
                (0x20000, 0x20000 + size, 600),
                (0x20003, 0x20003, 5),
            ] {
                let cpu = &mut long();
                with_small_pages(cpu, 511);
                let span = count * size + 0x40;
                let low = 0x20000 - 0x4000;
                let mut wanted: Vec<u8> = (0..0x1a000u32).map(|i| (i * 7 + i / 256) as u8).collect();
                for page in 0..0x1a {
                    poke(cpu, low + page * 0x1000, &wanted[page as usize * 0x1000..][..0x1000]);
                }
                assert!(span < 0x4000);
                let at = |address: u64| (address - low) as usize;
                for i in 0..count {
                    let step = if down { (i * size).wrapping_neg() } else { i * size };
                    let (from, to) = (at(source.wrapping_add(step)), at(target.wrapping_add(step)));
                    let element = wanted[from..from + size as usize].to_vec();
                    wanted[to..to + size as usize].copy_from_slice(&element);
                }
                (cpu.gpr[RSI], cpu.gpr[RDI], cpu.gpr[RCX]) = (source, target, count);
                if down {
                    cpu.rflags |= rflags::DF;
                }
                run(cpu, bytes).unwrap();
                let moved = if down { (count * size).wrapping_neg() } else { count * size };
                assert_eq!(
                    (cpu.gpr[RSI], cpu.gpr[RDI], cpu.gpr[RCX]),
                    (source.wrapping_add(moved), target.wrapping_add(moved), 0)
                );
                let got: Vec<u8> =
                    (0..wanted.len() as u64 / 8).flat_map(|i| peek(cpu, low + 8 * i).to_le_bytes()).collect();
                let difference = got.iter().zip(&wanted).position(|(a, b)| a != b);
                assert_eq!(difference, None, "size {size} down {down} {source:#x} to {target:#x} x {count}");
            }
        }
    }
}

#[test]
fn a_fault_leaves_the_registers_at_the_element_that_faulted() {
    let cpu = &mut long();
    with_small_pages(cpu, 0x21);
    fill(cpu, 0x20ff0, &[0xaa; 16]);
    (cpu.gpr[RSI], cpu.gpr[RDI], cpu.gpr[RCX]) = (0x20ff0, 0x30000, 40);
    let fault = Exception::page_fault(0x21000, 0);
    assert_eq!(run(cpu, &[0xf3, 0xa4]), Err(fault), "rep movsb, the source");
    assert_eq!((cpu.gpr[RSI], cpu.gpr[RDI], cpu.gpr[RCX], cpu.rip), (0x21000, 0x30010, 24, CODE));
    (cpu.gpr[RSI], cpu.gpr[RDI], cpu.gpr[RCX]) = (0x30000, 0x20ff8, 5);
    let fault = Exception::page_fault(0x21000, pf::WRITE);
    assert_eq!(run(cpu, &[0xf3, 0x48, 0xa5]), Err(fault), "rep movsq, the target");
    assert_eq!((cpu.gpr[RSI], cpu.gpr[RDI], cpu.gpr[RCX]), (0x30008, 0x21000, 4));
    // An element on two pages is not stored in part.
    (cpu.gpr[RDI], cpu.gpr[RCX], cpu.gpr[RAX]) = (0x20ffc, 1, 0x1122_3344_5566_7788);
    assert_eq!(run(cpu, &[0xf3, 0x48, 0xab]), Err(fault), "rep stosq");
    assert_eq!((cpu.gpr[RDI], cpu.gpr[RCX], byte(cpu, 0x20ffc)), (0x20ffc, 1, 0xaa));
    // Downwards.
    (cpu.gpr[RSI], cpu.gpr[RDI], cpu.gpr[RCX]) = (0x22003, 0x30100, 9);
    cpu.rflags |= rflags::DF;
    assert_eq!(run(cpu, &[0xf3, 0xa4]), Err(Exception::page_fault(0x21fff, 0)));
    assert_eq!((cpu.gpr[RSI], cpu.gpr[RDI], cpu.gpr[RCX]), (0x21fff, 0x300fc, 5));
}

#[test]
fn which_operand_of_a_comparison_faults_first_is_the_processors() {
    let cpu = &mut long();
    with_small_pages(cpu, 0x21);
    (cpu.gpr[RSI], cpu.gpr[RDI], cpu.gpr[RCX]) = (0x21000, 0x21800, 5);
    let (source, target) = (Err(Exception::page_fault(0x21000, 0)), Err(Exception::page_fault(0x21800, 0)));
    // (AMD's, the target first, which it is for REPE CMPSB)
    for (amd, right_first, by_itself) in [(true, false, source), (true, true, source), (false, true, target)] {
        (cpu.features.amd, cpu.features.cmps_right_first) = (amd, right_first);
        let usual = if right_first { target } else { source };
        for cmps in [&[0xa6][..], &[0xf2, 0xa6], &[0xa7], &[0xf3, 0xa7], &[0x48, 0xa7]] {
            assert_eq!(run(cpu, cmps), usual, "{cmps:02x?}");
        }
        assert_eq!(run(cpu, &[0xf3, 0xa6]), by_itself, "repe cmpsb");
    }
}

#[test]
fn stores_and_loads() {
    let cpu = &mut long();
    (cpu.gpr[RAX], cpu.gpr[RDI], cpu.gpr[RCX]) = (0x1122_3344_5566_7788, 0x30ffe, 0x800);
    run(cpu, &[0xf3, 0x66, 0xab]).unwrap(); // rep stosw
    assert_eq!((peek(cpu, 0x31000), byte(cpu, 0x31ffd), byte(cpu, 0x31ffe)), (0x7788_7788_7788_7788, 0x77, 0));
    (cpu.gpr[RSI], cpu.gpr[RCX]) = (0x31000, 3);
    poke(cpu, 0x31008, 0xdead_beefu32);
    run(cpu, &[0xf3, 0xad]).unwrap(); // rep lodsd
    assert_eq!((cpu.gpr[RAX], cpu.gpr[RSI], cpu.gpr[RCX]), (0xdead_beef, 0x3100c, 0));
    poke(cpu, 0x3100c, 0x99u8);
    run(cpu, &[0xac]).unwrap(); // lodsb
    assert_eq!((cpu.gpr[RAX], cpu.gpr[RSI]), (0xdead_be99, 0x3100d));
}

#[test]
fn comparisons_end_where_they_differ_or_match() {
    const ZF: u64 = rflags::ZF;
    let cpu = &mut long();
    fill(cpu, 0x30ff0, b"abcdefghijklmnopqrstuvwxyz");
    fill(cpu, 0x32ff5, b"abcdefghijklmnopqrstuvWxyz");
    (cpu.gpr[RSI], cpu.gpr[RDI], cpu.gpr[RCX]) = (0x30ff0, 0x32ff5, 26);
    run(cpu, &[0xf3, 0xa6]).unwrap(); // repe cmpsb
    assert_eq!((cpu.gpr[RSI], cpu.gpr[RDI], cpu.gpr[RCX]), (0x30ff0 + 23, 0x32ff5 + 23, 3));
    // 'w' - 'W' = 0x20: no flag but none; parity odd.
    assert_eq!(cpu.rflags & rflags::STATUS, 0);
    (cpu.gpr[RDI], cpu.gpr[RCX], cpu.gpr[RAX]) = (0x30ff0, 100, u64::from(b't'));
    run(cpu, &[0xf2, 0xae]).unwrap(); // repne scasb
    assert_eq!((cpu.gpr[RDI], cpu.gpr[RCX], cpu.rflags & ZF), (0x30ff0 + 20, 80, ZF));
    // Without repetitions the flags stay.
    cpu.rflags |= rflags::STATUS;
    cpu.gpr[RCX] = 0;
    run(cpu, &[0xf3, 0xa6]).unwrap();
    assert_eq!(cpu.rflags & rflags::STATUS, rflags::STATUS);
    // To the end without a match: the last comparison's flags.
    (cpu.gpr[RDI], cpu.gpr[RCX], cpu.gpr[RAX]) = (0x30ff0, 4, u64::from(b'a') - 1);
    run(cpu, &[0xf2, 0xae]).unwrap();
    let wanted = rflags::CF | rflags::SF | rflags::AF;
    // 0x60 - 0x64 = 0xfc: six bits set, so parity too.
    assert_eq!((cpu.gpr[RCX], cpu.rflags & rflags::STATUS), (0, wanted | rflags::PF));
}

#[test]
fn flags_of_subtractions() {
    use rflags::{AF, CF, OF, PF, SF, ZF};
    let cases = [
        (0, 0, 1, ZF | PF),
        (0, 1, 1, CF | PF | AF | SF),
        (0x80, 1, 1, OF | AF),
        (0x7f, 0xff, 1, CF | SF | OF),
        (0x8000, 1, 2, OF | AF | PF),
        (0, 0x8000_0000, 4, CF | SF | OF | PF),
        (1, 1 << 63, 8, CF | SF | OF),
        (u64::MAX, u64::MAX, 8, ZF | PF),
    ];
    for (left, right, size, wanted) in cases {
        assert_eq!(subtraction_flags(left, right, size), wanted, "{left:#x} - {right:#x} ({size})");
    }
}

#[test]
fn addresses_wrap_at_their_size() {
    let cpu = &mut cpus(Mode::Real, 1)[0];
    fill(cpu, 0xfffe, &[1, 2]);
    fill(cpu, 0, &[3, 4]);
    (cpu.gpr[RSI], cpu.gpr[RDI], cpu.gpr[RCX]) = (0xabcd_fffe, 0x1234_2000, 0x5678_0004);
    run(cpu, &[0xf3, 0xa4]).unwrap();
    assert_eq!(peek(cpu, 0x2000) as u32, 0x0403_0201);
    assert_eq!((cpu.gpr[RSI], cpu.gpr[RDI], cpu.gpr[RCX]), (0xabcd_0002, 0x1234_2004, 0x5678_0000));
    // A word at 0xffff is beyond the segment.
    (cpu.gpr[RSI], cpu.gpr[RCX]) = (0xffff, 1);
    assert_eq!(run(cpu, &[0xf3, 0xa5]), Err(Exception::GP0));
    // Backwards over 0.
    fill(cpu, 0xffff, &[7]);
    (cpu.gpr[RSI], cpu.gpr[RDI], cpu.gpr[RCX]) = (1, 0x2103, 3);
    cpu.rflags |= rflags::DF;
    run(cpu, &[0xf3, 0xa4]).unwrap();
    assert_eq!((byte(cpu, 0x2101), byte(cpu, 0x2102), byte(cpu, 0x2103), cpu.gpr[RSI]), (7, 3, 4, 0xfffe));
    // 32-bit addresses in 64-bit code: the upper halves go.
    let cpu = &mut long();
    (cpu.gpr[RDI], cpu.gpr[RCX], cpu.gpr[RAX]) = (1 << 40 | 0x30000, 1 << 40 | 2, 0x55);
    run(cpu, &[0x67, 0xf3, 0xaa]).unwrap();
    assert_eq!((cpu.gpr[RDI], cpu.gpr[RCX], peek(cpu, 0x30000)), (0x30002, 0, 0x5555));
}

#[test]
fn segments_limit_and_may_be_overridden() {
    let cpu = &mut cpus(Mode::Protected(0), 1)[0];
    cpu.seg[seg::FS].base = 0x20000;
    cpu.seg[seg::ES].limit = 0x30003;
    fill(cpu, 0x20010, b"overrule");
    (cpu.gpr[RSI], cpu.gpr[RDI], cpu.gpr[RCX]) = (0x10, 0x30000, 8);
    assert_eq!(run(cpu, &[0x64, 0xf3, 0xa4]), Err(Exception::GP0), "ES ends");
    assert_eq!((cpu.gpr[RSI], cpu.gpr[RDI], cpu.gpr[RCX]), (0x14, 0x30004, 4));
    assert_eq!(peek(cpu, 0x30000) as u32, u32::from_le_bytes(*b"over"));
}

#[test]
fn others_get_their_turn_at_page_ends_and_single_steps_at_each_element() {
    let cpu = &mut long();
    let insn = crate::testing::decode(cpu, &[0xf3, 0xaa]);
    (cpu.gpr[RDI], cpu.gpr[RCX]) = (0x30000, 0x3000);
    cpu.shared.clone().mailbox(0).unwrap().request(request::KICK);
    crate::system::emulate(cpu, &insn).unwrap();
    assert_eq!((cpu.rip, cpu.gpr[RDI], cpu.gpr[RCX]), (CODE, 0x31000, 0x2000));
    assert_ne!(cpu.rflags & rflags::RF, 0, "its breakpoint is not hit again");
    cpu.shared.clone().mailbox(0).unwrap().take();
    cpu.rflags |= rflags::TF;
    crate::system::emulate(cpu, &insn).unwrap();
    assert_eq!((cpu.rip, cpu.gpr[RDI], cpu.gpr[RCX]), (CODE, 0x31001, 0x1fff));
    cpu.rflags &= !rflags::TF;
    crate::system::emulate(cpu, &insn).unwrap();
    assert_eq!((cpu.rip, cpu.gpr[RDI], cpu.gpr[RCX]), (CODE + 2, 0x33000, 0));
}

#[test]
fn devices_are_accessed_element_by_element() {
    // Beyond memory nobody answers: all ones.
    let cpu = &mut cpus(Mode::Protected(0), 1)[0];
    (cpu.gpr[RSI], cpu.gpr[RDI], cpu.gpr[RCX]) = (MEMORY, 0x30000, 3);
    run(cpu, &[0xf3, 0xa5]).unwrap();
    assert_eq!((peek(cpu, 0x30000), peek(cpu, 0x30008)), (u64::MAX, 0xffff_ffff));
}
