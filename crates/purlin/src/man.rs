//! `purlin man`: the manual's pages, made of what `--help` says.

use std::{fs, path::PathBuf};

use anyhow::{Result, anyhow};
use clap::{Args, CommandFactory};

use crate::{Cli, exit::Ended};

/// Write the manual's pages, one for each verb, into a directory
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct ManArgs {
    /// The directory; made if it is missing
    dir: PathBuf,
}

const EXAMPLES: &str = "\
Examples:
  purlin man ~/.local/share/man/man1
  man purlin-launch";

/// Writes them.
pub fn man(args: &ManArgs) -> Result<Ended> {
    let dir = &args.dir;
    fs::create_dir_all(dir).map_err(|e| anyhow!("cannot make the directory {}: {e}", dir.display()))?;
    clap_mangen::generate_to(Cli::command(), dir)
        .map_err(|e| anyhow!("cannot write the manual's pages to {}: {e}", dir.display()))?;
    Ok(Ended::Well)
}
