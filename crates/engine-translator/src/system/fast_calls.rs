//! SYSCALL, SYSRET, SYSENTER, SYSEXIT, and the FS and GS bases that go with them.

use iced_x86::{
    Instruction,
    Mnemonic::{Rdfsbase, Wrfsbase},
    Register,
};
use purlin_arch::x86_64::regs::{
    cr4, efer,
    gpr::{RCX, RDX, RSP},
    rflags,
    seg::{CS, FS, GS, SS},
};

use super::{Done, Flow};
use crate::{
    cpu::{Cpu, Segment, access},
    exception::Exception,
    segment::is_canonical,
};

const R11: usize = 11;

/// What the code segment that these instructions load is for.
enum Code {
    Bits32,
    Bits64,
}

impl Cpu {
    /// Loads CS and SS with the fixed flat segments of SYSCALL and its like.
    fn set_flat_segments(&mut self, cs: u16, ss: u16, cpl: u8, code: Code) {
        let common = access::P | access::S | access::RW | access::ACCESSED | access::G;
        let common = common | u32::from(cpl) << access::DPL_SHIFT;
        let size = match code {
            Code::Bits32 => access::DB,
            Code::Bits64 => access::L,
        };
        let flat = |selector, access| Segment { base: 0, limit: u32::MAX, access, selector };
        self.seg[CS] = flat(cs, common | access::CODE | size);
        // An AMD processor's SYSRET leaves SS's hidden part as it was. The flat one is what it then is for every
        // system that keeps to the manual, and its DPL is the privilege level in a saved state.
        self.seg[SS] = flat(ss, common | access::DB);
        self.cpl = cpl;
    }
}

pub fn syscall(cpu: &mut Cpu, next: u64) -> Done {
    if cpu.efer & efer::SCE == 0 || !cpu.protected() || cpu.v86() {
        return Err(Exception::UD);
    }
    if cpu.features.amd || cpu.code64() {
        syscall_enter(cpu, next);
        return Ok(Flow::Set);
    }
    // Intel has SYSCALL in 64-bit mode only.
    Err(Exception::UD)
}

fn syscall_enter(cpu: &mut Cpu, next: u64) {
    let star = cpu.msrs.star;
    let cs = (star >> 32) as u16 & !3;
    cpu.gpr[RCX] = next;
    if cpu.long_mode() {
        cpu.gpr[R11] = cpu.rflags & !rflags::RF;
        cpu.rip = if cpu.code64() { cpu.msrs.lstar } else { cpu.msrs.cstar };
        cpu.rflags = cpu.rflags & !cpu.msrs.sfmask & !rflags::RF | rflags::FIXED;
        cpu.set_flat_segments(cs, cs.wrapping_add(8), 0, Code::Bits64);
    } else {
        cpu.rip = star & 0xffff_ffff;
        cpu.rflags &= !(rflags::VM | rflags::IF | rflags::RF);
        cpu.set_flat_segments(cs, cs.wrapping_add(8), 0, Code::Bits32);
    }
}

/// `wide`: with REX.W, the return to 64-bit code.
pub fn sysret(cpu: &mut Cpu, wide: bool) -> Done {
    if cpu.efer & efer::SCE == 0 || !cpu.features.amd && !cpu.code64() {
        return Err(Exception::UD);
    }
    if !cpu.protected() || cpu.v86() || cpu.cpl != 0 {
        return Err(Exception::GP0);
    }
    // Intel checks the address here; AMD lets the fetch fault, at CPL 3.
    if wide && !cpu.features.amd && !is_canonical(cpu.gpr[RCX]) {
        return Err(Exception::GP0);
    }
    let base = (cpu.msrs.star >> 48) as u16;
    if cpu.long_mode() {
        let kept = rflags::RF | rflags::VM;
        cpu.rflags = cpu.gpr[R11] & VALID_FLAGS & !kept | rflags::FIXED;
    } else {
        cpu.rflags |= rflags::IF;
    }
    if wide {
        cpu.rip = cpu.gpr[RCX];
        cpu.set_flat_segments(base.wrapping_add(16) | 3, base.wrapping_add(8) | 3, 3, Code::Bits64);
    } else {
        cpu.rip = cpu.gpr[RCX] & 0xffff_ffff;
        cpu.set_flat_segments(base | 3, base.wrapping_add(8) | 3, 3, Code::Bits32);
    }
    Ok(Flow::Set)
}

