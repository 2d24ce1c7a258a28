use super::*;
use crate::{
    exception::Exception,
    testing::{Mode, cpus, step},
};

const CPUID: &[u8] = &[0x0f, 0xa2];
const RDTSC: &[u8] = &[0x0f, 0x31];
const RDTSCP: &[u8] = &[0x0f, 0x01, 0xf9];

fn ask(cpu: &mut Cpu, leaf: u32, subleaf: u32) -> [u64; 4] {
    cpu.gpr[RAX] = 0xffff_ffff_0000_0000 | u64::from(leaf);
    cpu.gpr[RCX] = 0xffff_ffff_0000_0000 | u64::from(subleaf);
    step(cpu, CPUID).unwrap();
    [cpu.gpr[RAX], cpu.gpr[RBX], cpu.gpr[RCX], cpu.gpr[RDX]]
}

#[test]
fn cpuid_follows_the_processors_state() {
    let mut all = cpus(Mode::Long(3), 4);
    let cpu = &mut all[2];
    assert_eq!(ask(cpu, 1, 0)[1] >> 24, 2, "the APIC ID");
    assert_eq!(ask(cpu, 1, 0)[2] & u64::from(OSXSAVE), 0);
    cpu.cr4 |= cr4::OSXSAVE;
    assert_ne!(ask(cpu, 1, 0)[2] & u64::from(OSXSAVE), 0);
    assert_ne!(ask(cpu, 1, 0)[3] & u64::from(APIC), 0);
    msr::write(cpu, 0x1b, 0xfee0_0000).unwrap();
    assert_eq!(ask(cpu, 1, 0)[3] & u64::from(APIC), 0);
    // The XSAVE area: 512 bytes, the header, and 256 bytes of AVX.
    cpu.xcr0 = 1;
    assert_eq!(ask(cpu, 0xd, 0)[1], 576);
    cpu.xcr0 = 7;
    assert_eq!((ask(cpu, 0xd, 0)[1], ask(cpu, 0xd, 1)[1]), (832, 832));
    assert_eq!(ask(cpu, 0xb, 9), [0, 0, 9, 2]);
}

#[test]
fn leaves_that_are_not_there() {
    let cpu = &mut cpus(Mode::Protected(0), 1)[0];
    let beyond = ask(cpu, 0x17, 0);
    match vendor(&cpu.cpuid) {
        Vendor::Intel => assert_eq!(beyond, ask(cpu, 0x16, 0)),
        Vendor::Amd => assert_eq!(beyond, [0; 4]),
    }
    assert_eq!(ask(cpu, 5, 0), [0; 4], "MONITOR");
}

#[test]
fn time_stamps() {
    let cpu = &mut cpus(Mode::Long(3), 1)[0];
    cpu.set_tsc(1 << 33);
    step(cpu, RDTSC).unwrap();
    assert_eq!(cpu.gpr[RDX], 2);
    cpu.msrs.tsc_aux = 0x123;
    step(cpu, RDTSCP).unwrap();
    assert_eq!((cpu.gpr[RDX], cpu.gpr[RCX]), (2, 0x123));
    cpu.cr4 |= cr4::TSD;
    assert_eq!(step(cpu, RDTSC), Err(Exception::GP0));
    assert_eq!(step(cpu, RDTSCP), Err(Exception::GP0));
    let cpu = &mut cpus(Mode::Long(0), 1)[0];
    cpu.cr4 |= cr4::TSD;
    assert_eq!(step(cpu, RDTSC), Ok(()));
    assert_eq!(step(cpu, &[0x0f, 0x33]), Err(Exception::GP0), "RDPMC");
}

#[test]
fn random_numbers() {
    let cpu = &mut cpus(Mode::Long(3), 1)[0];
    let mut seen = 0;
    for _ in 0..20 {
        cpu.rflags |= rflags::STATUS;
        step(cpu, &[0x48, 0x0f, 0xc7, 0xf0]).unwrap(); // rdrand rax
        assert_eq!(cpu.rflags & rflags::STATUS, rflags::CF);
        seen |= cpu.gpr[RAX];
    }
    assert!(seen.count_ones() > 60, "{seen:#x}");
    cpu.gpr[RBX] = u64::MAX;
    step(cpu, &[0x66, 0x0f, 0xc7, 0xfb]).unwrap(); // rdseed bx
    assert_eq!(cpu.gpr[RBX] >> 16, u64::MAX >> 16, "16 bits of it");
}
