//! What is told of the machines themselves: their memory, what an idle one costs, how far two processors help.

use std::{thread, time::Duration};

use anyhow::{Result, bail};

use super::{Agent, Answer, Column, Runner, column::MEMORY, files::Files, processor};
use crate::{
    figures::median,
    footprint::{self, GuestMemory},
};

/// How long an idle machine is watched.
const IDLE: Duration = Duration::from_secs(10);

/// A figure of a machine's.
pub struct Figure {
    /// What it says.
    pub name: String,
    /// How much.
    pub value: f64,
    /// Of what.
    pub unit: &'static str,
}

fn machines(columns: &[Column]) -> impl Iterator<Item = &Column> {
    columns.iter().filter(|column| column.failed.is_none() && !matches!(column.runner, Runner::Native))
}

/// The memory of each that is not the guest's own.
pub fn memory(columns: &[Column]) -> Result<Vec<Figure>> {
    let of = |column: &Column| {
        let guest = match column.runner {
            Runner::Purlin(_) => footprint::PURLIN,
            _ => GuestMemory::Sized(u64::from(MEMORY) << 10),
        };
        let value = footprint::beyond_guest(column.agent.process(), guest)? as f64 / 1024.0;
        Ok(Figure { name: format!("{}: memory beyond the guest's", column.name), value, unit: "MiB" })
    };
    machines(columns).map(of).collect()
}

/// What all of them take of a processor while nobody asks anything of them.
pub fn idle(columns: &[Column]) -> Vec<Figure> {
    let times = || machines(columns).map(|column| processor::time(column.agent.processes())).collect::<Vec<_>>();
    let before = times();
    thread::sleep(IDLE);
    let taken = times().into_iter().zip(before).map(|(after, before)| after.saturating_sub(before));
    let figure = |(column, taken): (&Column, Duration)| {
        let value = taken.as_secs_f64() / IDLE.as_secs_f64() * 100.0;
        Figure { name: format!("{}: idle", column.name), value, unit: "% of a processor" }
    };
    machines(columns).zip(taken).map(figure).collect()
}

/// The row of two processes that compute, in machines of one processor and of two, in turn, by the clock on the wall.
pub fn two_processors(columns: &mut [Column], files: &Files, rounds: u32) -> Result<Vec<Figure>> {
    let mut figures = Vec::new();
    for column in columns.iter_mut().filter(|column| matches!(column.runner, Runner::Purlin(_))) {
        let Some(command) = column.runner.machine(&files.guest, 2, MEMORY) else { continue };
        let mut pair = Agent::start(command, true, &format!("{}-2", column.name), &files.dir)?;
        let mut times = Vec::new();
        for _ in 0..rounds {
            times.push(wall(&mut column.agent)? / wall(&mut pair)?);
        }
        let name = format!("{}: two processes on two vCPUs against one", column.name);
        figures.push(Figure { name, value: median(times), unit: "times as fast" });
    }
    Ok(figures)
}

fn wall(agent: &mut Agent) -> Result<f64> {
    match agent.run("parallel")? {
        Answer::Done(sample) => Ok(sample.wall.as_secs_f64()),
        Answer::Unable => bail!("any processor can run two processes"),
    }
}
