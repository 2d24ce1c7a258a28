//! A case on both sides.

use anyhow::Result;
use iced_x86::{Instruction, Mnemonic, OpKind};

use crate::{
    case::{Case, Outcome},
    compare::{self, Ignore, STATUS, differences, ran_through},
    host::is_amd,
    native::{BATCH, Native},
    segments::DATA32,
    translated::{Run, Step, Translated},
    xsave::{at, components},
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
    /// It differs, but only after an instruction has read a flag that is undefined.
    Open,
    /// It differs in a way that is known and documented: see [`compare::known`].
    Known,
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
                if matches!(single, Ok(Some((end, steps))) if is_not_for_linux(case, end, steps)) {
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
        use Mnemonic::{Fldenv, Frstor, Fxrstor, Fxrstor64, Xrstor, Xrstor64};
        // FXRSTOR makes addresses canonical that it loads, to as many bits as the processor has.
        let loads = |s: &Step| {
            let insn = compare::decode(case, s.rip, s.bits);
            insn.is_some_and(|i| matches!(i.mnemonic(), Fxrstor | Fxrstor64 | Xrstor | Xrstor64 | Fldenv | Frstor))
        };
        let pointers = !native.x87_exception_waits() || steps.iter().any(loads);
        let ignore = Ignore { flags: open.flags, pointers };
        let mut result = None;
        let lines = differences(case, &native, &single, ignore);
        if !lines.is_empty() {
            if compare::known(case, &native, &single) || saves_differently(case, &native, &steps, &lines) {
                return Verdict::Known;
            }
            result = Some(different("single", lines));
        }
        for (run, name) in [(Run::Cold, "cold"), (Run::Warm, "warm")] {
            if result.is_some() {
                break;
            }
            // At an exception in the middle of a block, flags that nobody would have read are lost.
            let ignore = if ran_through(case, &native) { ignore } else { Ignore { flags: STATUS, ..ignore } };
            let lines = match self.translated.run(case, run) {
                Ok(Some((outcome, _))) => differences(case, &native, &outcome, ignore),
                Ok(None) => vec!["it does not end".into()],
                Err(error) => vec![format!("{error:#}")],
            };
            if !lines.is_empty() {
                result = Some(different(name, lines));
            }
        }
        match result {
            Some(_) if open.consumed => Verdict::Open,
            Some(Verdict::Different { run, mut lines }) => {
                lines.push(compare::ending(&native));
                Verdict::Different { run, lines }
            }
            Some(other) => other,
            None => {
                let last = steps.last().map(|step| (step.rip.wrapping_sub(case.entry), step.bits));
                let raised = last.filter(|(o, _)| *o < case.code.len() as u64 && native.fault.vector != 1);
                let completed = executed(case, &steps).into_iter().filter(|place| Some(*place) != raised).collect();
                Verdict::Same { completed, raised, vector: native.fault.vector }
            }
        }
    }
}

fn different(run: &'static str, lines: Vec<String>) -> Verdict {
    Verdict::Different { run, lines }
}

/// Whether all that differs may be what XSAVE and FXSAVE store:
/// - XSAVE tells of components in their initial state that they are in use or not (SDM vol. 1 13.6 leaves it open), and
///   XSAVEC and XSAVEOPT save them or not;
/// - without REX.W the selectors that belong to the x87's pointers are stored, while an exception waits. Processors have
///   stopped keeping them (CPUID.7.0:EBX bit 13), and the translator does not.
fn saves_differently(case: &Case, native: &Outcome, steps: &[Step], lines: &[String]) -> bool {
    use Mnemonic::{
        Fxsave, Vzeroall, Vzeroupper, Xrstor, Xrstor64, Xsave, Xsave64, Xsavec, Xsavec64, Xsaveopt, Xsaveopt64,
    };
    let executed = |wanted: fn(Mnemonic) -> bool| {
        let of_step = |s: &Step| compare::decode(case, s.rip, s.bits).is_some_and(|insn| wanted(insn.mnemonic()));
        steps.iter().any(of_step)
    };
    let initial = components() & !case.area().u64(at::HEADER) != 0
        || executed(|m| matches!(m, Vzeroupper | Vzeroall | Xrstor | Xrstor64));
    let in_use = || initial && executed(|m| matches!(m, Xsave64 | Xsavec64 | Xsaveopt64 | Xsave | Xsavec | Xsaveopt));
    let selectors = || native.x87_exception_waits() && executed(|m| matches!(m, Fxsave | Xsave | Xsavec | Xsaveopt));
    lines.len() == 1 && lines[0].starts_with("data+") && (in_use() || selectors())
}

/// Whether the case cannot be run natively for what its last instruction does (or the one before, if that has left):
/// - it would be answered by the host's kernel, as a call of user code. None is generated, but code that is entered in the
///   middle or in another mode may be anything;
/// - it is a far CALL that pushes to addresses of Linux's own, for there is no end to the page faults then: 64-bit code is
///   called with all of RSP, whose upper half is Linux's off a stack of 16 bits (ESPFIX), and -2 for an ESP of 2.
fn is_not_for_linux(case: &Case, end: &Outcome, steps: &[Step]) -> bool {
    let calls_far = |insn: Instruction| insn.is_call_far() || insn.is_call_far_indirect();
    let decode = |s: &Step| compare::decode(case, s.rip, s.bits);
    let narrow = end.selectors[2] != DATA32;
    let in_the_kernel = end.fault.vector == PAGE_FAULT && end.fault.address >> 63 != 0;
    steps.iter().rev().take(2).filter_map(decode).any(|insn| is_for_the_kernel(&insn))
        || (narrow || in_the_kernel) && steps.iter().filter_map(decode).any(calls_far)
}

/// See [`is_not_for_linux`].
fn is_for_the_kernel(insn: &Instruction) -> bool {
    match insn.mnemonic() {
        Mnemonic::Syscall => true,
        // An AMD processor has none in long mode.
        Mnemonic::Sysenter => !is_amd(),
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
