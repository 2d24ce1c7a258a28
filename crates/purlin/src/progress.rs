//! Progress of long work: a bar where standard error is a terminal, else a line for each step.

use std::{
    io::{IsTerminal, stderr},
    sync::Arc,
    time::Duration,
};

use indicatif::{ProgressBar, ProgressStyle};
use purlin_debian::Progress;

use crate::{stop::Stop, terminal};

/// Shows how far obtaining a guest has come.
pub struct Shown {
    bar: Option<ProgressBar>,
    stop: Arc<Stop>,
}

impl Shown {
    /// `stop` is what ends the work early.
    pub fn new(stop: Arc<Stop>) -> Self {
        Self { bar: stderr().is_terminal().then(bar), stop }
    }
}

const STEPS: u64 = 1000;

fn bar() -> ProgressBar {
    let style = ProgressStyle::with_template("{spinner} {msg} {wide_bar} {percent:>3}%");
    let bar = ProgressBar::new(STEPS).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.enable_steady_tick(Duration::from_millis(120));
    bar
}

impl Progress for Shown {
    fn step(&self, what: &str) {
        match &self.bar {
            Some(bar) => {
                bar.set_position(0);
                bar.set_message(what.to_owned());
            }
            None => terminal::say(what),
        }
    }

    fn fraction(&self, done: f64) {
        if let Some(bar) = &self.bar {
            bar.set_position((done.clamp(0.0, 1.0) * STEPS as f64) as u64);
        }
    }

    fn note(&self, what: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| terminal::say(what)),
            None => terminal::say(what),
        }
    }

    fn cancelled(&self) -> bool {
        self.stop.reason().is_some()
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
