//! What was measured, and what is made of it.

use std::time::Duration;

use super::{
    Column, Runner,
    rows::{Kind, Row},
};
use crate::figures::median;

/// One run of a row.
#[derive(Clone)]
pub struct Sample {
    /// By the host's clock.
    pub wall: Duration,
    /// By the clock of the machine that ran it.
    pub own: Duration,
    /// What it took of a processor of the host's.
    pub processor: Duration,
    /// What it computed.
    pub checksum: String,
}

/// What a column is compared as.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// The host.
    Native,
    /// QEMU's TCG.
    Tcg,
    /// Purlin.
    Purlin,
}

/// Which time counts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Clock {
    /// A processor's: what others do on the host is not in it.
    Processor,
    /// The host's clock on the wall.
    Wall,
}

impl Clock {
    fn milliseconds(self, sample: &Sample) -> f64 {
        let time = match self {
            Self::Processor => sample.processor,
            Self::Wall => sample.wall,
        };
        time.as_secs_f64() * 1000.0
    }
}

/// All figures.
pub struct Figures {
    /// The columns' names and roles.
    pub columns: Vec<(String, Role)>,
    /// The rows, each with the rounds of each column; a column that was unable has none.
    pub rows: Vec<(&'static Row, Vec<Vec<Sample>>)>,
    /// Which of their times counts.
    pub clock: Clock,
}

impl Figures {
    /// None yet.
    pub fn new(columns: &[Column], clock: Clock) -> Self {
        let role = |column: &Column| match column.runner {
            Runner::Native => Role::Native,
            Runner::Tcg(_) => Role::Tcg,
            Runner::Purlin(_) => Role::Purlin,
        };
        Self {
            columns: columns.iter().map(|column| (column.name.clone(), role(column))).collect(),
            rows: Vec::new(),
            clock,
        }
    }

    /// Takes a row's.
    pub fn add(&mut self, row: &'static Row, samples: Vec<Vec<Sample>>) {
        self.rows.push((row, samples));
    }

    /// The places of the columns of a role.
    pub fn of(&self, role: Role) -> impl Iterator<Item = usize> {
        self.columns.iter().enumerate().filter(move |(_, column)| column.1 == role).map(|(place, _)| place)
    }

    /// The milliseconds of each round.
    pub fn rounds(&self, row: &Row, column: usize) -> Option<Vec<f64>> {
        let (_, columns) = self.rows.iter().find(|(known, _)| known.name == row.name)?;
        let samples = columns.get(column).filter(|samples| !samples.is_empty())?;
        Some(samples.iter().map(|sample| self.clock.milliseconds(sample)).collect())
    }

    /// How many times its processor time a column took by the clock on the wall: what the host's other load made of it.
    pub fn stretch(&self, column: usize) -> Option<f64> {
        let samples = self.rows.iter().flat_map(|(_, columns)| &columns[column]);
        geometric_mean(samples.map(|sample| sample.wall.as_secs_f64() / sample.processor.as_secs_f64()))
    }

    /// A column's median.
    pub fn median(&self, row: &Row, column: usize) -> Option<f64> {
        self.rounds(row, column).map(median)
    }

    /// The faster of QEMU's.
    pub fn better_tcg(&self, row: &Row) -> Option<usize> {
        let measured = self.of(Role::Tcg).filter_map(|column| Some((column, self.median(row, column)?)));
        measured.min_by(|(_, one), (_, other)| one.total_cmp(other)).map(|(column, _)| column)
    }

    /// How many times faster `column` is than `reference`: the median of the rounds, whose runs are neighbours in time.
    pub fn times_faster(&self, row: &Row, column: usize, reference: usize) -> Option<f64> {
        let (ours, theirs) = (self.rounds(row, column)?, self.rounds(row, reference)?);
        let ratios: Vec<_> = ours.iter().zip(&theirs).map(|(ours, theirs)| theirs / ours).collect();
        Some(median(ratios))
    }

    /// The same against the faster of QEMU's.
    pub fn against_tcg(&self, row: &Row, column: usize) -> Option<f64> {
        self.times_faster(row, column, self.better_tcg(row)?)
    }

    /// The same against the host, whose speed is 1.
    pub fn against_native(&self, row: &Row, column: usize) -> Option<f64> {
        self.times_faster(row, column, self.of(Role::Native).next()?)
    }

    /// A figure of each row of a kind that has it, with the row's name.
    pub fn all<'a>(
        &'a self,
        kinds: &'a [Kind],
        figure: impl Fn(&Row) -> Option<f64> + 'a,
    ) -> impl Iterator<Item = (&'static str, f64)> + 'a {
        let rows = self.rows.iter().map(|(row, _)| *row).filter(|row| kinds.contains(&row.kind));
        rows.filter_map(move |row| Some((row.name, figure(row)?)))
    }
}

/// The geometric mean, if there are any.
pub fn geometric_mean(figures: impl IntoIterator<Item = f64>) -> Option<f64> {
    let logarithms: Vec<_> = figures.into_iter().map(f64::ln).collect();
    (!logarithms.is_empty()).then(|| (logarithms.iter().sum::<f64>() / logarithms.len() as f64).exp())
}

#[cfg(test)]
pub mod tests {
    use super::{super::rows::ROWS, *};

    fn samples(milliseconds: Vec<f64>) -> Vec<Sample> {
        let sample = |milliseconds: f64| {
            let wall = Duration::from_secs_f64(milliseconds / 1000.0);
            Sample { wall, own: wall, processor: wall / 2, checksum: String::new() }
        };
        milliseconds.into_iter().map(sample).collect()
    }

    /// Native, both models of QEMU's and Purlin, with three rounds of the first row, which qemu64 cannot run.
    pub fn some() -> Figures {
        let columns =
            [("native", Role::Native), ("tcg-max", Role::Tcg), ("tcg-qemu64", Role::Tcg), ("purlin", Role::Purlin)];
        let rounds = vec![vec![10.0, 20.0, 12.0], vec![100.0, 160.0, 90.0], vec![], vec![20.0, 40.0, 30.0]];
        Figures {
            columns: columns.map(|(name, role)| (name.to_owned(), role)).into(),
            rows: vec![(&ROWS[0], rounds.into_iter().map(samples).collect())],
            clock: Clock::Wall,
        }
    }

    #[test]
    fn ratios_are_of_neighbouring_runs() {
        let (figures, row) = (some(), &ROWS[0]);
        assert_eq!(figures.median(row, 0), Some(12.0));
        assert_eq!(figures.against_native(row, 3), Some(0.5));
        assert_eq!(figures.against_tcg(row, 3), Some(4.0));
    }

    #[test]
    fn the_faster_of_qemus_counts() {
        let (mut figures, row) = (some(), &ROWS[0]);
        assert_eq!(figures.better_tcg(row), Some(1));
        figures.rows[0].1[2] = samples(vec![80.0, 80.0, 95.0]);
        assert_eq!(figures.better_tcg(row), Some(2));
        assert_eq!(figures.median(&ROWS[1], 0), None);
    }

    #[test]
    fn either_clock_counts() {
        let mut figures = some();
        assert_eq!(figures.stretch(0), Some(2.0));
        figures.clock = Clock::Processor;
        assert_eq!(figures.median(&ROWS[0], 0), Some(6.0));
    }

    #[test]
    fn geometric_means() {
        assert_eq!(geometric_mean([]), None);
        assert!(geometric_mean([1.0, 4.0, 16.0]).is_some_and(|mean| (mean - 4.0).abs() < 1e-9));
    }
}
