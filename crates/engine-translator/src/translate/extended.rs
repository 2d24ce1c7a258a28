//! XSAVE, XSAVEOPT, XSAVEC and XRSTOR of 64-bit code without leaving emitted code: kernels execute them at each switch of
//! threads, and so do dynamic linkers. A stub stores the vector registers, if they are the guest's, where Rust code has them, and
//! calls what emulates these instructions. Whatever is not plain memory, or raises an exception, it leaves to the run loop.
//!
//! Code of a mode with vectors then has them loaded again. In code of one without, which mostly is a kernel's, they are given
//! up: `XState` has them, and user code that wants them is entered with what is there then.
#![allow(unsafe_code)]

use super::{
    asm::{cc, reg},
    emit::{Emitter, Insn},
    operands::Operand,
};
use crate::{
    cpu::Block,
    xstate::{self, Form},
};

impl Emitter<'_> {
    /// Executes `insn` by way of [`extended_state`].
    pub(super) fn extended_state(&mut self, insn: &Insn) {
        let word = Form::of(insn.insn.mnemonic()).map_or(0, Form::to_word);
        let operand = Operand::of(&insn.insn);
        self.free_flags(insn.live);
        self.address(&operand);
        self.add_segment_base(operand.segment);
        self.asm.mov_ri(reg::R11, word);
        self.asm.call_to(self.stubs.extended);
        self.asm.test_rr(reg::R10);
        self.emulate_if(cc::E, insn);
    }
}

/// Executes the instruction that `word` says, on the area at linear `address`. Nonzero if it is done. The vector registers
/// are where Rust code has them.
pub(super) extern "C" fn extended_state(block: *mut Block, address: u64, word: u64) -> u64 {
    // SAFETY: called by emitted code on the thread that runs the vCPU, with its own block; no other reference to the
    // Cpu exists while emitted code runs.
    let cpu = unsafe { &mut *(*block).cpu.get() };
    cpu.emitted.vectors = u32::from(cpu.emitted.context.mode.vectors());
    u64::from(xstate::xsave_quickly(cpu, Form::from_word(word), address))
}
