use purlin_arch::x86_64::regs::gpr::{RAX, RCX, RDX};

use super::*;
use crate::testing::{Mode, cpus, step};

fn processor() -> Box<Cpu> {
    cpus(Mode::Long(0), 1).remove(0)
}

#[test]
fn values_that_are_kept_and_values_that_fault() {
    const NON_CANONICAL: u64 = 1 << 47;
    const HIGH: u64 = 0xffff_8000_1234_5678;
    let cases: &[(u32, u64, Result<u64, Exception>)] = &[
        (STAR, u64::MAX, Ok(u64::MAX)),
        (LSTAR, HIGH, Ok(HIGH)),
        (LSTAR, NON_CANONICAL, Err(Exception::GP0)),
        (CSTAR, NON_CANONICAL, Err(Exception::GP0)),
        (SFMASK, 0x4_7700, Ok(0x4_7700)),
        (FS_BASE, HIGH, Ok(HIGH)),
        (FS_BASE, NON_CANONICAL, Err(Exception::GP0)),
        (GS_BASE, NON_CANONICAL, Err(Exception::GP0)),
        (KERNEL_GS_BASE, HIGH, Ok(HIGH)),
        (KERNEL_GS_BASE, NON_CANONICAL, Err(Exception::GP0)),
        (SYSENTER_CS, 0x10, Ok(0x10)),
        (TSC_AUX, 7, Ok(7)),
        (PAT, 0x0606_0105_0407_0500, Ok(0x0606_0105_0407_0500)),
        (PAT, 0x02, Err(Exception::GP0)),
        (PAT, 0x08 << 56, Err(Exception::GP0)),
        (MTRR_DEF_TYPE, 0xc06, Ok(0xc06)),
        (MTRR_DEF_TYPE, 0xc03, Err(Exception::GP0)),
        (MTRR_CAP, 0, Err(Exception::GP0)),
        (0x201, 0x800, Ok(0x800)),
        (0x26f, 0x0505_0505_0505_0505, Ok(0x0505_0505_0505_0505)),
        (0x8b, 0, Ok(if is_amd(&processor()) { MICROCODE_AMD } else { MICROCODE_INTEL })),
        (0x179, 0, Err(Exception::GP0)),
        (0xdead_beef, 0, Err(Exception::GP0)),
        (SPEC_CTRL, 0, Err(Exception::GP0)),
        (0x480, 0, Err(Exception::GP0)),
    ];
    for (index, value, wanted) in cases {
        let mut cpu = processor();
        let result = write(&mut cpu, *index, *value).and_then(|()| read(&mut cpu, *index));
        assert_eq!(result, *wanted, "{index:#x} {value:#x}");
    }
}

#[test]
fn amd_registers_that_kernels_touch() {
    let mut cpu = processor();
    if !is_amd(&cpu) {
        assert_eq!(read(&mut cpu, index::HWCR), Err(Exception::GP0));
        return;
    }
    assert_eq!(read(&mut cpu, index::HWCR), Ok(1 << 24), "the TSC runs at P0's frequency");
    write(&mut cpu, index::HWCR, 1 << 4).unwrap();
    assert_eq!(read(&mut cpu, index::HWCR), Ok(1 << 24 | 1 << 4));
    assert_eq!(read(&mut cpu, index::DE_CFG), Ok(2), "LFENCE waits");
    for index in [0xc001_0010, 0xc001_0055, 0xc001_001a, 0xc001_1005, 0xc001_1020] {
        assert_eq!(read(&mut cpu, index), Ok(0), "{index:#x}");
    }
    assert_eq!(read(&mut cpu, 0xc001_0114), Err(Exception::GP0), "VM_CR: there is no SVM");
    assert_eq!(read(&mut cpu, 0xc001_0000), Err(Exception::GP0), "no performance counters");
}

#[test]
fn efer() {
    let mut cpu = processor();
    let long = efer::LME | efer::LMA;
    assert_eq!(write(&mut cpu, EFER, efer::SCE), Err(Exception::GP0), "LME cannot change under paging");
    assert_eq!(write(&mut cpu, EFER, long | 1 << 12), Err(Exception::GP0), "no SVM");
    assert_eq!(write(&mut cpu, EFER, long | 1 << 1), Err(Exception::GP0), "reserved");
    write(&mut cpu, EFER, efer::LME | efer::NXE).unwrap();
    assert_eq!(cpu.efer, long | efer::NXE, "LMA is not for software to clear");
    let mut real = cpus(Mode::Real, 1).remove(0);
    write(&mut real, EFER, efer::LME | efer::LMA).unwrap();
    assert_eq!(real.efer, efer::LME, "nor to set");
}

#[test]
fn the_time_stamp_counter_and_its_adjustment_move_together() {
    let mut cpu = processor();
    let before = cpu.tsc();
    write(&mut cpu, TSC_ADJUST, 1 << 40).unwrap();
    assert!(cpu.tsc() - before >= 1 << 40);
    write(&mut cpu, TSC, 1000).unwrap();
    let now = read(&mut cpu, TSC).unwrap();
    assert!((1000..1_000_000_000).contains(&now), "{now}");
    let adjust = read(&mut cpu, TSC_ADJUST).unwrap();
    assert_eq!(adjust, cpu.clock.tsc_offset, "both began at 0");
    write(&mut cpu, TSC_ADJUST, 0).unwrap();
    assert_eq!(cpu.clock.tsc_offset, 0);
}

#[test]
fn the_instructions_need_privilege_level_0() {
    for (bytes, name) in [([0x0f, 0x32], "RDMSR"), ([0x0f, 0x30], "WRMSR")] {
        for mode in [Mode::Long(3), Mode::Protected(3), Mode::V86] {
            let mut cpu = cpus(mode, 1).remove(0);
            cpu.gpr[RCX] = u64::from(STAR);
            assert_eq!(step(&mut cpu, &bytes), Err(Exception::GP0), "{name} {mode:?}");
        }
    }
    let mut cpu = processor();
    (cpu.gpr[RCX], cpu.gpr[RDX], cpu.gpr[RAX]) =
        (!0 << 32 | u64::from(STAR), !0 << 32 | 0x1122_3344, !0 << 32 | 0x5566_7788);
    step(&mut cpu, &[0x0f, 0x30]).unwrap();
    assert_eq!(cpu.msrs.star, 0x1122_3344_5566_7788);
    (cpu.gpr[RDX], cpu.gpr[RAX]) = (!0, !0);
    step(&mut cpu, &[0x0f, 0x32]).unwrap();
    assert_eq!((cpu.gpr[RDX], cpu.gpr[RAX]), (0x1122_3344, 0x5566_7788));
}
