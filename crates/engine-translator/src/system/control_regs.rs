//! Control and debug registers, and the privileged instructions about caches and translations.

use iced_x86::{Instruction, Register};
use purlin_arch::x86_64::{
    regs::{
        cr0, cr4, efer,
        gpr::{RAX, RCX, RDX},
        xcr0,
    },
    state::Activity,
};

use crate::{
    cpu::Cpu,
    debug::{dr6, dr7},
    exception::Exception,
    mem::Access,
    segment::is_canonical,
};

/// Bits of CR0 that exist. The others of the low half are ignored, those of the high half must be zero.
const CR0_VALID: u64 =
    cr0::PE | cr0::MP | cr0::EM | cr0::TS | cr0::ET | cr0::NE | cr0::WP | cr0::AM | cr0::NW | cr0::CD | cr0::PG;

/// MOV CR3 with this bit set keeps translations of the PCID (SDM vol. 3A 4.10.4.1).
const CR3_NO_FLUSH: u64 = 1 << 63;

/// MOV to or from a control register.
pub fn mov_cr(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Exception> {
    let load = insn.op_register(0).is_cr();
    let register = insn.op_register(if load { 0 } else { 1 });
    if !matches!(register, Register::CR0 | Register::CR2 | Register::CR3 | Register::CR4 | Register::CR8) {
        return Err(Exception::UD);
    }
    cpu.require_ring0()?;
    if !load {
        let value = match register {
            Register::CR0 => cpu.cr0,
            Register::CR2 => cpu.cr2,
            Register::CR3 => cpu.cr3,
            Register::CR4 => cpu.cr4,
            _ => u64::from(cpu.lapic.tpr() >> 4),
        };
        return cpu.write_op(insn, 0, value);
    }
    let value = cpu.read_op(insn, 1)?;
    match register {
        Register::CR0 => set_cr0(cpu, value),
        Register::CR2 => {
            cpu.cr2 = value;
            Ok(())
        }
        Register::CR3 => set_cr3(cpu, value),
        Register::CR4 => set_cr4(cpu, value),
        _ if value > 15 => Err(Exception::GP0),
        _ => {
            crate::lapic::set_tpr(cpu, (value as u8) << 4);
            Ok(())
        }
    }
}

/// MOV to CR0, and LMSW (SDM vol. 3A 2.5, 4.1, 9.8.5).
fn set_cr0(cpu: &mut Cpu, value: u64) -> Result<(), Exception> {
    let has = |bit: u64| value & bit != 0;
    if value >> 32 != 0 || has(cr0::PG) && !has(cr0::PE) || has(cr0::NW) && !has(cr0::CD) {
        return Err(Exception::GP0);
    }
    let new = value & CR0_VALID | cr0::ET;
    let (turned_on, turned_off) = (new & !cpu.cr0, cpu.cr0 & !new);
    let mut lma = cpu.efer & efer::LMA;
    if turned_on & cr0::PG != 0 {
        if cpu.efer & efer::LME != 0 {
            // CS.L cannot be set yet, or 64-bit mode would begin with this instruction.
            let long_cs = cpu.seg[purlin_arch::x86_64::regs::seg::CS].access & crate::cpu::access::L != 0;
            if cpu.cr4 & cr4::PAE == 0 || long_cs {
                return Err(Exception::GP0);
            }
            lma = efer::LMA;
        } else if cpu.cr4 & cr4::PAE != 0 {
            cpu.pdptes = cpu.load_pdptes(cpu.cr3)?;
        }
    }
    if turned_off & cr0::PG != 0 {
        if cpu.code64() || cpu.cr4 & cr4::PCIDE != 0 {
            return Err(Exception::GP0);
        }
        lma = 0;
    }
    cpu.cr0 = new;
    cpu.efer = cpu.efer & !efer::LMA | lma;
    if (turned_on | turned_off) & (cr0::PG | cr0::WP | cr0::PE) != 0 {
        cpu.flush_tlb_all();
    }
    Ok(())
}

fn set_cr3(cpu: &mut Cpu, value: u64) -> Result<(), Exception> {
    let mut value = value;
    if cpu.long_mode() {
        let mut reserved = cpu.features.reserved_physical() | 0xfff << 52;
        if cpu.cr4 & cr4::PCIDE != 0 {
            reserved &= !CR3_NO_FLUSH;
        }
        if value & reserved != 0 {
            return Err(Exception::GP0);
        }
        // The TLB holds one address space at a time, so it is flushed even where it need not be.
        value &= !CR3_NO_FLUSH;
    } else {
        value &= 0xffff_ffff;
        if cpu.paging() && cpu.cr4 & cr4::PAE != 0 {
            cpu.pdptes = cpu.load_pdptes(value)?;
        }
    }
    cpu.cr3 = value;
    cpu.flush_tlb_non_global();
    Ok(())
}

fn set_cr4(cpu: &mut Cpu, value: u64) -> Result<(), Exception> {
    if value & !cpu.features.cr4 != 0 {
        return Err(Exception::GP0);
    }
    let (turned_on, turned_off) = (value & !cpu.cr4, cpu.cr4 & !value);
    if cpu.long_mode() && turned_off & cr4::PAE != 0 {
        return Err(Exception::GP0);
    }
    if turned_on & cr4::PCIDE != 0 && (!cpu.long_mode() || cpu.cr3 & 0xfff != 0) {
        return Err(Exception::GP0);
    }
    let changed = turned_on | turned_off;
    let paging = changed & (cr4::PSE | cr4::PAE | cr4::PGE | cr4::SMEP | cr4::SMAP | cr4::PCIDE);
    if cpu.paging() && !cpu.long_mode() && value & cr4::PAE != 0 && paging != 0 {
        cpu.pdptes = cpu.load_pdptes(cpu.cr3)?;
    }
    cpu.cr4 = value;
    if paging != 0 {
        cpu.flush_tlb_all();
    }
    Ok(())
}

/// LMSW: the four low bits of CR0, of which PE can be set but not cleared.
pub fn lmsw(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Exception> {
    cpu.require_ring0()?;
    let value = cpu.read_op(insn, 0)? & 15;
    set_cr0(cpu, cpu.cr0 & !(cr0::MP | cr0::EM | cr0::TS) | value)
}

pub fn clts(cpu: &mut Cpu) -> Result<(), Exception> {
    cpu.require_ring0()?;
    cpu.cr0 &= !cr0::TS;
    Ok(())
}

pub fn hlt(cpu: &mut Cpu) -> Result<(), Exception> {
    cpu.require_ring0()?;
    cpu.activity = Activity::Halted;
    Ok(())
}

/// MOV to or from a debug register (SDM vol. 3B 17.2).
pub fn mov_dr(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Exception> {
    let load = insn.op_register(0).is_dr();
    // Before DR4 and DR5 are undefined.
    cpu.require_ring0()?;
    let number = match insn.op_register(if load { 0 } else { 1 }).number() {
        number @ (4 | 5) if cpu.cr4 & cr4::DE == 0 => number + 2,
        number @ (0..=3 | 6 | 7) => number,
        _ => return Err(Exception::UD),
    };
    if cpu.dr7 & dr7::GD != 0 {
        return Err(Exception::debug(dr6::BD));
    }
    if !load {
        let value = match number {
            6 => cpu.dr6,
            7 => cpu.dr7,
            n => cpu.dr[n],
        };
        return cpu.write_op(insn, 0, value);
    }
    let value = cpu.read_op(insn, 1)?;
    if number >= 6 && value >> 32 != 0 {
        return Err(Exception::GP0);
    }
    match number {
        6 => cpu.dr6 = value & dr6::WRITABLE | dr6::FIXED,
        7 => cpu.dr7 = value & dr7::WRITABLE | dr7::FIXED,
        n => cpu.dr[n] = value,
    }
    Ok(())
}

pub fn invlpg(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Exception> {
    cpu.require_ring0()?;
    let (seg, offset) = cpu.effective_address(insn);
    let address = if cpu.code64() {
        let fs_gs = seg >= purlin_arch::x86_64::regs::seg::FS;
        offset.wrapping_add(if fs_gs { cpu.seg[seg].base } else { 0 })
    } else {
        offset.wrapping_add(cpu.seg[seg].base) & 0xffff_ffff
    };
    // For an address that is not canonical, nothing is there to forget.
    if is_canonical(address) {
        cpu.flush_tlb_page(address);
    }
    Ok(())
}

/// INVPCID (SDM vol. 2). The TLB holds one address space, so each type flushes it.
pub fn invpcid(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Exception> {
    if !cpu.features.invpcid || cpu.v86() {
        return Err(Exception::UD);
    }
    cpu.require_ring0()?;
    let kind = cpu.read_op(insn, 0)?;
    let address = cpu.mem_linear(insn, 1, 16, Access::Read)?;
    let (pcid, linear) = (cpu.load::<u64>(address)?, cpu.load::<u64>(address.wrapping_add(8))?);
    let one_address = kind == 0;
    let bad_pcid = pcid >> 12 != 0 || kind <= 1 && pcid != 0 && cpu.cr4 & cr4::PCIDE == 0;
    if kind > 3 || bad_pcid || one_address && !is_canonical(linear) {
        return Err(Exception::GP0);
    }
    cpu.flush_tlb_all();
    Ok(())
}

pub fn xgetbv(cpu: &mut Cpu) -> Result<(), Exception> {
    if cpu.cr4 & cr4::OSXSAVE == 0 {
        return Err(Exception::UD);
    }
    let value = match cpu.gpr[RCX] as u32 {
        0 => cpu.xcr0,
        1 if cpu.features.xgetbv1 => cpu.xcr0 & components_in_use(cpu),
        _ => return Err(Exception::GP0),
    };
    cpu.gpr[RAX] = value & 0xffff_ffff;
    cpu.gpr[RDX] = value >> 32;
    Ok(())
}

/// XINUSE: the components that are not in their initial state.
fn components_in_use(cpu: &Cpu) -> u64 {
    let mut xstate_bv = [0; 8];
    xstate_bv.copy_from_slice(&cpu.xstate.area[512..520]);
    u64::from_le_bytes(xstate_bv)
}

pub fn xsetbv(cpu: &mut Cpu) -> Result<(), Exception> {
    if cpu.cr4 & cr4::OSXSAVE == 0 {
        return Err(Exception::UD);
    }
    cpu.require_ring0()?;
    let value = cpu.gpr[RAX] & 0xffff_ffff | cpu.gpr[RDX] << 32;
    if cpu.gpr[RCX] as u32 != 0 || !is_valid_xcr0(value, cpu.features.xcr0) {
        return Err(Exception::GP0);
    }
    cpu.xcr0 = value;
    Ok(())
}

/// SDM vol. 1 13.3: x87 always; AVX with SSE; the three of AVX-512 together, with AVX.
fn is_valid_xcr0(value: u64, offered: u64) -> bool {
    let has = |bits: u64| value & bits == bits;
    value & !offered == 0
        && has(xcr0::X87)
        && (!has(xcr0::AVX) || has(xcr0::SSE))
        && (value & xcr0::AVX512 == 0 || has(xcr0::AVX512 | xcr0::AVX))
}
