//! The table, as it is printed.

use super::{
    figures::{Clock, Figures, Role, geometric_mean},
    goals,
    rows::{Kind, Row},
};

const NAME: usize = 12;
const CELL: usize = 10;

/// The line above the rows. Times are in milliseconds, those of QEMU the better of its two.
pub fn head(figures: &Figures) -> String {
    let unit = if figures.clock == Clock::Wall { "ms (wall)" } else { "ms (cpu)" };
    line_of(unit, cells(figures).iter().map(|cell| cell.head.as_str()))
}

/// A row.
pub fn line(figures: &Figures, row: &Row) -> String {
    let values: Vec<_> = cells(figures).iter().map(|cell| cell.value(figures, row)).collect();
    line_of(row.name, values.iter().map(String::as_str))
}

fn line_of<'a>(name: &str, cells: impl Iterator<Item = &'a str>) -> String {
    let cells: String = cells.map(|cell| format!("{cell:>CELL$}")).collect();
    format!("{name:NAME$}{cells}")
}

/// What is in a cell.
enum What {
    Time,
    TimeOfTcg,
    AgainstTcg,
    AgainstNative,
    Against(usize),
}

struct Cell {
    head: String,
    what: What,
    column: usize,
}

/// The cells of each line, as far as there is something to compare with.
fn cells(figures: &Figures) -> Vec<Cell> {
    let [native, tcg, purlin] = [Role::Native, Role::Tcg, Role::Purlin].map(|role| figures.of(role).next());
    let mut cells = Vec::new();
    let mut add = |head: &str, what, column| cells.push(Cell { head: head.to_owned(), what, column });
    if let Some(native) = native {
        add("native", What::Time, native);
    }
    if let Some(tcg) = tcg {
        add("tcg", What::TimeOfTcg, tcg);
    }
    for column in figures.of(Role::Purlin) {
        add(&figures.columns[column].0, What::Time, column);
        if tcg.is_some() {
            add("x tcg", What::AgainstTcg, column);
        }
        if native.is_some() {
            add("% native", What::AgainstNative, column);
        }
        if let Some(first) = purlin.filter(|first| *first != column) {
            add("x purlin", What::Against(first), column);
        }
    }
    cells
}

impl Cell {
    fn value(&self, figures: &Figures, row: &Row) -> String {
        let column = self.column;
        let (figure, digits) = match self.what {
            What::Time => (figures.median(row, column), 1),
            What::TimeOfTcg => (figures.better_tcg(row).and_then(|column| figures.median(row, column)), 1),
            What::AgainstTcg => (figures.against_tcg(row, column), 2),
            What::AgainstNative => (figures.against_native(row, column).map(|part| part * 100.0), 0),
            What::Against(other) => (figures.times_faster(row, column, other), 2),
        };
        figure.map_or_else(|| "-".into(), |figure| format!("{figure:.digits$}"))
    }
}

/// What is below the rows.
pub fn summary(figures: &Figures) -> String {
    let mut text: String = figures.of(Role::Purlin).map(|column| goals::of(figures, column) + "\n").collect();
    let first = figures.of(Role::Purlin).next().unwrap_or(0);
    for (column, (name, role)) in figures.columns.iter().enumerate() {
        let ratios = figures.all(&Kind::ALL, |row| figures.times_faster(row, column, first));
        if *role == Role::Purlin
            && column != first
            && let Some(mean) = geometric_mean(ratios.map(|(_, ratio)| ratio))
        {
            text += &format!("{name}: {mean:.2} times as fast as {} (mean of all rows)\n", figures.columns[first].0);
        }
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

    fn words(line: &str) -> Vec<&str> {
        line.split_whitespace().collect()
    }

    #[test]
    fn a_row_has_a_cell_for_each_column() {
        let figures = some();
        assert_eq!(words(&line(&figures, &ROWS[0])), ["integer", "12.0", "100.0", "30.0", "4.00", "50"]);
        assert_eq!(words(&line(&figures, &ROWS[1]))[1..], ["-", "-", "-", "-", "-"]);
        assert_eq!(head(&figures).len(), line(&figures, &ROWS[0]).len());
    }

    #[test]
    fn a_second_purlin_is_compared_with_the_first() {
        let mut figures = some();
        figures.columns.push(("purlin-2".into(), Role::Purlin));
        let rounds = figures.rows[0].1[1].clone();
        figures.rows[0].1.push(rounds);
        assert_eq!(words(&line(&figures, &ROWS[0]))[6..], ["100.0", "1.00", "12", "0.25"]);
    }
}
