//! Refills of the TLB by the thousand, in the midst of vector code: they save a part of the vector registers only.

use iced_x86::code_asm::*;
use purlin_arch::x86_64::regs::gpr::{RCX, RDI};

use crate::machine::*;

/// More pages than lists of TLB entries are long.
const PAGES: u64 = 20_000;
const WINDOW: u64 = 0x8000_0000;
/// Sixteen times these bytes.
const PATTERN: u64 = 0x0123_4567_89ab_cdef;

#[test]
fn vector_registers_outlive_any_number_of_refills() {
    if !std::is_x86_feature_detected!("avx") {
        return;
    }
    let m = Machine::new(1);
    // All on a few frames: what is on the page does not matter.
    (0..PAGES).for_each(|n| m.map(WINDOW + 0x1000 * n, DATA + 0x1000 * (n % 16), pte::P | pte::W));
    (0..8).for_each(|n| m.poke(DATA + 0x2_0000 + 8 * n, PATTERN + n));
    m.code(CODE, |a| {
        let (mut page, mut wrong) = (a.create_label(), a.create_label());
        a.mov(rbx, DATA + 0x2_0000)?;
        a.vmovdqu(ymm0, ymmword_ptr(rbx))?;
        a.mov(r8, qword_ptr(rbx + 24))?;
        a.set_label(&mut page)?;
        a.vmovdqu(ymmword_ptr(rdi), ymm0)?;
        a.cmp(qword_ptr(rdi + 24), r8)?;
        a.jne(wrong)?;
        a.add(rdi, 0x1000)?;
        a.dec(rcx)?;
        a.jnz(page)?;
        a.set_label(&mut wrong)?;
        a.mov(eax, ecx)?;
        done(a)
    });
    let mut guest = m.vcpu(0, |s| (s.regs.gpr[RDI], s.regs.gpr[RCX]) = (WINDOW, PAGES));
    assert_eq!(guest.run(), Stop::Done(0), "so many pages were left when a vector was wrong");
}
