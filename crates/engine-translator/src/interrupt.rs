//! Delivery of exceptions and interrupts (SDM vol. 3A chapter 6).

use std::sync::atomic::Ordering;

use purlin_arch::x86_64::{
    regs::{
        cr4,
        gpr::RSP,
        rflags,
        seg::{CS, DS, ES, FS, GS, SS},
    },
    state::Activity,
};

use crate::{
    cpu::{Cpu, Segment},
    debug::{dr6, dr7},
    descriptor::{Descriptor, is_null, system_type},
    exception::{Exception, vector},
    mem::{copy_from_guest, copy_to_guest, page_rest},
    segment::is_canonical,
    stack::Stack,
    task,
    tlb::Privilege,
};

/// What is delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// An exception that an instruction raised, or a debug trap.
    Exception(Exception),
    /// An external interrupt with this vector.
    Interrupt(u8),
    /// A non-maskable interrupt.
    Nmi,
}

/// A triple fault: the processor has shut down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shutdown;

/// Instructions that raise an interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Software {
    /// INT n.
    Int,
    /// INT3 and INTO: as INT n, but virtual-8086 mode's restrictions do not hold for them.
    Trap,
    /// INT1: no privilege check, as if the processor had raised it.
    Icebp,
}

/// One attempt to get into a handler.
struct Delivery {
    vector: u8,
    error: Option<u32>,
    /// Raised by INT n, INT3 or INTO: the gate's DPL is checked.
    software: bool,
    /// Where the handler returns to.
    rip: u64,
    /// RFLAGS as the handler finds it on its stack.
    flags: u64,
}

/// How exceptions combine (SDM vol. 3A table 6-4).
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Benign,
    Contributory,
    PageFault,
    DoubleFault,
}

fn class(vector: u8) -> Class {
    match vector {
        vector::DE | vector::TS | vector::NP | vector::SS | vector::GP => Class::Contributory,
        vector::PF => Class::PageFault,
        vector::DF => Class::DoubleFault,
        _ => Class::Benign,
    }
}

/// Delivers `event`, and what comes of it: a fault on the way is delivered in its place, or a double fault.
pub fn deliver(cpu: &mut Cpu, event: Event) -> Result<(), Shutdown> {
    cpu.activity = Activity::Running;
    cpu.sti_shadow = false;
    cpu.mov_ss_shadow = false;
    let mut first = Class::Benign;
    let mut event = event;
    loop {
        let result = match event {
            Event::Exception(exception) => {
                first = class(exception.vector);
                raise(cpu, exception)
            }
            Event::Interrupt(vector) => enter_from_hardware(cpu, vector, None),
            Event::Nmi => {
                cpu.nmi_masked = true;
                enter_from_hardware(cpu, vector::NMI, None)
            }
        };
        let Err(second) = result else { return Ok(()) };
        event = Event::Exception(combine(cpu, first, second)?);
    }
}

/// What is delivered when `second` came up while an event of class `first` was (SDM vol. 3A table 6-5).
fn combine(cpu: &mut Cpu, first: Class, second: Exception) -> Result<Exception, Shutdown> {
    let double = match (first, class(second.vector)) {
        (Class::DoubleFault, _) => return Err(Shutdown),
        (Class::Contributory, Class::Contributory) => true,
        (Class::PageFault, Class::Contributory | Class::PageFault) => true,
        _ => false,
    };
    if !double {
        return Ok(second);
    }
    if second.vector == vector::PF {
        cpu.cr2 = second.payload;
    }
    Ok(Exception::with_error(vector::DF, 0))
}

fn raise(cpu: &mut Cpu, exception: Exception) -> Result<(), Exception> {
    match exception.vector {
        vector::PF => cpu.cr2 = exception.payload,
        vector::DB => {
            cpu.dr6 = (cpu.dr6 & !0xf | exception.payload) & dr6::WRITABLE | dr6::FIXED;
            cpu.dr7 &= !dr7::GD;
        }
        _ => {}
    }
    enter_from_hardware(cpu, exception.vector, Some(exception))
}

