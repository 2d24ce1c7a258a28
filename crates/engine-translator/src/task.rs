//! Hardware task switches (SDM vol. 3A chapter 7): outside of long mode, by 16- and 32-bit TSS.

use purlin_arch::x86_64::regs::{
    cr0, cr4,
    rflags::{FIXED, NT, VM},
    seg::{CS, DS, ES, FS, GS, SS},
};

use crate::{
    cpu::{Cpu, Segment},
    debug::{dr6, dr7},
    descriptor::{Descriptor, is_null, rpl, system_type},
    exception::Exception,
    mem::Access,
    tlb::Privilege,
};

/// What switches tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// JMP.
    Jump,
    /// CALL: the new task can return to the old.
    Call,
    /// An interrupt or exception through a task gate: likewise.
    Interrupt,
    /// IRET with NT set.
    Return,
}

/// Where a TSS keeps things (SDM vol. 3A figures 7-2 and 7-10).
struct Layout {
    /// Size of a register in it.
    width: usize,
    /// The smallest limit.
    limit: u32,
    cr3: Option<u64>,
    eip: u64,
    eflags: u64,
    gpr: u64,
    segments: &'static [usize],
    segments_at: u64,
    ldt: u64,
    trap: Option<u64>,
}

const TSS32: Layout = Layout {
    width: 4,
    limit: 0x67,
    cr3: Some(0x1c),
    eip: 0x20,
    eflags: 0x24,
    gpr: 0x28,
    segments: &[ES, CS, SS, DS, FS, GS],
    segments_at: 0x48,
    ldt: 0x60,
    trap: Some(0x64),
};

const TSS16: Layout = Layout {
    width: 2,
    limit: 0x2b,
    cr3: None,
    eip: 0x0e,
    eflags: 0x10,
    gpr: 0x12,
    segments: &[ES, CS, SS, DS],
    segments_at: 0x22,
    ldt: 0x2a,
    trap: None,
};

/// A task's registers as its TSS has them.
struct Image {
    cr3: Option<u64>,
    eip: u64,
    eflags: u64,
    gpr: [u64; 8],
    /// By index in [`Cpu::seg`]; FS and GS are null in a 16-bit task.
    selectors: [u16; 6],
    ldt: u16,
    trap: bool,
}

/// The bit that makes a TSS descriptor's type "busy", in the descriptor's fifth byte.
const BUSY: u8 = 2;

impl Layout {
    fn of(kind: u8) -> &'static Self {
        if kind & 8 != 0 { &TSS32 } else { &TSS16 }
    }
}

/// Switches to the task of a task gate in the IDT, and pushes the error code on its stack.
pub fn enter_by_gate(
    cpu: &mut Cpu,
    gate: &Descriptor,
    rip: u64,
    flags: u64,
    error: Option<u32>,
) -> Result<(), Exception> {
    enter(cpu, gate.gate_selector(), Cause::Interrupt, rip, flags, Exception::gp)?;
    match error {
        Some(error) => cpu.push_error_code(error),
        None => Ok(()),
    }
}

/// IRET with NT set: back to the task that the current one is linked to.
pub fn leave(cpu: &mut Cpu, next: u64) -> Result<(), Exception> {
    let link = cpu.load_system::<u16>(cpu.tr.base)?;
    enter(cpu, link, Cause::Return, next, cpu.rflags & !NT, Exception::ts)
}

/// Switches to the task of TSS `selector`. `rip` and `flags` are saved for the old one; `fault` is what a selector
/// that names no suitable TSS raises.
///
/// A fault before the switch leaves everything as it was; one that loading the new task's segments raises is the new
/// task's.
pub fn enter(
    cpu: &mut Cpu,
    selector: u16,
    cause: Cause,
    rip: u64,
    flags: u64,
    fault: fn(u16) -> Exception,
) -> Result<(), Exception> {
    let tss = tss_descriptor(cpu, selector, cause, fault)?;
    let image = read_image(cpu, &tss)?;
    save_image(cpu, rip, flags)?;
    let nested = matches!(cause, Cause::Call | Cause::Interrupt);
    if nested {
        cpu.store_system(tss.base(), cpu.tr.selector)?;
    } else {
        set_busy(cpu, cpu.tr.selector, false)?;
    }
    set_busy(cpu, selector, true)?;
    cpu.tr = tss.segment(selector);
    cpu.tr.access |= u32::from(BUSY);
    cpu.cr0 |= cr0::TS;
    cpu.dr7 &= !(dr7::LOCAL | 1 << 8);
    load_image(cpu, &image, nested)
}

/// The descriptor of the TSS to switch to, checked (SDM vol. 3A 7.3, steps 2 to 5).
fn tss_descriptor(
    cpu: &mut Cpu,
    selector: u16,
    cause: Cause,
    fault: fn(u16) -> Exception,
) -> Result<Descriptor, Exception> {
    if is_null(selector) || selector & 4 != 0 {
        return Err(fault(selector));
    }
    let tss = cpu.descriptor(selector, fault(selector))?;
    let wanted = match cause {
        Cause::Return => [system_type::TSS_BUSY, system_type::TSS16_BUSY],
        _ => [system_type::TSS, system_type::TSS16],
    };
    if !tss.is_system() || !wanted.contains(&tss.kind()) {
        return Err(fault(selector));
    }
    if !tss.present() {
        return Err(Exception::np(selector));
    }
    if tss.limit() < Layout::of(tss.kind()).limit {
        return Err(Exception::ts(selector));
    }
    Ok(tss)
}

fn set_busy(cpu: &mut Cpu, selector: u16, busy: bool) -> Result<(), Exception> {
    let descriptor = cpu.descriptor(selector, Exception::ts(selector))?;
    let byte = (descriptor.low >> 40) as u8;
    cpu.store_system(descriptor.address.wrapping_add(5), if busy { byte | BUSY } else { byte & !BUSY })
}

