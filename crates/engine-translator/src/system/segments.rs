//! Segment registers, descriptor tables, and instructions that ask about descriptors.

use iced_x86::{
    Instruction,
    Mnemonic::{Lar, Lds, Les, Lfs, Lgdt, Lgs, Lsl, Sgdt, Sldt, Smsw, Str, Verr},
    OpKind,
};
use purlin_arch::x86_64::regs::{
    cr4, rflags,
    seg::{CS, DS, ES, FS, GS, SS},
};

use crate::{
    cpu::{Cpu, Segment, Table},
    descriptor::{Descriptor, is_null, rpl, system_type},
    exception::Exception,
    mem::Access,
    operand::segment_index,
    segment::is_canonical,
};

/// MOV to or from a segment register.
pub fn mov(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Exception> {
    let target = insn.op_register(0);
    if insn.op_kind(0) != OpKind::Register || !target.is_segment_register() {
        let selector = cpu.read_op(insn, 1)?;
        return cpu.write_op(insn, 0, selector);
    }
    let segment = segment_index(target);
    if segment == CS {
        return Err(Exception::UD);
    }
    let selector = cpu.read_op(insn, 1)? as u16;
    cpu.load_segment(segment, selector)?;
    cpu.mov_ss_shadow = segment == SS;
    Ok(())
}

/// A far pointer in memory: offset and selector, two accesses. `size` is that of the offset.
pub fn read_far_pointer(cpu: &mut Cpu, insn: &Instruction, size: usize) -> Result<(u64, u16), Exception> {
    let at = cpu.part_linear(insn, 0, size, Access::Read)?;
    let offset = cpu.read_sized(at, size)?;
    let at = cpu.part_linear(insn, size, 2, Access::Read)?;
    Ok((offset, cpu.load(at)?))
}

/// LDS, LES, LFS, LGS and LSS.
pub fn load_far_pointer(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Exception> {
    let segment = match insn.mnemonic() {
        Lds => DS,
        Les => ES,
        Lfs => FS,
        Lgs => GS,
        _ => SS,
    };
    if insn.op_kind(1) == OpKind::Register {
        return Err(Exception::UD);
    }
    let register = insn.op_register(0);
    let (offset, selector) = read_far_pointer(cpu, insn, register.size())?;
    cpu.load_segment(segment, selector)?;
    cpu.set_register(register, offset);
    Ok(())
}

/// LGDT and LIDT: a 16-bit limit, then a base of 32 bits (24 with 16-bit operands), or 64 in 64-bit mode.
pub fn load_table(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Exception> {
    use iced_x86::Code::{Lgdt_m1632_16, Lidt_m1632_16};
    cpu.require_ring0()?;
    let base_size = if cpu.code64() { 8 } else { 4 };
    let address = cpu.mem_linear(insn, 0, 2 + base_size, Access::Read)?;
    let mut bytes = [0; 10];
    cpu.read_as(address, &mut bytes[..2 + base_size], cpu.privilege())?;
    let limit = u16::from_le_bytes([bytes[0], bytes[1]]);
    let mut base = [0; 8];
    base.copy_from_slice(&bytes[2..]);
    let mut base = u64::from_le_bytes(base);
    if matches!(insn.code(), Lgdt_m1632_16 | Lidt_m1632_16) {
        base &= 0xff_ffff;
    }
    if !is_canonical(base) {
        return Err(Exception::GP0);
    }
    let table = if insn.mnemonic() == Lgdt { &mut cpu.gdtr } else { &mut cpu.idtr };
    *table = Table { base, limit };
    Ok(())
}

/// SGDT and SIDT. The base is stored whole even with 16-bit operands.
pub fn store_table(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Exception> {
    check_umip(cpu)?;
    let table = if insn.mnemonic() == Sgdt { cpu.gdtr } else { cpu.idtr };
    let base_size = if cpu.code64() { 8 } else { 4 };
    let mut bytes = [0; 10];
    bytes[..2].copy_from_slice(&table.limit.to_le_bytes());
    bytes[2..].copy_from_slice(&table.base.to_le_bytes());
    let address = cpu.mem_linear(insn, 0, 2 + base_size, Access::Write)?;
    cpu.write_as(address, &bytes[..2 + base_size], cpu.privilege())
}

/// CR4.UMIP: what would tell user code about the system's tables raises #GP(0) there.
fn check_umip(cpu: &Cpu) -> Result<(), Exception> {
    if cpu.cr4 & cr4::UMIP != 0 { cpu.require_ring0() } else { Ok(()) }
}

/// SLDT, STR and SMSW.
pub fn store_system_register(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Exception> {
    let value = match insn.mnemonic() {
        Smsw => cpu.cr0,
        other => {
            cpu.require_protected()?;
            u64::from(if other == Str { cpu.tr.selector } else { cpu.ldtr.selector })
        }
    };
    debug_assert!(super::is_one_of(insn, &[Smsw, Str, Sldt]));
    check_umip(cpu)?;
    if insn.op_kind(0) == OpKind::Register {
        return cpu.write_op(insn, 0, value);
    }
    let address = cpu.mem_linear(insn, 0, 2, Access::Write)?;
    cpu.store(address, value as u16)
}

/// LLDT.
pub fn lldt(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Exception> {
    let Some((descriptor, selector)) = system_operand(cpu, insn)? else {
        let selector = cpu.read_op(insn, 0)? as u16;
        cpu.ldtr = Segment::null(selector);
        return Ok(());
    };
    if !descriptor.is_system() || descriptor.kind() != system_type::LDT {
        return Err(Exception::gp(selector));
    }
    if !descriptor.present() {
        return Err(Exception::np(selector));
    }
    cpu.ldtr = checked_system_segment(&descriptor, selector)?;
    Ok(())
}

/// LTR. The task becomes busy.
pub fn ltr(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Exception> {
    let Some((mut descriptor, selector)) = system_operand(cpu, insn)? else { return Err(Exception::GP0) };
    let available = match descriptor.kind() {
        system_type::TSS => true,
        system_type::TSS16 => !cpu.long_mode(),
        _ => false,
    };
    if !descriptor.is_system() || !available {
        return Err(Exception::gp(selector));
    }
    if !descriptor.present() {
        return Err(Exception::np(selector));
    }
    checked_system_segment(&descriptor, selector)?;
    descriptor.low |= 2 << 40;
    cpu.store_system(descriptor.address.wrapping_add(5), (descriptor.low >> 40) as u8)?;
    cpu.tr = checked_system_segment(&descriptor, selector)?;
    Ok(())
}

/// The GDT descriptor that LLDT's or LTR's operand names, `None` for a null selector.
fn system_operand(cpu: &mut Cpu, insn: &Instruction) -> Result<Option<(Descriptor, u16)>, Exception> {
    cpu.require_protected()?;
    cpu.require_ring0()?;
    let selector = cpu.read_op(insn, 0)? as u16;
    if is_null(selector) {
        return Ok(None);
    }
    if selector & 4 != 0 {
        return Err(Exception::gp(selector));
    }
    Ok(Some((cpu.system_descriptor(selector, Exception::gp(selector))?, selector)))
}

fn checked_system_segment(descriptor: &Descriptor, selector: u16) -> Result<Segment, Exception> {
    if !is_canonical(descriptor.base()) {
        return Err(Exception::gp(selector));
    }
    Ok(descriptor.segment(selector))
}

/// LAR, LSL, VERR and VERW: ZF tells whether the selector can be used so; LAR and LSL then set their destination.
pub fn inspect(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Exception> {
    cpu.require_protected()?;
    let operand = insn.op_count() - 1;
    let selector = cpu.read_op(insn, operand)? as u16;
    let descriptor = visible_descriptor(cpu, selector)?.filter(|d| passes(cpu, insn, d));
    let Some(descriptor) = descriptor else {
        cpu.rflags &= !rflags::ZF;
        return Ok(());
    };
    cpu.rflags |= rflags::ZF;
    match insn.mnemonic() {
        Lar => cpu.write_op(insn, 0, descriptor.low >> 32 & 0x00ff_ff00),
        Lsl => cpu.write_op(insn, 0, u64::from(descriptor.limit())),
        _ => Ok(()),
    }
}

/// The descriptor, if there is one and CPL and RPL let at it.
fn visible_descriptor(cpu: &mut Cpu, selector: u16) -> Result<Option<Descriptor>, Exception> {
    if is_null(selector) {
        return Ok(None);
    }
    // No instruction here raises #GP for a selector outside of its table.
    let outside = Exception::gp(selector);
    match cpu.descriptor(selector, outside) {
        Ok(descriptor) => Ok(cpu.reachable(&descriptor, selector).then_some(descriptor)),
        Err(e) if e == outside => Ok(None),
        Err(e) => Err(e),
    }
}

/// Whether the descriptor's type is one that the instruction answers for (SDM vol. 2: tables 3-51 and 3-66).
fn passes(cpu: &Cpu, insn: &Instruction, descriptor: &Descriptor) -> bool {
    use system_type::{CALL_GATE, CALL_GATE16, LDT, TASK_GATE, TSS, TSS_BUSY, TSS16, TSS16_BUSY};
    let system = descriptor.is_system();
    let long = cpu.long_mode();
    match (insn.mnemonic(), descriptor.kind()) {
        (Lar | Lsl, _) if !system => true,
        (Lar | Lsl, LDT | TSS | TSS_BUSY) => true,
        (Lar | Lsl, TSS16 | TSS16_BUSY) => !long,
        (Lar, CALL_GATE) => true,
        (Lar, CALL_GATE16 | TASK_GATE) => !long,
        (Lar | Lsl, _) => false,
        (Verr, _) => descriptor.is_readable(),
        _ => descriptor.is_writable(),
    }
}

/// Writes 16 bits, whatever the operand size: iced makes the operand of 32-bit code one of 32 bits.
fn write_selector(cpu: &mut Cpu, insn: &Instruction, selector: u16) -> Result<(), Exception> {
    if insn.op_kind(0) == OpKind::Register {
        let register = insn.op_register(0);
        let kept = cpu.register(register) & !0xffff;
        cpu.set_register(register, kept | u64::from(selector));
        return Ok(());
    }
    cpu.write_op(insn, 0, selector.into())
}

/// ARPL: raises the destination's RPL to the source's.
pub fn arpl(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Exception> {
    cpu.require_protected()?;
    let (destination, source) = (cpu.read_op(insn, 0)? as u16, cpu.read_op(insn, 1)? as u16);
    if rpl(destination) < rpl(source) {
        write_selector(cpu, insn, destination & !3 | source & 3)?;
        cpu.rflags |= rflags::ZF;
    } else {
        cpu.rflags &= !rflags::ZF;
    }
    Ok(())
}