/// The bits that RFLAGS has.
const VALID_FLAGS: u64 = 0x3f_7fd5;

pub fn sysenter(cpu: &mut Cpu) -> Done {
    check_sysenter(cpu)?;
    let cs = cpu.msrs.sysenter_cs as u16;
    if cs & !3 == 0 {
        return Err(Exception::GP0);
    }
    let long = cpu.long_mode();
    let width = if long { u64::MAX } else { 0xffff_ffff };
    cpu.rflags &= !(rflags::VM | rflags::IF | rflags::RF);
    let code = if long { Code::Bits64 } else { Code::Bits32 };
    cpu.set_flat_segments(cs & !3, (cs & !3) + 8, 0, code);
    cpu.gpr[RSP] = cpu.msrs.sysenter_esp & width;
    cpu.rip = cpu.msrs.sysenter_eip & width;
    Ok(Flow::Set)
}

pub fn sysexit(cpu: &mut Cpu, wide: bool) -> Done {
    // Other than SYSENTER: an AMD processor looks at the level before it finds that long mode has no SYSEXIT.
    if cpu.features.amd && cpu.features.sysenter && cpu.protected() {
        cpu.require_ring0()?;
    }
    check_sysenter(cpu)?;
    let cs = cpu.msrs.sysenter_cs as u16;
    if cs & !3 == 0 || cpu.cpl != 0 || cpu.v86() {
        return Err(Exception::GP0);
    }
    let (rip, rsp) = (cpu.gpr[RDX], cpu.gpr[RCX]);
    if wide {
        if !is_canonical(rip) || !is_canonical(rsp) {
            return Err(Exception::GP0);
        }
        cpu.set_flat_segments(cs.wrapping_add(32) | 3, cs.wrapping_add(40) | 3, 3, Code::Bits64);
        (cpu.rip, cpu.gpr[RSP]) = (rip, rsp);
    } else {
        cpu.set_flat_segments(cs.wrapping_add(16) | 3, cs.wrapping_add(24) | 3, 3, Code::Bits32);
        (cpu.rip, cpu.gpr[RSP]) = (rip & 0xffff_ffff, rsp & 0xffff_ffff);
    }
    Ok(Flow::Set)
}

/// AMD has SYSENTER and SYSEXIT outside of long mode only (APM vol. 3).
fn check_sysenter(cpu: &Cpu) -> Result<(), Exception> {
    if !cpu.features.sysenter || cpu.features.amd && cpu.long_mode() {
        return Err(Exception::UD);
    }
    if cpu.protected() { Ok(()) } else { Err(Exception::GP0) }
}

pub fn swapgs(cpu: &mut Cpu) -> Result<(), Exception> {
    if !cpu.code64() {
        return Err(Exception::UD);
    }
    cpu.require_ring0()?;
    std::mem::swap(&mut cpu.seg[GS].base, &mut cpu.msrs.kernel_gs_base);
    Ok(())
}

/// RDFSBASE, RDGSBASE, WRFSBASE and WRGSBASE.
pub fn segment_base(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Exception> {
    if cpu.cr4 & cr4::FSGSBASE == 0 || !cpu.code64() {
        return Err(Exception::UD);
    }
    let (register, mnemonic): (Register, _) = (insn.op_register(0), insn.mnemonic());
    let segment = if super::is_one_of(insn, &[Rdfsbase, Wrfsbase]) { FS } else { GS };
    if matches!(mnemonic, Rdfsbase | iced_x86::Mnemonic::Rdgsbase) {
        cpu.set_register(register, cpu.seg[segment].base);
        return Ok(());
    }
    let base = cpu.register(register);
    if !is_canonical(base) {
        return Err(Exception::GP0);
    }
    cpu.seg[segment].base = base;
    Ok(())
}