fn read_image(cpu: &mut Cpu, tss: &Descriptor) -> Result<Image, Exception> {
    let layout = Layout::of(tss.kind());
    let mut field = |offset: u64| {
        let mut bytes = [0; 8];
        let at = tss.base().wrapping_add(offset);
        cpu.read_as(at, &mut bytes[..layout.width], Privilege::Supervisor)?;
        Ok::<u64, Exception>(u64::from_le_bytes(bytes))
    };
    let width = layout.width as u64;
    let mut image = Image {
        cr3: layout.cr3.map(&mut field).transpose()?,
        eip: field(layout.eip)?,
        eflags: field(layout.eflags)?,
        gpr: [0; 8],
        selectors: [0; 6],
        ldt: field(layout.ldt)? as u16,
        trap: layout.trap.map(&mut field).transpose()?.is_some_and(|word| word & 1 != 0),
    };
    for (i, register) in image.gpr.iter_mut().enumerate() {
        *register = field(layout.gpr + i as u64 * width)?;
        if width == 2 {
            // The upper halves are undefined; processors set them.
            *register |= 0xffff_0000;
        }
    }
    for (i, &seg) in layout.segments.iter().enumerate() {
        image.selectors[seg] = field(layout.segments_at + i as u64 * width)? as u16;
    }
    Ok(image)
}

fn save_image(cpu: &mut Cpu, rip: u64, flags: u64) -> Result<(), Exception> {
    let layout = Layout::of(cpu.tr.access as u8 & 15);
    let base = cpu.tr.base;
    if cpu.tr.limit < layout.limit {
        return Err(Exception::ts(cpu.tr.selector));
    }
    cpu.probe(base, layout.limit as usize + 1, Access::Write, Privilege::Supervisor)?;
    let (gpr, segments) = (cpu.gpr, cpu.seg);
    let mut store = |offset: u64, value: u64, width: usize| {
        cpu.write_as(base.wrapping_add(offset), &value.to_le_bytes()[..width], Privilege::Supervisor)
    };
    let width = layout.width as u64;
    store(layout.eip, rip, layout.width)?;
    store(layout.eflags, flags, layout.width)?;
    for (i, &value) in gpr.iter().take(8).enumerate() {
        store(layout.gpr + i as u64 * width, value, layout.width)?;
    }
    for (i, &seg) in layout.segments.iter().enumerate() {
        store(layout.segments_at + i as u64 * width, u64::from(segments[seg].selector), 2)?;
    }
    Ok(())
}

/// The new task's registers become the processor's. From here on faults are the new task's (SDM vol. 3A 7.3, step
/// 11 on): its selectors are in place, segments that could not be loaded are unusable.
fn load_image(cpu: &mut Cpu, image: &Image, nested: bool) -> Result<(), Exception> {
    let cr3 = image.cr3.filter(|_| cpu.paging());
    if let Some(cr3) = cr3 {
        cpu.cr3 = cr3;
        cpu.flush_tlb_non_global();
    }
    cpu.gpr[..8].copy_from_slice(&image.gpr);
    cpu.rip = image.eip;
    cpu.rflags = image.eflags & 0x3f_7fd5 | FIXED | if nested { NT } else { 0 };
    if image.trap {
        cpu.pending_debug |= dr6::BT;
    }
    for (segment, &selector) in cpu.seg.iter_mut().zip(&image.selectors) {
        *segment = Segment::null(selector);
    }
    cpu.ldtr = Segment::null(image.ldt);
    cpu.cpl = rpl(image.selectors[CS]);
    if let Some(cr3) = cr3
        && cpu.cr4 & cr4::PAE != 0
    {
        cpu.pdptes = cpu.load_pdptes(cr3)?;
    }
    cpu.ldtr = load_ldt(cpu, image.ldt)?;
    if cpu.rflags & VM != 0 {
        cpu.cpl = 3;
        for (segment, &selector) in cpu.seg.iter_mut().zip(&image.selectors) {
            *segment = Segment::v86(selector);
        }
    } else {
        load_segments(cpu, image)?;
    }
    cpu.check_target(cpu.rip)
}

fn load_ldt(cpu: &mut Cpu, selector: u16) -> Result<Segment, Exception> {
    if is_null(selector) {
        return Ok(Segment::null(selector));
    }
    let fault = Exception::ts(selector);
    if selector & 4 != 0 {
        return Err(fault);
    }
    let descriptor = cpu.descriptor(selector, fault)?;
    if !descriptor.is_system() || descriptor.kind() != system_type::LDT || !descriptor.present() {
        return Err(fault);
    }
    Ok(descriptor.segment(selector))
}

fn load_segments(cpu: &mut Cpu, image: &Image) -> Result<(), Exception> {
    let selector = image.selectors[CS];
    if is_null(selector) {
        return Err(Exception::ts(selector));
    }
    let mut code = cpu.descriptor(selector, Exception::ts(selector))?;
    let cpl = rpl(selector);
    let level = if code.is_conforming() { code.dpl() <= cpl } else { code.dpl() == cpl };
    if !code.is_code() || !level {
        return Err(Exception::ts(selector));
    }
    if !code.present() {
        return Err(Exception::np(selector));
    }
    cpu.set_accessed(&mut code)?;
    cpu.set_cs(&code, selector, cpl);
    cpu.seg[SS] = cpu.checked_stack_segment(image.selectors[SS], cpl, false, Exception::ts)?;
    for seg in [DS, ES, FS, GS] {
        cpu.seg[seg] = cpu.checked_data_segment(image.selectors[seg], Exception::ts)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
