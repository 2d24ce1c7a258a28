//! `purlin completions`: what has a shell complete this program's command lines.

use std::io::{Write, stdout};

use anyhow::Result;
use clap::{Args, CommandFactory, ValueEnum};
use clap_complete::{Shell, generate};

use crate::{Cli, exit::Ended};

/// Print a script with which a shell completes purlin's verbs and options
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct CompletionsArgs {
    /// The shell
    shell: Known,
}

/// Shells.
#[derive(Clone, Copy, ValueEnum)]
enum Known {
    Bash,
    Zsh,
    Fish,
}

const EXAMPLES: &str = "\
Examples:
  source <(purlin completions bash)           for this shell
  purlin completions bash > ~/.local/share/bash-completion/completions/purlin
  purlin completions zsh > ~/.zfunc/_purlin   where ~/.zfunc is in fpath, before compinit
  purlin completions fish > ~/.config/fish/completions/purlin.fish";

/// Prints it.
pub fn completions(args: &CompletionsArgs) -> Result<Ended> {
    let shell = match args.shell {
        Known::Bash => Shell::Bash,
        Known::Zsh => Shell::Zsh,
        Known::Fish => Shell::Fish,
    };
    let mut script = Vec::new();
    generate(shell, &mut Cli::command(), "purlin", &mut script);
    // Nobody is left to tell if standard output is closed.
    let _ = stdout().write_all(&script);
    Ok(Ended::Well)
}
