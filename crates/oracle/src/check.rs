//! A case on both sides.

use anyhow::Result;
use iced_x86::{Instruction, Mnemonic, OpKind};
use purlin_arch::x86_64::regs::rflags;
use purlin_engine_translator::exception::vector;

use crate::{
    case::{Case, Outcome},
    compare::{self, Ignore, STATUS, differences, ran_through},
    host::is_amd,
    native::{BATCH, Native},
    saved,
    segments::DATA32,
    translated::{Run, Step, Translated},
};

/// What a comparison came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// All agree.
    Same {
        /// The instructions that were executed to their end.
        completed: Vec<Place>,
        /// The one that raised the exception, if one did.
        raised: Option<Place>,
        /// The vector of the exception that ended the case.
        vector: u8,
    },
    /// It does not end: not a case.
    Endless,
    /// It differs, but only after an instruction has read a flag that is undefined, or what XSAVE was free to store, or
    /// has asked for components that guests have not.
    Open,
    /// It differs in a way that is known and documented: see [`compare::known`].
    Known {
        /// The differences, a line each.
        lines: Vec<String>,
    },
    /// It differs.
    Different {
        /// Under which run.
        run: &'static str,
        /// The differences, a line each.
        lines: Vec<String>,
    },
}

/// An instruction of a case: its offset in the code, and in code of how many bits it was executed.
pub type Place = (u64, u32);

/// Both sides.
pub struct Oracle {
    native: Native,
    translated: Translated,
}

impl Oracle {
    /// Starts both.
    pub fn new() -> Result<Self> {
        // The child first: it takes over no thread.
        let native = Native::new()?;
        let translated = Translated::new(native.processor().encoded())?;
        Ok(Self { native, translated })
    }

    /// Checks one case.
    pub fn check(&mut self, case: &Case) -> Result<Verdict> {
        Ok(self.check_all(&[case])?.remove(0))
    }

    /// Checks cases; there is a verdict for each.
    pub fn check_all(&mut self, cases: &[&Case]) -> Result<Vec<Verdict>> {
        let mut verdicts = Vec::with_capacity(cases.len());
        for batch in cases.chunks(BATCH) {
            // What does not end is told by the translator, an instruction at a time, and not run natively.
            let single: Vec<_> = batch.iter().map(|case| self.translated.run(case, Run::Single)).collect();
            let mut single: Vec<_> = single;
            for (case, single) in batch.iter().zip(&mut single) {
                let Ok(Some((end, steps))) = &single else { continue };
                let faults_there = end.fault.vector == PAGE_FAULT && self.native.owns(end.fault.address);
                if faults_there || is_not_for_linux(case, end, steps) {
                    *single = Ok(None);
                }
            }
            let ends = |i: &usize| !matches!(single[*i], Ok(None));
            let run: Vec<&Case> = (0..batch.len()).filter(ends).map(|i| batch[i]).collect();
            let mut native = self.native.run(&run)?.into_iter();
            for (case, single) in batch.iter().zip(single) {
                verdicts.push(match single {
                    Ok(None) => Verdict::Endless,
                    Ok(Some(single)) => self.compare(case, native.next().flatten(), single),
                    Err(error) => {
                        native.next();
                        different("single", vec![format!("{error:#}")])
                    }
                });
            }
        }
        Ok(verdicts)
    }

    fn compare(&mut self, case: &Case, native: Option<Outcome>, (single, steps): (Outcome, Vec<Step>)) -> Verdict {
        let open = compare::open(case, &steps, single.fault.vector == 1);
        let Some(native) = native else {
            // A loop may depend on a flag that is undefined.
            let lines = vec!["the native side did not end".into()];
            return if open.consumed { Verdict::Open } else { different("native", lines) };
        };
        let pointers = !native.x87_exception_waits();
        let ignore = Ignore { flags: open.flags, pointers };
        match self.first_difference(case, &native, single, &steps, ignore) {
            Some(Verdict::Known { lines }) => Verdict::Known { lines },
            Some(_) if open.consumed || saved::is_read(case, &native, &steps) => Verdict::Open,
            Some(_) if saved::asks_for_others(case, &steps) => Verdict::Open,
            Some(other) => other,
            None => {
                let last = steps.last().map(|step| (step.rip.wrapping_sub(case.entry), step.bits));
                let raised = last.filter(|(o, _)| *o < case.code.len() as u64 && native.fault.vector != 1);
                let completed = executed(case, &steps).into_iter().filter(|place| Some(*place) != raised).collect();
                Verdict::Same { completed, raised, vector: native.fault.vector }
            }
        }
    }

