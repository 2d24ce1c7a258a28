//! All figures for a program to read.

use std::{fs, path::Path, time::Duration};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::{
    figures::{Clock, Figures, Sample},
    machines::Figure,
};

/// Writes them to a file.
pub fn write(path: &Path, figures: &Figures, machines: &[Figure]) -> Result<()> {
    let text = serde_json::to_string_pretty(&of(figures, machines))?;
    fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))
}

fn of(figures: &Figures, machines: &[Figure]) -> Value {
    let columns: Vec<_> = figures.columns.iter().map(|(name, _)| name.as_str()).collect();
    let rows: Vec<_> = figures
        .rows
        .iter()
        .map(|(row, rounds)| {
            let columns: serde_json::Map<_, _> = columns
                .iter()
                .zip(rounds)
                .map(|(name, samples)| ((*name).to_owned(), samples.iter().map(sample).collect()))
                .collect();
            json!({ "name": row.name, "kind": format!("{:?}", row.kind).to_lowercase(), "rounds": columns })
        })
        .collect();
    let machines: Vec<_> = machines
        .iter()
        .map(|figure| json!({ "name": figure.name, "value": figure.value, "unit": figure.unit }))
        .collect();
    let clock = if figures.clock == Clock::Wall { "wall" } else { "processor" };
    json!({ "clock": clock, "columns": columns, "rows": rows, "machines": machines })
}

/// In nanoseconds.
fn sample(sample: &Sample) -> Value {
    let [wall, processor, own] = [sample.wall, sample.processor, sample.own].map(nanoseconds);
    json!({ "wall": wall, "processor": processor, "own": own })
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::{super::figures::tests::some, *};

    #[test]
    fn every_round_is_there() {
        let value = of(&some(), &[]);
        assert_eq!(value["columns"][3], "purlin");
        assert_eq!(value["rows"][0]["rounds"]["tcg-max"][1]["wall"], 160_000_000);
        assert_eq!(value["rows"][0]["rounds"]["tcg-qemu64"], json!([]));
    }
}
