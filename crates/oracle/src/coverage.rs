//! Which forms were executed how often.

use std::collections::{BTreeMap, BTreeSet};

use iced_x86::Code;
use purlin_engine_translator::exception::vector;

use crate::{
    case::Case,
    compare::decode,
    generate::forms::{Form, Left, form},
};

/// Counts by form.
#[derive(Clone, Debug, Default)]
pub struct Coverage {
    counts: BTreeMap<Code, u64>,
    undefined: BTreeSet<Code>,
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
    /// How often, all together.
    pub count: u64,
    /// How often the one that was least often.
    pub fewest: u64,
}

impl Coverage {
    /// Counts a case.
    pub fn add(&mut self, case: &Case, completed: &[u64], raised: Option<u64>, vector: u8) {
        let code = |offset: u64| decode(case, case.entry + offset).map(|insn| insn.code());
        for code in completed.iter().filter_map(|o| code(*o)) {
            *self.counts.entry(code).or_default() += 1;
        }
        if vector == vector::UD {
            self.undefined.extend(raised.and_then(code));
        }
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

    /// The forms that were never executed to their end, though they did not raise #UD.
    pub fn never(&self) -> Vec<Code> {
        let codes = generated().into_iter().map(|form| form.code);
        codes.filter(|code| self.count(*code) == 0 && !self.undefined.contains(code)).collect()
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
            row.count += count;
            row.fewest = row.fewest.min(count);
        }
        let none = |row: Row| if row.fewest == u64::MAX { Row { fewest: 0, ..row } } else { row };
        table.into_values().map(none).collect()
    }
}

/// The forms that are generated in either mode.
pub fn generated() -> Vec<Form> {
    Code::values().filter_map(|code| form(code, 64).or_else(|_| form(code, 32)).ok()).collect()
}

/// The forms that are not, with the reason.
pub fn left_out() -> Vec<(Code, Left)> {
    let reason = |code| match (form(code, 64), form(code, 32)) {
        (Err(a), Err(b)) => Some((code, a.max(b))),
        _ => None,
    };
    Code::values().filter_map(reason).filter(|(_, left)| *left != Left::Mode).collect()
}

/// The extension that a form belongs to.
pub fn extension(code: Code) -> String {
    let mut names: Vec<String> = code.cpuid_features().iter().map(|f| format!("{f:?}")).collect();
    names.sort();
    names.join("+")
}
