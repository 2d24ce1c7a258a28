//! Instructions that are emulated in plain Rust: everything that the translator does not copy.

mod bulk;
mod control_regs;
mod decimal;
mod far;
pub(crate) mod fast_calls;
mod flags;
mod io;
pub(crate) mod iret;
mod near;
mod processor;
mod segments;
mod stack_ops;
mod string;

use iced_x86::{
    Instruction,
    Mnemonic::{self, *},
    OpKind, Register,
};

use crate::{
    cpu::Cpu,
    exception::{Exception, vector},
    interrupt::{Software, software_interrupt},
    operand::truncate,
    xstate,
};

/// Where execution goes on after an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flow {
    /// At the next instruction.
    Next,
    /// RIP is set: a branch, or an instruction that goes on where it was interrupted.
    Set,
}

/// What an instruction comes to.
pub(crate) type Done = Result<Flow, Exception>;

/// Executes `insn`, which is the instruction at CS:RIP.
///
/// On success RIP is where execution goes on. On an exception RIP is still at the instruction, and nothing has changed
/// but what the SDM says does. [`Cpu::sti_shadow`] and [`Cpu::mov_ss_shadow`] are those after the instruction.
pub fn emulate(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Exception> {
    // RF holds for one instruction; those that load it (IRET, a task switch) do so below.
    cpu.rflags &= !purlin_arch::x86_64::regs::rflags::RF;
    let (shadows, pending) = ((cpu.sti_shadow, cpu.mov_ss_shadow), cpu.pending_debug);
    (cpu.sti_shadow, cpu.mov_ss_shadow) = (false, false);
    match execute(cpu, insn) {
        Ok(Flow::Next) => cpu.rip = cpu.next_rip(insn),
        Ok(Flow::Set) => {}
        Err(exception) => {
            // It has not completed: it hit no data breakpoint.
            (cpu.sti_shadow, cpu.mov_ss_shadow) = shadows;
            cpu.pending_debug = pending;
            return Err(exception);
        }
    }
    Ok(())
}

fn execute(cpu: &mut Cpu, insn: &Instruction) -> Done {
    let next = cpu.next_rip(insn);
    let plain = |result: Result<(), Exception>| result.map(|()| Flow::Next);
    match insn.mnemonic() {
        Mov => mov(cpu, insn),
        Lds | Les | Lfs | Lgs | Lss => plain(segments::load_far_pointer(cpu, insn)),
        Lgdt | Lidt => plain(segments::load_table(cpu, insn)),
        Sgdt | Sidt => plain(segments::store_table(cpu, insn)),
        Lldt => plain(segments::lldt(cpu, insn)),
        Ltr => plain(segments::ltr(cpu, insn)),
        Sldt | Str | Smsw => plain(segments::store_system_register(cpu, insn)),
        Lar | Lsl | Verr | Verw => plain(segments::inspect(cpu, insn)),
        Arpl => plain(segments::arpl(cpu, insn)),

        Push | Pop | Pusha | Pushad | Popa | Popad | Enter | Leave => plain(stack_ops::execute(cpu, insn)),
        Pushf | Pushfd | Pushfq => plain(flags::pushf(cpu, insn)),
        Popf | Popfd | Popfq => plain(flags::popf(cpu, insn)),
        Cli => plain(flags::cli(cpu)),
        Sti => plain(flags::sti(cpu)),
        Cld | Std => plain(flags::set_direction(cpu, insn.mnemonic() == Std)),
        Clac | Stac => plain(flags::set_ac(cpu, insn.mnemonic() == Stac)),

        Jmp | Call if is_far(insn) => far::branch(cpu, insn),
        Retf => far::ret(cpu, insn),
        Iret | Iretd | Iretq => iret::iret(cpu, insn),
        Jmp | Call | Ret | Loop | Loope | Loopne | Jcxz | Jecxz | Jrcxz => near::execute(cpu, insn),
        _ if insn.is_jcc_short_or_near() => near::execute(cpu, insn),

        Int => interrupt(cpu, insn.immediate8(), Software::Int, next),
        Int3 => interrupt(cpu, vector::BP, Software::Trap, next),
        Int1 => interrupt(cpu, vector::DB, Software::Icebp, next),
        Into => decimal::into(cpu, next),
        Bound => plain(decimal::bound(cpu, insn)),
        Syscall => fast_calls::syscall(cpu, next),
        Sysret | Sysretq => fast_calls::sysret(cpu, insn.mnemonic() == Sysretq),
        Sysenter => fast_calls::sysenter(cpu),
        Sysexit | Sysexitq => fast_calls::sysexit(cpu, insn.mnemonic() == Sysexitq),
        Swapgs => plain(fast_calls::swapgs(cpu)),
        Rdfsbase | Rdgsbase | Wrfsbase | Wrgsbase => plain(fast_calls::segment_base(cpu, insn)),

        Lmsw => plain(control_regs::lmsw(cpu, insn)),
        Clts => plain(control_regs::clts(cpu)),
        Hlt => plain(control_regs::hlt(cpu)),
        Invd | Wbinvd | Wbnoinvd => plain(cpu.require_ring0()),
        Invlpg => plain(control_regs::invlpg(cpu, insn)),
        Invpcid => plain(control_regs::invpcid(cpu, insn)),
        Xgetbv => plain(control_regs::xgetbv(cpu)),
        Xsetbv => plain(control_regs::xsetbv(cpu)),

        Cpuid => plain({
            processor::cpuid(cpu);
            Ok(())
        }),
        Rdtsc => plain(processor::rdtsc(cpu)),
        Rdtscp => plain(processor::rdtscp(cpu)),
        Rdpid => plain(processor::rdpid(cpu, insn)),
        Rdpmc => plain(processor::rdpmc()),
        Rdmsr => plain(processor::rdmsr(cpu)),
        Wrmsr => plain(processor::wrmsr(cpu)),
        Rdrand | Rdseed => plain(processor::random(cpu, insn)),

        In => plain(io::input(cpu, insn)),
        Out => plain(io::output(cpu, insn)),
        Insb | Insw | Insd => io::input_string(cpu, insn),
        Outsb | Outsw | Outsd => io::output_string(cpu, insn),
        _ if insn.is_string_instruction() => string::execute(cpu, insn),

        Fxsave | Fxsave64 => plain(xstate::fxsave(cpu, insn)),
        Fxrstor | Fxrstor64 => plain(xstate::fxrstor(cpu, insn)),
        Xsave | Xsave64 | Xsaveopt | Xsaveopt64 | Xsavec | Xsavec64 | Xrstor | Xrstor64 => {
            plain(xstate::xsave(cpu, insn))
        }
        Vzeroupper | Vzeroall => plain(xstate::zero_vectors(cpu, insn)),
        Ldmxcsr | Vldmxcsr => plain(xstate::ldmxcsr(cpu, insn)),
        Stmxcsr | Vstmxcsr => plain(xstate::stmxcsr(cpu, insn)),
        Vmaskmovps | Vmaskmovpd | Vpmaskmovd | Vpmaskmovq | Maskmovdqu | Vmaskmovdqu | Maskmovq => {
            plain(xstate::masked(cpu, insn))
        }
        _ if insn.is_vsib() && !is_prefetch(insn) => plain(xstate::masked(cpu, insn)),
        Fnclex | Fclex => plain(xstate::fnclex(cpu, insn)),
        Fnstenv | Fstenv | Fldenv | Fnsave | Fsave | Frstor => plain(xstate::environment(cpu, insn)),

        Aaa | Aas | Aam | Aad | Daa | Das | Salc => plain(decimal::execute(cpu, insn)),
        Xlatb => plain(xlat(cpu, insn)),

        // UD0, UD1 and UD2; MONITOR and MWAIT, which are not offered; and whatever nobody knows.
        _ => Err(Exception::UD),
    }
}

/// The gathering and scattering prefetches, which no processor offered here has.
fn is_prefetch(insn: &Instruction) -> bool {
    insn.cpuid_features().contains(&iced_x86::CpuidFeature::AVX512PF)
}

/// MOV lands here for segment, control and debug registers only.
fn mov(cpu: &mut Cpu, insn: &Instruction) -> Done {
    let special = |op| insn.op_kind(op) == OpKind::Register && !insn.op_register(op).is_gpr();
    let register = match (special(0), special(1)) {
        (true, _) => insn.op_register(0),
        (_, true) => insn.op_register(1),
        _ => Register::None,
    };
    match register {
        Register::None => {
            let value = cpu.read_op(insn, 1)?;
            cpu.write_op(insn, 0, value)?;
        }
        r if r.is_segment_register() => segments::mov(cpu, insn)?,
        r if r.is_cr() => control_regs::mov_cr(cpu, insn)?,
        r if r.is_dr() => control_regs::mov_dr(cpu, insn)?,
        _ => return Err(Exception::UD),
    }
    Ok(Flow::Next)
}

fn is_far(insn: &Instruction) -> bool {
    insn.is_jmp_far() || insn.is_jmp_far_indirect() || insn.is_call_far() || insn.is_call_far_indirect()
}

fn interrupt(cpu: &mut Cpu, vector: u8, kind: Software, next: u64) -> Done {
    software_interrupt(cpu, vector, kind, next)?;
    Ok(Flow::Set)
}

/// XLAT: AL is looked up in the table at (E/R)BX.
fn xlat(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Exception> {
    let address = cpu.mem_linear(insn, 0, 1, crate::mem::Access::Read)?;
    let value = cpu.load::<u8>(address)?;
    cpu.set_register(Register::AL, u64::from(value));
    Ok(())
}

/// The bytes that an instruction moves the stack pointer by for one operand: 2, 4 or 8.
fn stack_width(insn: &Instruction) -> usize {
    insn.stack_pointer_increment().unsigned_abs() as usize
}

/// Whether an instruction is the one named or its alias for another operand size.
fn is_one_of(insn: &Instruction, mnemonics: &[Mnemonic]) -> bool {
    mnemonics.contains(&insn.mnemonic())
}

impl Cpu {
    /// #GP(0) unless at the highest privilege level. Virtual-8086 mode is at the lowest.
    pub(crate) fn require_ring0(&self) -> Result<(), Exception> {
        if self.cpl == 0 { Ok(()) } else { Err(Exception::GP0) }
    }

    /// #UD in real and virtual-8086 mode.
    pub(crate) fn require_protected(&self) -> Result<(), Exception> {
        if self.protected() && !self.v86() { Ok(()) } else { Err(Exception::UD) }
    }

    /// Goes on at `offset`, cut to `size` bytes, in the same code segment: #GP(0) outside of it.
    pub(crate) fn jump(&mut self, offset: u64, size: usize) -> Result<(), Exception> {
        let offset = truncate(offset, size);
        self.check_target(offset)?;
        self.rip = offset;
        Ok(())
    }

    /// #GP(0) unless `offset` is in the current code segment.
    pub(crate) fn check_target(&self, offset: u64) -> Result<(), Exception> {
        let inside = if self.code64() {
            crate::segment::is_canonical(offset)
        } else {
            offset <= u64::from(self.seg[purlin_arch::x86_64::regs::seg::CS].limit)
        };
        if inside { Ok(()) } else { Err(Exception::GP0) }
    }
}

#[cfg(test)]
mod tests;
