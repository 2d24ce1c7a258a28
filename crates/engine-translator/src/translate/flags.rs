//! Which status flags are live where.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, RflagsBits};

use super::classify::{Class, Own};

/// The six status flags, in iced's bits.
pub const STATUS: u32 =
    RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::CF | RflagsBits::PF;

/// What an instruction does to the status flags.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlagUse {
    /// Needed by it.
    pub reads: u32,
    /// Written by it, whatever its operands.
    pub kills: u32,
    /// Written by it, perhaps.
    pub touches: u32,
}

/// What `insn` does to the status flags; everything is needed where emitted code is left.
pub fn flag_use(insn: &Instruction, class: Class) -> FlagUse {
    match class {
        Class::Copy | Class::Vector(_) => {
            let touches = insn.rflags_modified() & STATUS;
            let kills = if may_leave_flags(insn) { 0 } else { touches };
            FlagUse { reads: insn.rflags_read() & STATUS, kills, touches }
        }
        Class::Nothing | Class::Push | Class::Pop | Class::Leave | Class::Cli | Class::Swapgs => FlagUse::default(),
        Class::Own(own) if !matches!(own, Own::WriteBase | Own::String | Own::ExtendedState) => FlagUse::default(),
        // Where an interrupt waits, it leaves; so do others where there is more to them.
        _ => FlagUse { reads: STATUS, kills: 0, touches: 0 },
    }
}

impl FlagUse {
    /// The same, but for one that nothing is known of: all flags are right wherever it raises an exception.
    pub fn exact(self) -> Self {
        Self { reads: STATUS, kills: 0, ..self }
    }
}

/// Shifts and rotates by a count that may be zero leave all flags alone then; the flags that SDM calls undefined are
/// not counted on either way.
fn may_leave_flags(insn: &Instruction) -> bool {
    use Mnemonic::*;
    match insn.mnemonic() {
        Shl | Sal | Shr | Sar | Rol | Ror | Rcl | Rcr | Shld | Shrd => {
            let last = insn.op_count() - 1;
            match insn.op_kind(last) {
                OpKind::Immediate8 => insn.immediate8() & 0x1f == 0 || matches!(insn.mnemonic(), Rcl | Rcr),
                _ => true,
            }
        }
        Bsf | Bsr => true,
        _ => matches!(insn.code(), Code::INVALID),
    }
}
