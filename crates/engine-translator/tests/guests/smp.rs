//! Several processors at once: `lock`, and code that one changes for another.

use iced_x86::{IcedError, code_asm::*};

use crate::machine::*;

type Code = fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// Additions per vCPU.
const ROUNDS: u32 = 3000;

/// Four vCPUs execute `body` `ROUNDS` times each, RBX at `at`, RBP their number. Returns what they tell.
fn four_times(m: &Machine, at: u64, body: Code) -> Vec<Stop> {
    m.code(CODE, |a| {
        let mut again = a.create_label();
        a.mov(rbx, at)?;
        a.mov(r12d, ROUNDS)?;
        a.set_label(&mut again)?;
        body(a)?;
        a.dec(r12d)?;
        a.jnz(again)?;
        done(a)
    });
    let mut guests: Vec<_> = (0..4).map(|i| m.vcpu(i, |s| s.regs.gpr[5] = i.into())).collect();
    run_all(&mut guests)
}

/// Where a locked operand may lie: aligned, across a cache line, across pages that follow each other in memory, and
/// across pages that do not.
fn places(m: &Machine) -> [(u64, u64); 4] {
    let window = 0x6000_0000;
    let (first, second) = (DATA + 0x10_0000, DATA + 0x20_0000);
    m.map(window, first, pte::P | pte::W);
    m.map(window + 0x1000, second, pte::P | pte::W);
    [(DATA, 8), (DATA + 0x3c, 8), (DATA + 0x1ffc, 8), (window + 0xffc, 4)]
}

/// The eight bytes at a place.
fn value_at(m: &Machine, (at, first): (u64, u64)) -> u64 {
    if first == 8 {
        return m.peek(at);
    }
    u64::from(m.peek::<u32>(DATA + 0x10_0000 + 0xffc)) | u64::from(m.peek::<u32>(DATA + 0x20_0000)) << 32
}

#[test]
fn locked_additions_are_all_there() {
    let bodies: [(&str, Code); 5] = [
        ("lock add", |a| a.lock().add(qword_ptr(rbx), 0x7fff_ffff)),
        ("lock sub", |a| a.lock().sub(qword_ptr(rbx), -0x7fff_ffff)),
        ("lock xadd", |a| {
            a.mov(eax, 0x7fff_ffff)?;
            a.lock().xadd(qword_ptr(rbx), rax)
        }),
        ("lock cmpxchg", |a| {
            let mut again = a.create_label();
            a.mov(rax, qword_ptr(rbx))?;
            a.set_label(&mut again)?;
            a.mov(rcx, rax)?;
            a.add(rcx, 0x7fff_ffff)?;
            a.lock().cmpxchg(qword_ptr(rbx), rcx)?;
            a.jnz(again)
        }),
        ("lock inc and dec", |a| {
            a.lock().inc(qword_ptr(rbx))?;
            a.lock().add(qword_ptr(rbx), 0x7fff_ffff)?;
            a.lock().dec(qword_ptr(rbx))
        }),
    ];
    for (name, body) in bodies {
        for place in 0..4 {
            let m = Machine::new(4);
            let place = places(&m)[place];
            for stop in four_times(&m, place.0, body) {
                assert!(matches!(stop, Stop::Done(_)), "{stop:?}");
            }
            assert_eq!(value_at(&m, place), 4 * u64::from(ROUNDS) * 0x7fff_ffff, "{name} at {:#x}", place.0);
        }
    }
}

#[test]
fn sixteen_bytes_are_exchanged_at_once() {
    let m = Machine::new(4);
    let stops = four_times(&m, DATA, |a| {
        let mut again = a.create_label();
        a.mov(r15, rbx)?;
        a.mov(rax, qword_ptr(rbx))?;
        a.mov(rdx, qword_ptr(rbx + 8))?;
        a.set_label(&mut again)?;
        a.mov(rcx, rdx)?;
        a.mov(rbx, rax)?;
        a.add(rbx, 1)?;
        a.sub(rcx, 1)?;
        a.lock().cmpxchg16b(xmmword_ptr(r15))?;
        a.jnz(again)?;
        a.mov(rbx, r15)
    });
    assert!(stops.iter().all(|s| matches!(s, Stop::Done(_))), "{stops:?}");
    let n = 4 * u64::from(ROUNDS);
    assert_eq!((m.peek::<u64>(DATA), m.peek::<u64>(DATA + 8)), (n, n.wrapping_neg()));
}

#[test]
fn bits_are_set_once() {
    // Each bit of a map is set by exactly one; all count what they have set.
    let m = Machine::new(4);
    let stops = four_times(&m, DATA, |a| {
        a.lea(rcx, r12 - 1)?;
        a.lock().bts(qword_ptr(rbx), rcx)?;
        a.cmc()?;
        a.adc(r13d, 0)?;
        a.mov(eax, r13d)
    });
    let sum: u32 = stops.iter().map(|s| if let Stop::Done(n) = s { *n } else { panic!("{s:?}") }).sum();
    assert_eq!(sum, ROUNDS);
}

