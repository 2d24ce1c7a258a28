//! The table on a terminal, shown anew until the user has seen enough.

use std::{
    io::{Write, stdout},
    sync::mpsc::{self, RecvTimeoutError, Sender},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow};

use super::{FIRST, Reading, table};
use crate::{
    client::Api,
    console::read_stdin,
    exit::Ended,
    signals::{Signal, Signals},
    terminal::{self, Raw},
};

/// Between two looks.
const LOOK: Duration = Duration::from_secs(2);
/// Ctrl-C, in raw mode.
const CTRL_C: u8 = 3;

/// What happens meanwhile.
enum Happened {
    /// The user wants no more of it.
    Quit,
    Signal(Signal),
    /// The screen is another one.
    Redraw,
}

/// Shows it until the user ends it.
pub fn watch(api: &Api, signals: Signals) -> Result<Ended> {
    let mut now = Reading::take(api)?;
    let screen = Raw::enter_screen().map_err(|e| anyhow!("cannot make the terminal raw: {e}"))?;
    let (sender, happened) = mpsc::channel();
    watch_signals(signals, &screen, &sender);
    read_keys(sender);
    let mut before: Option<Reading> = None;
    loop {
        let look = before.as_ref().map_or(FIRST, |_| LOOK);
        draw(&now, before.as_ref())?;
        let left = (now.at + look).saturating_duration_since(Instant::now());
        match happened.recv_timeout(left) {
            Ok(Happened::Redraw) => {}
            Ok(Happened::Signal(signal)) => return Ok(Ended::Signalled(signal)),
            Ok(Happened::Quit) | Err(RecvTimeoutError::Disconnected) => return Ok(Ended::Well),
            Err(RecvTimeoutError::Timeout) => before = Some(std::mem::replace(&mut now, Reading::take(api)?)),
        }
    }
}

fn watch_signals(signals: Signals, screen: &Raw, sender: &Sender<Happened>) {
    let (modes, to_end, to_continue, to_resize) = (screen.modes(), sender.clone(), sender.clone(), sender.clone());
    // Nobody listens any more where it has ended already.
    let tell = |sender: &Sender<Happened>, happened| drop(sender.send(happened));
    signals.watch(
        move |signal| tell(&to_end, Happened::Signal(signal)),
        move || {
            modes.again();
            tell(&to_continue, Happened::Redraw);
        },
        move || tell(&to_resize, Happened::Redraw),
    );
}

fn read_keys(sender: Sender<Happened>) {
    thread::spawn(move || {
        let mut buffer = [0; 64];
        while let Some(keys) = read_stdin(&mut buffer) {
            if keys.iter().any(|key| matches!(key, b'q' | b'Q' | &CTRL_C)) {
                break;
            }
        }
        // Or the terminal has gone away.
        let _ = sender.send(Happened::Quit);
    });
}

/// The whole screen: what there was is written over, so that nothing flickers.
fn draw(now: &Reading, before: Option<&Reading>) -> Result<()> {
    let (width, height) = terminal::size().unwrap_or((80, 24));
    let count = now.instances.len();
    let title = format!("purlin top: {count} {}; q ends it", if count == 1 { "machine" } else { "machines" });
    let table = table(&now.since(before));
    let lines = std::iter::once(title.as_str()).chain([""]).chain(table.lines()).take(height.into());
    let lines: Vec<_> = lines.map(|line| line.chars().take(width.into()).collect::<String>() + "\x1b[K").collect();
    let mut stdout = stdout().lock();
    let written = write!(stdout, "\x1b[H{}\x1b[J", lines.join("\r\n")).and_then(|()| stdout.flush());
    written.map_err(|e| anyhow!("cannot write to the terminal: {e}"))
}