/// Delivers what the processor itself raises. Faults on the way have EXT set in their error code.
fn enter_from_hardware(cpu: &mut Cpu, vector: u8, exception: Option<Exception>) -> Result<(), Exception> {
    let mut flags = cpu.rflags;
    // Faults are pushed with RF set, so that the instruction can be resumed past its breakpoint (SDM vol. 3B
    // 17.3.1.1).
    if exception.is_some_and(|e| ![vector::DB, vector::BP, vector::OF].contains(&e.vector)) {
        flags |= rflags::RF;
    }
    let delivery = Delivery { vector, error: exception.and_then(|e| e.error), software: false, rip: cpu.rip, flags };
    enter(cpu, &delivery).map_err(external)
}

/// Sets EXT (bit 0) in the error code of a fault that has a selector for one.
fn external(mut exception: Exception) -> Exception {
    if let (vector::TS..=vector::GP, Some(error)) = (exception.vector, &mut exception.error) {
        *error |= 1;
    }
    exception
}

/// INT n, INT3, INTO and INT1; `next` is the offset of the instruction after it. A fault is the instruction's own.
pub fn software_interrupt(cpu: &mut Cpu, vector: u8, kind: Software, next: u64) -> Result<(), Exception> {
    let delivery = Delivery { vector, error: None, software: true, rip: next, flags: cpu.rflags };
    match kind {
        Software::Icebp => enter(cpu, &Delivery { software: false, ..delivery }).map_err(external),
        Software::Int if cpu.v86() => enter_from_v86(cpu, &delivery),
        Software::Int | Software::Trap => enter(cpu, &delivery),
    }
}

fn enter(cpu: &mut Cpu, delivery: &Delivery) -> Result<(), Exception> {
    if !cpu.protected() {
        return enter_real(cpu, delivery, cpu.idtr.base);
    }
    let gate = interrupt_gate(cpu, delivery)?;
    if gate.kind() == system_type::TASK_GATE {
        return task::enter_by_gate(cpu, &gate, delivery.rip, delivery.flags, delivery.error);
    }
    let (code, selector) = gate_target(cpu, &gate)?;
    if cpu.long_mode() {
        enter_long(cpu, delivery, &gate, code, selector)
    } else {
        enter_protected(cpu, delivery, &gate, code, selector)
    }
}

/// Real mode, and virtual-8086 mode where the interrupt stays in it: a vector table of far pointers (SDM vol. 3A
/// 20.1.4).
fn enter_real(cpu: &mut Cpu, delivery: &Delivery, table: u64) -> Result<(), Exception> {
    let entry = u32::from(delivery.vector) * 4;
    if !cpu.v86() && entry + 3 > u32::from(cpu.idtr.limit) {
        return Err(idt_fault(vector::GP, delivery.vector));
    }
    let target = cpu.load_system::<u32>(table + u64::from(entry))?;
    let mut stack = Stack::current(cpu);
    for value in [delivery.flags, u64::from(cpu.seg[CS].selector), delivery.rip] {
        stack.push(cpu, 2, value)?;
    }
    stack.commit(cpu);
    cpu.seg[CS] = cpu.real_segment(CS, (target >> 16) as u16);
    cpu.rip = u64::from(target & 0xffff);
    cpu.rflags &= !(rflags::IF | rflags::TF | rflags::RF | rflags::AC);
    Ok(())
}

/// INT n in virtual-8086 mode: methods 1 to 6 of SDM vol. 3A 20.3.3.
fn enter_from_v86(cpu: &mut Cpu, delivery: &Delivery) -> Result<(), Exception> {
    let trusted = cpu.iopl() == 3;
    if cpu.cr4 & cr4::VME != 0 && !redirected_to_protected(cpu, delivery.vector)? {
        let (virtual_if, rflags) = (cpu.rflags & rflags::VIF != 0, cpu.rflags);
        let mut flags = delivery.flags;
        if !trusted {
            // The program sees its virtual interrupt flag, and the IOPL that it would have on an 8086.
            flags = flags & !rflags::IF | rflags::IOPL;
            flags |= if virtual_if { rflags::IF } else { 0 };
        }
        enter_real(cpu, &Delivery { flags, ..*delivery }, 0)?;
        let keep = if trusted { rflags::AC } else { rflags::AC | rflags::IF };
        cpu.rflags |= rflags & keep;
        if !trusted {
            cpu.rflags &= !rflags::VIF;
        }
        return Ok(());
    }
    if !trusted {
        return Err(Exception::GP0);
    }
    enter(cpu, delivery)
}

