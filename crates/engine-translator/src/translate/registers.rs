//! What is emulated elsewhere but so frequent that it has emitted code: reading system registers, and the few of them that
//! can be written without anybody else taking note. None of this touches the status flags.

use iced_x86::{Code, Instruction, Register};
use purlin_arch::x86_64::regs::{gpr, rflags, seg};

use super::{
    asm::{Mem, Section, cc, reg},
    classify::Own,
    emit::{Emitter, Insn},
    layout::{at, segment_base, selector},
};

/// Where a control register that can simply be read is.
pub fn control_field(register: Register) -> Option<Mem> {
    match register {
        Register::CR0 => Some(at::CR0),
        Register::CR2 => Some(at::CR2),
        Register::CR3 => Some(at::CR3),
        Register::CR4 => Some(at::CR4),
        _ => None,
    }
}

impl Emitter<'_> {
    /// An instruction with code of its own.
    pub(super) fn own(&mut self, insn: &Insn, own: Own) {
        let register = insn.insn.op0_register();
        let (number, size) = (register.full_register().number() as u8, register.size());
        match own {
            Own::Selector => {
                self.asm.load16(reg::R10, selector(insn.insn.op1_register().number()));
                self.write_gpr(number, reg::R10, size);
            }
            Own::ReadControl => {
                if let Some(field) = control_field(insn.insn.op1_register()) {
                    self.asm.load(reg::R10, field);
                    self.write_gpr(number, reg::R10, size);
                }
            }
            Own::TimeStamp => self.time_stamp(&insn.insn),
            Own::ReadBase => {
                self.asm.load(reg::R10, segment_base(base_of(&insn.insn)));
                self.write_gpr(number, reg::R10, size);
            }
            Own::WriteBase => self.write_base(insn, number, size),
            Own::Direction => self.set_flag(rflags::DF, i32::from(insn.insn.code() == Code::Std)),
            Own::String => self.string(insn),
            Own::ExtendedState => self.extended_state(insn),
        }
    }

    /// RDTSC and RDTSCP: the host's, moved.
    fn time_stamp(&mut self, insn: &Instruction) {
        let aux = insn.code() == Code::Rdtscp;
        self.asm.bytes(if aux { &[0x0f, 0x01, 0xf9] } else { &[0x0f, 0x31] });
        let (low, high) = (gpr::RAX as u8, gpr::RDX as u8);
        self.asm.rorx(high, high, 32);
        self.asm.lea(low, Mem::sum(low, high));
        self.asm.load(reg::R10, at::TSC_OFFSET);
        self.asm.lea(low, Mem::sum(low, reg::R10));
        self.asm.rorx(high, low, 32);
        self.asm.mov_rr32(high, high);
        self.asm.mov_rr32(low, low);
        if aux {
            self.asm.load_sized(gpr::RCX as u8, at::TSC_AUX, 4);
        }
    }

    /// WRFSBASE and WRGSBASE; an address that is not canonical raises an exception.
    fn write_base(&mut self, insn: &Insn, number: u8, size: usize) {
        self.read_gpr(reg::R10, number);
        if size == 4 {
            self.asm.mov_rr32(reg::R10, reg::R10);
        } else {
            // Saving flags changes R10.
            self.free_flags(insn.live);
            self.read_gpr(reg::R10, number);
            self.asm.mov_rr(reg::R11, reg::R10);
            self.asm.sar(reg::R11, 47);
            self.asm.lea(reg::R11, Mem::at(reg::R11, 1));
            self.asm.cmp_ri(reg::R11, 1);
            self.emulate_if(cc::A, insn);
        }
        self.asm.store(segment_base(base_of(&insn.insn)), reg::R10);
    }

    /// Leaves for the run loop to emulate `insn`, on a condition.
    pub(super) fn emulate_if(&mut self, condition: u8, insn: &Insn) {
        let cold = self.asm.label();
        self.asm.jcc(condition, cold);
        let saved = self.flags_saved;
        self.asm.section(Section::Cold);
        self.asm.bind(cold);
        self.emulate(insn);
        self.asm.section(Section::Hot);
        self.flags_saved = saved;
    }
}

/// FS or GS.
fn base_of(insn: &Instruction) -> usize {
    use Code::{Rdfsbase_r32, Rdfsbase_r64, Wrfsbase_r32, Wrfsbase_r64};
    let fs = matches!(insn.code(), Rdfsbase_r32 | Rdfsbase_r64 | Wrfsbase_r32 | Wrfsbase_r64);
    if fs { seg::FS } else { seg::GS }
}
