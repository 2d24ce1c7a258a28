//! Far JMP, CALL and RET (SDM vol. 3A 5.8).

use iced_x86::{Code, Instruction, Mnemonic, OpKind};
use purlin_arch::x86_64::regs::{
    gpr::RSP,
    seg::{CS, SS},
};

use super::{Done, Flow, segments::read_far_pointer};
use crate::{
    cpu::{Cpu, Segment, access},
    descriptor::{Descriptor, is_null, rpl, system_type},
    exception::Exception,
    interrupt::{inner_stack, tss64_stack},
    operand::truncate,
    segment::is_canonical,
    stack::Stack,
    task,
};

/// A far JMP or CALL.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Jump,
    Call,
}

/// Far JMP and CALL.
pub fn branch(cpu: &mut Cpu, insn: &Instruction) -> Done {
    let kind = if insn.mnemonic() == Mnemonic::Call { Kind::Call } else { Kind::Jump };
    let (offset, selector, size) = destination(cpu, insn)?;
    let next = cpu.next_rip(insn);
    if !cpu.protected() || cpu.v86() {
        return branch_real(cpu, kind, selector, offset, size, next);
    }
    if is_null(selector) {
        return Err(Exception::GP0);
    }
    let descriptor = cpu.descriptor(selector, Exception::gp(selector))?;
    if descriptor.is_system() {
        return branch_through_system(cpu, kind, selector, next);
    }
    let code = branch_target(cpu, descriptor, selector)?;
    go(cpu, kind, code, selector, offset, size, next)
}

/// Offset, selector and operand size of a far branch's operand.
fn destination(cpu: &mut Cpu, insn: &Instruction) -> Result<(u64, u16, usize), Exception> {
    match insn.op_kind(0) {
        OpKind::FarBranch16 => Ok((u64::from(insn.far_branch16()), insn.far_branch_selector(), 2)),
        OpKind::FarBranch32 => Ok((u64::from(insn.far_branch32()), insn.far_branch_selector(), 4)),
        OpKind::Memory => {
            let size = insn.memory_size().size() - 2;
            let (offset, selector) = read_far_pointer(cpu, insn, size)?;
            Ok((offset, selector, size))
        }
        _ => Err(Exception::UD),
    }
}

fn branch_real(cpu: &mut Cpu, kind: Kind, selector: u16, offset: u64, size: usize, next: u64) -> Done {
    let mut stack = Stack::current(cpu);
    if kind == Kind::Call {
        stack.push(cpu, size, u64::from(cpu.seg[CS].selector))?;
        stack.push(cpu, size, next)?;
    }
    cpu.check_target(offset)?;
    stack.commit(cpu);
    cpu.seg[CS] = cpu.real_segment(CS, selector);
    cpu.rip = offset;
    Ok(Flow::Set)
}

/// Checks the code segment that a far branch names itself, without a gate.
fn branch_target(cpu: &mut Cpu, code: Descriptor, selector: u16) -> Result<Descriptor, Exception> {
    let bad = Err(Exception::gp(selector));
    if !code.is_code() || cpu.long_mode() && is_l_and_d(&code) {
        return bad;
    }
    let allowed =
        if code.is_conforming() { code.dpl() <= cpu.cpl } else { rpl(selector) <= cpu.cpl && code.dpl() == cpu.cpl };
    if !allowed {
        return bad;
    }
    present_and_accessed(cpu, code, selector)
}

/// L and D both set is reserved in long mode.
fn is_l_and_d(code: &Descriptor) -> bool {
    code.access() & (access::L | access::DB) == access::L | access::DB
}

fn present_and_accessed(cpu: &mut Cpu, mut code: Descriptor, selector: u16) -> Result<Descriptor, Exception> {
    if !code.present() {
        return Err(Exception::np(selector));
    }
    cpu.set_accessed(&mut code)?;
    Ok(code)
}

