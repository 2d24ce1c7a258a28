//! Memory that one translation leaves for the next on the same thread: translations are short, and many.

use std::cell::{Cell, RefCell};

use iced_x86::InstructionInfoFactory;

use super::{asm::Asm, emit::Insn};

thread_local! {
    static ASM: Cell<Option<Asm>> = const { Cell::new(None) };
    static INSNS: Cell<Vec<Insn>> = const { Cell::new(Vec::new()) };
    static FACTORY: RefCell<InstructionInfoFactory> = RefCell::new(InstructionInfoFactory::new());
}

/// An empty assembler for code that will lie at `origin`, in the cache at `base`.
pub fn asm(origin: u64, base: u64) -> Asm {
    let mut asm = ASM.take().unwrap_or_else(|| Asm::new(origin));
    asm.restart(origin);
    asm.base = base;
    asm
}

/// Gives one back.
pub fn return_asm(asm: Asm) {
    ASM.set(Some(asm));
}

/// An empty list.
pub fn insns() -> Vec<Insn> {
    let mut insns = INSNS.take();
    insns.clear();
    insns
}

/// Gives one back.
pub fn return_insns(insns: Vec<Insn>) {
    INSNS.set(insns);
}

/// Has `ask` ask about instructions.
pub fn with_factory<T>(ask: impl FnOnce(&mut InstructionInfoFactory) -> T) -> T {
    FACTORY.with_borrow_mut(ask)
}
