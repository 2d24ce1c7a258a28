//! Where a user's files are: `$PURLIN_HOME`, or else the directories of the XDG Base Directory Specification.

use std::{env, path::PathBuf};

use crate::Error;

/// What can be obtained again: `$PURLIN_HOME/cache`, or else `purlin` in `$XDG_CACHE_HOME` (`~/.cache`).
pub fn cache() -> Result<PathBuf, Error> {
    directory("cache", "XDG_CACHE_HOME", ".cache")
}

/// What the user made and keeps: `$PURLIN_HOME/data`, or else `purlin` in `$XDG_DATA_HOME` (`~/.local/share`).
pub fn data() -> Result<PathBuf, Error> {
    directory("data", "XDG_DATA_HOME", ".local/share")
}

/// What is there as long as somebody runs: `$PURLIN_HOME/run`, or else `purlin` in `$XDG_RUNTIME_DIR`, or `run` in [`data`].
pub fn run() -> Result<PathBuf, Error> {
    match (set("PURLIN_HOME"), set("XDG_RUNTIME_DIR").filter(|path| path.is_absolute())) {
        (None, Some(base)) => Ok(base.join("purlin")),
        (None, None) => Ok(data()?.join("run")),
        (Some(home), _) => std::path::absolute(home.join("run")).map_err(Error::file("find", &home)),
    }
}

fn set(name: &str) -> Option<PathBuf> {
    env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

fn directory(ours: &str, xdg: &'static str, default: &str) -> Result<PathBuf, Error> {
    // "All paths must be absolute … consider a relative path invalid and ignore it" (XDG Base Directory).
    match (set("PURLIN_HOME"), set(xdg).filter(|path| path.is_absolute()), set("HOME")) {
        (Some(home), _, _) => std::path::absolute(home.join(ours)).map_err(Error::file("find", &home)),
        (None, Some(base), _) => Ok(base.join("purlin")),
        (None, None, Some(home)) => Ok(home.join(default).join("purlin")),
        (None, None, None) => Err(Error::NoHome(xdg)),
    }
}
