//! Instructions whose results are their own each time: what they give is thrown away at once, and everything else that
//! they do is compared.

use iced_x86::{Code, Instruction, Mnemonic, Register};

use super::memory::at_offset;

/// Whether two executions of it give two results.
pub fn gives_something_else(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(mnemonic, Rdrand | Rdseed | Rdtsc | Rdtscp | Rdpid | Cpuid | Xgetbv | Fnstenv | Fnsave)
}

/// The instructions that overwrite what `insn` gives: MOVs, so that flags stay.
pub fn throw_away(insn: &Instruction) -> Vec<Instruction> {
    use Mnemonic::*;
    use Register::*;
    match insn.mnemonic() {
        Rdrand | Rdseed | Rdpid => vec![overwrite(insn.op0_register())],
        Rdtsc | Xgetbv => vec![overwrite(EAX), overwrite(EDX)],
        Rdtscp => vec![overwrite(EAX), overwrite(EDX), overwrite(ECX)],
        Cpuid => vec![overwrite(EAX), overwrite(EBX), overwrite(ECX), overwrite(EDX)],
        Fnstenv | Fnsave => pointers(insn),
        _ => Vec::new(),
    }
}

fn overwrite(register: Register) -> Instruction {
    const VALUE: u32 = 0x1357_9bdf;
    let load = match register.size() {
        2 => Instruction::with2(Code::Mov_r16_imm16, register, VALUE & 0x7fff),
        4 => Instruction::with2(Code::Mov_r32_imm32, register, VALUE),
        _ => Instruction::with2(Code::Mov_r64_imm64, register, u64::from(VALUE)),
    };
    load.unwrap_or_default()
}

/// The x87's last-instruction pointers in an environment that was stored: the kernel does not keep all of them, and
/// AMD's processors give others than those of the last instruction.
fn pointers(insn: &Instruction) -> Vec<Instruction> {
    let short = matches!(insn.code(), Code::Fnstenv_m14byte | Code::Fnsave_m94byte);
    let (code, size) = if short { (Code::Mov_rm16_imm16, 2) } else { (Code::Mov_rm32_imm32, 4) };
    (3..7).map(|i| at_offset(insn, i * size, code, 0)).collect()
}