/// #GP(0) unless `offset` is inside code segment `code`.
fn check_offset(cpu: &Cpu, code: &Descriptor, offset: u64) -> Result<(), Exception> {
    let inside =
        if cpu.long_mode() && code.is_code64() { is_canonical(offset) } else { offset <= u64::from(code.limit()) };
    if inside { Ok(()) } else { Err(Exception::GP0) }
}

/// The offset in `code` that a far branch or return to it leads to. On Intel's processors that has the width of the mode, however
/// wide the operand is.
fn offset_in(cpu: &Cpu, code: &Descriptor, offset: u64) -> u64 {
    let as_wide_as_it_is = cpu.features.amd || cpu.long_mode() && code.is_code64();
    if as_wide_as_it_is { offset } else { truncate(offset, 4) }
}

/// The stack in `segment` at `pointer`, with the addresses of the mode that `code` is of.
fn stack_of(cpu: &Cpu, code: &Descriptor, segment: Segment, pointer: u64, cpl: u8) -> Stack {
    if cpu.long_mode() && code.is_code64() {
        Stack::new64(cpu, pointer, cpl, Exception::SS0)
    } else {
        Stack::in_segment(cpu, segment, pointer, cpl, Exception::SS0)
    }
}

/// Goes to `code` at the same privilege level, whether named directly or by a gate.
fn go(cpu: &mut Cpu, kind: Kind, code: Descriptor, selector: u16, offset: u64, size: usize, next: u64) -> Done {
    let offset = offset_in(cpu, &code, truncate(offset, size));
    // A CALL that changes the mode pushes with the stack addresses of the mode it goes to (seen on AMD, and in Bochs).
    let mut stack = stack_of(cpu, &code, cpu.seg[SS], cpu.gpr[RSP], cpu.cpl);
    check_offset(cpu, &code, offset)?;
    if kind == Kind::Call {
        stack.push(cpu, size, u64::from(cpu.seg[CS].selector))?;
        stack.push(cpu, size, next)?;
        stack.commit(cpu);
    }
    cpu.set_cs(&code, selector, cpu.cpl);
    cpu.rip = offset;
    Ok(Flow::Set)
}

/// A selector of a call gate, a task gate or a TSS.
fn branch_through_system(cpu: &mut Cpu, kind: Kind, selector: u16, next: u64) -> Done {
    let bad = Err(Exception::gp(selector));
    let descriptor = cpu.system_descriptor(selector, Exception::gp(selector))?;
    let long = cpu.long_mode();
    match descriptor.kind() {
        system_type::CALL_GATE => {}
        system_type::CALL_GATE16 | system_type::TASK_GATE | system_type::TSS | system_type::TSS16 if !long => {}
        _ => return bad,
    }
    if descriptor.dpl() < cpu.cpl.max(rpl(selector)) {
        return bad;
    }
    let why = if kind == Kind::Call { task::Cause::Call } else { task::Cause::Jump };
    match descriptor.kind() {
        system_type::TASK_GATE if !descriptor.present() => Err(Exception::np(selector)),
        system_type::TASK_GATE => {
            let tss = descriptor.gate_selector();
            task::enter(cpu, tss, why, next, cpu.rflags, Exception::gp)?;
            Ok(Flow::Set)
        }
        system_type::TSS | system_type::TSS16 => {
            task::enter(cpu, selector, why, next, cpu.rflags, Exception::gp)?;
            Ok(Flow::Set)
        }
        _ => branch_through_gate(cpu, kind, &descriptor, selector, next),
    }
}