#[test]
fn a_spin_lock_of_xchg_keeps_a_plain_counter() {
    let m = Machine::new(4);
    let stops = four_times(&m, DATA, |a| {
        let (mut again, mut got) = (a.create_label(), a.create_label());
        // The loop around this has a label here already.
        a.nop()?;
        a.set_label(&mut again)?;
        a.mov(eax, 1)?;
        a.xchg(dword_ptr(rbx), eax)?;
        a.test(eax, eax)?;
        a.jz(got)?;
        a.pause()?;
        a.jmp(again)?;
        a.set_label(&mut got)?;
        a.mov(rax, qword_ptr(rbx + 0x100))?;
        a.add(rax, 1)?;
        a.mov(qword_ptr(rbx + 0x100), rax)?;
        a.mov(dword_ptr(rbx), 0)
    });
    assert!(stops.iter().all(|s| matches!(s, Stop::Done(_))), "{stops:?}");
    assert_eq!(m.peek::<u64>(DATA + 0x100), 4 * u64::from(ROUNDS));
}

// --- cross-modifying code

/// PAUSE, and now and then an exit that lets the host run another vCPU. Counts in R13.
pub fn relax(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut on = a.create_label();
    a.pause()?;
    a.inc(r13b)?;
    a.jnz(on)?;
    a.out(u32::from(YIELD), al)?;
    a.set_label(&mut on)?;
    a.nop()
}

/// SDM vol. 3A 8.1.3: the writer stores the new code, then a flag; the other waits for the flag, serialises, and
/// executes the new code.
#[test]
fn code_changed_for_another_processor() {
    const CHANGES: u32 = 1000;
    for function in [CODE + 0x1_0000, CODE + 0x1_0ffd, CODE + 0x1_0fff] {
        let m = Machine::new(2);
        m.load(function, &[0xb8, 0, 0, 0, 0, 0xc3]);
        let (flag, answer) = (DATA, DATA + 64);
        m.code(CODE, |a| {
            let (mut again, mut wait) = (a.create_label(), a.create_label());
            a.mov(rbx, function)?;
            a.mov(rdi, flag)?;
            a.mov(rsi, answer)?;
            a.xor(eax, eax)?;
            a.set_label(&mut again)?;
            a.inc(eax)?;
            a.mov(dword_ptr(rbx + 1), eax)?;
            a.mov(dword_ptr(rdi), eax)?;
            a.set_label(&mut wait)?;
            relax(a)?;
            a.cmp(dword_ptr(rsi), eax)?;
            a.jne(wait)?;
            a.cmp(eax, CHANGES as i32)?;
            a.jne(again)?;
            done(a)
        });
        m.code(CODE + 0x1000, |a| {
            let (mut again, mut wait, mut wrong) = (a.create_label(), a.create_label(), a.create_label());
            a.mov(r8, function)?;
            a.mov(rdi, flag)?;
            a.mov(rsi, answer)?;
            a.xor(r9d, r9d)?;
            a.set_label(&mut again)?;
            a.inc(r9d)?;
            a.set_label(&mut wait)?;
            relax(a)?;
            a.cmp(dword_ptr(rdi), r9d)?;
            a.jne(wait)?;
            a.xor(eax, eax)?;
            a.cpuid()?;
            a.call(r8)?;
            a.cmp(eax, r9d)?;
            a.jne(wrong)?;
            a.mov(dword_ptr(rsi), eax)?;
            a.cmp(eax, CHANGES as i32)?;
            a.jne(again)?;
            done(a)?;
            a.set_label(&mut wrong)?;
            a.ud2()
        });
        let mut guests = vec![m.vcpu(0, |_| {}), m.vcpu(1, |s| s.regs.rip = CODE + 0x1000)];
        assert_eq!(run_all(&mut guests), [Stop::Done(CHANGES); 2], "{function:#x}");
    }
}

/// Unsynchronised, but each change is one aligned store: the other executes the old or the new code, and in the end
/// the new.
#[test]
fn code_changed_under_another_processor() {
    let m = Machine::new(4);
    let function = CODE + 0x1_0003;
    m.load(function, &[0xb8, 0, 0, 0, 0, 0xc3]);
    m.code(CODE, |a| {
        let mut again = a.create_label();
        a.mov(rbx, function)?;
        a.xor(eax, eax)?;
        a.set_label(&mut again)?;
        a.inc(eax)?;
        a.mov(dword_ptr(rbx + 1), eax)?;
        a.cmp(eax, 4000)?;
        a.jne(again)?;
        done(a)
    });
    m.code(CODE + 0x1000, |a| {
        let (mut again, mut wrong) = (a.create_label(), a.create_label());
        a.mov(r8, function)?;
        a.xor(ecx, ecx)?;
        a.set_label(&mut again)?;
        a.call(r8)?;
        a.cmp(eax, ecx)?;
        a.jb(wrong)?;
        a.mov(ecx, eax)?;
        a.cmp(eax, 4000)?;
        a.jne(again)?;
        done(a)?;
        a.set_label(&mut wrong)?;
        a.ud2()
    });
    let mut guests: Vec<_> =
        (0..4).map(|i| m.vcpu(i, |s| s.regs.rip = if i == 0 { CODE } else { CODE + 0x1000 })).collect();
    assert_eq!(run_all(&mut guests), [Stop::Done(4000); 4]);
}
