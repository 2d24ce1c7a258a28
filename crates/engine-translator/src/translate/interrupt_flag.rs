//! What kernels execute most of all that is emulated elsewhere: CLI and STI, PUSHFQ, and SWAPGS. None of them touches
//! the status flags, so they are made of instructions that do not either.

use purlin_arch::x86_64::regs::{rflags, seg};

use super::{
    asm::{Mem, Section, cc, reg},
    emit::{Emitter, Insn},
    layout::{at, segment_base},
};

impl Emitter<'_> {
    /// CLI at CPL 0.
    pub(super) fn cli(&mut self) {
        self.set_flag(rflags::IF, 0);
    }

    /// STI at CPL 0. False if it ends the block.
    ///
    /// No interrupt may come before the end of the next instruction: while none waits for the flag, that takes a
    /// request, which is seen at the next poll or exit, and there is none before that instruction, as long as it is in
    /// the same block.
    pub(super) fn sti(&mut self, insn: &Insn) -> bool {
        if self.last {
            self.emulate(insn);
            return false;
        }
        self.free_flags(insn.live);
        let (waiting, saved) = (self.asm.label(), self.flags_saved);
        self.asm.cmp8_mem(at::WAITING, 0);
        self.asm.jcc(cc::NE, waiting);
        self.set_flag(rflags::IF, 1);
        self.asm.section(Section::Cold);
        self.asm.bind(waiting);
        self.emulate(insn);
        self.asm.section(Section::Hot);
        self.flags_saved = saved;
        true
    }

    /// A bit of RFLAGS that is in memory = `value`.
    pub(super) fn set_flag(&mut self, flag: u64, value: i32) {
        // Rotated to the right by this, it is the highest bit.
        let to_top = flag.trailing_zeros() as u8 + 1;
        let twice = Mem { gs: false, base: Some(reg::R10), index: Some((reg::R10, 0)), disp: value };
        self.asm.load(reg::R10, at::RFLAGS);
        self.asm.rorx(reg::R10, reg::R10, to_top);
        self.asm.lea(reg::R10, twice);
        self.asm.rorx(reg::R10, reg::R10, 64 - (to_top - 1));
        self.asm.store(at::RFLAGS, reg::R10);
    }

    /// SWAPGS at CPL 0 of 64-bit code.
    pub(super) fn swapgs(&mut self) {
        self.asm.load(reg::R10, segment_base(seg::GS));
        self.asm.load(reg::R11, at::KERNEL_GS_BASE);
        self.asm.store(segment_base(seg::GS), reg::R11);
        self.asm.store(at::KERNEL_GS_BASE, reg::R10);
    }

    /// PUSHFQ of 64-bit code.
    pub(super) fn pushf(&mut self, insn: &Insn) {
        const OTHERS: u32 = !(rflags::STATUS | rflags::RF | rflags::VM) as u32;
        self.hosts = [None; 2];
        if !self.flags_saved {
            self.save_flags();
        }
        self.asm.load_sized(reg::R10, at::FLAG_WORD, 4);
        self.asm.mov_rr32(reg::R11, reg::R10);
        self.asm.and32(reg::R11, 1);
        self.asm.shl(reg::R11, rflags::OF.trailing_zeros() as u8);
        self.asm.shr(reg::R10, 8);
        self.asm.and32(reg::R10, (rflags::STATUS & 0xff) as u32);
        self.asm.lea(reg::R10, Mem::sum(reg::R10, reg::R11));
        self.asm.load(reg::R11, at::RFLAGS);
        self.asm.and32(reg::R11, OTHERS);
        self.asm.lea(reg::R10, Mem::sum(reg::R10, reg::R11));
        self.asm.store(at::TEMP, reg::R10);
        self.stack_push(insn, 8, &mut |this, mem| this.store_from(mem, at::TEMP, 8));
    }
}
