//! The table, as it is printed.

use super::{
    figures::{Clock, Figures, Role},
    goals,
    rows::Row,
};

const NAME: usize = 12;
const CELL: usize = 10;

/// The line above the rows. Times are in milliseconds, those of QEMU the better of its two.
pub fn head(figures: &Figures) -> String {
    let mut cells = vec![];
    if figures.of(Role::Native).next().is_some() {
        cells.push("native".to_owned());
    }
    if figures.of(Role::Tcg).next().is_some() {
        cells.push("tcg".to_owned());
    }
    for column in figures.of(Role::Purlin) {
        cells.extend([figures.columns[column].0.clone(), "x tcg".into(), "% native".into()]);
    }
    line_of(if figures.clock == Clock::Wall { "ms (wall)" } else { "ms (cpu)" }, &cells)
}

/// A row.
pub fn line(figures: &Figures, row: &Row) -> String {
    let milliseconds = |figure: Option<f64>| figure.map_or("-".into(), |figure| format!("{figure:.1}"));
    let mut cells = vec![];
    if let Some(native) = figures.of(Role::Native).next() {
        cells.push(milliseconds(figures.median(row, native)));
    }
    if figures.of(Role::Tcg).next().is_some() {
        let better = figures.better_tcg(row);
        cells.push(milliseconds(better.and_then(|column| figures.median(row, column))));
    }
    for column in figures.of(Role::Purlin) {
        let times = figures.against_tcg(row, column).map_or("-".into(), |times| format!("{times:.2}"));
        let percent = figures.against_native(row, column).map_or("-".into(), |part| format!("{:.0}", part * 100.0));
        cells.extend([milliseconds(figures.median(row, column)), times, percent]);
    }
    line_of(row.name, &cells)
}

fn line_of(name: &str, cells: &[String]) -> String {
    let cells: String = cells.iter().map(|cell| format!("{cell:>CELL$}")).collect();
    format!("{name:NAME$}{cells}")
}

/// What is below the rows.
pub fn summary(figures: &Figures) -> String {
    let purlins = figures.of(Role::Purlin);
    let mut text: String = purlins.map(|column| goals::of(figures, column) + "\n").collect();
    for (column, (name, _)) in figures.columns.iter().enumerate() {
        if let Some(stretch) = figures.stretch(column) {
            text += &format!("{name}: {stretch:.2} s on the wall for each of a processor's (mean)\n");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::{
        super::{figures::tests::some, rows::ROWS},
        *,
    };

    #[test]
    fn a_row_has_a_cell_for_each_column() {
        let figures = some();
        let words = |line: String| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(words(line(&figures, &ROWS[0])), ["integer", "12.0", "100.0", "30.0", "4.00", "50"]);
        assert_eq!(words(line(&figures, &ROWS[1]))[1..], ["-", "-", "-", "-", "-"]);
        assert_eq!(head(&figures).len(), line(&figures, &ROWS[0]).len());
    }
}
