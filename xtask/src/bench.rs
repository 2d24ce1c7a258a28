//! How fast guests run: natively, under QEMU's TCG and under Purlin's translator, measured in turn in one run.
//! Figures are printed, never judged. docs/benchmarks.md says what the rows are.

mod agent;
mod column;
mod figures;
mod files;
mod goals;
mod json;
mod machines;
mod processor;
mod report;
mod rows;
mod userland;

use std::path::PathBuf;

use anyhow::{Result, bail, ensure};
use clap::Args;

use self::{
    agent::{Agent, Answer},
    column::{Column, Runner},
    figures::{Clock, Figures, Sample},
    files::Files,
    machines::Figure,
    rows::{ROWS, Row},
};
use crate::machine;

/// What to measure: everything, if nothing is said.
#[derive(Args)]
pub struct BenchArgs {
    /// Rows, by their names; all if not given
    #[arg(long = "row", value_name = "NAME")]
    rows: Vec<String>,
    /// How often to measure each, in turn
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Without the host's own processor
    #[arg(long)]
    no_native: bool,
    /// Without QEMU
    #[arg(long)]
    no_qemu: bool,
    /// Another purlin to measure, too
    #[arg(long, value_name = "PATH")]
    purlin: Vec<PathBuf>,
    /// Do not build purlin first: measure what was built before
    #[arg(long)]
    no_build: bool,
    /// Also how much faster two processes are on two vCPUs, by the clock on the wall
    #[arg(long)]
    vcpus: bool,
    /// Have the clock on the wall count, not what a row takes of the host's processors
    #[arg(long)]
    wall: bool,
    /// Where to write all figures
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

impl BenchArgs {
    /// The rows meant.
    fn rows(&self) -> Result<Vec<&'static Row>> {
        for name in &self.rows {
            ensure!(ROWS.iter().any(|row| row.name == name), "no row {name}; there are {}", rows::names());
        }
        let meant = |row: &&Row| self.rows.is_empty() || self.rows.iter().any(|name| name == row.name);
        Ok(ROWS.iter().filter(meant).collect())
    }

    /// Who runs them.
    fn runners(&self) -> Vec<Runner> {
        let mut runners = Vec::new();
        if !self.no_native {
            runners.push(Runner::Native);
        }
        if !self.no_qemu {
            runners.extend(["max", "qemu64"].map(Runner::Tcg));
        }
        runners.push(Runner::Purlin(machine::program()));
        runners.extend(self.purlin.iter().cloned().map(Runner::Purlin));
        runners
    }
}

/// Measures, row by row.
pub fn run(args: &BenchArgs) -> Result<()> {
    let rows = args.rows()?;
    if !args.no_build {
        machine::build()?;
    }
    let files = files::prepare()?;
    let mut columns = Vec::<Column>::new();
    for runner in args.runners() {
        let name = runner.name();
        let same = columns.iter().filter(|column| column.runner.name() == name).count();
        columns.push(Column::start(runner, if same == 0 { name } else { format!("{name}-{}", same + 1) }, &files)?);
    }
    let mut figures = Figures::new(&columns, if args.wall { Clock::Wall } else { Clock::Processor });
    println!("{}", report::head(&figures));
    for row in rows {
        let samples = measure(row, args.rounds, &mut columns, &files)?;
        figures.add(row, samples);
        println!("{}", report::line(&figures, row));
    }
    println!("\n{}", report::summary(&figures).trim());
    let machines = machines(args, &mut columns, &files)?;
    for figure in &machines {
        println!("{}: {:.1} {}", figure.name, figure.value, figure.unit);
    }
    if let Some(path) = &args.json {
        json::write(path, &figures, &machines)?;
    }
    for column in &columns {
        if let Some(reason) = &column.failed {
            bail!("{}: {reason}; see {}", column.name, column.agent.log().display());
        }
    }
    Ok(())
}

/// What is told of the machines, once the rows are done.
fn machines(args: &BenchArgs, columns: &mut [Column], files: &Files) -> Result<Vec<Figure>> {
    let mut figures = Vec::new();
    if args.rows.is_empty() {
        figures.extend(machines::memory(columns)?);
        figures.extend(machines::idle(columns));
    }
    if args.vcpus {
        figures.extend(machines::two_processors(columns, files, args.rounds)?);
    }
    Ok(figures)
}

/// The samples of each column, round by round, in turn.
fn measure(row: &Row, rounds: u32, columns: &mut [Column], files: &Files) -> Result<Vec<Vec<Sample>>> {
    let mut samples = vec![Vec::new(); columns.len()];
    let mut checksum: Option<String> = None;
    for _ in 0..rounds {
        for (column, samples) in columns.iter_mut().zip(&mut samples) {
            let Some(sample) = column.measure(row, files) else { continue };
            let known = checksum.get_or_insert_with(|| sample.checksum.clone());
            ensure!(
                *known == sample.checksum,
                "{}: {} computes {}, not {known}",
                column.name,
                row.name,
                sample.checksum
            );
            samples.push(sample);
        }
    }
    Ok(samples)
}