    /// Each way to run it under the translator, held against `native`: the first difference, known or not.
    fn first_difference(
        &mut self,
        case: &Case,
        native: &Outcome,
        single: Outcome,
        steps: &[Step],
        ignore: Ignore,
    ) -> Option<Verdict> {
        let (mut single, mut known) = (Some(single), None);
        for (run, name) in [(Run::Single, "single"), (Run::Cold, "cold"), (Run::Warm, "warm")] {
            // At an exception in the middle of a block, flags that nobody would have read are lost.
            let whole = run == Run::Single || ran_through(case, native);
            let ignore = if whole { ignore } else { Ignore { flags: STATUS, ..ignore } };
            let outcome = match single.take() {
                Some(outcome) => outcome,
                None => match self.translated.run(case, run) {
                    Ok(Some((outcome, _))) => outcome,
                    Ok(None) => return Some(different(name, vec!["it does not end".into()])),
                    Err(error) => return Some(different(name, vec![format!("{error:#}")])),
                },
            };
            let mut lines = differences(case, native, &outcome, ignore);
            if lines.is_empty() {
                continue;
            }
            let stored = lines.len() == 1 && saved::differently(case, native, &outcome, steps);
            lines.push(compare::ending(native));
            if run == Run::Single && compare::known(case, native, &outcome) {
                return Some(Verdict::Known { lines });
            }
            if !stored {
                return Some(different(name, lines));
            }
            known = Some(Verdict::Known { lines });
        }
        known
    }
}

fn different(run: &'static str, lines: Vec<String>) -> Verdict {
    Verdict::Different { run, lines }
}

/// Whether the case cannot be run natively for what its last instruction does (or the one before, if that has left):
/// - it would be answered by the host's kernel, as a call of user code, or by a hypervisor, as INT1, which comes back from there as a
///   fault. None is generated, but code that is entered in the middle or in another mode may be anything;
/// - it raises #AC while RFLAGS.AC is clear, as an IRET that sets it may on Intel's processors: Linux takes that for a lock across
///   two cache lines, and has it come again;
/// - it is a far CALL that pushes to addresses of Linux's own, for there is no end to the page faults then: 64-bit code is
///   called with all of RSP, whose upper half is Linux's off a stack of 16 bits (ESPFIX), and -2 for an ESP of 2.
fn is_not_for_linux(case: &Case, end: &Outcome, steps: &[Step]) -> bool {
    let calls_far = |insn: Instruction| insn.is_call_far() || insn.is_call_far_indirect();
    let decode = |s: &Step| compare::decode(case, s.rip, s.bits);
    let narrow = end.selectors[2] != DATA32;
    let split_lock = end.fault.vector == vector::AC && end.rflags & rflags::AC == 0;
    let in_the_kernel = end.fault.vector == PAGE_FAULT && end.fault.address >> 63 != 0;
    split_lock
        || steps.iter().rev().take(2).filter_map(decode).any(|insn| is_for_others(&insn))
        || (narrow || in_the_kernel) && steps.iter().filter_map(decode).any(calls_far)
}

/// See [`is_not_for_linux`].
fn is_for_others(insn: &Instruction) -> bool {
    match insn.mnemonic() {
        Mnemonic::Syscall | Mnemonic::Int1 => true,
        // An AMD processor has none in long mode.
        Mnemonic::Sysenter => !is_amd(),
        // UMIP: made-up results.
        Mnemonic::Sgdt | Mnemonic::Sidt | Mnemonic::Sldt | Mnemonic::Str | Mnemonic::Smsw => true,
        Mnemonic::Int => insn.op0_kind() == OpKind::Immediate8 && insn.immediate8() == LINUX,
        _ => false,
    }
}

/// #PF.
const PAGE_FAULT: u8 = 14;

/// The vector of Linux's system calls of 32-bit code.
pub const LINUX: u8 = 0x80;

/// The instructions that were executed or tried.
fn executed(case: &Case, steps: &[Step]) -> Vec<Place> {
    let place = |step: &Step| Some((step.rip.checked_sub(case.entry)?, step.bits));
    let mut places: Vec<_> = steps.iter().filter_map(place).collect();
    places.retain(|(offset, _)| *offset < case.code.len() as u64);
    places.sort_unstable();
    places.dedup();
    places
}
