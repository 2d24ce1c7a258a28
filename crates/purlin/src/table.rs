//! Tables for people.

use std::io::{Write, stdout};

/// Prints to standard output; nobody is left to tell if that is closed.
pub fn print(text: &str) {
    let _ = writeln!(stdout(), "{}", text.trim_end());
}

/// Rows under a header, in columns as wide as what is in them.
pub fn columns<const N: usize>(header: [&str; N], rows: impl IntoIterator<Item = [String; N]>) -> String {
    let rows: Vec<_> = std::iter::once(header.map(String::from)).chain(rows).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; N] = std::array::from_fn(width);
    let line = |row: &[String; N]| {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
    };
    rows.iter().map(line).collect()
}

/// `10 GiB`, `485.1 MiB`.
pub fn in_units(bytes: u64) -> String {
    let units = ["bytes", "KiB", "MiB", "GiB", "TiB"];
    let unit = (bytes.max(1).ilog2() / 10).min(4);
    let value = bytes as f64 / f64::from(1_u32 << (10 * unit.min(3))) / if unit == 4 { 1024.0 } else { 1.0 };
    format!("{} {}", format!("{value:.1}").trim_end_matches(".0"), units[unit as usize])
}

#[cfg(test)]
mod tests {
    use super::in_units;

    #[test]
    fn sizes_for_people() {
        assert_eq!(in_units(0), "0 bytes");
        assert_eq!(in_units(1023), "1023 bytes");
        assert_eq!(in_units(10 << 30), "10 GiB");
        assert_eq!(in_units((485 << 20) + (100 << 10)), "485.1 MiB");
        assert_eq!(in_units(3 << 40), "3 TiB");
    }
}
