//! Formatting, and clippy's warnings as errors.

use anyhow::Result;

use crate::shell::{cargo, run};

/// Checks both.
pub fn check() -> Result<()> {
    run(&mut cargo(&["fmt", "--all", "--check"]))?;
    run(&mut cargo(&["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"]))
}
