//! How the process ends: its exit status and the one line that explains it.

use std::process::ExitCode;

use crate::{signals::Signal, terminal};

/// The exit statuses, for `--help`.
pub const HELP: &str = "\
Exit status:
  0      the guest powered off (or reset, with --no-reboot), or you ended the run with Ctrl-A x
  1      the machine could not be started, its console was lost, or its profile could not be written
  2      wrong usage
  4      the guest crashed (its kernel panicked, with --on-panic exit or --no-reboot), the engine failed, or the
         machine's process was killed
  128+n  ended by signal n
  With --device debug-exit a guest that writes v to port 0xf4 ends the run with (v << 1) | 1.";

/// How a verb ended.
#[derive(Debug)]
pub enum Ended {
    /// As it should.
    Well,
    /// The guest chose the status.
    WithStatus(u8),
    /// It could not be done.
    Failed(anyhow::Error),
    /// The command line makes no sense.
    WrongUsage(String),
    /// The guest crashed or the engine failed.
    Crashed(String),
    /// A signal asked for the end.
    Signalled(Signal),
}

impl Ended {
    /// Says why, where that needs saying, and gives the exit status.
    pub fn report(self) -> ExitCode {
        let (status, line) = match self {
            Self::Well => (0, None),
            Self::WithStatus(status) => (status, None),
            // Not the chain: each error of ours says its cause itself.
            Self::Failed(error) => (1, Some(error.to_string())),
            Self::WrongUsage(line) => (2, Some(line)),
            Self::Crashed(line) => (4, Some(line)),
            Self::Signalled(signal) => (128 + signal as u8, Some(format!("ended by {}", signal.as_str()))),
        };
        if let Some(line) = line {
            terminal::say(&line);
        }
        ExitCode::from(status)
    }
}

impl From<anyhow::Error> for Ended {
    fn from(error: anyhow::Error) -> Self {
        Self::Failed(error)
    }
}
