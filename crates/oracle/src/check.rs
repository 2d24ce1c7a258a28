//! A case on both sides.

use anyhow::Result;
use iced_x86::Mnemonic;

use crate::{
    case::{Case, Outcome},
    compare::{self, Ignore, STATUS, differences, ran_through},
    native::{BATCH, Native},
    translated::{Run, Step, Translated},
};

/// What a comparison came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// All agree.
    Same {
        /// Offsets in the code of the instructions that were executed to their end.
        completed: Vec<u64>,
        /// That of the instruction that raised the exception, if one did.
        raised: Option<u64>,
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
        Ok(Self { native, translated: Translated::new()? })
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
        // FXRSTOR makes addresses canonical that it loads, to as many bits as the processor has.
        let loads = |s: &Step| compare::decode(case, s.rip).is_some_and(|i| i.mnemonic() == Mnemonic::Fxrstor64);
        let pointers = !native.x87_exception_waits() || steps.iter().any(loads);
        let ignore = Ignore { flags: open.flags, pointers };
        let mut result = None;
        let lines = differences(case, &native, &single, ignore);
        if !lines.is_empty() {
            if compare::known(case, &native, &single) {
                return Verdict::Known;
            }
            result = Some(different("single", lines));
        }
        for (run, name) in [(Run::Cold, "cold"), (Run::Warm, "warm")] {
            if result.is_some() {
                break;
            }
            // At an exception in the middle of a block, flags that nobody would have read are lost.
            let ignore = if ran_through(&native) { ignore } else { Ignore { flags: STATUS, ..ignore } };
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
                let raised = native.rip.checked_sub(case.entry).filter(|o| *o < case.code.len() as u64);
                let raised = raised.filter(|_| native.fault.vector != 1);
                let completed = executed(case, &steps).into_iter().filter(|o| Some(*o) != raised).collect();
                Verdict::Same { completed, raised, vector: native.fault.vector }
            }
        }
    }
}

fn different(run: &'static str, lines: Vec<String>) -> Verdict {
    Verdict::Different { run, lines }
}

/// Offsets of the instructions that were executed or tried.
fn executed(case: &Case, steps: &[Step]) -> Vec<u64> {
    let mut offsets: Vec<u64> = steps.iter().filter_map(|s| s.rip.checked_sub(case.entry)).collect();
    offsets.retain(|o| *o < case.code.len() as u64);
    offsets.sort_unstable();
    offsets.dedup();
    offsets
}
