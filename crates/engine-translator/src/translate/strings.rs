//! MOVS and STOS, with and without REP, upwards on one page: the host's own instruction, on host addresses. Kernels clear
//! and copy pages and small structures with them. All else is emulated.

use iced_x86::Instruction;
use purlin_arch::x86_64::regs::{gpr, rflags};

use super::{
    asm::{Mem, cc, reg},
    emit::{Emitter, Insn, look_up},
    layout::at,
};

const RSI: u8 = gpr::RSI as u8;
const RDI: u8 = gpr::RDI as u8;
const RCX: u8 = gpr::RCX as u8;
const PAGE: i32 = 4096;

impl Emitter<'_> {
    /// MOVS or STOS.
    pub(super) fn string(&mut self, insn: &Insn) {
        let size = insn.insn.memory_size().size();
        let moves = insn.insn.op_count() == 2 && insn.insn.op1_kind() == iced_x86::OpKind::MemorySegRSI;
        self.free_flags(insn.live);
        self.asm.test8_mem(Mem::gs(at::RFLAGS.disp + 1), (rflags::DF >> 8) as u8);
        self.emulate_if(cc::NE, insn);
        if repeats(&insn.insn) {
            self.asm.cmp_ri(RCX, PAGE / size as i32);
            self.emulate_if(cc::A, insn);
        }
        if moves {
            self.distance(insn, RSI, false, size);
            self.asm.store(at::LENT, reg::R11);
        }
        self.distance(insn, RDI, true, size);
        if moves {
            self.asm.load(reg::R10, at::LENT);
            self.asm.lea(RSI, Mem::sum(RSI, reg::R10));
        }
        self.asm.lea(RDI, Mem::sum(RDI, reg::R11));
        self.host_string(moves, size, repeats(&insn.insn));
        self.asm.neg(reg::R11);
        self.asm.lea(RDI, Mem::sum(RDI, reg::R11));
        if moves {
            self.asm.neg(reg::R10);
            self.asm.lea(RSI, Mem::sum(RSI, reg::R10));
        }
    }

    /// R11 = host address minus linear address of what `pointer` points at, if all elements are on one page that may be
    /// accessed so.
    fn distance(&mut self, insn: &Insn, pointer: u8, write: bool, size: usize) {
        self.asm.mov_rr(reg::R10, pointer);
        look_up(&mut self.asm, self.mode.privilege(), write, size as u32);
        self.emulate_if(cc::A, insn);
        self.load_host(write);
        self.asm.lea(reg::R11, Mem::sum(reg::R10, reg::R11));
        self.asm.sub_rr(reg::R11, pointer);
        if repeats(&insn.insn) {
            let scale = size.trailing_zeros() as u8;
            self.asm.lea(reg::R10, Mem { gs: false, base: Some(reg::R10), index: Some((RCX, scale)), disp: 0 });
            self.asm.cmp_ri(reg::R10, PAGE);
            self.emulate_if(cc::A, insn);
        }
    }

    fn host_string(&mut self, moves: bool, size: usize, repeats: bool) {
        let opcode = if moves { 0xa4 } else { 0xaa } | u8::from(size > 1);
        if repeats {
            self.asm.bytes(&[0xf3]);
        }
        match size {
            2 => self.asm.bytes(&[0x66]),
            8 => self.asm.bytes(&[0x48]),
            _ => {}
        }
        self.asm.bytes(&[opcode]);
    }
}

fn repeats(insn: &Instruction) -> bool {
    insn.has_rep_prefix() || insn.has_repne_prefix()
}
