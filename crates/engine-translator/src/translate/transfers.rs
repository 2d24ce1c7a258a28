//! SYSCALL, SYSRET, IRET and page faults between 64-bit code and 64-bit code, without leaving emitted code: the helper behind their
//! stub does what the run loop would, and finds the block to go on with. Whatever is not the usual case it leaves alone,
//! for the run loop to emulate.
//!
//! Guest vectors stay where they are: supervisor code is then of a mode that does not use them, with the user's still
//! in the host's registers. Only where user code is entered that has them elsewhere are they loaded.
#![allow(unsafe_code)]

use iced_x86::{Code, Instruction};
use purlin_arch::x86_64::regs::rflags;

use super::{
    asm::reg,
    desc::RefillDesc,
    emit::{Emitter, Insn},
    flags::STATUS,
    place::resolve,
};
use crate::{
    cpu::{Block, Cpu},
    interrupt,
    profile::Place,
    system::{fast_calls, iret},
    vcpu::{from_flag_word, to_flag_word},
};

/// Which instruction it is: the low byte of what the stub passes on, with the instruction's length above.
const SYSCALL: u64 = 0;
const SYSRET: u64 = 1;
const IRET: u64 = 2;
const LEN_SHIFT: u32 = 8;

impl Emitter<'_> {
    /// What tells the stub which instruction `insn` is, if it is one that may be done here.
    pub(super) fn transfer_word(&self, insn: &Instruction) -> Option<u64> {
        if self.mode.bits() != 64 || self.mode.step() {
            return None;
        }
        let which = match insn.code() {
            Code::Syscall => SYSCALL,
            Code::Sysretq if self.mode.kernel() => SYSRET,
            Code::Iretq if self.mode.kernel() => IRET,
            _ => return None,
        };
        Some(which | (insn.len() as u64) << LEN_SHIFT)
    }

    /// Executes `insn` by way of [`transfer`].
    pub(super) fn transfer(&mut self, insn: &Insn, word: u64) {
        self.free_flags(STATUS);
        self.asm.mov_ri(reg::R10, word);
        self.asm.call_to(self.stubs.transfer);
        self.exit_desc(insn);
    }
}

/// Executes the instruction that `word` says, whose `ExitDesc` is at `desc`. Returns the host address to go on at, with
/// the flags in `flag_word` and the target's RIP in R11; 0 if nothing was done. The same restrictions as in
/// [`super::helpers`]' `quick_access`.
pub(super) extern "C" fn transfer(block: *mut Block, word: u64, desc: *const u8) -> u64 {
    // SAFETY: called by emitted code on the thread that runs the vCPU, with its own block; no other reference to the
    // Cpu exists while emitted code runs. A packed `ExitDesc` begins with RIP.
    let (cpu, mailbox, rip) =
        unsafe { (&mut *(*block).cpu.get(), &(*block).mailbox, desc.cast::<u64>().read_unaligned()) };
    // There may be no other poll on a way that leads round by system calls alone.
    if mailbox.any() || cpu.event_waits() || cpu.interrupt_waits() {
        return 0;
    }
    cpu.rflags = from_flag_word(cpu.rflags, cpu.emitted.flag_word);
    let done = match word & 0xff {
        SYSCALL => {
            let next = resolve(rip, cpu.emitted.code_page).wrapping_add(word >> LEN_SHIFT);
            fast_calls::syscall(cpu, next).is_ok()
        }
        SYSRET => cpu.gpr[R11] & rflags::TF == 0 && fast_calls::sysret(cpu, true).is_ok(),
        _ => iret::quickly(cpu),
    };
    if !done {
        return 0;
    }
    mailbox.phase.set(if cpu.cpl == 3 { Place::User } else { Place::Kernel });
    cpu.emitted.lean = true;
    let entry = cpu.enter_context();
    cpu.emitted.lean = false;
    entry.unwrap_or(cpu.shared.code.stubs.miss_saved)
}

/// Delivers the page fault in `fault`, of the access whose `RefillDesc` is at `refill`, or if that is null of the instruction at
/// `rip`; the flags are in `flag_word`. The same otherwise.
pub(super) extern "C" fn fault(block: *mut Block, refill: *const u8, rip: u64) -> u64 {
    // SAFETY: as in `transfer`.
    let (cpu, mailbox) = unsafe { (&mut *(*block).cpu.get(), &(*block).mailbox) };
    cpu.emitted.faulted = 0;
    if mailbox.any() || cpu.event_waits() || cpu.interrupt_waits() {
        return 0;
    }
    let rip = match refill.is_null() {
        true => rip,
        // SAFETY: the stub has it from the emitted code that called it.
        false => unsafe { RefillDesc::read(refill) }.rip(cpu.shared.code.origin(refill as u64).rip),
    };
    let rip = resolve(rip, cpu.emitted.code_page);
    cpu.rflags = from_flag_word(cpu.rflags, cpu.emitted.flag_word);
    if !interrupt::page_fault_quickly(cpu, cpu.emitted.fault, rip) {
        return 0;
    }
    cpu.emitted.refill_failed = None;
    mailbox.phase.set(Place::Kernel);
    cpu.emitted.lean = true;
    let entry = cpu.enter_context();
    cpu.emitted.lean = false;
    entry.unwrap_or(cpu.shared.code.stubs.miss_saved)
}

const R11: usize = 11;

impl Cpu {
    /// Makes emitted code ready for the context that the processor now is in. The block to go on with, if it is known.
    fn enter_context(&mut self) -> Option<u64> {
        let vectors = self.cpl == 3 && self.emitted.user_vectors;
        let context = self.context(vectors, false);
        let (from, to) = (self.emitted.context.mode.table(), context.mode.table());
        let (rip, returns, flag_word) = (self.rip, self.emitted.returns, to_flag_word(self.rflags));
        let emitted = &mut self.emitted;
        emitted.load_vectors = vectors && emitted.vectors == 0;
        emitted.flag_word = flag_word;
        // Nothing is pending that could wait.
        emitted.waiting = false;
        emitted.context = context;
        let jumps = emitted.jumps()?;
        jumps.returns.set_pointer(from, returns);
        let returns = jumps.returns.pointer(to);
        let known = jumps.is_for(&context).then(|| jumps.get(to, rip));
        self.emitted.returns = returns;
        known?.or_else(|| self.find_quickly(rip))
    }
}
