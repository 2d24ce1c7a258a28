use purlin_arch::x86_64::regs::seg::DS;

use super::*;
use crate::testing::{Mode, cpu};

/// SDM vol. 3A table 9-1.
#[test]
fn after_power_up() {
    let shared = cpu(Mode::Real).shared.clone();
    let cpu = Box::new(Cpu::new(shared, 0, cpu(Mode::Real).cpuid.clone()));
    assert_eq!((cpu.rflags, cpu.rip, cpu.cr0), (2, 0xfff0, 0x6000_0010));
    assert_eq!((cpu.cr2, cpu.cr3, cpu.cr4, cpu.efer, cpu.xcr0), (0, 0, 0, 0, 1));
    assert_eq!((cpu.dr6, cpu.dr7), (0xffff_0ff0, 0x400));
    let code = cpu.seg[CS];
    assert_eq!((code.selector, code.base, code.limit), (0xf000, 0xffff_0000, 0xffff));
    let data = cpu.seg[DS];
    assert_eq!((data.selector, data.base, data.limit, data.access), (0, 0, 0xffff, 0x93));
    assert_eq!(cpu.gdtr, Table { base: 0, limit: 0xffff });
    assert_eq!(cpu.gpr[RDX], 0x00a1_0f11);
    assert_eq!(cpu.activity, Activity::Running);
}

#[test]
fn application_processors_wait_for_sipi() {
    let boot = cpu(Mode::Real);
    let mut cpu = Box::new(Cpu::new(boot.shared.clone(), 1, boot.cpuid.clone()));
    assert_eq!(cpu.activity, Activity::WaitForSipi);
    sipi(&mut cpu, 0x9a);
    assert_eq!((cpu.seg[CS].selector, cpu.seg[CS].base, cpu.rip), (0x9a00, 0x9_a000, 0));
    assert_eq!(cpu.activity, Activity::Running);
    // A second one is ignored.
    sipi(&mut cpu, 0x10);
    assert_eq!(cpu.seg[CS].selector, 0x9a00);
}

#[test]
fn init_keeps_what_it_must() {
    let mut cpu = cpu(Mode::Long(3));
    cpu.index = 1;
    cpu.cr0 |= cr0::CD;
    cpu.cr0 &= !cr0::NW;
    cpu.xcr0 = 7;
    cpu.msrs.lstar = 0x1234;
    cpu.xstate.area[32] = 0x55;
    cpu.dr[0] = 5;
    init(&mut cpu);
    assert_eq!(cpu.cr0, 0x4000_0010);
    assert_eq!((cpu.xcr0, cpu.msrs.lstar, cpu.xstate.area[32]), (7, 0x1234, 0x55));
    assert_eq!((cpu.cpl, cpu.efer, cpu.dr[0], cpu.rip), (0, 0, 0, 0xfff0));
    assert_eq!(cpu.activity, Activity::WaitForSipi);
    assert!(!cpu.long_mode() && !cpu.code64());
}
