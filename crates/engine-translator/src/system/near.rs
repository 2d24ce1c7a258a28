//! Near branches, where they are not translated (SDM vol. 2: JMP, CALL, RET, Jcc, LOOP, JrCXZ).

use iced_x86::{
    Code, ConditionCode, Instruction,
    Mnemonic::{self, *},
    OpKind,
};
use purlin_arch::x86_64::regs::{gpr::RCX, rflags};

use super::{Done, Flow};
use crate::{cpu::Cpu, operand::truncate, stack::Stack};

pub fn execute(cpu: &mut Cpu, insn: &Instruction) -> Done {
    match insn.mnemonic() {
        Jmp => {
            let (target, size) = target(cpu, insn)?;
            cpu.jump(target, size)?;
        }
        Call => call(cpu, insn)?,
        Ret => ret(cpu, insn)?,
        Loop | Loope | Loopne => return loop_(cpu, insn),
        Jcxz => return branch_if(cpu, insn, cpu.gpr[RCX] as u16 == 0),
        Jecxz => return branch_if(cpu, insn, cpu.gpr[RCX] as u32 == 0),
        Jrcxz => return branch_if(cpu, insn, cpu.gpr[RCX] == 0),
        _ => return branch_if(cpu, insn, condition(cpu.rflags, insn.condition_code())),
    }
    Ok(Flow::Set)
}

/// Where a branch leads, and its operand size.
fn target(cpu: &mut Cpu, insn: &Instruction) -> Result<(u64, usize), crate::exception::Exception> {
    let size = match insn.op_kind(0) {
        OpKind::NearBranch16 => 2,
        OpKind::NearBranch32 => 4,
        OpKind::NearBranch64 => 8,
        OpKind::Register => insn.op_register(0).size(),
        _ => insn.memory_size().size(),
    };
    Ok((cpu.read_op(insn, 0)?, size))
}

fn branch_if(cpu: &mut Cpu, insn: &Instruction, taken: bool) -> Done {
    if !taken {
        return Ok(Flow::Next);
    }
    let (target, size) = target(cpu, insn)?;
    cpu.jump(target, size)?;
    Ok(Flow::Set)
}

fn call(cpu: &mut Cpu, insn: &Instruction) -> Result<(), crate::exception::Exception> {
    let (target, size) = target(cpu, insn)?;
    let target = truncate(target, size);
    let next = cpu.next_rip(insn);
    // A stack that cannot be written comes before a target that cannot be reached.
    let mut stack = Stack::current(cpu);
    if cpu.features.amd {
        // With that nothing is written.
        let mut pushed = Stack::current(cpu);
        pushed.skip((size as u64).wrapping_neg());
        pushed.probe_aligned_store(cpu, size)?;
        cpu.check_target(target)?;
        stack.push(cpu, size, next)?;
    } else {
        stack.push(cpu, size, next)?;
        cpu.check_target(target)?;
    }
    stack.commit(cpu);
    cpu.rip = target;
    Ok(())
}

fn ret(cpu: &mut Cpu, insn: &Instruction) -> Result<(), crate::exception::Exception> {
    let (size, extra) = match insn.code() {
        Code::Retnw => (2, 0),
        Code::Retnd => (4, 0),
        Code::Retnw_imm16 => (2, insn.immediate16()),
        Code::Retnd_imm16 => (4, insn.immediate16()),
        Code::Retnq_imm16 => (8, insn.immediate16()),
        _ => (8, 0),
    };
    let mut stack = Stack::current(cpu);
    let target = stack.pop(cpu, size)?;
    cpu.jump(target, size)?;
    stack.skip(u64::from(extra));
    stack.commit(cpu);
    Ok(())
}

/// LOOP, LOOPE and LOOPNE count in CX, ECX or RCX by address size.
fn loop_(cpu: &mut Cpu, insn: &Instruction) -> Done {
    let size = insn.op_code().address_size() as usize / 8;
    let count = truncate(cpu.gpr[RCX].wrapping_sub(1), size);
    let zf = cpu.rflags & rflags::ZF != 0;
    let taken = count != 0
        && match insn.mnemonic() {
            Mnemonic::Loope => zf,
            Mnemonic::Loopne => !zf,
            _ => true,
        };
    // A target outside of the segment leaves the count alone.
    let flow = branch_if(cpu, insn, taken)?;
    cpu.set_gpr(RCX, size, count);
    Ok(flow)
}

/// Whether a condition holds (SDM vol. 1 appendix B).
pub fn condition(flags: u64, condition: ConditionCode) -> bool {
    let set = |bits: u64| flags & bits != 0;
    let less = set(rflags::SF) != set(rflags::OF);
    match condition {
        ConditionCode::o => set(rflags::OF),
        ConditionCode::no => !set(rflags::OF),
        ConditionCode::b => set(rflags::CF),
        ConditionCode::ae => !set(rflags::CF),
        ConditionCode::e => set(rflags::ZF),
        ConditionCode::ne => !set(rflags::ZF),
        ConditionCode::be => set(rflags::CF | rflags::ZF),
        ConditionCode::a => !set(rflags::CF | rflags::ZF),
        ConditionCode::s => set(rflags::SF),
        ConditionCode::ns => !set(rflags::SF),
        ConditionCode::p => set(rflags::PF),
        ConditionCode::np => !set(rflags::PF),
        ConditionCode::l => less,
        ConditionCode::ge => !less,
        ConditionCode::le => less || set(rflags::ZF),
        ConditionCode::g => !less && !set(rflags::ZF),
        ConditionCode::None => true,
    }
}