/// The bit for `vector` in the TSS's interrupt redirection bitmap, the 32 bytes below the I/O permission bitmap.
fn redirected_to_protected(cpu: &mut Cpu, vector: u8) -> Result<bool, Exception> {
    if cpu.tr.limit < 0x67 {
        return Err(Exception::GP0);
    }
    let io_map = u64::from(cpu.load_system::<u16>(cpu.tr.base + 0x66)?);
    let offset = (io_map + u64::from(vector / 8)).wrapping_sub(32);
    if offset > u64::from(cpu.tr.limit) {
        return Err(Exception::GP0);
    }
    let byte = cpu.load_system::<u8>(cpu.tr.base + offset)?;
    Ok(byte >> (vector % 8) & 1 != 0)
}

/// The exception `fault` with the error code for IDT entry `entry`.
fn idt_fault(fault: u8, entry: u8) -> Exception {
    Exception::with_error(fault, u32::from(entry) << 3 | 2)
}

fn interrupt_gate(cpu: &mut Cpu, delivery: &Delivery) -> Result<Descriptor, Exception> {
    let long = cpu.long_mode();
    let size: u64 = if long { 16 } else { 8 };
    let offset = u64::from(delivery.vector) * size;
    let bad = idt_fault(vector::GP, delivery.vector);
    if offset + size - 1 > u64::from(cpu.idtr.limit) {
        return Err(bad);
    }
    let address = cpu.idtr.base.wrapping_add(offset);
    let low = cpu.load_system(address)?;
    let high = if long { cpu.load_system(address.wrapping_add(8))? } else { 0 };
    let gate = Descriptor { low, high: high & 0xffff_ffff, address };
    let known = match gate.kind() {
        system_type::INTERRUPT_GATE | system_type::TRAP_GATE => true,
        system_type::INTERRUPT_GATE16 | system_type::TRAP_GATE16 | system_type::TASK_GATE => !long,
        _ => false,
    };
    if !known || !gate.is_system() || delivery.software && gate.dpl() < cpu.cpl {
        return Err(bad);
    }
    if !gate.present() {
        return Err(idt_fault(vector::NP, delivery.vector));
    }
    Ok(gate)
}

/// The code segment of the handler, its accessed bit set, and its selector.
fn gate_target(cpu: &mut Cpu, gate: &Descriptor) -> Result<(Descriptor, u16), Exception> {
    let selector = gate.gate_selector();
    if is_null(selector) {
        return Err(Exception::GP0);
    }
    let mut code = cpu.descriptor(selector, Exception::gp(selector))?;
    if !code.is_code() || code.dpl() > cpu.cpl || cpu.long_mode() && !code.is_code64() {
        return Err(Exception::gp(selector));
    }
    if !code.present() {
        return Err(Exception::np(selector));
    }
    cpu.set_accessed(&mut code)?;
    Ok((code, selector))
}

/// The privilege level of the handler.
fn handler_cpl(cpu: &Cpu, code: &Descriptor) -> u8 {
    if code.is_conforming() { cpu.cpl } else { code.dpl() }
}

/// Long mode (SDM vol. 3A 6.14).
fn enter_long(
    cpu: &mut Cpu,
    delivery: &Delivery,
    gate: &Descriptor,
    code: Descriptor,
    selector: u16,
) -> Result<(), Exception> {
    let cpl = handler_cpl(cpu, &code);
    let old_rsp = if cpu.code64() { cpu.gpr[RSP] } else { cpu.gpr[RSP] & 0xffff_ffff };
    let ist = gate.low >> 32 & 7;
    let top = match ist {
        0 if cpl == cpu.cpl => old_rsp,
        0 => tss64_stack(cpu, 4 + 8 * u64::from(cpl))?,
        _ => tss64_stack(cpu, 28 + 8 * ist)?,
    };
    let mut stack = Stack::new64(cpu, top & !15, cpl, Exception::SS0);
    let target = gate.gate_offset();
    if !is_canonical(target) {
        return Err(Exception::GP0);
    }
    let (ss, cs) = (u64::from(cpu.seg[SS].selector), u64::from(cpu.seg[CS].selector));
    for value in [ss, old_rsp, delivery.flags, cs, delivery.rip] {
        stack.push(cpu, 8, value)?;
    }
    if let Some(error) = delivery.error {
        stack.push(cpu, 8, u64::from(error))?;
    }
    if cpl != cpu.cpl {
        cpu.seg[SS] = Segment::null_stack(u16::from(cpl));
    }
    cpu.gpr[RSP] = stack.pointer;
    cpu.set_cs(&code, selector, cpl);
    cpu.rip = target;
    enter_handler_flags(cpu, gate);
    Ok(())
}

