//! `--profile FILE`: where the guest's time goes, written at the end of the run, and a perf map beside it.

mod file;
mod json;
mod perf_map;
mod text;

use std::{
    path::{Path, PathBuf},
    process,
    sync::Arc,
};

use anyhow::Result;
use purlin_vmm::{engines::Chosen, profile::Profile};

use crate::{exit::Ended, terminal};

/// What is said where the engine has no profile.
pub const NOT_OF_KVM: &str =
    "--profile shows what the translator does, not KVM: give --engine translator, or leave --profile out";

/// A profile that is being made.
pub struct Profiling {
    path: PathBuf,
    profile: Arc<Profile>,
}

impl Profiling {
    /// One that is to go to the file at `path`, which can be written.
    pub fn open(path: &Path) -> Result<Self> {
        Ok(Self { path: file::check(path)?, profile: Arc::default() })
    }

    /// The engine with this profile; `None` if it has none.
    pub fn of(&self, chosen: Chosen) -> Result<Option<Chosen>> {
        Ok(chosen.profiled(self.profile.clone())?)
    }

    /// Writes it, now that the machine is gone.
    pub fn end(self, ended: Ended) -> Ended {
        let map = perf_map::path(process::id());
        let written = match self.write(&map) {
            Ok(()) => {
                let (path, map) = (self.path.display(), map.display());
                terminal::say(&format!("the profile is in '{path}'; 'perf report' finds its names in '{map}'"));
                return ended;
            }
            Err(error) => error,
        };
        match ended {
            Ended::Well => Ended::Failed(written),
            // That comes first.
            other => {
                terminal::say(&written.to_string());
                other
            }
        }
    }

    fn write(&self, map: &Path) -> Result<()> {
        let report = self.profile.report();
        let is_json = self.path.extension().is_some_and(|e| e == "json");
        let text = if is_json { json::report(&report) } else { text::report(&report) };
        file::replace(&self.path, &text)?;
        file::replace(map, &perf_map::text(&self.profile.pieces()))
    }
}