/// A call gate (SDM vol. 3A 5.8.4); its own privilege check is done.
fn branch_through_gate(cpu: &mut Cpu, kind: Kind, gate: &Descriptor, gate_selector: u16, next: u64) -> Done {
    if !gate.present() {
        return Err(Exception::np(gate_selector));
    }
    let selector = gate.gate_selector();
    if is_null(selector) {
        return Err(Exception::GP0);
    }
    let code = cpu.descriptor(selector, Exception::gp(selector))?;
    let inward = !code.is_conforming() && code.dpl() < cpu.cpl;
    let allowed = code.dpl() <= cpu.cpl && !(inward && kind == Kind::Jump);
    if !code.is_code() || !allowed || cpu.long_mode() && !code.is_code64() {
        return Err(Exception::gp(selector));
    }
    let code = present_and_accessed(cpu, code, selector)?;
    let size = match gate.kind() {
        system_type::CALL_GATE16 => 2,
        _ if cpu.long_mode() => 8,
        _ => 4,
    };
    if !inward {
        return go(cpu, kind, code, selector, gate.gate_offset(), size, next);
    }
    if size == 8 {
        call_inward64(cpu, gate, code, selector, next)?;
    } else {
        call_inward(cpu, gate, code, selector, size, next)?;
    }
    Ok(Flow::Set)
}

/// A call to an inner level in long mode: the stack comes from the TSS, SS becomes null, nothing is copied.
fn call_inward64(
    cpu: &mut Cpu,
    gate: &Descriptor,
    code: Descriptor,
    selector: u16,
    next: u64,
) -> Result<(), Exception> {
    let cpl = code.dpl();
    let pointer = tss64_stack(cpu, 4 + 8 * u64::from(cpl))?;
    let mut stack = Stack::new64(cpu, pointer, cpl, Exception::SS0);
    check_offset(cpu, &code, gate.gate_offset())?;
    let (ss, cs) = (cpu.seg[SS].selector, cpu.seg[CS].selector);
    for value in [u64::from(ss), cpu.gpr[RSP], u64::from(cs), next] {
        stack.push(cpu, 8, value)?;
    }
    cpu.seg[SS] = Segment::null_stack(u16::from(cpl));
    cpu.gpr[RSP] = stack.pointer;
    cpu.set_cs(&code, selector, cpl);
    cpu.rip = gate.gate_offset();
    Ok(())
}

/// A call to an inner level: the stack comes from the TSS, parameters are copied to it.
fn call_inward(
    cpu: &mut Cpu,
    gate: &Descriptor,
    code: Descriptor,
    selector: u16,
    size: usize,
    next: u64,
) -> Result<(), Exception> {
    let cpl = code.dpl();
    let parameters = gate.low >> 32 & 31;
    let (ss, pointer) = inner_stack(cpu, cpl)?;
    let mut stack = Stack::in_segment(cpu, ss, pointer, cpl, Exception::ss(ss.selector));
    stack.check_room(cpu, 4 + parameters as usize, size)?;
    check_offset(cpu, &code, gate.gate_offset())?;
    stack.push(cpu, size, u64::from(cpu.seg[SS].selector))?;
    stack.push(cpu, size, cpu.gpr[RSP])?;
    let old = Stack::current(cpu);
    for i in (0..parameters).rev() {
        let parameter = old.peek(cpu, i * size as u64, size)?;
        stack.push(cpu, size, parameter)?;
    }
    stack.push(cpu, size, u64::from(cpu.seg[CS].selector))?;
    stack.push(cpu, size, next)?;
    cpu.seg[SS] = ss;
    stack.commit(cpu);
    cpu.set_cs(&code, selector, cpl);
    cpu.rip = gate.gate_offset();
    Ok(())
}

