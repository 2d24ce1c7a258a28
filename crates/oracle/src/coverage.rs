//! Which forms were executed how often.

use std::collections::{BTreeMap, BTreeSet};

use iced_x86::{Code, Mnemonic};
use purlin_engine_translator::exception::vector;

use crate::{
    case::Case,
    check::Place,
    compare::decode,
    generate::{
        forms::{self, Form, SIZES, form},
        reasons::Left,
    },
};

/// Counts by form.
#[derive(Clone, Debug, Default)]
pub struct Coverage {
    counts: BTreeMap<Code, u64>,
    refused: BTreeSet<Code>,
    vectors: BTreeMap<u8, u64>,
}

/// What there is of an extension.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Row {
    /// The extension.
    pub name: String,
    /// Forms that are generated.
    pub forms: usize,
    /// Of these, those that were executed to their end.
    pub executed: usize,
    /// Those that have done nothing but to raise #UD, or #GP because user code may not execute them.
    pub refused: usize,
    /// How often, all together.
    pub count: u64,
    /// How often the one that was least often.
    pub fewest: u64,
}

impl Coverage {
    /// Counts a case.
    pub fn add(&mut self, case: &Case, completed: &[Place], raised: Option<Place>, vector: u8) {
        let code = |(offset, bits): Place| decode(case, case.entry + offset, bits).map(|insn| insn.code());
        for code in completed.iter().filter_map(|place| code(*place)) {
            *self.counts.entry(code).or_default() += 1;
        }
        let refused =
            raised.and_then(code).filter(|code| vector == vector::UD || vector == vector::GP && refuses(*code));
        self.refused.extend(refused);
        *self.vectors.entry(vector).or_default() += 1;
    }

    /// How often `code` was executed to its end.
    pub fn count(&self, code: Code) -> u64 {
        self.counts.get(&code).copied().unwrap_or(0)
    }

    /// How many cases ended with each vector.
    pub fn vectors(&self) -> &BTreeMap<u8, u64> {
        &self.vectors
    }

    /// The forms that were never executed to their end, nor refused.
    pub fn never(&self) -> Vec<Code> {
        let codes = generated().into_iter().map(|form| form.code);
        codes.filter(|code| self.count(*code) == 0 && !self.was_refused(*code)).collect()
    }

    /// Whether it has raised #UD, or #GP as an instruction that user code cannot execute, and has done nothing else.
    fn was_refused(&self, code: Code) -> bool {
        self.count(code) == 0 && self.refused.contains(&code)
    }

    /// The table by extension.
    pub fn by_extension(&self) -> Vec<Row> {
        let mut table: BTreeMap<String, Row> = BTreeMap::new();
        for Form { code, .. } in generated() {
            let name = extension(code);
            let row = table.entry(name.clone()).or_insert(Row { name, fewest: u64::MAX, ..Row::default() });
            let count = self.count(code);
            row.forms += 1;
            row.executed += usize::from(count > 0);
            row.refused += usize::from(self.was_refused(code));
            row.count += count;
            row.fewest = row.fewest.min(count);
        }
        let none = |row: Row| if row.fewest == u64::MAX { Row { fewest: 0, ..row } } else { row };
        table.into_values().map(none).collect()
    }
}

/// Whether user code gets nothing but an exception from it.
fn refuses(code: Code) -> bool {
    use Mnemonic::*;
    let mnemonic = code.mnemonic();
    forms::of_system(code) && !matches!(mnemonic, Int1 | Int3 | Into | Cpuid)
}

/// The forms that are generated in any mode.
pub fn generated() -> Vec<Form> {
    let made = |code| SIZES.iter().find_map(|bits| form(code, *bits).ok());
    Code::values().filter_map(made).collect()
}

/// The forms that are not, with the reason.
pub fn left_out() -> Vec<(Code, Left)> {
    let reason = |code| {
        let reasons: Result<Vec<Left>, Form> = SIZES
            .iter()
            .map(|bits| match form(code, *bits) {
                Ok(form) => Err(form),
                Err(left) => Ok(left),
            })
            .collect();
        reasons.ok()?.into_iter().max().map(|left| (code, left))
    };
    Code::values().filter_map(reason).filter(|(_, left)| *left != Left::Mode).collect()
}

/// The extension that a form belongs to.
pub fn extension(code: Code) -> String {
    let mut names: Vec<String> = code.cpuid_features().iter().map(|f| format!("{f:?}")).collect();
    names.sort();
    names.join("+")
}
