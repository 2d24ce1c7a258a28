//! Instructions about the processor itself: CPUID, time stamps, model-specific registers, random numbers.

use iced_x86::Instruction;
use purlin_arch::x86_64::{
    cpuid::{Vendor, lookup, vendor},
    regs::{
        cr4,
        gpr::{RAX, RBX, RCX, RDX},
        rflags,
    },
};

use crate::{cpu::Cpu, exception::Exception, msr, xstate::Layout};

/// Bits of CPUID leaf 1 that follow the state of the processor.
const OSXSAVE: u32 = 1 << 27;
const APIC: u32 = 1 << 9;

/// CPUID.
pub(super) fn cpuid(cpu: &mut Cpu) {
    let (leaf, subleaf) = (cpu.gpr[RAX] as u32, cpu.gpr[RCX] as u32);
    let values = answer(cpu, leaf, subleaf);
    for (register, value) in [RAX, RBX, RCX, RDX].into_iter().zip(values) {
        cpu.gpr[register] = u64::from(value);
    }
}

/// What CPUID answers now: the table, with what follows from control registers and the local APIC.
fn answer(cpu: &Cpu, leaf: u32, subleaf: u32) -> [u32; 4] {
    let leaf = known_leaf(cpu, leaf);
    let [mut eax, mut ebx, mut ecx, mut edx] = lookup(&cpu.cpuid, leaf, subleaf);
    match (leaf, subleaf) {
        (1, _) => {
            if cpu.cr4 & cr4::OSXSAVE != 0 {
                ecx |= OSXSAVE;
            }
            if !cpu.lapic.enabled() {
                edx &= !APIC;
            }
        }
        // The area's size for what is enabled.
        (0xd, 0) if eax != 0 => ebx = Layout::of(&cpu.cpuid).standard_size(cpu.xcr0) as u32,
        (0xd, 1) if eax != 0 => ebx = Layout::of(&cpu.cpuid).compacted_size(cpu.xcr0) as u32,
        // Levels that are not there: the sub-leaf and the ID all the same.
        (0xb, 3..) => (eax, ebx, ecx, edx) = (0, 0, subleaf & 0xff, cpu.index),
        (0x8000_0001, _) if vendor(&cpu.cpuid) == Vendor::Amd && !cpu.lapic.enabled() => edx &= !APIC,
        _ => {}
    }
    [eax, ebx, ecx, edx]
}

/// Above the highest leaf of its range Intel's processors answer with the highest basic leaf, AMD's with zeros.
fn known_leaf(cpu: &Cpu, leaf: u32) -> u32 {
    let max_basic = lookup(&cpu.cpuid, 0, 0)[0];
    let beyond = match leaf {
        0..0x4000_0000 => leaf > max_basic,
        0x4000_0000..0x8000_0000 => leaf > lookup(&cpu.cpuid, 0x4000_0000, 0)[0],
        _ => leaf > lookup(&cpu.cpuid, 0x8000_0000, 0)[0],
    };
    if beyond && vendor(&cpu.cpuid) == Vendor::Intel { max_basic } else { leaf }
}

/// CR4.TSD keeps the time stamp from all but the highest privilege level.
fn check_time_stamp(cpu: &Cpu) -> Result<(), Exception> {
    if cpu.cr4 & cr4::TSD != 0 && cpu.cpl != 0 { Err(Exception::GP0) } else { Ok(()) }
}

/// RDTSC.
pub(super) fn rdtsc(cpu: &mut Cpu) -> Result<(), Exception> {
    check_time_stamp(cpu)?;
    let tsc = cpu.tsc();
    cpu.set_edx_eax(tsc);
    Ok(())
}

/// RDTSCP.
pub(super) fn rdtscp(cpu: &mut Cpu) -> Result<(), Exception> {
    if lookup(&cpu.cpuid, 0x8000_0001, 0)[3] & 1 << 27 == 0 {
        return Err(Exception::UD);
    }
    rdtsc(cpu)?;
    cpu.gpr[RCX] = u64::from(cpu.msrs.tsc_aux);
    Ok(())
}

/// RDPID.
pub(super) fn rdpid(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Exception> {
    if lookup(&cpu.cpuid, 7, 0)[2] & 1 << 22 == 0 {
        return Err(Exception::UD);
    }
    cpu.set_register(insn.op_register(0), u64::from(cpu.msrs.tsc_aux));
    Ok(())
}

/// RDPMC: there is no counter.
pub(super) fn rdpmc() -> Result<(), Exception> {
    Err(Exception::GP0)
}

/// RDMSR.
pub(super) fn rdmsr(cpu: &mut Cpu) -> Result<(), Exception> {
    cpu.require_ring0()?;
    let value = msr::read(cpu, cpu.gpr[RCX] as u32)?;
    cpu.set_edx_eax(value);
    Ok(())
}

/// WRMSR.
pub(super) fn wrmsr(cpu: &mut Cpu) -> Result<(), Exception> {
    cpu.require_ring0()?;
    let value = cpu.gpr[RAX] & 0xffff_ffff | cpu.gpr[RDX] << 32;
    msr::write(cpu, cpu.gpr[RCX] as u32, value)
}

/// RDRAND and RDSEED: numbers from the host's generator.
pub(super) fn random(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Exception> {
    let offered = match insn.mnemonic() {
        iced_x86::Mnemonic::Rdrand => lookup(&cpu.cpuid, 1, 0)[2] & 1 << 30,
        _ => lookup(&cpu.cpuid, 7, 0)[1] & 1 << 18,
    };
    if offered == 0 {
        return Err(Exception::UD);
    }
    let mut bytes = [0; 8];
    let filled = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    // Without a number the destination is zero and CF clear: software tries again.
    let value = filled.ok().filter(|n| *n == bytes.len()).map(|_| u64::from_le_bytes(bytes));
    cpu.set_register(insn.op_register(0), value.unwrap_or(0));
    cpu.rflags = cpu.rflags & !rflags::STATUS | if value.is_some() { rflags::CF } else { 0 };
    Ok(())
}

impl Cpu {
    fn set_edx_eax(&mut self, value: u64) {
        self.gpr[RAX] = value & 0xffff_ffff;
        self.gpr[RDX] = value >> 32;
    }
}

#[cfg(test)]
mod tests;