/// Far RET.
pub fn ret(cpu: &mut Cpu, insn: &Instruction) -> Done {
    let size = match insn.code() {
        Code::Retfw | Code::Retfw_imm16 => 2,
        Code::Retfd | Code::Retfd_imm16 => 4,
        _ => 8,
    };
    let release = match insn.code() {
        Code::Retfw_imm16 | Code::Retfd_imm16 | Code::Retfq_imm16 => u64::from(insn.immediate16()),
        _ => 0,
    };
    let mut stack = Stack::current(cpu);
    let rip = stack.pop(cpu, size)?;
    let selector = stack.pop(cpu, size)? as u16;
    if !cpu.protected() || cpu.v86() {
        cpu.check_target(rip)?;
        stack.skip(release);
        stack.commit(cpu);
        cpu.seg[CS] = cpu.real_segment(CS, selector);
        cpu.rip = rip;
        return Ok(Flow::Set);
    }
    let code = return_target(cpu, selector)?;
    if rpl(selector) == cpu.cpl {
        return_here(cpu, &code, selector, rip, 2 * size as u64 + release)?;
        return Ok(Flow::Set);
    }
    stack.skip(release);
    let outer = OuterStack::pop(cpu, &mut stack, &code, selector, size)?;
    return_outward(cpu, &code, selector, rip, outer, release)?;
    Ok(Flow::Set)
}

/// Checks the code segment that a far RET or an IRET returns to.
pub fn return_target(cpu: &mut Cpu, selector: u16) -> Result<Descriptor, Exception> {
    if is_null(selector) {
        return Err(Exception::GP0);
    }
    let code = cpu.descriptor(selector, Exception::gp(selector))?;
    let cpl = rpl(selector);
    let level = if code.is_conforming() { code.dpl() <= cpl } else { code.dpl() == cpl };
    let reserved = cpu.long_mode() && is_l_and_d(&code);
    if !code.is_code() || cpl < cpu.cpl || !level || reserved {
        return Err(Exception::gp(selector));
    }
    present_and_accessed(cpu, code, selector)
}

/// The stack that a return to an outer level goes back to.
pub struct OuterStack {
    segment: Segment,
    pointer: u64,
}

impl OuterStack {
    /// Pops pointer and SS, and checks SS for the level of `selector`, CS's.
    pub fn pop(
        cpu: &mut Cpu,
        stack: &mut Stack,
        code: &Descriptor,
        selector: u16,
        size: usize,
    ) -> Result<Self, Exception> {
        let pointer = stack.pop(cpu, size)?;
        let ss = stack.pop(cpu, size)? as u16;
        let code64 = cpu.long_mode() && code.is_code64();
        let segment = cpu.checked_stack_segment(ss, rpl(selector), code64, Exception::gp)?;
        Ok(Self { segment, pointer })
    }
}

/// Goes to `code` and the stack that was popped with it; `release` bytes of parameters go from that stack too.
pub fn return_outward(
    cpu: &mut Cpu,
    code: &Descriptor,
    selector: u16,
    rip: u64,
    outer: OuterStack,
    release: u64,
) -> Result<(), Exception> {
    let rip = offset_in(cpu, code, rip);
    check_offset(cpu, code, rip)?;
    let cpl = rpl(selector);
    let outward = cpl > cpu.cpl;
    let mut stack = stack_of(cpu, code, outer.segment, outer.pointer, cpl);
    stack.skip(release);
    stack.commit(cpu);
    cpu.seg[SS] = outer.segment;
    cpu.set_cs(code, selector, cpl);
    cpu.rip = rip;
    if outward {
        cpu.drop_inner_segments();
    }
    Ok(())
}

/// The same, at the same level and on the same stack, of which `popped` bytes go: a return that changes the mode moves the
/// stack pointer as wide as it is in the mode it goes to (seen on AMD, and in Bochs).
pub fn return_here(cpu: &mut Cpu, code: &Descriptor, selector: u16, rip: u64, popped: u64) -> Result<(), Exception> {
    let rip = offset_in(cpu, code, rip);
    check_offset(cpu, code, rip)?;
    let mut stack = stack_of(cpu, code, cpu.seg[SS], cpu.gpr[RSP], cpu.cpl);
    stack.skip(popped);
    stack.commit(cpu);
    cpu.set_cs(code, selector, cpu.cpl);
    cpu.rip = rip;
    Ok(())
}