/// Delivers the page fault `fault` of the instruction at `rip` through an interrupt gate to 64-bit code at CPL 0, all that it takes
/// being in the TLB; false if nothing was done. It neither copies nor allocates, asks no bus, and no store of its has to be noticed.
pub fn page_fault_quickly(cpu: &mut Cpu, fault: Exception, rip: u64) -> bool {
    try_page_fault(cpu, fault, rip).is_some()
}

fn try_page_fault(cpu: &mut Cpu, fault: Exception, rip: u64) -> Option<()> {
    const FRAME: usize = 6;
    let offset = u64::from(vector::PF) * 16;
    if !cpu.code64() || fault.vector != vector::PF || offset + 15 > u64::from(cpu.idtr.limit) {
        return None;
    }
    let address = cpu.idtr.base.wrapping_add(offset);
    let low = cpu.load_quickly(address, Privilege::Supervisor)?;
    let high = cpu.load_quickly(address.wrapping_add(8), Privilege::Supervisor)? & 0xffff_ffff;
    let gate = Descriptor { low, high, address };
    let (selector, target) = (gate.gate_selector(), gate.gate_offset());
    if gate.kind() != system_type::INTERRUPT_GATE || !gate.is_system() || !gate.present() || !is_canonical(target) {
        return None;
    }
    let code = cpu.descriptor_quickly(selector).filter(|d| d.is_code64() && !d.is_conforming() && d.dpl() == 0)?;
    let inward = cpu.cpl != 0;
    let top = match low >> 32 & 7 {
        0 if !inward => cpu.gpr[RSP],
        0 => tss64_stack_quickly(cpu, 4)?,
        ist => tss64_stack_quickly(cpu, 28 + 8 * ist)?,
    };
    let frame = (top & !15).wrapping_sub(8 * FRAME as u64);
    let host = cpu.tlb.storable(cpu.privilege_at(0), frame).filter(|_| page_rest(frame) >= 8 * FRAME)?;
    let (ss, cs) = (u64::from(cpu.seg[SS].selector), u64::from(cpu.seg[CS].selector));
    let flags = cpu.rflags | rflags::RF;
    let words: [u64; FRAME] = [u64::from(fault.error.unwrap_or(0)), rip, cs, flags, cpu.gpr[RSP], ss];
    for (i, word) in words.iter().enumerate() {
        copy_to_guest(host.wrapping_add(8 * i), &word.to_le_bytes());
    }
    cpu.cr2 = fault.payload;
    if inward {
        cpu.seg[SS] = Segment::null_stack(0);
    }
    cpu.gpr[RSP] = frame;
    cpu.set_cs(&code, selector, 0);
    cpu.rip = target;
    enter_handler_flags(cpu, &gate);
    Some(())
}

/// The same as [`tss64_stack`], of a TSS that is in the TLB.
fn tss64_stack_quickly(cpu: &Cpu, offset: u64) -> Option<u64> {
    let at = cpu.tr.base.wrapping_add(offset);
    if cpu.tr.unusable() || offset + 7 > u64::from(cpu.tr.limit) || page_rest(at) < 8 {
        return None;
    }
    // (It is a multiple of four.)
    let host = cpu.tlb.readable(Privilege::Supervisor, at)?;
    let mut bytes = [0; 8];
    copy_from_guest(host, &mut bytes);
    Some(u64::from_le_bytes(bytes)).filter(|pointer| is_canonical(*pointer))
}

/// A stack pointer in a 64-bit TSS.
pub fn tss64_stack(cpu: &mut Cpu, offset: u64) -> Result<u64, Exception> {
    if cpu.tr.unusable() || offset + 7 > u64::from(cpu.tr.limit) {
        return Err(Exception::ts(cpu.tr.selector));
    }
    let pointer = cpu.load_system(cpu.tr.base.wrapping_add(offset))?;
    if is_canonical(pointer) { Ok(pointer) } else { Err(Exception::SS0) }
}

