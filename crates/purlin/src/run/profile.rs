//! `--profile FILE`: where the guest's time goes, written at the end of the run, and a perf map beside it.

mod file;
mod json;
mod perf_map;
mod text;

use std::path::{Path, PathBuf};

use anyhow::Result;
use purlin_vmm::profile::Profile;
use serde::{Deserialize, Serialize};

use crate::{exit::Ended, terminal};

/// What is said where the engine has no profile.
pub const NOT_OF_KVM: &str =
    "--profile shows what the translator does, not KVM: give --engine translator, or leave --profile out";

/// How the report is to be written.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub enum Form {
    /// For people.
    Text,
    /// For programs.
    Json,
}

/// A profile, as the machine's process hands it to the command, which has the files.
#[derive(Debug, Serialize, Deserialize)]
pub struct Written {
    report: String,
    map: String,
}

impl Written {
    /// What there is at the end of the run.
    pub fn of(profile: &Profile, form: Form) -> Self {
        let report = profile.report();
        let report = match form {
            Form::Json => json::report(&report),
            Form::Text => text::report(&report),
        };
        Self { report, map: perf_map::text(&profile.pieces()) }
    }
}

/// Where a profile is to go.
pub struct Profiling {
    path: PathBuf,
}

impl Profiling {
    /// The file at `path`, which can be written.
    pub fn open(path: &Path) -> Result<Self> {
        Ok(Self { path: file::check(path)? })
    }

    /// What is to be in it.
    pub fn form(&self) -> Form {
        if self.path.extension().is_some_and(|e| e == "json") { Form::Json } else { Form::Text }
    }

    /// Writes it, now that the machine is gone, whose process was `process`.
    pub fn end(self, ended: Ended, written: &Written, process: u32) -> Ended {
        let map = perf_map::path(process);
        let error = match file::replace(&self.path, &written.report).and_then(|()| file::replace(&map, &written.map)) {
            Ok(()) => {
                let (path, map) = (self.path.display(), map.display());
                terminal::say(&format!("the profile is in '{path}'; 'perf report' finds its names in '{map}'"));
                return ended;
            }
            Err(error) => error,
        };
        match ended {
            Ended::Well => Ended::Failed(error),
            // That comes first.
            other => {
                terminal::say(&error.to_string());
                other
            }
        }
    }
}
