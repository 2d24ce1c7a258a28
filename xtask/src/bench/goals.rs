//! What the project wants of the translator, and how far it is.

use std::fmt::Write as _;

use super::{
    figures::{Figures, geometric_mean},
    rows::Kind,
};

/// What a column reaches, a line for each goal.
pub fn of(figures: &Figures, column: usize) -> String {
    let mut text = String::new();
    for goal in goals(figures, column) {
        let met = if goal.is_met() { "met" } else { "NOT met" };
        let _ = writeln!(
            text,
            "{}: {} {}, at least {}: {met}",
            figures.columns[column].0,
            goal.what,
            goal.said(goal.figure),
            goal.said(goal.least)
        );
    }
    text
}

struct Goal {
    what: String,
    figure: f64,
    least: f64,
    unit: Unit,
}

#[derive(Clone, Copy)]
enum Unit {
    Times,
    Percent,
}

impl Goal {
    fn is_met(&self) -> bool {
        self.figure >= self.least
    }

    fn said(&self, figure: f64) -> String {
        match self.unit {
            Unit::Times => format!("{figure:.2}x"),
            Unit::Percent => format!("{:.0}%", figure * 100.0),
        }
    }
}

fn goals(figures: &Figures, column: usize) -> Vec<Goal> {
    let tcg: Vec<_> = figures.all(&Kind::ALL, |row| figures.against_tcg(row, column)).collect();
    let native = |kind| figures.all(kind, |row| figures.against_native(row, column)).collect::<Vec<_>>();
    let (integer, vector) = (native(&[Kind::Integer]), native(&[Kind::Vector]));
    let mean = |what: &str, of: &[(&str, f64)], least, unit| {
        let figure = geometric_mean(of.iter().map(|(_, figure)| *figure))?;
        Some(Goal { what: what.into(), figure, least, unit })
    };
    let lowest = |what: &str, of: &[(&str, f64)], least, unit| {
        let mut of = of.to_vec();
        of.sort_by(|(_, one), (_, other)| one.total_cmp(other));
        let (name, figure) = *of.first()?;
        // All that are too slow, the slowest first; or the one that is nearest to that.
        let mut names: Vec<_> = of.iter().filter(|(_, figure)| *figure < least).map(|(name, _)| *name).collect();
        if names.is_empty() {
            names.push(name);
        }
        Some(Goal { what: format!("{what} ({})", names.join(", ")), figure, least, unit })
    };
    let mut goals = vec![
        mean("all rows against TCG, mean", &tcg, 4.0, Unit::Times),
        lowest("all rows against TCG, lowest", &tcg, 1.0, Unit::Times),
        mean("integer rows against native, mean", &integer, 0.65, Unit::Percent),
        lowest("integer rows against native, lowest", &integer, 0.4, Unit::Percent),
        mean("SIMD and fp rows against native, mean", &vector, 0.9, Unit::Percent),
    ];
    for (name, least) in [
        ("vector-sse2", 8.0),
        ("vector-avx2", 8.0),
        ("pipe", 3.0),
        ("fork", 3.0),
        ("faults", 3.0),
        ("futex", 3.0),
        ("boot", 1.0 / 0.6),
    ] {
        let of: Vec<_> = tcg.iter().copied().filter(|(known, _)| *known == name).collect();
        goals.push(lowest("against TCG", &of, least, Unit::Times));
    }
    goals.into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::{super::figures::tests::some, *};

    #[test]
    fn goals_without_a_figure_are_left_out() {
        let said = of(&some(), 3);
        let lines: Vec<_> = said.lines().collect();
        assert_eq!(lines[0], "purlin: all rows against TCG, mean 4.00x, at least 4.00x: met");
        assert_eq!(lines[2], "purlin: integer rows against native, mean 50%, at least 65%: NOT met");
        assert_eq!(lines[3], "purlin: integer rows against native, lowest (integer) 50%, at least 40%: met");
        assert_eq!(lines.len(), 4, "{said}");
    }
}