/// Protected and virtual-8086 mode (SDM vol. 3A 6.12.1, 20.3.1).
fn enter_protected(
    cpu: &mut Cpu,
    delivery: &Delivery,
    gate: &Descriptor,
    code: Descriptor,
    selector: u16,
) -> Result<(), Exception> {
    let v86 = cpu.v86();
    let cpl = handler_cpl(cpu, &code);
    if v86 && cpl != 0 {
        return Err(Exception::gp(selector));
    }
    let size = match gate.kind() {
        system_type::INTERRUPT_GATE16 | system_type::TRAP_GATE16 => 2,
        _ => 4,
    };
    let switched = if cpl == cpu.cpl { None } else { Some(inner_stack(cpu, cpl)?) };
    let (mut stack, ss) = match switched {
        None => (Stack::current(cpu), None),
        Some((ss, esp)) => {
            let stack = Stack::in_segment(cpu, ss, esp, cpl, Exception::ss(ss.selector));
            (stack, Some(ss))
        }
    };
    let target = gate.gate_offset();
    let frame = frame(cpu, delivery, ss.is_some());
    stack.check_room(cpu, frame.len(), size)?;
    if target > u64::from(code.limit()) {
        return Err(Exception::GP0);
    }
    for value in frame {
        stack.push(cpu, size, value)?;
    }
    if let Some(ss) = ss {
        cpu.seg[SS] = ss;
    }
    if v86 {
        for seg in [ES, DS, FS, GS] {
            cpu.seg[seg] = Segment::null(0);
        }
    }
    stack.commit(cpu);
    cpu.set_cs(&code, selector, cpl);
    cpu.rip = target;
    enter_handler_flags(cpu, gate);
    Ok(())
}

/// What goes on the handler's stack, in the order of the pushes.
fn frame(cpu: &Cpu, delivery: &Delivery, switched: bool) -> Vec<u64> {
    let selector = |seg: usize| u64::from(cpu.seg[seg].selector);
    let mut frame = Vec::with_capacity(10);
    if cpu.v86() {
        frame.extend([GS, FS, DS, ES].map(selector));
    }
    if switched {
        frame.extend([selector(SS), cpu.gpr[RSP]]);
    }
    frame.extend([delivery.flags, selector(CS), delivery.rip]);
    frame.extend(delivery.error.map(u64::from));
    frame
}

/// SS and ESP for level `cpl` from a 16- or 32-bit TSS, SS checked (SDM vol. 3A 6.12.1).
pub fn inner_stack(cpu: &mut Cpu, cpl: u8) -> Result<(Segment, u64), Exception> {
    let level = u32::from(cpl);
    let wide = cpu.tr.access & 8 != 0;
    let (offset, last) = if wide { (4 + 8 * level, 5) } else { (2 + 4 * level, 3) };
    if cpu.tr.unusable() || offset + last > cpu.tr.limit {
        return Err(Exception::ts(cpu.tr.selector));
    }
    let at = cpu.tr.base.wrapping_add(u64::from(offset));
    let (esp, selector) = if wide {
        (u64::from(cpu.load_system::<u32>(at)?), cpu.load_system::<u16>(at + 4)?)
    } else {
        (u64::from(cpu.load_system::<u16>(at)?), cpu.load_system::<u16>(at + 2)?)
    };
    let segment = cpu.checked_stack_segment(selector, cpl, false, Exception::ts)?;
    Ok((segment, esp))
}

fn enter_handler_flags(cpu: &mut Cpu, gate: &Descriptor) {
    cpu.rflags &= !(rflags::TF | rflags::NT | rflags::RF | rflags::VM);
    if matches!(gate.kind(), system_type::INTERRUPT_GATE | system_type::INTERRUPT_GATE16) {
        cpu.rflags &= !rflags::IF;
    }
}

impl Cpu {
    /// Whether an interrupt waits, RFLAGS.IF let it in or not.
    pub fn interrupt_waits(&self) -> bool {
        self.lapic.pending().is_some() || self.shared.extint.load(Ordering::Acquire)
    }

    /// Whether something else does that has to do with the next instruction: an event, a debug trap, a request to stop.
    pub fn event_waits(&self) -> bool {
        let debugged = self.pending_debug != 0 || self.rflags & rflags::TF != 0 || self.dr7 & 0xff != 0;
        debugged || self.injected.is_some() || self.nmi_pending || self.leave || self.emitted.wants_world
    }

    /// Pushes the error code of an exception that a task gate took to a new task (SDM vol. 3A 6.13).
    pub fn push_error_code(&mut self, error: u32) -> Result<(), Exception> {
        let size = if self.tr.access & 8 != 0 { 4 } else { 2 };
        self.push(size, u64::from(error))
    }
}

#[cfg(test)]
mod tests;
