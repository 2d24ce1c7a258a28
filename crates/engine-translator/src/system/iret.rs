//! IRET in all modes (SDM vol. 2).

use iced_x86::{Instruction, Mnemonic};
use purlin_arch::x86_64::regs::{
    cr4,
    gpr::RSP,
    rflags::{AC, DF, ID, IF, IOPL, NT, RF, STATUS, TF, VIF, VIP, VM},
    seg::{CS, DS, ES, FS, GS, SS},
};

use super::{
    Done, Flow,
    far::{OuterStack, return_here, return_outward, return_target},
    flags::{set_flags, set_flags_with_virtual_if},
};
use crate::{
    cpu::{Cpu, Segment},
    descriptor::{is_null, rpl},
    exception::Exception,
    segment::is_canonical,
    stack::Stack,
    task,
};

/// What every IRET takes over from the flags on the stack; the rest depends on privilege.
const ALWAYS: u64 = STATUS | TF | DF | NT | RF | AC | ID;

pub fn iret(cpu: &mut Cpu, insn: &Instruction) -> Done {
    let size = match insn.mnemonic() {
        Mnemonic::Iret => 2,
        Mnemonic::Iretd => 4,
        _ => 8,
    };
    let next = cpu.next_rip(insn);
    // Even an IRET that faults opens the door to the next NMI (SDM vol. 3A 6.7.1).
    cpu.nmi_masked = false;
    match () {
        () if !cpu.protected() => iret_real(cpu, size, ALWAYS | IF | IOPL),
        () if cpu.v86() => iret_v86(cpu, size),
        () if cpu.rflags & NT == 0 => iret_protected(cpu, size),
        () if cpu.long_mode() => Err(Exception::GP0),
        () => task::leave(cpu, next),
    }?;
    Ok(Flow::Set)
}

/// IRETQ from CPL 0 to 64-bit code, all that it reads being in the TLB; false if nothing was done. It neither copies nor
/// allocates, and asks no bus.
pub fn quickly(cpu: &mut Cpu) -> bool {
    if !cpu.code64() || cpu.cpl != 0 || cpu.rflags & NT != 0 {
        return false;
    }
    let (privilege, top) = (cpu.privilege(), cpu.gpr[RSP]);
    let word = |i: u64| cpu.load_quickly(top.wrapping_add(8 * i), privilege);
    let (Some(rip), Some(cs), Some(flags), Some(rsp), Some(ss)) = (word(0), word(1), word(2), word(3), word(4)) else {
        return false;
    };
    let (selector, ss) = (cs as u16, ss as u16);
    let cpl = rpl(selector);
    let Some(code) = cpu.descriptor_quickly(selector).filter(|d| d.is_code64() && !d.is_conforming() && d.dpl() == cpl)
    else {
        return false;
    };
    let stack = match is_null(ss) {
        true if cpl < 3 && rpl(ss) == cpl => Some(Segment::null_stack(ss)),
        true => None,
        false => cpu
            .descriptor_quickly(ss)
            .filter(|d| rpl(ss) == cpl && d.is_writable() && d.dpl() == cpl)
            .map(|d| d.segment(ss)),
    };
    let Some(stack) = stack.filter(|_| is_canonical(rip) && flags & (TF | VM) == 0) else { return false };
    let mask = writable_flags(cpu);
    cpu.nmi_masked = false;
    cpu.gpr[RSP] = rsp;
    cpu.seg[SS] = stack;
    cpu.set_cs(&code, selector, cpl);
    cpu.rip = rip;
    if cpl != 0 {
        cpu.drop_inner_segments();
    }
    // RF matters only where there are instruction breakpoints, which there are none of here.
    set_flags(cpu, flags & !RF, mask, 8);
    true
}

/// Pops offset, CS and flags as in real mode; flags are taken over as far as `mask` goes.
fn iret_real(cpu: &mut Cpu, size: usize, mask: u64) -> Result<(), Exception> {
    let (stack, [rip, cs, flags]) = pop_frame(cpu, size)?;
    cpu.check_target(rip)?;
    stack.commit(cpu);
    cpu.seg[CS] = cpu.real_segment(CS, cs as u16);
    cpu.rip = rip;
    set_flags(cpu, flags, mask, size);
    Ok(())
}

fn iret_v86(cpu: &mut Cpu, size: usize) -> Result<(), Exception> {
    if cpu.iopl() == 3 {
        return iret_real(cpu, size, ALWAYS | IF);
    }
    if cpu.cr4 & cr4::VME == 0 || size != 2 {
        return Err(Exception::GP0);
    }
    let (stack, [rip, cs, flags]) = pop_frame(cpu, size)?;
    cpu.check_target(rip)?;
    set_flags_with_virtual_if(cpu, flags)?;
    stack.commit(cpu);
    cpu.seg[CS] = cpu.real_segment(CS, cs as u16);
    cpu.rip = rip;
    Ok(())
}

fn pop_frame(cpu: &mut Cpu, size: usize) -> Result<(Stack, [u64; 3]), Exception> {
    let mut stack = Stack::current(cpu);
    let mut frame = [0; 3];
    for value in &mut frame {
        *value = stack.pop(cpu, size)?;
    }
    Ok((stack, frame))
}

fn iret_protected(cpu: &mut Cpu, size: usize) -> Result<(), Exception> {
    let (mut stack, [rip, cs, flags]) = pop_frame(cpu, size)?;
    if flags & VM != 0 && cpu.cpl == 0 && size == 4 && !cpu.long_mode() {
        return return_to_v86(cpu, stack, rip, cs as u16, flags);
    }
    let selector = cs as u16;
    let code = return_target(cpu, selector)?;
    let mask = writable_flags(cpu);
    // 64-bit code always gets its stack back; other code only from an inner level.
    if cpu.code64() || rpl(selector) != cpu.cpl {
        let before = cpu.rflags;
        if !cpu.features.amd {
            // On Intel's processors the new flags say whether the alignment of these is checked.
            cpu.rflags = before & !AC | flags & AC;
        }
        let outer = OuterStack::pop(cpu, &mut stack, &code, selector, size);
        cpu.rflags = before;
        let outer = outer?;
        return_outward(cpu, &code, selector, rip, outer, 0)?;
    } else {
        return_here(cpu, &code, selector, rip, 3 * size as u64)?;
    }
    set_flags(cpu, flags, mask, size);
    Ok(())
}

/// The flags that IRET may change at the current privilege level.
fn writable_flags(cpu: &Cpu) -> u64 {
    let mut mask = ALWAYS;
    if cpu.cpl <= cpu.iopl() {
        mask |= IF;
    }
    if cpu.cpl == 0 {
        mask |= IOPL | VIF | VIP;
    }
    mask
}

/// IRETD at CPL 0 with VM set in the popped flags (SDM vol. 3A 20.2.5).
fn return_to_v86(cpu: &mut Cpu, mut stack: Stack, rip: u64, cs: u16, flags: u64) -> Result<(), Exception> {
    let esp = stack.pop(cpu, 4)?;
    let mut segments = [0; 5];
    for selector in &mut segments {
        *selector = stack.pop(cpu, 4)? as u16;
    }
    if rip > 0xffff {
        return Err(Exception::GP0);
    }
    for (seg, selector) in [SS, ES, DS, FS, GS].into_iter().zip(segments).chain([(CS, cs)]) {
        cpu.seg[seg] = Segment::v86(selector);
    }
    cpu.gpr[RSP] = esp;
    cpu.rip = rip;
    cpu.cpl = 3;
    set_flags(cpu, flags, ALWAYS | IF | IOPL | VIF | VIP | VM, 4);
    Ok(())
}
