//! schemathesis itself, in an environment of Python's of its own.

use std::{fs, path::PathBuf, process::Command};

use anyhow::{Context, Result};

use crate::shell::{root, run, target};

/// Installs what `xtask/schemathesis.txt` names, unless that is there already; the program.
pub fn install() -> Result<PathBuf> {
    let list = root().join("xtask/schemathesis.txt");
    let wanted = fs::read_to_string(&list).with_context(|| format!("cannot read {}", list.display()))?;
    let dir = target().join("xtask/schemathesis");
    let (program, installed) = (dir.join("bin/schemathesis"), dir.join("installed.txt"));
    if fs::read_to_string(&installed).is_ok_and(|installed| installed == wanted) {
        return Ok(program);
    }
    run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&dir))?;
    run(Command::new(dir.join("bin/pip")).args(["install", "-q", "--disable-pip-version-check", "-r"]).arg(&list))?;
    fs::write(&installed, wanted).with_context(|| format!("cannot write {}", installed.display()))?;
    Ok(program)
}
